"""What `attach` returns: the hooks that run before and after each step of the user's optimizer, and their state.

The first adds the closed-form gradient of temperature * KL / num_data to the gradients of the means, moves the log stds
with an Adam of its own and hides them from the user's optimizer. It runs once per optimizer step, so gradient
accumulation and data-parallel training need no correction, and the loss stays the plain mean negative log-likelihood.
The second removes weights when it is time, and sets to zero again what was removed.
"""

import logging
import math
import warnings
import weakref
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from bayesprune.foundation.sharding import shard_values_like
from bayesprune.layers import JointDraws, Posterior, VariationalLayer, variational_layers
from bayesprune.layers.masks import Keeper
from bayesprune.priors import BoundPrior
from bayesprune.train.bounds import bound_log_stds
from bayesprune.train.checks import collapsed_layers
from bayesprune.train.complexity import Complexity
from bayesprune.train.fused import KLTerm, add_kl_gradients, has_kl, mark_with_kl
from bayesprune.train.kl import collapsed_groups, refresh_scales
from bayesprune.train.noise_cost import NoiseCost, dearest, scale_back
from bayesprune.train.optimizers import (
    StepCount,
    add_to_first_group,
    grad_scaler_tensors,
    has_fused_kernel,
    held_by,
    put_back,
    put_last,
    step_scaled,
    take_out,
    with_gradients,
)
from bayesprune.train.removal import Removal
from bayesprune.train.statistics import MeanStatistics
from bayesprune.train.watch import Probes, Watch

_LOGGER = logging.getLogger(__name__)
_CHECK_EVERY = 100  # steps between two looks for collapsed layers, and for means that something else moves
_CHECK_FIRST = 10  # when that is looked for the first time
_MUCH = 5.0  # times `max_noise_cost`: noise of which a user is to hear

ATTACHMENTS: "weakref.WeakSet[Attachment]" = weakref.WeakSet()
"""Those that are in use."""


