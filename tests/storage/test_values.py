"""Attributes that are no tensors and no modules: which come back, and as what."""

import dataclasses
import functools
import json
import logging
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.errors import StorageError
from bayesprune.storage.values import decode, encode, is_encoded, is_plain, is_same
from tests.storage.sealing import rewrite

NUMBERS = [np.float32(0.1), np.float64("nan"), np.int64(2**40), np.bool_(True), torch.tensor(0.1), torch.tensor(True)]
NUMBERS += [torch.tensor(0.3, dtype=torch.bfloat16), [1, (2.5, np.uint8(7)), "text", None], float("-inf")]


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_plain_values_keep_type_and_value(value):
    found = json.loads(json.dumps(encode(value)))
    assert is_plain(value)
    assert is_encoded(found)
    again = decode(found)
    assert type(again) is type(value)
    assert is_same(again, value)
    assert getattr(again, "dtype", None) == getattr(value, "dtype", None)


@pytest.mark.parametrize(
    "value",
    [
        {"numpy": ["float32"]},
        {"numpy": ["complex64", 1]},
        {"numpy": ["int8", 300]},
        {"numpy": [["float32"], 1]},
        {"numpy": ["float32", "1"]},
        {"tensor": ["float32", None]},
        {"tensor": ["uint8", 2**70]},
        {"tensor": ["load", 1]},
        {"tensor": ["float32", [1, 2]]},
        {"tensor": ["float32", 1], "numpy": ["float32", 1]},
        {},
    ],
)
def test_forged_values_are_refused(tmp_path, value):
    assert not is_encoded(value)
    bp.save(Net(), tmp_path)
    rewrite(tmp_path / "bayesprune.json", lambda record: record["spec"]["attributes"][""].update(gain=value))
    with pytest.raises(StorageError, match="an object of plain values"):
        bp.load(tmp_path, model=Net())


class Net(nn.Module):
    """Its forward uses what it holds beside its layer."""

    def __init__(self, gain=1.0, shift=0.0, activation=torch.relu, sizes=None):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)
        self.gain, self.shift, self.activation = gain, shift, activation
        self.sizes = sizes or {"scale": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        scale = self.sizes["scale"] if isinstance(self.sizes, dict) else self.sizes.scale
        return self.activation(self.linear(x)) * self.gain * scale + self.shift


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("number", [np.float64(2.5), np.float32(0.5), torch.tensor(3.0)])
def test_numbers_of_numpy_and_torch_come_back(tmp_path, number):
    model = Net(gain=number, shift=number).eval()
    bp.save(model, tmp_path)
    loaded = bp.load(tmp_path, model=Net(shift=np.float32(0)))
    assert torch.equal(loaded(X), model(X))
    assert type(loaded.gain) is type(loaded.shift) is type(number)


@pytest.mark.parametrize(
    ("saved", "given", "said"),
    [
        (functools.partial(F.leaky_relu, negative_slope=0.3), torch.relu, "leaky_relu, negative_slope=0.3"),
        (functools.partial(F.gelu, approximate="tanh"), functools.partial(F.gelu), "partial(gelu) in the model"),
        (types.MethodType(lambda self, x: x.relu(), object()), torch.tanh, "activation: tanh in the model"),
    ],
)
def test_functions_must_agree(tmp_path, saved, given, said):
    bp.save(Net(activation=saved), tmp_path)
    with pytest.raises(StorageError) as raised:
        bp.load(tmp_path, model=Net(activation=given))
    assert said in str(raised.value)
    bp.load(tmp_path, model=Net(activation=saved))


@dataclasses.dataclass
class Sizes:
    scale: float = 1.0


def hooked() -> nn.Module:
    model = Net()
    model.linear.register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


class Other(Net):
    """Other in its forward alone."""


@pytest.mark.parametrize(
    ("saved", "given", "said"),
    [
        (lambda: Net(sizes={"scale": 2.0}), Net, "sizes"),
        (lambda: Net(sizes=Sizes(2.0)), lambda: Net(sizes=Sizes()), "Sizes(scale=1.0)"),
        (lambda: Net(activation=lambda x: x * 2), lambda: Net(activation=lambda x: x * 3), "activation (python"),
        (hooked, Net, "linear.hooks"),
        (Other, Net, "class: 'Net' in the model, 'Other' recorded"),
    ],
)
def test_what_no_file_restores_is_told(tmp_path, caplog, saved, given, said):
    bp.save(saved(), tmp_path)
    with caplog.at_level(logging.WARNING):
        bp.load(tmp_path, model=saved())
        assert not caplog.records
        bp.load(tmp_path, model=given())
    assert said in caplog.text
    assert "computes something else" in caplog.text


def test_replaced_methods_must_be_replaced_again(tmp_path):
    def changed(self, x):
        return self.linear(x)

    model = Net()
    model.forward = types.MethodType(changed, model)
    bp.save(model, tmp_path)
    with pytest.raises(StorageError, match="forward: nothing in the model, changed recorded"):
        bp.load(tmp_path, model=Net())
    other = Net()
    other.forward = types.MethodType(changed, other)
    assert torch.equal(bp.load(tmp_path, model=other)(X), model(X))
