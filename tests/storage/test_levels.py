"""Smaller versions of a saved model come back to the last bit, the model itself as it was; damage is told."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.errors import StorageError
from bayesprune.storage.files import tensor_writer
from bayesprune.storage.levels import Level, gathered, ranks, zeroed
from bayesprune.storage.parsing import deflated, inflated
from bayesprune.storage.reading import read_tensors
from tests.storage.sealing import rewrite

KEPT = torch.tensor([1, 3, 4, 9])
FOUND = {"0.weight": (KEPT,), "0.bias": (KEPT,), "2.weight": (None, KEPT)}


def net(width: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3)).eval()


def cut(model: nn.Sequential) -> nn.Sequential:
    small = net(len(KEPT))
    state = {name: gathered(value, FOUND.get(name, ())) for name, value in model.state_dict().items()}
    small.load_state_dict(state)
    return small


def with_zeros(model: nn.Sequential, share: float) -> nn.Sequential:
    """The model with this share of zeros in its first weight; a larger share has the zeros of a smaller one."""
    found = copy.deepcopy(model)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    found[0].weight.data.view(-1)[order[: round(128 * share)]] = 0
    return found


def same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def levels(model: nn.Sequential) -> list[Level]:
    small = cut(model)
    small[2].bias.data += 1
    zeros = [Level(f"weights={1 - share}", with_zeros(model, share)) for share in (0.25, 0.5, 0.75)]
    return [Level("macs=0.5", small, FOUND), *zeros]


@pytest.fixture
def saved(tmp_path) -> tuple[Path, nn.Sequential, list[Level]]:
    model = net()
    made = levels(model)
    bp.save(model, tmp_path, levels=made)
    return tmp_path, model, made


@pytest.mark.parametrize("coding", [None, "entropy"])
def test_every_level_comes_back_and_so_does_the_model(tmp_path, coding):
    if coding is not None:
        pytest.importorskip("constriction")
    model = net()
    made = levels(model)
    bp.save(model, tmp_path, levels=made, coding=coding)
    assert same(bp.load(tmp_path, model=net()), model)
    for level in made:
        found = bp.load(tmp_path, level.target, model=net())
        assert same(found, level.model)
        assert not found.training
    small = bp.load(tmp_path, "macs=0.5", model=net())
    assert (small[0].out_features, small[2].in_features) == (4, 4)


def test_a_level_takes_what_it_does_not_share(saved):
    """Positions, three biases, and two bits for each weight that some levels keep and others do not."""
    directory, *_ = saved
    found = load_file(directory / "levels.safetensors")
    shares = {name: tensor.numel() for name, tensor in found.items() if not name.startswith("record")}
    assert shares == {
        "positions": 4,
        "sizes": 1,
        "own.0.float32": 3,
        "ranks.0.weight": 2 * 128 // 8,
    }


def test_differences_are_stored_where_they_are_told(tmp_path):
    pytest.importorskip("constriction")
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)).eval()
    small = copy.deepcopy(model)
    moved = torch.randint(-1, 2, (64, 64)) * 2.0**-6
    small[0].weight.data += moved
    sizes = []
    for told in ({}, {"0.weight": moved}):
        bp.save(model, tmp_path, levels=[Level("macs=0.9", small, {}, told)], coding="entropy")
        assert same(bp.load(tmp_path, "macs=0.9", model=copy.deepcopy(model)), small)
        sizes.append((tmp_path / "levels.safetensors").stat().st_size)
    assert sizes[1] < sizes[0] / 8


def test_bytes_are_a_budget(saved):
    directory, model, (small, *_) = saved
    assert same(bp.load(directory, "bytes=1e6", model=net()), model)
    assert same(bp.load(directory, "bytes=300", model=net()), small.model)
    with pytest.raises(StorageError, match=r"no level of at most 20 bytes; its levels are: macs=0\.5 \(204 bytes\)"):
        bp.load(directory, "bytes=20", model=net())


def test_levels_that_do_not_exist(saved, tmp_path):
    directory, model, _ = saved
    target = net()
    before = copy.deepcopy(target)
    with pytest.raises(StorageError, match=r"has no level 'macs=0\.4'; its levels are: macs=0\.5"):
        bp.load(directory, "macs=0.4", model=target)
    with pytest.raises(ValueError, match="load got the target 'half'; expected a text like"):
        bp.load(directory, "half", model=target)
    assert same(target, before)
    bp.save(model, directory)
    assert not (directory / "levels.safetensors").exists()
    with pytest.raises(StorageError, match="its levels are: none"):
        bp.load(directory, "bytes=1000", model=target)


def damage(directory: Path, how: str) -> None:
    path = directory / "levels.safetensors"
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[:-3])
    else:
        data[-1] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "has no file levels.safetensors"),
        ("truncated", "cannot be read"),
        ("flipped", "do not have the SHA-256 they were saved with"),
    ],
)
def test_damage_is_told_and_nothing_is_loaded_in_part(saved, how, said):
    directory, model, _ = saved
    damage(directory, how)
    target = net()
    before = copy.deepcopy(target)
    with pytest.raises(StorageError, match=said):
        bp.load(directory, "weights=0.25", model=target)  # the last bytes are the ranks of its weights
    assert same(target, before)
    assert same(bp.load(directory, model=net()), model)


def test_files_of_two_saves(saved, tmp_path_factory):
    directory, model, made = saved
    other = tmp_path_factory.mktemp("other")
    bp.save(model, other, levels=made)
    (directory / "levels.safetensors").write_bytes((other / "levels.safetensors").read_bytes())
    with pytest.raises(StorageError, match="come from two saves"):
        bp.load(directory, "macs=0.5", model=net())


def forge(directory: Path, change) -> None:
    """Writes another record of the first level, with digests that fit."""
    path = directory / "levels.safetensors"
    tensors, header = read_tensors(path)
    record = inflated(tensors["record.0"].numpy().tobytes(), "")
    change(record)
    tensors["record.0"] = torch.tensor(list(deflated(record)), dtype=torch.uint8)
    tensor_writer(tensors, header)(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda level: level.update(kept={"0.weight": [7]}), "does not hold what it records of level 0"),
        (lambda level: level.update(own={"0.bias": ["float32", 2**40]}), "does not hold what it records of level 0"),
        (lambda level: level.update(added=["0.bias"]), "does not hold what it records of level 0"),
        (lambda level: level.update(kept={"0.weight": [-1]}), "describes a level that cannot be read"),
        (lambda level: level.update(own={"0.bias": ["float33", 4]}), "describes a level that cannot be read"),
        (lambda level: level.update(attributes=[]), "describes a level that cannot be read"),
    ],
)
def test_records_that_fit_nothing(saved, change, said):
    directory, *_ = saved
    forge(directory, lambda level: None)
    assert bp.load(directory, "macs=0.5", model=net())[0].out_features == 4
    forge(directory, change)
    with pytest.raises(StorageError, match=said):
        bp.load(directory, "macs=0.5", model=net())


@pytest.mark.parametrize("levels", [[], {"bytes": 1}, {"bytes": 1, "levels": {"macs=0.5": "1"}}, {"levels": {}}])
def test_lists_of_levels_that_cannot_be_read(saved, levels):
    directory, *_ = saved
    rewrite(directory / "bayesprune.json", lambda record: record.update(levels=levels))
    with pytest.raises(StorageError, match=r"bayesprune\.json has levels that cannot be read"):
        bp.load(directory, "macs=0.5", model=net())


def test_what_is_no_level_is_refused(tmp_path):
    model = net()
    other = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3))
    refused = {
        "expected what bp.elastic.levels": ["macs=0.5"],
        "has two of one name": [Level("macs=0.5", cut(model), FOUND), Level("macs=0.50", cut(model), FOUND)],
        "has other classes than the model": [Level("macs=0.5", other, FOUND)],
        "save got the target 'half'": [Level("half", cut(model), FOUND)],
    }
    for said, given in refused.items():
        with pytest.raises(ValueError, match=said):
            bp.save(model, tmp_path, levels=given)
    with pytest.raises(ValueError, match="levels of a model with posteriors"):
        bp.save(bp.to_variational(copy.deepcopy(model)), tmp_path, levels=[Level("macs=0.5", cut(model), FOUND)])
    assert not list(tmp_path.iterdir())


def test_stock_calls_load_the_model_itself(tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("test_resnet", num_classes=3).eval()
    small = copy.deepcopy(model)
    small.fc.weight.data[:, ::2] = 0
    bp.save(model, tmp_path, levels=[Level("weights=0.5", small)])
    assert same(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), model)
    assert same(bp.load(tmp_path, "weights=0.5"), small)


@pytest.mark.parametrize("number", [1, 2, 7, 8])
def test_ranks_tell_which_levels_keep_a_weight(number):
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(37, 5, generator=generator)
    tensor[::3] = 0
    smaller: list[Tensor] = []
    value = tensor
    for _ in range(number):
        value = torch.where(torch.rand(37, 5, generator=generator) < 0.8, value, 0.0)
        smaller.append(value)
    found = ranks(tensor, smaller)
    assert len(found) == number.bit_length()
    assert all(torch.equal(zeroed(tensor, found, place), its) for place, its in enumerate(smaller))
