"""The axes of the fair comparison: scores, allocations between layers, compensations.

Each is a table from a name to a function at the end of its part; a new one is one line there.
"""

import copy
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
import torch_pruning as tp
from attentive import resnet_channels
from fair_tasks import Task, mean_loss
from scales import of_labels, scale_costs
from torch import Tensor, nn
from torch_pruning.dependency import Group

import bayesprune as bp
from bayesprune.foundation.macs import macs_by_module
from bayesprune.laplace import KroneckerPosterior, output_metric, sampled_cross_entropy
from bayesprune.prune import MeasuredImportance
from bayesprune.prune.channels import plan
from bayesprune.prune.channels.calibrated import best_tilt, depth_factors
from bayesprune.prune.graph.find import find_groups
from bayesprune.prune.graph.group import ChannelGroup, by_channel
from bayesprune.prune.scores.channels import Importance

MEASURED_IMAGES = 256
Scores = dict[str, Tensor]
"""Of the channels of each group, by its name; the lowest go first."""


class Net:
    """A network before the cut, and what one seed's calibration images say of it."""

    def __init__(self, task: Task, model: nn.Module, seed: int) -> None:
        self.task, self.model, self.seed = task, model, seed
        self.batches = task.calibration(seed)
        self.loss = partial(mean_loss, self.batches[: MEASURED_IMAGES // task.batch_size])
        self._made: dict[Hashable, Any] = {}

    def made(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def groups(self) -> tuple[ChannelGroup, ...]:
        """Its groups of channels."""
        return self.made("groups", lambda: find_groups(self.model, self.task.example).groups)

    def posterior(self) -> KroneckerPosterior:
        """A copy of its Kronecker-factored posterior."""
        fit = partial(bp.laplace.fit_kronecker, self.model, self.batches, num_data=self.task.num_data)
        return {name: copy.copy(factors) for name, factors in self.made("kronecker", fit).items()}

    def scores(self, score: str, option: str) -> Scores:
        """Scores of its channels."""

        def make() -> Scores:
            torch.manual_seed(self.seed)
            model = copy.deepcopy(self.model)
            importance = SCORES[score].make(self, model, option)
            return by_name(importance, find_groups(model, self.task.example).groups)

        return self.made((score, option), make)

    def allocated(self, score: str, option: str, allocation: str, compensation: str, level: float) -> Scores:
        """The scores as an allocation makes them comparable between groups."""
        make = partial(ALLOCATIONS[allocation], self, self.scores(score, option), compensation, level)
        is_searched = allocation in SEARCHED
        return self.made((score, option, allocation, (compensation, level) if is_searched else None), make)

    def cut(self, scores: Scores, compensation: str, level: float, *, num_images: int | None = None) -> nn.Module:
        """A copy at this fraction of its MACs, the lowest scores gone, batch norm recalibrated where that helps.

        Args:
            scores: Of its channels.
            compensation: What makes up for them.
            level: The fraction of the MACs.
            num_images: How many calibration images compensate and recalibrate; None is all.
        """
        model = copy.deepcopy(self.model)
        batches = self.batches if num_images is None else self.batches[: num_images // self.task.batch_size]
        bp.prune_channels(
            model,
            self.task.example,
            f"macs={level}",
            importance=ByName(model, scores),
            before_cut=COMPENSATIONS[compensation](self, model),
            data=batches,
        )
        return model


class ByName(tp.importance.Importance):
    """An importance that looks scores up."""

    def __init__(self, model: nn.Module, scores: Scores) -> None:
        self.scores = scores
        self.names = {id(module): name for name, module in model.named_modules()}

    def __call__(self, group: Group) -> Tensor | None:  # type: ignore[override]
        scores = self.scores.get(self.names.get(id(group[0].dep.layer), ""))
        return None if scores is None else scores[torch.as_tensor(group[0].root_idxs)]


def by_name(importance: Importance, groups: tuple[ChannelGroup, ...]) -> Scores:
    """Scores that an importance gives these groups."""
    found = {group.name: importance(group.group) for group in groups}
    return {name: scores.detach().double().cpu() for name, scores in found.items() if scores is not None}


# Scores: make(net, model, option) gives an importance for the groups of the model, a copy that it may change.


@dataclass(frozen=True)
class Score:
    """What ranks channels.

    Attributes:
        make: make(net, model, option).
        options: What is chosen from on validation data; as many for each score.
        needs: Passes with gradients over the calibration images, each paid for once.
        phase: The training before the cut that it reads; "" is none.
        is_control: Whether no posterior stands behind it.
        says_sizes: Whether, told no number, it says how many channels of each group stay, and no more: the dense
            network is cut to that by the default of `prune_channels`.
    """

    make: Callable[[Net, nn.Module, str], Importance]
    options: tuple[str, ...] = ("",)
    needs: frozenset[str] = frozenset()
    phase: str = ""
    is_control: bool = True
    says_sizes: bool = False


def magnitude(net: Net, model: nn.Module, option: str) -> Importance:
    return tp.importance.MagnitudeImportance(normalizer=_normalizer(option))


def lamp(net: Net, model: nn.Module, option: str) -> Importance:
    return tp.importance.LAMPImportance(p=int(option[-1]))


def random(net: Net, model: nn.Module, option: str) -> Importance:
    return tp.importance.RandomImportance()


def snr(net: Net, model: nn.Module, option: str) -> Importance:
    """By the stds that the model has, mu^2 / (s^min(1, 2 - power) sigma^power)."""
    return bp.SNRImportance(float(option.removeprefix("power ")))


def without_stds(net: Net, model: nn.Module, option: str) -> Importance:
    """Mean^2 / s, summed over the weights of a channel or averaged."""
    return bp.SNRImportance(0, reduction="mean" if option == "mean" else "sum")


def laplace(net: Net, model: nn.Module, option: str) -> Importance:
    bp.laplace.fit_laplace(model, net.batches, num_data=net.task.num_data)
    return snr(net, model, option)


def taylor(net: Net, model: nn.Module, option: str) -> Importance:
    for images, labels in net.batches:
        F.cross_entropy(model(images), labels).backward()
    return tp.importance.TaylorImportance(normalizer=_normalizer(option))


def hessian(net: Net, model: nn.Module, option: str) -> Importance:
    """With the squares of all images; torch-pruning's own sum keeps the last image alone."""
    parameters = list(model.parameters())
    squares: dict[nn.Parameter, Tensor] = {}
    for image, label in ((i[None], y[None]) for images, labels in net.batches for i, y in zip(images, labels)):  # noqa: B905
        gradients = torch.autograd.grad(F.cross_entropy(model(image), label), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                squares.setdefault(parameter, torch.zeros_like(parameter)).addcmul_(gradient, gradient)
    for parameter, square in squares.items():
        parameter.grad = square
    return tp.importance.HessianImportance(normalizer=_normalizer(option))


def attentive(net: Net, model: nn.Module, option: str) -> Importance:
    """What attention passes through the channels of a CIFAR ResNet."""
    return ByName(model, resnet_channels(model, net.batches[0][0], float(option.removeprefix("share "))))


def unit_snr(net: Net, model: nn.Module, option: str) -> Importance:
    """The squared SNR of a channel as a vector, under a posterior whose metric is that of the option."""
    loss = output_metric if option == "logit metric" else sampled_cross_entropy
    return bp.prune.UnitSNRImportance(
        model, bp.laplace.fit_kronecker(model, net.batches, num_data=net.task.num_data, loss=loss)
    )


def scale_snr(net: Net, model: nn.Module, option: str) -> Importance:
    """The squared SNR of a factor on a channel: what it costs when nothing makes up for it."""
    if option == "logit metric":
        return bp.prune.ScaleSNRImportance(model, net.batches)
    groups = find_groups(model, net.task.example).groups
    costs = scale_costs(model, groups, net.batches, of_labels)
    pairs = zip(groups, costs, strict=True)
    return ByName(model, {group.name: by_channel(group.units, each.tolist()) for group, each in pairs})


def _normalizer(option: str) -> Any:
    return None if option == "as it is" else "mean"


GRADIENTS, KRONECKER = frozenset({"gradients"}), frozenset({"kronecker"})
NORMALISERS, REDUCTIONS, POWERS = ("as it is", "mean"), ("sum", "mean"), ("power 2", "power 1")
ATTENTIVE = "attentive"  # for CIFAR ResNets alone
SCORES = {
    "magnitude": Score(magnitude, NORMALISERS),
    "mean^2 / s": Score(without_stds, REDUCTIONS),
    "LAMP": Score(lamp, ("p = 2", "p = 1")),
    "Taylor": Score(taylor, NORMALISERS, GRADIENTS),
    "torch-pruning Hessian": Score(hessian, NORMALISERS, GRADIENTS),
    "random": Score(random),
    ATTENTIVE: Score(attentive, ("share 0.9", "share 0.5")),
    "unit SNR": Score(unit_snr, ("logit metric", "sampled labels"), KRONECKER, is_control=False),
    "scale SNR": Score(
        scale_snr, ("logit metric", "sampled labels"), frozenset(f"draw {n}" for n in range(4)), is_control=False
    ),
    "Laplace SNR": Score(laplace, POWERS, GRADIENTS, is_control=False),
    "README's way": Score(snr, POWERS, phase="per_channel", is_control=False),
    "README's training, without its stds": Score(without_stds, REDUCTIONS, phase="per_channel"),
    "SNR at temperature 10": Score(snr, POWERS, phase="temperature 10", is_control=False),
    "temperature 10, without its stds": Score(without_stds, REDUCTIONS, phase="temperature 10"),
    "group ARD": Score(snr, POWERS, phase="group ARD", is_control=False),
    "group ARD, without its stds": Score(without_stds, REDUCTIONS, phase="group ARD"),
    "group ARD at temperature 10": Score(snr, POWERS, phase="group ARD at temperature 10", is_control=False),
    "group horseshoe": Score(snr, POWERS, phase="group horseshoe", is_control=False),
    "channel gates": Score(snr, POWERS, phase="channel gates", is_control=False),
    "sizes of channel gates": Score(snr, POWERS, KRONECKER, phase="channel gates", is_control=False, says_sizes=True),
}


# Allocations: allocate(net, scores, compensation, level) gives scores that compare between groups.


def own_scale(net: Net, scores: Scores, compensation: str, level: float) -> Scores:
    return scores


def inside(net: Net, scores: Scores, compensation: str, level: float) -> Scores:
    """The same share of every group."""
    return shares(scores, {name: name for name in scores})


def isomorphic(net: Net, scores: Scores, compensation: str, level: float) -> Scores:
    """The same share of every class of groups with equal layers and sizes (Fang et al., 2024, arXiv:2407.04616)."""
    classes = {
        group.name: (len(group.units), *((type(m.layer).__name__, m.axis[1], m.size) for m in group.members))
        for group in net.groups()
    }
    return shares(scores, classes)


def measured(net: Net, scores: Scores, compensation: str, level: float) -> Scores:
    """By what cutting each group alone adds to the loss; equal orders inside groups are measured once."""

    def make() -> Scores:
        importance = ByName(net.model, scores)
        return by_name(MeasuredImportance(net.model, net.task.example, net.loss, importance=importance), net.groups())

    return net.made(("measured", *(tuple(values.argsort().tolist()) for values in scores.values())), make)


def tilted(net: Net, scores: Scores, compensation: str, level: float) -> Scores:
    """Scores for each MAC, times exp(t depth), t by the loss of the whole cut and compensated network."""
    groups = net.groups()
    costs = plan.cost_model(net.model, groups, macs_by_module(net.model, net.task.example))
    saved = {group.name: each / group.unit_size for group, each in zip(groups, costs.saved("macs"), strict=True)}
    return searched(net, {name: scores[name] / saved[name] for name in scores}, compensation, level)


def measured_and_tilted(net: Net, scores: Scores, compensation: str, level: float) -> Scores:
    """The same of measured costs."""
    return searched(net, measured(net, scores, compensation, level), compensation, level)


def searched(net: Net, scores: Scores, compensation: str, level: float) -> Scores:
    """Scores times exp(t depth), depth from 0 to 1 in the network's order, t as `prune_channels` finds it."""
    names = [group.name for group in net.groups() if group.name in scores]

    def tilt(by: float) -> Scores:
        return {name: scores[name] * factor for name, factor in zip(names, depth_factors(len(names), by), strict=True)}

    def loss(by: float) -> float:
        cut = net.cut(tilt(by), compensation, level, num_images=MEASURED_IMAGES)
        return mean_loss(net.batches[MEASURED_IMAGES // net.task.batch_size :][:4], cut)

    return tilt(best_tilt(loss))


def shares(scores: Scores, classes: Mapping[str, Hashable]) -> Scores:
    """The fraction of a channel's class that ranks below it, so that cutting at a threshold cuts classes alike."""
    found: Scores = {}
    for its in set(classes.values()):
        names = [name for name in scores if classes[name] == its]
        flat = torch.cat([scores[name] for name in names])
        ranks = (flat.argsort(stable=True).argsort().double() + 0.5) / len(flat)
        found |= dict(zip(names, ranks.split([len(scores[name]) for name in names]), strict=True))
    return found


ALLOCATIONS: dict[str, Callable[[Net, Scores, str, float], Scores]] = {
    "own scale": own_scale,
    "inside layers": inside,
    "isomorphic": isomorphic,
    "measured": measured,
    "tilted": tilted,
    "measured, tilted": measured_and_tilted,
}
SEARCHED = ("tilted", "measured, tilted")
"""Allocations that differ with the level and the compensation."""


# Compensations: compensate(net, model) gives the `before_cut` of a copy of the net's model.


def conditioned(net: Net, model: nn.Module) -> Callable[..., Any]:
    return partial(bp.laplace.condition_on_channels, model, net.posterior())


COMPENSATIONS: dict[str, Callable[[Net, nn.Module], Callable[..., Any] | Literal["compensate"] | None]] = {
    "none": lambda net, model: None,
    "conditioned": conditioned,
    "layer by layer": lambda net, model: "compensate",
}
COMPENSATION_NEEDS = {"none": frozenset[str](), "conditioned": KRONECKER, "layer by layer": frozenset[str]()}
