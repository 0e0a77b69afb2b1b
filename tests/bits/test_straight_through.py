"""`StraightThrough` trains weights that the network sees rounded, and leaves them on their grids."""

import copy

import pytest
import torch
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.bits import StraightThrough, WidthSchedule
from bayesprune.bits.rounding import round_alone
from bayesprune.bits.steps import Grid, finer_grid
from bayesprune.errors import UnsupportedModelError
from bayesprune.layers import named_posteriors

Batch = tuple[Tensor, Tensor]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5))
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 1, 8, 8, generator=generator), torch.randint(5, (64,), generator=generator)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 3e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, num_steps: int) -> list[float]:
    losses = []
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def pruned() -> nn.Sequential:
    model = net()
    with torch.no_grad():
        for layer in (model[0], model[4]):
            layer.weight.mul_(torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5)
    return model


def is_on(grid: Grid, tensor: Tensor) -> bool:
    integers = (tensor.detach().double() / grid.step).round()
    return torch.equal(integers * grid.step, tensor.double()) and int(integers.abs().max()) <= grid.limit


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_weights_stay_on_their_grids_and_learn(batch, per):
    model = pruned()
    report = bp.quantize(model, [batch], bits=3, per=per)
    before = copy.deepcopy(model)
    rounding = StraightThrough(optimizer := optimizer_of(model), model, report)
    losses = train(model, optimizer, batch, 30)
    assert losses[-1] < 0.6 * losses[0]
    assert sorted(report.grids) == ["0.weight", "4.bias", "4.weight"]
    for name, grid in report.grids.items():
        assert is_on(grid, model.get_parameter(name))
        assert not torch.equal(model.get_parameter(name), before.get_parameter(name))
    rounding.finish()
    for name, grid in report.grids.items():
        assert is_on(grid, model.get_parameter(name))


def test_the_rounded_weights_are_those_of_quantize_and_the_gradient_is_passed_on(batch):
    """A step of plain SGD moves the weights by the gradient at their rounded values; then they are rounded anew."""
    model = pruned()
    report = bp.quantize(copy.deepcopy(model), [batch], bits=3)
    start = {name: model.get_parameter(name).detach().clone() for name in report.grids}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rounding = StraightThrough(optimizer, model, report)
    rounded = {name: round_alone(start[name], start[name] != 0, grid) for name, grid in report.grids.items()}
    for name, value in rounded.items():
        assert torch.equal(model.get_parameter(name), value)
    plain = copy.deepcopy(model)
    nn.functional.cross_entropy(plain(batch[0]), batch[1]).backward()
    train(model, optimizer, batch, 1)
    outside = 0
    for name, grid in report.grids.items():
        gradient = plain.get_parameter(name).grad
        assert gradient is not None
        is_inside = (start[name].abs() <= grid.step * grid.limit) & (start[name] != 0)
        outside += int((~is_inside & (start[name] != 0)).sum())
        moved = start[name] - 0.1 * gradient * is_inside
        assert torch.allclose(rounding.state_dict()["values"][name], moved, rtol=0, atol=1e-7)
        assert torch.equal(
            model.get_parameter(name), round_alone(rounding.state_dict()["values"][name], start[name] != 0, grid)
        )
    assert outside, "3 bits clip some weights"


def test_evaluation_is_the_forward_of_training(batch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 5))
    report = bp.quantize(model, [batch], bits=4)
    StraightThrough(optimizer := optimizer_of(model), model, report)
    train(model, optimizer, batch, 5)
    with torch.no_grad():
        assert torch.equal(model.train()(batch[0]), model.eval()(batch[0]))


def test_zeros_stay(batch):
    model = pruned()
    report = bp.quantize(model, [batch], bits=2)
    zeros = {name: model.get_parameter(name) == 0 for name in report.grids}
    rounding = StraightThrough(optimizer := optimizer_of(model), model, report)
    train(model, optimizer, batch, 10)
    rounding.finish()
    for name, zero in zeros.items():
        assert zero.any()
        assert not model.get_parameter(name)[zero].any()


def test_pruned_weights_of_a_variational_model_stay_zero_and_stds_train(batch):
    model = bp.to_variational(net())
    bp.prune_weights(model, "weights=0.5")
    report = bp.quantize(model, bits=4)
    before = {posterior.name: posterior.log_std.clone() for posterior in named_posteriors(model)}
    optimizer = optimizer_of(model)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    bp.attach(optimizer, model, num_data=64)
    rounding = StraightThrough(optimizer, model, report)
    train(model, optimizer, batch, 10)
    rounding.finish()
    for posterior in named_posteriors(model):
        assert is_on(report.grids[posterior.name], posterior.mean)
        assert not torch.equal(posterior.log_std, before[posterior.name])
        if posterior.mask is not None:
            assert not posterior.mean[~posterior.mask].any()


