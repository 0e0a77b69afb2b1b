import copy
import re

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.layers import named_posteriors
from bayesprune.prune.scores.weights import magnitude
from tests.cases import structures


def net(std: str = "per_weight") -> nn.Module:
    """240 weights in three layers of different scale, and as many different SNRs."""
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 2, bias=False))
    model[0].weight = nn.Parameter(torch.randn(8, 2, 3, 3)[:, :, :2, :2].contiguous())
    model[4] = nn.Linear(16, 6, bias=False)
    for index, scale in ((0, 1.0), (2, 10.0), (4, 0.1)):
        model[index].weight.data.normal_(std=scale)
    bp.to_variational(model, std=std)
    for name, parameter in model.named_parameters():
        if name.endswith("log_std"):
            parameter.data += torch.randn_like(parameter)
    return model


def weights(model: nn.Module):
    return [posterior for posterior in named_posteriors(model) if posterior.is_weight]


def flat(model: nn.Module, score=lambda p: bp.prune.scores.snr(p)) -> torch.Tensor:
    return torch.cat([score(posterior).flatten() for posterior in weights(model)])


def kept(model: nn.Module) -> torch.Tensor:
    return torch.cat([(posterior.mean != 0).flatten() for posterior in weights(model)])


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 1 / 3, 0.5, 0.9, 0.999, 1.0])
@structures
def test_global_sparsity_is_exact_and_keeps_the_best(std, sparsity):
    model = net(std)
    scores = flat(model)
    report = bp.prune_weights(model, f"weights={1 - sparsity}", min_kept=0)
    removed = round(sparsity * scores.numel())
    assert (report.total, report.kept) == (scores.numel(), scores.numel() - removed)
    assert report.sparsity == pytest.approx(removed / scores.numel())
    expected = torch.ones_like(scores, dtype=torch.bool)
    expected[scores.argsort()[:removed]] = False
    assert torch.equal(kept(model), expected)
    for posterior in weights(model):
        assert torch.equal(posterior.mask, posterior.mean != 0)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 1.0])
def test_layer_sparsity_is_exact_in_every_layer(sparsity):
    model = net()
    scores = {posterior.name: bp.prune.scores.snr(posterior) for posterior in weights(model)}
    report = bp.prune_weights(model, f"weights={1 - sparsity}", scope="layer", min_kept=0)
    for row, posterior in zip(report.rows, weights(model), strict=True):
        removed = round(sparsity * row.total)
        assert (row.name, row.kept) == (posterior.name, row.total - removed)
        lowest = scores[row.name].flatten().argsort()[:removed]
        assert (posterior.mean.flatten()[lowest] == 0).all()


def test_ties_do_not_remove_more():
    model = bp.to_variational(nn.Linear(10, 10))
    model.weight.data.fill_(0.5)
    assert bp.prune_weights(model, "weights=0.63").kept == 63


def test_snr_below():
    model = net()
    scores = flat(model)
    report = bp.prune_weights(model, "snr=1")
    assert torch.equal(kept(model), scores >= 1)
    assert report.kept == int((scores >= 1).sum())
    assert 0 < report.kept < report.total
    assert bp.prune_weights(net(), "snr=0").sparsity == 0


def test_the_score_may_be_the_magnitude():
    model = net()
    scores = flat(model, magnitude)
    bp.prune_weights(model, "weights=0.5", score=magnitude, min_kept=0)
    removed = ~kept(model)
    assert scores[removed].max() < scores[~removed].min()


