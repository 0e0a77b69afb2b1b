"""transformers is imported by whoever needs it, and then knows us."""

import importlib
import sys
import types

import pytest

from bayesprune.errors import StorageError
from bayesprune.hosts import on_import
from bayesprune.storage import base as bases
from bayesprune.storage.base import BaseModel

pytest.importorskip("transformers")


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library `slow.models` and a host for it, neither imported; the registries are as before afterwards."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "__init__.py").write_text("")
    (tmp_path / "slow" / "models.py").write_text("READY = True\n")
    (tmp_path / "slow" / "later.py").write_text("")
    (tmp_path / "slow_host.py").write_text("from slow.models import READY\nassert READY\nHOST = 'told'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(on_import, "HOSTS", [on_import.Host("slow", "slow_host", "slow.models", "5")])
    monkeypatch.setattr(on_import, "version", lambda name: "5.1")
    monkeypatch.setattr(bases, "_HOSTS", {})
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, on_import.AfterImport)])
    yield
    for name in ("slow", "slow.models", "slow.later", "slow_host"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("library")
def test_the_host_follows_the_library():
    on_import.register()
    on_import.register()
    assert sum(isinstance(finder, on_import.AfterImport) for finder in sys.meta_path) == 1
    assert "slow_host" not in sys.modules
    module = importlib.import_module("slow.models")
    assert module.READY
    assert module.__spec__.origin.endswith("models.py")
    assert "slow_host" in sys.modules
    assert not any(isinstance(finder, on_import.AfterImport) for finder in sys.meta_path)


@pytest.mark.usefixtures("library")
def test_library_that_is_there_already():
    importlib.import_module("slow.models")
    on_import.register()
    assert "slow_host" in sys.modules


@pytest.mark.usefixtures("library")
def test_registered_in_the_middle_of_the_library(tmp_path):
    importing = "from bayesprune.hosts import on_import\non_import.register()\nREADY = True\n"
    (tmp_path / "slow" / "models.py").write_text(importing)
    importlib.import_module("slow.models")
    assert "slow_host" not in sys.modules
    importlib.import_module("slow.later")
    assert "slow_host" in sys.modules
    assert not any(isinstance(finder, on_import.AfterImport) for finder in sys.meta_path)


@pytest.mark.usefixtures("library")
def test_saving_asks_a_host_that_missed_its_library(tmp_path, monkeypatch):
    importing = "from bayesprune.hosts import on_import\non_import.register()\nREADY = True\n"
    (tmp_path / "slow" / "models.py").write_text(importing)
    importlib.import_module("slow.models")
    host = types.SimpleNamespace(describe=lambda model, model_args: BaseModel("slow", model))
    monkeypatch.setitem(sys.modules, "slow_host", types.SimpleNamespace(HOST=host))
    assert bases.describe("net", None) == BaseModel("slow", "net")


@pytest.mark.usefixtures("library")
def test_loading_brings_the_library_in(monkeypatch):
    on_import.register()
    host = types.SimpleNamespace(build=lambda base: f"built {base.name}")
    monkeypatch.setitem(sys.modules, "slow_host", types.SimpleNamespace(HOST=host))
    assert bases.host_of(BaseModel("slow", "net")).build(BaseModel("slow", "net")) == "built net"


@pytest.mark.usefixtures("library")
def test_failed_import_is_tried_again(tmp_path):
    on_import.register()
    (tmp_path / "slow" / "models.py").write_text("raise ImportError('half installed')\n")
    with pytest.raises(ImportError, match="half installed"):
        importlib.import_module("slow.models")
    (tmp_path / "slow" / "models.py").write_text("READY = True  # by now\n")
    importlib.invalidate_caches()
    importlib.import_module("slow.models")
    assert "slow_host" in sys.modules


@pytest.mark.usefixtures("library")
def test_older_library_is_left_alone(monkeypatch, caplog):
    monkeypatch.setattr(on_import, "version", lambda name: "4.57.1")
    on_import.register()
    assert "slow 4.57.1 is installed" in caplog.text
    importlib.import_module("slow.models")
    assert "slow_host" not in sys.modules
    with pytest.raises(StorageError, match="from 5 on: pip install -U"):
        bases.host_of(BaseModel("slow", "net")).build(BaseModel("slow", "net"))


@pytest.mark.usefixtures("library")
def test_missing_library(monkeypatch):
    monkeypatch.setattr(on_import, "HOSTS", [on_import.Host("no_such_library", "slow_host", "slow.models", "5")])
    on_import.register()
    assert not bases._HOSTS
