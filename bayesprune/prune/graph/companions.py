"""Tag and follow: when torch-pruning cuts a posterior mean, its stds and masks are cut alike.

torch-pruning knows `weight` and `bias`; an extra parameter of a layer stays at its old shape, evaluation still runs,
and the next training step crashes. Its `customized_pruners` do not help: depthwise roots bypass them, and every
built-in importance compares bound methods and skips a customised layer. So the one function through which every
built-in pruner makes a smaller parameter is wrapped: the new parameter is tagged with what was kept of it, and
`VariationalLayer.__setattr__` cuts the companions by that tag. The function is private, hence the self-test.
"""

import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.utils import skip_init
from torch_pruning.pruner.function import BasePruningFunc

from bayesprune.convert import to_variational
from bayesprune.layers import VariationalLayer, registered_types, variational_type
from bayesprune.prune.graph.internals import find

TAG = "_bayesprune_kept"

_LOGGER = logging.getLogger(__name__)
_WRAPPED = "_prune_parameter_and_grad"

_PROBLEMS: dict[Any, str | None] = {}  # of functions that were tried

PruneParameter = Callable[[BasePruningFunc, nn.Parameter, Sequence[int], int], nn.Parameter]


def follow_stds() -> bool:
    """Makes stds and masks follow their means through every torch-pruning pruner of this process; whether they do.

    Criteria of this library call it when a pruner first asks them for scores. Call it yourself where another criterion
    ranks the channels of a variational model, before `pruner.step()`. It wraps a function of torch-pruning: parameters
    that are cut keep their `requires_grad` from then on, and variational layers count in torch-pruning's MAC counter.
    `prune_channels` needs none of this, and leaves torch-pruning as it is.

    Where the installed torch-pruning does not work as expected, a warning says so and the answer is False.

    Examples:
        >>> import torch, torch_pruning as tp, bayesprune as bp
        >>> layer = bp.to_variational(torch.nn.Linear(4, 8))
        >>> bp.prune.follow_stds()
        True
        >>> tp.prune_linear_out_channels(layer, [0]).weight_log_std.shape
        torch.Size([7, 4])
    """
    _count_operations()
    if (problem := _wrap()) is None:
        return True
    warnings.warn(
        f"torch-pruning {version('torch-pruning')} is not as bayesprune expects ({problem}), so the stds of "
        "variational layers do not follow their means in a torch-pruning pruner of your own; use "
        "bayesprune.prune_channels, or a torch-pruning in the range that bayesprune names in its requirements.",
        stacklevel=3,
    )
    return False


@contextmanager
def following() -> Iterator[bool]:
    """Inside, stds and masks follow their means through torch-pruning; yields whether they do."""
    before = getattr(BasePruningFunc, _WRAPPED, None)
    try:
        yield _wrap() is None
    finally:
        if before is not None:
            setattr(BasePruningFunc, _WRAPPED, before)


def _wrap() -> str | None:
    """Wraps torch-pruning's function, unless it is; the problem, and nothing wrapped, where that does not work."""
    original = getattr(BasePruningFunc, _WRAPPED, None)
    if original is None:
        return f"BasePruningFunc has no {_WRAPPED}"
    if getattr(original, "follows", False):
        return None
    setattr(BasePruningFunc, _WRAPPED, tagging(original))
    if original not in _PROBLEMS:
        _PROBLEMS[original] = _self_test()
    if (problem := _PROBLEMS[original]) is not None:
        setattr(BasePruningFunc, _WRAPPED, original)
    return problem


def tagging(prune: PruneParameter) -> PruneParameter:
    """The same function; its result keeps `requires_grad` and says which indices of which dimension it holds."""

    @functools.wraps(prune)
    def prune_and_tag(
        pruner: BasePruningFunc, weight: nn.Parameter, keep_idxs: Sequence[int], pruning_dim: int
    ) -> nn.Parameter:
        keep_idxs = sorted(map(int, keep_idxs))  # torch-pruning 1.6 leaves them unsorted for layer norms
        pruned = prune(pruner, weight, keep_idxs, pruning_dim)
        pruned.requires_grad_(weight.requires_grad)
        setattr(pruned, TAG, (pruning_dim % weight.dim(), tuple(keep_idxs)))
        return pruned

    prune_and_tag.follows = True  # type: ignore[attr-defined]
    return prune_and_tag


def _self_test() -> str | None:
    """What goes wrong when two small layers are cut, or None."""
    generator = torch.Generator().manual_seed(0)
    for stock in (skip_init(nn.Linear, 3, 4), skip_init(nn.Conv2d, 3, 4, 1)):  # torch's generator stays where it is
        for parameter in stock.parameters():
            parameter.data.zero_()  # the memory may hold NaN, which no layer is converted with
        layer = to_variational(stock)
        assert isinstance(layer, VariationalLayer)
        for name in layer.active_names():
            values = torch.rand(getattr(layer, name).shape, generator=generator)
            getattr(layer, name).data.copy_(values)
            layer.log_std_parts(name)[0].data.copy_(values)
        cut_out, cut_in = (
            (tp.prune_linear_out_channels, tp.prune_linear_in_channels)
            if isinstance(layer, nn.Linear)
            else (tp.prune_conv_out_channels, tp.prune_conv_in_channels)
        )
        try:
            cut_out(layer, [1])
            cut_in(layer, [0])
            follows = [_agree(getattr(layer, name), layer.log_std_parts(name)[0]) for name in layer.active_names()]
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            _LOGGER.debug("the self-test of tag and follow failed", exc_info=True)
            return f"{type(error).__name__}: {error}"
        if not all(follows):
            return f"the stds of {type(stock).__name__} did not follow"
    return None


def _agree(mean: Tensor, log_std: Tensor) -> bool:
    return mean.shape == log_std.shape and torch.equal(mean, log_std)


def _count_operations() -> None:
    """torch-pruning's counter looks types up exactly; unknown ones count zero MACs."""
    counted = find("utils.op_counter.MODULES_MAPPING")
    for stock in registered_types():
        variational = variational_type(stock)
        if variational is not None and stock in counted:
            counted.setdefault(variational, counted[stock])
