"""Keeps the log stds out of the optimizer that a Trainer makes for FSDP 2.

torch refuses to load a sharded optimizer's state that has nothing for a parameter which trains, and the log stds have
nothing there: the attachment moves them. An optimizer takes what trains when it is made, so until training begins the
log stds do not.
"""

import torch
from torch import nn

from bayesprune.errors import UnsupportedModelError
from bayesprune.layers import VariationalLayer, variational_layers

Frozen = list[tuple[VariationalLayer, str]]


def check_dtypes(model: nn.Module, mixed_precision: str) -> None:
    """Refuses a model in half precision beside float32 stds, which FSDP 2 does not shard together.

    Args:
        model: The variational model.
        mixed_precision: accelerate's, which turns what trains into float32 unless it is "no".

    Raises:
        UnsupportedModelError: a layer's weight is of half precision and stays so.
    """
    for name, layer in variational_layers(model) if mixed_precision == "no" else ():
        for parameter in layer.parameters(recurse=False):
            if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
                raise UnsupportedModelError(
                    f"BayesPruneCallback got FSDP 2 with {name} in {parameter.dtype}, which is not sharded together "
                    "with its float32 stds. Load the model with dtype=torch.float32 and set "
                    "TrainingArguments(bf16=True), so that it computes in half precision."
                )


def freeze_stds(model: nn.Module) -> Frozen:
    """The log stds that trained, by layer and name: FSDP replaces the parameter objects."""
    frozen = []
    for _, layer in variational_layers(model):
        parts = {id(part) for name in layer.active_names() for part in layer.log_std_parts(name)}
        for name, parameter in layer.named_parameters(recurse=False):
            if id(parameter) in parts and parameter.requires_grad:
                parameter.requires_grad_(False)
                frozen.append((layer, name))
    return frozen


def thaw(frozen: Frozen) -> None:
    """Undoes `freeze_stds`."""
    for layer, name in frozen:
        layer.get_parameter(name).requires_grad_()
