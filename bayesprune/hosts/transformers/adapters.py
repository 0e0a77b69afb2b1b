"""Models with adapters (LoRA and its like, of PEFT): posteriors over what trains, not over the frozen weights below."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn


def conversion_options(model: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `to_variational`, by default those that leave the frozen layers of a model with adapters alone.

    A frozen layer's stds would stay where they began, and its noise would be one that no data has measured.
    """
    return {"filter_fn": trains, **options} if has_adapters(model) else dict(options)


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT made this model, or put adapters into it."""
    return bool(getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False))


def trains(module: nn.Module, name: str) -> bool:
    """Whether a parameter of the module's own trains: a `filter_fn`."""
    return any(parameter.requires_grad for parameter in module.parameters(recurse=False))


def warn_of_pruning(model: nn.Module) -> None:
    """Says that a sparsity would be one of the adapters alone."""
    if has_adapters(model):
        warnings.warn(
            "prune=... removes weights of the adapters alone; the frozen weights below them stay, and merging fills "
            "the zeros. To compress the model, merge first: Trainer(model.merge_and_unload(), ...), or set prune=None.",
            stacklevel=3,
        )
