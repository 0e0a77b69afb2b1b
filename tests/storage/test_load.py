"""Every damaged, foreign or unfitting directory gives a StorageError that names the file and what is wrong."""

import json
import logging
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bayesprune as bp
from bayesprune.errors import StorageError
from bayesprune.storage import parsing
from bayesprune.storage.digests import sealed, tensor_header
from tests.storage.sealing import rewrite

RECORD, TENSORS = "bayesprune.json", "model.safetensors"


def dense(width: int = 6, activation: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), activation or nn.ReLU(), nn.Linear(width, 2)).eval()


@pytest.fixture
def saved(tmp_path) -> Path:
    bp.save(bp.to_variational(dense(3), filter_fn=lambda _, name: name == "2"), tmp_path)
    return tmp_path


def edit(directory: Path, change) -> None:
    rewrite(directory / RECORD, change)


def refused(directory: Path, model: nn.Module | None = None) -> str:
    with pytest.raises(StorageError) as raised:
        bp.load(directory, model=dense() if model is None else model)
    return str(raised.value)


@pytest.mark.parametrize("name", [RECORD, TENSORS])
def test_missing_file(saved, name):
    (saved / name).unlink()
    assert f"has no file {name}" in refused(saved)


def test_missing_directory(tmp_path):
    assert "none is not a directory" in refused(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "has no file bayesprune.json (it has nothing)" in refused(tmp_path / "empty")


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("name", [RECORD, TENSORS])
def test_truncated_file(saved, name, kept):
    data = (saved / name).read_bytes()
    (saved / name).write_bytes(data[: int(kept * len(data))])
    message = refused(saved)
    assert str(saved / name) in message
    assert "truncated" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"\xff\xfe{", "is not valid JSON"),
        (b"[1, 2]", "expected a JSON object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"format_version": 1' + b"0" * 5000 + b"}", "format_version|not valid JSON"),
    ],
)
def test_file_of_something_else(saved, text, said):
    (saved / RECORD).write_bytes(text)
    with pytest.raises(StorageError, match=said):
        bp.load(saved, model=dense())


def test_huge_file_is_not_read(saved, monkeypatch):
    monkeypatch.setattr(parsing, "MAX_BYTES", 10)
    assert "has more than 10 bytes" in refused(saved)


@pytest.mark.parametrize("version", [3, 1, 0, None, "1", 2.0, True, [1]])
def test_unknown_version(saved, version):
    edit(saved, lambda record: record.update(format_version=version))
    message = refused(saved)
    assert "format_version" in message
    assert "reads 2" in message


@pytest.mark.parametrize("name", [RECORD, TENSORS])
def test_halves_of_two_saves(saved, tmp_path_factory, name):
    other = tmp_path_factory.mktemp("other")
    bp.save(bp.to_variational(dense(3), filter_fn=lambda _, name: name == "2"), other)
    shutil.copy(other / name, saved / name)
    assert "come from two saves" in refused(saved)


def test_tensors_of_another_tool(saved):
    tensors = load_file(saved / TENSORS)
    save_file(tensors, saved / TENSORS)
    assert "holds no digests of its tensors" in refused(saved)
    save_file(tensors, saved / TENSORS, metadata=tensor_header(tensors))
    assert "save id None" in refused(saved)


def damage_tensors(directory: Path, change) -> None:
    tensors = load_file(directory / TENSORS)
    change(tensors)
    save_id = json.loads((directory / RECORD).read_text())["save_id"]
    save_file(tensors, directory / TENSORS, metadata={"save_id": save_id, **tensor_header(tensors)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("0.bias"), ["missing tensors (1) in model.safetensors", "0.bias (3)"]),
        (lambda t: t.update(extra=torch.zeros(2)), ["tensors nobody recorded (1)", "extra (2)"]),
        (lambda t: t.update({"0.bias": torch.zeros(5)}), ["0.bias: (5) in model.safetensors, (3) recorded"]),
        (lambda t: t.update({"2.weight": torch.full((2, 3), torch.nan)}), ["2.weight has 6 of 6 values that are NaN"]),
    ],
)
def test_tensors_that_do_not_fit_the_record(saved, change, said):
    damage_tensors(saved, change)
    message = refused(saved)
    assert all(part in message for part in said)


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Other(), ["missing tensors (4) in the model", "0.weight (3, 4)", "fc: Linear in the model, nothing recorded"]),
        (dense(6, nn.GELU()), ["1: GELU in the model, ReLU recorded"]),
        (nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Linear(6, 2)), ["0: Conv2d in the model, Linear recorded"]),
        (nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2)), ["missing tensors (1)", "0.bias (3)"]),
        (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2, bias=False)), ["missing tensors (1)", "2.bias (2)"]),
        (bp.to_variational(dense(3)), ["tensors nobody recorded (2)", "0.weight_log_std (3, 4)"]),
        (bp.to_variational(dense(3), std="rank_one", filter_fn=lambda _, name: name == "2"), ["column_log_std"]),
    ],
)
def test_model_that_does_not_fit_is_refused_and_unchanged(saved, model, said):
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    message = refused(saved, model)
    assert str(saved) in message
    assert "saved with" in message
    assert all(part in message for part in said), message
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(id(p) == before[name][0] and torch.equal(p, before[name][1]) for name, p in after.items())


