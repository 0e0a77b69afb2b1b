"""A closed gate is a removed channel, an open one changes nothing."""

import copy
import pickle
from functools import partial

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

import bayesprune as bp
from bayesprune import gates
from bayesprune.gates.gate import named_gates
from tests.gates.gated_nets import Residual, residual, spread
from tests.prune.nets import nets


def output(model, x):
    with torch.no_grad():
        return model.eval()(x)


def assert_no_gates(model):
    assert not list(named_gates(model))
    assert not [key for key in model.state_dict() if "gate" in key]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@nets
def test_a_closed_gate_is_a_removed_channel(case):
    model, x = bp.to_variational(case.net().double()).double(), case.input().double()
    before = output(model, x)
    assert gates.add_channel_gates(model, x).gated.keys() == gates.inclusion_probabilities(model).keys()
    assert torch.equal(output(model, x), before)
    spread(model)
    gated, found = output(model, x), gates.inclusion_probabilities(model)
    assert not torch.equal(gated, before)
    folded = gates.close(copy.deepcopy(model))
    torch.testing.assert_close(output(folded, x), gated, rtol=0, atol=1e-12)
    assert_no_gates(folded)
    cut = bp.prune_channels(model, x, target="inclusion=0.5")
    torch.testing.assert_close(output(model, x), gated, rtol=0, atol=1e-12)
    assert_no_gates(model)
    for row in cut.rows:
        units = found[row.layer]
        assert (row.channels - row.kept) * len(units) == int((units < 0.5).sum()) * row.channels > 0


def test_gates_of_a_stream_and_of_what_reads_it():
    model, x = residual()
    report = gates.add_channel_gates(model, x)
    assert report.gated == {"inner": 4, "outer": 6}
    assert report.left_out == {"head": "it is an output of the model"}
    spread(model)
    gated = output(model, x)
    bp.prune_channels(model, x, target="inclusion=0.5")
    torch.testing.assert_close(output(model, x), gated, rtol=0, atol=1e-12)


def test_readers_of_one_channel_meet_one_draw():
    model, x = residual()
    gates.add_channel_gates(model, x, initial_inclusion=0.6)
    seen = {}
    for name in ("square", "inner", "head"):
        layer = model.get_submodule(name)
        layer.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, (args[0] == 0).all(0)))
    model.train()
    drawn = set()
    for _ in range(5):
        model(x)
        assert torch.equal(seen["square"], seen["head"])
        assert torch.equal(seen["square"], seen["inner"])
        drawn.add(tuple(seen["square"].tolist()))
    assert len(drawn) > 1, "every forward draws anew"
    with pytest.raises(RuntimeError, match="outside the model's own forward"):
        model.square(x.new_ones(1, 6))


def test_a_floor_leaves_closed_channels_closed():
    model, x = residual()
    gates.add_channel_gates(model, x)
    for _, gate in named_gates(model):
        gate.logits.data.fill_(-1.0)
    gated = output(model, x)
    report = bp.prune_channels(model, x, target="inclusion=0.5")
    assert {row.layer: row.kept for row in report.rows} == {"inner": 1, "outer": 1}
    torch.testing.assert_close(output(model, x), gated, rtol=0, atol=1e-12)
    assert not model.head.mask("weight").any()


