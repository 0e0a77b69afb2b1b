"""Scores of weights and channels, and their removal."""

from bayesprune.prune.allocation import MeasuredImportance, layer_sparsities
from bayesprune.prune.channels import ChannelReport, prune_channels
from bayesprune.prune.curve import Compression, Trial
from bayesprune.prune.dependency import dependency_groups
from bayesprune.prune.discovery import discover_mask
from bayesprune.prune.evidence import EvidenceImportance, evidence
from bayesprune.prune.importance import SNRImportance
from bayesprune.prune.inclusion import InclusionImportance
from bayesprune.prune.one_shot import prune_one_shot
from bayesprune.prune.recalibrate import recalibrate_batch_norm
from bayesprune.prune.schedule import PruneSchedule, sparsities
from bayesprune.prune.scores import SNRScore, signal_to_noise
from bayesprune.prune.search import compress
from bayesprune.prune.unit_snr import UnitSNRImportance
from bayesprune.prune.weights import WeightReport, prune_weights

__all__ = [
    "ChannelReport",
    "Compression",
    "EvidenceImportance",
    "InclusionImportance",
    "MeasuredImportance",
    "PruneSchedule",
    "SNRImportance",
    "SNRScore",
    "Trial",
    "UnitSNRImportance",
    "WeightReport",
    "compress",
    "dependency_groups",
    "discover_mask",
    "evidence",
    "layer_sparsities",
    "prune_channels",
    "prune_one_shot",
    "prune_weights",
    "recalibrate_batch_norm",
    "signal_to_noise",
    "sparsities",
]
