"""What becomes of each module of a model in `to_variational`, and why a module is left deterministic."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rich.table import Table
from torch import nn
from torch.nn.utils import parametrize

from bayesprune.layers import VariationalLayer, register_experts, variational_type
from bayesprune.tables import as_text

Filter = Callable[[nn.Module, str], bool]

FROZEN = "it is frozen (requires_grad=False)"


@dataclass(frozen=True)
class ConversionRow:
    """What becomes of one module that holds parameters of its own.

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


def conversion_table(
    model: nn.Module, *, filter_fn: Filter | None = None, norm_scales: bool = False
) -> ConversionTable:
    """What `to_variational` does, or did, with each module that holds parameters of its own; changes nothing.

    Args:
        model: The model, before or after conversion.
        filter_fn: As for `to_variational`.
        norm_scales: As for `to_variational`; norms without a scale have a row then, too.
    """
    reasons = reasons_to_leave(model, filter_fn, norm_scales=norm_scales)
    rows = ConversionTable()
    for name, module in model.named_modules():
        stock = module.stock_type if isinstance(module, VariationalLayer) else type(module)
        found = variational_type(type(module), norm_scales=norm_scales)
        is_norm = found is not None and found.is_norm
        if not is_norm and not any(parameter is not None for parameter in module._parameters.values()):
            continue
        if found is None or module in reasons:
            rows.append(ConversionRow(name, stock.__name__, "left", reasons[module]))
        else:
            status = "fallback" if found.fallback_reason else "converted"
            was_frozen = isinstance(module, VariationalLayer) and is_frozen(_posteriors_of(module, found))
            notes = [found.fallback_reason or "", f"{FROZEN} since: nothing of it is removed" if was_frozen else ""]
            rows.append(ConversionRow(name, stock.__name__, status, "; ".join(filter(None, notes))))
    return rows


def reasons_to_leave(model: nn.Module, filter_fn: Filter | None, *, norm_scales: bool) -> dict[nn.Module, str]:
    """Why each module that is not variational stays so; modules that can be converted are not in it."""
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
        found = variational_type(type(module), norm_scales=norm_scales)
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
    if found.is_norm and not computed and not weights:
        return "it has no scale of its own"
    if found.is_norm and weights and weights[0].dim() > 1:
        return f"its scale has the shape {tuple(weights[0].shape)}; expected one dimension"
    weights = [weight for weight in weights if found.is_norm or weight.dim() > 1 + found.num_stacked]
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
