"""What single weights are worth: the signal-to-noise ratio |mean| / std, a pure number."""

import torch
from torch import Tensor, nn

from bayesprune.layers import Posterior, named_posteriors


def signal_to_noise(model: nn.Module) -> dict[str, Tensor]:
    """|mean| / std of every posterior parameter by its name, of the parameter's shape; 0 where a weight was removed.

    Raises:
        ValueError: the model has no variational layer.
    """
    found = {posterior.name: snr(posterior) for posterior in named_posteriors(model)}
    if not found:
        raise ValueError("the model has no variational layer; call to_variational first.")
    return found


@torch.no_grad()
def snr(posterior: Posterior) -> Tensor:
    """|mean| / std, float32; removed weights have 0."""
    return posterior.mean.float().abs() * (-posterior.log_std).exp()


@torch.no_grad()
def magnitude(posterior: Posterior) -> Tensor:
    """|mean|, the control of every posterior criterion."""
    return posterior.mean.float().abs()