@pytest.mark.parametrize("closure", [False, True])
def test_an_attachment_made_later_sees_the_weights_as_they_are(closure, batch):
    """It removes by their own values, not by the rounded ones, of which many are equal."""

    def run(is_attached_first):
        torch.manual_seed(0)
        model = bp.to_variational(net(), estimator="mean")
        report = bp.quantize(model, bits=3)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-2, weight_decay=0.0)
        schedule = bp.prune.PruneSchedule("weights=0.5", begin=0.2, end=0.8, score=bp.prune.scores.magnitude)
        options = {"num_data": 64, "num_steps": 10, "prune": schedule}
        if is_attached_first:
            bp.attach(optimizer, model, **options)
        rounding = StraightThrough(optimizer, model, report)
        if not is_attached_first:
            bp.attach(optimizer, model, **options)

        def loss():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            return loss

        for _ in range(10):
            if closure:
                optimizer.step(loss)
            else:
                loss()
                optimizer.step()
        rounding.finish()
        return model.state_dict()

    expected, found = run(True), run(False)
    assert not expected["4.weight_mask"].all()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert not found["4.weight"][~found["4.weight_mask"]].any()


def test_noise_is_drawn_about_rounded_means(batch):
    model = bp.to_variational(net())
    report = bp.quantize(model, bits=3)
    StraightThrough(optimizer := torch.optim.SGD(model.parameters(), 0.1), model, report)
    train(model, optimizer, batch, 3)
    layer = model[4]
    assert is_on(report.grids["4.weight"], layer.weight)
    torch.manual_seed(0)
    drawn = model.train()(batch[0])
    torch.manual_seed(0)
    assert torch.equal(model.train()(batch[0]), drawn)
    torch.manual_seed(1)
    assert not torch.equal(model.train()(batch[0]), drawn)


def test_what_has_no_grid_keeps_eleven_bits_at_the_end(batch):
    model = net()
    report = bp.quantize(model, [batch], bits=4)
    rounding = StraightThrough(optimizer := optimizer_of(model), model, report)
    train(model, optimizer, batch, 5)
    trained = model[1].running_mean.clone()
    rounding.finish()
    mantissas = torch.frexp(model[1].running_mean)[0] * 2**11
    assert torch.equal(mantissas, mantissas.round())
    assert torch.allclose(model[1].running_mean, trained, rtol=2**-11)
    assert not torch.equal(model[1].running_mean, trained)


def test_after_finish_the_optimizer_is_as_before(batch):
    model = net()
    report = bp.quantize(model, [batch], bits=4)
    rounding = StraightThrough(optimizer := optimizer_of(model), model, report)
    rounding.finish()
    train(model, optimizer, batch, 1)
    assert not is_on(report.grids["4.weight"], model[4].weight)


def test_widths_fall_to_those_asked_for(batch):
    model = net()
    report = bp.quantize(copy.deepcopy(model), [batch], bits=2)
    optimizer = optimizer_of(model)
    rounding = StraightThrough(
        optimizer, model, report, schedule=WidthSchedule(extra=3, begin=0.1, end=0.5), num_steps=20
    )
    widths, grid = [], report.grids["4.weight"]
    for _ in range(20):
        widths.append(rounding.extra)
        assert is_on(finer_grid(grid, rounding.extra), model[4].weight)
        train(model, optimizer, batch, 1)
    assert widths == [3] * 5 + [2] * 3 + [1] * 2 + [0] * 10
    assert len(model[4].weight.unique()) == 3


@pytest.mark.parametrize("from_state", [True, False])
def test_a_run_that_stopped_goes_on_to_the_last_bit(from_state, batch):
    schedule = WidthSchedule(extra=2, end=0.8)

    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = pruned()
        return model, optimizer_of(model)

    report = bp.quantize(pruned(), [batch], bits=3)
    model, optimizer = start()
    whole = StraightThrough(optimizer, model, report, schedule=schedule, num_steps=12)
    train(model, optimizer, batch, 5)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), whole.state_dict()))
    train(model, optimizer, batch, 7)

    resumed, its_optimizer = start()
    resumed.load_state_dict(saved[0])
    its_optimizer.load_state_dict(saved[1])
    if from_state:
        again = StraightThrough(its_optimizer, resumed, saved[2], schedule=schedule, num_steps=12)
    else:
        other = bp.quantize(pruned(), [batch], bits=2)
        again = StraightThrough(its_optimizer, resumed, other, schedule=schedule, num_steps=12)
        again.load_state_dict(saved[2])
    assert (again.step, again.extra) == (5, 1)
    train(resumed, its_optimizer, batch, 7)
    for name, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    for rounding in (whole, again):
        rounding.finish()
    assert torch.equal(resumed[4].weight, model[4].weight)


