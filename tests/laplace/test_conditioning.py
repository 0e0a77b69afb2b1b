import copy
from functools import partial

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.laplace import condition_on_channels, condition_on_zeros, conditional_mean, fit_kronecker
from bayesprune.laplace.matrices import input_rows, to_matrix
from bayesprune.prune.scores.weights import magnitude


def positive(size: int) -> torch.Tensor:
    """A covariance with strong correlations, float64."""
    factor = torch.randn(size, size, dtype=torch.float64)
    return factor @ factor.T + 0.1 * torch.eye(size, dtype=torch.float64)


def conditional_from_joint(mean: torch.Tensor, covariance: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Mean of a Gaussian over all entries given that some are zero, from the joint covariance: the textbook formula."""
    m, kept = mean.flatten(), keep.flatten()
    result = torch.zeros_like(m)
    gain = covariance[kept][:, ~kept] @ covariance[~kept][:, ~kept].inverse()
    result[kept] = m[kept] - gain @ m[~kept]
    return result.reshape(mean.shape)


@pytest.mark.parametrize("rows_lose", ["the same", "their own"])
def test_conditional_mean_is_that_of_the_joint_gaussian(rows_lose):
    """The same columns in all rows: exact for any covariance between rows. Different ones: for a diagonal one."""
    torch.manual_seed(3)
    mean, columns = torch.randn(4, 6, dtype=torch.float64), positive(6)
    if rows_lose == "the same":
        rows, keep = positive(4), torch.tensor([True, False, True, True, False, True]).repeat(4, 1)
    else:
        rows, keep = torch.rand(4, dtype=torch.float64).add(0.1).diag(), torch.rand(4, 6) > 0.5
    expected = conditional_from_joint(mean, torch.kron(rows, columns), keep)
    found = conditional_mean(mean, columns.inverse(), keep)
    assert (found - expected).abs().max() < 1e-9
    assert (expected - mean * keep).abs().max() > 0.1, "nothing had to move"


def test_rows_that_lose_different_weights_are_coupled_and_that_is_left_out():
    torch.manual_seed(3)
    mean, columns, keep = torch.randn(4, 6, dtype=torch.float64), positive(6), torch.rand(4, 6) > 0.5
    exact = conditional_from_joint(mean, torch.kron(positive(4), columns), keep)
    assert (conditional_mean(mean, columns.inverse(), keep) - exact).abs().max() > 0.01


def test_conditioning_step_by_step_is_conditioning_on_all():
    mean, precision = torch.randn(3, 7, dtype=torch.float64), positive(7)
    first, second = torch.rand(3, 7) > 0.3, torch.rand(3, 7) > 0.3
    steps = conditional_mean(conditional_mean(mean, precision, first), precision, first & second)
    torch.testing.assert_close(steps, conditional_mean(mean, precision, first & second), rtol=1e-9, atol=1e-12)


SPECTRA = {
    "conditioned well": torch.logspace(0, -2, 640, dtype=torch.float64),
    "badly": torch.logspace(0, -9, 640, dtype=torch.float64),
    "one direction": torch.ones(640, dtype=torch.float64).index_fill(0, torch.tensor(0), 1e4),
    "tiny": 1e-30 * torch.logspace(0, -2, 640, dtype=torch.float64),
}


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_wide_layers_whose_rows_lose_their_own_weights_are_solved_as_exactly(spectrum):
    torch.manual_seed(2)
    values = SPECTRA[spectrum]
    size = len(values)
    axes, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    precision = axes * values @ axes.T
    mean, keep = torch.randn(12, size, dtype=torch.float64), torch.rand(12, size) > 0.4
    keep[0, 5:] = False  # fewer columns than the preconditioner has eigenvectors
    found = conditional_mean(mean, precision, keep)
    assert not found[~keep].any()
    for row, kept in enumerate(keep):
        exact = mean[row, kept] + torch.linalg.solve(
            precision[kept][:, kept], precision[kept][:, ~kept] @ mean[row, ~kept]
        )
        gone, best = mean[row] - found[row], mean[row].clone()
        best[kept] -= exact
        assert gone @ precision @ gone <= (1 + 2e-6) * (best @ precision @ best)


def test_extremes():
    mean, precision = torch.randn(2, 3, dtype=torch.float64), positive(3)
    assert torch.equal(conditional_mean(mean, precision, torch.ones(2, 3, dtype=torch.bool)), mean)
    assert not conditional_mean(mean, precision, torch.zeros(2, 3, dtype=torch.bool)).any()


LAYERS = {
    "linear": (lambda: nn.Linear(8, 5), (60, 8)),
    "tokens": (lambda: nn.Linear(8, 5, bias=False), (12, 5, 8)),
    "conv": (lambda: nn.Conv2d(4, 5, 3, stride=2, padding=1), (16, 4, 7, 6)),
    "circular": (lambda: nn.Conv1d(4, 5, 2, dilation=2, padding=1, padding_mode="circular", bias=False), (16, 4, 9)),
    "groups": (lambda: nn.Conv2d(8, 6, 2, groups=2), (16, 8, 4, 4)),
}
kinds = pytest.mark.parametrize("kind", LAYERS)


def fitted(kind: str, **options):
    torch.manual_seed(4)
    build, shape = LAYERS[kind]
    layer, x = bp.to_variational(build().double()), torch.randn(shape, dtype=torch.float64)
    x = x + 0.5 * x.roll(1, 1 if kind != "tokens" else 2)  # correlated channels
    loss = lambda model, batch: model(batch[0]).flatten(1).square().sum(1).mean()  # noqa: E731
    return layer.eval(), x, fit_kronecker(layer, [(x[:7], x[:7]), (x[7:], x[7:])], loss=loss, **options)


def least_squares(layer, x, keep):
    """The layer's outputs fitted by the weights that are kept, group by group and row by row."""
    rows = input_rows(layer, x, len(x)).flatten(0, 1)
    matrix = to_matrix(layer, layer.weight.detach())
    result = torch.zeros_like(matrix)
    for group in range(matrix.shape[0]):
        for row in range(matrix.shape[1]):
            kept, inputs = keep[group, row], rows[:, group]
            target = inputs @ matrix[group, row]
            chosen = inputs[:, kept]
            if layer.bias is not None:
                chosen = torch.cat([chosen, chosen.new_ones(len(chosen), 1)], 1)
            result[group, row, kept] = torch.linalg.lstsq(chosen, target).solution[: int(kept.sum())]
    return result


def keep_of(layer, channels):
    """True for the weights, as a matrix (G, R, C), that do not belong to these input channels."""
    marks = torch.ones(1, getattr(layer, "in_channels", layer.weight.shape[1]), *layer.weight.shape[2:])
    marks[:, channels] = 0
    groups = getattr(layer, "groups", 1)
    of_group = marks[0].reshape(groups, 1, -1)
    return of_group.expand(groups, len(layer.weight) // groups, -1).bool()


@kinds
def test_without_damping_channels_are_made_up_for_by_least_squares(kind):
    layer, x, posterior = fitted(kind)
    before, dense = layer(x).detach(), copy.deepcopy(layer)
    channels = [1, 2, 7] if kind == "groups" else [1, 3]
    silent = x.index_fill(2 if kind == "tokens" else 1, torch.tensor(channels), 0)
    expected = least_squares(layer, x, keep_of(layer, channels))
    assert condition_on_channels(layer, posterior, {"": channels, "unknown": [0]}, damping=0) is layer
    torch.testing.assert_close(to_matrix(layer, layer.weight.detach()), expected, rtol=1e-6, atol=1e-9)
    error = (layer(silent) - before).square().mean()
    assert error < 0.9 * (dense(silent) - before).square().mean()
    best = layer.weight.detach().clone()
    for _ in range(10):
        layer.weight.data = best + 1e-3 * torch.randn_like(best)
        assert (layer(silent) - before).square().mean() > error


@kinds
@pytest.mark.parametrize("target", ["weights=0.4", "2:4"])
def test_without_damping_single_weights_are_made_up_for_by_least_squares(kind, target):
    layer, x, posterior = fitted(kind)
    dense = copy.deepcopy(layer)
    bp.prune_weights(layer, target, score=magnitude)
    mask = to_matrix(layer, layer.mask("weight"))
    expected = least_squares(dense, x, mask)
    condition_on_zeros(layer, posterior, damping=0)
    found = to_matrix(layer, layer.weight.detach())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert torch.equal(found != 0, mask)
    assert torch.equal(posterior[""].mean[..., : mask.shape[2]], found)


def test_the_priors_damping_holds_weights_back():
    layer, _, posterior = fitted("linear")
    start = layer.weight.detach().clone()
    bp.prune_weights(layer, "weights=0.5", score=magnitude)
    mask, moved = layer.mask("weight"), []
    for prior in (1e3, 1.0, 1e-3):
        factors = copy.deepcopy(posterior[""])
        factors.prior_precision = prior**-2
        again = copy.deepcopy(layer)
        condition_on_zeros(again, {"": factors}, damping=None)
        moved.append(float((again.weight.detach() - start)[mask].square().sum()))
    assert moved[0] > moved[1] > 100 * moved[2]


def test_blocks_are_conditioned_apart():
    layer, x, posterior = fitted("tokens", block_size=4)
    bp.prune_weights(layer, "weights=0.5", score=magnitude)
    halves = [copy.deepcopy(layer) for _ in range(2)]
    condition_on_zeros(layer, posterior)
    for half, columns in zip(halves, (slice(4), slice(4, 8)), strict=True):
        part = bp.to_variational(nn.Linear(4, 5, bias=False).double())
        part.weight.data = posterior[""].mean.new_tensor(fitted("tokens")[0].weight[:, columns].tolist())
        rows = x[..., columns]
        alone = fit_kronecker(part, [(rows, rows)], loss=lambda model, batch: model(batch[0]).square().sum() / 12)
        part.weight.data *= half.mask("weight")[:, columns]
        part.set_mask("weight", half.mask("weight")[:, columns].clone())
        condition_on_zeros(part, alone)
        torch.testing.assert_close(part.weight, layer.weight[:, columns].clone())


def test_more_may_go_later_but_not_after_training():
    layer, _, posterior = fitted("linear")
    both = copy.deepcopy(layer)
    for sparsity in (0.3, 0.6):
        bp.prune_weights(layer, f"weights={1 - sparsity}", score=magnitude)
        condition_on_zeros(layer, posterior)
    both.set_mask("weight", layer.mask("weight").clone())
    condition_on_zeros(both, fitted("linear")[2])
    torch.testing.assert_close(layer.weight, both.weight)
    condition_on_channels(layer, posterior, {"": [0]})
    assert not layer.weight[:, 0].any()
    layer.weight.data[0, layer.mask("weight")[0].nonzero()[-1]] += 0.1
    with pytest.raises(ValueError, match="not the means of its posterior any more"):
        condition_on_zeros(layer, posterior)


def net() -> nn.Module:
    torch.manual_seed(5)
    layers = nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4)
    return bp.to_variational(nn.Sequential(*layers)).eval()


def test_channels_are_compensated_right_before_they_are_cut():
    x, dense = torch.randn(64, 2, 5, 5), net()
    batches = [(x, torch.randint(4, (64,)))]
    models = [copy.deepcopy(dense) for _ in range(2)]
    posterior = fit_kronecker(models[1], batches)
    seen = {}

    def compensate(removed):
        seen.update(removed)
        condition_on_channels(models[1], posterior, removed)

    target = "macs=0.5"
    bp.prune_channels(models[1], x[:1], target=target, dry_run=True, before_cut=compensate)
    assert seen == {}
    plain, compensated = (
        bp.prune_channels(model, x[:1], target=target, before_cut=hook)
        for model, hook in zip(models, (None, compensate), strict=True)
    )
    assert plain == compensated
    removed = plain.removed
    assert seen["2"] == list(removed["0"])
    assert seen["5"] == [4 * channel + pixel for channel in removed["2"] for pixel in range(4)]
    errors = [(model(x) - dense(x)).square().mean() for model in models]
    assert errors[1] < 0.7 * errors[0]


def test_what_fails_leaves_the_weights_as_they_were():
    model, x = net(), torch.randn(16, 2, 5, 5)
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    posterior = fit_kronecker(model, [(x, torch.randint(4, (16,)))])

    def compensate_and_fail(removed):
        condition_on_channels(model, posterior, removed)
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        bp.prune_channels(model, x[:1], target="macs=0.5", before_cut=compensate_and_fail)
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_refuses_layers_that_are_deterministic_again():
    model, x = net(), torch.randn(4, 2, 5, 5)
    posterior = fit_kronecker(model, [(x, torch.randint(4, (4,)))])
    compensate = partial(condition_on_channels, bp.to_deterministic(net()), posterior)
    with pytest.raises(ValueError, match="before to_deterministic"):
        bp.prune_channels(model, x, target="macs=0.5", before_cut=compensate)
