"""Projected gradient descent on the margin: inputs of the box that the network gets wrong (Madry et al., 2018)."""

import torch
from torch import Tensor

from bayesprune.certification.network import Box, Network


def margins(outputs: Tensor, labels: Tensor) -> Tensor:
    """The label's output minus each other one (N, C); infinite at the label itself."""
    own = outputs.gather(1, labels[:, None])
    return (own - outputs).scatter(1, labels[:, None], torch.inf)


def attack(
    network: Network, box: Box, inputs: Tensor, labels: Tensor, *, num_steps: int, num_starts: int = 2, seed: int = 0
) -> Tensor:
    """Smallest margin that was found for each example (N): at or below 0 where it is got wrong.

    The first start is the input itself, the others are uniform in its box. A step is a quarter of the radius at first,
    along the sign of the gradient, and falls to a fortieth.
    """
    generator = torch.Generator().manual_seed(seed)
    smallest = torch.full((len(labels),), torch.inf, dtype=box.center.dtype)
    for start in range(num_starts):
        offset = torch.rand(box.center.shape, generator=generator, dtype=box.center.dtype) * 2 - 1
        x = box.center + box.radius * offset if start else inputs
        for step in range(num_steps + 1):
            with torch.enable_grad():
                x = x.detach().requires_grad_(True)
                worst = margins(network(x), labels).amin(1)
                (grad,) = torch.autograd.grad(worst.sum(), x)
            smallest = torch.minimum(smallest, worst.detach())
            size = 0.25 * 0.1 ** (step / max(1, num_steps))
            x = x.detach() - size * box.radius * grad.sign()
            x = torch.minimum(torch.maximum(x, box.low), box.high)
    return smallest
