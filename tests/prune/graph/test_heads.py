from dataclasses import replace

import pytest
import timm
import torch
import torch_pruning as tp
import transformers
from torch import nn
from torch.nn import functional as F

import bayesprune as bp
import bayesprune.hosts.transformers
from bayesprune.layers import variational_layers
from bayesprune.prune.channels.prune import prune_channels
from bayesprune.prune.graph import heads as finder
from bayesprune.prune.graph.find import find_groups
from bayesprune.prune.graph.group import Positions, cut_parameters
from bayesprune.prune.graph.heads import find_heads
from bayesprune.prune.graph.observe import Observed
from bayesprune.prune.graph.removal import remove
from bayesprune.prune.graph.trials import disagreement
from bayesprune.prune.graph.verify import permute
from bayesprune.prune.scores.channels import SNRImportance
from tests.prune.attention_nets import BY_NAME, attention, output_of
from tests.prune.nets import assert_stds_follow, tie_means_to_stds

MAGNITUDE = tp.importance.MagnitudeImportance(normalizer=None)
HEADS = ("heads",)


def silence(group, unit) -> None:
    """The layers behind the heads ignore this unit."""
    for member in group.members:
        if member.axis[1] == "in":
            ((name, dim),) = cut_parameters(member.layer, "in")
            positions = [position for channel in unit for position in member.positions[channel]]
            member.layer.get_parameter(name).data.index_fill_(dim, torch.tensor(positions), 0)


@attention
def test_heads_are_found(case):
    structure = find_heads(Observed(case.net(), case.inputs()))
    assert [(len(group.units), group.heads_per_unit) for group in structure.groups] == case.units


@attention
@torch.no_grad()
def test_a_head_that_nobody_listens_to_leaves_and_the_output_stays(case):
    net, x = case.net(), case.inputs()
    groups = find_heads(Observed(net, x)).groups
    chosen = [(group, [group.units[(2 * index + 1) % len(group.units)]]) for index, group in enumerate(groups)][::2]
    for group, units in chosen:
        silence(group, units[0])
    dense = output_of(net, x)
    whole = {name: tensor.shape for name, tensor in net.state_dict().items()}
    remove(net, chosen)
    assert torch.allclose(output_of(net, x), dense, atol=1e-6)
    assert dense.abs().max() > 1e-3
    assert sum(tensor.shape != whole[name] for name, tensor in net.state_dict().items()) >= 2 * len(chosen)


@attention
def test_another_order_of_the_heads_gives_the_same_output(case):
    net, x = case.net(), case.inputs()
    groups = find_heads(Observed(net, x)).groups
    dense = output_of(net, x)
    permute(net, groups)
    torch.testing.assert_close(output_of(net, x), dense, atol=1e-5, rtol=1e-5)


@attention
def test_heads_go_and_training_goes_on(case, caplog):
    net, x = bp.to_variational(case.net()), case.inputs()
    tie_means_to_stds(net)
    with caplog.at_level("INFO", logger="bayesprune.prune.channels.prune"):
        report = prune_channels(net, x, target="macs=0.97", granularity=HEADS)
    assert not caplog.records, "the MACs counted after the cut are those that were planned"
    assert report.achieved["macs"] <= 0.97
    assert report.removed == {}
    rows = {row.layer: row for row in report.rows}
    for name, heads in report.removed_heads.items():
        row = rows.get(name)
        assert row is None or row.heads - row.kept_heads == len(heads) > 0
    assert_stds_follow(net)
    net.train()
    output_of(net, x).square().sum().backward()
    for _, layer in variational_layers(net):
        if layer.weight.grad is not None:
            assert layer.weight.grad.shape == layer.weight.shape


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "t5", "bart", "gemma"])
def test_generation_with_a_cache_goes_on(name):
    case = BY_NAME[name]
    net, x = case.net(), case.inputs()
    groups = find_heads(Observed(net, x)).groups
    remove(net, [(group, [group.units[-1]]) for group in groups[1::2]])
    options = {"do_sample": False, "min_new_tokens": 6, "max_new_tokens": 6, "pad_token_id": 0}
    cached = net.generate(x["input_ids"], use_cache=True, **options)
    assert torch.equal(cached, net.generate(x["input_ids"], use_cache=False, **options))


