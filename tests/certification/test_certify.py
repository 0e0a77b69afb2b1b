"""Certificates against what small networks do: never above the truth, each method as tight as the one before."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import bayesprune as bp
from bayesprune.certification.bounds import chord_lines, flat_lines, interval_bounds, tightened
from bayesprune.certification.network import Box, Network
from bayesprune.certification.semidefinite import smallest_ritz_vector
from bayesprune.errors import UnsupportedModelError

METHODS = ("interval", "linear", "sdp")


def tiny(seed: int) -> nn.Sequential:
    """2 inputs, two hidden layers of 3, 3 classes; weights large enough that ReLUs change sign in the box."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=1.5 if parameter.dim() == 2 else 0.3)
    with torch.no_grad():
        net[-1].bias -= net(torch.randn(200, 2)).mean(0)
    return net.double().requires_grad_(False)


@torch.no_grad()
def true_margins(net: nn.Sequential, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Smallest margins over the box (N, C): exactly, as they are linear between the corners of ReLU regions.

    All corners lie where two of the kinks and sides cross, which a net of two hidden layers has within each pattern;
    every pattern's affine function is solved for them.
    """
    found = torch.full((len(x), 3), torch.inf, dtype=torch.float64)
    for number, (center, label) in enumerate(zip(x, y, strict=True)):
        points = corners(net, center, eps)
        outputs = net(points)
        found[number] = (outputs[:, label, None] - outputs).amin(0)
        found[number, label] = torch.inf
    return found


def corners(net: nn.Sequential, center: Tensor, eps: float) -> Tensor:
    """All points of the box where two of the lines "a unit is 0" and "a side" cross, under each pattern of ReLUs."""
    first, second = net[0], net[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(second, nn.Linear)
    sides = [(torch.eye(2, dtype=torch.float64)[i], -(center[i] + sign * eps)) for i in range(2) for sign in (-1, 1)]
    kinks = list(zip(first.weight, first.bias, strict=True))
    points = [center]
    for pattern in itertools.product((0.0, 1.0), repeat=3):
        on = torch.tensor(pattern, dtype=torch.float64)
        weight, bias = second.weight * on @ first.weight, second.weight * on @ first.bias + second.bias
        lines = [*sides, *kinks, *zip(weight, bias, strict=True)]
        for (a, b), (c, d) in itertools.combinations(lines, 2):
            matrix = torch.stack([a, c])
            if matrix.det().abs() > 1e-9:
                points.append(torch.linalg.solve(matrix, -torch.stack([b, d])))
    points = torch.stack(points)
    inside = ((points - center).abs() <= eps + 1e-9).all(1)
    return points[inside].clamp(center - eps, center + eps)


@pytest.mark.parametrize("seed", range(4))
def test_no_bound_is_above_the_truth_and_each_is_at_least_as_tight_as_the_one_before(seed: int):
    net, eps = tiny(seed), 0.3
    x = 2 * torch.randn(5, 2, dtype=torch.float64)
    y = net(x).argmax(1)
    truth = true_margins(net, x, y, eps)
    found = [bp.certify(net, x, y, eps, method, num_steps=30) for method in METHODS]
    for certificate in found:
        assert bool((certificate.margins <= truth).all())
        assert not bool((certificate.verified & certificate.attacked).any())
        assert bool((certificate.margins.amin(1) <= certificate.attack_margins).all())
        assert bool((certificate.attack_margins >= truth.amin(1) - 1e-9).all())
    for looser, tighter in itertools.pairwise(found):
        assert bool((tighter.margins >= looser.margins).all())


def test_the_semidefinite_bound_closes_most_of_what_the_linear_one_leaves_open():
    """Without an attack to speak of all pairs that are open are worked on, also those that no bound can verify."""
    gaps = torch.zeros(2, dtype=torch.float64)
    for net in map(tiny, range(2)):
        torch.manual_seed(5)
        x = torch.randn(10, 2).double()
        y, eps = net(x).argmax(1), 0.6
        truth = true_margins(net, x, y, eps)
        linear, sdp = (bp.certify(net, x, y, eps, method, num_steps=60, attack_steps=0) for method in METHODS[1:])
        worked_on = ((linear.margins <= 0) & ~linear.attacked[:, None]).nonzero(as_tuple=True)
        gaps += torch.stack([(truth - part.margins)[worked_on].sum() for part in (linear, sdp)])
    assert gaps[0] > 0
    assert gaps[1] < 0.6 * gaps[0], gaps


def test_attack_finds_the_smallest_margin_of_a_tiny_network():
    net = tiny(1)
    x = torch.randn(5, 2, dtype=torch.float64)
    y = net(x).argmax(1)
    found = bp.certify(net, x, y, 0.1, "interval", attack_steps=60)
    torch.testing.assert_close(found.attack_margins, true_margins(net, x, y, 0.1).amin(1), atol=0.02, rtol=0.02)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
        self.pool = nn.AvgPool2d(2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        y = self.inner(x)
        y += x
        x = self.pool(torch.relu(y))
        return self.head(torch.flatten(x, 1))


def residual() -> Residual:
    torch.manual_seed(0)
    net = Residual()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.normal_()
            module.running_mean = torch.randn(4)
    return net


@pytest.mark.parametrize("method", METHODS)
def test_bounds_hold_for_convolutions_norms_pools_and_sums(method):
    net, eps = residual(), 0.05
    x = torch.rand(3, 2, 4, 4)
    with torch.no_grad():
        y = net.eval()(x).argmax(1)
    found = bp.certify(net, x, y, eps, method, box=(0.0, 1.0), num_steps=20)
    near = (x[:, None] + eps * (torch.rand(3, 4000, 2, 4, 4) * 2 - 1).sign()).clamp(0, 1)
    with torch.no_grad():
        outputs = net.double()(near.double().flatten(0, 1)).view(3, 4000, 3)
    seen = (outputs.gather(2, y[:, None, None].expand(-1, 4000, 1)) - outputs).amin(1)
    seen[torch.arange(3), y] = torch.inf
    assert bool((found.margins <= seen).all())
    assert bool((found.margins.amin(1) > -50).all())


def test_without_change_all_bounds_are_the_margin_itself():
    net = residual().eval().double()
    x = torch.rand(3, 2, 4, 4, dtype=torch.float64)
    outputs = net(x).detach()
    expected = outputs.amax(1, keepdim=True) - outputs
    expected[torch.arange(3), outputs.argmax(1)] = torch.inf
    for method in METHODS:
        found = bp.certify(net, x, outputs.argmax(1), 0.0, method)
        torch.testing.assert_close(found.margins, expected)
        assert bool(found.verified.all())


def test_intermediate_boxes_hold_what_units_are_given_and_linear_bounds_narrow_them():
    net = tiny(2)
    network, box = Network(net), Box(torch.zeros(1, 2).double(), torch.full((1, 2), 0.5).double())
    wide = interval_bounds(network, box)
    narrow = tightened(network, box, wide)
    points = torch.rand(5000, 2, dtype=torch.float64) - 0.5
    for number, (first, second) in enumerate(zip(wide, narrow, strict=True)):
        given = network.run(points, lambda _, value: value.relu(), until=number)
        assert bool((second.low <= given.amin(0)).all() and (second.high >= given.amax(0)).all())
        assert bool((second.low >= first.low - 1e-12).all() and (second.high <= first.high + 1e-12).all())
    assert float(narrow[1].radius.sum()) < 0.99 * float(wide[1].radius.sum())


@pytest.mark.parametrize("make", [flat_lines, chord_lines])
def test_lines_are_on_their_sides_of_the_relu(make):
    low, high = torch.tensor([[-2.0, -1.0, -3.0, 0.5, -1.0]]), torch.tensor([[1.0, 3.0, -1.0, 2.0, 0.0]])
    lines = make(Box.between(low, high))
    for share in torch.linspace(0, 1, 21):
        given = low + share * (high - low)
        assert bool((lines.low_slope * given + lines.low_offset <= given.relu() + 1e-6).all())
        assert bool((lines.high_slope * given + lines.high_offset >= given.relu() - 1e-6).all())


def test_lanczos_finds_the_smallest_eigenvalue():
    torch.manual_seed(0)
    half = torch.randn(3, 12, 12, dtype=torch.float64)
    matrices = half + half.mT
    found = smallest_ritz_vector(
        lambda v: torch.einsum("pij,pj->pi", matrices, v), torch.randn(3, 12, dtype=torch.float64), 12
    )
    quotient = torch.einsum("pi,pij,pj->p", found, matrices, found)
    torch.testing.assert_close(quotient, torch.linalg.eigvalsh(matrices)[:, 0])


def test_a_model_with_posteriors_is_certified_at_its_means_and_left_as_it_was():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(6, 4)
    plain = bp.certify(net, x, net(x).argmax(1), 0.05)
    bp.to_variational(net)
    found = bp.certify(net, x, net.eval()(x).argmax(1), 0.05)
    assert torch.equal(found.margins, plain.margins)
    assert type(net[0]).__name__ != "Linear"
    assert "linear" in str(found)
    assert "6" in str(found)


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.MaxPool1d(2), "'1' (MaxPool1d)"),
        (nn.GELU(), "'1' (GELU)"),
        (nn.BatchNorm1d(4, track_running_stats=False), "'1' (BatchNorm1d)"),
    ],
)
def test_a_layer_without_a_rule_is_refused_by_its_name(layer: nn.Module, named: str):
    net = nn.Sequential(nn.Linear(4, 4), layer, nn.Linear(4, 2))
    with pytest.raises(UnsupportedModelError) as error:
        bp.certify(net, torch.zeros(1, 4), torch.tensor([0]), 0.1)
    assert named in str(error.value)


class Standardised(nn.Conv1d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight / weight.abs().sum(), bias)


class Shifted(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) + 1


class AlwaysDrawn(nn.Dropout):
    def train(self, mode: bool = True) -> "AlwaysDrawn":
        return super().train(True)


class OfBatches(nn.BatchNorm1d):
    def train(self, mode: bool = True) -> "OfBatches":
        return super().train(True)


class AnyShape(_BatchNorm):
    def _check_input_dim(self, input: Tensor) -> None:
        pass


def with_forward_of_its_own() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = torch.neg
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        nn.Sequential(nn.Unflatten(1, (1, 4)), Standardised(1, 1, 1), nn.Flatten()),
        Shifted(4, 4),
        AlwaysDrawn(),
        OfBatches(4),
        AnyShape(4),
        nn.ConstantPad1d(1, -5.0),
        with_forward_of_its_own(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layer_that_computes_something_of_its_own_is_refused(layer: nn.Module):
    """Each is of a stock class, or runs the forward of one, and what becomes of the radius in it is something else."""
    net = nn.Sequential(nn.Linear(4, 4), layer, nn.LazyLinear(2))
    net(torch.zeros(2, 4))
    with pytest.raises(UnsupportedModelError, match="no bounds"):
        bp.certify(net, torch.zeros(2, 4), torch.tensor([0, 1]), 0.1)


@pytest.mark.parametrize("name", ["", "0"])
def test_forward_hooks_are_refused(name: str):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    net.get_submodule(name).register_forward_hook(lambda *_: torch.zeros(1, 2))
    with pytest.raises(UnsupportedModelError, match="has forward hooks"):
        bp.certify(net, torch.zeros(1, 4), torch.tensor([0]), 0.1)


def test_a_model_that_is_more_than_its_steps_is_refused():
    class BeforeAct(nn.Module):
        """Adds what the ReLU before has changed in place."""

        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU(inplace=True)
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x + x
            return self.layer(self.relu(x)) + x

    replaced = nn.Sequential(nn.Linear(4, 2))
    replaced.forward = torch.neg
    for net in (BeforeAct(), replaced):
        with pytest.raises(UnsupportedModelError, match="do not give its outputs"):
            bp.certify(net, -torch.ones(1, 4), torch.tensor([0]), 0.1)


def test_a_parametrized_weight_is_certified_as_it_is_computed():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(5, 4)
    expected = bp.certify(net, x, net(x).argmax(1), 0.1).margins
    nn.utils.parametrizations.weight_norm(net[0])
    torch.testing.assert_close(bp.certify(net, x, net(x).argmax(1), 0.1).margins, expected)


def test_functions_without_a_rule_are_refused():
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x

    class Difference(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.add(x, x.relu(), alpha=-1)

    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    for net, said in ((Doubled(), "'mul'"), (Difference(), "'add'"), (Branching(), "cannot be traced")):
        with pytest.raises(UnsupportedModelError, match=said):
            bp.certify(net, torch.zeros(1, 2), torch.tensor([0]), 0.1)


def test_values_that_do_not_fit_are_refused():
    net, x, y = tiny(0), torch.zeros(2, 2), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="method is 'exact'"):
        bp.certify(net, x, y, 0.1, "exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="outside the box"):
        bp.certify(net, x - 1, y, 0.1, box=(0.0, 1.0))
    with pytest.raises(ValueError, match="eps is -1"):
        bp.certify(net, x, y, -1)
    with pytest.raises(ValueError, match="labels go from 0 to 7"):
        bp.certify(net, x, torch.tensor([0, 7]), 0.1)
    with pytest.raises(ValueError, match="one integer each"):
        bp.certify(net, x, y[:1], 0.1)
