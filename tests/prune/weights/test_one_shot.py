import copy
import math

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.laplace.matrices import input_rows, to_matrix
from bayesprune.prune.scores.weights import magnitude
from bayesprune.prune.weights import one_shot
from bayesprune.prune.weights.one_shot import divergence, divide, levels


def correlated(*shape: int) -> torch.Tensor:
    x = torch.randn(shape, dtype=torch.float64)
    return x + 0.7 * x.roll(1, 1)


def net(**options) -> nn.Module:
    torch.manual_seed(5)
    layers = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 4)
    return bp.to_variational(nn.Sequential(*layers).double(), **options).eval()


LAYERS = {
    "linear": (lambda: nn.Linear(8, 5), (60, 8)),
    "conv": (lambda: nn.Conv2d(4, 5, 3, stride=2, padding=1), (16, 4, 7, 6)),
    "groups": (lambda: nn.Conv2d(8, 6, 2, groups=2, bias=False), (16, 8, 4, 4)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("target", ["weights=0.4", "2:4"])
def test_what_is_left_is_fitted_to_the_outputs_before(kind, target):
    torch.manual_seed(4)
    build, shape = LAYERS[kind]
    layer, x = bp.to_variational(build().double()).eval(), correlated(*shape)
    before = copy.deepcopy(layer)
    report = bp.prune_one_shot(layer, [x[:7], x[7:]], target, damping=1e-9)
    mask = layer.mask("weight")
    assert torch.equal(layer.weight != 0, mask)
    assert report.rows[0].kept == int(mask.sum()) == round((0.5 if target == "2:4" else 0.4) * mask.numel())
    if target == "2:4":
        assert (mask.movedim(1, -1).reshape(-1, 4).sum(1) == 2).all()
    rows = input_rows(layer, x, len(x)).flatten(0, 1)
    kept, found = to_matrix(layer, mask), to_matrix(layer, layer.weight.detach())
    wanted = before(x).detach().movedim(1, -1).reshape(len(rows), *kept.shape[:2])
    for group in range(kept.shape[0]):
        for row in range(kept.shape[1]):
            chosen = rows[:, group][:, kept[group, row]]
            if layer.bias is not None:
                chosen = torch.cat([chosen, chosen.new_ones(len(chosen), 1)], 1)
            best = torch.linalg.lstsq(chosen, wanted[:, group, row]).solution[: int(kept[group, row].sum())]
            torch.testing.assert_close(found[group, row, kept[group, row]], best, rtol=1e-4, atol=1e-5)


def test_layers_are_fitted_to_what_the_whole_model_gave_by_what_the_cut_one_gives():
    model, x = net(), correlated(400, 8)
    before = copy.deepcopy(model)
    bp.prune_one_shot(model, [x[:200], x[200:]], "weights=0.5", damping=1e-9)
    reads, wanted = model[:4](x).detach(), before(x).detach()
    for row, kept in enumerate(model[4].mask("weight")):
        chosen = torch.cat([reads[:, kept], torch.ones(400, 1)], 1)
        best = torch.linalg.lstsq(chosen, wanted[:, row]).solution
        found = torch.cat([model[4].weight[row, kept], model[4].bias[[row]]]).detach()
        torch.testing.assert_close(found, best, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("target", ["weights=0.5", "2:4"])
def test_less_is_lost_than_by_conditioning_each_layer_alone(target):
    x = correlated(500, 8)
    batches, unseen = [x[:200], x[200:400]], x[400:]
    dense, alone, sequential = net(), net(), net()
    factors = bp.laplace.fit_kronecker(alone, batches, loss=lambda model, batch: model(batch).square().mean())
    scope = {} if target == "2:4" else {"scope": "layer"}
    bp.prune_weights(alone, target, score=magnitude, **scope)
    bp.laplace.condition_on_zeros(alone, factors)
    bp.prune_one_shot(sequential, batches, target)
    lost = [float((model(unseen) - dense(unseen)).detach().square().mean()) for model in (alone, sequential)]
    print(f"conditioned layer by layer {lost[0]:.2e}, in one shot {lost[1]:.2e}")
    assert lost[1] < 0.7 * lost[0]


def test_layers_that_cost_less_lose_more_and_the_sum_is_what_was_asked_for():
    model, x = net(), correlated(300, 8)
    model[2].weight.data[:, 4:] *= 1e-3
    even, divided, told = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    lost = []
    for cut, options in ((even, {"scope": "layer"}), (divided, {})):
        report = bp.prune_one_shot(cut, [x], "weights=0.5", **options)
        assert report.removable.sparsity == pytest.approx(0.5, abs=0.01)
        lost.append(float((cut(x).softmax(1) - model(x).softmax(1)).detach().square().mean()))
    assert [row.kept / row.total for row in bp.prune_one_shot(even, [x], "weights=0.5", scope="layer").rows] == [
        0.5
    ] * 3
    shares = {row.name: 1 - row.kept / row.total for row in report.rows}
    print(shares, lost)
    assert shares["2.weight"] > 0.65
    assert lost[1] < lost[0]
    zeros = lambda its: float((its[2].weight == 0).double().mean())  # noqa: E731
    report = bp.prune_one_shot(told, [x], "weights=0.5", loss=zeros)
    of_loss = {row.name: 1 - row.kept / row.total for row in report.rows}
    assert of_loss["2.weight"] == pytest.approx(0.3, abs=0.02), "the only layer that costs anything"


def test_refuses_a_loss_that_is_no_number_and_leaves_the_model_as_it_was():
    model, x = net(), correlated(50, 8)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="not a number"):
        bp.prune_one_shot(model, [x], "weights=0.5", loss=lambda _: float("nan"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_is_gone_stays_gone_and_training_goes_on():
    model, x = net(), correlated(200, 8)
    bp.prune_weights(model, "weights=0.7", score=magnitude)
    first = {name: layer.mask("weight").clone() for name, layer in model.named_children() if len(layer.state_dict())}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    report = bp.prune_one_shot(model, [x], "weights=0.5")
    assert report.removable.sparsity == pytest.approx(0.5, abs=0.01)
    for name, before in first.items():
        assert not (model[int(name)].mask("weight") & ~before).any()
    model(x).square().mean().backward()
    optimizer.step()
    assert all(not layer.weight[~layer.mask("weight")].any() for layer in (model[0], model[2], model[4]))


def test_what_is_not_named_or_cannot_go_is_left_as_it_is_and_said_so():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.odd, self.last = nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 8)
            self.unused, self.tied = nn.Linear(4, 4), nn.Linear(8, 8)
            self.upwards = nn.ConvTranspose1d(8, 8, 1)
            self.tied.weight = self.last.weight

        def forward(self, x):
            return self.upwards(self.tied(self.last(self.odd(self.first(x))))[..., None])

    model, x = bp.to_variational(Model()).eval(), torch.randn(64, 8)
    before = copy.deepcopy(model.state_dict())
    report = bp.prune_one_shot(model, [x], "2:4")
    notes = {row.name: row.note for row in report.rows}
    assert notes["first.weight"] == ""
    assert notes["odd.weight"] == "6 inputs are not a multiple of 4"
    assert notes["unused.weight"] == "did not run on the data"
    assert "several layers" in notes["last.weight"]
    assert "neither a linear layer, a convolution nor experts" in notes["upwards.weight"]
    after = model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"first.weight", "first.bias"}
    report = bp.prune_one_shot(model, [x], {"odd": 0.5})
    assert {row.name: row.note for row in report.rows}["first.weight"] == "all of it is kept"
    assert model.odd.mask("weight").sum() == 24


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_model_without_layers_for_it_is_left_as_it_is_and_said_so(scope):
    model = bp.to_variational(nn.ConvTranspose1d(4, 4, 1))
    report = bp.prune_one_shot(model, [torch.randn(8, 4, 2)], "weights=0.5", scope=scope)
    assert [(row.kept, row.note) for row in report.rows] == [
        (16, "neither a linear layer, a convolution nor experts: prune_weights takes it")
    ]


def test_frozen_biases_stay():
    model, x = net(), correlated(100, 8)
    model[2].bias.requires_grad_(False)
    before = model[2].bias.clone(), model[4].bias.clone()
    bp.prune_one_shot(model, [x], "weights=0.5")
    assert torch.equal(model[2].bias, before[0])
    assert not torch.equal(model[4].bias, before[1])


@pytest.mark.parametrize("is_of_the_data", [True, False])
def test_batch_norm_is_measured_anew_where_that_brings_the_outputs_closer(is_of_the_data):
    torch.manual_seed(6)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    x = torch.randn(400, 3, 4, 4)
    bp.to_variational(model).eval()
    if is_of_the_data:
        bp.prune.recalibrate_batch_norm(model, [x])
    else:
        model[1].running_mean.normal_()
    dense = copy.deepcopy(model)
    bp.prune_one_shot(model, [x], "weights=0.3")
    anew = bp.prune.recalibrate_batch_norm(copy.deepcopy(model), [x])
    is_anew = torch.allclose(model[1].running_mean, anew[1].running_mean, rtol=1e-4, atol=1e-5)
    far, near = ((other(x).log_softmax(1).exp() - dense(x).softmax(1)).square().mean() for other in (anew, model))
    assert near <= far + 1e-6
    assert is_of_the_data or not is_anew


def test_streams_of_a_residual_network_are_made_up_for():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

        def forward(self, x):
            return x + self.down(self.up(x).relu())

    torch.manual_seed(7)
    model, x = nn.Sequential(Block(), Block(), nn.Linear(12, 3)), correlated(2000, 12).float()
    bp.to_variational(model).eval()
    dense = copy.deepcopy(model)
    bp.prune_one_shot(model, [x[:1000]], "weights=0.4", scope="layer")
    gap = (dense[1](dense[0](x[:1000])) - model[1](model[0](x[:1000]))).detach()
    down = model[1].down  # the last layer before the sum, fitted to the stream's error too
    reads = model[1].up(model[0](x[:1000])).relu().detach()
    for row, kept in enumerate(down.mask("weight")):
        chosen = torch.cat([reads[:, kept], torch.ones(1000, 1)], 1)
        assert float((chosen.T @ gap[:, row]).abs().max()) / 1000 < 0.02 * float(gap[:, row].std())


def test_what_fails_leaves_the_model_as_it_was(monkeypatch):
    model, x = net(), correlated(50, 8)
    before, fitted = copy.deepcopy(model.state_dict()), []
    own = one_shot.refit

    def fails(*args, **options):
        fitted.append(args[2].name)
        if len(fitted) == 2:
            raise RuntimeError("no more")
        return own(*args, **options)

    monkeypatch.setattr(one_shot, "refit", fails)
    with pytest.raises(RuntimeError, match="no more"):
        bp.prune_one_shot(model, [x], "2:4")
    assert fitted == ["0", "2"]
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_what_a_router_sends_elsewhere_is_left_and_said_so():
    class Chooses(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.first(x)
            return self.last(x[x[:, 0] > 0.3])

    torch.manual_seed(8)
    model, x = bp.to_variational(Chooses()).eval(), torch.randn(200, 4)
    report = bp.prune_one_shot(model, [x], "2:4")
    notes = {row.name: row.note for row in report.rows}
    assert notes["first.weight"] == ""
    assert "depends on the weights" in notes["last.weight"]


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (0.5, {}, "prune_one_shot got the target 0.5; expected a text like"),
        ("snr=1", {}, 'expected a text like "weights=0.2"'),
        ("weights=1.5", {}, "the fraction of the weights to keep, from 0 to 1"),
        ({"7": 0.5}, {}, "the target names '7'"),
        ("weights=0.5", {"scope": "all"}, 'expected "global" or "layer"'),
        ("weights=0.5", {"num_batches": 0}, "data has no batch"),
    ],
)
def test_refuses(target, options, message):
    with pytest.raises(ValueError, match=message):
        bp.prune_one_shot(net(), [torch.randn(4, 8)], target, **options)


def costs(scale: float, rate: float, sparsity: float) -> tuple[float, float]:
    low, high = levels(sparsity)
    return scale * math.exp(rate * low), scale * math.exp(rate * high)


def test_one_more_weight_costs_the_same_in_every_layer():
    sizes, scales, rates = [100, 400, 200], [0.01, 0.02, 0.03], [6.0, 7.0, 5.0]
    measured = [costs(scale, rate, 0.5) for scale, rate in zip(scales, rates, strict=True)]
    shares = divide(0.5, sizes, measured, [0, 0, 0])
    assert sum(share * size for share, size in zip(shares, sizes, strict=True)) == pytest.approx(350)
    prices = [
        scale * rate * math.exp(rate * share) / size
        for scale, rate, share, size in zip(scales, rates, shares, sizes, strict=True)
    ]
    assert prices == pytest.approx([prices[0]] * 3)
    assert all(abs(share - 0.5) < 0.2 for share in shares), "no bound was met"


def test_no_layer_goes_far_nor_below_what_it_has_lost():
    measured = [(1e-6, 2e-6), (1.0, 2.0), (0.5, 1.0)]
    assert divide(0.5, [100, 100, 100], measured, [0, 0, 0])[0] == pytest.approx(0.7)
    assert divide(0.5, [100, 100, 100], measured, [0, 0.45, 0])[1] >= 0.45
    assert divide(0.9, [100, 100, 100], measured, [0, 0, 0])[0] == pytest.approx(0.95)


@pytest.mark.parametrize("measured", [[(0.0, 0.0)] * 2, [(-0.1, -0.2), (-0.1, -0.2)]])
def test_without_a_difference_all_lose_alike(measured):
    assert divide(0.6, [50, 50], measured, [0, 0]) == pytest.approx([0.6, 0.6])


def test_a_cost_that_noise_made_negative_counts_as_small():
    first, second = divide(0.5, [100, 100], [(-0.1, -0.05), (0.1, 0.2)], [0, 0])
    assert first > 0.5 > second


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 7)

    def forward(self, input_ids, attention_mask):
        return {"logits": self.table(input_ids)}


