"""Seeded corruptions of image tensors and texts in five severities, with the constants of the published sets.

Hendrycks & Dietterich, 2019. Images of at most 64 pixels take the constants of CIFAR-10-C, larger ones those of
ImageNet-C. `rotate` and `shift` are not in those sets. What differs: pixels are not rounded to bytes between steps but
for JPEG, so that figures are near those of the published files, not equal to them.
"""

import io
import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SEVERITIES = (1, 2, 3, 4, 5)
_SMALL = 64  # pixels of the longer side

# Of small and of large images, severity 1 to 5.
_CONSTANTS: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "gaussian_noise": ((0.04, 0.06, 0.08, 0.09, 0.10), (0.08, 0.12, 0.18, 0.26, 0.38)),  # std
    "gaussian_blur": ((0.4, 0.6, 0.7, 0.8, 1.0), (1, 2, 3, 4, 6)),  # std in pixels
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),  # factor of the distance from the mean
    "brightness": ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),  # added to the largest channel
    "pixelate": ((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25)),  # factor of the resolution
    "jpeg_compression": ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7)),  # quality
    "rotate": ((5, 10, 15, 20, 30), (5, 10, 15, 20, 30)),  # degrees, to either side
    "shift": ((0.03, 0.06, 0.09, 0.13, 0.2), (0.03, 0.06, 0.09, 0.13, 0.2)),  # part of the side, in any direction
}
CORRUPTIONS = tuple(_CONSTANTS)
"""The names that `corrupt` takes."""


def corrupt(images: Tensor, name: str, severity: int, *, seed: int = 0) -> Tensor:
    """The images corrupted, of the same shape and dtype; the same for the same seed.

    Args:
        images: (N, C, H, W), values from 0 to 1.
        name: One of `CORRUPTIONS`. "jpeg_compression" needs Pillow.
        severity: 1 to 5.
        seed: Of noise and directions, which each image has its own of.

    Raises:
        ValueError: the name or severity is unknown, or the images are no such tensor.
        ImportError: Pillow is not installed.
    """
    if name not in _CONSTANTS:
        raise ValueError(f"the corruption is {name!r}; expected one of {', '.join(CORRUPTIONS)}.")
    constant = _constant(severity, _CONSTANTS[name][not (images.dim() == 4 and max(images.shape[2:]) <= _SMALL)])
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"images are {images.dtype} of shape {tuple(images.shape)}; expected floats (N, C, H, W).")
    generator = torch.Generator().manual_seed(seed)
    return _FUNCTIONS[name](images, constant, generator).clamp(0, 1)


def _constant(severity: int, constants: tuple[float, ...]) -> float:
    if severity not in SEVERITIES:
        raise ValueError(f"severity is {severity!r}; expected 1 to 5.")
    return constants[severity - 1]


def _noise(images: Tensor, std: float, generator: torch.Generator) -> Tensor:
    return images + std * torch.randn(images.shape, generator=generator).to(images)


def _blur(images: Tensor, std: float, _: torch.Generator) -> Tensor:
    reach = math.ceil(4 * std)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / std).square()).to(images)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1).expand(images.shape[1], 1, 1, -1)
    for pad in ((reach, reach, 0, 0), (0, 0, reach, reach)):
        images = F.conv2d(F.pad(images, pad, mode="replicate"), kernel, groups=len(kernel))
        kernel = kernel.transpose(2, 3)
    return images


def _contrast(images: Tensor, factor: float, _: torch.Generator) -> Tensor:
    means = images.mean((2, 3), keepdim=True)
    return (images - means) * factor + means


def _brightness(images: Tensor, added: float, _: torch.Generator) -> Tensor:
    """The value of HSV rises, hue and saturation stay: all channels by one factor."""
    value = images.amax(1, keepdim=True)
    brighter = (value + added).clamp(max=1)
    return torch.where(value > 0, images * brighter / value.clamp_min(1e-12), brighter)


