"""Heads of Mamba-2 mixers leave with all that belongs to them."""

from typing import Any

import pytest
import torch

import bayesprune as bp
from bayesprune.foundation.macs import macs_by_module
from tests.prune.nets import assert_stds_follow

transformers = pytest.importorskip("transformers")
pytest.importorskip("bayesprune.hosts.transformers")

HEADS, DIM, STATES = 8, 4, 3
TOKENS = torch.arange(3, 19).view(2, 8)


def mamba(*, groups: int = 2, heads: int = HEADS) -> Any:
    torch.manual_seed(0)
    config = transformers.Mamba2Config(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_heads=heads,
        head_dim=DIM,
        expand=heads * DIM // 16,
        state_size=STATES,
        n_groups=groups,
        chunk_size=4,
        time_step_limit=(0.0, 1e6),
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.Mamba2ForCausalLM(config).eval()


def sliced(mixer: Any, kept: list[int], groups: int) -> dict[str, torch.Tensor]:
    """A mixer's parameters with these heads alone, written out."""
    channels = torch.tensor([head * DIM + inside for head in kept for inside in range(DIM)])
    width, shared, heads = HEADS * DIM, torch.arange(2 * groups * STATES), torch.tensor(kept)
    convolved = torch.cat([channels, width + shared])
    rows = torch.cat([channels, width + convolved, 2 * width + len(shared) + heads])
    state = mixer.state_dict()
    found = {name: state[name][heads] for name in ("A_log", "D", "dt_bias")}
    found |= {name: state[name][convolved] for name in ("conv1d.weight", "conv1d.bias")}
    found |= {"in_proj.weight": state["in_proj.weight"][rows], "norm.weight": state["norm.weight"][channels]}
    return found | {"out_proj.weight": state["out_proj.weight"][:, channels]}


@pytest.mark.parametrize("groups", [1, 2])
def test_heads_leave_equally_from_every_group_that_shares_a_state(groups, tmp_path):
    dense, model = mamba(groups=groups), bp.to_variational(mamba(groups=groups))
    report = bp.prune_channels(model, TOKENS, target="macs=0.7", granularity=("heads",))
    names = [f"backbone.layers.{layer}.mixer" for layer in range(2)]
    assert set(report.removed_heads) <= set(names)
    assert report.removed_heads
    for name, removed in report.removed_heads.items():
        kept = [head for head in range(HEADS) if head not in removed]
        each = HEADS // groups
        assert len({sum(head // each == group for head in kept) for group in range(groups)}) == 1
        cut = model.get_submodule(name)
        assert cut.num_heads == len(kept)
        for key, expected in sliced(dense.get_submodule(name), kept, groups).items():
            assert torch.equal(cut.state_dict()[key], expected), key
    assert report.macs_after == sum(macs_by_module(model, TOKENS).values())
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    bp.save(model.eval(), tmp_path)
    for loaded in (bp.load(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def falcon_h1() -> Any:
    torch.manual_seed(0)
    config = transformers.FalconH1Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        mamba_d_ssm=HEADS * DIM,
        mamba_n_heads=HEADS,
        mamba_d_head=DIM,
        mamba_n_groups=1,
        mamba_d_state=STATES,
        mamba_chunk_size=4,
        ssm_multipliers=[0.5, 0.75, 1.25, 1.5, 2.0],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return transformers.FalconH1ForCausalLM(config).eval()


def test_a_buffer_outside_the_state_dict_that_was_cut_is_saved(tmp_path):
    """Falcon-H1 multiplies what its mixers read by a vector that only its config gives."""
    model = bp.to_variational(falcon_h1())
    report = bp.prune_channels(model, TOKENS, target="macs=0.8", granularity=("heads",))
    mixer = next(name for name in report.removed_heads if name.endswith("mamba"))
    cut, dense = (found.get_submodule(mixer).mup_vector for found in (model, falcon_h1()))
    assert cut.shape[-1] < dense.shape[-1]
    bp.save(model, tmp_path / "0")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "0")
    theirs.save_pretrained(tmp_path / "1")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "1")
    for loaded in (bp.load(tmp_path / "0"), theirs, again):
        assert torch.equal(loaded.get_submodule(mixer).mup_vector, cut)
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)


def test_a_uniform_cut_is_the_stock_model_of_fewer_heads():
    model = bp.to_variational(mamba(), std="rank_one")
    bp.prune_channels(model, TOKENS, target="macs=0.6", granularity=("heads",), uniform=True)
    kept = HEADS // 2  # the config counts in whole multiples of the width
    assert_heads_agree(model, kept)
    stock = mamba(heads=kept)
    stock.load_state_dict(bp.to_deterministic(model).state_dict())
    assert torch.equal(stock(TOKENS).logits, model(TOKENS).logits)


def assert_heads_agree(model: Any, kept: int) -> None:
    for layer in model.backbone.layers:
        assert (layer.mixer.num_heads, layer.mixer.intermediate_size) == (kept, kept * DIM)
        assert layer.mixer.conv_dim == layer.mixer.conv1d.out_channels == kept * DIM + 2 * 2 * STATES


def test_generation_goes_on_with_a_cache():
    model = bp.to_variational(mamba())
    bp.prune_channels(model, TOKENS, target="macs=0.7", granularity=("heads",))
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(
        model.generate(TOKENS, use_cache=True, **options), model.generate(TOKENS, use_cache=False, **options)
    )


def test_stds_and_masks_follow():
    model = bp.to_variational(mamba())
    bp.prune_weights(model, "weights=0.8")
    for module in model.modules():
        if isinstance(module, bp.layers.VariationalLayer):
            for name in module.active_names():
                part = module.log_std_parts(name)[0]
                part.data = -1 - torch.rand(part.shape)
                getattr(module, name).data = part.data.clone()
            module.apply_masks()
    bp.prune_channels(model, TOKENS, target="macs=0.7", granularity=("heads",))
    assert_stds_follow(model)


@pytest.mark.parametrize(("groups", "reason"), [(HEADS, "each of its 8 groups has one"), (2, "ignored_layers")])
def test_mixers_that_stay_whole_say_why(groups, reason):
    model = bp.to_variational(mamba(groups=groups))
    ignored = [model.backbone.layers[0].mixer] if reason == "ignored_layers" else []
    report = bp.prune_channels(model, TOKENS, target="snr=1e-09", ignored_layers=ignored)
    assert reason in report.left_whole["backbone.layers.0.mixer.in_proj"]
