"""A save that fails at any point leaves the directory as it was."""

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

import bayesprune as bp
from bayesprune.errors import StorageError
from bayesprune.storage import files
from bayesprune.storage.levels import Level


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).eval()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


class Failing:
    """A function that fails at its nth call, and from then on if it is said to."""

    def __init__(self, function, at: int, error: Exception):
        self.function, self.left, self.error = function, at, error

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return self.function(*args, **kwargs)


def fail_tensors(monkeypatch):
    def save_file(tensors, path, metadata):
        Path(path).write_bytes(b"half of")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", save_file)


def fail(owner, name: str, at: int, error: Exception):
    def apply(monkeypatch):
        failing = Failing(getattr(owner, name), at, error)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: failing(*args, **kwargs))

    return apply


FULL = OSError(28, "No space left on device")
READ_ONLY = OSError(30, "Read-only file system")
DENIED = PermissionError(13, "Permission denied")
failures = pytest.mark.parametrize(
    ("break_it", "said"),
    [
        pytest.param(fail_tensors, "No space left on device", id="tensors"),
        pytest.param(fail(Path, "write_bytes", 1, READ_ONLY), "Read-only file system", id="json"),
        pytest.param(fail(Path, "chmod", 1, DENIED), "Permission denied", id="chmod"),
        *[pytest.param(fail(os, "fsync", n, FULL), "No space left on device", id=f"fsync {n}") for n in (1, 2, 3)],
    ],
)


@failures
def test_failed_save_keeps_the_previous_one(tmp_path, monkeypatch, break_it, said):
    bp.save(model(), tmp_path)
    before = contents(tmp_path)
    break_it(monkeypatch)
    with pytest.raises(StorageError, match=said) as raised:
        bp.save(model(1), tmp_path)
    monkeypatch.undo()
    assert str(tmp_path) in str(raised.value)
    assert contents(tmp_path) == before
    assert torch.equal(bp.load(tmp_path, model=model(2))[0].weight, model()[0].weight)


@failures
def test_failed_first_save_leaves_nothing(tmp_path, monkeypatch, break_it, said):
    break_it(monkeypatch)
    with pytest.raises(StorageError, match=said):
        bp.save(model(), tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("error", [DENIED, KeyboardInterrupt()])
def test_failed_rename_takes_all_back(tmp_path, monkeypatch, at, error):
    bp.save(model(), tmp_path)
    before = contents(tmp_path)
    fail(Path, "replace", at, error)(monkeypatch)
    with pytest.raises(StorageError if error is DENIED else KeyboardInterrupt):
        bp.save(model(1), tmp_path)
    monkeypatch.undo()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("at", [1, 2])
def test_failed_rename_of_a_first_save_leaves_nothing(tmp_path, monkeypatch, at):
    fail(Path, "replace", at, DENIED)(monkeypatch)
    with pytest.raises(StorageError, match="Permission denied"):
        bp.save(model(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_files_of_others_are_kept(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    fail_tensors(monkeypatch)
    with pytest.raises(StorageError):
        bp.save(model(), tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_an_earlier_save_s_shards_are_removed_and_no_file_of_a_similar_name(tmp_path):
    bp.save(model(), tmp_path, max_shard_size=300)
    assert (tmp_path / "model-00001-of-00002.safetensors").exists()
    (tmp_path / "model-best-of-5.safetensors").write_text("mine")
    bp.save(model(), tmp_path)
    assert contents(tmp_path).keys() == {"bayesprune.json", "model.safetensors", "model-best-of-5.safetensors"}


def test_an_earlier_save_s_config_is_removed_and_no_other_json(tmp_path):
    timm = pytest.importorskip("timm")
    bp.save(timm.create_model("test_resnet", num_classes=5), tmp_path)
    assert (tmp_path / "config.json").exists()
    (tmp_path / "notes.json").write_text("{}")
    bp.save(model(), tmp_path)
    assert contents(tmp_path).keys() == {"bayesprune.json", "model.safetensors", "notes.json"}


@pytest.mark.parametrize("record", ['{"files": {"../notes.json": "", "notes.txt": ""}}', '{"files": 3}', "[", ""])
def test_a_record_that_no_save_wrote_removes_nothing(tmp_path, record):
    saved = tmp_path / "saved"
    saved.mkdir()
    for path in (tmp_path / "notes.json", saved / "notes.txt"):
        path.write_text("mine")
    (saved / "bayesprune.json").write_text(record)
    bp.save(model(), saved)
    assert (tmp_path / "notes.json").read_text() == "mine"
    assert contents(saved).keys() == {"bayesprune.json", "model.safetensors", "notes.txt"}


@pytest.mark.skipif(sys.platform == "win32", reason="has no access rights of groups")
@pytest.mark.parametrize(
    "options",
    [{}, {"max_shard_size": 300}, {"levels": [Level("weights=0.5", model())]}],
    ids=["one file", "shards", "levels"],
)
def test_all_files_have_the_access_rights_that_the_user_gives_new_ones(tmp_path, options):
    before = os.umask(0o027)
    try:
        bp.save(model(), tmp_path, **options)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits on file sizes")
def test_file_that_the_system_cuts_short(tmp_path):
    import resource

    bp.save(model(), tmp_path)
    before = contents(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(StorageError, match="File too large"):
            bp.save(nn.Linear(1000, 1000), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == before


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the owner of all may write everywhere")
def test_read_only_directory(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="Permission denied"):
            bp.save(model(), tmp_path)
    finally:
        tmp_path.chmod(0o700)
    assert contents(tmp_path) == {}


def test_file_in_place_of_the_directory(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="could not save"):
        bp.save(model(), tmp_path / "file")
    assert contents(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize("name", ["model.safetensors", "bayesprune.json"])
def test_directory_in_place_of_a_file(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(StorageError, match=f"{name} is a directory"):
        bp.save(model(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
