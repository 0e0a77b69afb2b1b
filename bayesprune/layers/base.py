"""What a variational layer is: a stock layer whose parameters are posterior means, with their log stds beside them.

A model is converted by exact class swap, so parameters, hooks, device, dtype, tied weights and state-dict keys of the
stock layer survive; outside training and outside `sampling(...)` the stock forward runs, bit for bit.

Which variational class stands for a stock class is matched by exact type. A stock subclass that inherits the forward of
a registered class is as good as that class. One with a forward of its own (weight-standardised convolutions, say) gets
weight sampling through its own forward, with a stated reason.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from bayesprune import estimators
from bayesprune.errors import UnsupportedModelError
from bayesprune.estimators import Bilinear, Gaussian, Gradients, LogGaussian
from bayesprune.foundation.kinds import kind_of
from bayesprune.foundation.sharding import shard_like, whole_mask
from bayesprune.layers import joint_draws, masks
from bayesprune.layers.stacks import axis_size, select
from bayesprune.layers.structures import SUFFIXES, not_narrowed
from bayesprune.moments.sampled import is_drawing


class VariationalLayer(nn.Module):
    """Mixin in front of a stock layer's class: posteriors over its parameters, and a forward that draws from them.

    Beside a posterior parameter `weight` stand `weight_log_std` (or `weight_row_log_std` and `weight_column_log_std`),
    float32 whatever the layer's dtype, and, once single weights were removed, the bool buffer `weight_mask`.

    Attributes:
        is_linear_in_weight: Whether the layer multiplies inputs by weights, adds, and does no more; the variance of its
            output is then the same operation on squares.
        num_stacked: How many leading dimensions of its parameters number layers of their own, such as experts.
        std: Structure of the stds: "per_weight", "rank_one" or "per_channel".
        estimator: What runs while the layer is in training mode.
        estimator_override: What runs in any mode, set by `sampling`; None outside it.
        posterior_hook: `posterior_hook(layer, name, posterior)` gives the posterior of a parameter that is drawn in
            place of this one, as gates on weights do; None for none.
    """

    stock_type: ClassVar[type[nn.Module]]
    posterior_names: ClassVar[tuple[str, ...]] = ("weight", "bias")
    is_linear_in_weight: ClassVar[bool] = True
    num_stacked: ClassVar[int] = 0
    fallback_reason: ClassVar[str | None] = None

    std: str
    estimator: str
    estimator_override: str | None
    posterior_hook: Callable[["VariationalLayer", str, estimators.Posterior], estimators.Posterior] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The stock forward at the means in eval mode; the estimator's output in training or under `sampling`."""
        if not args:  # the input came by its name, "input" in torch's layers
            args = (kwargs.pop(next(iter(kwargs), "input")),)
        x, rest = args[0], args[1:]
        estimator = self.running_estimator(x)
        if estimator == "mean" and not self.changes_weights():
            self.apply_masks()
            return super().forward(*args, **kwargs)
        has_bias = bool(self._part_names("bias"))
        if estimator == "weight_sampling":
            return self.operation(x, self.draw("weight"), self.draw("bias") if has_bias else None, *rest, **kwargs)
        weight = self.posterior("weight")
        bias = self.posterior("bias") if has_bias else None
        operation = self.bilinear(*rest, **kwargs)
        return estimators.run(estimator, operation, x, weight, bias, operation.kind.feature_dim)

    def bilinear(self, *args: Any, **kwargs: Any) -> Bilinear:
        """Its operation as the estimators take it, with what else its forward is called with."""
        knows_pullback = type(self).pullback is not VariationalLayer.pullback
        kind = kind_of(self)
        has_factors = knows_pullback or bool(kind.num_spatial_dims)

        def operation(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return self.operation(x, weight, bias, *args, **kwargs)

        return Bilinear(operation, kind, self.pullback, has_factors)

    def operation(self, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """The stock forward with these tensors in place of weight and bias."""
        with self.substituted(weight=weight, bias=bias):
            return super().forward(x, *args, **kwargs)

    def pullback(self, gradient: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool]) -> Gradients | None:
        """Gradients of the operation without bias by x and weight, None where not needed.

        None in place of both has the operation run once more and be differentiated. A class that overrides `operation`
        has another pullback: its own, or this one. A linear layer that has one of its own is x W^T and no more.
        """
        return None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        first = next(base for base in cls.__mro__ if {"operation", "pullback"} & vars(base).keys())
        if "pullback" not in vars(first):
            cls.pullback = VariationalLayer.pullback

    def meets_one_position(self, x: Tensor) -> bool:
        """Whether each weight meets one position of each example, so that its noise is not shared."""
        return False

    def running_estimator(self, x: Tensor) -> str:
        """The estimator that a forward on `x` uses now, with "auto" and fallbacks resolved."""
        chosen = self.estimator_override or (self.estimator if self.training else "mean")
        is_linear = self.is_linear_in_weight and x.is_floating_point()  # a lookup table takes numbers of entries
        if chosen == "auto":
            local = is_linear and self.meets_one_position(x)
            return "local_reparameterization" if local else "weight_sampling"
        if chosen == "moments" and is_drawing():
            return "weight_sampling"
        if chosen not in ("mean", "moments") and not is_linear:
            return "weight_sampling"
        return chosen

    def changes_weights(self) -> bool:
        """Whether a forward without noise computes its weights: a hook, or masks that gradients go through."""
        in_graph = self.training or torch.compiler.is_compiling()
        return self.posterior_hook is not None or bool(in_graph and self.masked_names())

    def train(self, mode: bool = True) -> Any:
        """As in torch; models that read raw weights, past the forward, find zeros where weights were removed."""
        super().train(mode)
        self.apply_masks()
        return self

    def active_names(self) -> list[str]:
        """Names of the parameters that have a posterior."""
        return [name for name in self.posterior_names if self._part_names(name)]

    def is_weight(self, name: str) -> bool:
        """Whether a parameter is a weight, not a bias."""
        return getattr(self, name).dim() > 1 + self.num_stacked

    def masked_names(self) -> list[str]:
        """Names of the parameters of which single weights were removed."""
        return [name for name in self.posterior_names if self.mask(name, whole=True) is not None]

    def mask(self, name: str, *, whole: bool = False) -> Tensor | None:
        """True where the weight is kept, sharded as it is unless `whole`; None while nothing was removed."""
        mask = self._buffers.get(f"{name}_mask")
        return mask if mask is None or whole else shard_like(mask, getattr(self, name))

    def log_std_parts(self, name: str) -> list[nn.Parameter]:
        """The parameters whose broadcast sum is the log std of this parameter."""
        return [part for part in map(self._parameters.get, self._part_names(name)) if part is not None]

    def log_std(self, name: str) -> Tensor:
        """Log std of a parameter, broadcastable to its shape.

        Raises:
            ValueError: stds and means no longer fit, because a tool changed the one without the other.
        """
        parts = self._checked_parts(name)
        return sum(parts[1:], start=parts[0])

    def _checked_parts(self, name: str) -> list[nn.Parameter]:
        shape, parts = getattr(self, name).shape, self.log_std_parts(name)
        for part in parts:
            if len(part.shape) != len(shape) or any(p not in (1, m) for p, m in zip(part.shape, shape, strict=True)):
                raise ValueError(
                    f"{type(self).__name__}.{name} has shape {tuple(shape)} but a log std of shape "
                    f"{tuple(part.shape)}; expected equal or 1 in every dimension. The layer was resized without its "
                    "stds: construct SNRImportance() before pruning with torch-pruning, or use prune_channels."
                )
        return parts

    def posteriors(self) -> dict[str, Gaussian]:
        """Mean and std by parameter name, in the graph; both zero where the mask removed the weight."""
        return {name: estimators.as_gaussian(self.posterior(name)) for name in self.active_names()}

    def posterior(self, name: str) -> estimators.Posterior:
        """The posterior of one parameter, in parts, from which an estimator computes what it needs."""
        parts = tuple(self._checked_parts(name))
        posterior = LogGaussian(getattr(self, name), parts, self.mask(name))
        return posterior if self.posterior_hook is None else self.posterior_hook(self, name, posterior)

    def draw(self, name: str) -> Tensor:
        """One draw of a parameter, made together with those of other layers where the model's forward has begun so."""
        drawn = joint_draws.take(self, name)
        return estimators.sample(self.posterior(name)) if drawn is None else drawn

    def set_mask(self, name: str, keep: Tensor) -> None:
        """Removes the weights where `keep`, which is whole, is False: they are zero from now on, also in training."""
        self.register_buffer(f"{name}_mask", keep)
        masks.enforce_from_now_on(self)

    def apply_masks(self) -> None:
        """Sets removed weights to zero again, in place."""
        for name in self.masked_names():
            self._parameters[name].data.mul_(self.mask(name))  # type: ignore[union-attr]

    def drop_masks(self) -> None:
        """Forgets what was removed: the zeros stay, and nothing keeps them."""
        self.apply_masks()
        masks.release(self)
        for name in self.masked_names():
            del self._buffers[f"{name}_mask"]

    @contextmanager
    def substituted(self, **tensors: Tensor | None) -> Iterator[None]:
        """Inside, attribute access finds these tensors instead of the parameters of the same names."""
        self.__dict__.update(tensors)  # found before nn.Module.__getattr__ looks at the parameters
        try:
            yield
        finally:
            for name in tensors:
                del self.__dict__[name]

    def cut(self, name: str, dim: int, kept: list[int], old_size: int) -> None:
        """Keeps these indices of the stds and the mask of a parameter that was cut from `old_size` along `dim`."""
        keys = [*self._part_names(name), f"{name}_mask"]
        for key in keys:
            companion = self._parameters.get(key, self._buffers.get(key))
            if companion is None or companion.dim() <= dim or companion.shape[dim] == 1:
                continue
            if axis_size(companion, dim, num_stacked=self.num_stacked) != old_size:
                continue
            index = torch.as_tensor(kept, dtype=torch.long, device=companion.device)
            data = select(companion.data, dim, index, num_stacked=self.num_stacked)
            if isinstance(companion, nn.Parameter):
                self._parameters[key] = nn.Parameter(data, requires_grad=companion.requires_grad)
            else:
                self._buffers[key] = data

    def __setattr__(self, name: str, value: Any) -> None:
        """A pruned parameter that says what was kept of it (`_bayesprune_kept`) takes its companions along."""
        kept = getattr(value, "_bayesprune_kept", None) if name in self.posterior_names else None
        old = self._parameters.get(name) if kept is not None else None
        super().__setattr__(name, value)
        if kept is not None and old is not None and value.shape != old.shape:
            dim, indices = kept
            self.cut(name, dim, torch.as_tensor(indices).tolist(), old.shape[dim])
            del value._bayesprune_kept

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Casts to half precision leave the stds in float32, where they can take small steps."""
        parts = [part for name in self.active_names() for part in self.log_std_parts(name)]
        companions = [tensor for part in parts for tensor in (part, part.grad)]
        return super()._apply(not_narrowed(fn, lambda tensor: any(tensor is c for c in companions)), recurse)

    def _part_names(self, name: str) -> list[str]:
        return [key for key in (f"{name}_{suffix}" for suffix in SUFFIXES) if key in self._parameters]

    def _replicate_for_data_parallel(self) -> Any:
        if self.training or self.estimator_override not in (None, "mean"):
            raise UnsupportedModelError(
                "nn.DataParallel copies layers without their posteriors, so that a copy would train without noise; "
                "start the program with torchrun and use DistributedDataParallel, or train on one GPU."
            )
        return super()._replicate_for_data_parallel()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.apply_masks()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: Any,
        missing_keys: Any,
        unexpected_keys: Any,
        error_msgs: Any,
    ) -> None:
        """Masks in the file are taken up; a stock checkpoint leaves the stds as they are."""
        for name in self.active_names():
            if f"{prefix}{name}_mask" in state_dict and self.mask(name, whole=True) is None:
                mean = getattr(self, name)
                self.set_mask(name, whole_mask(mean, True))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self.apply_masks()
        parts = {f"{prefix}{key}" for name in self.active_names() for key in self._part_names(name)}
        if parts.isdisjoint(state_dict):
            missing_keys[:] = [key for key in missing_keys if key not in parts]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.masked_names():
            masks.enforce_from_now_on(self)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # The class may have been made at run time, so a pickle or a copy names the stock class instead.
        return _rebuild, (self.stock_type,), self.__dict__.copy()


def _rebuild(stock_type: type[nn.Module]) -> VariationalLayer:
    found = variational_type(stock_type)
    assert found is not None, f"{stock_type.__name__} was converted once, so it has a variational type"
    return found.__new__(found)


_REGISTERED: dict[type[nn.Module], type[VariationalLayer]] = {}
_Layer = TypeVar("_Layer", bound=type[VariationalLayer])


def register_layer(stock_type: type[nn.Module]) -> Callable[[_Layer], _Layer]:
    """Class decorator: registers a variational type for a stock layer type.

    The class derives from `VariationalLayer` and the stock type, in this order. It overrides what differs:
    `posterior_names`, `operation`, `meets_one_position`, `is_linear_in_weight`. A layer that does more than multiply
    inputs by weights and add (a factor on its output, a normalisation) says `is_linear_in_weight = False`. One that
    derives from no layer of torch says how its weight is laid out: `layer_kind = LayerKind("mine", output_dim=1,
    input_dim=0)` for a linear layer of weight (I, O). Without it, it is trained, but not looked into.

    Examples:
        >>> class Scaled(nn.Linear):
        ...     def forward(self, x):
        ...         return 2 * super().forward(x)
        >>> @register_layer(Scaled)
        ... class VariationalScaled(VariationalLayer, Scaled):
        ...     is_linear_in_weight = False

    Raises:
        TypeError: the class does not derive from both.
    """

    def decorate(cls: _Layer) -> _Layer:
        if not issubclass(cls, VariationalLayer) or not issubclass(cls, stock_type):
            raise TypeError(
                f"{cls.__name__} is registered for {stock_type.__name__}; expected a class that derives from "
                f"VariationalLayer and {stock_type.__name__}, in this order."
            )
        cls.stock_type = stock_type
        _REGISTERED[stock_type] = cls
        variational_type.cache_clear()
        return cls

    return decorate


def is_registered(stock_type: type[nn.Module]) -> bool:
    """Whether this very type has a variational one."""
    return stock_type in _REGISTERED


def registered_types() -> list[type[nn.Module]]:
    """The registered stock types."""
    return list(_REGISTERED)


@cache
def variational_type(stock_type: type[nn.Module]) -> type[VariationalLayer] | None:
    """The variational class for this exact stock type; None where there is no way."""
    if issubclass(stock_type, VariationalLayer):
        return stock_type  # converted already
    if stock_type in _REGISTERED:
        return _REGISTERED[stock_type]
    for base in stock_type.__mro__[1:]:
        if base in _REGISTERED:
            return _derived(stock_type, base)
    return None


def _derived(stock_type: type[nn.Module], base: type[nn.Module]) -> type[VariationalLayer] | None:
    name, doc = f"Variational{stock_type.__name__}", f"Variational {stock_type.__name__}."
    forwards = ("forward", "_conv_forward")
    registered, members = _REGISTERED[base], {"stock_type": stock_type, "__doc__": doc}
    if all(getattr(stock_type, f, None) is getattr(base, f, None) for f in forwards):
        return type(name, (registered, stock_type), members)
    reason = f"{stock_type.__name__} has a forward of its own: weight sampling, whatever the estimator"
    members |= {"is_linear_in_weight": False, "fallback_reason": reason}
    if not registered.is_linear_in_weight:
        return None  # attention with a forward of its own: nothing is known of how it uses its weights
    said = getattr(registered, "layer_kind", None)
    if said is not None:
        members["layer_kind"] = said
    return type(name, (VariationalLayer, stock_type), members)
