"""Models with adapters (LoRA and its like, of PEFT), whose base is frozen and so gets no posteriors."""

import warnings

from torch import nn


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT made this model, or put adapters into it."""
    return bool(getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False))


def warn_of_pruning(model: nn.Module) -> None:
    """Says that a sparsity would be one of the adapters alone."""
    if has_adapters(model):
        warnings.warn(
            "prune=... removes weights of the adapters alone; the frozen weights below them stay, and merging fills "
            "the zeros. To compress the model, merge first: Trainer(model.merge_and_unload(), ...), or set prune=None.",
            stacklevel=3,
        )
