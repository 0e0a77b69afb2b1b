import pytest
import timm
import torch
from torch import nn

from bayesprune.prune.graph.find import find_groups
from tests.prune.attention_nets import BY_NAME

IMAGE = torch.randn(1, 3, 32, 32)


def names(net, x, *granularity) -> list[str]:
    return [group.name for group in find_groups(net, x, granularity=granularity).groups]


@pytest.mark.parametrize(
    ("name", "mlp", "width"),
    [
        (
            "bert",
            "bert.encoder.layer.{}.intermediate.dense",
            ["bert.encoder.layer.1.output.dense", "bert.pooler.dense"],
        ),
        ("llama", "model.layers.{}.mlp.up_proj", ["model.layers.1.mlp.down_proj"]),
        ("gpt2", "transformer.h.{}.mlp.c_fc", ["transformer.h.1.mlp.c_proj"]),
        ("timm_vit", "blocks.{}.mlp.fc1", ["blocks.1.mlp.fc2"]),
    ],
)
def test_transformers_have_heads_inner_channels_and_a_stream(name, mlp, width):
    net, x = BY_NAME[name].net(), BY_NAME[name].inputs()
    assert names(net, x, "mlp") == [mlp.format(block) for block in range(2)]
    assert names(net, x, "width") == width
    every = find_groups(net, x)
    assert sorted(group.name for group in every.groups if not group.attention) == sorted(
        names(net, x, "mlp") + names(net, x, "width")
    )
    assert {g.name for g in every.groups if g.attention} == set(names(net, x, "heads"))


def test_a_residual_net_has_inner_channels_and_streams():
    net = timm.create_model("resnet18", num_classes=3)
    assert len(names(net, IMAGE, "mlp")) == 8
    assert names(net, IMAGE, "width") == ["conv1", *(f"layer{stage}.0.downsample.0" for stage in (2, 3, 4))]


def test_a_net_without_blocks_has_widths_alone():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    assert names(net, torch.randn(1, 4), "width") == ["0", "2"]
    structure = find_groups(net, torch.randn(1, 4), granularity=("heads", "mlp"))
    assert structure.groups == ()
    assert structure.left_whole["0"] == "granularity asks for heads and mlp alone"


def test_heads_alone_need_no_trace():
    class Untraced(nn.Sequential):
        def forward(self, x):
            return super().forward(x).detach()

    net = BY_NAME["timm_vit"].net()
    structure = find_groups(Untraced(net), BY_NAME["timm_vit"].inputs(), granularity=("heads",))
    assert [group.name for group in structure.groups] == ["0.blocks.0.attn", "0.blocks.1.attn"]
