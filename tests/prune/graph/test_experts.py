"""Hidden units of stacked experts: each expert loses its own, all equally many."""

import copy

import pytest
import torch

import bayesprune as bp
from bayesprune.errors import InfeasibleTargetError
from bayesprune.foundation.macs import macs_by_module
from bayesprune.layers import named_posteriors
from bayesprune.prune.graph.find import find_groups
from tests.mixtures import ARRANGEMENTS, EXPERTS, HIDDEN

X = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
arrangements = pytest.mark.parametrize("arrangement", ARRANGEMENTS, ids=str)


def zeroed(model, removed):
    """The model whose experts ignore these hidden units, numbered through."""
    silent = torch.zeros(EXPERTS, HIDDEN, dtype=torch.bool)
    silent.view(-1)[list(removed)] = True
    down = model.experts.down_proj.data
    down.masked_fill_(silent.unsqueeze(2 if model.experts.transposed else 1), 0)
    return model


@arrangements
@pytest.mark.parametrize("std", ["per_weight", "rank_one", "per_channel"])
def test_the_cut_model_is_the_dense_one_that_ignores_the_removed_units(arrangement, std):
    model = bp.to_variational(arrangement.build(), std=std)
    report = bp.prune_channels(model, X, target="macs=0.7", granularity=("mlp",))
    removed = report.removed["experts"]
    torch.testing.assert_close(model(X), zeroed(arrangement.build(), removed)(X))
    by_expert = torch.tensor(removed).div(HIDDEN, rounding_mode="floor").bincount()
    assert len(by_expert) == EXPERTS
    assert (by_expert == by_expert[0]).all()
    assert model.experts.intermediate_size == HIDDEN - by_expert[0]
    assert report.macs_after == sum(macs_by_module(model, X).values())
    model.train()(X).square().mean().backward()


@arrangements
def test_stds_and_masks_follow_their_means(arrangement):
    model = bp.to_variational(arrangement.build())
    for posterior in named_posteriors(model):
        posterior.log_std_parts[0].data.copy_(posterior.mean.data)
    bp.prune_weights(model, "weights=0.7")
    bp.prune_channels(model, X, target="macs=0.7", granularity=("mlp",))
    for posterior in named_posteriors(model):
        mean, log_std = posterior.mean, posterior.log_std_parts[0]
        kept = torch.ones_like(mean, dtype=torch.bool) if posterior.mask is None else posterior.mask
        assert torch.equal(mean, torch.where(kept, log_std, 0.0)), posterior.name


@arrangements
def test_each_expert_loses_the_units_with_the_lowest_scores_of_its_own(arrangement):
    model = bp.to_variational(arrangement.build())
    weak = [[1, 5, 6, 11], [0, 2, 3, 15], [4, 5, 8, 9]]
    experts = model.experts
    for expert, units in enumerate(weak):
        down = experts.down_proj.data[expert]
        (down if experts.transposed else down.t())[units] *= 1e-4
        for name in set(experts.active_names()) & {"gate_up_proj", "gate_proj", "up_proj"}:
            up = getattr(experts, name).data[expert]
            rows = up.t() if experts.transposed else up
            side_by_side = experts.interleaved and name == "gate_up_proj"
            parts = [rows[::2], rows[1::2]] if side_by_side else rows.split(HIDDEN)
            for part in parts:
                part[units] *= 1e-4
    report = bp.prune_channels(model, X, target="macs=0.85", granularity=("mlp",))
    assert report.removed["experts"] == tuple(HIDDEN * e + unit for e, units in enumerate(weak) for unit in units)


