from itertools import pairwise

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from bayesprune.foundation import noise
from tests.oracles import assert_mean

CPU = torch.device("cpu")


@pytest.fixture
def as_rank(monkeypatch):
    """Makes the process believe that it is one of several."""

    def pretend(rank: int, world_size: int = 2) -> None:
        monkeypatch.setattr(torch.distributed, "is_available", lambda: True)
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world_size)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)

    return pretend


def drawn(seed: int = 0, count: int = 1, size: int = 1000) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [noise.normal((size,), device=CPU, dtype=torch.float64) for _ in range(count)]


def test_one_process_uses_the_default_stream():
    torch.manual_seed(3)
    first, second = noise.normal((5, 2), device=CPU, dtype=torch.float64), torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(first, torch.randn(5, 2, dtype=torch.float64))
    assert torch.equal(second, torch.rand(3))


def test_a_group_of_one_process_uses_the_default_stream(as_rank):
    alone = drawn()
    as_rank(0, world_size=1)
    assert torch.equal(alone[0], drawn()[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world_size", [1, 2])
def test_shape_and_dtype(dtype, world_size, as_rank):
    as_rank(1, world_size)
    for draw in (noise.normal, noise.signs):
        values = draw((2, 3), device=CPU, dtype=dtype)
        assert values.shape == (2, 3)
        assert values.dtype == dtype


def test_signs_are_signs(as_rank):
    for world_size in (1, 2):
        as_rank(1, world_size)
        values = noise.signs((10_000,), device=CPU, dtype=torch.float32)
        assert set(values.tolist()) == {-1.0, 1.0}
        assert_mean(values, 0.0)


def test_ranks_with_one_seed_draw_independent_noise(as_rank):
    draws = {}
    for rank in range(4):
        as_rank(rank, world_size=4)
        draws[rank] = drawn(size=10_000)[0]
        assert_mean(draws[rank], 0.0, f"mean of rank {rank}")
        assert_mean(draws[rank].square(), 1.0, f"variance of rank {rank}")
    for one in range(4):
        for other in range(one):
            assert_mean(draws[one] * draws[other], 0.0, f"correlation of ranks {one} and {other}")


def test_a_rank_draws_anew_each_time_and_repeats_under_its_seed(as_rank):
    as_rank(1)
    first, second = drawn(count=2)
    assert_mean(first * second, 0.0, "correlation of two draws")
    assert all(torch.equal(a, b) for a, b in zip((first, second), drawn(count=2), strict=True))
    assert not torch.equal(first, drawn(seed=1)[0])


def test_all_ranks_advance_the_default_stream_alike(as_rank):
    """Augmentation and dropout that ranks share by a common seed stay shared."""
    after = []
    for rank in range(2):
        as_rank(rank)
        drawn(count=3)
        after.append(torch.rand(4))
    assert torch.equal(*after)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_restored_stream_repeats_the_noise(world_size, as_rank):
    """Gradient checkpointing runs a forward twice and must meet the same noise."""
    as_rank(1, world_size)
    log_std = torch.zeros(50, requires_grad=True)

    def block(x):
        return (x + log_std.exp() * noise.normal((50,), device=CPU, dtype=torch.float32)).square()

    gradients = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=False)):
        torch.manual_seed(5)
        gradients += torch.autograd.grad(run(torch.ones(50)).sum(), log_std)
    assert torch.equal(*gradients)


def test_many_signs_are_independent_and_balanced():
    """Eight come from one random byte; each and each product of two is balanced, over bytes too."""
    torch.manual_seed(0)
    found = torch.stack([*noise.many_signs(11, (20_000,), device=torch.device("cpu"), dtype=torch.float32)])
    assert found.shape == (11, 20_000)
    assert found.abs().eq(1).all()
    z = (found @ found.T / 20_000 - torch.eye(11)) * 20_000**0.5
    z_means = found.mean(1) * 20_000**0.5
    print(f"largest |z| of products {z.abs().max():.2f}, of means {z_means.abs().max():.2f}")
    assert max(z.abs().max(), z_means.abs().max()) < 5


def test_over_all_places_the_table_is_white():
    """Mean 0, variance 1, no correlation at any distance, up to rounding; and its numbers are normal."""
    table = noise._normal_table().double()
    around, again = table[: noise._TABLE], table[noise._TABLE :]
    assert torch.equal(around[: len(again)], again)
    spectrum = torch.fft.rfft(around)
    correlation = torch.fft.irfft(spectrum.abs().square(), n=len(around)) / len(around)
    assert abs(float(around.mean())) < 1e-7
    assert abs(float(correlation[0]) - 1) < 1e-6
    assert float(correlation[1:].abs().max()) < 2e-6  # one over the size of the table, from the mean of zero
    standard_error = len(around) ** -0.5
    assert abs(float(around.pow(3).mean())) < 5 * 15**0.5 * standard_error
    assert abs(float(around.pow(4).mean()) - 3) < 5 * 96**0.5 * standard_error
    share = torch.arange(1, len(around) + 1) / len(around)
    distance = (torch.special.ndtr(around.sort().values) - share).abs().max()
    print(f"Kolmogorov-Smirnov distance {distance:.1e}")
    assert distance < 2 * standard_error


SIZES = [4, 2_048, noise.MAX_AT_ONCE, noise.MAX_AT_ONCE + 1, 3 * noise.MAX_AT_ONCE + 17]


@pytest.mark.parametrize("size", [7, *SIZES])
def test_multiplied_takes_the_numbers_of_normal(size):
    values = torch.rand(size) + 1
    eps = noise.normal((size,), device=CPU, dtype=torch.float32, seed=11)
    assert torch.equal(noise.multiplied(values, 11), values * eps)
    expected = values * eps
    assert noise.multiplied(values, 11, out=values) is values
    assert torch.equal(values, expected)


@pytest.mark.parametrize("size", SIZES)
def test_draws_of_many_seeds_are_white(size):
    """What two places of a draw have over 400 seeds, the first, one in the next block, and the last."""
    draws = torch.stack([noise.normal((size,), device=CPU, dtype=torch.float32, seed=seed) for seed in range(400)])
    places = sorted({0, 1, size // 2, min(noise.MAX_AT_ONCE + 3, size - 1), size - 1})
    chosen = draws[:, places].double()
    for index, place in enumerate(places):
        assert_mean(chosen[:, index], 0.0, f"mean at {place}")
        assert_mean(chosen[:, index].square(), 1.0, f"variance at {place}")
        for other in range(index):
            assert_mean(chosen[:, index] * chosen[:, other], 0.0, f"correlation of {place} and {places[other]}")


def test_neighbouring_seeds_draw_independently():
    draws = [noise.normal((5_000,), device=CPU, dtype=torch.float32, seed=seed).double() for seed in range(20)]
    products = torch.cat([one * other for one, other in pairwise(draws)])
    assert_mean(products, 0.0, "correlation of neighbours")


def test_a_default_device_does_not_move_the_noise():
    """Users set one for their model; the table is a processor's, and the seeds come from the CPU stream."""
    torch.manual_seed(2)
    expected = noise.normal((5_000,), device=CPU, dtype=torch.float32)
    noise._normal_table.cache_clear()
    torch.manual_seed(2)
    with torch.device("meta"):
        found = noise.normal((5_000,), device=CPU, dtype=torch.float32)
    assert torch.equal(found, expected)
