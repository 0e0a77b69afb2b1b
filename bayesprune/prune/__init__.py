"""Scores of weights and channels, and their removal."""

from bayesprune.layers import make_masks
from bayesprune.prune.batch_norm import FrozenStatistics, freeze_batch_norm, recalibrate_batch_norm
from bayesprune.prune.channels.prune import ChannelReport, prune_channels
from bayesprune.prune.graph.companions import follow_stds
from bayesprune.prune.graph.dependency import dependency_groups
from bayesprune.prune.grouped.prune import GroupReport, prune_groups
from bayesprune.prune.measured import MeasuredImportance, layer_shares
from bayesprune.prune.scores.channels import SNRImportance
from bayesprune.prune.scores.evidence import EvidenceImportance, evidence
from bayesprune.prune.scores.scale_snr import ScaleSNRImportance
from bayesprune.prune.scores.unit_snr import UnitSNRImportance
from bayesprune.prune.scores.weights import SNRScore, signal_to_noise
from bayesprune.prune.search import Compression, SearchStep, smallest_within
from bayesprune.prune.weights.discovery import discover_mask
from bayesprune.prune.weights.one_shot import prune_one_shot
from bayesprune.prune.weights.prune import WeightReport, prune_weights
from bayesprune.prune.weights.schedule import PruneSchedule, shares

__all__ = [
    "ChannelReport",
    "Compression",
    "EvidenceImportance",
    "FrozenStatistics",
    "GroupReport",
    "MeasuredImportance",
    "PruneSchedule",
    "SNRImportance",
    "SNRScore",
    "ScaleSNRImportance",
    "SearchStep",
    "UnitSNRImportance",
    "WeightReport",
    "dependency_groups",
    "discover_mask",
    "evidence",
    "follow_stds",
    "freeze_batch_norm",
    "layer_shares",
    "make_masks",
    "prune_channels",
    "prune_groups",
    "prune_one_shot",
    "prune_weights",
    "recalibrate_batch_norm",
    "shares",
    "signal_to_noise",
    "smallest_within",
]
