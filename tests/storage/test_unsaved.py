"""What was done to a model and stands in no file: `save` rebuilds the model, and names or refuses what it cannot keep.

All of this came back different without a word once.
"""

import functools
import logging
import types

import numpy as np
import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.errors import StorageError
from bayesprune.storage.save import doubtful, lost, outputs_differ

timm = pytest.importorskip("timm")
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=32, num_classes=3).eval()


def swapped(module: nn.Module, **methods) -> None:
    """Makes the module one of a class that has the same children."""
    module.__class__ = type("Changed", (type(module),), methods)


def block_of_another_class(model: nn.Module) -> None:
    swapped(model.blocks[0], forward=lambda self, x: x)


def layer_of_another_class_of_the_same_name(model: nn.Module) -> None:
    layer = model.blocks[0].mlp.fc1
    layer.__class__ = type("Linear", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)})


def model_of_a_subclass(model: nn.Module) -> None:
    swapped(model, forward=lambda self, x: self.forward_features(x))


def replaced_forward(model: nn.Module) -> None:
    model.blocks[0].forward = lambda x, *_, **__: x


def forward_of_its_own_that_is_another(model: nn.Module) -> None:
    model.forward = model.forward_features


def replaced_helper(model: nn.Module) -> None:
    model.forward_head = types.MethodType(lambda self, x, **_: x.mean(1), model)


REFUSED = [
    block_of_another_class,
    layer_of_another_class_of_the_same_name,
    model_of_a_subclass,
    replaced_forward,
    forward_of_its_own_that_is_another,
    replaced_helper,
]


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_other_code_is_refused(tmp_path, change):
    model = vit()
    change(model)
    with pytest.raises(StorageError, match="classes (and|or) functions") as raised:
        bp.save(model, tmp_path / "new")
    assert "plain=True" in str(raised.value)
    assert not (tmp_path / "new").exists()


def lambdas(factor: int) -> nn.Module:
    layer = nn.Identity()
    layer.function, layer.partial = lambda x: factor * x, functools.partial(torch.mul, other=factor)
    return layer


def test_functions_are_compared_by_what_they_do():
    assert not lost(lambdas(2), lambdas(2))
    assert len(lost(lambdas(2), lambdas(3))) == 2


def holding(**attributes) -> nn.Module:
    layer = nn.Identity()
    vars(layer).update(attributes)
    return layer


@pytest.mark.parametrize(
    ("value", "same", "other"),
    [
        ({"a": 1}, {"a": 1}, {"a": 2}),
        (torch.arange(3), torch.arange(3), torch.arange(4)),
        (np.arange(3), np.arange(3), np.ones(3)),
    ],
)
def test_values_that_are_not_plain_are_compared(value, same, other):
    assert not doubtful(holding(table=value), holding(table=same))
    assert doubtful(holding(table=value), holding(table=other)) == [f"table: {type(value).__name__}"]


def test_hooks_are_named(tmp_path, caplog):
    model = vit()
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: None)
    with caplog.at_level(logging.WARNING):
        bp.save(model, tmp_path)
    assert "blocks.0.hooks: <lambda>" in caplog.text
    assert "save(example_inputs=...) tries it" in caplog.text


def test_nothing_is_said_of_an_ordinary_model(tmp_path, caplog):
    model = bp.to_variational(vit())
    bp.prune_channels(model, IMAGES, target="macs=0.8")
    model(IMAGES)
    with caplog.at_level(logging.WARNING):
        bp.save(model, tmp_path / "0", example_inputs=IMAGES)
        bp.save(bp.load(tmp_path / "0"), tmp_path / "1", example_inputs=(IMAGES,))
    assert not caplog.records


def test_outputs_are_compared(tmp_path):
    model = vit()
    model.blocks[0].register_forward_hook(lambda module, inputs, output: 1.001 * output)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(StorageError, match=r"computes other outputs than what would be loaded: output 0 by up to"):
        bp.save(model.train(), tmp_path / "new", example_inputs=IMAGES)
    assert model.training
    assert not (tmp_path / "new").exists()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="saved as a plain module"):
        bp.save(nn.Linear(2, 2), tmp_path / "new", example_inputs=torch.ones(1, 2))


class Told(nn.Module):
    """Puts out what its function makes of its input."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (lambda x: x, lambda x: x + 1e-7 * x, None),
        (lambda x: x, lambda x: x + 1e-3, "by up to 0.001"),
        (lambda x: x + 1000, lambda x: x + 1000.1, "by up to 0.1"),
        (lambda x: x > 0, lambda x: x < 0, "output 0 has other values"),
        (lambda x: x, lambda x: x.double(), "they are"),
        (lambda x: {"a": [x, x]}, lambda x: {"a": [x]}, "they are"),
        (lambda x: x * torch.nan, lambda x: x, "by up to nan"),
        (lambda x: x + torch.rand(3), lambda x: x + torch.rand(3), None),
        (lambda x: 3, lambda x: 3, "nothing could be compared"),
    ],
)
def test_what_is_a_difference(first, second, said):
    found = outputs_differ(Told(first), Told(second), torch.ones(2, 3))
    assert (found is None) if said is None else (found is not None and said in found)


def with_device_map(model: nn.Module) -> None:
    hooks = pytest.importorskip("accelerate").hooks
    hooks.add_hook_to_module(model.blocks[0], hooks.ModelHook())


def compiled(model: nn.Module) -> None:
    model.forward = torch.compile(model.forward)


@pytest.mark.parametrize("wrap", [with_device_map, compiled])
def test_wrappers_of_libraries_are_none_of_the_models(tmp_path, wrap, caplog):
    model = vit()
    expected = model(IMAGES)
    wrap(model)
    with caplog.at_level(logging.WARNING, logger="bayesprune"):
        bp.save(model, tmp_path)
    assert not caplog.records
    assert torch.equal(bp.load(tmp_path)(IMAGES), expected)


@pytest.mark.parametrize("number", [np.float64(0.25), torch.tensor(0.25)])
def test_numbers_of_numpy_and_torch_come_back_to_timm(tmp_path, number):
    model = vit()
    for block in model.blocks:
        block.attn.scale, block.attn.fused_attn = number, False
    bp.save(model, tmp_path)
    for loaded in (bp.load(tmp_path), timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()):
        assert type(loaded.blocks[0].attn.scale) is type(number)
        assert torch.equal(loaded(IMAGES), model(IMAGES))
