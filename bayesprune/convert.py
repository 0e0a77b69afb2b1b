"""Turns the weights of a trained model into Gaussian posteriors, in place, and back.

Layers are converted by exact class swap: the parameters stay the same objects under the same names and become the
posterior means. What is left deterministic, or falls back to weight sampling, is always said, with the reason.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bayesprune import estimators
from bayesprune.conversion import FROZEN, Filter, conversion_table, reasons_to_leave
from bayesprune.errors import UnsupportedModelError
from bayesprune.layers import (
    STRUCTURES,
    VariationalLayer,
    close_gates,
    named_posteriors,
    part_shapes,
    registered_types,
    variational_layers,
    variational_type,
)

_LOGGER = logging.getLogger(__name__)


def to_variational(
    model: nn.Module,
    *,
    std: str = "per_weight",
    relative_std: float = 0.1,
    filter_fn: Filter | None = None,
    estimator: str = "auto",
    norm_scales: bool = False,
) -> nn.Module:
    """The same model with Gaussian posteriors over its weights, whose means are the trained weights; in place.

    Evaluation is unchanged to the last bit; in training mode a forward draws from the posteriors. Load checkpoints and
    create the optimizer as usual; `bayesprune.attach` trains the stds. Converting twice changes nothing. On the meta
    device the stds are left to be loaded.

    Args:
        model: The model, on any device, in any mode, which stays. Layers whose weight is frozen (`requires_grad=False`)
            stay deterministic: no training would learn their stds. Where a posterior is fitted without training,
            as by `fit_laplace`, call `requires_grad_(True)` first; what is frozen afterwards keeps its posterior.
        std: Structure of the stds: "per_weight" (as many stds as weights; for removing single weights), "rank_one"
            (one per output and one per input) or "per_channel" (one per output unit; for removing channels).
        relative_std: Initial std as a fraction of the root mean square of the layer's weights.
        filter_fn: `filter_fn(module, name)` is False for a module that is to stay deterministic.
        estimator: What a training forward uses: "auto" is "local_reparameterization" where each weight meets one
            position per example, else "weight_sampling"; "flipout" and "mean" may be named as well.
        norm_scales: Whether batch, layer, group and RMS norms get posteriors over their scales too, so that a prior
            over dependency groups acts on what a norm would undo. They are drawn, whatever the estimator; shifts and
            statistics stay as they are.

    Returns:
        The model itself. `conversion_table(model)` says what was converted, left, or falls back, and why.

    Raises:
        UnsupportedModelError: the model is wrapped (DDP, FSDP, DataParallel), compiled or scripted.
        ValueError: no layer matched, a weight is not finite, or an option is not one of those named.
    """
    check_options(std, relative_std, estimator)
    _check_plain(model)
    reasons = reasons_to_leave(model, filter_fn, norm_scales=norm_scales)
    names = {module: name for name, module in model.named_modules()}
    chosen = [module for module in names if module not in reasons and not isinstance(module, VariationalLayer)]
    already = [layer for _, layer in variational_layers(model)]
    if not chosen and not already:
        raise ValueError(_nothing_matched(model, reasons, norm_scales=norm_scales))
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
    _LOGGER.info("to_variational: %s", conversion_table(model, filter_fn=filter_fn, norm_scales=norm_scales).summary())
    return model


def to_deterministic(model: nn.Module) -> nn.Module:
    """The same model with stock classes and state-dict keys again, at the posterior means; in place.

    Removed weights, and those behind closed gates, are zeros. Nothing keeps them so: fine-tune before this call.
    """
    for _, layer in list(variational_layers(close_gates(model))):
        layer.drop_masks()
        parts = [key for name in layer.active_names() for key in layer._part_names(name)]
        for attribute in (*parts, "std", "estimator", "estimator_override"):
            delattr(layer, attribute)
        layer.__class__ = layer.stock_type  # type: ignore[assignment]
    return model


def _convert(
    module: nn.Module, std: str, relative_std: float, estimator: str, parts: dict[tuple[int, int], nn.Parameter]
) -> None:
    found = variational_type(type(module), norm_scales=True)
    assert found is not None, "only modules with a variational type are chosen"
    module.__class__ = found
    assert isinstance(module, VariationalLayer)
    module.std, module.estimator, module.estimator_override = std, estimator, None
    posteriors = {name: p for name in module.posterior_names if (p := module._parameters.get(name)) is not None}
    weights = [mean for name, mean in posteriors.items() if module.is_weight(name)]
    log_std = _initial_log_std(weights or list(posteriors.values()), relative_std)  # a norm has its scale alone
    for name, mean in posteriors.items():
        shapes = part_shapes(std, tuple(mean.shape), module.unit_dims, num_stacked=module.num_stacked)
        for position, (suffix, shape) in enumerate(shapes.items()):
            key = (id(mean), position)  # tied weights have tied stds
            if key not in parts:
                value = torch.full(shape, log_std if position == 0 else 0.0, dtype=torch.float32, device=mean.device)
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


def _check_finite(module: nn.Module, name: str) -> None:
    for key, parameter in module._parameters.items():
        if parameter is None or parameter.is_meta:
            continue
        bad = int((~torch.isfinite(parameter.detach())).sum())
        if bad:
            raise ValueError(
                f"{name + '.' if name else ''}{key} has {bad} of {parameter.numel()} values that are NaN or infinite; "
                "expected trained, finite weights. Check the checkpoint, or leave the layer out with filter_fn."
            )


def _nothing_matched(model: nn.Module, reasons: dict[nn.Module, str], *, norm_scales: bool) -> str:
    counts: dict[str, int] = defaultdict(int)
    for module in model.modules():
        if any(parameter is not None for parameter in module._parameters.values()):
            counts[type(module).__name__] += 1
    has = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items())) or "no module with parameters"
    why = sorted({r for m, r in reasons.items() if variational_type(type(m), norm_scales=norm_scales)})
    types = ", ".join(found.__name__ for found in registered_types(norm_scales=norm_scales))
    return (
        f"to_variational matched no layer: the model has {has}; registered types are {types}."
        + (f" Left because: {'; '.join(why)}." if why else "")
        + (" Call model.requires_grad_(True) first if it was frozen for evaluation alone." if FROZEN in why else "")
        + " Register a type with @register_layer, or check filter_fn."
    )
