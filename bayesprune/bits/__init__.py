"""Rounding by the posterior: how exactly each weight has to be known says on what grid it may stand."""

from bayesprune.bits.int8 import to_onnx_int8, to_torchao_int8
from bayesprune.bits.quantization import quantize
from bayesprune.bits.report import Quantization, QuantizedTensor

__all__ = ["Quantization", "QuantizedTensor", "quantize", "to_onnx_int8", "to_torchao_int8"]
