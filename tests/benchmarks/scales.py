"""The scale SNR example by example, from activations: what `ScaleSNRImportance` estimates by random signs.

J being the derivatives of the logits with respect to a factor on a unit's activations, the cost is half of E |J|^2_G.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesprune.prune.graph.group import ChannelGroup

Cotangents = Callable[[Tensor], Iterable[Tensor]]
"""cotangents(logits): vectors (N, classes) whose outer products add up to each example's metric G of the logits."""


def of_logits(logits: Tensor) -> Iterable[Tensor]:
    """Of the squared change of the logits about their mean."""
    classes = torch.eye(logits.shape[1])
    return (one.expand_as(logits) for one in classes - classes.mean(0))


def of_fisher(logits: Tensor) -> Iterable[Tensor]:
    """Of the Fisher information of the predicted classes."""
    shares = logits.softmax(1)
    classes = torch.eye(logits.shape[1])
    return (shares[:, k, None].sqrt() * (one - shares) for k, one in enumerate(classes))


def of_labels(logits: Tensor) -> Iterable[Tensor]:
    """Of the Fisher information, by one sampled label for each example (Theis et al., 2018, arXiv:1801.05787)."""
    shares = logits.softmax(1)
    yield F.one_hot(shares.multinomial(1)[:, 0], logits.shape[1]) - shares


def scale_costs(
    model: nn.Module, groups: Sequence[ChannelGroup], batches: Iterable[tuple[Tensor, Tensor]], cotangents: Cotangents
) -> list[Tensor]:
    """Of each group the costs of its units, (U,); one backward for each cotangent, in evaluation mode."""
    readers = [[member for member in group.members if member.axis[1] == "in"] for group in groups]
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, args: inputs.__setitem__(name, args[0])

    names = sorted({member.axis[0] for members in readers for member in members})
    handles = [model.get_submodule(name).register_forward_pre_hook(keep(name)) for name in names]
    columns = [
        [[[p for root in unit for p in member.positions.get(root, ())] for unit in group.units] for member in members]
        for group, members in zip(groups, readers, strict=True)
    ]
    costs, number = [torch.zeros(len(group.units)) for group in groups], 0
    model.eval()
    for images, _ in batches:
        number += len(images)
        logits = model(images)
        for cotangent in cotangents(logits.detach()):
            gradients = torch.autograd.grad(logits, [inputs[name] for name in names], cotangent, retain_graph=True)
            products = {name: (inputs[name] * g).detach() for name, g in zip(names, gradients, strict=True)}
            by_input = {name: x.reshape(*x.shape[:2], -1).sum(2) for name, x in products.items()}  # (N, inputs)
            for cost, members, of in zip(costs, readers, columns, strict=True):
                parts = (by_input[m.axis[0]][:, own].sum(2) for m, own in zip(members, of, strict=True))
                cost += 0.5 * sum(parts, start=torch.zeros(())).square().sum(0)
    for handle in handles:
        handle.remove()
    return [cost / number for cost in costs]
