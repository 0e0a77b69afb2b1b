"""What weights, channels and heads are worth."""

from bayesprune.prune.scores.channels import SNRImportance
from bayesprune.prune.scores.evidence import EvidenceImportance, evidence
from bayesprune.prune.scores.scale_snr import ScaleSNRImportance
from bayesprune.prune.scores.unit_snr import UnitSNRImportance
from bayesprune.prune.scores.weights import SNRScore, magnitude, signal_to_noise, snr

__all__ = [
    "EvidenceImportance",
    "SNRImportance",
    "SNRScore",
    "ScaleSNRImportance",
    "UnitSNRImportance",
    "evidence",
    "magnitude",
    "signal_to_noise",
    "snr",
]
