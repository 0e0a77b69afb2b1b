import pytest
import torch
import torch_pruning as tp
import transformers

import bayesprune as bp
import bayesprune.hosts.transformers
from bayesprune.prune.channels.prune import prune_channels
from tests.prune.attention_nets import BY_NAME, output_of

MAGNITUDE = tp.importance.MagnitudeImportance(normalizer=None)


@pytest.mark.parametrize(
    ("name", "granularity", "expected"),
    [
        ("llama", ("heads", "mlp"), {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}),
        ("llama", ("mlp", "width"), {"intermediate_size": 44, "hidden_size": 28}),
        ("t5", ("heads", "mlp"), {"num_heads": 2, "d_ff": 32}),
        ("vit", ("heads", "mlp"), {"num_attention_heads": 2, "head_dim": 8, "intermediate_size": 16}),
        ("bert", ("mlp",), {"intermediate_size": 32}),
        ("gpt2", ("mlp",), {"n_inner": 104}),
    ],
)
def test_a_uniform_cut_loads_without_this_library(name, granularity, expected, tmp_path):
    case = BY_NAME[name]
    net, x = bp.to_variational(case.net()), case.inputs()
    before = net.config.to_dict()
    target, round_to = (0.6, 8) if "heads" in granularity else (0.9, 4)
    report = prune_channels(net, x, target=f"macs={target}", granularity=granularity, uniform=True, round_to=round_to)
    assert report.config == expected
    assert all(net.config.to_dict()[field] == value for field, value in report.config.items())
    assert all(before.get(field) != value for field, value in report.config.items())
    assert f"{next(iter(expected))}={report.config[next(iter(expected))]}" in str(report)
    for module in net.modules():
        if hasattr(module, "config"):
            assert all(module.config.to_dict()[field] == value for field, value in report.config.items())
    stock = bp.to_deterministic(net).eval()
    stock.save_pretrained(tmp_path)
    assert "bayesprune" not in (tmp_path / "config.json").read_text()
    loaded = type(net).from_pretrained(tmp_path).eval()
    assert torch.equal(output_of(loaded, x), output_of(stock, x))
    bp.save(stock, tmp_path / "ours")
    assert "quantization_config" not in (tmp_path / "ours" / "config.json").read_text(), "nothing else is to be said"


def test_a_config_that_cannot_say_it_stays():
    case = BY_NAME["bert"]
    net, x = case.net(), case.inputs()
    before = net.config.to_dict()
    report = prune_channels(net, x, target="macs=0.8", granularity=("heads",), importance=MAGNITUDE, uniform=True)
    assert report.removed_heads
    assert report.config is None
    assert net.config.to_dict() == before


def test_a_config_that_its_own_class_refuses_stays():
    case = BY_NAME["llama"]
    net, x = case.net(), case.inputs()
    report = prune_channels(net, x, target="macs=0.95", granularity=("width",), importance=MAGNITUDE, uniform=True)
    assert report.rows[0].kept % 4, "the config wants a multiple of the number of heads"
    assert report.config is None
    assert net.config.hidden_size == 32


def test_a_cut_that_is_not_uniform_leaves_the_config():
    case = BY_NAME["llama"]
    net, x = case.net(), case.inputs()
    before = net.config.to_dict()
    report = prune_channels(net, x, target="macs=0.7", importance=MAGNITUDE)
    assert report.config is None
    assert net.config.to_dict() == before


def test_configs_inside_configs_follow():
    config = transformers.CLIPVisionConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        projection_dim=16,
    )
    net = transformers.CLIPVisionModelWithProjection(config).eval()
    x = {"pixel_values": torch.randn(1, 3, 32, 32)}
    report = prune_channels(net, x, target="macs=0.8", granularity=("mlp",), importance=MAGNITUDE, uniform=True)
    assert report.config is not None
    assert net.config.intermediate_size == report.rows[0].kept
