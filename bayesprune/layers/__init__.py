"""Variational layers, the structures of their stds, and the registry of stock types."""

from bayesprune.estimators import Gaussian
from bayesprune.foundation.kinds import LayerKind
from bayesprune.layers import stock  # noqa: F401  (registers torch's layers)
from bayesprune.layers.base import VariationalLayer, register_layer, registered_types, variational_type
from bayesprune.layers.closing import close_gates, drop_gates, fold_gates
from bayesprune.layers.experts import register_experts
from bayesprune.layers.gates import Gate, GateOptions, named_gates, passing_gates
from bayesprune.layers.joint_draws import JointDraws
from bayesprune.layers.posteriors import (
    Posterior,
    holders_of,
    make_masks,
    named_posteriors,
    removable_weights,
    variational_layers,
)
from bayesprune.layers.structures import STRUCTURES, part_shapes

__all__ = [
    "STRUCTURES",
    "Gate",
    "GateOptions",
    "Gaussian",
    "JointDraws",
    "LayerKind",
    "Posterior",
    "VariationalLayer",
    "close_gates",
    "drop_gates",
    "fold_gates",
    "holders_of",
    "make_masks",
    "named_gates",
    "named_posteriors",
    "part_shapes",
    "passing_gates",
    "register_experts",
    "register_layer",
    "registered_types",
    "removable_weights",
    "variational_layers",
    "variational_type",
]
