import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian

import bayesprune as bp
from bayesprune.errors import UnsupportedModelError
from bayesprune.foundation.kinds import LayerKind, kind_of
from bayesprune.laplace import (
    condition_on_channels,
    condition_on_zeros,
    cross_entropy,
    fit_kronecker,
    set_marginal_stds,
)
from bayesprune.laplace.matrices import from_matrix, is_matrix_product, to_matrix
from bayesprune.layers import VariationalLayer, register_layer
from tests.cases import LAYERS, Tied, structures

MATRICES = [
    case
    for case in LAYERS
    if "transposed" not in case.name and case.name not in ("linear_one_example", "conv2d_one_image")
]
cases = pytest.mark.parametrize("case", MATRICES, ids=lambda case: case.name)


def loss(model, batch):
    return model(batch[0]).flatten(1).square().sum(1).mean()


@cases
def test_factors_are_the_products_of_what_the_weight_meets(case):
    """Inputs are read off the layer's Jacobian; the loss sum y^2 has the gradient 2 y at an output y."""
    layer, x = bp.to_variational(case.layer()).eval(), case.input()
    factors = fit_kronecker(layer, [(x, x)], loss=loss)[""]
    weight, has_bias = layer.weight.detach(), layer.bias is not None
    num_groups, num_rows, num_columns = to_matrix(layer, weight).shape
    inputs = torch.zeros(num_groups, num_columns + has_bias, num_columns + has_bias, dtype=torch.float64)
    outputs = torch.zeros(num_groups, num_rows, num_rows, dtype=torch.float64)
    num_positions = 0
    for example in x:
        output = (
            layer(example[None])[0].detach().movedim(kind_of(layer).feature_dim, -1).reshape(-1, num_groups, num_rows)
        )

        def run(weight, example=example):
            output = layer.operation(example[None], weight, layer.bias)
            return output.movedim(kind_of(layer).feature_dim, -1).flatten(0, -2)

        by_weight = jacobian(run, weight)  # (T, O, *weight)
        num_positions += len(output)
        for position, values in enumerate(output):
            for group in range(num_groups):
                row = to_matrix(layer, by_weight[position, group * num_rows])[group, 0]
                row = torch.cat([row, row.new_ones(1)]) if has_bias else row
                inputs[group] += row.outer(row)
                outputs[group] += (2 * values[group]).outer(2 * values[group])
    torch.testing.assert_close(factors.inputs[0], inputs / num_positions)
    torch.testing.assert_close(factors.outputs[0], outputs / len(x))
    assert torch.equal(from_matrix(layer, factors.mean[..., :num_columns]), weight)


def test_marginals_are_the_diagonal_of_the_inverse_of_the_joint_precision():
    torch.manual_seed(1)
    layer = bp.to_variational(nn.Linear(3, 2)).double()
    batches = [(torch.randn(9, 3, dtype=torch.float64), torch.randint(2, (9,)))]
    prior = bp.priors.Gaussian(0.5)
    factors = fit_kronecker(layer, batches, num_data=70, loss=cross_entropy, prior=prior)[""]
    inputs, outputs = factors.inputs[0][0], factors.outputs[0][0]
    p = (inputs.trace() / 4 / (outputs.trace() / 2)).sqrt()
    eye = torch.eye(4, dtype=torch.float64)
    precision = torch.kron(70**0.5 * outputs + 2 / p * eye[:2, :2], 70**0.5 * inputs + 2 * p * eye)
    torch.testing.assert_close(factors.variance().flatten(), precision.inverse().diagonal())
    exact = 70 * torch.kron(outputs, inputs) + 4 * torch.eye(8, dtype=torch.float64)
    assert (precision.diagonal() >= exact.diagonal()).all(), "the factored damping adds more than the prior"


