"""What weights, channels and heads are worth."""

from bayesprune.prune.scores.channels import SNRImportance
from bayesprune.prune.scores.evidence import EvidenceImportance, evidence
from bayesprune.prune.scores.inclusion import InclusionImportance, inclusion
from bayesprune.prune.scores.unit_snr import UnitSNRImportance
from bayesprune.prune.scores.weights import SNRScore, magnitude, signal_to_noise, snr

__all__ = [
    "EvidenceImportance",
    "InclusionImportance",
    "SNRImportance",
    "SNRScore",
    "UnitSNRImportance",
    "evidence",
    "inclusion",
    "magnitude",
    "signal_to_noise",
    "snr",
]
