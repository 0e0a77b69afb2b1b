"""Complex numbers and Fourier transforms against samples."""

import pytest
import torch

from bayesprune.errors import UnsupportedFunctionError
from bayesprune.moments import Moments, parts, settings
from tests.moments.sampled import exact, near


def example(*shape: int, shared: tuple[int, ...] | None = None, seed: int = 0) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, generator=generator, dtype=torch.float64)
    own = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1
    common = None if shared is None else torch.rand(shared, generator=generator, dtype=torch.float64) + 0.1
    return Moments(mean, own if common is None else own + common, common)


ANGLES = torch.polar(torch.ones(5, 3, dtype=torch.float64), torch.linspace(0, 3, 15, dtype=torch.float64).view(5, 3))


def rotated(x):
    """As Llama 4 and DeepSeek-V2 rotate queries."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * ANGLES).flatten(-2)


@pytest.mark.parametrize("shared", [None, (2, 1, 6)])
def test_rotary_embeddings(shared):
    result = exact(rotated, example(2, 5, 6, shared=shared))
    assert parts(result).mean.dtype == torch.float64
    assert shared is None or result.shared.shape == (2, 1, 6)


FUNCTIONS = {
    "product": lambda a, b: (a * b).real,
    "sum and difference": lambda a, b: torch.view_as_real(2 * a + b - 1j).sum(-1),
    "conjugate": lambda a, b: (a * b.conj()).imag,
    "views": lambda a, b: torch.cat([a[1:], -b[:1]]).transpose(0, 1).reshape(-1).real,
    "sums and means": lambda a, b: torch.stack([a, b]).sum((0, 1)).real + torch.cat([a, b], 1).mean().imag,
    "quotient": lambda a, b: (a / (2 + 1j)).imag + b.real,
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_arithmetic(function):
    exact(
        lambda x, y: function(torch.view_as_complex(x), torch.view_as_complex(y)),
        example(3, 2, 2),
        example(3, 2, 2, seed=1),
    )


def test_lengths_and_angles():
    x = example(4, 2)
    x = Moments(3 + x.mean, 0.02 * x.variance)
    near(lambda t: torch.view_as_complex(t).abs(), x, mean=0.03, variance=0.03)
    near(lambda t: torch.view_as_complex(t).angle(), x, mean=0.03, variance=0.03)
    near(lambda t: torch.polar(t[:, 0], t[:, 1]).real, x, mean=0.01, variance=0.01)


TRANSFORMS = {
    "fft": lambda x: torch.fft.fft(x, dim=1).real,
    "fft, imaginary": lambda x: torch.fft.fft(x, n=6, dim=1).imag,
    "rfft": lambda x: torch.view_as_real(torch.fft.rfft(x, dim=1, norm="ortho")),
    "shift": lambda x: torch.fft.ifftshift(torch.fft.fftshift(x, 1)[:, 1:]),
}


@pytest.mark.parametrize("shared", [None, (2, 1, 3)])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_of_one_dimension(transform, shared):
    exact(transform, example(2, 5, 3, shared=shared))


@pytest.mark.parametrize("name", ["ifft", "fft", "irfft", "hfft"])
def test_transforms_of_complex_numbers(name):
    def function(x):
        y = getattr(torch.fft, name)(torch.view_as_complex(x))
        return torch.view_as_real(y) if y.is_complex() else y

    exact(function, example(2, 5, 2))


def test_transforms_of_several_dimensions():
    """FNet mixes tokens and features so; entries of one variance stay independent from one dimension to the next."""
    x = Moments(example(2, 4, 6).mean + 0, torch.ones(2, 4, 6).double())
    near(lambda t: torch.fft.fftn(t, dim=(1, 2)).real, x, mean=0.01, variance=1.0)
    mean = parts(x).mean
    for name in ("fft2", "ifft2", "rfft2", "fftn", "rfftn"):
        torch.testing.assert_close(parts(getattr(torch.fft, name)(x).real).mean, getattr(torch.fft, name)(mean).real)
    back = torch.fft.irfft2(torch.fft.rfft2(x), s=(4, 6))
    torch.testing.assert_close(parts(back).mean, mean)


def test_other_functions_of_complex_numbers_are_refused():
    x = torch.view_as_complex(example(3, 2))
    with pytest.raises(UnsupportedFunctionError, match=r"exp of complex numbers"):
        torch.exp(x)
    with pytest.raises(UnsupportedFunctionError, match=r"matmul of complex numbers"):
        example(3, 3).to(torch.complex128) @ torch.eye(3, dtype=torch.complex128)


def test_directions_go_along():
    with settings(covariance="low_rank"):
        directions = torch.randn(8, 2, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        x = Moments.along(example(2, 5, 6).mean + 0, directions, torch.ones(2, 5, 6).double())
        torch.testing.assert_close(rotated(x).directions, rotated(directions))
        mixed = torch.fft.fft(x, dim=1).real
        torch.testing.assert_close(mixed.directions, torch.fft.fft(directions, dim=2).real)
