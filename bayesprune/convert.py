"""Turns the weights of a trained model into Gaussian posteriors, in place, and back.

Layers are converted by exact class swap: the parameters stay the same objects under the same names and become the
posterior means. What is left deterministic, or falls back to weight sampling, is always said, with the reason.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bayesprune import estimators
from bayesprune.errors import UnsupportedModelError
from bayesprune.foundation import defaults
from bayesprune.foundation.kinds import kind_of
from bayesprune.foundation.sharding import check_module, is_sharded
from bayesprune.foundation.text import as_text
from bayesprune.layers import (
    STRUCTURES,
    VariationalLayer,
    close_auxiliaries,
    named_posteriors,
    part_shapes,
    register_experts,
    registered_types,
    variational_layers,
    variational_type,
)

Filter = Callable[[nn.Module, str], bool]

FROZEN = "it is frozen (requires_grad=False)"


@dataclass(frozen=True)
class ConversionRow:
    """The conversion of one module that holds parameters of its own.

    Attributes:
        name: Its name in the model; "" is the model itself.
        type: Its stock type's name.
        status: "converted", "fallback" (converted, with weight sampling only) or "left" (deterministic).
        reason: Why it was left or falls back; of a converted one, that it was frozen since.
    """

    name: str
    type: str
    status: Literal["converted", "fallback", "left"]
    reason: str = ""


class ConversionTable(list[ConversionRow]):
    """The rows of all modules with parameters; prints as a table."""

    def __str__(self) -> str:
        """The table as plain text."""
        table = Table("module", "type", "status", "reason", title=self.summary())
        for row in self:
            table.add_row(row.name or "(model)", row.type, row.status, row.reason)
        return as_text(table, width=160)

    def summary(self) -> str:
        """One line: how many modules were converted, fall back, were left."""
        counts = {status: sum(row.status == status for row in self) for status in ("converted", "fallback", "left")}
        return ", ".join(f"{count} {status}" for status, count in counts.items())


def conversion_table(model: nn.Module, *, filter_fn: Filter | None = None) -> ConversionTable:
    """Lists what `to_variational` does, or did, with each module that holds parameters of its own; changes nothing.

    Args:
        model: The model, before or after conversion.
        filter_fn: As for `to_variational`.
    """
    reasons = reasons_to_leave(model, filter_fn)
    rows = ConversionTable()
    for name, module in model.named_modules():
        stock = module.stock_type if isinstance(module, VariationalLayer) else type(module)
        found = variational_type(type(module))
        if not any(parameter is not None for parameter in module._parameters.values()):
            continue
        if found is None or module in reasons:
            rows.append(ConversionRow(name, stock.__name__, "left", reasons[module]))
        else:
            status = "fallback" if found.fallback_reason else "converted"
            was_frozen = isinstance(module, VariationalLayer) and is_frozen(_posteriors_of(module, found))
            notes = [found.fallback_reason or "", f"{FROZEN} since: nothing of it is removed" if was_frozen else ""]
            rows.append(ConversionRow(name, stock.__name__, status, "; ".join(filter(None, notes))))
    return rows


def reasons_to_leave(model: nn.Module, filter_fn: Filter | None) -> dict[nn.Module, str]:
    """Reasons why modules stay deterministic, by module; those that can be converted are not in it."""
    reasons: dict[nn.Module, str] = {}
    holders: dict[int, list[tuple[str, nn.Module]]] = defaultdict(list)
    attention_of: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                holders[id(parameter)].append((name, module))
        if isinstance(module, nn.MultiheadAttention):
            attention_of[module.out_proj] = module
        if isinstance(module, VariationalLayer):
            continue
        register_experts(module)
        found = variational_type(type(module))
        if reason := _reason_of_its_own(module, name, found, filter_fn):
            reasons[module] = reason
    for projection, attention in attention_of.items():
        if attention in reasons:
            reasons.setdefault(projection, "its MultiheadAttention, which would draw its noise, is left")
    changed = True
    while changed:  # leaving one layer may untie another
        changed = False
        for sharing in holders.values():
            left = [(name, module) for name, module in sharing if module in reasons]
            for _, module in sharing if left else ():
                if module not in reasons and not isinstance(module, VariationalLayer):
                    other = f"{left[0][0]!r} ({type(left[0][1]).__name__})"
                    reasons[module] = f"a weight is tied to {other}, which is deterministic"
                    changed = True
    return reasons


def is_frozen(parameters: list[nn.Parameter]) -> bool:
    """Whether none of a layer's weights may change; a bias or a norm's scale counts where it has no weight."""
    weights = [parameter for parameter in parameters if parameter.dim() > 1] or parameters
    return bool(weights) and not any(weight.requires_grad for weight in weights)


def _posteriors_of(module: nn.Module, found: type[VariationalLayer]) -> list[nn.Parameter]:
    return [p for key in found.posterior_names if (p := module._parameters.get(key)) is not None]


def _reason_of_its_own(
    module: nn.Module, name: str, found: type[VariationalLayer] | None, filter_fn: Filter | None
) -> str | None:
    if found is None:
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            return (
                f"{type(module).__name__} is recurrent: there is no posterior for it yet, and nothing of it is removed"
            )
        return f"{type(module).__name__} is not a registered type"
    if parametrize.is_parametrized(module):
        return "its weight is parametrized"
    if "forward" in vars(module):
        return "its forward was replaced on the instance, by a device map for example"
    no_parameters = [key for key in found.posterior_names if key not in module._parameters]
    computed = [key for key in no_parameters if getattr(module, key, None) is not None]
    weights = _posteriors_of(module, found)
    weights = [weight for weight in weights if weight.dim() > 1 + found.num_stacked]
    if computed or not weights:
        return f"its {(computed or ['weight'])[0]} is not a parameter (computed, quantized or pruned by another tool)"
    if not all(weight.is_floating_point() for weight in weights):
        return f"its weight is {weights[0].dtype}, not a floating point number"
    if not all(weight.numel() for weight in weights):
        return f"its weight is empty, of shape {tuple(weights[0].shape)}"
    if is_frozen(weights):
        return FROZEN
    if filter_fn is not None and not filter_fn(module, name):
        return "filter_fn"
    return None


_LOGGER = logging.getLogger(__name__)


def to_variational(
    model: nn.Module,
    *,
    std: str = defaults.STD,
    relative_std: float = defaults.RELATIVE_STD,
    filter_fn: Filter | None = None,
    estimator: str = defaults.ESTIMATOR,
) -> nn.Module:
    """The same model with Gaussian posteriors over its weights, whose means are the trained weights; in place.

    Evaluation is unchanged to the last bit; in training mode a forward draws from the posteriors. Load checkpoints and
    create the optimizer as usual; `bayesprune.attach` trains the stds. Converting again keeps the posteriors, takes
    over `estimator`, and converts layers that have thawed since. On the meta device the stds are left to be loaded.

    Args:
        model: The model, on any device, in any mode, which stays. Layers whose weight is frozen (`requires_grad=False`)
            stay deterministic: no training would learn their stds. Where a posterior is fitted without training,
            as by `fit_laplace`, call `requires_grad_(True)` first; what is frozen afterwards keeps its posterior.
        std: Structure of the stds: "per_weight" (as many stds as weights; for removing single weights), "rank_one"
            (one per output and one per input) or "per_channel" (one per output unit; for removing channels).
        relative_std: Initial std as a fraction of the root mean square of the layer's weights.
        filter_fn: `filter_fn(module, name)` is False for a module that is to stay deterministic.
        estimator: What a training forward uses: "auto" is "local_reparameterization" where each weight meets one
            position per example, else "weight_sampling"; "flipout", "mean" and "moments" may be named as well.

    Returns:
        The model itself. `conversion_table(model)` says what was converted, left, or falls back, and why.

    Raises:
        UnsupportedModelError: the model is wrapped (DDP, FSDP, DataParallel), sharded, compiled or scripted.
        ValueError: no layer matched, a weight is not finite, or an option is not one of those named.
    """
    check_options(std, relative_std, estimator)
    _check_plain(model)
    reasons = reasons_to_leave(model, filter_fn)
    names = {module: name for name, module in model.named_modules()}
    chosen = [module for module in names if module not in reasons and not isinstance(module, VariationalLayer)]
    already = [layer for _, layer in variational_layers(model)]
    if not chosen and not already:
        raise ValueError(_nothing_matched(model, reasons))
    for layer in already:
        if layer.std != std:
            raise ValueError(
                f"the model already has {layer.std!r} stds and std={std!r} was asked for; call to_deterministic first."
            )
        layer.estimator = estimator
    for module in chosen:
        _check_finite(module, names[module])
    parts = {(id(p.mean), i): part for p in named_posteriors(model) for i, part in enumerate(p.log_std_parts)}
    for module in chosen:
        _convert(module, std, relative_std, estimator, parts)
    _LOGGER.info("to_variational: %s", conversion_table(model, filter_fn=filter_fn).summary())
    return model


def to_deterministic(model: nn.Module) -> nn.Module:
    """The same model with stock classes and state-dict keys again, at the posterior means; in place.

    Removed weights, and those that gates have closed, are zeros. Nothing keeps them so: fine-tune before this call.
    """
    check_module(model, "to_deterministic")
    for _, layer in list(variational_layers(close_auxiliaries(model))):
        layer.drop_masks()
        parts = [key for name in layer.active_names() for key in layer._part_names(name)]
        for attribute in (*parts, "std", "estimator", "estimator_override"):
            delattr(layer, attribute)
        layer.__class__ = layer.stock_type  # type: ignore[assignment]
    return model


def _convert(
    module: nn.Module, std: str, relative_std: float, estimator: str, parts: dict[tuple[int, int], nn.Parameter]
) -> None:
    found = variational_type(type(module))
    assert found is not None, "only modules with a variational type are chosen"
    module.__class__ = found
    assert isinstance(module, VariationalLayer)
    module.std, module.estimator, module.estimator_override = std, estimator, None
    posteriors = {name: p for name in module.posterior_names if (p := module._parameters.get(name)) is not None}
    weights = [mean for name, mean in posteriors.items() if module.is_weight(name)]
    log_std = _initial_log_std(weights, relative_std)
    for name, mean in posteriors.items():
        shapes = part_shapes(std, tuple(mean.shape), kind_of(module).unit_dims, num_stacked=module.num_stacked)
        for position, (suffix, shape) in enumerate(shapes.items()):
            key = (id(mean), position)  # tied weights have tied stds
            if key not in parts:
                like = mean if shape == mean.shape else mean.new_empty(shape)
                value = torch.full_like(like, log_std if position == 0 else 0.0, dtype=torch.float32)
                parts[key] = nn.Parameter(value, requires_grad=mean.requires_grad)
            module.register_parameter(f"{name}_{suffix}", parts[key])


def _initial_log_std(weights: Sequence[Tensor], relative_std: float) -> float:
    """Log of `relative_std` x RMS of the layer's weights; of 1 / sqrt(fan-in) where the weights are all zero."""
    if any(weight.is_meta for weight in weights):
        return 0.0
    numel = sum(weight.numel() for weight in weights)
    rms = (sum(float(w.detach().double().square().sum()) for w in weights) / numel) ** 0.5
    return float(torch.tensor(relative_std * (rms or weights[0][0].numel() ** -0.5)).log())


