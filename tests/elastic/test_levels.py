"""Levels share the model's weights, are nested, compute what a cut computes, and come back from one directory."""

import copy
import itertools

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.elastic.positions import fill_kept, kept_positions, number_entries
from bayesprune.errors import StorageError, UnsupportedModelError
from bayesprune.storage.coding import as_integers
from bayesprune.storage.levels import Level, gathered

TARGETS = ("macs=0.8", "macs=0.5", "macs=0.3")


class Net(nn.Module):
    """A residual block with batch norm, and a head with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(10)
        self.conv1 = nn.Conv2d(10, 12, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 10, 3, padding=1)
        self.hidden = nn.Linear(10, 20)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = x + self.conv2(torch.relu(self.bn1(self.conv1(x))))
        return self.head(torch.relu(self.hidden(x.mean((2, 3)))))


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(192, 3, 8, 8, generator=generator)
    y = (x[:, :, :4].mean((2, 3)) @ torch.randn(3, 5, generator=generator)).argmax(1)
    return list(zip(x.split(64), y.split(64), strict=True))


@pytest.fixture(scope="module")
def trained(batches) -> Net:
    torch.manual_seed(1)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for x, y in itertools.islice(itertools.cycle(batches), 60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def example() -> Tensor:
    return torch.zeros(1, 3, 8, 8)


@torch.no_grad()
def divergence(model: nn.Module, dense: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> float:
    outputs = [[net(x).log_softmax(1) for x, _ in batches] for net in (model, dense)]
    pairs = zip(*outputs, strict=True)
    return float(sum(nn.functional.kl_div(a, b, log_target=True, reduction="batchmean") for a, b in pairs))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def without_data(model: Net, targets=TARGETS) -> list[Level]:
    """Ranked by stds, nothing fitted and no statistics measured: all values are the model's own."""
    return bp.elastic.levels(bp.to_variational(copy.deepcopy(model)), example(), targets)


def test_positions_are_those_of_the_cut(trained):
    """Numbers in the place of values give the same choice as the cut itself, whatever is cut with what."""
    importance = tp.importance.MagnitudeImportance()
    cut, numbered, shapes = copy.deepcopy(trained), copy.deepcopy(trained), {}
    bp.prune_channels(cut, example(), "macs=0.4", importance=importance)
    bp.prune_channels(
        numbered,
        example(),
        "macs=0.4",
        importance=importance,
        before_cut=lambda _: shapes.update(number_entries(numbered)),
    )
    kept = kept_positions(numbered, shapes)
    whole = trained.state_dict()
    assert {"stem.weight", "bn.running_var", "conv1.weight", "hidden.weight"} <= kept.keys()
    assert is_same({name: gathered(value, kept.get(name, ())) for name, value in whole.items()}, state(cut))
    fill_kept(numbered, kept, whole)
    assert is_same(state(numbered), state(cut))
    assert {name: p.dtype for name, p in numbered.state_dict().items()} == {n: p.dtype for n, p in whole.items()}


def test_entries_that_are_no_whole_positions_are_told():
    model = nn.Linear(4, 4)
    shapes = number_entries(model)
    model.weight = nn.Parameter(model.weight.detach()[[[0], [2]], [[0, 1], [2, 3]]])
    with pytest.raises(UnsupportedModelError, match="weight lose entries that are no whole positions"):
        kept_positions(model, shapes)


def test_levels_of_a_compiled_model_are_those_of_the_one_inside(trained, batches):
    compiled = torch.compile(trained, backend="eager")
    pairs = [bp.elastic.levels(model, example(), ["weights=0.5"], data=batches) for model in (trained, compiled)]
    (expected,), (found,) = pairs
    assert type(found.model) is Net
    assert state(found.model).keys() == state(expected.model).keys()


def test_levels_hold_the_models_own_values_and_are_nested(trained):
    before = state(trained)
    found = without_data(trained)
    assert is_same(state(trained), before)
    assert [level.target for level in found] == list(TARGETS)
    for level in found:
        values = {name: gathered(value, level.kept.get(name, ())) for name, value in before.items()}
        assert is_same(values, state(level.model))
    for larger, smaller in itertools.pairwise(found):
        for name, dims in larger.kept.items():
            for its, less in zip(dims, smaller.kept[name], strict=True):
                assert its is None or (less is not None and set(less.tolist()) <= set(its.tolist()))


def test_a_level_computes_what_the_model_does_without_the_units(trained, batches):
    level = without_data(trained)[1]
    silenced = copy.deepcopy(trained)
    for name in ("conv1", "conv2", "hidden", "head"):
        kept = (level.kept.get(f"{name}.weight", (None, None)))[1]
        if kept is not None:
            weight = silenced.get_parameter(f"{name}.weight").data
            gone = sorted(set(range(weight.shape[1])) - set(kept.tolist()))
            weight[:, gone] = 0
    x = batches[0][0]
    with torch.no_grad():
        assert torch.allclose(level.model(x), silenced(x), atol=1e-5)


