"""Training posteriors: the KL divergence and the optimizer hook."""

from bayesprune.train.attach import Attachment, attach
from bayesprune.train.kl import kl_divergence

__all__ = ["Attachment", "attach", "kl_divergence"]
