"""The rules, one file a kind of function; importing this registers them all."""

from bayesprune.moments.rules import (
    activations,
    arithmetic,
    attention,
    complex_numbers,
    dropout,
    joins,
    linear,
    losses,
    maximum,
    normalization,
    pooling,
    products,
    queries,
    reductions,
    shapes,
    writing,
)

__all__ = [
    "activations",
    "arithmetic",
    "attention",
    "complex_numbers",
    "dropout",
    "joins",
    "linear",
    "losses",
    "maximum",
    "normalization",
    "pooling",
    "products",
    "queries",
    "reductions",
    "shapes",
    "writing",
]
