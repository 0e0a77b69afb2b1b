"""A plain convolutional network on Fashion-MNIST, of which no setting of the library was chosen, and its images.

The last tenth of the training images is for validation alone; the network has not seen it.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from common import keep
from mnist import load
from torch import Tensor, nn

BATCH, PAD = 128, 2
EPOCHS, LR = 16, 0.1
WEIGHTS = Path("build/fashion_convnet.pt")
"""Where the trained network is kept, beside the build of the documentation."""


class Clothes:
    """A split of the images, normalised, (N, 1, 28, 28), with labels (N,)."""

    def __init__(self, data_dir: Path, split: str) -> None:
        data = load(data_dir, "FashionMNIST", validation=split != "test")
        images, labels = (data.images, data.labels) if split == "train" else (data.test_images, data.test_labels)
        self.images, self.labels = (images[:, None] - 0.286) / 0.353, labels

    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """All images in order."""
        return list(zip(self.images.split(500), self.labels.split(500), strict=True))

    def random(self, number: int, seed: int, *, augment: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """So many batches, each image mirrored and moved by up to two pixels at random where that is asked for."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.long)
        for _ in range(number):
            if len(order) < BATCH:
                order = torch.cat([order, torch.randperm(len(self.labels), generator=generator)])
            index, order = order[:BATCH], order[BATCH:]
            images = self.images[index]
            yield (moved(images, generator) if augment else images), self.labels[index]


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images mirrored with probability a half, then moved by up to `PAD` pixels."""
    number, size = len(images), images.shape[-1]
    mirrored = torch.rand(number, generator=generator) < 0.5
    images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    rows, columns = torch.randint(0, 2 * PAD + 1, (2, number, 1), generator=generator) + torch.arange(size)
    padded = F.pad(images, (PAD,) * 4, value=float(images.min()))
    return padded[torch.arange(number)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def convnet() -> nn.Sequential:
    """Six 3x3 convolutions with batch norm, 16 to 64 channels, and a linear layer: 2.0 million MACs."""
    widths, strides = (1, 16, 16, 32, 32, 64, 64), (2, 1, 2, 1, 2, 1)
    blocks = [
        nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
        for inputs, outputs, stride in zip(widths, widths[1:], strides, strict=False)
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


def trained_convnet(train: Clothes) -> nn.Sequential:
    """The network after sixteen epochs of SGD; trained where `WEIGHTS` is not there, in some five minutes."""
    torch.manual_seed(0)
    model = convnet()
    if not WEIGHTS.exists():
        steps = EPOCHS * len(train.labels) // BATCH
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps)
        for images, labels in train.random(steps, 0, augment=True):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
        WEIGHTS.parent.mkdir(parents=True, exist_ok=True)
        keep(model.state_dict(), WEIGHTS)
    model.load_state_dict(torch.load(WEIGHTS))
    return model.eval()
