import copy

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.errors import UnsupportedModelError
from bayesprune.laplace.inputs import Stage, input_moments, stages
from bayesprune.laplace.matrices import input_rows


class Attention(nn.Module):
    """Three layers that read one tensor, one that reads what they give, and one that does not run."""

    def __init__(self):
        super().__init__()
        self.last, self.unused = nn.Linear(4, 2), nn.Linear(4, 4)
        self.query, self.key, self.value = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

    def forward(self, input_ids, attention_mask=None):
        weights = (self.query(input_ids) @ self.key(input=input_ids).mT).softmax(-1)
        return self.last(weights @ self.value(input_ids))


def layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, bp.layers.VariationalLayer)}


def test_layers_come_in_the_order_of_the_forward_and_those_that_read_one_tensor_together():
    model = bp.to_variational(Attention().double())
    batch = {"input_ids": torch.randn(3, 5, 4, dtype=torch.float64)}
    found = stages(model, layers(model), batch)
    assert found == [Stage(("query", "key"), 1), Stage(("value",), 1), Stage(("last",), 1)]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_moments_count_the_positions_that_the_mask_leaves():
    torch.manual_seed(0)
    before = bp.to_variational(Attention().double()).eval()
    after = copy.deepcopy(before)
    after.value.weight.data.mul_(0.5)
    batches = [
        {
            "input_ids": torch.randn(3, 5, 4, dtype=torch.float64),
            "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1] * 5, [1, 0, 0, 0, 0]]),
        }
        for _ in range(2)
    ]
    read = [[], []]
    for model, inputs in zip((before, after), read, strict=True):
        hook = model.last.register_forward_pre_hook(lambda _, args, to=inputs: to.append(args[0].detach()))
        for batch in batches:
            model(**batch)
        hook.remove()
    kept = torch.cat([batch["attention_mask"] for batch in batches]).bool()
    x, y = (torch.cat(inputs)[kept] for inputs in read)
    x, y = (torch.cat([its, its.new_ones(9 * 2, 1)], 1) for its in (x, y))
    moments = input_moments(after, before, Stage(("last",), 1), batches, with_bias=True)
    torch.testing.assert_close(moments.second[0], y.T @ y / 18)
    torch.testing.assert_close(moments.cross[0], x.T @ y / 18)


def test_the_regressed_weights_give_what_was_given_before():
    torch.manual_seed(1)
    layer = bp.to_variational(nn.Conv2d(4, 6, 2, groups=2).double()).eval()
    before = nn.Sequential(nn.Conv2d(3, 4, 1).double(), layer)
    after = copy.deepcopy(before)
    after[0].weight.data.mul_(torch.rand(4, 1, 1, 1) + 0.5)
    x = torch.randn(50, 3, 4, 4, dtype=torch.float64)
    moments = input_moments(after, before, Stage(("1",), 1), [x[:20], x[20:]], with_bias=True)
    mean = torch.cat([layer.weight.reshape(2, 3, 8), layer.bias.reshape(2, 3, 1)], 2).detach()
    found, precision = moments.regressed(mean, 0)
    rows = input_rows(layer, after[0](x), 50).flatten(0, 1).transpose(0, 1).detach()
    rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)
    target = before(x).detach().movedim(1, -1).reshape(-1, 2, 3).transpose(0, 1)
    torch.testing.assert_close(found.mT, torch.linalg.lstsq(rows, target).solution)
    torch.testing.assert_close(precision, rows.mT @ rows / rows.shape[1])
    held, _ = moments.regressed(mean, 1e6)
    torch.testing.assert_close(held, mean, rtol=1e-4, atol=1e-4)


def test_a_layer_that_runs_several_times_counts_all_of_them():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3, bias=False)

        def forward(self, x):
            return self.layer(self.layer(x))

    model = bp.to_variational(Twice()).eval()
    x = torch.randn(20, 3)
    (stage,) = stages(model, layers(model), x)
    assert stage.num_runs == 2
    rows = torch.cat([x, model.layer(x)]).double()
    moments = input_moments(model, model, stage, [x], with_bias=False)
    torch.testing.assert_close(moments.second[0], rows.T @ rows / 40, rtol=1e-5, atol=1e-6)


def test_refuses_positions_that_depend_on_the_weights():
    class Chooses(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            x = self.first(x)
            return self.last(x[:, x[0, :, 0] > 0])

    before = bp.to_variational(Chooses()).eval()
    after = copy.deepcopy(before)
    before.first.bias.data[0], after.first.bias.data[0] = 100, -0.1
    with pytest.raises(UnsupportedModelError, match="what it reads depends on the weights"):
        input_moments(after, before, Stage(("last",), 1), [torch.randn(1, 40, 3)], with_bias=True)
