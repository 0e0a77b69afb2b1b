"""Bayesian pruning of trained models: weights become posteriors, and what has no signal is removed."""

from importlib.util import find_spec as _find_spec

from bayesprune import errors, evi, gates, laplace, layers, moments, prediction, priors, prune, reports
from bayesprune.app.pipeline import compress
from bayesprune.bits import quantize
from bayesprune.convert import conversion_table, to_deterministic, to_variational
from bayesprune.layers import register_layer
from bayesprune.prediction import predict, sampling
from bayesprune.prune import SNRImportance, prune_channels, prune_one_shot, prune_weights, signal_to_noise
from bayesprune.reports import report
from bayesprune.storage import load, save
from bayesprune.train import attach, distillation, kl_divergence

if _find_spec("timm"):
    from bayesprune.hosts.timm import reload as _timm  # noqa: F401  (makes `timm.create_model("local-dir:...")` know us)

if _find_spec("transformers"):
    from bayesprune.hosts import on_import as _on_import

    _on_import.register()  # transformers' `from_pretrained` will know us, once it is imported

__all__ = [
    "SNRImportance",
    "attach",
    "compress",
    "conversion_table",
    "distillation",
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
    "sampling",
    "save",
    "signal_to_noise",
    "to_deterministic",
    "to_variational",
]
