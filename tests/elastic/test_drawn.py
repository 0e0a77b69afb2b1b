"""A model trains at levels that are drawn: each step is that of the smaller model, and all share the weights."""

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.elastic import Level, LevelDraws
from bayesprune.errors import UnsupportedModelError
from bayesprune.storage.levels import gathered

TARGETS = ("macs=0.7", "macs=0.4")
Batch = tuple[Tensor, Tensor]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 10, 3, padding=1, bias=False),
        nn.BatchNorm2d(10),
        nn.SiLU(),
        nn.Conv2d(10, 12, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 20),
        nn.GELU(),
        nn.Linear(20, 5),
    )


@pytest.fixture(scope="module")
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 3, 8, 8, generator=generator), torch.randint(5, (64,), generator=generator)


def levels_of(model: nn.Module, batch: Batch, targets=TARGETS) -> list[Level]:
    return bp.elastic.levels(bp.to_variational(copy.deepcopy(model)), batch[0][:1], targets)


def gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_step_at_a_level_is_a_step_of_the_smaller_model(batch):
    """Outputs and gradients in training mode; what the level lacks gets no gradient, and values are what they were."""
    model = net().train()
    levels = levels_of(model, batch)
    draws, before = LevelDraws(model, levels, batch[0][:1]), values(model)
    for level in levels:
        smaller = level.model.train()
        expected, output = gradients(smaller, batch), smaller(batch[0])
        with draws.at(level.target):
            found = gradients(model, batch)
            assert torch.allclose(model(batch[0]), output, atol=1e-5)
        assert is_same(values(model), before)
        for name, gradient in found.items():
            kept = level.kept.get(name, ())
            assert torch.allclose(gathered(gradient, kept), expected[name], atol=1e-5), name
            assert int((gradient != 0).sum()) <= expected[name].numel()


def test_gradients_of_several_levels_add_up(batch):
    model = net().eval()
    draws = LevelDraws(model, levels_of(model, batch), batch[0][:1])
    apart = []
    for target in TARGETS:
        with draws.at(target):
            apart.append({name: gradient.clone() for name, gradient in gradients(model, batch).items()})
    model.zero_grad()
    for target in TARGETS:
        with draws.at(target):
            nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, apart[0][name] + apart[1][name], atol=1e-6)


def test_half_of_the_draws_are_ends(batch):
    model = net()
    draws = LevelDraws(model, levels_of(model, batch, ("macs=0.4", "macs=0.7", "macs=0.55")))
    torch.manual_seed(0)
    counts: Counter[str | None] = Counter()
    for _ in range(2000):
        with draws.drawn() as target:
            counts[target] += 1
    shares = {None: 3 / 8, "macs=0.4": 3 / 8, "macs=0.7": 1 / 8, "macs=0.55": 1 / 8}
    for target, share in shares.items():
        error = (share * (1 - share) / 2000) ** 0.5
        assert abs(counts[target] / 2000 - share) < 5 * error


def test_training_at_drawn_levels_makes_them_better(batch, tmp_path):
    model = net()
    start = levels_of(model, batch)
    draws = LevelDraws(model, start, batch[0][:1])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    torch.manual_seed(0)
    for _ in range(80):
        optimizer.zero_grad()
        with draws.drawn():
            nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    model.eval()
    trained = draws.levels([batch])
    for level, before in zip(trained, start, strict=True):
        assert nn.functional.cross_entropy(level.model(batch[0]), batch[1]) < 1.0
        assert nn.functional.cross_entropy(before.model(batch[0]), batch[1]) > 1.5
        for name, parameter in level.model.named_parameters():
            assert torch.equal(parameter, gathered(model.get_parameter(name), level.kept.get(name, ())))
        assert not torch.equal(
            level.model[1].running_mean, gathered(model[1].running_mean, level.kept.get("1.weight", ()))
        )
    bp.save(model, tmp_path, levels=trained)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes["levels.safetensors"] < sizes["model.safetensors"]
    loaded = bp.load(tmp_path, "macs=0.4", model=net())
    assert is_same(values(loaded), values(trained[1].model))


def test_levels_of_single_weights(batch):
    model = net()
    draws = LevelDraws(model, levels_of(model, batch, ["weights=0.3"]))
    with draws.at("weights=0.3"):
        zeros = {name: parameter == 0 for name, parameter in model.named_parameters() if parameter.dim() > 1}
        found = gradients(model, batch)
    assert all(not found[name][zero].any() for name, zero in zeros.items())
    share = sum(int(zero.sum()) for zero in zeros.values()) / sum(zero.numel() for zero in zeros.values())
    assert share == pytest.approx(0.7, abs=0.01)
    with torch.no_grad():
        model[9].weight.add_(1.0)
    level = draws.levels([batch])[0]
    assert torch.equal(level.model[9].weight == 0, zeros["9.weight"])
    kept = ~zeros["9.weight"]
    assert torch.equal(level.model[9].weight[kept], model[9].weight[kept])


def test_what_does_not_fit_is_refused(batch):
    model = net()
    levels = levels_of(model, batch)
    draws = LevelDraws(model, levels, batch[0][:1])
    with (
        pytest.raises(ValueError, match=r"no level 'macs=0\.5'; expected one of macs=0\.7, macs=0\.4"),
        draws.at("macs=0.5"),
    ):
        pass
    before = values(model)
    gradients(model, batch)
    for is_fused in (False, True):
        optimizer = torch.optim.Adam(model.parameters(), 0.1, fused=is_fused)
        with pytest.raises(RuntimeError, match="moved while the model was at a level.*behind"), draws.at("macs=0.4"):
            optimizer.step()
        model.load_state_dict(before)
    with pytest.raises(ValueError, match="pass batches as data"):
        draws.levels()
    with pytest.raises(ValueError, match="got no levels"):
        LevelDraws(model, [])
    with pytest.raises(ValueError, match="has posteriors|with posteriors"):
        LevelDraws(bp.to_variational(net()), levels)
    with pytest.raises(ValueError, match="levels of this very model"):
        LevelDraws(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), levels)
    with pytest.raises(ValueError, match=r"ends is 1\.5"):
        LevelDraws(model, levels, ends=1.5)


def test_a_norm_over_channels_that_are_cut_is_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.LayerNorm(20), nn.ReLU(), nn.Linear(20, 3))
    x = torch.randn(8, 6)
    levels = bp.elastic.levels(bp.to_variational(copy.deepcopy(model)), x[:1], ["macs=0.5"])
    with pytest.raises(UnsupportedModelError, match=r"'macs=0\.5' lacks computes something else"):
        LevelDraws(model, levels, x)
