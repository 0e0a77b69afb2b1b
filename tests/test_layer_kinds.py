"""All kinds of layers times all that looks into their weights: each pair works, or is left with the reason listed here.

The oracle knows nothing of kinds: which input and which output channel each weight stands for is seen from the stock
forward, by its derivatives. Whoever adds a kind adds a case, and finds here what looks into weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.errors import UnsupportedModelError
from bayesprune.estimators import as_gaussian
from bayesprune.foundation import noise
from bayesprune.foundation.kinds import NORM, STOCK_KINDS, UNKNOWN, LayerKind, kind_of
from bayesprune.laplace.diagonal import sums_of_squares
from bayesprune.laplace.matrices import input_rows, is_matrix_product, output_rows, to_matrix
from bayesprune.layers import VariationalLayer, register_layer, registered_types
from bayesprune.priors import ARD
from bayesprune.prune.scores.channels import per_channel_sums
from bayesprune.reports.layers import layer_sizes
from bayesprune.train.kl import bind_prior

WIDTH = 8


class Plain(nn.Module):
    """A linear layer of weight (I, O) that derives from no layer of torch and says its kind."""

    layer_kind = LayerKind("plain", output_dim=1, input_dim=0)

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Conv1D(nn.Module):
    """A linear layer like transformers' `Conv1D`, known by its sizes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.nx, self.nf = inputs, outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Silent(nn.Module):
    """A linear layer of weight (O, I) that says nothing of its kind."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Table(nn.Embedding):
    """A table of vectors."""


@dataclass(frozen=True)
class Case:
    """A layer of WIDTH inputs.

    Attributes:
        name: What the case is called.
        build: build(inputs, outputs) gives the layer.
        shape: Of an input of one example behind the channels, or before them where `is_last`.
        is_last: Whether channels are the last dimension.
        is_table: Whether the inputs are numbers of entries.
        num_outputs: Its outputs.
    """

    name: str
    build: Callable[[int, int], nn.Module]
    shape: tuple[int, ...] = ()
    is_last: bool = False
    is_table: bool = False
    num_outputs: int = 12

    def layer(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build(WIDTH, self.num_outputs).double()

    def input(self, number: int = 5) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        if self.is_table:
            return torch.randint(WIDTH, (number, 3), generator=generator)
        shape = (number, *self.shape, WIDTH) if self.is_last else (number, WIDTH, *self.shape)
        return torch.randn(shape, generator=generator).double()

    @property
    def channel_dim(self) -> int:
        return -1 if self.is_last or not self.shape else 1

    def variational(self, std: str = "per_weight") -> nn.Module:
        layer = bp.to_variational(self.layer(), std=std)
        for name, part in layer.named_parameters():
            if name.endswith("log_std"):
                part.data += 0.3 * torch.randn_like(part)
        return layer

    def net(self) -> nn.Sequential:
        """The layer between layers that keep positions apart; a table is the first."""
        torch.manual_seed(0)
        pointwise = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}.get(0 if self.is_last else len(self.shape))
        linear = partial(pointwise, kernel_size=1) if pointwise else nn.Linear
        front, back = linear(WIDTH, WIDTH), linear(self.num_outputs, WIDTH)
        layer = self.build(WIDTH, self.num_outputs)
        parts = (layer, nn.ReLU(), back) if self.is_table else (front, nn.ReLU(), layer, nn.ReLU(), back)
        return nn.Sequential(*parts).double()

    def outputs(self, layer: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
        """Outputs (channels, others) as a function of the weight, by the stock forward."""

        def function(weight: Tensor) -> Tensor:
            output = torch.func.functional_call(layer, {"weight": weight}, (x,))
            return output.movedim(-1 if self.is_table else self.channel_dim, 0).flatten(1)

        return function

    @cached_property
    def channels(self) -> tuple[Tensor, Tensor]:
        """The input and the output channel of each weight, in the weight's shape."""
        layer = self.layer()
        weight = layer.weight.detach()
        inputs, outputs = torch.full(weight.shape, -1), torch.full(weight.shape, -1)
        for channel in range(WIDTH):
            if self.is_table:
                x = torch.tensor([[channel]])
            else:
                x = torch.zeros_like(self.input(2))
                x.select(self.channel_dim, channel).normal_()
            jacobian = torch.autograd.functional.jacobian(self.outputs(layer, x), weight)
            met = (jacobian != 0).any(1)  # (outputs, *weight)
            assert (met.sum(0) <= 1).all(), "a weight has one output channel"
            inputs[met.any(0)] = channel
            outputs[met.any(0)] = met.int().argmax(0)[met.any(0)]
        assert inputs.min() == outputs.min() == 0, "the case's input reaches every weight"
        return inputs, outputs