@pytest.mark.parametrize(
    ("name", "importance"),
    [
        *((name, SNRImportance()) for name in ("timm_vit", "llama", "falcon", "gpt2")),
        *((name, MAGNITUDE) for name in ("timm_vit", "llama", "falcon")),
    ],
)
def test_scores_permute_with_the_heads(name, importance):
    case = BY_NAME[name]
    net, x = bp.to_variational(case.net(), std="rank_one"), case.inputs()
    group, *_ = find_heads(Observed(net, x)).groups
    before = importance(group.group).reshape(len(group.units), -1).mean(1)
    permute(net, [group])
    moved, *_ = find_heads(Observed(net, x)).groups
    after = importance(moved.group).reshape(len(group.units), -1).mean(1)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(before.sort().values, after.sort().values)


def test_the_score_of_a_head_is_a_sum_over_all_weights_that_leave():
    case = BY_NAME["llama"]
    net, x = bp.to_variational(case.net()), case.inputs()
    group, *_ = find_heads(Observed(net, x)).groups
    of_attention, total = net.model.layers[0].self_attn, torch.zeros(2)
    for layer, rows in ((of_attention.q_proj, 16), (of_attention.k_proj, 8), (of_attention.v_proj, 8)):
        mean, std = layer.posteriors()["weight"]
        score = mean.square() / mean.square().mean().sqrt() / std
        total += score.reshape(2, rows, -1).sum((1, 2))
    mean, std = of_attention.o_proj.posteriors()["weight"]
    total += (mean.square() / mean.square().mean().sqrt() / std).T.reshape(2, 16, -1).sum((1, 2))
    torch.testing.assert_close(SNRImportance()(group.group).reshape(2, 8).sum(1), total.detach())


def test_the_lowest_heads_go():
    case = BY_NAME["timm_vit"]
    net, x = case.net(), case.inputs()
    net.blocks[0].attn.qkv.weight.data.reshape(3, 3, 16, 48)[:, 1] *= 1e-3
    net.blocks[0].attn.proj.weight.data[:, 16:32] *= 1e-3
    report = prune_channels(net, x, target="macs=0.98", granularity=HEADS, importance=MAGNITUDE)
    assert report.removed_heads == {"blocks.0.attn": (1,)}
    assert (net.blocks[0].attn.num_heads, net.blocks[0].attn.attn_dim, net.blocks[0].attn.head_dim) == (2, 32, 16)
    assert net.blocks[1].attn.num_heads == 3
    assert "3 heads" in str(report)
    assert report.left_whole["blocks.0.mlp.fc1"] == "granularity asks for heads alone"


def test_a_key_and_value_head_leaves_with_its_queries():
    case = BY_NAME["llama"]
    net, x = case.net(), case.inputs()
    report = prune_channels(net, x, target="macs=0.95", granularity=HEADS, importance=MAGNITUDE)
    ((name, heads),) = report.removed_heads.items()
    assert heads in ((0, 1), (2, 3))
    cut = net.get_submodule(name)
    assert (cut.q_proj.out_features, cut.k_proj.out_features, cut.num_key_value_groups) == (16, 8, 2)


def test_one_key_for_all_queries_stays():
    case = BY_NAME["gemma"]
    net, x = case.net(), case.inputs()
    report = prune_channels(net, x, target="macs=0.95", granularity=HEADS, importance=MAGNITUDE)
    cut = net.get_submodule(next(iter(report.removed_heads)))
    assert cut.k_proj.out_features == 8
    assert cut.num_key_value_groups == cut.q_proj.out_features // 8 < 4
    assert "serves all heads" in report.left_whole["model.layers.0.self_attn.k_proj"]