class Attachment:
    """What `attach` returns: the hooks' state, and the means to look at it, save it and end it.

    Attributes:
        temperature: Weight of the KL once it is warm; may be changed at any time.
        num_data: Number of training examples (label tokens for a language model).
        warmup_steps: Optimizer steps over which the weight of the KL rises linearly from zero.
        max_noise_cost: What the noise may cost the loss; may be changed at any time.
        noise_cost: What it cost over the last ten steps, in units of the loss; None before.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        bound: dict[Posterior, BoundPrior],
        complexity: Complexity,
        model: nn.Module,
        *,
        trained: Collection[Posterior],
        num_data: int,
        temperature: float,
        warmup_steps: float,
        removal: Removal | None,
        std_lr: float,
        max_noise_cost: float | None,
    ) -> None:
        """Use `attach`."""
        self.num_data, self.temperature, self.warmup_steps = num_data, temperature, warmup_steps
        self.max_noise_cost, self.noise_cost = max_noise_cost, None
        self._bound, self._complexity, self._model = bound, complexity, model
        self._removal, self._steps = removal, StepCount()
        self._train({posterior: posterior.log_std_parts for posterior in trained})
        self._statistics = MeanStatistics(model, self._steps)
        self._std_optimizer = Adam(self._stds, lr=std_lr, fused=has_fused_kernel(self._stds))
        self._optimizer = optimizer
        self._taken_out = take_out(optimizer, [part for p in bound if p not in self._parts for part in p.log_std_parts])
        self._added = add_to_first_group(optimizer, [*self._stds, *complexity.parameters])
        self._given_up: list[Posterior] = []
        self._warned: set[tuple[str, str]] = set()
        layers = ((name, layer, layer.active_names()) for name, layer in variational_layers(model))
        self._draws = JointDraws(model, layers)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        put_last(optimizer)
        self._look()
        ATTACHMENTS.add(self)

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
        return (self.temperature if self._is_warm else self.temperature_at(self.step + 1)) / self.num_data

    @property
    def _is_warm(self) -> bool:
        return self._steps.at_least + 1 >= self.warmup_steps

    @property
    def sparsity(self) -> float:
        """The fraction of the weights that can go which the schedule has removed so far."""
        return 0.0 if self._removal is None else self._removal.sparsity

    def temperature_at(self, step: int) -> float:
        """The temperature of this step, counted from 1: while the KL warms up a part of `temperature`."""
        return self.temperature * (min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0)

    def kl_divergence(self) -> Tensor:
        """KL divergence of weights and gates from their priors, in nats: a differentiable scalar.

        Of the posteriors that this attachment trains: all of the model, unless several optimizers share it.
        """
        return self._complexity.kl(self._trained)

    def detach(self) -> None:
        """Ends it: the optimizer is as it was before `attach`, and moves no std that it did not hold then."""
        for handle in self._handles:
            handle.remove()
        self._watch.end()
        self._masks.end()
        self._statistics.end()
        self._draws.remove()
        ATTACHMENTS.discard(self)
        take_out(self._optimizer, self._added)
        put_back(self._optimizer, self._taken_out)
        self._added, self._taken_out = [], []

    def state_dict(self) -> dict[str, Any]:
        """Step, the state of the stds' and the gates' optimizers, the prior's constants; tensors, names and numbers."""
        return {
            "step": self.step,
            "std_optimizer": self._std_optimizer.state_dict(),
            "prior": {posterior.name: prior.state() for posterior, prior in self._bound.items()},
            "complexity": self._complexity.state_dict(),
            "noise": self._noise.state(),
            "ahead": self._draws.state(),
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
        num_saved = len(state["std_optimizer"]["param_groups"][0]["params"])
        if num_saved != len(self._stds):
            raise ValueError(
                f"the attachment's state has moments of {num_saved} stds, and it trains {len(self._stds)}; expected "
                "the optimizers of the run that was saved, all of them attached before a state is loaded."
            )
        shapes = {index: moments["exp_avg"].shape for index, moments in state["std_optimizer"]["state"].items()}
        if wrong := [index for index, shape in shapes.items() if shape != self._stds[index].shape]:
            raise ValueError(
                f"the attachment's state has a std of shape {tuple(shapes[wrong[0]])} where the model has one of shape "
                f"{tuple(self._stds[wrong[0]].shape)}. Convert the model as in the run that was saved, with the same "
                "std=..."
            )
        self._complexity.load_state_dict(state["complexity"])
        self.step = state["step"]
        self._std_optimizer.load_state_dict(state["std_optimizer"])
        for part, values in self._std_optimizer.state.items():
            values.update(shard_values_like(part, values))
        for posterior, prior in self._bound.items():
            constants = shard_values_like(posterior.mean, state["prior"][posterior.name])
            self._bound[posterior] = prior.with_state(constants)
        self._train(self._parts)
        if self._removal is not None:
            self._removal.resume(self.step)
        self._probe()
        if "noise" in state:
            self._noise.load(state["noise"])
        self._draws.load(state.get("ahead", {}))

    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        return with_gradients(optimizer, args, kwargs, lambda: self._update(optimizer))

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        self._masks.apply()
        if self._removal is not None:
            self._removal.update(self._steps, optimizer)

    @torch.no_grad()
    def _update(self, optimizer: Optimizer) -> None:
        self._check_that_nothing_was_replaced()
        self._check_that_nothing_was_given_up()
        self._watch.saw_a_step()
        targets = list(self._targets())
        if not targets and any(posterior.mean.grad is not None for posterior in self._parts):
            return  # a step inside a step, or another one on gradients that have the KL already
        scale, found_inf = grad_scaler_tensors(optimizer)
        share = None if self._is_warm else self._steps.share_of(self.warmup_steps)
        weight = self.kl_weight if share is None else self.temperature / self.num_data
        self._noise.add(scale, found_inf)  # of the loss alone
        refresh_scales(self._bound, self._complexity.keep)
        add_kl_gradients(targets, weight, scale if share is None else share if scale is None else scale * share)
        mark_with_kl(targets)
        self._complexity.add_gradients(self._trained, weight, scale, share)
        step_scaled(self._std_optimizer, scale, found_inf)
        self._complexity.step(self._steps.at_most + 1, found_inf)
        self._statistics.update()
        if (costs := self._noise.take()) is not None:
            self._bound_noise(costs)
        moving = [([p for p in self._parts[q] if p.requires_grad], prior) for q, prior in self._trained.items()]
        bound_log_stds((parts, prior.max_log_std) for parts, prior in moving if parts)
        self._steps.add(found_inf)
        for part in (*self._stds, *self._complexity.parameters):
            part.grad = None
        if self._steps.at_most % _CHECK_EVERY == 0:
            self._warn_of_collapse()
        if self._steps.at_most % _CHECK_EVERY == 0 or self._steps.at_most == _CHECK_FIRST:
            self._warn_of_others()

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

    def _check_that_nothing_was_given_up(self) -> None:
        held = held_by(self._optimizer) if self._given_up else set()
        stepped = [p.name for p in self._given_up if id(p.mean) in held and p.mean.grad is not None]
        if stepped:
            raise RuntimeError(
                f"{type(self._optimizer).__name__} takes a step with {stepped[0]}, to which another optimizer was "
                "attached since; expected one attachment for each posterior. Leave its means out of one of the two, "
                "or call detach() and attach again where another optimizer goes on."
            )

    def _train(self, parts: dict[Posterior, list[nn.Parameter]]) -> None:
        """What it trains from now on: posteriors with their stds, of which frozen ones may thaw."""
        self._parts = parts
        self._trained = {posterior: self._bound[posterior] for posterior in parts}
        self._stds = list({id(part): part for those in parts.values() for part in those}.values())
        self._noise = NoiseCost(parts)

    def _look(self) -> None:
        """Begins to keep the zeros of what the optimizer holds, and to look out for others: who moves what when."""
        held = held_by(self._optimizer)
        trained = held & {id(posterior.mean) for posterior in self._parts}
        self._masks = Keeper(
            layer
            for _, layer in variational_layers(self._model)
            if trained.issuperset(id(getattr(layer, name)) for name in layer.active_names())
        )
        self._watch = Watch([p for p in self._parts if id(p.mean) in held], type(self._optimizer).__name__)
        self._probe()

    def _probe(self) -> None:
        """Remembers what the optimizer does not hold, as it is now."""
        held = held_by(self._optimizer)
        self._probes = Probes(posterior for posterior in self._parts if id(posterior.mean) not in held)

    def _give_up(self, means: Collection[int]) -> None:
        """Leaves the posteriors of the parameters with these ids to another attachment."""
        given_up = {p: parts for p, parts in self._parts.items() if id(p.mean) in means}
        self._train({p: parts for p, parts in self._parts.items() if p not in given_up})
        self._given_up += given_up
        gone = {id(part): part for parts in given_up.values() for part in parts}
        for part in gone.values():
            self._std_optimizer.state.pop(part, None)
        take_out(self._std_optimizer, gone.values())
        take_out(self._optimizer, [part for part in self._added if id(part) in gone])
        self._added = [part for part in self._added if id(part) not in gone]
        self._taken_out += take_out(self._optimizer, gone.values())
        self._watch.end()
        self._masks.end()
        if not self._parts:  # whose forwards and steps are those of others now
            self._statistics.end()
            self._draws.remove()
        self._look()

    def _targets(self) -> Iterator[KLTerm]:
        """The posteriors that are part of this step; torch's weight decay leaves the others alone, too."""
        for posterior, prior in self._trained.items():
            mean, parts = posterior.mean, self._parts[posterior]
            has_draw = any(part.grad is not None for part in parts)
            if not has_draw and has_kl(mean.grad):
                continue
            if has_draw or mean.grad is not None:
                yield KLTerm(mean, parts, prior, self._complexity.keep(posterior))
            is_drawn = posterior.layer.estimator != "mean"  # which the user chose
            if mean.grad is not None and not has_draw and is_drawn and parts[0].requires_grad:
                self._warn(
                    "noise",
                    posterior.name,
                    "its gradient does not come from a draw: the weight is used without calling the layer's forward, "
                    "or the layer is in eval mode. Its std stays as it is and says nothing. In Python, "
                    "leave it out with filter_fn.",
                )

    def _warn_of_collapse(self) -> None:
        for name, largest in collapsed_layers(self._parts):
            self._warn(
                "collapse",
                name,
                f"every weight has an SNR below 1 (largest {largest:.2g}) at step {self.step}: the prior has switched "
                "the whole layer off. Lower the temperature, warm it up, or use a fixed prior scale.",
            )
        for name, what in self._complexity.collapsed():
            self._warn(
                "gates",
                name,
                f"{what} at step {self.step}: the prior has switched it off. Lower the temperature, warm it up, or "
                "raise prior_inclusion.",
            )
        for name in collapsed_groups(self._bound):
            self._warn(
                "group",
                name,
                "all units of its dependency group have prior stds below a hundredth of what they were at the start, "
                f"at step {self.step}: the prior has switched the group off. Lower the temperature, or warm it up.",
            )

    def _warn_of_others(self) -> None:
        for name in self._probes.moved(held_by(self._optimizer)):
            self._warn(
                "mover",
                name,
                f"the {type(self._optimizer).__name__} that attach was given does not hold it, and something else "
                "moves it, without its KL. Attach to that optimizer as well.",
            )

    def _warn(self, kind: str, name: str, message: str) -> None:
        if (kind, name) not in self._warned:
            self._warned.add((kind, name))
            warnings.warn(f"{name}: {message}", stacklevel=2)