@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8), ("1:2", 1, 2)])
@pytest.mark.parametrize(
    "layer",
    [lambda: nn.Linear(16, 6), lambda: nn.Conv2d(8, 3, 3), lambda: nn.Conv1d(16, 4, 2, groups=2)],
    ids=["linear", "conv2d", "conv1d_groups"],
)
def test_patterns_keep_the_best_of_consecutive_inputs(layer, pattern, n, m):
    layer = bp.to_variational(layer())
    layer.weight_log_std.data += torch.randn_like(layer.weight)
    scores = bp.signal_to_noise(layer)["weight"].movedim(1, -1).reshape(-1, m)
    report = bp.prune_weights(layer, pattern)
    assert report.kept == report.total * n // m
    groups = (layer.weight != 0).movedim(1, -1).reshape(-1, m)
    assert (groups.sum(1) == n).all()
    assert (scores.masked_fill(~groups, float("inf")).amin(1) >= scores.masked_fill(groups, 0).amax(1)).all()


@pytest.mark.parametrize("groups", [1, 2])
def test_patterns_of_transposed_convolutions_count_inputs(groups):
    """Their weight is (I, O / groups, K): inputs stand first."""
    layer = bp.to_variational(nn.ConvTranspose1d(8, 6, 3, groups=groups))
    bp.prune_weights(layer, "2:4")
    of_each_output = (layer.weight != 0).unflatten(0, (groups, -1, 4))
    assert (of_each_output.sum(2) == 2).all()
    narrow = bp.to_variational(nn.ConvTranspose1d(4, 8, 3, groups=2))  # two inputs for each output
    (row,) = bp.prune_weights(narrow, "2:4").rows
    assert (row.kept, row.note) == (row.total, "2 inputs are not a multiple of 4")


def test_layers_that_a_pattern_does_not_fit_are_said():
    model = bp.to_variational(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Linear(8, 3)))
    report = bp.prune_weights(model, "2:4")
    notes = "3 inputs are not a multiple of 4", "1 inputs are not a multiple of 4", ""
    assert tuple(row.note for row in report.rows) == notes
    assert [row.kept for row in report.rows] == [108, 36, 12]
    assert model[0].mask("weight") is None
    assert "3 inputs are not a multiple of 4" in str(report)


def test_a_pattern_after_a_removal_keeps_what_is_left():
    """A score that may be negative does not bring removed weights back into the choice."""
    for score in (lambda p: -p.mean.abs() - 5, magnitude):
        layer = bp.to_variational(nn.Linear(8, 20))
        bp.prune_weights(layer, "weights=0.75")
        first = layer.weight_mask.clone()
        bp.prune_weights(layer, "2:4", score=score)
        groups, before = layer.weight_mask.view(-1, 4), first.view(-1, 4)
        assert torch.equal(groups.sum(1), before.sum(1).clamp_max(2))
        assert not (layer.weight_mask & ~first).any()


def test_any_score_reaches_the_sparsity_in_stages():
    for score in (lambda p: -p.mean.abs() - 5, lambda p: p.mean):
        model = net()
        for sparsity in (0.3, 0.6, 0.6, 0.9):
            report = bp.prune_weights(model, f"weights={1 - sparsity}", score=score)
            assert report.kept == report.total - round(sparsity * report.total)


def test_removal_is_monotone():
    model = net()
    bp.prune_weights(model, "weights=0.5")
    first = kept(model)
    for target, scope in (
        ("weights=0.8", "global"),
        ("weights=0.5", "global"),
        ("snr=0", "global"),
        ("weights=0.9", "layer"),
    ):
        bp.prune_weights(model, target, scope=scope)
        assert not (kept(model) & ~first).any(), target
    assert torch.equal(kept(model), first)
    bp.prune_weights(model, "weights=0.3")
    assert kept(model).sum() == first.numel() - round(0.7 * first.numel())
    assert not (kept(model) & ~first).any()


def test_stages_end_where_one_step_does():
    staged, once = net(), net()
    once.load_state_dict(staged.state_dict())
    for sparsity in (0.2, 0.4, 0.8):
        bp.prune_weights(staged, f"weights={1 - sparsity}")
    bp.prune_weights(once, "weights=0.2")
    assert torch.equal(kept(staged), kept(once))


def test_biases_and_other_parameters_stay():
    model = net()
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if "weight" not in name}
    report = bp.prune_weights(model, "weights=0", min_kept=0)
    assert all(torch.equal(model.get_parameter(name), parameter) for name, parameter in before.items())
    assert [row.name for row in report.rows] == ["0.weight", "2.weight", "4.weight"]
    assert report.sparsity == 1.0