def test_predictions_are_compared_where_the_attention_mask_counts():
    torch.manual_seed(0)
    model = Words()
    ids, mask = torch.tensor([[0, 1, 2], [3, 4, 6]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    measure = divergence(model, [{"input_ids": ids, "attention_mask": mask}])
    before = model.table.weight.log_softmax(1).detach()
    assert measure(model) == 0
    model.table.weight.data[6] = 5 * torch.randn(7)
    assert measure(model) == 0, "the position of token 6 does not count"
    model.table.weight.data[2] = torch.randn(7)
    after = model.table.weight.log_softmax(1).detach()
    expected = (before[2].exp() * (before[2] - after[2])).sum() / 5
    assert measure(model) == pytest.approx(float(expected), rel=1e-5)


def test_images_of_classes_are_compared_by_pixel():
    torch.manual_seed(0)
    model, x = nn.Conv2d(2, 3, 1), torch.randn(2, 2, 4, 4)
    before = model(x).log_softmax(1).detach()
    measure = divergence(model, [x])
    model.weight.data.mul_(2)
    after = model(x).log_softmax(1).detach()
    assert measure(model) == pytest.approx(float((before.exp() * (before - after)).sum(1).mean()), rel=1e-4)


def test_an_error_of_batch_norm_leaves_the_model_as_it_was():
    torch.manual_seed(8)
    model = bp.to_variational(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)))
    bp.prune_weights(model[2], "weights=0.8")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="a single value a channel"):
        bp.prune_one_shot(model, torch.randn(20, 8).split(1), "weights=0.5", scope="layer")
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("start", [0, 1], ids=["a number", "a column"])
def test_the_divergence_of_a_single_output_is_half_its_squared_error(start):
    model, x = nn.Sequential(nn.Linear(8, 1), nn.Flatten(start)).double(), correlated(60, 8)
    changed = copy.deepcopy(model)
    changed[0].bias.data += 3.0
    assert divergence(model, [x[:20], x[20:]])(changed) == pytest.approx(4.5)


def test_layers_of_a_model_with_a_single_output_differ_in_cost():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 1))
    with torch.no_grad():
        model[2].weight[:, 2:] = 0  # most of them are zeros already
    report = bp.prune_one_shot(bp.to_variational(model), [torch.randn(400, 16)], "weights=0.5")
    first, second = (row.kept / row.total for row in report.rows[:2])
    assert first > second + 0.1


def test_inputs_that_are_constant_are_no_obstacle():
    """Their covariance is rounding noise, which has negative directions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 8))
    model[0].weight.data.zero_()
    model[0].bias.data.uniform_(0.5, 3)
    data = [torch.randn(200, 4) for _ in range(4)]
    report = bp.prune_one_shot(bp.to_variational(model), data, "weights=0.5")
    assert report.kept == pytest.approx(report.total / 2, abs=1.5)  # each of three layers rounds its number