def check_options(std: str, relative_std: float, estimator: str) -> None:
    """Refuses options that `to_variational` does not take.

    Raises:
        ValueError: one of them is unknown or out of range.
    """
    estimators.check(estimator)
    if std not in STRUCTURES:
        raise ValueError(f"std is {std!r}; expected one of {', '.join(STRUCTURES)}.")
    if not 0 < relative_std < float("inf"):
        raise ValueError(f"relative_std is {relative_std!r}; expected a positive number such as 0.1.")


def _check_plain(model: nn.Module) -> None:
    check_module(model, "to_variational")
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError("to_variational got a scripted model; pass the eager model it was made from.")
    if hasattr(model, "_orig_mod") or any(m._compiled_call_impl is not None for m in model.modules()):
        raise UnsupportedModelError("to_variational got a compiled model; convert the model first, then compile it.")
    wrapper = type(model)
    if wrapper.__module__.startswith(("torch.nn.parallel", "torch.distributed.fsdp.fully_sharded", "deepspeed")):
        raise UnsupportedModelError(
            f"to_variational got a model wrapped in {wrapper.__name__}; convert the model inside it "
            "(usually `.module`) before wrapping."
        )
    if is_sharded(model):
        raise UnsupportedModelError(
            "to_variational got a model that is sharded over processes, which would not gather stds that are made now; "
            "convert it before fully_shard."
        )


def _check_finite(module: nn.Module, name: str) -> None:
    for key, parameter in module._parameters.items():
        if parameter is None or parameter.is_meta:
            continue
        bad = int((~torch.isfinite(parameter.detach())).sum())
        if bad:
            raise ValueError(
                f"{name + '.' if name else ''}{key} has {bad} of {parameter.numel()} values that are NaN or infinite; "
                "expected trained, finite weights. Check the checkpoint, or in Python leave the layer "
                "out with filter_fn."
            )


def _nothing_matched(model: nn.Module, reasons: dict[nn.Module, str]) -> str:
    counts: dict[str, int] = defaultdict(int)
    for module in model.modules():
        if any(parameter is not None for parameter in module._parameters.values()):
            counts[type(module).__name__] += 1
    has = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items())) or "no module with parameters"
    why = sorted({r for m, r in reasons.items() if variational_type(type(m))})
    types = ", ".join(found.__name__ for found in registered_types())
    return (
        f"to_variational matched no layer: the model has {has}; registered types are {types}."
        + (f" Left because: {'; '.join(why)}." if why else "")
        + (" Call model.requires_grad_(True) first if it was frozen for evaluation alone." if FROZEN in why else "")
        + " Register a type with @register_layer, or check filter_fn."
    )
