"""What a smaller model may have lost beside accuracy: corrupted inputs, calibration, and what it does not know."""

from bayesprune.robustness.corruptions import CORRUPTIONS, corrupt, typos
from bayesprune.robustness.measure import CorruptionRow, Robustness, robustness
from bayesprune.robustness.scores import (
    auroc,
    calibration_error,
    excess_error,
    negative_log_likelihood,
    prune_potential,
)

__all__ = [
    "CORRUPTIONS",
    "CorruptionRow",
    "Robustness",
    "auroc",
    "calibration_error",
    "corrupt",
    "excess_error",
    "negative_log_likelihood",
    "prune_potential",
    "robustness",
    "typos",
]
