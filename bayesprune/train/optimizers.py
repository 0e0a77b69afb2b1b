"""What hooks on the user's optimizer do to it, and have to know of it."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from bayesprune.layers import named_posteriors

_INSIDE = ("optimizer", "_base_optimizer", "base_optimizer")  # of accelerate, timm's Lookahead, and SAM


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose step a wrapper calls once for each of its own, however that is called (`second_step`)."""
    while True:
        found = [inner for name in _INSIDE if isinstance(inner := getattr(optimizer, name, None), Optimizer)]
        if not found:
            return optimizer
        optimizer = found[0]


def held_by(optimizer: Optimizer) -> set[int]:
    """Ids of the parameters that it moves."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def with_gradients(
    optimizer: Optimizer, args: tuple, kwargs: dict[str, Any], update: Callable[[], None]
) -> tuple[tuple, dict[str, Any]] | None:
    """For a hook ahead of a step: calls `update` when the gradients are there, which a closure may compute in the step.

    Args:
        optimizer: Whose step it is.
        args, kwargs: What the hook was given.
        update: Called once.

    Returns:
        What the step is to be given instead; None for the same.
    """
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        update()
        return None
    was_called = False

    def closure_and_update() -> Any:  # Lightning computes the gradients inside the step
        nonlocal was_called
        if was_called:
            raise RuntimeError(
                f"{type(optimizer).__name__} called its closure a second time in one step, whose gradients would "
                "be changed again; attach to the optimizer inside it, or to one that calls its closure once."
            )
        was_called = True
        loss = closure()
        update()
        return loss

    return args[:1], {**kwargs, "closure": closure_and_update}


def put_last(optimizer: Optimizer) -> None:
    """Moves hooks whose owner `comes_last` behind all others: what holds weights to grids, say, has others see them."""
    registries: list[dict[int, Any]] = [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    for hooks in registries:
        for key, hook in list(hooks.items()):
            if getattr(getattr(hook, "__self__", None), "comes_last", False):
                hooks[key] = hooks.pop(key)  # dicts keep the order in which keys came


class Place(NamedTuple):
    """A group's parameters, and what stood at which of its positions; its name where the optimizer was given names."""

    params: list[nn.Parameter]
    position: int
    parameter: nn.Parameter
    name: str | None


def take_out(optimizer: Optimizer, parameters: Iterable[Tensor]) -> list[Place]:
    """Takes these out of the optimizer's groups; `put_back` is the opposite."""
    ids = {id(parameter) for parameter in parameters}
    places = []
    for group in optimizer.param_groups:
        params, names = group["params"], _names_of(group)
        for position in reversed(range(len(params))):
            if id(params[position]) in ids:
                name = None if names is None else names.pop(position)
                places.append(Place(params, position, params.pop(position), name))
    return places


def put_back(optimizer: Optimizer, places: Iterable[Place]) -> None:
    """Puts parameters back to where they were."""
    groups = {id(group["params"]): group for group in optimizer.param_groups}  # loading a state replaces the groups
    for params, position, parameter, name in reversed(list(places)):
        names = _names_of(groups.get(id(params), {"params": params}))
        params.insert(position, parameter)
        if names is not None and name is not None:
            names.insert(position, name)


def add_to_first_group(optimizer: Optimizer, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Puts those that the optimizer does not hold into its first group; schedulers count groups, not parameters."""
    held = held_by(optimizer)
    added = [parameter for parameter in parameters if id(parameter) not in held]
    group = optimizer.param_groups[0]
    if (names := _names_of(group)) is not None:
        names.extend(f"bayesprune.{len(names) + number}" for number in range(len(added)))
    group["params"].extend(added)
    return added


def _names_of(group: dict[str, Any]) -> list[str] | None:
    """The names of a group's parameters; None where the optimizer was given none, as before torch knew them."""
    names = group.get("param_names")
    return names if isinstance(names, list) and len(names) == len(group["params"]) else None


def grad_scaler_tensors(optimizer: Optimizer) -> tuple[Tensor | None, Tensor | None]:
    """Scale of the gradients and whether they overflowed: a gradient scaler leaves both to fused optimizers."""
    return getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)


def grad_scaler_state(optimizer: Optimizer) -> tuple[float, bool]:
    """The same as numbers, for which the device is waited for."""
    scale, found = grad_scaler_tensors(optimizer)
    return (1.0 if scale is None else float(scale)), found is not None and bool(found)


def has_fused_kernel(parameters: Iterable[Tensor]) -> bool:
    """Whether torch has one kernel for a step of Adam on these."""
    return all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)


def step_scaled(optimizer: Adam, scale: Tensor | None, found_inf: Tensor | None) -> None:
    """A step on gradients that a gradient scaler has multiplied by `scale`; none where they overflowed.

    The fused kernel takes both as tensors, so that nothing waits for the device.
    """
    if optimizer.defaults["fused"]:
        optimizer.grad_scale, optimizer.found_inf = scale, found_inf  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.grad_scale = optimizer.found_inf = None  # type: ignore[attr-defined]
    elif found_inf is None or not bool(found_inf):
        for group in optimizer.param_groups if scale is not None else ():
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(scale)
        optimizer.step()


class StepCount:
    """Steps taken, without those that a gradient scaler skipped, which is known on the device first.

    Attributes:
        at_most: The number if none was skipped that nobody asked for yet.
    """

    def __init__(self) -> None:
        self.value = 0

    def add(self, found_inf: Tensor | None) -> None:
        """One step more, unless this says that it was skipped."""
        self.at_most += 1
        if found_inf is not None:
            self._skipped = self._skipped + (found_inf > 0).long()
            self._num_unasked += 1

    @property
    def at_least(self) -> int:
        """The number if all were skipped that nobody asked for yet."""
        return self.at_most - self._num_unasked

    def share_of(self, length: float) -> Tensor | None:
        """The step that comes next as a share of so many, 1 beyond them, where it is known on the device alone."""
        if not isinstance(self._skipped, Tensor):
            return None
        return ((self.at_most + 1 - self._skipped) / length).clamp_max_(1.0)

    @property
    def value(self) -> int:
        """The number itself: waits for the device where a scaler is in use."""
        if self._num_unasked:
            self.value = self.at_most - int(self._skipped)
        return self.at_most

    @value.setter
    def value(self, value: int) -> None:
        self.at_most, self._num_unasked = value, 0
        self._skipped: Tensor | int = 0


def forget_removed(optimizer: Optimizer, model: nn.Module) -> None:
    """Removed weights have no gradient any more, so that moments which are zero now stay zero."""
    state = unwrapped(optimizer).state
    for posterior in named_posteriors(model):
        if (mask := posterior.mask) is not None:
            for value in state.get(posterior.mean, {}).values():
                if isinstance(value, Tensor) and value.shape == mask.shape:
                    value.mul_(mask)
