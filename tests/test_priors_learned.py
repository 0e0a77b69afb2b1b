"""Scales that weights share, within a tensor and across tensors: against numerical minimisation in float64."""

import copy
import math
import warnings
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.distributions import Gamma, HalfCauchy

import bayesprune as bp
from bayesprune import register_layer
from bayesprune.errors import UnsupportedModelError
from bayesprune.foundation.kinds import TRANSPOSED_LINEAR
from bayesprune.layers import VariationalLayer, base
from bayesprune.priors import ARD, Binding, DependencyGroup, Gaussian, GroupLasso, Horseshoe, Member
from bayesprune.prune import dependency_groups
from bayesprune.train.complexity import sum_kl
from bayesprune.train.kl import bind_prior, refresh_scales
from tests.cases import LAYERS, Tied
from tests.oracles import gaussian_kl

EXAMPLE = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0)).double()


class Residual(nn.Module):
    """A block on a stream: one convolution that writes the stream, one that writes and reads it, one for each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)
        self.both, self.up, self.down = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 3, 1)
        self.head = nn.Linear(3 * 16, 2)

    def forward(self, x):
        x = self.norm(self.stem(x))
        x = x + self.both(x).tanh()
        x = x + self.down(self.up(x).tanh())
        return self.head(x.flatten(1))


def net(std: str = "per_weight", masked: bool = False) -> nn.Module:
    """With stds of all sizes; where masked, the second unit of `up` is gone from `up` and half gone from `down`."""
    torch.manual_seed(0)
    model = bp.to_variational(Residual(), std=std, relative_std=0.5).double()
    for name, parameter in model.named_parameters():
        if name.endswith("log_std"):
            parameter.data += 0.5 * torch.randn_like(parameter)
        else:
            parameter.data *= torch.randn_like(parameter).exp()
    if masked:
        keep = torch.ones(5, 3, 3, 3, dtype=torch.bool)
        keep[1] = False
        model.up.set_mask("weight", keep)
        keep = torch.ones(3, 5, 1, 1, dtype=torch.bool)
        keep[0, 1] = keep[2, 3] = False
        model.down.set_mask("weight", keep)
    return model


def log_std_of(posterior, groups, log_units):
    """ln of the prior's std of each weight of a tensor over that of its layer, from the members, entry by entry."""
    total = torch.zeros(posterior.mean.shape, dtype=torch.float64)
    for group in groups:
        for member in (member for member in group.members if member.parameter == posterior.name):
            for position, unit in enumerate(member.units):
                if unit >= 0:
                    index = [slice(None)] * total.dim()
                    index[member.dim] = position
                    change = torch.zeros_like(total)
                    change[tuple(index)] = 1.0
                    total = total + change * log_units[group.name][unit]
    return total


def objective(model, bound, groups, log_units, tau=None):
    """KL at these scales, with the half-Cauchy prior of each, by torch.distributions."""
    total = torch.zeros((), dtype=torch.float64)
    for posterior, prior in bound.items():
        scale = prior.scale * log_std_of(posterior, groups, log_units).exp()
        kl = gaussian_kl(posterior.mean, posterior.log_std.exp(), scale)
        total = total + (kl if posterior.mask is None else kl * posterior.mask).sum()
    for group in groups if tau is not None else ():
        density = HalfCauchy(tau[group.name])
        scales = log_units[group.name].exp()
        total = total - (density.log_prob(scales) + math.log(math.pi / 2)).sum()  # constants of no interest
    return total


