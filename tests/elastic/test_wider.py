"""A wider model computes what it did, trains apart from its copies, and is saved like any other."""

import copy

import pytest
import torch
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.errors import UnsupportedModelError


class Net(nn.Module):
    """Batch norm, a depthwise convolution, a residual sum, a concatenation, and a flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.deep = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.point = nn.Conv2d(6, 6, 1)
        self.side = nn.Conv2d(6, 4, 1)
        self.mix = nn.Conv2d(10, 8, 1)
        self.hidden = nn.Linear(8 * 16, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = x + self.point(torch.relu(self.deep(x)))
        x = torch.relu(self.mix(torch.cat([torch.relu(self.side(x)), x], 1)))
        return self.head(torch.nn.functional.gelu(self.norm(self.hidden(x.flatten(1)))))


def net() -> Net:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.bn.running_mean.uniform_(-1, 1)
        model.bn.running_var.uniform_(0.5, 2)
    return model.eval()


def images() -> Tensor:
    return torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("factor", [2, 3])
def test_outputs_stay_and_every_layer_is_wider(factor):
    model = net()
    before = model(images())
    found = bp.widen(model, images()[:1], factor)
    sizes = {"stem": 6, "deep": 6, "point": 6, "side": 4, "mix": 8, "hidden": 12}
    assert found == {name: factor * size for name, size in sizes.items()}
    assert model.hidden.weight.shape == (factor * 12, factor * 128)
    assert model.deep.groups == factor * 6
    assert model.norm.normalized_shape == (factor * 12,)
    assert model.head.weight.shape == (5, factor * 12)
    assert torch.allclose(model(images()), before, atol=1e-5)


@pytest.mark.parametrize(
    "norm", [lambda: nn.BatchNorm1d(6, affine=False), lambda: nn.LayerNorm(6, elementwise_affine=False)]
)
def test_norms_without_parameters_grow_too(norm):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), norm(), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(16, 4)
    model(x)  # running statistics that differ between channels
    before = model.eval()(x)
    assert bp.widen(model, x[:1]) == {"0": 12}
    assert torch.allclose(model(x), before, atol=1e-6)


def test_copies_train_apart():
    model = net().train()
    bp.widen(model, images()[:1])
    assert model.training
    assert torch.equal(model.stem.weight[0], model.stem.weight[1])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images()), torch.arange(8) % 5).backward()
        optimizer.step()
    for layer in (model.stem, model.hidden):
        assert not torch.allclose(layer.weight[0], layer.weight[1], rtol=1e-3)


def test_a_wider_model_is_saved_and_cut_again(tmp_path):
    model = net()
    bp.widen(model, images()[:1])
    bp.save(model, tmp_path)
    loaded = bp.load(tmp_path, model=Net())
    assert torch.equal(loaded(images()), model(images()))
    report = bp.prune_channels(bp.to_variational(model), images()[:1], "macs=0.5")
    assert report.macs_after < report.macs_before


def test_what_is_to_stay_stays():
    model = net()
    before = model(images())
    found = bp.widen(model, images()[:1], ignored_layers=["hidden", "side"])
    assert sorted(found) == ["deep", "mix", "point", "stem"]
    assert (model.hidden.out_features, model.side.out_channels) == (12, 4)
    assert torch.allclose(model(images()), before, atol=1e-5)


class Chunked(nn.Module):
    """A split at fixed places, which a wider layer would break, beside one that may grow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 6)
        self.last = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.second(torch.relu(self.first(x))).split([3, 3], 1)
        return self.last(torch.relu(one) - torch.relu(other))


def test_what_would_compute_something_else_is_left():
    torch.manual_seed(0)
    model = Chunked().eval()
    x = torch.randn(5, 4)
    before = copy.deepcopy(model)
    found = bp.widen(model, x)
    assert found == {"first": 16}
    assert torch.allclose(model(x), before(x), atol=1e-6)


def test_what_does_not_fit_is_refused():
    model = net()
    with pytest.raises(ValueError, match="factor is 1"):
        bp.widen(model, images(), 1)
    with pytest.raises(ValueError, match="model with posteriors"):
        bp.widen(bp.to_variational(net()), images())
    with pytest.raises(UnsupportedModelError, match="no layer of this Linear can be made wider"):
        bp.widen(nn.Linear(3, 2), torch.zeros(1, 3))
