"""What `attach` and other hooks on an optimizer refuse, and what they warn of."""

import warnings
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bayesprune.errors import UnsupportedModelError
from bayesprune.foundation.sharding import full_tensor
from bayesprune.layers import Posterior
from bayesprune.train.optimizers import unwrapped

_CUTS_APART = ("FullyShardedDataParallel", "DeepSpeedOptimizerWrapper", "DataParallel")
_STEPS_OTHERWISE = ("LBFGS", "Lomo", "AdaLomo", "LayerWiseDummyOptimizer", "ScheduleFreeWrapper")


def check_num_data(num_data: int) -> None:
    """Refuses a number of examples that is none.

    Raises:
        ValueError: it is not above 0.
    """
    if not num_data > 0:
        raise ValueError(f"num_data is {num_data!r}; expected the number of training examples, above 0.")


def check_options(temperature: float | str, std_lr: float, max_noise_cost: float | None) -> None:
    """Refuses numbers out of range.

    Raises:
        ValueError: one of them is.
    """
    if temperature != "auto" and (isinstance(temperature, str) or not temperature >= 0):
        raise ValueError(f'temperature is {temperature!r}; expected a number of 0 or more, or "auto".')
    if not std_lr >= 0:
        raise ValueError(f"std_lr is {std_lr!r}; expected a learning rate of 0 or more.")
    if max_noise_cost is not None and not max_noise_cost > 0:
        raise ValueError(f"max_noise_cost is {max_noise_cost!r}; expected a number above 0, or None for no bound.")


def check_warmup(warmup: float) -> None:
    """Refuses a warm-up that is no share of the training.

    Raises:
        ValueError: it is none.
    """
    if not 0 <= warmup <= 1:
        raise ValueError(f"warmup is {warmup!r}; expected a share of the training, 0 to 1, not a number of steps.")


def check_schedule(prune: Any) -> None:
    """Refuses what says not when how much is removed.

    Raises:
        TypeError: `prune` is no schedule, nor None.
    """
    if prune is not None and not (hasattr(prune, "sparsity_at") and hasattr(prune, "remove")):
        raise TypeError(
            f'prune is {prune!r}; expected a schedule, such as bayesprune.prune.PruneSchedule("weights=0.2"), or None.'
        )


def check_length(num_steps: int | None, warmup: float, prune: Any) -> None:
    """Refuses shares of a training whose length is not known, and what is no schedule.

    Raises:
        TypeError: `prune` is no schedule.
        ValueError: `warmup` is no share, or `num_steps` is missing or out of range.
    """
    check_warmup(warmup)
    check_schedule(prune)
    if num_steps is None and (warmup or prune is not None):
        raise ValueError(
            f"warmup={warmup!r} and prune={prune!r} go by shares of the training, whose length is not known; pass "
            "num_steps, the number of optimizer steps of the whole training."
        )
    if num_steps is not None and not num_steps > 0:
        raise ValueError(f"num_steps is {num_steps!r}; expected the optimizer steps of the whole training, 1 or more.")


def check_types(optimizer: Any, model: Any, caller: str = "attach") -> None:
    """Refuses what is no optimizer or no model, and what cuts means and stds apart; `caller` is named in messages.

    Raises:
        TypeError: the arguments are swapped, or something else.
        UnsupportedModelError: DeepSpeed, FSDP 1, DataParallel, or an optimizer that does not take a step by `step`.
    """
    if isinstance(optimizer, nn.Module) or isinstance(model, Optimizer):
        raise TypeError(
            f"{caller} got a {type(optimizer).__name__} and a {type(model).__name__}; expected the optimizer first: "
            f"{caller}(optimizer, model, ...)."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller} got a {type(model).__name__} as model; expected a torch module.")
    for kind in (type(optimizer), type(unwrapped(optimizer)), type(model)):
        if kind.__module__.startswith("deepspeed") or kind.__name__ in _CUTS_APART:
            raise UnsupportedModelError(
                f"{caller} got {kind.__name__}, which copies, flattens or cuts parameters so that means and stds no "
                "longer fit; expected the model itself, or DDP or FSDP 2 where training is distributed."
            )
        if kind.__name__ in _STEPS_OTHERWISE:
            raise UnsupportedModelError(
                f"{caller} got {kind.__name__}, which moves weights during backward, between steps or several times in "
                "one; expected a first-order optimizer that moves them once, in its step()."
            )
    if not isinstance(unwrapped(optimizer), Optimizer):
        raise TypeError(
            f"{caller} got a {type(optimizer).__name__} as optimizer; expected a torch.optim.Optimizer. Where several "
            "share the model, attach to each of them."
        )


