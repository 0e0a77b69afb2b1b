"""Compares a model without channels with the dense one that reads zeros in their place, for the tables of model zoos.

A norm over channels counts one that is there and not read, as does the standardisation of a weight, so `tanh` stands
for them in both.
"""

from collections.abc import Callable
from typing import Any

from rows import OK, ROUNDING, farthest, outputs

EQUAL = (
    "without every second channel, head or hidden unit of every group, the outputs are those of the dense model that "
    "reads zeros there, in double precision, with `tanh` in place of norms over channels in both; the number of groups "
    "with which the model runs, and of all"
)


def equal(model: Any, inputs: Any, stand_in: Callable[[Any], Callable | None] = lambda module: None) -> str:
    """Whether removing channels is the same as reading zeros in their place, with how many of the model's groups.

    The model cannot be used for anything else afterwards.

    Args:
        model: As it was built.
        inputs: A tensor, a tuple of arguments, or keywords.
        stand_in: What stands for the forward of a module that counts channels by itself; None for the others.
    """
    import torch
    from torch.utils._pytree import tree_map

    from bayesprune.prune.graph.find import find_groups
    from bayesprune.prune.graph.removal import remove
    from bayesprune.prune.graph.trials import silence

    groups = find_groups(model, inputs).groups
    enliven(model.double())
    inputs = tree_map(lambda x: x.double() if torch.is_tensor(x) and x.is_floating_point() else x, inputs)
    for module in model.modules():
        if (forward := stand_in(module)) is not None:
            module.forward = forward
    with _without_norms():
        dense = outputs(model, inputs)
        removed = removable(model, groups, inputs)
        selection = [(group, group.units[::2]) for group in removed]
        undo = remove(model, selection)
        found = outputs(model, inputs)
        undo()
        for group, units in selection:
            silence(model, group, units)
        expected = outputs(model, inputs)
    change, difference = farthest(expected, dense), farthest(found, expected)
    if not change > ROUNDING:
        return "nothing changed"
    if not difference <= ROUNDING * change:
        return f"the outputs differ by {difference:.1e}, and from the dense model's by {change:.1e}"
    return f"{OK}, {len(removed)} of {len(groups)}"


def enliven(model: Any) -> None:
    """Gives parameters that are constant other numbers, in place: a scale of zero or 1e-6 hides what is behind it."""
    import torch

    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        if parameter.numel() > 1 and (parameter == parameter.flatten()[0]).all():
            noise = torch.rand(parameter.shape, generator=generator) - 0.5
            constant = parameter.flatten()[0]
            parameter.data.copy_(noise if constant.abs() < 1e-3 else constant * (1 + noise))


def removable(model: Any, groups: Any, inputs: Any) -> Any:
    """The groups that a model runs without every second channel of; `prune_channels` leaves whole what fails."""
    from bayesprune.prune.graph.removal import SHAPE_ERRORS, remove

    undo = remove(model, [(group, group.units[::2]) for group in groups])
    try:
        outputs(model, inputs)
    except SHAPE_ERRORS:
        half = len(groups) // 2
        parts = (groups[:half], groups[half:]) if half else ()
    else:
        return groups
    finally:
        undo()
    return [group for part in parts for group in removable(model, part, inputs)]


def by_channel(x: Any, dim: int, weight: Any, bias: Any = None) -> Any:
    """What stands for a norm over the channels, which are at this dimension: bounded too, and of each channel alone."""
    behind = [1] * (x.dim() - 1 - dim % x.dim())
    weight, bias = (p.reshape(*p.shape, *behind) if p is not None else None for p in (weight, bias))
    x = x.tanh() if weight is None else x.tanh() * weight
    return x if bias is None else x + bias


def _without_norms() -> Any:
    """A mode in which functions of torch that normalise over channels, or standardise weights, do not."""
    from torch.nn import functional as F
    from torch.overrides import TorchFunctionMode

    channels = {F.layer_norm: -1, F.rms_norm: -1, F.group_norm: 1, F.normalize: 1}

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            found = func(*args, **kwargs)  # which sees whether the shapes fit
            is_of_weights = func is F.batch_norm and kwargs["training"]  # for the model is in evaluation mode
            dim = 1 if is_of_weights else channels.get(func)
            return found if dim is None else by_channel(args[0], dim, kwargs.get("weight"), kwargs.get("bias"))

    return Mode()
