"""Convolutions that become grouped ones."""

import copy

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.layers.shuffled import ShuffledConv2d
from bayesprune.prune import prune_groups
from bayesprune.prune.grouped.assign import assign, block_costs

pytest.importorskip("scipy")


class Block(nn.Module):
    """A residual block between a stem and a head."""

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.one, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.two, self.norm_two = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.norm_two(self.two(self.norm(self.one(x)).relu()))).relu()
        return self.head(x.mean((2, 3)))


def block(seed=0):
    torch.manual_seed(seed)
    model = Block()
    for norm in (model.norm, model.norm_two):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return model.eval(), torch.randn(24, 3, 8, 8)


def grouped_by_hand(conv, num_groups, seed):
    """A dense convolution whose weights are those of groups, its channels shuffled; groups of rows and columns."""
    torch.manual_seed(seed)
    rows = torch.randperm(conv.out_channels) % num_groups
    columns = torch.randperm(conv.in_channels) % num_groups
    conv.weight.data.mul_((rows[:, None] == columns[None])[..., None, None])
    return rows, columns


def output(model, x):
    with torch.no_grad():
        return model.eval()(x)


def test_layers_that_are_grouped_already_lose_nothing():
    """The groups are found, whatever the order of their channels; one index is enough between two layers."""
    model, x = block()
    for number, conv in enumerate((model.one, model.two)):
        grouped_by_hand(conv, 4, number)
    expected = output(model, x)
    bp.to_variational(model)
    report = prune_groups(model, x[:1], 4, data=[x], damping=1e-6)
    assert {row.name: row.groups for row in report.rows} == {"stem": 1, "one": 4, "two": 4}
    assert "3 and 16 channels are not multiples of 4" in str(report)
    torch.testing.assert_close(output(model, x), expected, rtol=1e-3, atol=1e-3)
    assert isinstance(model.one, ShuffledConv2d)
    assert model.one.weight.shape == (16, 4, 3, 3)
    assert (model.one.shuffles_inputs, model.one.shuffles_outputs) == (True, True)
    assert (model.two.shuffles_inputs, model.two.shuffles_outputs) == (False, True)
    per_conv = 16 * 16 * 9 * 64
    assert report.macs[0] - report.macs[1] == 2 * per_conv * 3 // 4


def test_what_stays_makes_up_for_what_goes():
    """Far closer to the dense model than groups in the order of the channels, without a fit."""
    model, x = block(1)
    torch.manual_seed(1)
    x = torch.einsum("nchw,cd->ndhw", torch.randn(48, 3, 8, 8), torch.randn(3, 3))
    expected = output(model, x)
    bp.to_variational(model)
    fitted = copy.deepcopy(model)
    prune_groups(fitted, x[:1], 4, data=[x])
    plain = copy.deepcopy(model)
    for name in ("one", "two"):
        conv = plain.get_submodule(name)
        mask = torch.block_diag(*torch.ones(4, 4, 4))
        conv.weight.data.mul_(mask[..., None, None])
    distance = (output(fitted, x) - expected).square().mean()
    assert distance < 0.5 * (output(plain, x) - expected).square().mean()


def test_an_error_on_the_way_leaves_the_model_as_it_was(fails_on_second_call):
    model, x = block(1)
    bp.to_variational(model)
    before = copy.deepcopy(model.state_dict())
    fails_on_second_call("bayesprune.prune.grouped.prune", "refit")
    with pytest.raises(MemoryError):
        prune_groups(model, x[:1], 4, data=[x])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_error_at_the_end_leaves_the_modules_as_they_were(monkeypatch):
    def fails(*args, **options):
        raise MemoryError

    model, x = block(1)
    bp.to_variational(model)
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    monkeypatch.setattr("bayesprune.prune.grouped.prune.seconds_in_turn", fails)
    with pytest.raises(MemoryError):
        prune_groups(model, x[:1], 4, data=[x])
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Pair(nn.Module):
    """Two convolutions, the first of which has two names; a number for each channel may stand in between."""

    def __init__(self, *, is_scaled=False, calls_second_name=False):
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)
        self.body = nn.Sequential(self.one)
        self.scale = nn.Parameter(torch.rand(8, 1, 1)) if is_scaled else 1.0
        self.calls_second_name = calls_second_name

    def forward(self, x):
        first = self.body if self.calls_second_name else self.one
        return self.two((first(x) * self.scale).relu())


def pair(**options):
    torch.manual_seed(0)
    return bp.to_variational(Pair(**options)), torch.randn(16, 4, 8, 8)


def test_a_layer_with_two_names_is_replaced_under_both():
    found = []
    for calls_second_name in (False, True):
        model, x = pair(calls_second_name=calls_second_name)
        prune_groups(model, x[:1], 2, data=[x])
        assert model.body[0] is model.one
        found.append(output(model, x))
    assert torch.equal(*found)


