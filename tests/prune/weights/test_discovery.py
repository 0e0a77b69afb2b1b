"""Masks that are found in rounds: what comes back, what stays zero, and what each round removes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bayesprune as bp
from bayesprune.foundation.target import Target
from bayesprune.layers import named_posteriors
from bayesprune.prune.scores.weights import magnitude
from bayesprune.prune.weights.schedule import PruneSchedule, cubic, shares

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(3))
Y = (X[:, 0] + X[:, 1] > 0).long()


def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 2))
    return bp.to_variational(model)


def learn(model: nn.Module, number: int) -> None:
    torch.manual_seed(number)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    attachment = bp.attach(optimizer, model, num_data=64)
    model.train()
    for _ in range(8):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    attachment.detach()
    model.eval()


def masks(model: nn.Module) -> dict[str, torch.Tensor]:
    return {posterior.name: posterior.mask for posterior in named_posteriors(model) if posterior.is_weight}


def test_kept_weights_and_stds_go_back_and_removed_ones_stay_zero():
    model = net()
    early = copy.deepcopy(model.state_dict())
    trained, zeros = [], []

    def train(model, number):
        before = masks(model)
        learn(model, number)
        zeros.append(all(not model.get_parameter(n)[~m].any() for n, m in before.items() if m is not None))
        trained.append(copy.deepcopy(model.state_dict()))

    reports = bp.prune.discover_mask(model, "weights=0.2", train=train, rounds=3, rewind=early)
    assert zeros == [True] * 3
    assert [report.kept for report in reports] == [160 - round(160 * (1 - 0.2 ** (t / 3))) for t in (1, 2, 3)]
    found = model.state_dict()
    for key, value in early.items():
        if f"{key}_mask" in found:
            assert torch.equal(found[key], value * found[f"{key}_mask"]), key
            assert not torch.equal(trained[-1][key], value), "the rounds did train"
        else:
            assert torch.equal(found[key], value), key
    learn(model, 4)
    assert not any(model.get_parameter(name)[~mask].any() for name, mask in masks(model).items())


def test_masks_are_those_of_a_loop_by_hand():
    """Rounds of training, ranking and rewinding, written out."""
    found, oracle = net(), net()
    early = copy.deepcopy(oracle.state_dict())
    bp.prune.discover_mask(found, "weights=0.4", train=learn, rounds=2, rewind=early, ramp="cubic", score=magnitude)
    for number in (1, 2):
        learn(oracle, number)
        bp.prune_weights(oracle, f"weights={1 - (0.6 * 0.875, 0.6)[number - 1]}", score=magnitude)
        for name, mask in masks(oracle).items():
            oracle.get_parameter(name).data.copy_(early[name] * mask)
        rest = {key: value for key, value in early.items() if key not in masks(oracle)}
        oracle.load_state_dict(rest, strict=False)
    assert all(
        torch.equal(a, b) for a, b in zip(found.state_dict().values(), oracle.state_dict().values(), strict=True)
    )


def test_without_a_state_it_goes_on():
    model, trained = net(), []

    def train(model, number):
        learn(model, number)
        trained.append(copy.deepcopy(model.state_dict()))

    bp.prune.discover_mask(model, "weights=0.5", train=train, rounds=2)
    for name, mask in masks(model).items():
        assert torch.equal(model.get_parameter(name), trained[-1][name] * mask)


def test_rewinds_a_model_with_masks_of_its_own():
    """The masks of the state are older than those of the rounds."""
    model = net()
    bp.prune_weights(model, "weights=0.75")
    first, early = masks(model), copy.deepcopy(model.state_dict())
    (report,) = bp.prune.discover_mask(model, "weights=0.5", train=learn, rounds=1, rewind=early)
    assert report.kept == sum(int(mask.sum()) for mask in masks(model).values()) == 80
    assert not any((mask & ~first[name]).any() for name, mask in masks(model).items())


def test_batch_norm_moves_where_data_is_given_alone():
    model, again = net(), net()
    early = copy.deepcopy(model.state_dict())
    bp.prune.discover_mask(model, "weights=0.5", train=learn, rounds=1, rewind=early)
    assert torch.equal(model[1].running_mean, early["1.running_mean"])
    bp.prune.discover_mask(again, "weights=0.5", train=learn, rounds=1, rewind=early, data=[X])
    torch.testing.assert_close(again[1].running_mean, again[0].eval()(X).mean(0))


def test_a_fit_re_estimates_between_removals():
    model, seen = net(), []

    def fit(model, number):
        bp.laplace.fit_laplace(model, [(X, Y)], num_data=1000)
        seen.append(bp.signal_to_noise(model)["0.weight"].clone())

    means = copy.deepcopy(model.state_dict())
    bp.prune.discover_mask(model, "weights=0.1", train=fit, rounds=4, ramp="cubic")
    assert all(torch.equal(model.get_parameter(n), means[n] * mask) for n, mask in masks(model).items())
    kept = masks(model)["0.weight"]
    assert not torch.allclose(seen[0][kept], seen[-1][kept], rtol=0.05), "the stds are those of what is left"


def test_states_that_do_not_fit_are_refused():
    model = net()
    with pytest.raises(ValueError, match="rewind is the live state of the model"):
        bp.prune.discover_mask(model, "weights=0.5", train=learn, rounds=1, rewind=model.state_dict())
    stock = bp.to_deterministic(net()).state_dict()
    with pytest.raises(ValueError, match=r"0\.bias_log_std, 0\.weight_log_std, .* are in one of them alone"):
        bp.prune.discover_mask(model, "weights=0.5", train=learn, rounds=1, rewind=stock)
    with pytest.raises(ValueError, match="the number of rounds is 0"):
        bp.prune.discover_mask(model, "weights=0.5", train=learn, rounds=0)
    assert set(masks(model).values()) == {None}


def test_ramps_end_where_they_should():
    def removed(*args, **options):
        return [Target.parse(share, ("weights",), "test").removed for share in shares(*args, **options)]

    assert shares("weights=0.1", 1) == ("weights=0.1",)
    assert removed("weights=0.125", 3, ramp="geometric") == pytest.approx((0.5, 0.75, 0.875))
    assert removed("weights=0.2", 4) == pytest.approx([0.8 * (1 - (1 - t / 4) ** 3) for t in (1, 2, 3, 4)])
    schedule = PruneSchedule("weights=0.2", begin=0.0, end=1.0, num_updates=4)
    assert removed("weights=0.2", 4) == pytest.approx([schedule.sparsity_at(t / 4) for t in (1, 2, 3, 4)])
    assert cubic(0.5, 0.0) == 0.0
    for options in ({"target": "weights=1"}, {"num_rounds": 0}, {"ramp": "linear"}):
        with pytest.raises(ValueError, match="expected"):
            shares(**{"target": "weights=0.5", "num_rounds": 2, **options})


def test_schedules_have_the_floor_of_the_weights():
    model = net()
    model[0].weight.data *= 1e-6
    report = PruneSchedule("weights=0.1", score=magnitude, min_kept=0.05).remove(model, 0.9)
    assert [row.kept for row in report.rows] == [6, 10]
    with pytest.raises(ValueError, match="min_kept is -1"):
        PruneSchedule("weights=0.1", min_kept=-1)


@pytest.mark.slow
def test_estimating_anew_between_removals_keeps_more_of_the_accuracy():
    """Digits, 90 % of the weights of a small convolutional network, no training: 6 rounds against one."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(digits.target)
    torch.manual_seed(0)
    order = torch.randperm(len(x))
    train, held_out = order[:1000], order[1000:]
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for batch in (train[torch.randint(1000, (64,))] for _ in range(240)):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    bp.to_variational(model).eval()

    def accuracy(candidate: nn.Module) -> float:
        with torch.no_grad():
            return float((candidate.eval()(x[held_out]).argmax(1) == y[held_out]).float().mean())

    def after(rounds: int) -> float:
        candidate = copy.deepcopy(model)
        options = {"rounds": rounds, "ramp": "cubic", "data": [x[train]]}
        bp.prune.discover_mask(
            candidate,
            "weights=0.1",
            train=lambda m, _: bp.laplace.fit_laplace(m, [(x[train[:300]], y[train[:300]])]),
            **options,
        )
        return accuracy(candidate)

    assert accuracy(model) > 0.97
    once, anew = after(1), after(6)
    assert anew > once + 0.2, (once, anew)


def test_data_that_can_be_read_once_serve_every_round():
    models, data = [net(), net()], list(X.split(16))
    for model, batches in zip(models, (data, iter(data)), strict=True):
        bp.prune.discover_mask(model, "weights=0.5", train=lambda *_: None, rounds=3, data=batches)
    assert all(torch.equal(value, models[1].state_dict()[name]) for name, value in models[0].state_dict().items())
