"""Spike and slab: gates that decide by themselves which channels and which weights are there."""

from bayesprune.gates import room  # noqa: F401  (gates name it, and the core asks it)
from bayesprune.gates.channels import GateReport, add_channel_gates
from bayesprune.gates.inclusion import InclusionImportance, inclusion
from bayesprune.gates.weights import add_weight_gates, inclusion_probabilities
from bayesprune.layers import close_auxiliaries as close

__all__ = [
    "GateReport",
    "InclusionImportance",
    "add_channel_gates",
    "add_weight_gates",
    "close",
    "inclusion",
    "inclusion_probabilities",
]
