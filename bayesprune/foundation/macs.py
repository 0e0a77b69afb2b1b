"""Multiply-accumulates of a model by module, counted on the operations that a forward really runs.

torch's `FlopCounterMode` counts two FLOPs for one MAC, in matrix products, convolutions and fused attention alike.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Size, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, shape_wrapper

from bayesprune.foundation.model import booked_by_module, eval_mode, layers_called, run_forward, without_fast_path

COUNTER = "torch.utils.flop_counter, FLOPs / 2"

# Products of a row of inputs with the matrix of its own group, as mixtures of experts run them, which the counter does
# not know: torch's, and what transformers runs where torch has none.
_GROUPED_PRODUCTS = (("aten", "_grouped_mm"), ("transformers", "grouped_mm_fallback"))
# Fused attention on the CPU, which the counter does not know before torch 2.15.
_ATTENTION = (("aten", "_scaled_dot_product_flash_attention_for_cpu"),)


def macs_by_module(model: nn.Module, example_inputs: Any) -> dict[str, int]:
    """MACs of one evaluation forward on the example inputs, by the innermost module that ran the operation.

    Modules without any are left out, a module that runs twice counts twice, and the products of an attention module
    stand under its own name. The numbers are for all examples of the batch together; their sum is the model's.

    Args:
        model: On any device; its mode and state are as before afterwards.
        example_inputs: A tensor, a tuple of positional arguments, or a mapping of keyword arguments.
    """
    with torch.no_grad(), eval_mode(model), without_fast_path(), layers_called(model), counting_macs(model) as macs:
        run_forward(model, example_inputs)
    return {name: count for name, count in macs.items() if count}


@contextmanager
def counting_macs(model: nn.Module) -> Iterator[dict[str, int]]:
    """Inside, forwards of the model add their MACs to what is yielded, by the innermost module, zeros included."""
    with _Counter() as counter, booked_by_module(model, lambda: counter.flops // 2) as macs:
        yield macs


class _Counter(TorchDispatchMode):
    """Counts the FLOPs of all operations together: torch's counter tells modules apart by hooks on every tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.flops_of = 0, flop_registry | _further_products()
        self.known: dict[int, Callable[..., int] | None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if id(func) not in self.known:
            operator = getattr(func, "_overloadpacket", None)
            if operator is None:  # one of higher order, which runs a function
                with FlopCounterMode(display=False) as inside:
                    result = func(*args, **kwargs)
                self.flops += inside.get_total_flops()
                return result
            if operator not in self.flops_of:  # in inference mode operations arrive as they were called
                with self:
                    result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            self.known[id(func)] = self.flops_of.get(operator)
        result, flops = func(*args, **kwargs), self.known[id(func)]
        if flops is not None:
            self.flops += flops(*args, **kwargs, out_val=result)
        return result


def _further_products() -> dict[Any, Callable[..., int]]:
    """FLOPs of products by operator, for those that the counter does not know itself."""
    found = {}
    for operators, flops in ((_GROUPED_PRODUCTS, _grouped_flops), (_ATTENTION, _attention_flops)):
        there = (getattr(getattr(torch.ops, library), name, None) for library, name in operators)
        unknown = (operator for operator in there if operator is not None and operator not in flop_registry)
        found |= {operator: shape_wrapper(flops) for operator in unknown}
    return found


def _grouped_flops(one: Size, other: Size, *_: Any, out_shape: Size, **__: Any) -> int:
    """Every row meets the one matrix of its group; of two matrices the groups divide what is summed over."""
    if len(one) == len(other) == 2:
        return 2 * math.prod(one) * other[-1]
    return 2 * math.prod(out_shape) * one[-1]


def _attention_flops(query: Size, key: Size, value: Size, *_: Any, **__: Any) -> int:
    """Every query meets every key, and their products every value."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