def test_an_arrangement_that_the_module_does_not_tell_is_found_by_experiment():
    groups = {a.name: find_groups(a.build(), X, granularity=("mlp",)).groups for a in ARRANGEMENTS}
    out = {name: next(g for g in found if g.name == "experts").members[0] for name, found in groups.items()}
    assert out["fused"].positions[0] == [0, HIDDEN]
    assert out["interleaved_biases"].positions[0] == [0, 1]
    assert out["no_gate"].positions[0] == [0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@arrangements
def test_experts_beside_a_large_stream_are_checked_by_what_they_put_out(arrangement, dtype):
    """In half precision the stream's rounding is as large as all that they add to it."""
    model = arrangement.build()
    model.experts.down_proj.data *= 0.02
    if arrangement.options.get("bias"):
        model.experts.down_proj_bias.data.zero_()
    structure = find_groups(model.to(dtype), X.to(dtype), granularity=("mlp",))
    assert "experts" in {group.name for group in structure.groups}, structure.left_whole


def test_an_unknown_arrangement_stays_whole_with_the_reason():
    model = bp.to_variational(ARRANGEMENTS[0].build())
    experts = model.experts

    class Rolled(type(experts)):
        def _linear(self, x, name, expert):
            found = super()._linear(x, name, expert)
            return found.roll(1, -1) if name == "gate_up_proj" else found

    experts.__class__ = Rolled
    report = bp.prune_channels(model, X, target="snr=1e-09")
    assert "its experts stay whole" in report.left_whole["experts"]


def test_kept_units_are_a_multiple_of_what_the_kernels_read_at_once():
    model = bp.to_variational(ARRANGEMENTS[0].build())
    for target in (0.95, 0.8, 0.6):
        cut = copy.deepcopy(model)
        bp.prune_channels(cut, X, target=f"macs={target}", granularity=("mlp",))
        assert cut.experts.intermediate_size % 4 == 0


def test_a_posterior_score_without_a_value_says_nothing_of_gradients():
    model = bp.to_variational(ARRANGEMENTS[0].build())
    importance = bp.prune.UnitSNRImportance(model, bp.laplace.fit_kronecker(model, [X]))
    with pytest.raises(InfeasibleTargetError, match=r"experts \(0\.9231, UnitSNRImportance gives its group no score\)"):
        bp.prune_channels(model, X, target="macs=0.99", importance=importance)


def test_round_to_holds_for_each_expert():
    model = bp.to_variational(ARRANGEMENTS[0].build())
    bp.prune_channels(model, X, target="macs=0.9", granularity=("mlp",), round_to=8)
    assert model.experts.intermediate_size == 8


def test_ignored_experts_and_a_granularity_without_them_stay_whole():
    model = bp.to_variational(ARRANGEMENTS[0].build())
    report = bp.prune_channels(model, X, target="snr=1e+09", ignored_layers=[model.experts])
    assert report.left_whole["experts"] == "ignored_layers"
    assert model.experts.intermediate_size == HIDDEN
    with pytest.raises(InfeasibleTargetError):
        bp.prune_channels(model, X, target="macs=0.5", granularity=("heads",))


def test_a_dry_run_leaves_the_experts_as_they_are():
    model = bp.to_variational(ARRANGEMENTS[2].build())
    before = copy.deepcopy(model.state_dict())
    report = bp.prune_channels(model, X, target="macs=0.7", dry_run=True)
    assert report.removed["experts"]
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert model.experts.intermediate_size == HIDDEN


@pytest.mark.parametrize("target", ["snr=9", "params=0.7", "evidence=-1e+09"], ids=str)
def test_other_targets_reach_the_experts(target):
    model = bp.to_variational(ARRANGEMENTS[0].build())
    report = bp.prune_channels(model, X, target=target, granularity=("mlp",))
    torch.testing.assert_close(model(X), zeroed(ARRANGEMENTS[0].build(), report.removed["experts"])(X))


def test_cut_experts_load_into_the_dense_model(tmp_path):
    model = bp.to_variational(ARRANGEMENTS[2].build(), std="rank_one")
    bp.prune_weights(model, "weights=0.7")
    bp.prune_channels(model, X, target="macs=0.7", granularity=("mlp",))
    bp.save(model, tmp_path)
    assert torch.equal(bp.load(tmp_path, model=ARRANGEMENTS[2].build())(X), model(X))


def test_measured_scores_rank_the_units_of_each_expert():
    model = bp.to_variational(ARRANGEMENTS[0].build())
    importance = bp.prune.MeasuredImportance(model, X, lambda net: float(net(X).square().mean()))
    report = bp.prune_channels(model, X, target="macs=0.7", importance=importance, granularity=("mlp",))
    torch.testing.assert_close(model(X), zeroed(ARRANGEMENTS[0].build(), report.removed["experts"])(X))


def test_units_without_fixed_partners_share_no_prior_scale():
    with pytest.raises(ValueError, match="no group of channels or heads"):
        bp.prune.dependency_groups(bp.to_variational(ARRANGEMENTS[0].build()), X, granularity=("mlp",))


def test_what_holds_the_macs_that_stay_is_named_with_the_reason():
    model = bp.to_variational(ARRANGEMENTS[0].build())
    report = bp.prune_channels(model, X, target="macs=0.8", granularity=("mlp",))
    shares = {name: held for held in report.holdings for name in held.modules}
    assert "keeps a tenth" in shares["experts"].reason
    assert shares["last"].reason == report.left_whole["last"]
    assert sum(held.share for held in report.holdings) == pytest.approx(report.achieved["macs"])
    with pytest.raises(InfeasibleTargetError, match=r"What stays is in .*last .*experts"):
        bp.prune_channels(model, X, target="macs=0.01", granularity=("mlp",))


def test_products_of_activations_are_named_as_what_holds_the_macs():
    class Gram(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = torch.nn.Linear(4, 8), torch.nn.Linear(7, 3)

        def forward(self, x):
            hidden = self.first(x)
            return self.last(hidden @ hidden.t() @ hidden @ hidden.t())

    report = bp.prune_channels(bp.to_variational(Gram()), X, target="snr=1e-09")
    held = next(held for held in report.holdings if "" in held.modules)
    assert "multiplies activations" in held.reason
    assert "multiplies activations" in str(report)
