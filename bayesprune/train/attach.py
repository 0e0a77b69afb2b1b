"""Trains posteriors inside any ordinary training loop, by a hook on the user's optimizer.

Where several optimizers share a model each may have an attachment, which trains the posteriors whose means its
optimizer holds, and those that no other attachment trains.
"""

import logging
from collections.abc import Iterable
from typing import Literal

from torch import nn
from torch.optim import Optimizer

from bayesprune.foundation import defaults
from bayesprune.foundation.model import bare_model
from bayesprune.layers import Posterior, make_masks, named_posteriors
from bayesprune.priors import Gaussian, Prior
from bayesprune.train.attachment import ATTACHMENTS, Attachment
from bayesprune.train.averages import has_masks, warn_of_averages
from bayesprune.train.checks import (
    check_groups,
    check_hooks,
    check_length,
    check_num_data,
    check_options,
    check_types,
)
from bayesprune.train.complexity import complexity_of
from bayesprune.train.kl import bind_prior
from bayesprune.train.optimizers import held_by, unwrapped
from bayesprune.train.removal import Removal, RemovalSchedule
from bayesprune.train.temperature import default_temperature
from bayesprune.train.watch import end_watches

_LOGGER = logging.getLogger(__name__)


def attach(
    optimizer: Optimizer,
    model: nn.Module,
    *,
    num_data: int,
    num_steps: int | None = None,
    prior: Prior | None = None,
    temperature: float | Literal["auto"] = defaults.TEMPERATURE,
    warmup: float = 0.0,
    prune: RemovalSchedule | None = None,
    std_lr: float = defaults.STD_LR,
    max_noise_cost: float | None = defaults.MAX_NOISE_COST,
) -> Attachment:
    """Makes each step of this optimizer a step on mean NLL + temperature * KL / num_data; the loop stays as it is.

    The loss must be a mean per example (label token). The stds are moved by the attachment alone, whether the optimizer
    holds them or not: learning rate, schedule and weight decay do not touch them. Parameters that the optimizer did not
    hold are put into its first group, so that a gradient scaler and `zero_grad` reach them; attach before loading an
    optimizer state that was saved with an attachment.

    Where several optimizers share the model (Muon for matrices and AdamW for the rest, say), attach to each of them
    once: every attachment trains the posteriors whose means its optimizer holds, and takes them over from an earlier
    one. A warning says where weights are moved without the hook.

    Args:
        optimizer: Any torch optimizer that computes a step from one gradient; of accelerate's wrapper, Lookahead or SAM
            (`first_step` and `second_step`) the one inside is meant.
        model: The variational model whose means the optimizer trains (a DDP or compiled wrapper is fine).
        num_data: Number of training examples (label tokens for a language model).
        num_steps: Optimizer steps of the whole training, those before a resume included; `warmup` and `prune` need it.
            Steps that a gradient scaler skips do not count.
        prior: The prior; None is `priors.Gaussian("layer_rms")`, fixed at the present weights.
        temperature: Weight of the KL; below 1 the posterior is colder than Bayes' rule says. "auto" is 0.1, or less
            where there are more than 16 weights for an example; see `default_temperature`.
        warmup: Share of the training, 0 to 1, over which the weight of the KL rises linearly from zero.
        prune: When how much is removed of the single weights, `prune.PruneSchedule("weights=0.2")` say; None removes
            none. After the steps at which it is time, weights are set to zero, and what this optimizer remembers of
            them is cleared. The masks are made now, so that averages of the weights which are made later have them.
            Where several optimizers share the model, one attachment is given it.
        std_lr: Learning rate of the log stds, about what one step moves them by. Short fine-tuning needs 1e-2; tens of
            thousands of steps rank better with 1e-3.
        max_noise_cost: What the noise may add to the loss of the means, in nats; it is measured from gradients over
            each ten steps. Where it costs more, all stds are scaled back together, so that a network keeps its accuracy
            while the stds still sort themselves. At temperatures from 1 on noise is wanted: nothing is bounded, and
            much of it is warned of. None neither bounds nor warns.

    Raises:
        TypeError: the optimizer is none, or a list of them, or `prune` is no schedule.
        ValueError: a number is out of range, `num_steps` is missing, the model has no variational layer or none that
            trains, the optimizer holds none of it, maximizes, or has an attachment to it already.
        UnsupportedModelError: DeepSpeed, FSDP 1 or `nn.DataParallel`, which cut means and stds apart, or an optimizer
            that takes no step through `step`.
    """
    check_types(optimizer, model)
    check_num_data(num_data)
    check_options(temperature, std_lr, max_noise_cost)
    check_length(num_steps, warmup, prune)
    optimizer = unwrapped(optimizer)
    check_hooks(optimizer)
    model = bare_model(model)
    complexity = complexity_of(model)
    complexity.plan(num_steps)
    bound = bind_prior(model, Gaussian() if prior is None else prior, complexity)
    owners = [getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values()]
    check_groups(optimizer, bound, [owner._parts for owner in owners if isinstance(owner, Attachment)])
    if prune is not None:
        if not has_masks(model):
            warn_of_averages(model)
        make_masks(model)
    trained = _claim(optimizer, bound, is_whole=bool(complexity.parameters))
    temperature = default_temperature(model, num_data) if temperature == "auto" else temperature
    _LOGGER.info("the KL weighs temperature %g / num_data %d", temperature, num_data)
    return Attachment(
        optimizer,
        bound,
        complexity,
        model,
        trained=trained,
        num_data=num_data,
        temperature=temperature,
        warmup_steps=warmup * (num_steps or 0),
        removal=Removal(prune, num_steps, model) if prune is not None and num_steps is not None else None,
        std_lr=std_lr,
        max_noise_cost=max_noise_cost,
    )


def is_attached(model: nn.Module) -> bool:
    """Whether an attachment trains posteriors of this model."""
    trained = set().union(*map(_means_of, ATTACHMENTS))
    return any(id(posterior.mean) in trained for posterior in named_posteriors(model))


def _means_of(attachment: Attachment) -> set[int]:
    """Ids of the means that it trains, as far as they are still there: it may be one that nobody uses any more."""
    return {id(getattr(posterior.layer, posterior.parameter, None)) for posterior in attachment._parts}


def _claim(optimizer: Optimizer, posteriors: Iterable[Posterior], *, is_whole: bool) -> list[Posterior]:
    """Those that an attachment to this optimizer trains: what it holds, and what no other attachment trains.

    Args:
        optimizer: Of the attachment.
        posteriors: Those of the model.
        is_whole: Whether no other optimizer may train a part of the model, because of its gates.
    """
    held = held_by(optimizer)
    others = {attachment: _means_of(attachment) for attachment in ATTACHMENTS}
    trained = [p for p in posteriors if id(p.mean) in held or not any(id(p.mean) in means for means in others.values())]
    means = {id(posterior.mean) for posterior in trained}
    of_model = {id(posterior.mean) for posterior in posteriors}
    if is_whole and any(of_model & (theirs - means) for theirs in others.values()):
        raise ValueError(
            "the model has gates, and another optimizer is attached to a part of it; expected one optimizer for a "
            "model with gates, because they count in the KL of all weights."
        )
    end_watches(means)
    for attachment, theirs in others.items():
        if theirs & means:
            attachment._give_up(means)
    return trained
