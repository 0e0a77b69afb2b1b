"""Sorting and choosing: the order of the means, each entry with its own variance."""

import pytest
import torch
from torch import Tensor

from bayesprune.moments import Moments, parts, settings


def example(*shape: int, seed: int = 0) -> Moments:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, generator=generator, dtype=torch.float64)
    return Moments(mean, torch.rand(shape, generator=generator, dtype=torch.float64) + 0.1)


CHOICES = {
    "topk": lambda x: x.topk(2),
    "topk, smallest": lambda x: torch.topk(input=x, k=2, dim=0, largest=False, sorted=True),
    "sort": lambda x: x.sort(),
    "sort, descending": lambda x: torch.sort(x, 0, True),
    "sort, stable": lambda x: torch.sort(x, stable=True, dim=0),
    "kthvalue": lambda x: x.kthvalue(2, 1, keepdim=True),
    "median": lambda x: torch.median(x, 0),
    "cummax": lambda x: torch.cummax(x, 1),
    "cummin": lambda x: x.cummin(0),
    "max": lambda x: x.max(1),
}


@pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES)
def test_entries_keep_their_variances(choose):
    x = example(3, 5)
    values, indices = choose(x)
    expected = choose(parts(x).mean)
    assert torch.equal(values.mean, expected.values)
    assert type(indices) is Tensor
    assert torch.equal(indices, expected.indices)
    found = (values.mean.flatten()[:, None] == parts(x).mean.flatten()).int().argmax(1)
    assert torch.equal(values.variance.flatten(), x.variance.flatten()[found])


def test_of_all():
    x = example(3, 5)
    assert x.median().mean == parts(x).mean.median()
    assert torch.equal(torch.msort(x).mean, torch.msort(parts(x).mean))
    low, high = torch.aminmax(x)
    assert (low.mean, high.mean) == tuple(torch.aminmax(parts(x).mean))
    low, high = x.aminmax(dim=1, keepdim=True)
    assert high.shape == (3, 1)
    assert torch.equal(high.variance, x.gather(1, x.argmax(1, keepdim=True)).variance)


def test_what_tokens_share_stays_theirs():
    """Of each of six tokens, the two largest features: tokens share as they did where features are picked alike."""
    x = Moments(torch.arange(4.0).expand(2, 6, 4).clone(), torch.ones(2, 6, 4), torch.full((2, 1, 4), 0.5))
    by_token = x.topk(2, dim=1).values
    assert by_token.shared.shape == (2, 1, 4)


def test_a_router():
    """Top-2 experts a token, as mixtures of experts have them: weights of the chosen, tokens sent and added up."""
    x, scores = example(5, 4), example(5, 3, seed=1)
    weights, chosen = scores.softmax(-1).topk(2)
    weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros(5, 4, dtype=torch.float64)
    mask = torch.nn.functional.one_hot(chosen, 3).permute(2, 1, 0)
    for expert in range(3):
        rank, token = torch.where(mask[expert])
        out.index_add_(0, token, (expert + 1) * x[token] * weights[token, rank, None])
    p = parts(weights).mean
    factors = chosen + 1
    torch.testing.assert_close(parts(out).mean, parts(x).mean * (p * factors).sum(1, keepdim=True))
    own = (p.square() + weights.variance)[..., None] * x.variance[:, None]
    own = own + weights.variance[..., None] * parts(x).mean.square()[:, None]
    torch.testing.assert_close(out.variance, (factors.square()[..., None] * own).sum(1))


def test_directions_go_along():
    with settings(covariance="low_rank"):
        directions = torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(0))
        values, indices = Moments.along(example(3, 5).float().mean + 0, directions).topk(2)
        torch.testing.assert_close(values.directions, directions.gather(2, indices.expand(8, 3, 2)))


def test_whole_numbers_are_those_of_the_mean():
    x = Moments(torch.tensor([2.6, 0.2]), torch.tensor([0.5, 0.5]))
    for made in (x.long(), x.to(torch.int64), x.int(), torch.bincount(x.long()).new_tensor([2, 0])):
        assert type(made) is Tensor
        assert made.tolist() == [2, 0]
    assert torch.bucketize(x, torch.tensor([0.0, 1.0, 2.0])).tolist() == [3, 1]
    assert torch.logical_not(x > 1).tolist() == [False, True]