def test_whole_numbers_are_loaded_as_such(saved):
    damage_tensors(saved, lambda t: t.update({"0.weight": torch.ones(3, 4, dtype=torch.int8)}))
    assert bp.load(saved, model=dense())[0].weight.dtype == torch.int8


def test_function_that_differs(tmp_path):
    def layer(activation):
        return nn.TransformerEncoderLayer(8, 2, 16, activation=activation, batch_first=True).eval()

    bp.save(layer("gelu"), tmp_path)
    assert "activation: relu in the model, gelu recorded" in refused(tmp_path, layer("relu"))
    bp.load(tmp_path, model=layer("gelu"))


def test_plain_module_needs_a_model(saved):
    with pytest.raises(StorageError, match=r"build the dense model and pass it: load\(directory, model=...\)"):
        bp.load(saved)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        bp.load(saved, model=nn.Linear)


def test_unknown_library(saved):
    edit(saved, lambda r: r.update(base={"library": "jax-zoo", "name": "net", "args": {}, "config": {}}))
    with pytest.raises(StorageError, match=r"'net' of the library 'jax-zoo'.*pip install jax-zoo"):
        bp.load(saved)


def test_long_differences_are_cut_short(tmp_path):
    bp.save(nn.Sequential(*(nn.Linear(2, 2) for _ in range(50))), tmp_path)
    message = refused(tmp_path)
    assert "and 84 more" in message
    assert len(message.splitlines()) < 50


def test_ties_that_a_shared_module_cannot_undo_are_told(tmp_path):
    layer = nn.Linear(2, 2)
    bp.save(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), tmp_path)
    assert "that share a tensor" in refused(tmp_path, nn.Sequential(layer, layer))


@pytest.mark.parametrize(
    ("module", "attribute", "value"),
    [
        ("0", "forward", "os.system"),
        ("0", "_is_full_backward_hook", True),
        ("0", "_parameters", 1),
        ("0", "__class__", "Conv2d"),
        ("0", "new", 1),
        ("nowhere", "width", 1),
    ],
)
def test_attributes_that_the_model_does_not_have_are_not_made(saved, caplog, module, attribute, value):
    edit(saved, lambda r: r["spec"]["attributes"].update({module: {attribute: value}}))
    with caplog.at_level(logging.WARNING):
        loaded = bp.load(saved, model=dense())
    assert f"{module}.{attribute}" in caplog.text
    assert type(loaded[0]) is nn.Linear
    assert vars(loaded[0]).get(attribute) != value


def nodes(value, path=()):
    """Paths of all values inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from nodes(item, (*path, key))


def test_any_changed_value_loads_or_is_a_storage_error(saved):
    text = (saved / RECORD).read_text()
    paths = list(nodes(json.loads(text)))
    strange = [None, True, -1, 0, 3, 2**70, 0.5, float("nan"), "", "weight", "0.weight", "float32", "nn", [], {}, [[]]]
    strange += [[-1], [2**62], {"tuple": 1}, {"tuple": [{}]}, {"a": {"b": 1}}, {"std": "x", "estimator": "y"}]
    rng = random.Random(0)
    refusals = 0
    for _ in range(400):
        record = json.loads(text)
        path = rng.choice(paths)
        node = record
        for key in path[:-1]:
            node = node[key]
        if rng.random() < 0.2 and isinstance(node, dict):
            del node[path[-1]]
        else:
            node[path[-1]] = rng.choice(strange)
        (saved / RECORD).write_text(json.dumps(sealed(record)))
        try:
            bp.load(saved, model=dense())
        except StorageError:
            refusals += 1
    assert 100 < refusals < 400
