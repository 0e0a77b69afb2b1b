"""What the fair comparison cuts: trained networks with their images, budgets, learning rates and optimizers."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cifar_resnet import Images, trained_resnet20, trained_resnet56
from fashion import BATCH as FASHION_BATCH
from fashion import Clothes, trained_convnet
from mobile import EXAMPLE as PHOTOGRAPH
from mobile import Photographs, pretrained
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.reports import count_macs

Batch = tuple[Tensor, Tensor]
CALIBRATION_IMAGES, TEST_IMAGES = 1_024, 5_000
EPOCHS, MEDIUM_EPOCHS = 10, 2  # of the long and the medium regime
STEPS = {"resnet20": 350, "resnet56": 250, "efficientnet_lite0": 188, "convnet": 211}
"""Gradient evaluations of the short regime, each on one batch."""
LEVELS = {"resnet20": (0.5, 0.4), "resnet56": (0.5, 0.4), "efficientnet_lite0": (0.5,), "convnet": (0.5, 0.2)}
"""Fractions of the MACs that are kept."""
LONG_LEVELS = {"resnet56": (0.392,)}  # 2.55 times fewer MACs
"""What the long regime tests in place of these; its settings are those of the nearest level."""
LRS = {
    "resnet20": (0.01, 0.003),
    "resnet56": (0.01, 0.003),
    "efficientnet_lite0": (3e-5, 1e-4),
    "convnet": (0.03, 0.01),
}
"""Learning rates to choose from."""


@dataclass(frozen=True, eq=False)
class Task:
    """A trained network and what can be spent on it.

    Attributes:
        name: Of the network.
        dense: The network with posteriors, which evaluates as the trained one.
        example: One input.
        num_data: Training images.
        batch_size: Images in a batch.
        optimizer: optimizer(parameters, lr=...).
        images: Batches of "validation" and "test" images.
        draw: draw(number of batches, seed, augment): training batches.
        keeps_statistics: Whether batch norms keep their running statistics in training, in every row alike; otherwise
            they measure batches, and are measured anew at the end.
    """

    name: str
    dense: nn.Module
    example: Tensor
    num_data: int
    batch_size: int
    optimizer: Callable[..., torch.optim.Optimizer]
    images: dict[str, list[Batch]]
    draw: Callable[[int, int, bool], Iterator[Batch]]
    keeps_statistics: bool = False

    def steps(self, regime: str) -> int:
        """Gradient evaluations of a regime."""
        medium, long = (epochs * self.num_data // self.batch_size for epochs in (MEDIUM_EPOCHS, EPOCHS))
        return {"none": 0, "short": STEPS[self.name], "medium": medium, "long": long}[regime]

    def calibration(self, seed: int) -> list[Batch]:
        """The calibration images of a seed, in batches."""
        return list(self.draw(CALIBRATION_IMAGES // self.batch_size, seed, False))

    def macs(self, model: nn.Module) -> int:
        """Multiply-accumulates of a forward on one input."""
        return count_macs(model, self.example).macs


def tested_levels(name: str, regime: str) -> tuple[float, ...]:
    """The fractions of the MACs that a regime tests."""
    return LONG_LEVELS.get(name, LEVELS[name]) if regime == "long" else LEVELS[name]


def task(name: str, data_dir: Path) -> Task:
    """The task of a network by name."""
    makers = {"efficientnet_lite0": _photographs, "convnet": _clothes}
    return makers[name](data_dir) if name in makers else _cifar(name, data_dir)


def _cifar(name: str, data_dir: Path) -> Task:
    cifar = data_dir / "cifar10"
    train = Images(cifar, "train", slice(0, -500))
    order = torch.Generator().manual_seed(0)
    validation = _some(Images(cifar, "train", slice(-500, None)), 2_000, order)
    test = _some(Images(cifar, "test", slice(None)), TEST_IMAGES, order)
    dense = {"resnet20": trained_resnet20, "resnet56": trained_resnet56}[name](data_dir)
    return Task(
        name=name,
        dense=_converted(dense),
        example=torch.zeros(1, 3, 32, 32),
        num_data=len(train.labels),
        batch_size=64,
        optimizer=partial(torch.optim.SGD, momentum=0.9),
        images={"validation": validation, "test": test},
        draw=lambda number, seed, augment: train.random(number, seed, augment=augment),
    )


def _photographs(data_dir: Path) -> Task:
    splits = {name: Photographs(data_dir / "photos10" / name) for name in ("train", "validation", "test")}
    return Task(
        name="efficientnet_lite0",
        dense=_converted(pretrained()),
        example=PHOTOGRAPH,
        num_data=len(splits["train"].labels),
        batch_size=32,
        optimizer=partial(torch.optim.AdamW, weight_decay=0.0),
        images={name: splits[name].batches() for name in ("validation", "test")},
        draw=lambda number, seed, augment: splits["train"].random(number, seed),  # flipped always
        keeps_statistics=True,
    )


def _clothes(data_dir: Path) -> Task:
    splits = {name: Clothes(data_dir, name) for name in ("train", "validation", "test")}
    return Task(
        name="convnet",
        dense=_converted(trained_convnet(splits["train"])),
        example=torch.zeros(1, 1, 28, 28),
        num_data=len(splits["train"].labels),
        batch_size=FASHION_BATCH,
        optimizer=partial(torch.optim.SGD, momentum=0.9),
        images={name: splits[name].batches() for name in ("validation", "test")},
        draw=lambda number, seed, augment: splits["train"].random(number, seed, augment=augment),
    )


def _converted(model: nn.Module) -> nn.Module:
    return bp.to_variational(model, estimator="mean").eval()


def _some(images: Images, number: int, generator: torch.Generator) -> list[Batch]:
    """This many images at random, in batches."""
    index = torch.randperm(len(images.labels), generator=generator)[:number]
    images.images, images.labels = images.images[index], images.labels[index]
    return list(images.batches())


@torch.no_grad()
def is_right(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """Whether each image is classified rightly, (N,)."""
    model.eval()
    return torch.cat([model(images).argmax(1) == labels for images, labels in batches])


@torch.no_grad()
def mean_loss(batches: Iterable[Batch], model: nn.Module) -> float:
    """Mean cross-entropy in nats."""
    sums: Any = [(F.cross_entropy(model(images), labels, reduction="sum"), len(labels)) for images, labels in batches]
    return float(sum(loss for loss, _ in sums)) / sum(number for _, number in sums)