def test_heads_that_share_biases_leave_all_blocks():
    case = BY_NAME["t5"]
    net, x = case.net(), case.inputs()
    report = prune_channels(net, x, target="macs=0.9", granularity=HEADS, importance=MAGNITUDE)
    places = ("encoder.block.#.layer.0.SelfAttention", "decoder.block.#.layer.0.SelfAttention")
    for place in places:
        removed = [report.removed_heads.get(place.replace("#", block)) for block in "01"]
        assert removed[0] == removed[1]
        first, second = (net.get_submodule(place.replace("#", block)) for block in "01")
        assert first.relative_attention_bias.embedding_dim == first.n_heads == second.n_heads
    assert report.removed_heads


class OneHead(nn.Module):
    """Attention that has nothing to lose."""

    def __init__(self, num_heads=1):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Numbered(OneHead):
    """Attention that treats its first head in another way than the others."""

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q = q * torch.arange(1, self.num_heads + 1).reshape(-1, 1, 1)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def beit() -> nn.Module:
    return timm.create_model("beit_base_patch16_224", num_classes=3, img_size=32, depth=1, embed_dim=32, num_heads=4)


def bloom() -> nn.Module:
    return transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))


@pytest.mark.parametrize(
    ("build", "x", "layer", "reason"),
    [
        (OneHead, torch.randn(2, 3, 8), "qkv", "1 query heads"),
        (lambda: Numbered(4), torch.randn(2, 3, 8), "qkv", "not the model that ignores it"),
        (beit, torch.randn(1, 3, 32, 32), "blocks.0.attn.qkv", "does not run without one (RuntimeError: shape"),
        (bloom, torch.ones(1, 4, dtype=torch.long), "transformer.h.0.self_attention.query_key_value", "RuntimeError"),
        (lambda: nn.MultiheadAttention(8, 2), (torch.randn(3, 1, 8),) * 3, "out_proj", "0 linear layers were found"),
    ],
    ids=["one_head", "numbered", "beit", "alibi", "torch"],
)
def test_heads_that_cannot_leave_stay_with_a_reason(build, x, layer, reason):
    net = build().eval()
    structure = find_heads(Observed(net, x))
    assert structure.groups == ()
    assert reason in structure.left_whole[layer]


def test_a_wrong_layout_is_found_out():
    case = BY_NAME["gpt_neox"]
    net, x = case.net(), case.inputs()
    right, *_ = find_heads(Observed(net, x)).groups
    assert disagreement(net, [(right, [right.units[1]])], x) is None
    (fused,) = [member for member in right.members if member.axis[1] == "out"]
    apart = replace(
        fused, positions=Positions.by_root({c: [c, c + 32, c + 64] for c in range(32)})
    )  # all queries, all keys, all values
    wrong = replace(right, members=tuple(apart if member is fused else member for member in right.members))
    assert "not the model that ignores it" in disagreement(net, [(wrong, [wrong.units[1]])], x)


