"""Registers the transformers host once transformers is imported, so that `import bayesprune` does not import it.

transformers has no entry points for quantizers, and importing what its quantizer registry needs takes as long as the
rest of bayesprune. So either it is imported already, or its import takes ours along, or `load` meets a saved model.
"""

import importlib
import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from torch import nn

from bayesprune.errors import StorageError
from bayesprune.storage.base import BaseModel, LibraryAdapter, register_adapter

_LOGGER = logging.getLogger(__name__)

LIBRARY = "transformers"
HOST = "bayesprune.hosts.transformers.reload"
# Every model and every loading call needs this module, and the registries that we add to are loaded when it is.
AFTER = "transformers.modeling_utils"
OLDEST = 5


class AfterImport(MetaPathFinder):
    """Imports our host right after the module that it waits for; finds no module itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, whose loader also imports the host."""
        if fullname != AFTER:
            return None
        sys.meta_path.remove(self)
        try:
            spec = find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            sys.meta_path.remove(self)
            importlib.import_module(HOST)

        vars(spec.loader)["exec_module"] = exec_module
        return spec


def register() -> None:
    """Makes `save`, `load`, `to_variational` and transformers' own `from_pretrained` know each other, when it is time.

    Where transformers is not installed, nothing happens; an older one than we need is left alone, with a warning.
    """
    if find_spec(LIBRARY) is None:
        return
    register_adapter(LibraryAdapter(LIBRARY, _describe, _build, _files))  # until the host itself takes its place
    if not _is_recent():
        _LOGGER.warning("%s", _too_old())
    elif AFTER in sys.modules:
        importlib.import_module(HOST)
    elif not any(isinstance(finder, AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterImport())


def _describe(model: nn.Module, model_args: dict[str, Any] | None) -> BaseModel | None:
    return None  # without transformers no model is one of its


def _build(base: BaseModel) -> nn.Module:
    return _host().build(base)


def _files(base: BaseModel, spec: dict[str, Any], save_id: str) -> dict[str, Any]:
    return _host().files(base, spec, save_id)


def _host() -> LibraryAdapter:
    if not _is_recent():
        raise StorageError(_too_old())
    return importlib.import_module(HOST).HOST


def _is_recent() -> bool:
    return int(version(LIBRARY).partition(".")[0]) >= OLDEST


def _too_old() -> str:
    return (
        f"transformers {version(LIBRARY)} is installed; its models are saved, loaded and converted in full from "
        f"{OLDEST} on: pip install -U transformers"
    )