def test_levels_are_fitted_and_what_moved_lies_on_a_grid(trained, batches):
    losses = {}
    for fit in (True, False):
        found = bp.elastic.levels(trained, example(), ["macs=0.5"], data=batches, fit=fit)[0]
        losses[fit] = divergence(found.model, trained, batches)
        for name, moved in found.moved.items():
            part = gathered(trained.state_dict()[name], found.kept.get(name, ()))
            assert torch.equal(part + moved, found.model.state_dict()[name])
            steps = moved.unique().diff()
            assert torch.allclose(steps / steps.min(), (steps / steps.min()).round(), atol=1e-4)
        assert bool(found.moved) is fit
    assert losses[True] < 0.7 * losses[False]


def test_what_moved_lies_on_a_grid_in_half_precision_too(trained, batches):
    model, data = copy.deepcopy(trained).bfloat16(), [(x.bfloat16(), y) for x, y in batches]
    found = bp.elastic.levels(model, example().bfloat16(), ["macs=0.5"], data=data)[0]
    assert found.moved
    for name, moved in found.moved.items():
        parts = as_integers(moved)
        assert parts is not None, name
        assert int(parts[0].abs().max()) <= 255


def test_rounding_moves_the_predictions_by_what_is_allowed(trained, batches):
    exact, *rounded = (
        bp.elastic.levels(trained, example(), ["macs=0.5"], data=batches, tolerance=tolerance)[0]
        for tolerance in (None, 0.001, 0.1)
    )
    assert not exact.moved
    places = [sum(len(moved.unique()) for moved in level.moved.values()) for level in rounded]
    assert places[1] < places[0] / 2
    losses = [divergence(level.model, trained, batches) / len(batches) for level in (exact, *rounded)]
    assert losses[1] < 1.2 * losses[0] + 0.002
    assert losses[2] < 1.2 * losses[0] + 0.2


def test_all_levels_come_back_from_one_directory(trained, batches, tmp_path):
    found = bp.elastic.levels(trained, example(), [*TARGETS, "weights=0.5", "weights=0.2"], data=batches)
    bp.save(trained, tmp_path, levels=found)
    assert is_same(state(bp.load(tmp_path, model=Net())), state(trained))
    for level in found:
        loaded = bp.load(tmp_path, level.target, model=Net())
        assert is_same(state(loaded), state(level.model))
        assert torch.equal(loaded(batches[0][0]), level.model(batches[0][0]))
    with pytest.raises(StorageError, match=r"no level 'macs=0\.7'"):
        bp.load(tmp_path, "macs=0.7", model=Net())


def test_a_level_that_was_trained_on_comes_back_too(trained, batches, tmp_path):
    level = without_data(trained, ["macs=0.5"])[0]
    level.model.train()
    optimizer = torch.optim.SGD(level.model.parameters(), 0.1)
    nn.functional.cross_entropy(level.model(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    bp.save(trained, tmp_path, levels=[level])
    assert is_same(state(bp.load(tmp_path, "macs=0.5", model=Net())), state(level.model))


def test_levels_of_single_weights_are_nested(trained, batches):
    model = bp.laplace.fit_laplace(bp.to_variational(copy.deepcopy(trained)), batches)
    found = bp.elastic.levels(model, None, ["weights=0.5", "weights=0.1"])
    kept = [level.model.get_parameter("conv1.weight") != 0 for level in found]
    assert not (kept[1] & ~kept[0]).any()
    shares = []
    for level in found:
        weights = [p for name, p in level.model.named_parameters() if p.dim() > 1]
        shares.append(sum(int((p != 0).sum()) for p in weights) / sum(p.numel() for p in weights))
    assert shares == pytest.approx([0.5, 0.1], abs=0.01)


def test_layers_that_are_left_whole(trained, batches):
    found = bp.elastic.levels(trained, example(), ["macs=0.7"], data=batches, ignored_layers=[trained.conv1])[0]
    assert "conv1.weight" not in found.kept or found.kept["conv1.weight"][0] is None
    assert found.model.conv1.out_channels == 12
    assert found.model.hidden.out_features < 20 or found.model.stem.out_channels < 10


def test_channels_that_no_posterior_reads_take_part_in_the_cut():
    torch.manual_seed(0)
    layers = nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5)
    net = bp.to_variational(nn.Sequential(*layers), filter_fn=lambda layer, name: name != "4")
    data = [torch.randn(128, 8)]
    (level,) = bp.elastic.levels(net, data[0][:2], ["macs=0.4"], data=data)
    assert all(8 < level.model[index].out_features < 32 for index in (0, 2, 4))


def test_a_causal_language_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.arange(64).view(8, 8) % 29 + 3
    found = bp.elastic.levels(model, {"input_ids": tokens[:1]}, ["params=0.9"], data=[{"input_ids": tokens}])
    bp.save(model, tmp_path, levels=found)
    loaded = bp.load(tmp_path, "params=0.9")
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, found[0].model(tokens).logits)
    assert is_same(state(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), state(model))


def test_what_is_missing_is_told(trained):
    with pytest.raises(ValueError, match="without posterior, and no data to rank by"):
        bp.elastic.levels(trained, example(), ["macs=0.5"])
    with pytest.raises(ValueError, match="levels got the target 'latency=0.5'"):
        bp.elastic.levels(trained, example(), ["latency=0.5"])
