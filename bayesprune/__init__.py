"""Bayesian pruning of trained models: weights become posteriors, and what has no signal is removed."""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

from bayesprune import bits, errors, laplace, layers, moments, prediction, priors
from bayesprune.bits import quantize
from bayesprune.convert import conversion_table, to_deterministic, to_variational
from bayesprune.hosts import on_import as _on_import
from bayesprune.layers import register_layer
from bayesprune.prediction import predict, sampling
from bayesprune.storage import load, save
from bayesprune.train import attach, distillation, kl_divergence

if _TYPE_CHECKING:
    from bayesprune import certification, elastic, evi, gates, prune, reports, robustness
    from bayesprune.app.pipeline import compress
    from bayesprune.certification import certify
    from bayesprune.elastic import widen
    from bayesprune.prune import SNRImportance, prune_channels, prune_one_shot, prune_weights, signal_to_noise
    from bayesprune.reports import report

_on_import.register()  # timm's and transformers' own functions will know us, once they are imported

# What rests on torch-pruning, which imports timm and torchvision: imported when it is first asked for.
_LATER: dict[str, str] = dict.fromkeys(
    ("certification", "elastic", "evi", "gates", "prune", "reports", "robustness"), ""
)
_LATER |= {"certify": "certification", "compress": "app.pipeline", "report": "reports", "widen": "elastic"}
_LATER |= dict.fromkeys(
    ("SNRImportance", "prune_channels", "prune_one_shot", "prune_weights", "signal_to_noise"), "prune"
)


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _import_module(f"{__name__}.{_LATER[name] or name}")
    found = getattr(module, name) if _LATER[name] else module
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "SNRImportance",
    "attach",
    "bits",
    "certification",
    "certify",
    "compress",
    "conversion_table",
    "distillation",
    "elastic",
    "errors",
    "evi",
    "gates",
    "kl_divergence",
    "laplace",
    "layers",
    "load",
    "moments",
    "predict",
    "prediction",
    "priors",
    "prune",
    "prune_channels",
    "prune_one_shot",
    "prune_weights",
    "quantize",
    "register_layer",
    "report",
    "reports",
    "robustness",
    "sampling",
    "save",
    "signal_to_noise",
    "to_deterministic",
    "to_variational",
    "widen",
]