CASES = [
    Case("linear", nn.Linear),
    Case("linear_of_tokens", nn.Linear, shape=(3,), is_last=True),
    Case("conv1d_of_gpt2", Conv1D),
    Case("own", Plain),
    Case("silent", Silent),
    Case("conv1d", lambda i, o: nn.Conv1d(i, o, 3, padding=1), shape=(4,)),
    Case("conv2d", lambda i, o: nn.Conv2d(i, o, 2, padding=1), shape=(3, 3)),
    Case("conv3d", lambda i, o: nn.Conv3d(i, o, (1, 2, 1)), shape=(2, 3, 2)),
    Case("grouped", lambda i, o: nn.Conv2d(i, o, 3, padding=1, groups=2), shape=(3, 3)),
    Case("depthwise", lambda i, o: nn.Conv2d(i, o, 3, padding=1, groups=i), (3, 3), num_outputs=WIDTH),
    Case("transposed1d", lambda i, o: nn.ConvTranspose1d(i, o, 3), shape=(3,)),
    Case("transposed2d", lambda i, o: nn.ConvTranspose2d(i, o, 2, stride=2), shape=(2, 2)),
    Case("transposed3d", lambda i, o: nn.ConvTranspose3d(i, o, 2), shape=(2, 2, 2)),
    Case("grouped_transposed", lambda i, o: nn.ConvTranspose2d(i, o, 2, groups=2), shape=(2, 2)),
    Case("table", Table, is_table=True),
]
CONSUMERS: dict[str, Callable[[Case], str | None]] = {}
NOT_LINEAR = "no linear layer or convolution"
LEFT = {
    ("prune_weights_of_a_pattern", "depthwise"): "1 inputs are not a multiple of 4",
    ("prune_weights_of_a_pattern", "table"): "a lookup table",
    ("matrix", "silent"): NOT_LINEAR,
    ("matrix", "table"): NOT_LINEAR,
    **{("matrix", name): NOT_LINEAR for name in ("transposed1d", "transposed2d", "transposed3d", "grouped_transposed")},
    ("local_reparameterization", "table"): "weight sampling",
    ("prune_channels", "silent"): "left whole",
    ("prune_channels", "table"): "left whole",
    ("prune_channels", "grouped_transposed"): "left whole",
    ("dependency_groups", "silent"): "does not read the same",
    ("dependency_groups", "table"): "it is an output of the model",
    ("dependency_groups", "grouped_transposed"): "a grouped transposed convolution",
}
"""What is refused or left, with the words that say why."""


def consumer(function: Callable[[Case], str | None]) -> Callable[[Case], str | None]:
    """Lists a function that checks one use of a case's layer, or returns the reason that is given for leaving it."""
    CONSUMERS[function.__name__] = function
    return function


def oracle_sums(values: Tensor, channels: Tensor) -> Tensor:
    sums = torch.zeros(int(channels.max()) + 1, dtype=values.dtype)
    return sums.index_add(0, channels.flatten(), values.flatten())


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