def test_channels_with_a_parameter_of_their_own_stay_in_order():
    model, x = pair(is_scaled=True)
    for number, conv in enumerate((model.one, model.two)):
        grouped_by_hand(conv, 2, number)
    expected = output(model, x)
    prune_groups(model, x[:1], 2, data=[x], damping=1e-6)
    torch.testing.assert_close(output(model, x), expected, rtol=1e-3, atol=1e-3)


def test_a_bias_stays_frozen():
    model, x = pair()
    model.one.bias.requires_grad_(False)
    prune_groups(model, x[:1], 2, data=[x])
    assert isinstance(model.one, ShuffledConv2d)
    assert [layer.bias.requires_grad for layer in (model.one, model.two)] == [False, True]


def test_a_model_that_is_a_convolution_is_refused_as_it_was():
    model = bp.to_variational(nn.Conv2d(4, 8, 3))
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(16, 4, 8, 8)
    with pytest.raises(ValueError, match="it is the whole model, in which it cannot be replaced"):
        prune_groups(model, x[:1], 2, data=[x])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_target_gives_each_layer_its_groups():
    model, x = block(2)
    grouped_by_hand(model.one, 8, 3)  # which costs nothing there
    bp.to_variational(model)
    report = prune_groups(model, x[:1], "macs=0.6", data=[x], progress=False)
    groups = {row.name: row.groups for row in report.rows}
    assert groups["one"] >= 8 > groups["two"] >= 1
    assert report.macs[1] <= 0.6 * report.macs[0]
    assert report.seconds[0] > 0 < report.seconds[1]
    with pytest.raises(bp.errors.InfeasibleTargetError, match=r"cannot be reached by groups: at least 0\.1"):
        prune_groups(bp.to_variational(block()[0]), x[:1], "macs=0.05", data=[x])


def test_ignored_and_other_layers_stay():
    model, x = block()
    bp.to_variational(model)
    report = prune_groups(model, x[:1], 2, data=[x], ignored_layers=["one"])
    assert {row.name: row.note for row in report.rows if row.groups == 1} == {
        "stem": "3 and 16 channels are not multiples of 2",
        "one": "it is ignored",
    }
    assert isinstance(model.two, ShuffledConv2d)
    with pytest.raises(ValueError, match=r"no convolution of the model can have groups"):
        prune_groups(bp.to_variational(nn.Linear(4, 4)), torch.randn(1, 4), 2, data=[torch.randn(8, 4)])
    with pytest.raises(ValueError, match="expected 2 or more"):
        prune_groups(model, x[:1], 1, data=[x])
    with pytest.raises(ValueError, match="data has no batch"):
        prune_groups(model, x[:1], 2, data=[])


def test_saved_and_loaded_anew(tmp_path):
    model, x = block()
    bp.to_variational(model)
    prune_groups(model, x[:1], 4, data=[x])
    bp.to_deterministic(model)
    expected = output(model, x)
    bp.save(model, tmp_path)
    loaded = bp.load(tmp_path, model=Block())
    assert isinstance(loaded.two, ShuffledConv2d)
    assert torch.equal(output(loaded, x), expected)
    untouched = Block()
    del untouched.norm
    with pytest.raises(bp.errors.StorageError):
        bp.load(tmp_path, model=untouched)
    assert type(untouched.one) is nn.Conv2d


def test_orders_that_are_none_are_refused(tmp_path):
    model, x = block()
    bp.to_variational(model)
    prune_groups(model, x[:1], 4, data=[x])
    bp.to_deterministic(model)
    model.two.outputs[0] = 99
    bp.save(model, tmp_path)
    with pytest.raises(bp.errors.StorageError, match="outputs are not an order of 16 channels"):
        bp.load(tmp_path, model=Block())


def test_assignment_finds_shuffled_blocks():
    torch.manual_seed(0)
    rows, columns = torch.randperm(24) % 4, torch.randperm(16) % 4
    costs = torch.rand(24, 16) * 0.1 + (rows[:, None] == columns[None])
    found_rows, found_columns = assign(costs, 4)
    same = found_rows[:, None] == found_columns[None]
    assert torch.equal(same, rows[:, None] == columns[None])
    assert found_rows.bincount().tolist() == [6] * 4


def test_finer_groups_make_coarser_ones():
    torch.manual_seed(3)
    rows, columns = torch.randperm(16) % 8, torch.randperm(16) % 8
    costs = torch.rand(16, 16) * (rows[:, None] == columns[None])
    for number in (2, 4, 8):
        found_rows, found_columns = assign(costs, number)
        assert costs[found_rows[:, None] != found_columns[None]].sum() == 0


def test_block_costs_are_what_the_best_fit_loses():
    torch.manual_seed(1)
    x, w = torch.randn(200, 6).double() @ torch.randn(6, 6).double(), torch.randn(3, 6).double()
    xx = x.T @ x
    costs = block_costs(w, xx, 2)
    for channel in range(3):
        kept = [column for column in range(6) if column // 2 != channel]
        best = torch.linalg.lstsq(x[:, kept], x @ w.T).solution
        lost = (x @ w.T - x[:, kept] @ best).square().sum(0)
        torch.testing.assert_close(costs[:, channel], lost)
