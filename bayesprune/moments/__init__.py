"""Mean and variance of a network's output in one pass: extended variational inference through any model's own forward.

Source: Dera, Rasool, Bouaynaya, *Extended Variational Inference for Propagating Uncertainty in Convolutional Neural
Networks* (MLSP 2019). What differs: variances are diagonal plus what positions share, functions are taken in
expectation and not to first order, and no layer is written anew.
"""

from bayesprune.moments import rules as _rules  # noqa: F401  (registers them)
from bayesprune.moments.elementwise import register_elementwise
from bayesprune.moments.memory import MomentTensors
from bayesprune.moments.registry import register_rule
from bayesprune.moments.sampled import sampled
from bayesprune.moments.settings import Settings, settings
from bayesprune.moments.tensor import Moments, parts

__all__ = [
    "MomentTensors",
    "Moments",
    "Settings",
    "parts",
    "register_elementwise",
    "register_rule",
    "sampled",
    "settings",
]
