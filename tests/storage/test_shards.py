"""Tensors in several files with an index, and masks of tied layers."""

import json

import pytest
import torch
from torch import nn

import bayesprune as bp
from bayesprune.errors import StorageError
from tests.cases import Tied


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))


def files(directory) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize(("size", "count"), [(600, 3), ("1KB", 2), ("1MB", 1), (1, 6)])
def test_sharded_model_comes_back(tmp_path, size, count):
    model = net()
    bp.save(model, tmp_path, max_shard_size=size)
    assert len([name for name in files(tmp_path) if name.endswith(".safetensors")]) == count
    assert ("model.safetensors.index.json" in files(tmp_path)) == (count > 1)
    loaded = bp.load(tmp_path, model=net())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_another_number_of_files_replaces_the_first(tmp_path):
    for size in (600, None, "1KB"):
        model = net()
        bp.save(model, tmp_path, max_shard_size=size)
        bp.load(tmp_path, model=net())
    shards = {f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    assert files(tmp_path) == {*shards, "model.safetensors.index.json", "bayesprune.json"}


def test_shards_of_two_saves(tmp_path):
    for name in ("one", "other"):
        bp.save(net(), tmp_path / name, max_shard_size=600)
    shard = "model-00001-of-00003.safetensors"
    (tmp_path / "one" / shard).write_bytes((tmp_path / "other" / shard).read_bytes())
    with pytest.raises(StorageError, match="several saves"):
        bp.load(tmp_path / "one", model=net())


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", 3])
def test_index_names_files_of_its_directory_alone(tmp_path, name):
    bp.save(net(), tmp_path, max_shard_size=600)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["0.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(StorageError, match="weight_map"):
        bp.load(tmp_path, model=net())


def test_lost_shard(tmp_path):
    bp.save(net(), tmp_path, max_shard_size=600)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(StorageError, match="no file model-00002-of-00003.safetensors"):
        bp.load(tmp_path, model=net())


@pytest.mark.parametrize("size", [0, -1, "5", "many", 1.5])
def test_sizes_that_are_none(tmp_path, size):
    with pytest.raises(ValueError, match="max_shard_size is"):
        bp.save(net(), tmp_path, max_shard_size=size)


def test_tied_layers_share_their_mask_again(tmp_path):
    model = bp.to_variational(Tied(nn.Linear(4, 4), nn.Linear(4, 4)))
    bp.prune_weights(model, "weights=0.5")
    bp.save(model, tmp_path)
    loaded = bp.load(tmp_path, model=Tied(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert loaded.first.weight_mask is loaded.second.weight_mask
    assert torch.equal(loaded.first.weight_mask, model.first.weight_mask)
