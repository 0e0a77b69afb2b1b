"""Ridge regression bears the rounding of single precision, and the support that is kept is as good as any."""

from itertools import combinations

import pytest
import torch

from bayesprune.laplace import conditional_mean
from bayesprune.laplace.regression import best_support, ridge


def test_products_that_rounding_made_indefinite_are_damped_more():
    start, kept = torch.zeros(1, 1, 4, dtype=torch.double), torch.ones(1, 1, 4, dtype=torch.bool)
    xx = torch.diag(torch.tensor([4.0, 1.0, 1.0, -5e-3], dtype=torch.double))[None]
    yx = torch.tensor([[[4.0, 2.0, 3.0, 0.0]]], dtype=torch.double)
    found = ridge(start, kept, xx, yx, 1e-3)
    torch.testing.assert_close(found, torch.tensor([[[1.0, 2.0, 3.0, 0.0]]], dtype=torch.double), rtol=2e-2, atol=0)


def test_products_that_are_no_numbers_are_refused():
    start, kept = torch.zeros(1, 1, 2, dtype=torch.double), torch.ones(1, 1, 2, dtype=torch.bool)
    xx = torch.full((1, 2, 2), torch.nan, dtype=torch.double)
    with pytest.raises(torch.linalg.LinAlgError):
        ridge(start, kept, xx, torch.zeros(1, 1, 2, dtype=torch.double), 1e-3)


def correlated(size: int) -> torch.Tensor:
    factor = torch.randn(size, size, dtype=torch.float64)
    return factor @ factor.T + 0.1 * torch.eye(size, dtype=torch.float64)


def cost(mean, precision, keep) -> float:
    """What the best weights on this support cost."""
    gone = mean - conditional_mean(mean, precision, keep)
    return float(((gone @ precision) * gone).sum())


def half_of_each_row(scores: torch.Tensor, way: float) -> torch.Tensor:
    count = scores.shape[-1] - round(way * scores.shape[-1] / 2)
    return scores >= scores.topk(count, dim=-1).values[..., -1:]


def test_it_is_near_the_best_of_all_supports():
    torch.manual_seed(0)
    found, best, by_saliency = 0.0, 0.0, 0.0
    for _ in range(20):
        mean, precision = torch.randn(1, 8, dtype=torch.float64), correlated(8)
        keep = best_support(mean[None], precision[None], half_of_each_row)[0]
        assert int(keep.sum()) == 4
        found += cost(mean, precision, keep)
        obs = mean.square() / precision.inverse().diagonal()
        by_saliency += cost(mean, precision, half_of_each_row(obs, 1.0))
        chosen = (torch.tensor(columns) for columns in combinations(range(8), 4))
        supports = (torch.zeros(1, 8, dtype=torch.bool).index_fill(1, columns, 1) for columns in chosen)
        best += min(cost(mean, precision, support) for support in supports)
    print(f"all supports {best:.3f}, found {found:.3f}, saliencies of single weights {by_saliency:.3f}")
    assert best <= found < 1.5 * best
    assert found < 0.7 * by_saliency


def test_groups_are_apart_and_scale_does_not_matter():
    torch.manual_seed(1)
    mean, precision = torch.randn(2, 3, 6), torch.stack([correlated(6), correlated(6)])
    keep = best_support(mean, precision, half_of_each_row)
    for group in range(2):
        assert torch.equal(best_support(mean[[group]], 100 * precision[[group]], half_of_each_row)[0], keep[group])


def test_the_rule_is_asked_for_more_and_more():
    ways = []

    def rule(scores, way):
        ways.append(way)
        return half_of_each_row(scores, way)

    best_support(torch.randn(1, 2, 4), torch.eye(4)[None], rule, num_steps=8)
    assert ways == sorted(ways)
    assert len(ways) == 8
    assert ways[0] < 0.5
    assert ways[-3:] == [1.0] * 3


@pytest.mark.parametrize("dead", [0, 3])
def test_an_input_that_is_always_zero_goes_first(dead):
    torch.manual_seed(2)
    precision = correlated(4)
    precision[dead] = precision[:, dead] = 0
    keep = best_support(torch.full((1, 5, 4), 1.0), precision[None], half_of_each_row)
    assert not keep[..., dead].any()
