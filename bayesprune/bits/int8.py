"""Rounded weights as 8-bit integers where models run: in an ONNX file, and in torchao's tensors.

`quantize` leaves ordinary floats that stand on a grid. Their integers and steps are found again, exactly, so that
neither runtime rounds anything anew: what it computes from them are the same floats.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bayesprune.storage.coding import as_integers

_MAX = 127
_MIN_NUMEL = 64  # of a tensor for which a node more is worth it


@torch.no_grad()
def to_onnx_int8(model: Any) -> list[str]:
    """Stores the weights of an ONNX model that stand on a grid as int8 behind a DequantizeLinear node, in place.

    One step for a tensor, or one for each row. The weights take a quarter of the bytes, the outputs stay the same; ONNX
    Runtime makes floats of them when it loads the file, so it runs as fast as before.

    Args:
        model: An `onnx.ModelProto`: `torch.onnx.export(..., dynamo=True, optimize=False).model_proto`, or what
            `onnx.load` gives. The exporter's own optimisation folds batch norms into weights, which then stand on no
            grid; ONNX Runtime does that by itself when it loads.

    Returns:
        The names of those weights.

    Raises:
        ImportError: onnx is missing.
    """
    try:
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise ImportError(f"to_onnx_int8 needs the package onnx ({error}): pip install onnx.") from error

    found = []
    nodes = []
    for initializer in list(model.graph.initializer):
        if initializer.data_type != TensorProto.FLOAT:
            continue
        value = torch.from_numpy(numpy_helper.to_array(initializer).copy())
        parts = int8_parts(value)
        if parts is None:
            continue
        integers, step = parts
        name = initializer.name
        stored = {f"{name}_int8": integers.numpy(), f"{name}_step": step.flatten().numpy()}
        if step.numel() == 1:
            stored[f"{name}_step"] = step.reshape(()).numpy()
        nodes.append(helper.make_node("DequantizeLinear", list(stored), [name], axis=0))
        model.graph.initializer.remove(initializer)
        model.graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in stored.items())
        found.append(name)
    others = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *others])
    return found


@torch.no_grad()
def to_torchao_int8(model: nn.Module) -> list[str]:
    """Makes the weights of linear layers that stand on a grid int8 tensors of torchao, in place, weights only.

    The model takes a quarter of the memory there. Each forward makes floats of them, which takes time.

    Args:
        model: On its device, as `quantize` left it; not trained on.

    Returns:
        The names of those weights.

    Raises:
        ImportError: torchao is missing, or too old.
    """
    try:
        from torchao.quantization import IntxUnpackedToInt8Tensor  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"to_torchao_int8 needs torchao >= 0.18 ({error}): pip install torchao.") from error

    found = []
    for name, layer in _linear_layers(model):
        weight = layer.weight
        parts = int8_parts(weight)
        if parts is None:
            continue
        integers, step = parts
        step = step.expand(len(weight), 1).contiguous()
        zeros, block = torch.zeros_like(step, dtype=torch.int8), (1, weight.shape[1])
        packed = IntxUnpackedToInt8Tensor(integers, step, zeros, torch.int8, block, weight.dtype, None)
        layer.weight = nn.Parameter(packed, requires_grad=False)
        found.append(f"{name}.weight".lstrip("."))
    return found


def int8_parts(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Integers from -127 to 127 and steps, float32, whose product the tensor is; None where there are none.

    The step has one entry, or one for each entry of the first dimension, and as many dimensions as the tensor.
    """
    if tensor.dim() < 2 or tensor.numel() < _MIN_NUMEL:
        return None
    parts = as_integers(tensor.detach().cpu())
    if parts is None or int(parts[0].abs().max()) > _MAX:
        return None
    return parts[0].to(torch.int8), parts[1].to(torch.float32)


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    yield from ((name, module) for name, module in model.named_modules() if type(module) is nn.Linear)
