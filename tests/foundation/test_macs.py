import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bayesprune import to_variational
from bayesprune.foundation.macs import macs_by_module
from bayesprune.foundation.model import eval_mode, run_forward


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Linear(4, 3), (2, 5, 4), 2 * 5 * 4 * 3),
        (nn.Linear(4, 3, bias=False), (2, 4), 2 * 4 * 3),
        (nn.Conv2d(4, 6, 3), (2, 4, 5, 5), 2 * 9 * 6 * 4 * 9),
        (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5), 2 * 9 * 6 * 2 * 9),
        (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5), 2 * 9 * 4 * 9),
        (nn.Conv1d(4, 6, 3), (2, 4, 5), 2 * 3 * 6 * 4 * 3),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 3, 3), 2 * 9 * 4 * 6 * 4),
    ],
)
@pytest.mark.parametrize("variational", [False, True])
def test_layers_count_what_the_textbook_says(layer, shape, expected, variational):
    model = nn.Sequential(layer)
    assert macs_by_module(to_variational(model) if variational else model, torch.randn(shape)) == {"0": expected}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)


def test_products_of_attention_stand_under_its_own_name():
    model = nn.Sequential(nn.Linear(3, 8), Attention())
    expected = {"0": 5 * 3 * 8, "1.qkv": 5 * 8 * 24, "1": 2 * 2 * 5 * 5 * 4}
    assert macs_by_module(model, torch.randn(1, 5, 3)) == expected


def test_attention_of_torch_counts_although_it_has_a_fast_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    projections, products = 4 * 5 * 8 * 8, 2 * 2 * 5 * 5 * 4
    expected = {"self_attn": projections + products, "linear1": 5 * 8 * 16, "linear2": 5 * 16 * 8}
    assert macs_by_module(layer, torch.randn(1, 5, 8)) == expected
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_module_that_runs_twice_counts_twice():
    shared = nn.Linear(4, 4)
    assert macs_by_module(nn.Sequential(shared, nn.Sequential(shared, nn.ReLU())), torch.randn(1, 4)) == {"0": 32}


def test_views_of_parameters_do_not_disturb():
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.layer = nn.Parameter(torch.randn(1, 1, 4)), nn.Linear(4, 2)

        def forward(self, x):
            return self.layer(self.token.expand(len(x), -1, -1))

    assert macs_by_module(Token(), torch.randn(3, 4)) == {"layer": 3 * 4 * 2}


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout())
    model[0].weight.requires_grad_(False)
    model[2].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    macs_by_module(model, torch.randn(2, 3, 4, 4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == [True, True, True, False]
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, True, True, True]
    with pytest.raises(RuntimeError):
        macs_by_module(model, torch.randn(2, 5, 4, 4))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model[0].weight.requires_grad is False
    assert model.training


def test_inputs_come_in_three_forms():
    model = nn.Bilinear(2, 3, 4)
    x, y = torch.randn(1, 2), torch.randn(1, 3)
    assert torch.equal(run_forward(model, (x, y)), run_forward(model, {"input1": x, "input2": y}))
    assert run_forward(nn.Linear(2, 4), x).shape == (1, 4)


def test_eval_mode_comes_back_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Dropout())
    model[1].eval()
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    with pytest.raises(KeyError), eval_mode(model):
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False]
