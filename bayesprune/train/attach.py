"""Trains posteriors inside any ordinary training loop: a hook that runs before each step of the user's optimizer.

The hook adds the closed-form gradient of temperature * KL / num_data to the gradients of the means, moves the log stds
with an Adam of its own and hides them from the user's optimizer. It runs once per optimizer step, so gradient
accumulation and data-parallel training need no correction, and the loss stays the plain mean negative log-likelihood.
"""

import logging
import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from bayesprune.layers import Posterior, VariationalLayer
from bayesprune.layers.sharding import values_sharded_as
from bayesprune.priors import BoundPrior, Gaussian, Prior
from bayesprune.train.checks import check_groups, check_options, check_types, collapsed_layers
from bayesprune.train.fused import Target, add_kl_gradients, bound_log_std
from bayesprune.train.gates import GateTraining
from bayesprune.train.kl import bind_prior, collapsed_groups, refresh_scales
from bayesprune.train.noise_cost import NoiseCost, dearest, scale_back
from bayesprune.train.optimizers import (
    StepCount,
    add_to_first_group,
    grad_scaler_tensors,
    has_fused_kernel,
    step_scaled,
    unwrapped,
)
from bayesprune.train.statistics import MeanStatistics

_LOGGER = logging.getLogger(__name__)
_CHECK_EVERY = 100  # steps between two looks for collapsed layers
_MUCH = 5.0  # times `max_noise_cost`: noise of which a user is to hear