def minimised(function, *starts):
    """The minimum over these tensors, found without any knowledge of the function."""
    values = [start.clone().requires_grad_() for start in starts]
    optimizer = torch.optim.LBFGS(
        values, max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = function(*values)
        loss.backward()
        return loss

    optimizer.step(closure)
    return function(*values).detach(), [value.detach() for value in values]


def best_by_search(model, bound, groups, tau):
    """The smallest objective, and ln z by group; tau None is without a prior, "auto" is learned for each group."""
    sizes = [group.num_units for group in groups]

    def function(log_units, log_tau):
        units = dict(zip((group.name for group in groups), log_units.split(sizes), strict=True))
        taus = None
        if tau is not None:
            values = log_tau.exp() if tau == "auto" else torch.full_like(log_tau, tau)
            taus = dict(zip((group.name for group in groups), values, strict=True))
        return objective(model, bound, groups, units, taus) + 0 * log_tau.sum()

    smallest, (log_units, _) = minimised(function, torch.zeros(sum(sizes)).double(), torch.zeros(len(groups)).double())
    return smallest, log_units


@pytest.mark.parametrize(("tau", "masked"), [(None, False), (None, True), (0.5, False), ("auto", False)])
def test_shared_scales_are_the_best_there_are(tau, masked):
    model = net(masked=masked)
    groups = dependency_groups(model, EXAMPLE)
    prior = ARD(groups) if tau is None else Horseshoe(groups, tau)
    bound = bind_prior(model, prior)
    with torch.no_grad():
        smallest, log_units = best_by_search(model, bound, groups, tau)
        found = sum_kl(bound)
    constant = 0.0
    if isinstance(tau, float):  # the library counts ln(1 + z^2 / tau^2), without the density at zero
        constant = sum(group.num_units for group in groups) * math.log(tau)
    assert float(found) + constant == pytest.approx(float(smallest), abs=1e-6)
    scales = next(iter(bound.values())).scales.log_units[:-1]
    torch.testing.assert_close(scales, log_units, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        ARD,
        lambda groups: Horseshoe(groups, 0.5),
        lambda groups: Horseshoe(groups, 0.5, slab=0.8),
        lambda groups: GroupLasso(groups, 0.1),
    ],
    ids=["ard", "horseshoe", "slab", "lasso"],
)
@pytest.mark.parametrize("std", ["per_weight", "rank_one"])
def test_the_gradient_at_fixed_scales_is_that_of_the_fully_minimised_kl(std, make):
    """Finite differences of the KL, minimised anew at both ends."""
    model = net(std, masked=std == "per_weight")
    prior = make(dependency_groups(model, EXAMPLE))
    bound = bind_prior(model, prior)
    direction = {parameter: torch.randn_like(parameter) for parameter in model.parameters()}
    expected = 0.0
    for posterior, its in bound.items():
        of_mean, of_std = its.kl_gradient(posterior.mean.detach(), posterior.log_std.detach(), posterior.mask)
        expected += float((of_mean * direction[posterior.mean]).sum())
        for part in posterior.log_std_parts:
            expected += float((of_std.sum_to_size(part.shape) * direction[part]).sum())

    def moved(step):
        other = copy.deepcopy(model)
        for parameter, original in zip(other.parameters(), model.parameters(), strict=True):
            parameter.data += step * direction[original]
        anew = {  # the layers' scales are those of the start
            posterior: replace(prior, scale=of_start.scale)
            for (posterior, prior), of_start in zip(bind_prior(other, prior).items(), bound.values(), strict=True)
        }
        refresh_scales(anew, until_rest=True)
        return float(sum_kl(anew).detach())

    difference = (moved(1e-4) - moved(-1e-4)) / 2e-4
    assert difference == pytest.approx(expected, rel=5e-6)
    loss = bp.kl_divergence(model, prior)
    by_autograd = torch.autograd.grad(loss, list(direction), allow_unused=True)
    slope = sum(float((g * direction[p]).sum()) for g, p in zip(by_autograd, direction, strict=True) if g is not None)
    assert slope == pytest.approx(expected, rel=1e-10)


def test_sweeps_never_raise_the_kl_and_one_a_step_follows():
    model = net()
    groups = dependency_groups(model, EXAMPLE)
    bound = bind_prior(model, ARD(groups))
    best = float(sum_kl(bound).detach())
    scales = next(iter(bound.values())).scales
    scales.log_units[:-1] = torch.randn(len(scales.log_units) - 1).double()
    values = []
    for _ in range(60):
        refresh_scales(bound)
        values.append(float(sum_kl(bound).detach()))
    assert all(after <= before + 1e-9 for before, after in pairwise(values))
    assert values[-1] == pytest.approx(best, rel=1e-6)


