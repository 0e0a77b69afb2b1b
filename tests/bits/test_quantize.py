"""`quantize` rounds to the grids that the posterior asks for, and `save` finds them again."""

import copy

import pytest
import torch
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.bits.others import significant
from bayesprune.bits.rounding import nearest, round_alone, round_columns, sweeps
from bayesprune.bits.steps import Grid, posterior_grid, width_grid, width_of
from bayesprune.errors import InfeasibleTargetError
from bayesprune.laplace import cross_entropy
from bayesprune.layers import named_posteriors
from bayesprune.storage.coding import as_integers

constriction = pytest.importorskip("constriction")


def net() -> nn.Sequential:
    layers = (nn.Conv2d(1, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(192, 1, 8, 8, generator=generator)
    y = (x.flatten(1) @ torch.randn(64, 5, generator=generator)).argmax(1)
    return list(zip(x.split(64), y.split(64), strict=True))


@pytest.fixture(scope="module")
def trained(data) -> nn.Sequential:
    torch.manual_seed(1)
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(15):
        for x, y in data:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def loss(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    return sum(float(cross_entropy(model.eval(), batch)) for batch in data) / len(data)


def test_every_weight_of_every_tensor_costs_the_same():
    """Rounding to the posterior's steps costs kappa / 2 nats a weight, whatever the scale of the tensor."""
    generator = torch.Generator().manual_seed(0)
    for scale in (0.01, 1.0, 30.0):
        mean = scale * torch.randn(300, 400, generator=generator)
        precision = torch.full_like(mean, 400 / scale**2).double()
        grid = posterior_grid(mean, precision, mean != 0, 0.5, ())
        rounded = nearest(mean.double(), grid.step, grid.limit) * grid.step
        nats = 0.5 * (precision * (rounded - mean).square()).mean()
        assert abs(float(nats) / 0.25 - 1) < 0.02


def test_steps_by_channel_follow_each_channel():
    precision = torch.tensor([[1.0, 1.0], [4.0, 4.0], [16.0, 16.0]]).double()
    grid = posterior_grid(torch.ones(3, 2), precision, torch.ones(3, 2, dtype=torch.bool), 1 / 12, (0,))
    assert torch.equal(grid.step, torch.tensor([[1.0], [0.5], [0.25]]).double())


def test_products_with_steps_are_exact():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(50, 60, generator=generator)
    grid = posterior_grid(mean, torch.full_like(mean, 777.0), mean != 0, 0.3, ())
    found = round_alone(mean, mean != 0, grid)
    integers = (found.double() / grid.step).round()
    assert torch.equal(integers * grid.step, found.double())


def test_a_width_has_so_many_places_and_the_least_error():
    mean = torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    kept = torch.ones_like(mean, dtype=torch.bool)
    grid = width_grid(mean, torch.ones_like(mean), kept, 3, ())
    rounded = round_alone(mean, kept, grid)
    assert grid.limit == 3
    assert len(rounded.unique()) == 7
    whole = Grid(mean.abs().max().double()[None, None] / 3, 3)
    errors = [float((mean - round_alone(mean, kept, each)).square().sum()) for each in (grid, whole)]
    assert errors[0] < 0.6 * errors[1]


def test_widths_by_the_longest_prefix():
    bits = {"": 8, "layer1": 4, "layer1.conv": 2}
    names = ("layer1.conv.weight", "layer1.fc.weight", "layer10.weight")
    assert [width_of(name, bits) for name in names] == [2, 4, 8]
    assert width_of("fc.weight", {"layer1": 4}) is None


def test_zeros_stay():
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(100, 100, generator=generator)
    kept = torch.rand(100, 100, generator=generator) < 0.1
    rounded = round_alone(mean, kept, Grid(torch.tensor([[0.25]]).double()))
    assert not rounded[~kept].any()
    assert float((rounded - mean)[kept].abs().max()) <= 0.125


@pytest.mark.parametrize(("share", "left"), [(1.0, 0.8), (0.3, 0.9)])
def test_columns_to_come_make_up(share, left):
    """The error of the outputs, (w - q) A (w - q)^T, falls; less where few weights are there to make up for others."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 12, generator=generator).double() @ torch.randn(12, 12, generator=generator).double()
    precision = x.T @ x / 200 + 0.01 * torch.eye(12)
    mean = torch.randn(20, 12, generator=generator).double()
    kept = torch.rand(20, 12, generator=generator) < share
    mean, step = torch.where(kept, mean, 0.0), torch.full((20, 12), 0.5).double()
    found = round_columns(mean, kept, step, sweeps(kept, precision), [100] * 12)

    def error(rounded: Tensor) -> float:
        return float((((rounded - mean) @ precision) * (rounded - mean)).sum())

    assert torch.equal((found / step).round() * step, found)
    assert not found[~kept].any()
    assert error(found) < left * error(nearest(mean, step, 100) * step)


def test_blocks_of_columns_are_rounded_as_one_column_after_another():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 75, generator=generator).double() @ torch.randn(75, 75, generator=generator).double()
    mean = torch.randn(7, 75, generator=generator).double()
    kept, step = torch.rand(mean.shape, generator=generator) < 0.7, torch.full_like(mean, 0.4)
    plan = sweeps(kept, x.T @ x / 300 + 0.1 * torch.eye(75))
    expected = torch.zeros_like(mean)
    for sweep in plan:
        for row in sweep.rows:
            values = mean[row, sweep.columns].clone()
            for place, column in enumerate(sweep.columns):
                if kept[row, column]:
                    expected[row, column] = (values[place] / 0.4).round().clamp(-3, 3) * 0.4
                error = (values[place] - expected[row, column]) / sweep.upper[place, place]
                values -= error * sweep.upper[place]
    found = round_columns(mean, kept, step, plan, [3] * 75)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert len(found.unique()) > 5


def test_independent_columns_are_rounded_to_the_nearest():
    mean = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).double()
    kept, step = torch.ones(5, 7, dtype=torch.bool), torch.full((5, 7), 0.3).double()
    found = round_columns(mean, kept, step, sweeps(kept, torch.eye(7).double()), [100] * 7)
    assert torch.equal(found, nearest(mean, step, 100) * step)


def test_a_tolerance_is_kept_and_used(trained, data):
    model = copy.deepcopy(trained)
    report = bp.quantize(model, data, tolerance=0.02)
    before, after = loss(trained, data), loss(model, data)
    assert report.loss_before == pytest.approx(before, abs=1e-6)
    assert report.loss_after == pytest.approx(after, abs=1e-6)
    assert after <= before + 0.02
    assert report.coded_bytes is not None
    assert report.coded_bytes < report.float_bytes / 5


def test_compensation_lowers_the_loss_at_the_same_width(trained, data):
    losses = []
    for compensate in (True, False):
        model = copy.deepcopy(trained)
        bp.quantize(model, data, bits=3, compensate=compensate)
        losses.append(loss(model, data))
    assert losses[0] < losses[1]


def test_bytes_are_kept_and_used(trained, data, tmp_path):
    model = copy.deepcopy(trained)
    report = bp.quantize(model, data, bytes=900)
    assert report.coded_bytes is not None
    assert 700 < report.coded_bytes <= 900
    bp.save(model, tmp_path, coding="entropy")
    assert (tmp_path / "model.safetensors").stat().st_size < 900 + 350
    found = bp.load(tmp_path, model=net())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in found.state_dict().items())


def test_a_variational_model_needs_no_data(trained, data):
    model = bp.laplace.fit_laplace(bp.to_variational(copy.deepcopy(trained)), data)
    bp.prune_weights(model, "weights=0.5")
    zeros = {its.name: its.mask for its in named_posteriors(model) if its.mask is not None}
    report = bp.quantize(model, bytes=1000)
    assert report.kl_bytes is not None
    assert report.kl_bytes > 0
    assert "KL / ln 2" in str(report)
    plain = bp.to_deterministic(model)
    for name, mask in zeros.items():
        assert not plain.get_parameter(name)[~mask].any()


def test_channels_have_steps_of_their_own(trained, data):
    model = copy.deepcopy(trained)
    bp.quantize(model, data, bits=4, per="channel")
    values = [len(row.unique()) for row in model.get_parameter("0.weight").flatten(1)]
    assert max(values) <= 15
    assert len(model.get_parameter("0.weight").unique()) > 15


def test_steps_by_channel_can_be_coded_where_outputs_are_not_the_first_dimension():
    torch.manual_seed(0)
    layers = (nn.ConvTranspose2d(8, 16, 4), nn.ReLU(), nn.ConvTranspose2d(16, 8, 3, groups=2), nn.Flatten())
    model = nn.Sequential(*layers, nn.Linear(8 * 36, 5))
    bp.quantize(model, [(torch.randn(32, 8, 1, 1), torch.randint(5, (32,)))], bits=4, per="channel")
    num_steps = []
    for layer in (model[0], model[2], model[4]):
        parts = as_integers(layer.weight.detach())
        assert parts is not None
        assert int(parts[0].abs().max()) <= 7
        num_steps.append(len(parts[1]))
    assert num_steps == [1, 1, 5]


def test_widths_by_name_leave_the_others(trained, data):
    model = copy.deepcopy(trained)
    report = bp.quantize(model, data, bits={"4": 3})
    assert torch.equal(model.get_parameter("0.weight"), trained.get_parameter("0.weight"))
    assert len(model.get_parameter("4.weight").unique()) <= 7
    assert [row.width for row in report.tensors] == [32, 3, 3]


def test_what_has_no_posterior_keeps_eleven_bits(trained, data):
    model = copy.deepcopy(trained)
    bp.quantize(model, data, bits=4)
    for name in ("running_var", "weight"):
        value, before = (getattr(each[1], name).detach() for each in (model, trained))
        assert torch.equal(value.half().float(), value)
        assert float((value / before - 1).abs().max()) <= 2.0**-11


def test_the_gradient_graph_and_the_dtype_stay(trained, data):
    model = copy.deepcopy(trained)
    parameters = dict(model.named_parameters())
    bp.quantize(model, data, bits=4)
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in model.parameters())
    assert vars(model).keys() == vars(trained).keys()


def test_extra_state_that_is_no_tensor_is_left_alone(data):
    class Named(nn.Linear):
        def get_extra_state(self) -> dict[str, str]:
            return {"classes": "five"}

        def set_extra_state(self, state: dict[str, str]) -> None:
            assert state == {"classes": "five"}

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Named(8, 5), nn.Linear(5, 5))
    bp.quantize(model, data, bits=3)
    assert all(len(layer.weight.unique()) <= 7 for layer in (model[1], model[2], model[3]))


@pytest.mark.parametrize("convert", [copy.deepcopy, lambda model: bp.to_variational(copy.deepcopy(model))])
def test_an_error_in_the_report_leaves_the_model_as_it_was(trained, data, monkeypatch, convert):
    def fails(_: Tensor) -> float:
        raise MemoryError

    model = convert(trained)
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr("bayesprune.bits.quantization.entropy_bits", fails)
    with pytest.raises(MemoryError):
        bp.quantize(model, data, bits=3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Levels(nn.Module):
    """A number of 0 to 6 through an embedding and a layer: one output for an example, and no dimension of classes."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.last = nn.Embedding(7, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(self.table(x)).relu())[:, 0]


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (model(batch[0]) - batch[1]).square().mean()


def pixel_cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("compensate", [True, "alone"])
def test_a_loss_says_how_exact_weights_have_to_be_where_outputs_are_no_logits_of_examples(compensate):
    torch.manual_seed(0)
    segmenter = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    pixels = torch.randn(16, 3, 8, 8), torch.randint(4, (16, 8, 8))
    numbers = torch.arange(64) % 7, torch.randn(64)
    for model, batch, its_loss in ((segmenter, pixels, pixel_cross_entropy), (Levels(), numbers, squared_error)):
        report = bp.quantize(model, [batch], tolerance=0.05, compensate=compensate, loss=its_loss)
        assert report.loss_before is not None
        assert report.loss_after is not None
        assert report.loss_after <= report.loss_before + 0.05
        assert report.loss_after == pytest.approx(its_loss(model, batch).item())
        assert len(report.tensors) == len(list(model.parameters()))


def test_labels_of_another_kind_leave_the_losses_out():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    report = bp.quantize(model, [(torch.randn(64, 4), torch.randn(64))], bits=4)
    assert (report.loss_before, report.loss_after) == (None, None)
    assert len(model[0].weight.unique()) <= 15


def test_the_largest_floats_stay_finite():
    info = torch.finfo(torch.float32)
    values = torch.tensor([info.min, info.max, -torch.inf, 0.0, 1 / 3])
    found = significant(values)
    assert torch.equal(found[:4], values[:4])
    assert found[4] == round(2**12 / 3) / 2**12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"bits": 6, "per": "channel"}, {"bits": 12}, {"bytes": 3000}])