def _pixelate(images: Tensor, factor: float, _: torch.Generator) -> Tensor:
    height, width = images.shape[2:]
    rows, columns = (_boxes(side, max(1, int(side * factor))).to(images) for side in (height, width))
    small = torch.einsum("ij,ncjl,kl->ncik", rows, images, columns)
    return F.interpolate(small, (height, width), mode="nearest-exact")


def _boxes(side: int, smaller: int) -> Tensor:
    """The mean of the pixels whose center lies in a wider pixel (smaller, side), as Pillow's BOX has it."""
    scale = side / smaller
    places = (torch.arange(side) + 0.5 - scale * (torch.arange(smaller)[:, None] + 0.5)) / scale
    inside = ((places > -0.5) & (places <= 0.5)).float()
    return inside / inside.sum(1, keepdim=True)


def _jpeg(images: Tensor, quality: float, _: torch.Generator) -> Tensor:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("jpeg_compression needs Pillow, which is not installed: pip install pillow") from error
    import numpy as np

    def compressed(pixels: Any) -> Tensor:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=int(quality))
        return torch.from_numpy(np.array(Image.open(file)))

    pixels = (images.clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    if images.shape[1] == 3:
        found = torch.stack([compressed(one.numpy()) for one in pixels.permute(0, 2, 3, 1)]).permute(0, 3, 1, 2)
    else:
        found = torch.stack([compressed(one.numpy()) for one in pixels.flatten(0, 1)]).view(images.shape)
    return found.to(images) / 255


def _rotate(images: Tensor, degrees: float, generator: torch.Generator) -> Tensor:
    signs = torch.randint(2, (len(images),), generator=generator) * 2 - 1
    angles = signs * math.radians(degrees)
    rows = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], 1).view(-1, 2, 2)
    return _moved(images, torch.cat([rows, torch.zeros(len(images), 2, 1)], 2))


def _shift(images: Tensor, part: float, generator: torch.Generator) -> Tensor:
    angles = 2 * math.pi * torch.rand(len(images), generator=generator)
    offsets = 2 * part * torch.stack([angles.cos(), angles.sin()], 1).unsqueeze(2)  # the side is 2 long
    return _moved(images, torch.cat([torch.eye(2).expand(len(images), 2, 2), offsets], 2))


def _moved(images: Tensor, affine: Tensor) -> Tensor:
    grid = F.affine_grid(affine.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


_FUNCTIONS: Mapping[str, Callable[[Tensor, float, torch.Generator], Tensor]] = dict(
    zip(CORRUPTIONS, (_noise, _blur, _contrast, _brightness, _pixelate, _jpeg, _rotate, _shift), strict=True)
)

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_TYPO_RATES = (0.01, 0.02, 0.04, 0.07, 0.1)


def typos(text: str, severity: int, *, seed: int = 0) -> str:
    """The text with typing mistakes in 1, 2, 4, 7 or 10 % of its letters: a neighbour's key, a swap, a loss, a double.

    Keys are those of an American keyboard. The same for the same seed and text.

    Raises:
        ValueError: the severity is not 1 to 5.

    Examples:
        >>> typos("the plot is thin but the acting holds it together", 5, seed=1) != typos("the plot", 5, seed=1)
        True
    """
    rate, draw = _constant(severity, _TYPO_RATES), random.Random(f"{seed} {text}")
    letters, found, place = list(text), [], 0
    while place < len(letters):
        letter, place = letters[place], place + 1
        if not (letter.isascii() and letter.isalpha()) or draw.random() >= rate:
            found.append(letter)
            continue
        kind = draw.choice(("neighbour", "swap", "loss", "double"))
        if kind == "neighbour":
            found.append(_neighbour(letter, draw))
        elif kind == "double":
            found += [letter, letter]
        elif kind == "swap" and place < len(letters):
            found += [letters[place], letter]
            place += 1
    return "".join(found)


def _neighbour(letter: str, draw: random.Random) -> str:
    row = next(row for row in _ROWS if letter.lower() in row)
    place = row.index(letter.lower())
    other = draw.choice([row[i] for i in (place - 1, place + 1) if 0 <= i < len(row)])
    return other.upper() if letter.isupper() else other
