"""The CIFAR-10 ResNets with option A shortcuts, their trained weights, and the images in memory.

Network: He et al., 2016. Trained weights: github.com/akamaster/pytorch_resnet_cifar10.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

BATCH = 64
PAD = 4


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters: every second pixel, channels padded with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + y)

    def shortcut(self, x: Tensor) -> Tensor:
        """What is added to the second convolution's output."""
        return x if self.stride == 1 else F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class ResNet(nn.Module):
    """Three stages of `num_blocks` blocks, 16, 32 and 64 channels: 6 num_blocks + 2 layers deep."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(num_blocks)))
        self.layer2 = nn.Sequential(Block(16, 32, 2), *(Block(32, 32, 1) for _ in range(num_blocks - 1)))
        self.layer3 = nn.Sequential(Block(32, 64, 2), *(Block(64, 64, 1) for _ in range(num_blocks - 1)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


class ResNet20(ResNet):
    """The network of the one-shot and half-MACs pages."""

    def __init__(self) -> None:
        super().__init__(3)


def trained_resnet20(data_dir: Path) -> ResNet20:
    """ResNet-20 at the published weights."""
    return _trained(ResNet20(), data_dir / "weights" / "resnet_cifar10" / "resnet20-12fca82f.th")


def trained_resnet56(data_dir: Path) -> ResNet:
    """ResNet-56 at the published weights."""
    return _trained(ResNet(9), data_dir / "weights" / "resnet_cifar10" / "resnet56-4bfd9763.th")


def _trained(model: Any, path: Path) -> Any:
    """The names in the file carry the prefix of a data-parallel wrapper."""
    state = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return model.to(memory_format=torch.channels_last)


class Images:
    """Images of one split in memory, black borders of 4 pixels around them; `class_part` slices each class."""

    def __init__(self, directory: Path, split: str, class_part: slice) -> None:
        sheets = sorted(directory.glob(f"{split}_*.webp"))
        per_class = len(sheets) // 10
        if per_class not in (1, 5) or len(sheets) % 10:
            raise SystemExit(f"{directory} holds {len(sheets)} {split} sheets; expected 10 (test) or 50 (train).")
        classes = [
            np.concatenate([_sheet(path) for path in sheets[c * per_class : (c + 1) * per_class]])[class_part]
            for c in range(10)
        ]
        images = torch.from_numpy(np.concatenate(classes))
        self.images = F.pad(images, (0, 0, PAD, PAD, PAD, PAD))
        self.labels = torch.arange(10).repeat_interleave(len(classes[0]))

    def batches(self, size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
        """All images in order, as they are."""
        inner = self.images[:, PAD:-PAD, PAD:-PAD]
        for start in range(0, len(inner), size):
            yield _normalised(inner[start : start + size]), self.labels[start : start + size]

    def random(self, num_batches: int, seed: int, *, augment: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of 64 drawn without replacement within an epoch; random crops and flips where asked for."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.long)
        for _ in range(num_batches):
            if len(order) < BATCH:
                order = torch.randperm(len(self.labels), generator=generator)
            index, order = order[:BATCH], order[BATCH:]
            offsets = torch.randint(0, 2 * PAD + 1, (2, BATCH), generator=generator)
            flips = torch.rand(BATCH, generator=generator) < 0.5
            if not augment:
                offsets, flips = torch.full_like(offsets, PAD), torch.zeros_like(flips)
            rows = offsets[0, :, None] + torch.arange(32)
            columns = offsets[1, :, None] + torch.where(flips[:, None], torch.arange(31, -1, -1), torch.arange(32))
            yield _normalised(self.images[index[:, None, None], rows[:, :, None], columns[:, None]]), self.labels[index]


def _sheet(path: Path) -> np.ndarray:
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return pixels.reshape(25, 32, 40, 32, 3).transpose(0, 2, 1, 3, 4).reshape(1000, 32, 32, 3)


def _normalised(images: Tensor) -> Tensor:
    """(N, 3, 32, 32) in the memory format of the sheets (channels last), which is also the faster one."""
    scaled = (images / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    return scaled.permute(0, 3, 1, 2)
