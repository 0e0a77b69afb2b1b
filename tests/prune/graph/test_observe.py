"""One forward shows what the passes over a model used to run it for each by itself."""

import pytest
import timm
import torch
import torch_pruning as tp
from torch import nn

import bayesprune as bp
from bayesprune.foundation.macs import macs_by_module
from bayesprune.prune.graph.observe import Observed
from tests.prune.attention_nets import BY_NAME

IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", 3),  # looking, another order of the channels, counting after the cut
        ("convnext_atto", 4),  # and a unit less of what may follow sizes that modules keep
        ("vit_tiny_patch16_224", 7),  # and three to try heads
    ],
)
def test_a_cut_takes_few_forwards(name, expected):
    options = (
        {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 64, "num_heads": 8} if name.startswith("vit") else {}
    )
    torch.manual_seed(0)
    net, forwards = timm.create_model(name, num_classes=3, **options), []
    net.register_forward_hook(lambda *_: forwards.append(1))
    report = bp.prune_channels(net, IMAGE, "macs=0.5", importance=tp.importance.MagnitudeImportance(normalizer=None))
    assert report.achieved["macs"] <= 0.5
    assert len(forwards) == expected


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "convnext_atto", "mixer_s32_224"])
def test_macs_are_those_of_a_forward_that_does_nothing_else(name):
    net, x = timm.create_model(name, num_classes=3), torch.randn(2, 3, 224, 224)
    assert Observed(net, x).macs == macs_by_module(net, x)


@pytest.mark.parametrize("name", ["timm_vit", "gpt2", "t5", "llama", "bert"])
def test_macs_of_attention_are_those_of_a_forward_that_does_nothing_else(name):
    case = BY_NAME[name]
    net, x = case.net(), case.inputs()
    assert Observed(net, x).macs == macs_by_module(net, x)


def test_what_layers_read_and_the_model_puts_out_is_kept_although_it_is_written_into():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            hidden = self.one(x)
            output = self.other(hidden)
            return output + hidden.mul_(2).sum()

    torch.manual_seed(0)
    net, x = Writing(), torch.randn(5, 3)
    reads = Observed(net, x).reads
    hidden = net.one(x)
    assert reads.keys() == {("one", 0), ("other", 0), ("", 0)}
    assert torch.equal(reads["one", 0], x)
    assert torch.equal(reads["other", 0], hidden)
    assert torch.equal(reads["", 0], net(x))
    assert not any(tensor.requires_grad for tensor in reads.values())


def test_looking_leaves_the_model_as_it_was():
    net = timm.create_model("resnet18", num_classes=3).train()
    next(net.parameters()).requires_grad_(False)

    def state():
        tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        kept = {name: (id(tensor), tensor._version, tensor.requires_grad) for name, tensor in tensors.items()}
        hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()]
        return kept, hooks, [m.training for m in net.modules()], torch.get_rng_state().tolist()

    before = state()
    assert Observed(net, IMAGE).trace.graph.module2node
    assert state() == before


def test_hooks_of_ones_own_are_not_called_by_the_tracing():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    seen = []
    net[0].register_forward_hook(lambda *_: seen.append("called"))
    observed = Observed(net, torch.randn(2, 3))
    assert seen == ["called"]
    assert observed.trace.called == {net[0], net[2]}
    assert seen == ["called"]
