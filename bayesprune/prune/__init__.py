"""Scores of weights and channels, and their removal."""

from bayesprune.prune.channels import ChannelReport, prune_channels
from bayesprune.prune.evidence import EvidenceImportance, evidence
from bayesprune.prune.importance import SNRImportance
from bayesprune.prune.recalibrate import recalibrate_batch_norm
from bayesprune.prune.scores import signal_to_noise
from bayesprune.prune.search import Compression, Trial, compress
from bayesprune.prune.weights import WeightReport, prune_weights

__all__ = [
    "ChannelReport",
    "Compression",
    "EvidenceImportance",
    "SNRImportance",
    "Trial",
    "WeightReport",
    "compress",
    "evidence",
    "prune_channels",
    "prune_weights",
    "recalibrate_batch_norm",
    "signal_to_noise",
]