@structures
def test_marginal_stds_fit_and_are_exact_for_rank_one(std):
    torch.manual_seed(1)
    model = bp.to_variational(nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Linear(12, 3, bias=False)), std=std)
    batches = [(torch.randn(30, 2, 3, 3), torch.randint(3, (30,)))]
    posterior = fit_kronecker(model, batches)
    assert set_marginal_stds(model, posterior) is model
    for name, factors in posterior.items():
        layer, std_of_weights = model.get_submodule(name), factors.variance().sqrt()
        if name == "0":
            torch.testing.assert_close(layer.bias_log_std.exp(), std_of_weights[0, :, -1].float())
            std_of_weights = std_of_weights[..., :-1]
        found, expected = layer.posteriors()["weight"].std, from_matrix(layer, std_of_weights).float()
        if std == "per_weight" or (std == "rank_one" and name == "2"):
            torch.testing.assert_close(found.expand_as(expected), expected)
        else:  # one std for the taps of a kernel: their mean precision
            mean_ratio = (found / expected).square().flatten(1).mean(1)
            torch.testing.assert_close(mean_ratio, torch.ones(len(mean_ratio)))


def test_blocks_are_those_along_the_diagonal():
    model = bp.to_variational(nn.Linear(5, 3))
    batches = [(torch.randn(20, 5), torch.randint(3, (20,)))]
    whole, blocks = (fit_kronecker(model, batches, loss=cross_entropy, block_size=size)[""] for size in (1024, 4))
    assert [block.shape for block in blocks.inputs] == [(1, 4, 4), (1, 2, 2)]
    torch.testing.assert_close(blocks.inputs[0], whole.inputs[0][:, :4, :4])
    torch.testing.assert_close(blocks.inputs[1], whole.inputs[0][:, 4:, 4:])
    torch.testing.assert_close(blocks.outputs[0], whole.outputs[0])
    assert blocks.variance().shape == whole.variance().shape
    with pytest.raises(ValueError, match="block_size is 0"):
        fit_kronecker(model, batches, block_size=0)


def test_layers_that_are_no_matrix_product_are_left_out():
    model = bp.to_variational(nn.Sequential(nn.Conv2d(1, 2, 2), nn.ConvTranspose2d(2, 2, 2), nn.Flatten()))
    batches = [(torch.randn(4, 1, 3, 3), torch.randint(18, (4,)))]
    assert list(fit_kronecker(model, batches)) == ["0"]
    assert not is_matrix_product(model[1])
    with pytest.raises(UnsupportedModelError, match="fit_laplace takes other layers"):
        fit_kronecker(nn.Sequential(model[1], nn.Flatten()), [(torch.randn(4, 2, 2, 2), torch.randint(18, (4,)))])


def test_a_tied_weight_has_one_posterior_and_no_bias_in_it():
    model = bp.to_variational(Tied(nn.Linear(4, 4), nn.Linear(4, 4))).double().eval()
    x = torch.randn(6, 4, dtype=torch.float64)
    ((name, factors),) = fit_kronecker(model, [(x, x)], loss=loss).items()
    assert name == "first"
    second = model.first(x).detach()
    torch.testing.assert_close(factors.inputs[0][0], (x.T @ x + second.T @ second) / 12)


