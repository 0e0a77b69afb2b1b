"""Attentive pruning (2020, arXiv:2005.04559), a control: what explains the predicted class stays.

From the predicted class down, each unit that is attended to picks the smallest set of inputs that explains a share of
its positive contributions w x, the stream of a residual network one input among them; these are attended to in turn, in
proportion. A weight, a channel, a head or a neuron scores how much attention passes through it on average. A unit of a
transformer may be negative; what explains it then has its sign. Batch and layer norms scale the weights before them.
No code of the paper was published; this follows its abstract.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from cifar_resnet import Block, ResNet
from mnist_methods import Data, Network, Score
from torch import Tensor, nn

from bayesprune.layers import Posterior

EXPLAINED = 0.9
IMAGES, BATCH = 128, 64  # of MNIST
SENTENCES = 32
_CHUNK = 2**22  # contributions at a time
_HEADS, _NEURONS = "bert.encoder.layer.{}.attention.output.dense", "bert.encoder.layer.{}.intermediate.dense"


def passed_on(
    attention: Tensor, contributions: Callable[[Tensor, Tensor], Tensor], share: float = EXPLAINED
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The places p and r of units that are attended to (P, R), and what their inputs (n, K) get of it.

    Args:
        attention: Of each unit, (P, R).
        contributions: contributions(p, r): of the inputs to the value of these units, (n, K).
        share: How much of a unit the inputs that it picks explain.
    """
    units, size = attention.nonzero(), 1
    while len(units):
        (p, r), units = units[:size].T, units[size:]
        found = contributions(p, r).relu()
        yield p, r, attention[p, r, None] * _shares(found, share)
        size = max(1, _CHUNK // found.shape[1])


def through(
    attention: Tensor,
    weight: Tensor,
    inputs: Tensor,
    *,
    signs: Tensor | None = None,
    stream: Tensor | None = None,
    share: float = EXPLAINED,
) -> tuple[Tensor, Tensor]:
    """Attention on y = W x + s, (P, R), passed to x (P, K) and to s (P, R).

    Args:
        attention: (P, R).
        weight: W, (R, K), as the norm behind it scales it.
        inputs: x, (P, K).
        signs: Of the units, (P, R); None is positive.
        stream: s, (P, R), as the norm scales it; None is none.
        share: See `passed_on`.
    """

    def contributions(p: Tensor, r: Tensor) -> Tensor:
        found = weight[r] * inputs[p]
        if stream is not None:
            found = torch.cat([found, stream[p, r, None]], dim=1)
        return found if signs is None else found * signs[p, r, None]

    below, beside = torch.zeros_like(inputs), torch.zeros_like(attention)
    for p, r, passed in passed_on(attention, contributions, share):
        below.index_add_(0, p, passed[:, : inputs.shape[1]])
        if stream is not None:
            beside[p, r] = passed[:, -1]
    return below, beside


@torch.no_grad()
def attentive_score(net: Network, data: Data) -> Score:
    """A score of the weights of an MLP, from some training images."""
    chosen = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))[:IMAGES]
    linear = [(name, layer) for name, layer in net.model.named_modules() if isinstance(layer, nn.Linear)]
    scores = {f"{name}.weight": torch.zeros_like(layer.weight) for name, layer in linear}
    for images in net.see(data.images[chosen]).split(BATCH):
        inputs, x = [], images
        for index, (_, layer) in enumerate(linear):
            inputs.append(x)
            x = F.linear(x, layer.weight, layer.bias)
            x = x if index == len(linear) - 1 else x.relu()
        attention = F.one_hot(x.argmax(1), x.shape[1]).to(x)
        for (name, layer), given in zip(reversed(linear), reversed(inputs), strict=True):
            below = torch.zeros_like(given)
            for p, r, passed in passed_on(attention, lambda p, r, w=layer.weight, x=given: w[r] * x[p]):
                scores[f"{name}.weight"].index_add_(0, r, passed)
                below.index_add_(0, p, passed)
            attention = below
    return lambda posterior: _of(posterior, scores)


def _of(posterior: Posterior, scores: dict[str, Tensor]) -> Tensor:
    return scores[posterior.name]


@torch.no_grad()
def resnet_channels(model: ResNet, images: Tensor, share: float) -> dict[str, Tensor]:
    """Scores of the inner channels of a CIFAR ResNet's blocks, by layer, from images (N, 3, 32, 32)."""
    blocks = [(name, module) for name, module in model.named_modules() if isinstance(module, Block)]
    scores = {f"{name}.conv1": torch.zeros(block.conv1.out_channels) for name, block in blocks}
    for image in images.contiguous().split(1):
        x = F.relu(model.bn1(model.conv1(image)))
        given = []
        for _, block in blocks:
            given.append(x)
            x = block(x)
        logits = model.linear(x.mean((2, 3)))
        pixels = x[0].flatten(1)  # each explains the class by its part of the mean
        rows = model.linear.weight.repeat_interleave(pixels.shape[1], 1)
        attention, _ = through(F.one_hot(logits.argmax(1), 10).float(), rows, pixels.flatten()[None], share=share)
        attention = attention.view_as(pixels).T
        for (name, block), below in zip(reversed(blocks), reversed(given), strict=True):
            hidden = F.relu(block.bn1(block.conv1(below)))
            shortcut = block.shortcut(below)
            inner, beside = through(
                attention,
                scaled(block.conv2, block.bn2),
                F.unfold(hidden, 3, padding=1)[0].T,
                stream=shortcut[0].flatten(1).T,
                share=share,
            )
            inner = F.fold(inner.T[None], hidden.shape[2:], 3, padding=1)[0].flatten(1)
            scores[f"{name}.conv1"] += inner.sum(1)
            patches = F.unfold(below, 3, padding=1, stride=block.stride)[0].T
            outer, _ = through(inner.T, scaled(block.conv1, block.bn1), patches, share=share)
            found = F.fold(outer.T[None], below.shape[2:], 3, padding=1, stride=block.stride)[0]
            found[:, :: block.stride, :: block.stride] += _inside(beside.T, below.shape[1], shortcut.shape[2])
            attention = found.flatten(1).T
    return scores


