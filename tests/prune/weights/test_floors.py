"""Floors under weight tensors, and sparsities by name: exact totals, and no better choice within the floors."""

import itertools

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.errors import InfeasibleTargetError
from bayesprune.layers import named_posteriors
from bayesprune.prune.scores.weights import magnitude
from bayesprune.prune.weights.floors import floor_of, keep_best, within_caps

UNEQUAL = (1e-3, 1.0, 30.0)


def net() -> nn.Module:
    """Three tensors of 48, 72 and 12 weights, the first of the smallest weights by far."""
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 9), nn.Linear(3, 4))
    for layer, scale in zip(model, UNEQUAL, strict=True):
        layer.weight.data.normal_(std=scale)
    return bp.to_variational(model)


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [posterior.mean.detach() for posterior in named_posteriors(model) if posterior.is_weight]


def test_keep_best_is_the_best_of_all_choices():
    """Against every subset: exactly so many, floors kept, and the highest sum of scores."""
    for trial in range(20):
        scores = [torch.rand(n) + offset for n, offset in ((4, trial % 2), (3, 0.0), (4, 0.5))]
        gone = torch.rand(3) < 0.5
        for index, values in enumerate(scores):
            values[0] = -torch.inf if gone[index] else values[0]
        floors = [min(2, int((values > -torch.inf).sum())) for values in scores]
        flat = torch.cat(scores)
        alive = [index for index in range(11) if flat[index] > -torch.inf]
        for num_kept in range(sum(floors), len(alive) + 1):
            keeps, is_floored = keep_best(scores, 11 - num_kept, floors)
            kept = torch.cat(keeps)
            assert int(kept.sum()) == num_kept
            assert all(int(keep.sum()) >= floor for keep, floor in zip(keeps, floors, strict=True))
            possible = (
                sum(float(flat[index]) for index in chosen)
                for chosen in itertools.combinations(alive, num_kept)
                if all(
                    low <= sum(start <= index < start + size for index in chosen)
                    for low, start, size in zip(floors, (0, 4, 7), (4, 3, 4), strict=True)
                )
            )
            assert float(flat[kept].sum()) == pytest.approx(max(possible))
            free = torch.cat(keep_best(scores, 11 - num_kept, [0, 0, 0])[0])
            assert any(is_floored) == (not torch.equal(kept, free))
        with pytest.raises(InfeasibleTargetError, match="floors under 3 tensors keep"):
            keep_best(scores, 12 - sum(floors), floors)


@pytest.mark.parametrize(
    ("counts", "caps", "expected"),
    [
        ([3, 4, 5], [9, 9, 9], [3, 4, 5]),
        ([5, 1, 1], [3, 4, 4], [3, 2, 2]),
        ([5, 1, 0], [3, 4, 9], [3, 3, 0]),
        ([10, 10, 10], [0, 11, 30], [0, 10, 20]),
    ],
)
def test_what_a_cap_spares_the_others_lose(counts, caps, expected):
    assert within_caps(counts, caps) == expected


def test_caps_are_exact_for_any_numbers():
    for counts in itertools.product(range(4), repeat=3):
        for caps in itertools.product(range(4), repeat=3):
            payers = sum(cap for count, cap in zip(counts, caps, strict=True) if count)
            if sum(counts) > payers:
                with pytest.raises(InfeasibleTargetError):
                    within_caps(counts, caps)
                continue
            found = within_caps(counts, caps)
            assert sum(found) == sum(counts)
            for its, count, cap in zip(found, counts, caps, strict=True):
                assert min(count, cap) <= its <= (cap if count else 0)


def test_floors_below_one_are_fractions():
    assert [floor_of(total, 0.1) for total in (1, 10, 30, 31)] == [1, 1, 3, 4]
    assert [floor_of(total, 3) for total in (1, 10)] == [1, 3]
    assert floor_of(10, 0) == 0


@pytest.mark.parametrize(("min_kept", "floor"), [(1, 1), (5, 5), (0.05, 3)])
def test_no_tensor_falls_below_the_floor_and_the_total_is_exact(min_kept, floor):
    model = net()
    best = weights(model)[0].abs().flatten().topk(floor).indices
    report = bp.prune_weights(model, "weights=0.25", score=magnitude, min_kept=min_kept)
    assert report.kept == 33
    assert report.rows[0].kept == floor
    assert [row.note for row in report.rows] == [f"held at min_kept={min_kept:g}", "", ""]
    assert (weights(model)[0].flatten()[best] != 0).all()


def test_without_need_a_floor_changes_nothing():
    for target in ("weights=0.4", "snr=9"):
        torch.manual_seed(1)
        free = net()
        torch.manual_seed(1)
        floored = net()
        reports = [bp.prune_weights(one, target, min_kept=kept) for one, kept in ((free, 0), (floored, 1))]
        assert reports[0] == reports[1]
        assert all(torch.equal(*pair) for pair in zip(weights(free), weights(floored), strict=True))


def test_a_tensor_that_is_below_its_floor_already_stays_as_it_is():
    model = net()
    bp.prune_weights(model, {"0": 0, "1": 0.5}, min_kept=0)
    assert bp.prune_weights(model, "weights=0.25", min_kept=4).rows[0].kept == 0
    assert bp.prune_weights(model, "weights=0.1", min_kept=4).kept == 132 - round(0.9 * 132)


def test_the_threshold_leaves_the_floor():
    model = net()
    report = bp.prune_weights(model, "snr=1e+09", min_kept=2)
    assert [row.kept for row in report.rows] == [2, 2, 2]
    assert all(row.note == "held at min_kept=2" for row in report.rows)


def test_infinite_scores_stay_finite_in_number():
    """An SNR is infinite where the std is 0; more of them than are kept end no search."""
    model = net()
    report = bp.prune_weights(model, "weights=0.1", score=lambda p: torch.full_like(p.mean, torch.inf), min_kept=2)
    assert report.kept == 13
    assert min(row.kept for row in report.rows) >= 2


def test_sparsities_by_name():
    model = net()
    before = weights(model)[2].clone()
    report = bp.prune_weights(model, {"0": 0.75, "1.weight": 0.5, "1": 0.1}, score=magnitude)
    assert [row.kept for row in report.rows] == [36, 36, 12]
    assert torch.equal(weights(model)[2], before)
    again = bp.prune_weights(model, {"0": 0, "1": 0.25}, score=magnitude)
    assert [row.kept for row in again.rows] == [1, 17, 12]  # 0 keeps one weight, 1 pays for it
    assert [row.note for row in again.rows] == ["held at min_kept=1", "", ""]
    layer = bp.to_variational(nn.Linear(4, 4))
    assert bp.prune_weights(layer, {"weight": 0.5}).kept == 8


def test_the_same_fraction_of_each_layer_pays_for_its_floors_too():
    model = bp.to_variational(nn.Sequential(nn.Linear(1, 1), nn.Linear(10, 10), nn.Linear(10, 5)))
    report = bp.prune_weights(model, "weights=0.1", scope="layer")
    assert [row.kept for row in report.rows] == [1, 9, 5]


def test_batch_norm_is_measured_anew_where_data_is_given():
    torch.manual_seed(0)
    model = bp.to_variational(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))).eval()
    x = torch.randn(50, 6)
    bp.prune_weights(model, "weights=0.5")
    assert torch.equal(model[1].running_mean, torch.zeros(4))
    bp.prune_weights(model, "weights=0.4", data=[(x, None)])
    torch.testing.assert_close(model[1].running_mean, model[0](x).mean(0))
    torch.testing.assert_close(model[1].running_var, model[0](x).var(0))
    assert not model.training