def test_half_precision_holds_the_products_of_integers_and_steps(trained, data, dtype, options):
    model = copy.deepcopy(trained).to(dtype)
    report = bp.quantize(model, [(x.to(dtype), y) for x, y in data], **options)
    for name, grid in report.grids.items():
        value = model.get_parameter(name).detach().double()
        integers = (value / grid.step).round()
        assert torch.equal(integers * grid.step, value)
        assert float(integers.abs().max()) <= grid.limit
    assert as_integers(model.get_parameter("4.weight").detach()) is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_finest_posterior_grid_reaches_the_largest_weight(dtype):
    mean = torch.linspace(0.1, 0.2, 100)[:, None].to(dtype)
    grid = posterior_grid(mean, torch.ones(100, 1), mean != 0, 1e-20, (0,))
    assert bool((grid.step * grid.limit >= mean.double() * (1 - 2**-8)).all())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "expected one of the three"),
        ({"bits": 4, "bytes": 100}, "expected one of the three"),
        ({"bits": 1}, "whole numbers from 2 to 12"),
        ({"bits": {"9": 4}}, "bits names 9; expected prefixes of names of tensors that are rounded"),
        ({"tolerance": 0.0}, "above 0"),
        ({"tolerance": "1%"}, "tolerance is '1%'; expected nats that the loss may rise by"),
        ({"bytes": 0}, "above 0"),
        ({"bytes": "5MB"}, "bytes is '5MB'; expected the size of the coded tensors"),
        ({"bits": 4, "per": "row"}, 'expected "tensor" or "channel"'),
    ],
)
def test_options_out_of_range(trained, data, options, said):
    with pytest.raises(ValueError, match=said):
        bp.quantize(trained, data, **options)