def scaled(conv: Any, norm: Any) -> Tensor:
    """The weights of a convolution as its batch norm scales them, (R, K)."""
    return (conv.weight * (norm.weight * (norm.running_var + norm.eps).rsqrt())[:, None, None, None]).flatten(1)


def _inside(stream: Tensor, channels: int, size: int) -> Tensor:
    """The channels (R, P) of a shortcut that are not padding, as (C, size, size)."""
    border = (len(stream) - channels) // 2
    return stream[border : border + channels].unflatten(1, (size, size))


@torch.no_grad()
def bert_units(model: Any, batches: Iterable[dict[str, Tensor]], share: float = EXPLAINED) -> dict[str, Tensor]:
    """Scores of heads, by the layer that reads their channels, and of neurons of a BERT, from some sentences."""
    layers = model.bert.encoder.layer
    scores = {}
    for number, layer in enumerate(layers):
        scores[_HEADS.format(number)] = torch.zeros(layer.attention.self.query.out_features)
        scores[_NEURONS.format(number)] = torch.zeros(layer.intermediate.dense.out_features)
    explained = copy.deepcopy(model)  # which keeps the hooks that hidden states leave
    seen = 0
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            if seen < SENTENCES:
                _explain_sentence(explained, ids[mask.bool()][None], scores, share)
                seen += 1
    return scores


def _explain_sentence(model: Any, ids: Tensor, scores: dict[str, Tensor], share: float) -> None:
    output = model.bert(input_ids=ids, output_hidden_states=True)
    pooled, last = output.pooler_output, output.last_hidden_state
    predicted = F.one_hot(model.classifier(pooled).argmax(1), model.config.num_labels).float()
    above, _ = through(predicted, model.classifier.weight, pooled, share=share)
    first, _ = through(above, model.bert.pooler.dense.weight, last[:, 0], signs=pooled.sign(), share=share)
    attention = torch.zeros_like(last[0])
    attention[0] = first[0]
    for number in reversed(range(len(model.bert.encoder.layer))):
        layer, below = model.bert.encoder.layer[number], output.hidden_states[number]
        context, value, chances = _heads(layer.attention.self, below)
        middle = layer.attention.output(context[None], below)
        neurons = layer.intermediate(middle)
        inner, beside = _through_sum(attention, layer.output, neurons, middle, share)
        scores[_NEURONS.format(number)] += inner.sum(0)
        dense = layer.intermediate.dense
        outer, _ = through(inner, dense.weight, middle[0], signs=dense(middle)[0].sign(), share=share)
        inner, on_stream = _through_sum(outer + beside, layer.attention.output, context[None], below, share)
        scores[_HEADS.format(number)] += inner.sum(0)
        on_value, size = torch.zeros_like(value), len(value.T) // len(chances)

        def mixed(t: Tensor, k: Tensor, chances: Tensor = chances, value: Tensor = value, size: int = size) -> Tensor:
            found = chances[k // size, t] * value.T[k]
            return found * found.sum(1, keepdim=True).sign()

        for _, k, passed in passed_on(inner, mixed, share):
            on_value.index_add_(1, k, passed.T)
        outer, _ = through(on_value, layer.attention.self.value.weight, below[0], signs=value.sign(), share=share)
        attention = outer + on_stream


def _heads(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one sentence (1, T, C): what the heads give (T, C), their values (T, C) and probabilities (heads, T, T)."""
    heads = layer.num_attention_heads
    query, key, value = (part(x)[0].unflatten(1, (heads, -1)) for part in (layer.query, layer.key, layer.value))
    chances = (torch.einsum("thd,shd->hts", query, key) / query.shape[2] ** 0.5).softmax(2)
    return torch.einsum("hts,shd->thd", chances, value).flatten(1), value.flatten(1), chances


def _through_sum(attention: Tensor, layer: Any, x: Tensor, stream: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Attention on LayerNorm(W x + stream), passed to x and to the stream, both (1, T, C)."""
    gain, signs = layer.LayerNorm.weight, layer(x, stream)[0].sign()
    weight = layer.dense.weight * gain[:, None]
    return through(attention, weight, x[0], signs=signs, stream=stream[0] * gain, share=share)


def _shares(contributions: Tensor, share: float) -> Tensor:
    """Of each unit's contributions (n, K) the shares of the largest that explain enough; the others are 0."""
    shares = contributions / contributions.sum(1, keepdim=True).clamp_min(1e-12)
    ordered = torch.from_numpy(np.sort(shares.numpy(), axis=1)).flip(1)  # several times faster than torch's
    before = ordered.cumsum(1) - ordered
    smallest = ordered.masked_fill(before >= share, 1.0).amin(1, keepdim=True)
    kept = shares.masked_fill(shares < smallest, 0.0)
    return kept / kept.sum(1, keepdim=True).clamp_min(1e-12)