def test_grids_of_a_saved_model_are_found(batch, tmp_path):
    pytest.importorskip("constriction")
    model = pruned()
    report = bp.quantize(model, [batch], bits=3)
    bp.save(model, tmp_path / "rounded", coding="entropy")
    loaded = bp.load(tmp_path / "rounded", model=net())
    rounding = StraightThrough(optimizer := optimizer_of(loaded), loaded)
    train(loaded, optimizer, batch, 10)
    rounding.finish()
    for name in ("0.weight", "4.weight"):
        assert is_on(report.grids[name], loaded.get_parameter(name))
    bp.save(loaded, tmp_path / "trained", coding="entropy")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("rounded", "trained")]
    assert sizes[1] < 1.2 * sizes[0]
    again = bp.load(tmp_path / "trained", model=net())
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_gradients_that_a_closure_computes(batch):
    found = []
    for as_closure in (False, True):
        model = pruned()
        report = bp.quantize(model, [batch], bits=3)
        StraightThrough(optimizer := optimizer_of(model), model, report)

        def closure(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            return loss

        for _ in range(3):
            if as_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        found.append(model[4].weight.detach().clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("has_report", [True, False])
def test_frozen_layers_stay_on_their_grids(batch, has_report):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 5))
    report = bp.quantize(model, [batch], bits=8)
    before = copy.deepcopy(model)
    model[1].requires_grad_(False)
    optimizer = torch.optim.SGD(model[3].parameters(), 0.1)
    rounding = StraightThrough(optimizer, model, report if has_report else None)
    train(model, optimizer, batch, 3)
    rounding.finish()
    assert torch.equal(model[1].weight, before[1].weight)
    assert torch.equal(model[1].bias, before[1].bias)
    assert not torch.equal(model[3].weight, before[3].weight)
    assert is_on(report.grids["3.weight"], model[3].weight)
    assert not model[1].weight.requires_grad


def two_layers(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Linear(width, 5))


def test_a_report_of_other_channels_is_refused(batch):
    report = bp.quantize(two_layers(12), [batch], bits=4, per="channel")
    model = two_layers(16)
    with pytest.raises(ValueError, match=r"of shape \(12, 1\) for 1\.weight of shape \(16, 64\)"):
        StraightThrough(optimizer_of(model), model, report)


def test_a_state_of_other_shapes_is_refused(batch):
    runs = []
    for width in (12, 16):
        model = two_layers(width)
        report = bp.quantize(model, [batch], bits=4)
        runs.append(StraightThrough(optimizer_of(model), model, report))
    with pytest.raises(ValueError, match=r"differ in 1\.bias, 1\.weight, 2\.weight, which"):
        runs[1].load_state_dict(runs[0].state_dict())


def test_weights_that_move_outside_steps_are_refused(batch):
    lookahead = pytest.importorskip("timm.optim").Lookahead
    model = net()
    report = bp.quantize(model, [batch], bits=3)
    with pytest.raises(UnsupportedModelError, match="got Lookahead, which moves weights after the steps"):
        StraightThrough(lookahead(optimizer_of(model)), model, report)


def test_what_does_not_fit_is_refused(batch):
    model = net()
    optimizer = optimizer_of(model)
    with pytest.raises(ValueError, match=r"no weight of this Sequential stands on a grid.*Call bp.quantize"):
        StraightThrough(optimizer, model)
    report = bp.quantize(model, [batch], bits=3)
    with pytest.raises(ValueError, match="num_steps is None"):
        StraightThrough(optimizer, model, report, schedule=WidthSchedule())
    rounding = StraightThrough(optimizer, model, report)
    state = rounding.state_dict()
    with pytest.raises(
        ValueError, match=r"AdamW has 0\.weight, 4\.weight, 4\.bias held to a grid already; call finish"
    ):
        StraightThrough(optimizer, model, report)
    rounding.finish()
    StraightThrough(optimizer, model, report).finish()
    first = StraightThrough(torch.optim.SGD([model[0].weight], 0.1), model, report)
    with pytest.raises(ValueError, match=r"differ in 4\.bias, 4\.weight, which one of them does not hold"):
        first.load_state_dict(state)
    with pytest.raises(ValueError, match="Adam holds none of the 3 tensors"):
        StraightThrough(torch.optim.Adam(net().parameters()), model, report)
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    with pytest.raises(ValueError, match="which this Sequential does not have"):
        StraightThrough(optimizer_of(other), other, report)
    with pytest.raises(UnsupportedModelError, match="StraightThrough got LBFGS"):
        StraightThrough(torch.optim.LBFGS(model.parameters()), model, report)
    with pytest.raises(TypeError, match="expected the optimizer first"):
        StraightThrough(model, optimizer, report)
    with pytest.raises(ValueError, match="extra is 9"):
        WidthSchedule(extra=9)
    with pytest.raises(ValueError, match=r"begin=0\.8"):
        WidthSchedule(begin=0.8)