class Transposed(nn.Module):
    """A linear layer of weight (I, O), as GPT-2's."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


@register_layer(Transposed)
class VariationalTransposed(VariationalLayer, Transposed):
    layer_kind = LayerKind(output_dim=1, input_dim=0)


def test_a_transposed_linear_layer_is_a_linear_layer():
    layer, linear = Transposed(4, 3), nn.Linear(4, 3)
    linear.weight.data, linear.bias.data = layer.weight.data.T.clone(), layer.bias.data.clone()
    x = torch.randn(20, 4)
    keep = torch.rand(3, 4) > 0.5
    for each, mask in ((layer, keep.T), (linear, keep)):
        posterior = fit_kronecker(bp.to_variational(each), [(x, x)], loss=loss)
        set_marginal_stds(each, posterior)
        each.set_mask("weight", mask.contiguous())
        condition_on_zeros(each, posterior)
        condition_on_channels(each, posterior, {"": [2]})
    torch.testing.assert_close(layer.weight.T, linear.weight)
    torch.testing.assert_close(layer.weight_log_std.T, linear.weight_log_std)
    assert not layer.weight[2].any()


def test_drawn_positions_stand_for_all():
    torch.manual_seed(0)
    model = bp.to_variational(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 1)))
    batches = [(x, x) for x in torch.randn(4, 16, 2, 34, 34)]
    whole, drawn = (fit_kronecker(model, batches, loss=loss, num_positions=each) for each in (None, 128))
    for name, factors in whole.items():
        for expected, found in zip(
            factors.inputs + factors.outputs, drawn[name].inputs + drawn[name].outputs, strict=True
        ):
            assert float((found - expected).norm() / expected.norm()) < 0.12
            assert not torch.equal(found, expected)
    every = fit_kronecker(model, batches, loss=loss, num_positions=10**9)
    assert torch.equal(every["0"].inputs[0], whole["0"].inputs[0])


def test_drawn_positions_need_to_know_how_many_batches_there_are():
    model = bp.to_variational(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="a generator has none"):
        fit_kronecker(model, ((torch.randn(4, 2), torch.zeros(4, dtype=torch.long)) for _ in range(2)), num_positions=8)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, inputs: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return (self.layer(inputs) * attention_mask[..., None]).sum(1)


def test_what_stands_at_masked_positions_does_not_count():
    torch.manual_seed(0)
    model = bp.to_variational(Tokens())
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    inputs = torch.randn(2, 3, 3)
    found = []
    for padding in (0.0, 50.0):
        torch.manual_seed(1)
        batch = {"inputs": inputs.where(mask[..., None].bool(), padding), "attention_mask": mask}
        found.append(fit_kronecker(model, [batch])["layer"])
    assert torch.equal(found[0].inputs[0], found[1].inputs[0])
    rows = torch.cat([inputs[mask.bool()], torch.ones(3, 1)], dim=1).double()
    torch.testing.assert_close(found[0].inputs[0][0], rows.T @ rows / 3)


def test_padding_leaves_drawn_positions_as_they_are():
    torch.manual_seed(0)
    model = bp.to_variational(Tokens())
    inputs = torch.randn(32, 64, 3)
    found = []
    for num_positions in (6, 64):
        torch.manual_seed(1)
        mask = (torch.arange(num_positions) < 6).long().expand(32, -1)
        batch = {"inputs": inputs[:, :num_positions], "attention_mask": mask}
        found.append(fit_kronecker(model, [batch], num_positions=16)["layer"])
    torch.testing.assert_close(found[0].inputs[0], found[1].inputs[0])
    torch.testing.assert_close(found[0].outputs[0], found[1].outputs[0])


def test_a_mask_that_hides_everything_is_refused():
    batch = {"inputs": torch.randn(2, 3, 3), "attention_mask": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match="hides all positions at which layer runs"):
        fit_kronecker(bp.to_variational(Tokens()), [batch])


def test_a_layer_that_meets_no_row_is_left_out():
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.cat([x, self.expert(x[:0])]))

    assert list(fit_kronecker(bp.to_variational(Routed()), [torch.randn(4, 3)])) == ["last"]


def test_a_norm_behind_two_layers_takes_up_no_shift():
    class TwoIntoOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(2, 3, 1, bias=False), nn.Conv2d(2, 3, 1, bias=False)
            self.norm, self.own = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.third = nn.Conv2d(3, 3, 1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.own(self.third(self.norm(self.first(x)) + self.norm(self.second(x)).relu())).mean((2, 3))

    posterior = fit_kronecker(bp.to_variational(TwoIntoOne().eval()), [torch.randn(8, 2, 3, 3)])
    assert [posterior[name].norm for name in ("first", "second", "third")] == [None, None, "own"]


def test_inputs_that_are_not_finite_are_refused():
    x = torch.randn(6, 3)
    x[1, 2] = float("inf")
    with pytest.raises(ValueError, match="inputs, outputs or gradients of the model are not finite"):
        fit_kronecker(bp.to_variational(nn.Linear(3, 2)), [(x, x)], loss=loss)