def test_a_tied_weight_counts_once():
    model = Tied(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    bp.to_variational(model)
    units = (0, 1, 2, 2)
    groups = [DependencyGroup("first", 3, (Member("first.weight", 0, units), Member("first.weight", 1, units)))]
    (prior,) = bind_prior(model, ARD(groups)).values()
    e = (model.first.weight.square() + (2 * model.first.weight_log_std).exp()).detach() / prior.scale**2
    (z,) = [prior.scales.log_units[:-1].exp()]
    at = z[torch.tensor(units)]
    scaled = e / (at[:, None] * at).square()
    for unit, count in ((0, 8), (1, 8), (2, 16)):  # at the optimum e / s^2 is 1 on average over rows and columns
        members = torch.tensor(units) == unit
        assert float(scaled[members].sum() + scaled[:, members].sum()) == pytest.approx(count, rel=1e-3)


def test_weights_without_a_group_have_the_scale_of_their_layer():
    model = net()
    groups = dependency_groups(model, EXAMPLE, ignored_layers=[model.up])
    bound = {posterior.name: prior for posterior, prior in bind_prior(model, ARD(groups)).items()}
    mean = model.up.weight
    variance = bound["up.weight"].variance(mean, model.up.weight_log_std)
    assert variance.shape == (1, 3, 1, 1), "only what it reads has scales"
    rms = float(max(p.detach().square().mean().sqrt() for p in (model.head.weight, model.head.bias)))
    of_bias = bound["head.bias"].variance(model.head.bias, model.head.bias_log_std.detach())
    assert of_bias.item() == pytest.approx(rms**2)
    assert bound["head.bias"].max_log_std == pytest.approx(math.log(rms)), "it is fixed"


def test_a_restored_run_continues_bit_for_bit(tmp_path):
    def build(groups):
        model = net("rank_one")
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        return model, optimizer, bp.attach(optimizer, model, num_data=20, prior=Horseshoe(groups, "auto"))

    def train(model, optimizer):
        torch.manual_seed(1)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(3, 2, 4, 4).double()).square().mean().backward()
            optimizer.step()

    groups = dependency_groups(net("rank_one"), EXAMPLE)
    run = build(groups)
    train(*run[:2])
    torch.save([part.state_dict() for part in run], tmp_path / "run.pt")
    other = build(groups)
    for part, state in zip(other, torch.load(tmp_path / "run.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    for model, optimizer, _ in (run, other):
        train(model, optimizer)
    for (key, value), restored in zip(run[0].state_dict().items(), other[0].state_dict().values(), strict=True):
        assert torch.equal(value, restored), key
    priors = (attachment.state_dict()["prior"].values() for _, _, attachment in (run, other))
    for ours, theirs in zip(*priors, strict=True):
        assert all(torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(theirs[key])) for key in ours)
    model = net("rank_one")
    attachment = bp.attach(torch.optim.Adam(model.parameters()), model, num_data=20, prior=ARD(groups))
    with pytest.raises(ValueError, match=r"prior with \['log_units_0', 'rate_0', 'scale'\]"):
        attachment.load_state_dict(run[2].state_dict())


def test_scales_stop_at_the_floor_and_a_group_without_any_is_named():
    model = net()
    groups = dependency_groups(model, EXAMPLE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attachment = bp.attach(optimizer, model, num_data=20, prior=ARD(groups), std_lr=0.0)
    for layer, names in ((model.up, ("weight", "bias")), (model.down, ("weight",))):
        for name in names:  # nothing is left of what `up` makes
            getattr(layer, name).data.mul_(1e-12)
            layer.log_std_parts(name)[0].data.fill_(-19.0)
    attachment.step = 99

    def step():
        optimizer.zero_grad()
        model(EXAMPLE).square().mean().backward()
        optimizer.step()

    assert next(iter(attachment._bound.values())).scales.log_units.min() > math.log(1e-2)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(40):
            step()
        attachment.step = 199
        step()
    said = [str(warning.message) for warning in said if "dependency group" in str(warning.message)]
    assert len(said) == 1
    assert said[0].startswith("up: all units of its dependency group have prior stds below a hundredth"), said
    scales = attachment.state_dict()["prior"]["up.weight"]["log_units_0"]
    assert scales.min().item() == pytest.approx(math.log(1e-3), abs=1e-9)


def test_what_does_not_fit_is_refused():
    model = net()
    groups = dependency_groups(model, EXAMPLE)
    with pytest.raises(ValueError, match=r"none of the \d+ groups has a member among the model's posteriors \(weight"):
        bp.kl_divergence(model.up, ARD(groups))
    smaller = bp.to_variational(nn.ModuleDict({"up": nn.Conv2d(3, 4, 3)}))
    with pytest.raises(ValueError, match=r"group of \w+ has 5 positions along dimension 0 of up.weight, which has 4"):
        bp.kl_divergence(smaller, ARD(groups))
    sharded = torch.zeros(2, 2)
    sharded.full_tensor = lambda: sharded
    with pytest.raises(UnsupportedModelError, match="FSDP 2 has sharded the model"):
        ARD(groups).bind(Binding(sharded, 1.0, (0,)))


def energy_of_groups():
    torch.manual_seed(3)
    mean, log_std = torch.randn(6, 4).double() * torch.randn(6, 1).double().exp(), torch.randn(6, 4).double() - 1
    return mean, log_std


@pytest.mark.parametrize("tau", [0.05, 0.7, 20.0, "auto"])
def test_a_horseshoe_within_a_tensor_is_the_mode_of_its_scales(tau):
    mean, log_std = energy_of_groups()
    rms = 0.7

    def function(log_scales, log_tau):
        kl = gaussian_kl(mean, log_std.exp(), log_scales.exp()).sum()
        scale = log_tau.exp() if tau == "auto" else torch.tensor(tau * rms, dtype=torch.float64)
        return kl - (HalfCauchy(scale).log_prob(log_scales.exp()) + math.log(math.pi / 2)).sum() + 0 * log_tau

    smallest, (log_scales, _) = minimised(function, torch.zeros(6, 1).double(), torch.zeros(()).double())
    bound = Horseshoe("channel", tau).bind(Binding(mean, rms, (0,), (1,)))
    torch.testing.assert_close(bound.variance(mean, log_std).sqrt(), log_scales.exp(), rtol=1e-5, atol=0)
    constant = 0.0 if tau == "auto" else 6 * math.log(tau * rms)
    assert float(bound.kl(mean, log_std)) + constant == pytest.approx(float(smallest), rel=1e-8)


@pytest.mark.parametrize("scale", [0.02, 0.7, "auto"])
def test_a_group_lasso_is_the_mode_of_its_scales(scale):
    mean, log_std = energy_of_groups()
    rms = 0.7

    def function(log_scales, log_rate):
        variance = (2 * log_scales).exp()
        kl = gaussian_kl(mean, log_std.exp(), log_scales.exp()).sum()
        rate = log_rate.exp() if scale == "auto" else torch.tensor((scale * rms) ** -2, dtype=torch.float64)
        return kl - Gamma(torch.tensor(2.5, dtype=torch.float64), rate / 2).log_prob(variance).sum() + 0 * log_rate

    smallest, (log_scales, _) = minimised(function, torch.zeros(6, 1).double(), torch.zeros(()).double())
    bound = GroupLasso("channel", scale).bind(Binding(mean, rms, (0,), (1,)))
    torch.testing.assert_close(bound.variance(mean, log_std).sqrt(), log_scales.exp(), rtol=1e-5, atol=0)
    assert float(bound.kl(mean, log_std)) == pytest.approx(float(smallest), rel=1e-8)


def test_a_group_lasso_penalises_the_norm_of_a_group():
    """With small stds and many weights the KL falls by lambda per unit of the norm."""
    torch.manual_seed(0)
    direction, log_std = torch.randn(1, 400).double(), torch.full((1, 400), -9.0).double()
    direction /= direction.norm()
    bound = GroupLasso("layer", 0.01).bind(Binding(direction, 1.0, (0,), (1,)))
    mean_gradient, _ = bound.kl_gradient(30 * direction, log_std)
    assert float((mean_gradient * direction).sum()) == pytest.approx(100, rel=0.01)


@pytest.mark.parametrize("tau", [0.05, 0.7, "auto"])
def test_a_slab_is_the_mode_of_scales_that_it_bounds(tau):
    mean, log_std = energy_of_groups()
    rms, slab = 0.7, 0.9

    def function(log_scales, log_tau):
        variance = 1 / ((-2 * log_scales).exp() + (slab * rms) ** -2)
        kl = gaussian_kl(mean, log_std.exp(), variance.sqrt()).sum()
        scale = log_tau.exp() if tau == "auto" else torch.tensor(tau * rms, dtype=torch.float64)
        return kl - (HalfCauchy(scale).log_prob(log_scales.exp()) + math.log(math.pi / 2)).sum() + 0 * log_tau

    smallest, (log_scales, _) = minimised(function, torch.zeros(6, 1).double(), torch.zeros(()).double())
    bound = Horseshoe("channel", tau, slab=slab).bind(Binding(mean, rms, (0,), (1,)))
    variance = bound.variance(mean, log_std)
    torch.testing.assert_close(variance, 1 / ((-2 * log_scales).exp() + (slab * rms) ** -2), rtol=1e-5, atol=0)
    assert (
        float(variance.max())
        < (slab * rms) ** 2
        < float(Horseshoe("channel", tau).bind(Binding(mean, rms, (0,), (1,))).variance(mean, log_std).max())
    )
    constant = 0.0 if tau == "auto" else 6 * math.log(tau * rms)
    assert float(bound.kl(mean, log_std)) + constant == pytest.approx(float(smallest), rel=1e-8)


def test_a_horseshoe_shrinks_by_two_weights_at_most():
    """What its docstring says of ARD and of groups far above and below tau."""
    mean, log_std = energy_of_groups()
    binding = Binding(mean, 1.0, (0,), (1,))
    plain = ARD("channel").bind(binding).variance(mean, log_std)
    for tau, ratio in ((1e4, 1.0), (1e-4, 4 / 6)):
        shrunk = Horseshoe("channel", tau).bind(binding).variance(mean, log_std)
        torch.testing.assert_close(shrunk / plain, torch.full_like(plain, ratio), rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", [case for case in LAYERS if len(case.shape) > 1], ids=lambda case: case.name)
def test_input_channels_own_the_weights_that_meet_them(case):
    """Found by gradients: what a weight's output depends on when all other channels are silent."""
    layer, x = bp.to_variational(case.layer()).double(), case.input()
    posterior, bound = next(iter(bind_prior(layer, ARD("input_channel")).items()))
    assert posterior.parameter == "weight"
    dim = x.dim() - 1 if isinstance(layer, nn.Linear) else 1
    dim = 0 if case.name == "conv2d_one_image" else dim
    e = (layer.weight.square() + (2 * layer.weight_log_std).exp()).detach()
    variance = bound.variance(layer.weight.detach(), layer.weight_log_std.detach()).expand(e.shape)
    for channel in range(x.shape[dim]):
        alone = torch.zeros_like(x).index_copy_(
            dim, torch.tensor([channel]), torch.ones_like(x).narrow(dim, channel, 1)
        )
        output = layer.eval()(alone, **case.kwargs)
        weights = torch.rand(output.shape, dtype=output.dtype)
        (gradient,) = torch.autograd.grad((output * weights).sum(), layer.weight)
        met = gradient != 0
        torch.testing.assert_close(variance[met], e[met].mean().expand(int(met.sum())), rtol=1e-10, atol=0)


def test_inputs_of_layers_that_multiply_otherwise(monkeypatch):
    monkeypatch.setattr(base, "_REGISTERED", dict(base._REGISTERED))

    class Table(nn.Embedding):
        pass

    @register_layer(Table)
    class VariationalTable(VariationalLayer, Table):
        pass

    class Transposed(nn.Linear):  # weight (I, O)
        pass

    @register_layer(Transposed)
    class VariationalTransposed(VariationalLayer, Transposed):
        layer_kind = TRANSPOSED_LINEAR

    for layer, shape in (
        (nn.MultiheadAttention(4, 2), (1, 4)),
        (Table(5, 2), (5, 1)),
        (Transposed(3, 2), (2, 1)),
    ):
        posterior, prior = next(iter(bind_prior(bp.to_variational(layer), ARD("input_channel")).items()))
        assert prior.variance(posterior.mean, posterior.log_std).shape == shape, type(layer)


@pytest.mark.parametrize("make", [lambda _: ARD("channel"), ARD, Horseshoe], ids=["tensor", "groups", "horseshoe"])
def test_a_probability_counts_as_that_part_of_a_weight(make):
    """With gates a weight is there with a probability: n and E are expectations, and its gradient is its own KL."""
    model = net()
    bound = bind_prior(model, make(dependency_groups(model, EXAMPLE)))
    keep = {posterior: torch.rand(posterior.mean.shape).double() ** 4 for posterior in bound}
    refresh_scales(bound, keep.get, until_rest=True)
    posterior = next(posterior for posterior in bound if posterior.name == "up.weight")
    prior, mean, log_std = bound[posterior], posterior.mean.detach(), posterior.log_std.detach()
    variance = prior.variance(mean, log_std, keep[posterior])
    each = 0.5 * ((mean.square() + (2 * log_std).exp()) / variance - 1 - 2 * log_std + variance.log())
    probability = keep[posterior].requires_grad_()
    (gradient,) = torch.autograd.grad(prior.kl(mean, log_std, probability), probability)
    torch.testing.assert_close(gradient, each, rtol=1e-8, atol=1e-8)


def signal_of_units(make):
    """SNR^2 of eight hidden units, summed over what leaves with each; the last four are not needed."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
    x = torch.randn(64, 4)
    y = torch.tanh(2 * x) + 0.3 * torch.randn(64, 4)
    with torch.no_grad():
        model[0].weight.copy_(torch.cat([2 * torch.eye(4), 0.5 * torch.randn(4, 4)]))
        model[2].weight.copy_(torch.cat([torch.eye(4), 0.3 * torch.randn(4, 4)], 1))
        model[0].bias.zero_()
        model[2].bias.zero_()
    bp.to_variational(model)
    groups = dependency_groups(model, x[:1])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    bp.attach(optimizer, model, num_data=64, prior=make(groups), temperature=1.0, std_lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (0.5 / 0.3**2 * (model(x) - y).square().sum(1).mean()).backward()
        optimizer.step()
    snr = bp.signal_to_noise(model)
    return snr["0.weight"].square().sum(1) + snr["2.weight"].square().sum(0)


def test_units_that_the_data_does_not_need_lose_their_signal():
    """A scale of their own in both layers tells them; a scale for a layer does not as well."""
    separation = {}
    for name, make in {"groups": ARD, "layer": lambda _: Gaussian()}.items():
        score = signal_of_units(make)
        separation[name] = float(score[:4].min() / score[4:].max())
        print(f"{name}: needed {score[:4].tolist()}, not needed {score[4:].tolist()}, ratio {separation[name]:.1f}")
    assert separation["groups"] > 1000
    assert separation["groups"] > 20 * separation["layer"]
