"""Registers the hosts of libraries once these are imported, so that `import bayesprune` imports none of them.

transformers has no entry points for quantizers, timm none for sources of models, and importing them takes longer than
the rest of bayesprune. So either one is imported already, or its import takes our host along, or `load` meets a saved
model of it.
"""

import importlib
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
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


class AfterImport(MetaPathFinder):
    """Imports a host of ours right after the module that it waits for; finds no module itself."""

    def __init__(self, host: "Host") -> None:
        self.host = host

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, whose loader also imports the host.

        Where bayesprune was imported in the middle of that module, the next import of anything brings the host along.
        """
        if self.host.is_due():
            sys.meta_path.remove(self)
            importlib.import_module(self.host.module)
            return None
        if fullname != self.host.after:
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
            importlib.import_module(self.host.module)

        vars(spec.loader)["exec_module"] = exec_module
        return spec


@dataclass(frozen=True)
class Host:
    """What makes `save`, `load`, `to_variational` and a library's own functions know each other.

    Attributes:
        library: Its name.
        module: Our module, whose `HOST` is the adapter.
        after: The module of the library after whose import ours is imported: everything that we add to is there then.
        oldest: The first version that we work with.
    """

    library: str
    module: str
    after: str
    oldest: str

    def register(self) -> None:
        """Makes the library and us know each other when it is time.

        Where it is not installed, nothing happens; an older one than we need is left alone, with a warning.
        """
        if find_spec(self.library) is None:
            return
        # Ours replaces it.
        register_adapter(LibraryAdapter(self.library, self._describe, self._build, self._files))
        if not self._is_recent():
            _LOGGER.warning("%s", self._too_old())
        elif self.is_due():
            importlib.import_module(self.module)
        elif not any(isinstance(finder, AfterImport) and finder.host == self for finder in sys.meta_path):
            sys.meta_path.insert(0, AfterImport(self))

    def is_due(self) -> bool:
        """Whether the module that ours waits for is imported to its end."""
        spec = getattr(sys.modules.get(self.after), "__spec__", None)
        return self.after in sys.modules and not getattr(spec, "_initializing", False)

    def _describe(self, model: nn.Module, model_args: dict[str, Any] | None) -> BaseModel | None:
        """The base of the model, which is one of the library's only if the library is imported by now."""
        return self._adapter().describe(model, model_args) if self.is_due() and self._is_recent() else None

    def _build(self, base: BaseModel) -> nn.Module:
        return self._adapter().build(base)

    def _files(self, base: BaseModel, spec: dict[str, Any], save_id: str) -> dict[str, Any]:
        return self._adapter().files(base, spec, save_id)

    def _adapter(self) -> LibraryAdapter:
        if not self._is_recent():
            raise StorageError(self._too_old())
        return importlib.import_module(self.module).HOST

    def _is_recent(self) -> bool:
        return _numbers(version(self.library)) >= _numbers(self.oldest)

    def _too_old(self) -> str:
        return (
            f"{self.library} {version(self.library)} is installed; its models are saved, loaded and converted in full "
            f"from {self.oldest} on: pip install -U {self.library}"
        )


HOSTS = (
    Host("timm", "bayesprune.hosts.timm.reload", "timm", "1.0.23"),
    # Every model and every loading call needs this module, and the registries that we add to are loaded when it is.
    Host("transformers", "bayesprune.hosts.transformers.reload", "transformers.modeling_utils", "5"),
)


def register() -> None:
    """Registers all hosts."""
    for host in HOSTS:
        host.register()


def _numbers(of: str) -> tuple[int, ...]:
    """The release numbers of a version, as 1, 0, 23 of 1.0.23."""
    return tuple(map(int, re.findall(r"\d+", of)[:3]))
