"""A network as affine pieces between ReLUs: the one thing that all bounds are read off.

The forward is traced once. A run is given what takes the place of each ReLU: the ReLU itself, lines around it, or
values of its own, so that a bound is a run with other ReLUs. Intervals run through the same steps as boxes.
"""

import copy
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn.modules.batchnorm import _BatchNorm

from bayesprune.convert import to_deterministic
from bayesprune.errors import UnsupportedModelError
from bayesprune.storage.values import hooks


@dataclass(frozen=True)
class Box:
    """All points whose distance from the center is at most the radius, entry by entry."""

    center: Tensor
    radius: Tensor

    @property
    def low(self) -> Tensor:
        """Lower ends."""
        return self.center - self.radius

    @property
    def high(self) -> Tensor:
        """Upper ends."""
        return self.center + self.radius

    @classmethod
    def between(cls, low: Tensor, high: Tensor) -> "Box":
        """The box with these ends."""
        return cls((low + high) / 2, (high - low) / 2)


Activation = Callable[[int, Any], Any]
"""From the number of a ReLU and its input to its output."""


def _linear(layer: nn.Linear, radius: Tensor) -> Tensor:
    return F.linear(radius, layer.weight.abs())


def _convolution(layer: Any, radius: Tensor) -> Tensor:
    return layer._conv_forward(radius, layer.weight.abs(), None)


def _batch_norm(layer: Any, radius: Tensor) -> Tensor:
    scale = (layer.running_var + layer.eps).rsqrt()
    scale = scale if layer.weight is None else scale * layer.weight.abs()
    return radius * scale.view(-1, *[1] * (radius.dim() - 2))


_RADIUS: Mapping[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Conv3d: _convolution,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
}
"""What becomes of the radius in a layer whose weights have signs."""

_AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_MOVES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_MOVES += (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
"""Layers that take the center and the radius alike."""

_SAME_FUNCTIONS = {torch.flatten, torch.mean, F.avg_pool2d, F.adaptive_avg_pool2d, operator.getitem, getattr, F.pad}
_SAME_METHODS = {"flatten", "view", "reshape", "unsqueeze", "squeeze", "permute", "contiguous", "mean", "size", "dim"}
_ADDS = {operator.add, operator.iadd, torch.add}
_RELUS = {F.relu, torch.relu, F.relu_, "relu", "relu_"}


class Network:
    """A copy of a model in float64 on the CPU, in evaluation mode, at the posterior means.

    Raises:
        UnsupportedModelError: its forward cannot be traced, takes several inputs, has a step without a rule, or hooks.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = to_deterministic(copy.deepcopy(model)).eval().cpu().double().requires_grad_(False)
        for name, module in self.model.named_modules():
            if found := hooks(module):
                raise UnsupportedModelError(
                    f"{name or type(module).__name__} has forward hooks ({', '.join(found)}), for which there are no "
                    "bounds; remove them, or make what they do a layer of the model."
                )
        try:
            self.graph = _Tracer().trace(self.model)
        except Exception as error:
            raise UnsupportedModelError(
                f"the forward of {type(model).__name__} cannot be traced: {error}. Expected a forward whose steps do "
                "not depend on values."
            ) from error
        inputs = [node.name for node in self.graph.nodes if node.op == "placeholder"]
        if len(inputs) != 1:
            raise UnsupportedModelError(
                f"the forward of {type(model).__name__} takes {', '.join(inputs) or 'no inputs'}; expected one tensor."
            )
        self.modules = dict(self.model.named_modules())
        self._relus = {node: number for number, node in enumerate(filter(self._is_relu, self.graph.nodes))}
        for node in self.graph.nodes:
            self._check(node)

    def run(self, value: Any, relu: Activation, *, until: int | None = None) -> Any:
        """The output for a tensor or a box, with this function for each ReLU; or the input of ReLU number `until`."""
        values: dict[fx.Node, Any] = {}
        for node in self.graph.nodes:
            args, kwargs = map_arg((node.args, dict(node.kwargs)), values.__getitem__)
            if node.op == "placeholder":
                values[node] = value
            elif node.op == "output":
                return args[0]
            elif node in self._relus:
                number = self._relus[node]
                if number == until:
                    return args[0]
                values[node] = relu(number, args[0])
            else:
                values[node] = self._step(node, args, kwargs)
        raise AssertionError("a graph ends with its output")

    def __call__(self, x: Tensor) -> Tensor:
        """The model's own output, in float64."""
        return self.run(x, lambda _, value: value.relu())

    def check_outputs(self, x: Tensor, outputs: Tensor) -> None:
        """Refuses a model whose own outputs are others, where a step changes an input in place that is used again.

        Raises:
            UnsupportedModelError: they are.
        """
        own = self.model(x.clone())
        is_tensor = isinstance(own, Tensor) and own.shape == outputs.shape
        if not is_tensor or not torch.allclose(own, outputs, rtol=1e-9, equal_nan=True):
            raise UnsupportedModelError(
                f"the layers of {type(self.model).__name__} one by one do not give its outputs; expected a forward of "
                "the class itself, and no tensor that is used again after it was changed in place."
            )

    def _step(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        function = self._function(node)
        if not any(isinstance(arg, Box) for arg in args):
            return function(*args, **kwargs)
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        kind = None if module is None else _known_kind(module)
        rule = None if kind is None else _RADIUS.get(kind)
        centers, radii = (_parts(args, name) for name in ("center", "radius"))
        if node.target in _ADDS:
            radii: list[Any] = [part if isinstance(arg, Box) else 0 for arg, part in zip(args, radii, strict=True)]
        center = function(*centers, **kwargs)
        if not isinstance(center, Tensor):
            return center
        return Box(center, function(*radii, **kwargs) if rule is None else rule(module, *radii))

    def _function(self, node: fx.Node) -> Callable[..., Any]:
        if node.op == "call_module":
            return self.modules[str(node.target)]
        if node.op == "call_method":
            return lambda value, *args, **kwargs: getattr(value, str(node.target))(*args, **kwargs)
        if node.target in _ADDS:
            return torch.add  # not in place: boxes are kept
        return node.target  # type: ignore[return-value]

    def _is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return _known_kind(self.modules[str(node.target)]) is nn.ReLU
        return node.op in ("call_function", "call_method") and node.target in _RELUS

    def _check(self, node: fx.Node) -> None:
        known: bool = node.op in ("placeholder", "output") or self._is_relu(node)
        called = str(node.target)
        if node.op == "call_module":
            module = self.modules[called]
            known = _known_kind(module) is not None and not module.training
            if isinstance(module, _BatchNorm) and module.running_var is None:
                known = False
            called = f"layer {called!r} ({type(module).__name__})"
        elif node.op == "call_method":
            known, called = known or node.target in _SAME_METHODS, f"method {called!r} at {node.name!r}"
        elif node.op == "call_function":
            known = known or node.target in _SAME_FUNCTIONS | _ADDS
            known = known and (node.target is not F.pad or (len(node.args) < 4 and "value" not in node.kwargs))
            known = known and not (node.target in _ADDS and node.kwargs)  # alpha may be negative
            called = f"function {getattr(node.target, '__name__', called)!r} at {node.name!r}"
        elif node.op == "get_attr":
            called = f"tensor {called!r} that the forward reads"
        if not known:
            raise UnsupportedModelError(
                f"there are no bounds for the {called}; expected Linear, Conv, BatchNorm with running statistics, "
                "ReLU, average pooling, Flatten, Dropout, Identity and sums, as torch computes them in evaluation "
                "mode. Exchange it for one of them."
            )


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _known_kind(m) is not None or super().is_leaf_module(m, module_qualified_name)


def _known_kind(module: nn.Module) -> type[nn.Module] | None:
    """The stock layer that it is an instance of and whose computation it has unchanged; None without one."""
    for kind in (*_RADIUS, *_AVERAGES, *_MOVES, nn.ReLU):
        if isinstance(module, kind) and all(
            getattr(type(module), name, None) is getattr(kind, name, None) and name not in vars(module)
            for name in ("forward", "_conv_forward", "__call__")
        ):
            return kind
    return None


def _parts(args: Any, name: str) -> list[Any]:
    return [getattr(arg, name) if isinstance(arg, Box) else arg for arg in args]
