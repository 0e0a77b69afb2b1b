"""Multiply-accumulates of a model by module, counted on the operations that a forward really runs.

torch's `FlopCounterMode` counts two FLOPs for one MAC, in matrix products, convolutions and fused attention alike.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Size, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from bayesprune.foundation.calls import layers_called
from bayesprune.foundation.model import eval_mode, requires_grad, run_forward

COUNTER = "torch.utils.flop_counter, FLOPs / 2"

# Products of a row of inputs with the matrix of its own group, as mixtures of experts run them, which the counter does
# not know: torch's, and what transformers runs where torch has none.
_GROUPED_PRODUCTS = (("aten", "_grouped_mm"), ("transformers", "grouped_mm_fallback"))


def macs_by_module(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """MACs of one evaluation forward on the example inputs, by the innermost module that ran the operation.

    Modules without any are left out, a module that runs twice counts twice, and the products of an attention module
    stand under its own name. The numbers are for all examples of the batch together; their sum is the model's.

    Args:
        model: On any device; its mode and state are as before afterwards.
        example_inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments.
    """
    macs: dict[str, int] = {}
    inside = [0]
    handles = []
    fast_path = torch.backends.mha.get_fastpath_enabled()
    # The counter hooks tensors that require a gradient, and fails on views of parameters made without one. Attention
    # runs as its matrix products: before 2.15 the counter does not know the fused kernel of the CPU.
    with (
        torch.no_grad(),
        eval_mode(model),
        requires_grad(model, False),
        sdpa_kernel(SDPBackend.MATH),
        layers_called(model),
        FlopCounterMode(display=False, custom_mapping=_grouped_products()) as counter,
    ):
        try:
            torch.backends.mha.set_fastpath_enabled(False)  # its fused operators are unknown to the counter
            for name, module in model.named_modules():
                enter, leave = _hooks(name, counter, inside, macs)
                handles.append(module.register_forward_pre_hook(enter))
                handles.append(module.register_forward_hook(leave))
            run_forward(model, example_inputs)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            for handle in handles:
                handle.remove()
    return {name: count for name, count in macs.items() if count}


def _grouped_products() -> dict[Any, Callable[..., int]]:
    """FLOPs of grouped products by operator, for those that the counter does not know itself."""
    found = (getattr(getattr(torch.ops, library), name, None) for library, name in _GROUPED_PRODUCTS)
    return {operator: _grouped_flops for operator in found if operator is not None and operator not in flop_registry}


def _grouped_flops(one: Size, other: Size, *_: Any, out_shape: Size, **__: Any) -> int:
    """Every row meets the one matrix of its group; of two matrices the groups divide what is summed over."""
    if len(one) == len(other) == 2:
        return 2 * math.prod(one) * other[-1]
    return 2 * math.prod(out_shape) * one[-1]


def _hooks(
    name: str, counter: FlopCounterMode, inside: list[int], macs: dict[str, int]
) -> tuple[Callable[..., None], Callable[..., None]]:
    """Book what was counted between entering and leaving a module, less what its children booked."""
    entered: list[int] = []

    def enter(*_: Any) -> None:
        entered.append(counter.get_total_flops())
        inside.append(0)

    def leave(*_: Any) -> None:
        total = counter.get_total_flops() - entered.pop()
        macs[name] = macs.get(name, 0) + (total - inside.pop()) // 2
        inside[-1] += total

    return enter, leave