@consumer
def layout(case: Case) -> None:
    kind, weight, (inputs, outputs) = kind_of(case.layer()), case.layer().weight, case.channels
    if kind is UNKNOWN:
        assert kind.unit_dims == (0,)
        assert kind.input_dims == (1,)
    assert kind.sizes(weight.shape) == (WIDTH, case.num_outputs)
    rows, columns = kind.matrices(outputs), kind.matrices(inputs)
    assert (rows == rows[..., :1]).all(), "a row of a matrix is one output's"
    assert (columns == columns[:, :1]).all(), "a column of a matrix is one input's"
    assert len(rows) == kind.num_groups
    assert torch.equal(kind.from_matrices(kind.matrices(weight), weight.shape), weight)
    x = case.input()
    assert case.layer()(x).shape[-1 if case.is_table else kind.feature_dim] == case.num_outputs
    assert case.is_table or x.shape[kind.feature_dim] == WIDTH
    assert kind_of(case.variational()) == kind


@consumer
def sums_by_channel(case: Case) -> None:
    layer, (inputs, outputs) = case.variational(), case.channels
    values = torch.rand(layer.weight.shape).double()
    torch.testing.assert_close(per_channel_sums(layer, values, into_inputs=True), oracle_sums(values, inputs))
    torch.testing.assert_close(per_channel_sums(layer, values, into_inputs=False), oracle_sums(values, outputs))


