"""Variational layers, the structures of their stds, and the registry of stock types."""

from bayesprune.estimators import Gaussian
from bayesprune.foundation.kinds import LayerKind
from bayesprune.layers import stock  # noqa: F401  (registers torch's layers)
from bayesprune.layers.auxiliary import (
    SideRoom,
    close_auxiliaries,
    named_auxiliaries,
    rooms_in,
    without_auxiliaries,
)
from bayesprune.layers.base import VariationalLayer, register_layer, registered_types, variational_type
from bayesprune.layers.experts import register_experts
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
    "Gaussian",
    "JointDraws",
    "LayerKind",
    "Posterior",
    "SideRoom",
    "VariationalLayer",
    "close_auxiliaries",
    "holders_of",
    "make_masks",
    "named_auxiliaries",
    "named_posteriors",
    "part_shapes",
    "register_experts",
    "register_layer",
    "registered_types",
    "removable_weights",
    "rooms_in",
    "variational_layers",
    "variational_type",
    "without_auxiliaries",
]