@pytest.mark.parametrize("case", [BY_NAME["t5"], BY_NAME["timm_swin"]], ids=lambda case: case.name)
def test_looking_for_heads_leaves_the_model_as_it_was(case):
    net, x = case.net().train(), case.inputs()
    next(net.parameters()).requires_grad_(False)

    def state():
        parameters = {n: (id(p), p.requires_grad, p._version) for n, p in net.named_parameters()}
        buffers = {name: (id(buffer), buffer._version) for name, buffer in net.named_buffers()}
        attributes = {n: (m.training, getattr(m, "num_heads", None), m.extra_repr()) for n, m in net.named_modules()}
        return parameters, buffers, attributes, {name: tensor.clone() for name, tensor in net.state_dict().items()}

    *before, values = state()
    assert find_heads(Observed(net, x)).groups
    *after, unchanged = state()
    assert before == after
    assert all(torch.equal(value, unchanged[name]) for name, value in values.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_heads_are_found_in_other_precisions(dtype):
    case = BY_NAME["gpt_neox"]
    structure = find_heads(Observed(case.net().to(dtype), case.inputs()))
    assert [(len(group.units), group.heads_per_unit) for group in structure.groups] == case.units


def test_dry_run_keeps_heads_and_says_what_would_go():
    case = BY_NAME["timm_vit"]
    net, x = bp.to_variational(case.net()), case.inputs()
    dense = output_of(net, x)
    dry = prune_channels(net, x, target="macs=0.6", dry_run=True)
    assert torch.equal(output_of(net, x), dense)
    assert net.blocks[0].attn.num_heads == 3
    done = prune_channels(net, x, target="macs=0.6")
    assert dry.removed_heads == done.removed_heads
    assert dry.rows == done.rows


def test_ignored_attention_keeps_its_heads():
    case = BY_NAME["timm_vit"]
    net, x = case.net(), case.inputs()
    structure = find_groups(net, x, ignored_layers=[net.blocks[0].attn.qkv], granularity=HEADS)
    assert [group.name for group in structure.groups] == ["blocks.1.attn"]
    assert structure.left_whole["blocks.0.attn.qkv"] == "ignored_layers"


def test_kept_heads_are_multiples_of_channels():
    net, x = BY_NAME["bert"].net(), BY_NAME["bert"].inputs()
    report = prune_channels(
        net, x, target="macs=0.9", granularity=HEADS, importance=MAGNITUDE, round_to=16, uniform=True
    )
    assert {row.kept for row in report.rows} == {16}


def test_heads_channels_and_width_go_together_and_the_units_are_counted():
    case = BY_NAME["timm_vit"]
    net, x = bp.to_variational(case.net()), case.inputs()
    report = prune_channels(net, x, target="macs=0.4", uniform=True)
    assert {len(heads) for heads in report.removed_heads.values()} == {1}
    assert net.blocks[0].attn.qkv.in_features < 48
    assert net.blocks[0].mlp.fc1.out_features < 192
    assert report.achieved["macs"] <= 0.4


@pytest.mark.parametrize("name", ["timm_vit", "timm_swin", "llama", "gpt2", "t5"])
def test_a_model_without_some_heads_is_saved_and_loaded(name, tmp_path):
    case = BY_NAME[name]
    net, x = bp.to_variational(case.net()), case.inputs()
    prune_channels(net, x, target="macs=0.9", granularity=HEADS)
    net.eval()
    bp.save(net, tmp_path)
    loaded = bp.load(tmp_path).eval()
    assert torch.equal(output_of(loaded, x), output_of(net, x))


class _FixedSize(nn.Module):
    """Attention whose size of a head follows from its input, so that no head can go."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.qkv, self.proj = 2, nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, x.shape[2] // self.num_heads).unbind(2)
        mixed = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)))
        return x + self.proj(mixed.transpose(1, 2).flatten(2))


def test_trials_do_not_grow_with_the_number_of_blocks_that_are_alike(monkeypatch):
    trials = []

    def counting(*args, **options):
        trials[-1] += 1
        return disagreement(*args, **options)

    monkeypatch.setattr(finder, "disagreement", counting)
    for depth in (3, 6):
        trials.append(0)
        net = nn.Sequential(*(_FixedSize() for _ in range(depth)))
        structure = find_heads(Observed(net, torch.randn(1, 4, 8)))
        assert structure.groups == ()
        assert all("the model does not run without one" in reason for reason in structure.left_whole.values())
        assert len(structure.left_whole) == depth
    assert trials[0] == trials[1]


class _Rows(_FixedSize):
    """Attention that gives its tokens back in rows and columns, as that of SAM does."""

    def forward(self, x):
        batch, rows, columns, _ = x.shape
        qkv = self.qkv(x.flatten(1, 2)).view(batch, rows * columns, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).flatten(2)
        return self.proj(mixed).view(batch, rows, columns, -1) + x


def test_heads_and_stream_may_go_where_attention_gives_rows_and_columns():
    net = nn.Sequential(nn.Linear(3, 8), _Rows(), nn.Linear(8, 2))
    structure = find_groups(net, torch.randn(1, 2, 2, 3))
    assert {group.name: len(group.units) for group in structure.groups} == {"0": 8, "1": 2}