def test_data_are_asked_for_where_they_are_needed(trained):
    with pytest.raises(ValueError, match="no data to give it one"):
        bp.quantize(trained, bits=4)
    with pytest.raises(ValueError, match="needs data to measure the loss on"):
        bp.quantize(bp.to_variational(copy.deepcopy(trained)), tolerance=0.1)


def test_too_few_bytes(trained, data):
    model = copy.deepcopy(trained)
    with pytest.raises(InfeasibleTargetError, match=r"no steps that give 20 bytes\. Allow more of them"):
        bp.quantize(model, data, bytes=20)
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_loss_that_is_no_number_has_no_tolerance(trained, data):
    model = copy.deepcopy(trained)
    uncounted = [*data, (data[0][0], torch.full_like(data[0][1], -100))]
    with pytest.raises(ValueError, match=r"mean loss on the data is nan.*all are -100"):
        bp.quantize(model, uncounted, tolerance=0.1, compensate=False)
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("convert", [False, True])
def test_a_compiled_model_is_rounded_as_the_one_inside(trained, data, convert):
    plain = copy.deepcopy(trained)
    plain = bp.to_variational(plain) if convert else plain
    inside = copy.deepcopy(plain)
    torch.manual_seed(0)
    expected = bp.quantize(plain, data, bits=4)
    torch.manual_seed(0)
    report = bp.quantize(torch.compile(inside, backend="eager"), data, bits=4)
    assert report.grids.keys() == expected.grids.keys()
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in inside.state_dict().items())
