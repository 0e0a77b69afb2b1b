"""Attentive pruning (2020, arXiv:2005.04559), a control: what explains the predicted class stays.

From the predicted class down, each unit that is attended to picks the smallest set of inputs that explains a share of
its positive contributions w x; these are attended to in turn, in proportion. A weight's score is how much attention
passes through it on average. No code of the paper was published; this follows its abstract.
"""

import torch
import torch.nn.functional as F
from mnist_methods import Data, Network, Score
from torch import Tensor, nn

from bayesprune.layers import Posterior

EXPLAINED = 0.9
IMAGES, BATCH = 128, 64


@torch.no_grad()
def attentive_score(net: Network, data: Data) -> Score:
    """A score of the weights of an MLP, from some training images."""
    chosen = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))[:IMAGES]
    scores: dict[str, Tensor] = {}
    linear = [(name, layer) for name, layer in net.model.named_modules() if isinstance(layer, nn.Linear)]
    for images in net.see(data.images[chosen]).split(BATCH):
        inputs, x = [], images
        for index, (_, layer) in enumerate(linear):
            inputs.append(x)
            x = F.linear(x, layer.weight, layer.bias)
            x = x if index == len(linear) - 1 else x.relu()
        attention = F.one_hot(x.argmax(1), x.shape[1]).to(x)
        for (name, layer), given in zip(reversed(linear), reversed(inputs), strict=True):
            passed = attention[:, :, None] * _shares((layer.weight * given[:, None]).relu())
            key = f"{name}.weight"
            scores[key] = scores.get(key, 0) + passed.sum(0)
            attention = passed.sum(1)
    return lambda posterior: _of(posterior, scores)


def _of(posterior: Posterior, scores: dict[str, Tensor]) -> Tensor:
    return scores[posterior.name]


def _shares(contributions: Tensor) -> Tensor:
    """Of each unit's contributions (B, R, C) the shares of the largest that explain enough; the others are 0."""
    shares = contributions / contributions.sum(2, keepdim=True).clamp_min(1e-12)
    ordered, places = shares.sort(dim=2, descending=True)
    before = ordered.cumsum(2) - ordered
    kept = torch.zeros_like(shares).scatter_(2, places, ordered * (before < EXPLAINED))
    return kept / kept.sum(2, keepdim=True).clamp_min(1e-12)
