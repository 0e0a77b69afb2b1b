"""Posteriors over experts whose matrices stand in stacked parameters."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.estimators import sample
from bayesprune.layers import variational_layers
from bayesprune.layers.experts import VariationalExperts
from tests.cases import STRUCTURES
from tests.mixtures import ARRANGEMENTS, EXPERTS, HIDDEN, WIDTH

X = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
arrangements = pytest.mark.parametrize("arrangement", ARRANGEMENTS, ids=str)


@arrangements
@pytest.mark.parametrize("std", STRUCTURES)
def test_evaluation_stays_and_every_expert_has_stds_of_its_own(arrangement, std):
    model = arrangement.build()
    before, stock = model(X), type(model.experts)
    bp.to_variational(model, std=std)
    assert isinstance(model.experts, VariationalExperts)
    assert torch.equal(model(X), before)
    for name in model.experts.active_names():
        assert model.experts.log_std(name).shape[0] == EXPERTS
    rows = {row.name: row for row in bp.conversion_table(model)}
    assert rows["experts"].status == "fallback"
    assert "weight sampling" in rows["experts"].reason
    bp.to_deterministic(model)
    assert type(model.experts) is stock
    assert torch.equal(model(X), before)


@arrangements
def test_the_cheap_structures_follow_outputs_and_inputs_of_each_expert(arrangement):
    transposed = arrangement.options["transposed"]

    def shape(units: int, inputs: int) -> tuple[int, ...]:
        return (EXPERTS, inputs, units) if transposed else (EXPERTS, units, inputs)

    experts = bp.to_variational(arrangement.build(), std="per_channel").experts
    assert experts.down_proj_log_std.shape == shape(WIDTH, 1)
    experts = bp.to_variational(arrangement.build(), std="rank_one").experts
    assert experts.down_proj_row_log_std.shape == shape(WIDTH, 1)
    assert experts.down_proj_column_log_std.shape == shape(1, HIDDEN)


@arrangements
def test_training_computes_with_one_draw_of_every_parameter(arrangement):
    model, stock = bp.to_variational(arrangement.build(), relative_std=0.5).train(), arrangement.build()
    x, weights = torch.randn(7, WIDTH), torch.rand(7, EXPERTS)
    torch.manual_seed(3)
    found = model.experts(x, weights)
    torch.manual_seed(3)
    with torch.no_grad():
        for name in model.experts.active_names():
            getattr(stock.experts, name).copy_(sample(model.experts.posterior(name)))
    assert torch.equal(found, stock.experts(x, weights))
    assert not torch.equal(found, model.experts(x, weights))


@pytest.mark.parametrize("std", STRUCTURES)
def test_a_step_of_training_moves_the_stds_and_removed_weights_stay_zero(std):
    model = bp.to_variational(ARRANGEMENTS[2].build(), std=std)
    report = bp.prune_weights(model, "weights=0.5")
    assert {row.name for row in report.rows} == {
        *("first.weight", "router.weight", "last.weight", "experts.gate_up_proj", "experts.down_proj")
    }
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    bp.attach(optimizer, model, num_data=100)
    stds = {name: model.experts.log_std(name).detach().clone() for name in model.experts.active_names()}
    removed = {name: getattr(model.experts, name) == 0 for name in ("gate_up_proj", "down_proj")}
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(X).square().mean().backward()
        optimizer.step()
    for name, before in stds.items():
        assert not torch.equal(model.experts.log_std(name), before), name
    for name, gone in removed.items():
        assert gone.any()
        assert not getattr(model.experts, name)[gone].any()


@pytest.mark.parametrize(
    "prior", [bp.priors.Gaussian(0.3), *(bp.priors.ARD(group) for group in ("weight", "channel", "input_channel"))]
)
def test_the_kl_is_that_of_one_linear_layer_for_each_expert(prior):
    experts = bp.to_variational(ARRANGEMENTS[4].build()).experts
    apart = nn.ModuleList(
        nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        for name in ("up_proj", "down_proj")
        for weight in getattr(experts, name)
    )
    means = [weight for name in ("up_proj", "down_proj") for weight in getattr(experts, name)]
    for (_, layer), weight in zip(variational_layers(bp.to_variational(apart)), means, strict=True):
        layer.weight.data = weight.data
        layer.weight_log_std.data.fill_(experts.up_proj_log_std[0, 0, 0].item())
    torch.testing.assert_close(bp.kl_divergence(experts, prior), bp.kl_divergence(apart, prior))


def test_patterns_run_along_the_inputs_of_each_expert():
    model = bp.to_variational(ARRANGEMENTS[1].build())
    report = bp.prune_weights(model, "2:4")
    kept = model.experts.down_proj_mask.unflatten(1, (HIDDEN // 4, 4)).sum(2)
    assert (kept == 2).all()
    assert {row.name: row.note for row in report.rows}["experts.gate_up_proj"] == "6 inputs are not a multiple of 4"


def test_copies_and_pickles_are_experts_again():
    model = bp.to_variational(ARRANGEMENTS[0].build())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.experts) is type(model.experts)
        assert torch.equal(other(X), model(X))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(X), model(X))


def test_saved_experts_load_with_masks_and_stds(tmp_path):
    model = bp.to_variational(ARRANGEMENTS[2].build(), std="rank_one")
    bp.prune_weights(model, "weights=0.5")
    bp.save(model, tmp_path)
    loaded = bp.load(tmp_path, model=ARRANGEMENTS[2].build())
    assert torch.equal(loaded(X), model(X))
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_stds_stay_float32_in_half_precision():
    model = bp.to_variational(ARRANGEMENTS[0].build()).bfloat16().train()
    assert model.experts.down_proj_log_std.dtype == torch.float32
    model(X.bfloat16()).float().square().mean().backward()
    assert model.experts.down_proj_log_std.grad.isfinite().all()


def test_laplace_leaves_the_stds_of_experts_and_says_so():
    model = bp.to_variational(ARRANGEMENTS[0].build())
    before = model.experts.down_proj_log_std.clone()
    batches = [(X, torch.randint(5, (len(X),)))]
    with pytest.warns(UserWarning, match=r"experts\.gate_up_proj"):
        bp.laplace.fit_laplace(model, batches)
    assert torch.equal(model.experts.down_proj_log_std, before)
    assert "experts" not in bp.laplace.fit_kronecker(model, batches)


class Frozen(nn.Module):
    """Two stacks of different length are no experts."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(2, 4, 3))
        self.down_proj = nn.Parameter(torch.randn(3, 3, 4))


def test_other_modules_with_stacked_parameters_are_left():
    rows = {row.name: row for row in bp.conversion_table(nn.Sequential(nn.Linear(2, 2), Frozen()))}
    assert rows["1"].reason == "Frozen is not a registered type"