def check_hooks(optimizer: Optimizer, caller: str = "attach") -> None:
    """Refuses an optimizer whose steps run no hooks; `caller` is named in messages.

    Raises:
        UnsupportedModelError: it was not made as torch's optimizers are, or is stepped by other functions.
    """
    name = type(optimizer).__name__
    if not getattr(type(optimizer).step, "hooked", False) or not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise UnsupportedModelError(
            f"{caller} got {name}, whose step() runs no hooks, because its __init__ does not call that of "
            "torch.optim.Optimizer; attach to the optimizer inside it."
        )
    if hasattr(optimizer, "second_step"):
        raise UnsupportedModelError(
            f"{caller} got {name}, which is stepped by first_step() and second_step() and has no base_optimizer, whose "
            "step() could be hooked; expected one that has, or an ordinary optimizer."
        )


def check_groups(
    optimizer: Optimizer, posteriors: Collection[Posterior], attached: Iterable[Collection[Posterior]]
) -> None:
    """Refuses an optimizer of another model, and one that has an attachment; warns of weight decay.

    Args:
        optimizer: The optimizer.
        posteriors: Those to attach.
        attached: Those of each attachment that it has.

    Raises:
        ValueError: it holds none of the means, has an attachment to them, or maximizes.
    """
    means = {id(posterior.mean) for posterior in posteriors}
    held = 0
    decay = 0.0
    for group in optimizer.param_groups:
        count = sum(id(parameter) in means for parameter in group["params"])
        held += count
        decay = max(decay, group.get("weight_decay", 0.0) if count else 0.0)
        if count and group.get("maximize", False):
            raise ValueError(
                f"{type(optimizer).__name__} has maximize=True, and would raise the KL, too; expected one that makes "
                "the loss smaller: turn the sign of the loss, and leave maximize out."
            )
    if any(id(other.mean) in means for others in attached for other in others):
        raise ValueError(
            f"{type(optimizer).__name__} has an attachment to this model already; call its detach() first."
        )
    if not held:
        raise ValueError(
            f"{type(optimizer).__name__} holds none of the model's {len(means)} posterior means; expected the "
            "optimizer of this very model. Create it from model.parameters() and attach both together."
        )
    if decay:
        warnings.warn(
            f"{type(optimizer).__name__} has weight_decay={decay:g} on posterior means, a second Gaussian prior beside "
            "the one attached; set weight_decay=0 for them, unless that is meant.",
            stacklevel=3,
        )


@torch.no_grad()
def collapsed_layers(posteriors: Iterable[Posterior]) -> Iterator[tuple[str, float]]:
    """Names of the weights that all have an SNR below 1, and the largest; those removed altogether are passed over."""
    found: list[tuple[str, Tensor, Tensor | None]] = []
    for posterior in posteriors:
        if posterior.is_weight:
            mask = posterior.layer.mask(posterior.parameter, whole=True)
            log_snr = posterior.mean.abs().to(posterior.log_std.dtype).log_().sub_(posterior.log_std).amax()
            found.append((posterior.name, full_tensor(log_snr).exp(), None if mask is None else mask.any()))
    for name, largest, is_there in found:  # what has to wait for the device does so when all is under way
        if float(largest) < 1 and (is_there is None or bool(is_there)):
            yield name, float(largest)
