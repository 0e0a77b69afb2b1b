"""Training posteriors: the KL divergence and the optimizer hook."""

from bayesprune.train.attach import attach
from bayesprune.train.attachment import Attachment
from bayesprune.train.distillation import Distillation, distillation
from bayesprune.train.kl import kl_divergence
from bayesprune.train.temperature import default_temperature

__all__ = [
    "Attachment",
    "Distillation",
    "attach",
    "default_temperature",
    "distillation",
    "kl_divergence",
]
