"""Spike and slab: gates that decide by themselves which channels and which weights are there."""

from bayesprune.gates.channels import GateReport, add_channel_gates
from bayesprune.gates.weights import add_weight_gates, inclusion_probabilities
from bayesprune.layers import close_gates as close

__all__ = ["GateReport", "add_channel_gates", "add_weight_gates", "close", "inclusion_probabilities"]