@pytest.mark.parametrize("estimator", ["weight_sampling", "flipout", "local_reparameterization"])
def test_a_pruned_model_without_noise_in_removed_weights(estimator):
    """Stds of removed weights may be anything: no output and no gradient sees them."""
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 4))
    bp.to_variational(model, estimator=estimator)
    bp.prune_weights(model, "weights=0.5")
    other, x = copy.deepcopy(model), torch.randn(3, 2, 3, 3)
    for layer in (other[0], other[2]):
        layer.weight_log_std.data[~layer.weight_mask] = 5.0
    outputs = []
    for one in (model, other):
        torch.manual_seed(3)
        outputs.append(one(x))
        outputs[-1].square().sum().backward()
    assert torch.equal(*outputs)
    for (name, parameter), twin in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter.grad, twin.grad), name
    torch.testing.assert_close(bp.kl_divergence(model), bp.kl_divergence(other))


def test_evaluation_is_that_of_the_zeros():
    model = net()
    stock = bp.to_deterministic(copy.deepcopy(model))
    bp.prune_weights(model, "weights=0.4")
    for posterior in weights(model):
        stock.get_parameter(posterior.name).data[~posterior.mask] = 0
    x = torch.randn(3, 2, 2, 2)
    conv_output = model[0].eval()(x)
    assert torch.equal(conv_output, stock[0](x))
    assert torch.equal(model[2].eval()(x.flatten(1)), stock[2](x.flatten(1)))


def test_to_deterministic_leaves_the_zeros():
    model = net()
    keys = [key for key in model.state_dict() if "log_std" not in key]
    report = bp.prune_weights(model, "weights=0.4")
    masks = [posterior.mask.clone() for posterior in weights(model)]
    bp.to_deterministic(model)
    assert list(model.state_dict()) == keys
    assert all(torch.equal(model[i].weight != 0, mask) for i, mask in zip((0, 2, 4), masks, strict=True))
    assert sum(int((model[i].weight != 0).sum()) for i in (0, 2, 4)) == report.kept
    again = bp.to_variational(model)
    assert again[0].mask("weight") is None


def test_tied_weights_are_removed_from_both_layers():
    """The mask is on every layer that holds the weight, or the others would draw noise where nothing is left."""
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    bp.to_variational(model, relative_std=0.5)
    report = bp.prune_weights(model, "weights=0", min_kept=0)
    assert (report.total, report.kept) == (36, 0)
    for layer in model:
        for estimator in ("weight_sampling", "flipout", "local_reparameterization"):
            with bp.sampling(layer, estimator):
                assert layer(torch.randn(2, 6)).abs().max() < 1e-15
    (model[0](torch.randn(2, 6)) + model[1](torch.randn(2, 6))).sum().backward()
    assert model[0].weight_log_std.grad.abs().max() == 0


@structures
def test_masks_are_part_of_the_state(std):
    model = net(std)
    bp.prune_weights(model, "weights=0.5")
    state = model.state_dict()
    assert {key for key in state if key.endswith("_mask")} == {f"{i}.weight_mask" for i in (0, 2, 4)}
    other = net(std)
    other.load_state_dict(state)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in state.items())
    assert torch.equal(kept(other), kept(model))