class Attachment:
    """What `attach` returns: the hook's state, and the means to look at it, save it and end it.

    Attributes:
        temperature: Weight of the KL; may be changed at any time.
        num_data: Number of training examples (label tokens for a language model).
        warmup_steps: Optimizer steps over which the weight of the KL rises linearly from zero.
        max_noise_cost: What the noise may cost the loss; may be changed at any time.
        noise_cost: What it cost over the last ten steps, in units of the loss; None before.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        bound: dict[Posterior, BoundPrior],
        gates: GateTraining,
        model: nn.Module,
        *,
        num_data: int,
        temperature: float,
        warmup_steps: int,
        std_lr: float,
        max_noise_cost: float | None,
    ) -> None:
        """Use `attach`."""
        self.num_data, self.temperature, self.warmup_steps = num_data, temperature, warmup_steps
        self.max_noise_cost, self.noise_cost = max_noise_cost, None
        self._bound, self._gates, self._steps = bound, gates, StepCount()
        self._parts = {posterior: posterior.log_std_parts for posterior in bound}  # frozen ones may thaw
        self._noise, self._statistics = NoiseCost(self._parts), MeanStatistics(model, self._steps)
        self._stds = list({id(part): part for parts in self._parts.values() for part in parts}.values())
        self._std_optimizer = Adam(self._stds, lr=std_lr, fused=has_fused_kernel(self._stds))
        self._optimizer = optimizer
        self._added = add_to_first_group(optimizer, [*self._stds, *gates.logits])
        self._warned: set[tuple[str, str]] = set()
        self._handle = optimizer.register_step_pre_hook(self._before_step)

    @property
    def step(self) -> int:
        """Optimizer steps taken so far, those that a gradient scaler skipped not counted."""
        return self._steps.value

    @step.setter
    def step(self, value: int) -> None:
        self._steps.value = value

    @property
    def kl_weight(self) -> float:
        """What the next step multiplies the KL by, relative to a loss that is a mean per example."""
        is_ramp_over = self._steps.at_least + 1 >= self.warmup_steps
        ramp = 1.0 if is_ramp_over else min(1.0, (self.step + 1) / self.warmup_steps)
        return self.temperature * ramp / self.num_data

    def kl_divergence(self) -> Tensor:
        """KL divergence of weights and gates from their priors, in nats: a differentiable scalar."""
        return self._gates.kl(self._bound)

    def detach(self) -> None:
        """Ends it: the optimizer is as it was before `attach`, and moves no std that it did not hold then."""
        self._handle.remove()
        self._statistics.end()
        added = {id(part) for part in self._added}
        for group in self._optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in added]

    def state_dict(self) -> dict[str, Any]:
        """Step, the state of the stds' and the gates' optimizers, the prior's constants; tensors, names and numbers."""
        return {
            "step": self.step,
            "std_optimizer": self._std_optimizer.state_dict(),
            "prior": {posterior.name: prior.state() for posterior, prior in self._bound.items()},
            "gates": self._gates.state_dict(),
            "noise": self._noise.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from the state of an attachment to the same model; its tensors may be whole where FSDP 2 shards.

        Raises:
            ValueError: the state belongs to other posteriors.
        """
        names = [posterior.name for posterior in self._bound]
        if list(state["prior"]) != names:
            differing = sorted(set(state["prior"]) ^ set(names))[:5]
            raise ValueError(
                f"the attachment's state has {len(state['prior'])} posteriors, the model {len(names)}; differing: "
                f"{differing or 'the order'}. Convert the model as in the run that was saved."
            )
        for posterior, prior in self._bound.items():
            saved, attached = set(state["prior"][posterior.name]), set(prior.state())
            if saved != attached:
                raise ValueError(
                    f"the state has a prior with {sorted(saved) or 'no constants'} for {posterior.name}, the "
                    f"one attached has {sorted(attached) or 'none'}; expected the prior of the run that was saved."
                )
        self._gates.load_state_dict(state.get("gates", {}))
        if "noise" in state:
            self._noise.load(state["noise"])
        self.step = state["step"]
        self._std_optimizer.load_state_dict(state["std_optimizer"])
        for part, values in self._std_optimizer.state.items():
            values.update(values_sharded_as(part, values))
        for posterior, prior in self._bound.items():
            constants = values_sharded_as(posterior.mean, state["prior"][posterior.name])
            self._bound[posterior] = prior.with_state(constants)

    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._update(optimizer)
            return None

        def closure_and_update() -> Any:  # Lightning computes the gradients inside the step
            loss = closure()
            self._update(optimizer)
            return loss

        return args[:1], {**kwargs, "closure": closure_and_update}

    @torch.no_grad()
    def _update(self, optimizer: Optimizer) -> None:
        self._check_that_nothing_was_replaced()
        scale, found_inf = grad_scaler_tensors(optimizer)
        weight = self.kl_weight
        self._noise.add(scale, found_inf)  # of the loss alone
        refresh_scales(self._bound, self._gates.keep)
        add_kl_gradients(list(self._targets()), weight, scale)
        self._gates.add_gradients(self._bound, weight, scale)
        step_scaled(self._std_optimizer, scale, found_inf)
        self._gates.step(found_inf)
        self._statistics.update()
        if (costs := self._noise.take()) is not None:
            self._bound_noise(costs)
        for posterior, prior in self._bound.items():
            if moving := [part for part in self._parts[posterior] if part.requires_grad]:
                bound_log_std(moving, prior.max_log_std)
        self._steps.add(found_inf)
        for part in (*self._stds, *self._gates.logits):
            part.grad = None
        if self._steps.at_most % _CHECK_EVERY == 0:
            self._warn_of_collapse()

    def _bound_noise(self, costs: dict[str, float]) -> None:
        """Scales the stds back where the noise costs more than it may; says so where it costs much more."""
        cost, limit = sum(costs.values()), self.max_noise_cost
        self.noise_cost = cost
        if limit is None or not limit < cost < math.inf:
            return
        step = self._steps.at_most + 1
        if self.temperature < 1:
            factor = scale_back(self._parts, cost, limit)
            done = f"all stds were multiplied by {factor:.2g}, which brings it to max_noise_cost={limit:g}"
            advice = "Convert with a smaller relative_std, or leave these layers out with filter_fn"
            _LOGGER.info("the noise costs %.2g of the loss at step %d: %s", cost, step, done)
        else:
            done = f"at temperature={self.temperature:g} nothing bounds it"
            advice = "Lower the temperature below 1, or pass max_noise_cost=None where so much noise is meant"
        if cost > _MUCH * limit:
            self._warn(
                "cost",
                "the noise of the weights",
                f"it adds {cost:.2g} to the training loss of the means at step {step}, most of it in "
                f"{dearest(costs)}; {done}. {advice}.",
            )

    def _check_that_nothing_was_replaced(self) -> None:
        for posterior, parts in self._parts.items():
            layer = posterior.layer
            now = layer.log_std_parts(posterior.parameter) if isinstance(layer, VariationalLayer) else []
            if len(now) != len(parts) or any(part is not old for part, old in zip(now, parts, strict=True)):
                raise RuntimeError(
                    f"{posterior.name} was resized or made deterministic after attach, so its stds would no longer "
                    "move; call detach() first, then make a new optimizer and attach again where training goes on."
                )

    def _targets(self) -> Iterator[Target]:
        """The posteriors that are part of this step; torch's weight decay leaves the others alone, too."""
        for posterior, prior in self._bound.items():
            mean, parts = posterior.mean, self._parts[posterior]
            has_draw = any(part.grad is not None for part in parts)
            if has_draw or mean.grad is not None:
                yield Target(mean, parts, prior, self._gates.keep(posterior))
            if mean.grad is not None and not has_draw and parts[0].requires_grad:
                self._warn(
                    "noise",
                    posterior.name,
                    "its gradient does not come from a draw: the weight is used without calling the layer's forward, "
                    "or the layer is in eval mode. Its std stays as it is and says nothing; use filter_fn.",
                )

    def _warn_of_collapse(self) -> None:
        for name, largest in collapsed_layers(self._bound):
            self._warn(
                "collapse",
                name,
                f"every weight has an SNR below 1 (largest {largest:.2g}) at step {self.step}: the prior has switched "
                "the whole layer off. Lower the temperature, warm it up, or use a fixed prior scale.",
            )
        for name in self._gates.closed():
            self._warn(
                "gates",
                name,
                f"all its gates are closed at step {self.step}: the prior has switched it off. Lower the temperature, "
                "warm it up, or raise prior_inclusion.",
            )
        for name in collapsed_groups(self._bound):
            self._warn(
                "group",
                name,
                "all units of its dependency group have prior stds below a hundredth of what they were at the start, "
                f"at step {self.step}: the prior has switched the group off. Lower the temperature, or warm it up.",
            )

    def _warn(self, kind: str, name: str, message: str) -> None:
        if (kind, name) not in self._warned:
            self._warned.add((kind, name))
            warnings.warn(f"{name}: {message}", stacklevel=2)


def attach(
    optimizer: Optimizer,
    model: nn.Module,
    *,
    num_data: int,
    prior: Prior | None = None,
    temperature: float = 0.1,
    warmup_steps: int = 0,
    std_lr: float = 1e-2,
    max_noise_cost: float | None = 0.2,
) -> Attachment:
    """Makes each step of this optimizer a step on mean NLL + temperature * KL / num_data; the loop stays as it is.

    The loss must be a mean per example (label token). The stds are moved by the attachment alone, whether the optimizer
    holds them or not: learning rate, schedule and weight decay do not touch them. Parameters that the optimizer did not
    hold are put into its first group, so that a gradient scaler and `zero_grad` reach them; attach before loading an
    optimizer state that was saved with an attachment.

    Args:
        optimizer: Any torch optimizer without a closure, or accelerate's wrapper of one.
        model: The variational model whose means the optimizer trains (a DDP or compiled wrapper is fine).
        num_data: Number of training examples (label tokens for a language model).
        prior: The prior; None is `priors.Gaussian("layer_rms")`, fixed at the present weights.
        temperature: Weight of the KL; below 1 the posterior is colder than Bayes' rule says.
        warmup_steps: Optimizer steps over which the weight of the KL rises linearly from zero.
        std_lr: Learning rate of the log stds, about what one step moves them by. Short fine-tuning needs 1e-2; tens of
            thousands of steps rank better with 1e-3.
        max_noise_cost: What the noise may add to the loss of the means, in nats; it is measured from gradients over
            each ten steps. Where it costs more, all stds are scaled back together, so that a network keeps its accuracy
            while the stds still sort themselves. At temperatures from 1 on noise is wanted: nothing is bounded, and
            much of it is warned of. None neither bounds nor warns.

    Raises:
        ValueError: a number is out of range, the model has no variational layer, the optimizer holds none of it, or has
            an attachment to it already.
        UnsupportedModelError: DeepSpeed or FSDP 1, which cut means and stds apart.
    """
    check_options(num_data, temperature, warmup_steps, std_lr, max_noise_cost)
    check_types(optimizer, model)
    optimizer = unwrapped(optimizer)
    model = getattr(model, "_orig_mod", model)
    model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    gates = GateTraining(model)
    bound = bind_prior(model, Gaussian() if prior is None else prior, gates)
    hooks = [getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values()]
    check_groups(optimizer, bound, [hook._bound for hook in hooks if isinstance(hook, Attachment)])
    return Attachment(
        optimizer,
        bound,
        gates,
        model,
        num_data=num_data,
        temperature=temperature,
        warmup_steps=warmup_steps,
        std_lr=std_lr,
        max_noise_cost=max_noise_cost,
    )
