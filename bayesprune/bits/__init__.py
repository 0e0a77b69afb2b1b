"""Rounding by the posterior: how exactly each weight has to be known says on what grid it may stand."""

from bayesprune.bits.int8 import to_onnx_int8, to_torchao_int8
from bayesprune.bits.quantization import quantize
from bayesprune.bits.report import Quantization, QuantizedTensor
from bayesprune.bits.straight_through import StraightThrough, WidthSchedule

__all__ = [
    "Quantization",
    "QuantizedTensor",
    "StraightThrough",
    "WidthSchedule",
    "quantize",
    "to_onnx_int8",
    "to_torchao_int8",
]
