"""An optimizer that carries a Gaussian posterior over every parameter, at one forward and backward a step.

Shen et al., "Variational Learning is Effective for Large Deep Networks", 2024, arXiv 2402.17641, Algorithm 1: a
variational online Newton method. The means are the parameters themselves; the variance of each is 1 / (N (h + d)) with
h an average of curvatures and d the weight decay. The prior is N(0, 1 / (N d)).

What differs: several draws for one step need no option, since gradients and curvatures of all draws add up as `.grad`
does, and the curvature is that of the draw as the parameter's precision rounds it.
"""

# pyright: reportPrivateImportUsage=false
# torch's own optimizers use `_foreach`, one kernel for many tensors; it has no public name.

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from bayesprune.layers import named_posteriors, variational_layers
from bayesprune.prediction.predict import sampling
from bayesprune.train.attachment import Attachment
from bayesprune.train.newton_step import newton_step_


class _Draw(NamedTuple):
    """What `sampled` puts back in a group: its means, and the gradients of the draws before."""

    parameters: list[Tensor]
    means: list[Tensor]
    gradients: list[Tensor | None]
    stds: list[Tensor]


class OnlineNewton(Optimizer):
    """A torch optimizer for any model, which trains means and stds together.

    Forward and backward run inside `sampled`, everything else stays as it is: parameter groups, schedulers of the
    learning rate, clipping of gradients, `state_dict`. With `bayesprune.laplace.online_newton_posterior` the stds
    become those of a variational model. Under data-parallel training all processes share each draw.

    Example:
        >>> import torch, bayesprune as bp
        >>> from bayesprune.train import OnlineNewton
        >>> model, x = torch.nn.Linear(4, 3), torch.randn(8, 4)
        >>> optimizer = OnlineNewton(model.parameters(), lr=0.1, num_data=50_000)
        >>> for _ in range(2):
        ...     optimizer.zero_grad()
        ...     with optimizer.sampled(model):
        ...         model(x).square().mean().backward()
        ...     _ = optimizer.step()
        >>> model = bp.laplace.online_newton_posterior(bp.to_variational(model), optimizer)
    """

    # Gradient scalers then say that they are there; `step` refuses them.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        num_data: float,
        hessian_init: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.99999),
        weight_decay: float = 1e-4,
        clip_radius: float = float("inf"),
        rescale_lr: bool = True,
    ) -> None:
        """Every option may differ between parameter groups.

        Args:
            params: Parameters or parameter groups, as for any torch optimizer; in float32 or float64.
            lr: Learning rate; with `rescale_lr` of SGD's size, as large as is stable, decayed to zero.
            num_data: Number of training examples (label tokens of a language model): the paper's effective sample
                size. A larger number makes a colder posterior, one over the temperature times as many.
            hessian_init: h before the first step. The first draws have variance 1 / (num_data (h + weight_decay));
                too small a number and they destroy a trained network.
            betas: Decay of the averaged gradient and of h. h forgets `hessian_init` after some 1 / (1 - betas[1])
                steps: for a run of T steps take about 1 - 5 / T.
            weight_decay: Precision of the prior over `num_data`, above zero.
            clip_radius: Largest entry of a Newton step before it is multiplied by the learning rate; 1e-3 say, for
                transformers from scratch.
            rescale_lr: Whether `lr` is multiplied by hessian_init + weight_decay.

        Raises:
            ValueError: an option is out of range.
            TypeError: a parameter is not float32 or float64.
        """
        defaults = {
            "lr": lr,
            "num_data": num_data,
            "hessian_init": hessian_init,
            "betas": betas,
            "weight_decay": weight_decay,
            "clip_radius": clip_radius,
            "rescale_lr": rescale_lr,
        }
        super().__init__(params, defaults)
        self._curvatures: dict[Tensor, Tensor] = {}  # of the draws since the last step
        self._draws: list[_Draw] = []  # one for each group, inside `sampled`

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, its options checked."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @contextmanager
    def sampled(self, model: nn.Module) -> Iterator[None]:
        """Inside, the parameters are a draw from the posterior; afterwards they are the means again, bit for bit.

        Backward must run inside. Each block is a draw of its own: for several draws a step, or accumulated batches, use
        a block for each and divide the losses by their number, as ever. Without a backward it is a prediction's draw.

        Args:
            model: The model that runs. If it is variational, its layers draw no noise of their own inside; removed
                weights stay zero, and stds that the optimizer was given with the other parameters are left alone.

        Raises:
            RuntimeError: it was entered already, or inside the model's `no_sync`.
        """
        if not getattr(model, "require_backward_grad_sync", True):
            raise RuntimeError(
                "sampled() was entered inside no_sync(), whose gradients stay those of one process; leave no_sync "
                "out, so that the gradients of each draw are averaged."
            )
        if self._draws:
            raise RuntimeError("sampled() was entered inside sampled(); leave the block of the first draw before.")
        is_variational = next(variational_layers(model), None) is not None
        with sampling(model, "mean") if is_variational else nullcontext():
            try:
                self._move_to_draw(model)
                yield
            finally:
                self._move_back()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets gradients and curvatures since the last step, those of a draw under way included."""
        super().zero_grad(set_to_none)
        self._curvatures.clear()
        for draw in self._draws:
            draw.gradients[:] = [None] * len(draw.gradients)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step from the gradients and curvatures of all draws since the last; a closure holds the draw itself.

        Raises:
            RuntimeError: gradients come from outside `sampled`, the call stands inside it, or a gradient scaler or an
                attachment is in use.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_step()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            states = [self._state_of(parameter, group) for parameter in parameters]
            for state in states:
                state["step"] += 1
            newton_step_(
                parameters,
                [state["momentum"] for state in states],
                [state["hessian"] for state in states],
                [parameter.grad for parameter in parameters],
                [self._curvatures[parameter] for parameter in parameters],
                [int(state["step"]) for state in states],
                lr=group["lr"] * (group["hessian_init"] + group["weight_decay"] if group["rescale_lr"] else 1.0),
                betas=group["betas"],
                weight_decay=group["weight_decay"],
                clip_radius=group["clip_radius"],
            )
        self._curvatures.clear()
        return loss

    def precision(self, parameter: Tensor) -> Tensor | None:
        """1 / variance of the posterior of a parameter, of its shape; None where it has not taken a step."""
        for group in self.param_groups:
            if any(parameter is held for held in group["params"]) and self.state.get(parameter, {}).get("step", 0) > 0:
                return group["num_data"] * (self.state[parameter]["hessian"] + group["weight_decay"])
        return None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._curvatures, self._draws = {}, []

    def _state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)  # a tensor, as in torch's own
            state["momentum"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["hessian"] = torch.full_like(
                parameter, group["hessian_init"], memory_format=torch.preserve_format, requires_grad=False
            )
        return state

    @torch.no_grad()
    def _move_to_draw(self, model: nn.Module) -> None:
        """Moves the parameters to a draw, and writes down what was there."""
        posteriors = list(named_posteriors(model))
        log_stds = {id(part) for posterior in posteriors for part in posterior.log_std_parts}
        generators: dict[torch.device, torch.Generator | None] = {}
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.requires_grad and id(p) not in log_stds]
            if not moved:
                continue
            for parameter in moved:
                if parameter.grad is None:  # zeroed since the last draw, perhaps by the model
                    self._curvatures.pop(parameter, None)
                if parameter.device not in generators:
                    generators[parameter.device] = _shared_generator(parameter.device)
            stds = list(torch._foreach_add([self._state_of(p, group)["hessian"] for p in moved], group["weight_decay"]))
            torch._foreach_mul_(stds, group["num_data"])
            torch._foreach_rsqrt_(stds)
            noise = [torch.empty_like(p).normal_(generator=generators[p.device]) for p in moved]
            self._draws.append(_Draw(moved, [p.clone() for p in moved], [p.grad for p in moved], stds))
            torch._foreach_addcmul_(moved, noise, stds)
            torch.clear_autocast_cache()  # of weights cast before the draw
            for parameter in moved:
                parameter.grad = None
        for posterior in posteriors:
            if (mask := posterior.mask) is not None:
                posterior.mean.mul_(mask)

    @torch.no_grad()
    def _move_back(self) -> None:
        """Moves the parameters back to their means; gradients and curvatures of the draw are added to those before."""
        for draw in self._draws:
            curvatures = torch._foreach_sub(draw.parameters, draw.means)
            torch._foreach_div_(curvatures, draw.stds)
            torch._foreach_div_(curvatures, draw.stds)
            torch._foreach_copy_(draw.parameters, draw.means)
            for parameter, before, curvature in zip(draw.parameters, draw.gradients, curvatures, strict=True):
                gradient = parameter.grad
                if gradient is None:
                    parameter.grad = before
                    continue
                curvature.mul_(gradient)
                if parameter in self._curvatures:
                    curvature.add_(self._curvatures[parameter])
                self._curvatures[parameter] = curvature
                parameter.grad = gradient if before is None else before.add_(gradient)
        self._draws.clear()
        torch.clear_autocast_cache()

    def _check_step(self) -> None:
        if self._draws:
            raise RuntimeError("step() was called inside sampled(); leave the block first, with backward inside it.")
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            raise RuntimeError(
                "OnlineNewton got gradients from a gradient scaler, whose scale would be in the curvatures; use "
                "bfloat16 autocast, which needs no scaler."
            )
        if any(isinstance(getattr(h, "__self__", None), Attachment) for h in self._optimizer_step_pre_hooks.values()):
            raise RuntimeError(
                "OnlineNewton has an attachment, and both train the stds; call the attachment's detach(), or attach "
                "to another optimizer, AdamW say."
            )
        held = [parameter for group in self.param_groups for parameter in group["params"]]
        outside = sum(parameter.grad is not None and parameter not in self._curvatures for parameter in held)
        if outside:
            raise RuntimeError(
                f"{outside} of {len(held)} parameters have a gradient that was not computed at a draw; run forward and "
                "backward inside `with optimizer.sampled(model):`."
            )


def _shared_generator(device: torch.device) -> torch.Generator | None:
    """torch's default generator; with several processes one that all share, because they average gradients."""
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return None
    seed = torch.empty((), dtype=torch.int64, device=device).random_()
    distributed.broadcast(seed, src=0)
    return torch.Generator(device).manual_seed(int(seed))


def _check_group(group: dict[str, Any]) -> None:
    for name in ("num_data", "hessian_init", "weight_decay", "clip_radius"):
        if not group[name] > 0:
            raise ValueError(f"{name} is {group[name]!r}; expected a number above 0.")
    if not group["lr"] >= 0:
        raise ValueError(f"lr is {group['lr']!r}; expected 0 or more.")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas are {group['betas']!r}; expected both from 0 to below 1.")
    for parameter in group["params"]:
        if parameter.dtype not in (torch.float32, torch.float64) or hasattr(parameter, "full_tensor"):
            raise TypeError(
                f"OnlineNewton got a {parameter.dtype} {type(parameter).__name__}; expected float32 or float64, not "
                "sharded. Keep the parameters in float32 and use autocast for speed."
            )