def test_other_checkpoints_do_not_bring_removed_weights_back():
    """A dense checkpoint, stock or variational, into a pruned model: refused when strict, zeros otherwise."""
    model = net()
    dense = copy.deepcopy(model.state_dict())
    stock = {key: value for key, value in dense.items() if "log_std" not in key}
    bp.prune_weights(model, "weights=0.5")
    mask = kept(model)
    for state in (dense, stock):
        with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"0.weight_mask\""):
            copy.deepcopy(model).load_state_dict(state)
        model.load_state_dict(state, strict=False)
        assert torch.equal(kept(model), mask)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (None, {}, "prune_weights got the target None; expected a text like"),
        ("macs=0.5", {}, "got the target 'macs=0.5'; expected a text like \"weights=0.2\""),
        ("weights=1.5", {}, "got the target 'weights=1.5'; expected the fraction of the weights to keep, from 0 to 1"),
        ("weights=-0.1", {}, "from 0 to 1"),
        ("weights=nan", {}, "from 0 to 1"),
        ("snr=-1", {}, "expected a ratio of 0 or more"),
        ("snr=nan", {}, "expected a ratio of 0 or more"),
        ("4:2", {}, "got the target '4:2'; expected \"N:M\" with 0 < N < M"),
        ("0:4", {}, 'expected "N:M" with 0 < N < M'),
        ("half", {}, "got the target 'half'"),
        ("2:4:8", {}, "got the target '2:4:8'"),
        ({"0": 0.5, "2.weight": 1.5}, {}, "is to keep 1.5 of '2.weight'; expected a fraction from 0 to 1"),
        ({"0.bias": 0.5, "7": 0.5}, {}, "the target names '0.bias', '7', of which the model has no weights"),
        ("weights=0.01", {}, "2 of 240 weights were to stay, and the floors under 3 tensors keep 3"),
        ("weights=0.2", {"min_kept": 0.25}, "48 of 240 weights were to stay, and the floors under 3 tensors keep 60"),
        ("weights=0", {"scope": "layer"}, "240 weights were to go, and the floors under the tensors let 237"),
        ({"0": 0.0, "2": 0.0}, {}, "144 weights were to go, and the floors under the tensors let 142"),
        ("weights=0.5", {"min_kept": -1}, "min_kept is -1; expected a fraction from 0, below 1, or a whole number"),
        ("weights=0.5", {"min_kept": 1.5}, "min_kept is 1.5"),
        (
            "weights=0.5",
            {"min_kept": "10%"},
            "min_kept is '10%'; expected a fraction from 0, below 1, or a whole number",
        ),
        ("weights=0.5", {"scope": "channel"}, 'scope is \'channel\'; expected "global" or "layer"'),
    ],
)
def test_targets_and_options_are_checked(target, options, message):
    model = net()
    with pytest.raises(ValueError, match=re.escape(message)):
        bp.prune_weights(model, target, **options)
    assert kept(model).all()


def test_a_model_without_posteriors_is_refused():
    with pytest.raises(ValueError, match="without variational layers; call to_variational first"):
        bp.prune_weights(nn.Linear(2, 2), "weights=0.5")


def test_the_report_prints():
    text = str(bp.prune_weights(net(), "weights=0.5"))
    assert "of 240 weights kept (sparsity 50.00%)" in text
    assert all(name in text for name in ("0.weight", "2.weight", "4.weight"))


def test_scores_that_are_not_numbers_are_refused():
    """NaN sorts last, so a diverged layer would be the one that is kept."""
    model = net()
    model[2].weight_log_std.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the scores of 2\.weight have 1 of 80 values that are NaN"):
        bp.prune_weights(model, "weights=0.5")
    assert kept(model).all()


@pytest.mark.parametrize(
    "score", [lambda p: None, lambda p: 1.0, lambda p: p.mean.detach().sum(1), lambda p: torch.ones_like(p.mean).int()]
)
def test_a_score_of_another_kind_is_told(score):
    model = net()
    with pytest.raises(
        TypeError, match=r"score returned .* for 0\.weight; expected a tensor of floats of the weight's"
    ):
        bp.prune_weights(model, "weights=0.5", score=score)
    assert kept(model).all()


@pytest.mark.parametrize("data", [[], [torch.ones(1, 8)], [torch.full((4, 8), torch.nan)]])
def test_data_that_batch_norm_cannot_measure_leaves_the_model_as_it_was(data):
    model = bp.to_variational(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"batch|not finite"):
        bp.prune_weights(model, "weights=0.5", data=data)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