@consumer
def stds(case: Case) -> None:
    """A std of `per_channel` has one output; `rank_one` has parts of one output and of one input of each group."""
    inputs, outputs = case.channels
    layer = case.variational("per_channel")
    assert has_one(layer.weight_log_std, outputs)
    layer = case.variational("rank_one")
    groups = kind_of(layer).num_groups
    row, column = layer.weight_row_log_std, layer.weight_column_log_std
    assert has_one(row, outputs) or has_one(row, outputs % (case.num_outputs // groups))
    assert has_one(column, inputs) or has_one(column, inputs % (WIDTH // groups))


def has_one(part: Tensor, channels: Tensor) -> bool:
    """Whether all weights of one entry of a broadcastable part have one channel."""
    numbers = torch.arange(part.numel()).view(part.shape).expand(channels.shape).flatten()
    return all(len(channels.flatten()[numbers == number].unique()) == 1 for number in numbers.unique())


def exact_variance(case: Case, layer: nn.Module, x: Tensor) -> Tensor:
    stock = case.layer()
    bias = layer.posteriors().get("bias")
    std = layer.posteriors()["weight"].std.double().expand(layer.weight.shape)
    jacobian = torch.autograd.functional.jacobian(case.outputs(stock, x), layer.weight.detach())
    variance = (jacobian.square() * std.square()).flatten(2).sum(2)
    return variance if bias is None else variance + bias.std.double().square().view(-1, 1)


@consumer
def moments(case: Case) -> None:
    layer, x = case.variational("rank_one"), case.input(2)
    with bp.sampling(layer, "moments"):
        variance = layer(x).variance
    found = variance.movedim(-1 if case.is_table else case.channel_dim, 0).flatten(1)
    torch.testing.assert_close(found, exact_variance(case, layer, x))


@consumer
def local_reparameterization(case: Case) -> str | None:
    """With ones in place of normal numbers the noise is the std; a table is drawn, whatever the estimator."""
    layer, x = case.variational("rank_one").train(), case.input(2)
    mean = case.layer()(x)
    with torch.no_grad(), bp.sampling(layer, "local_reparameterization"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "normal", lambda shape, *, device, dtype, seed=None: torch.ones(shape, dtype=dtype))
        patch.setattr(noise, "multiplied", lambda values, seed, out=None: values if out is None else out.copy_(values))
        std = layer(x) - mean
        if layer.running_estimator(x) == "weight_sampling":
            return "weight sampling"
    found = std.movedim(case.channel_dim, 0).flatten(1).square()
    torch.testing.assert_close(found, exact_variance(case, layer, x))
    return None


@consumer
def prune_weights(case: Case) -> None:
    layer = case.variational()
    (ratio,) = [value for name, value in bp.signal_to_noise(layer).items() if name == "weight"]
    bp.prune_weights(layer, "weights=0.5")
    kept = layer.weight != 0
    assert int(kept.sum()) == kept.numel() // 2
    assert ratio[kept].min() >= ratio[~kept].max()


@consumer
def prune_weights_of_a_pattern(case: Case) -> str | None:
    """Of every four inputs in a row, two of each output and tap are kept."""
    layer, (inputs, outputs) = case.variational(), case.channels
    report = bp.prune_weights(layer, "2:4")
    if note := report.rows[0].note:
        assert layer.weight.all()
        return note
    per_group = len(inputs[outputs == 0].unique())
    blocks = inputs % per_group // 4
    for output in range(case.num_outputs):
        for block in range(per_group // 4):
            here = (outputs == output) & (blocks == block)
            assert int((layer.weight != 0)[here].sum()) * 2 == int(here.sum())
    return None


@consumer
def matrix(case: Case) -> str | None:
    """The matrix times the rows of inputs is the output; what `fit_kronecker` and one-shot pruning stand on."""
    layer, x = case.variational().eval(), case.input()
    if not is_matrix_product(layer):
        with pytest.raises(UnsupportedModelError) as refused:
            bp.laplace.fit_kronecker(layer, [(x, layer(x).detach())], loss=loss)
        return str(refused.value)
    product = torch.einsum("ntgc,grc->ntgr", input_rows(layer, x, len(x)), to_matrix(layer, layer.weight))
    bias = 0 if layer.bias is None else layer.bias.view(kind_of(layer).num_groups, -1)
    torch.testing.assert_close(product + bias, output_rows(layer, layer(x), len(x)))
    (factors,) = bp.laplace.fit_kronecker(layer, [(x, layer(x).detach())], loss=loss).values()
    assert factors.mean.shape[:2] == to_matrix(layer, layer.weight).shape[:2]
    return None


@consumer
def laplace(case: Case) -> None:
    """Sums of squared gradients, example by example."""
    layer, x = case.variational(), case.input()
    targets = torch.randn_like(layer.eval()(x))
    squares, seen = sums_of_squares(layer, [(x, targets)], loss=loss)
    stock, expected = case.layer(), torch.zeros_like(layer.weight)
    for example, target in zip(x, targets, strict=True):
        (gradient,) = torch.autograd.grad(loss(stock, (example[None], target[None])), stock.weight)
        expected += gradient.square()
    assert seen == len(x)
    torch.testing.assert_close(squares["weight"], expected, check_dtype=False)


@consumer
def automatic_relevance(case: Case) -> None:
    """A scale by input is the root mean square of this input's weights, drawn ones included."""
    layer, (inputs, outputs) = case.variational(), case.channels
    mean, std = as_gaussian(layer.posterior("weight"))
    squares, ones = (mean.square() + std.square()).detach(), torch.ones_like(mean)
    for sharing, channels in (("input_channel", inputs), ("channel", outputs)):
        bound = bind_prior(layer, ARD(sharing))
        (posterior,) = [posterior for posterior in bound if posterior.parameter == "weight"]
        variance = bound[posterior].variance(posterior.mean, posterior.log_std).expand(mean.shape)
        if sharing == "channel" and len(kind_of(layer).unit_dims) > 1:
            assert has_one(bound[posterior].variance(posterior.mean, posterior.log_std), channels)
            continue  # of grouped transposed convolutions: each input and output of a group
        expected = (oracle_sums(squares, channels) / oracle_sums(ones, channels))[channels]
        torch.testing.assert_close(variance, expected, check_dtype=False)


@consumer
def report(case: Case) -> None:
    for layer in (case.layer(), case.variational()):
        (row,) = layer_sizes(nn.Sequential(layer), {"0": 7})
        assert (row.channels, row.type) == (case.num_outputs, type(case.layer()).__name__)
        assert row.parameters == sum(parameter.numel() for parameter in case.layer().parameters())


@consumer
def prune_channels(case: Case) -> str | None:
    """Channels that make nothing, one of each half, leave both sides, and the net computes the same."""
    net, x = case.net(), case.input()
    layer, front, back = net[0 if case.is_table else 2], net[0], net[-1]
    ends = [[1, size // 2 + 1] for size in (WIDTH, case.num_outputs)]
    for channels, gone in zip(case.channels, ends, strict=True):
        layer.weight.data[torch.isin(channels, torch.tensor(gone))] = 0
    back.weight.data[:, ends[1]] = 0
    for dead, gone in ((front, ends[0]), (layer, ends[1])):
        if getattr(dead, "bias", None) is not None:
            dead.bias.data[gone] = 0
    if front is not layer:
        front.weight.data[ends[0]] = 0
    expected = bp.to_variational(net).eval()(x)
    bp.prune_channels(net, x, "snr=0.01")
    torch.testing.assert_close(net(x), expected)
    sizes = kind_of(layer).sizes(layer.weight.shape)
    if sizes == (WIDTH, case.num_outputs):
        return "left whole"
    assert sizes == (WIDTH - 2, case.num_outputs - 2)
    return None


@consumer
def storage(case: Case) -> None:
    net = case.variational()
    x = case.input()
    bp.prune_weights(net, "weights=0.5")
    bp.save(net, "saved")
    torch.testing.assert_close(bp.load("saved", model=case.layer())(x), net.eval()(x), rtol=0, atol=0)


@consumer
def dependency_groups(case: Case) -> str | None:
    """The units of a group are the channels that the oracle sees along the parameter's dimension."""
    index = 0 if case.is_table else 2
    try:
        groups = bp.prune.dependency_groups(case.net(), case.input())
    except ValueError as error:
        return str(error)
    members = [m for group in groups for m in group.members if m.parameter == f"{index}.weight"]
    for member in members:
        shape = [-1 if dim == member.dim else 1 for dim in range(case.channels[0].dim())]
        units, count = torch.tensor(member.units).view(shape), max(member.units) + 1
        assert any((units.expand(channels.shape) == channels % count).all() for channels in case.channels)
    return None if len(members) == (1 if case.name == "depthwise" else 2) else "left whole"


@pytest.fixture(scope="module", autouse=True)
def own_layers():
    """Registers the layers of this file, and forgets them."""
    from bayesprune.layers import base

    before = dict(base._REGISTERED)
    for stock in (Plain, Silent, Conv1D, Table):
        register_layer(stock)(type(f"Variational{stock.__name__}", (VariationalLayer, stock), {"__doc__": "."}))
    yield
    base._REGISTERED.clear()
    base._REGISTERED.update(before)
    base.variational_type.cache_clear()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", CONSUMERS)
def test_every_kind_with_every_consumer(name, case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reason, expected = CONSUMERS[name](case), LEFT.get((name, case.name))
    assert (reason is None) == (expected is None), reason
    assert expected is None or expected in str(reason)


def test_every_stock_kind_and_every_registered_type_has_a_case():
    layers = [case.layer() for case in CASES]
    own = nn.MultiheadAttention  # a module of several projections, without a weight of its own
    stock = [
        kind
        for kind, record in STOCK_KINDS.items()
        if record is not NORM and kind not in (nn.GroupNorm, nn.EmbeddingBag)
    ]
    registered = [kind for kind in registered_types() if kind.__module__.startswith("torch.") and kind != own]
    for type_ in (*stock, *registered):
        assert any(isinstance(layer, type_) for layer in layers), f"{type_.__name__} has no case here"


def test_reasons_name_pairs_that_there_are():
    assert {name for name, _ in LEFT} <= set(CONSUMERS)
    assert {name for _, name in LEFT} <= {case.name for case in CASES}


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Embedding(3, 2), "not a registered type"),
        (nn.EmbeddingBag(3, 2), "not a registered type"),
        (nn.Bilinear(3, 2, 4), "not a registered type"),
        (nn.LSTM(3, 2), "recurrent"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_without_a_posterior_are_listed_with_the_reason(layer, reason):
    rows = bp.conversion_table(nn.Sequential(layer, nn.Linear(2, 2)))
    assert reason in next(row.reason for row in rows if row.name == "0")