def test_heads_have_gates_and_norms_forbid_them():
    torch.manual_seed(0)
    block, x = bp.to_variational(Block(16, 4).double()).double(), torch.randn(2, 5, 16, dtype=torch.float64)
    report = gates.add_channel_gates(block, x)
    assert report.gated["attn"] == 4
    spread(block)
    gated = output(block, x)
    bp.prune_channels(block, x, target="inclusion=0.5")
    torch.testing.assert_close(output(block, x), gated, rtol=0, atol=1e-12)

    normed = bp.to_variational(
        nn.Sequential(nn.Linear(3, 6), nn.LayerNorm(6), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    )
    report = gates.add_channel_gates(normed, torch.randn(4, 3))
    assert report.gated == {"2": 4}
    assert "a norm counts the channel" in report.left_out["0"]
    assert "a norm counts the channel" in str(report)
    with pytest.raises(ValueError, match="no channels of Linear can have gates:  .it is an output"):
        gates.add_channel_gates(nn.Linear(3, 2), torch.randn(4, 3))


def test_copies_have_gates_of_their_own():
    model, x = residual()
    gates.add_channel_gates(model, x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied_gates = dict(named_gates(copied))
        copied_gates["outer"].logits.data.fill_(-1.0)
        assert float(output(copied, x)[0, 0]) == pytest.approx(float(copied.head.bias[0].detach()))
        assert all(side.layer in set(copied.modules()) for gate in copied_gates.values() for side in gate.sides)
    assert not torch.equal(output(model, x), output(copied, x))


def test_state_dicts():
    (model, x), (other, _) = residual(), residual()
    stock = Residual().double().state_dict()
    for net in (model, other):
        gates.add_channel_gates(net, x)
    spread(model)
    assert [key for key in model.state_dict() if "gate" in key] == [
        "inner.channel_gate.logits",
        "outer.channel_gate.logits",
    ]
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other, x), output(model, x))
    model.load_state_dict(stock)
    assert torch.equal(model.stem.weight, stock["stem.weight"])
    assert model.half().outer.channel_gate.logits.dtype == torch.float32


def test_to_deterministic_folds_and_save_refuses(tmp_path):
    model, x = residual()
    gates.add_channel_gates(model, x)
    spread(model)
    gated = output(model, x)
    with pytest.raises(bp.errors.UnsupportedModelError, match=r"gates \(inner\.channel_gate, .*gates\.close"):
        bp.save(model, tmp_path / "gated")
    bp.to_deterministic(model)
    torch.testing.assert_close(output(model, x), gated, rtol=0, atol=1e-12)
    assert_no_gates(model)
    assert type(model.stem) is nn.Linear


def test_a_pruned_model_goes_to_disk(tmp_path):
    model, x = residual()
    gates.add_channel_gates(model, x)
    spread(model)
    bp.prune_channels(model, x, target="inclusion=0.5")
    bp.save(model, tmp_path)
    assert torch.equal(output(bp.load(tmp_path, model=Residual().double()), x), output(model, x))


def test_another_tools_cut_is_noticed():
    model, x = residual()
    gates.add_channel_gates(model, x)
    model.stem.weight = nn.Parameter(model.stem.weight[:5].detach())
    with pytest.raises(RuntimeError, match="log std|got 5"):
        model.head(torch.ones(1, 5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prior_inclusion": 0.0}, "prior_inclusion is 0.0"),
        ({"initial_inclusion": 0.5}, "initial_inclusion is 0.5"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"lr": -1.0}, "lr is -1.0"),
    ],
)
def test_refuses(options, message):
    model, x = residual()
    with pytest.raises(ValueError, match=message):
        gates.add_channel_gates(model, x, **options)
    with pytest.raises(ValueError, match="has no gates"):
        gates.inclusion_probabilities(model)
    gates.add_channel_gates(model, x)
    with pytest.raises(ValueError, match="already"):
        gates.add_channel_gates(model, x)


def gated_mlp():
    """A net of which gates have closed half of the channels, and data."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    model, x = bp.to_variational(net.double()).double(), torch.randn(128, 6, dtype=torch.float64)
    gates.add_channel_gates(model, x[:4])
    for _, gate in named_gates(model):
        gate.logits.data[::2] = -3.0
    return model, x


@pytest.mark.parametrize("own", [False, True])
def test_a_cut_with_data_leaves_the_outputs_of_the_gated_model(own):
    model, x = gated_mlp()
    gated = output(model, x)
    options = {"before_cut": partial(bp.laplace.compensate, model, [x])} if own else {"data": x.split(64)}
    bp.prune_channels(model, x[:4], "inclusion=0.5", **options)
    torch.testing.assert_close(output(model, x), gated, rtol=0, atol=1e-4)
    assert not [key for key in model.state_dict() if "mask" in key], "all that was closed is gone"


def test_a_gated_model_is_cut_and_fitted_as_the_closed_one():
    model, x = gated_mlp()
    closed = gates.close(copy.deepcopy(model))
    reports = [bp.prune_channels(net, x[:4], "macs=0.3", data=x.split(64)) for net in (model, closed)]
    assert reports[0].removed == reports[1].removed
    torch.testing.assert_close(output(model, x), output(closed, x))
