"""Which library a model comes from, under what name it builds it, and the registry of such libraries.

A host teaches `save` and `load` one library: `bayesprune.hosts.timm.reload` is the example to follow.
"""

import reprlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from bayesprune.errors import StorageError
from bayesprune.storage.reading import check_integers

_MAX_SAID = 500


@dataclass(frozen=True)
class BaseModel:
    """The dense model that a saved model was made from.

    Attributes:
        library: Name of the library's host, such as "timm".
        name: The library's name for the architecture.
        args: What the library needs beside the name to build it; JSON values.
        config: What the library keeps with a model and does not build from, such as the input normalisation; JSON.
    """

    library: str
    name: str
    args: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any, where: str) -> "BaseModel":
        """The base of a file's JSON value.

        Raises:
            StorageError: a field is missing or of another type; `where` says in which file.
        """
        expected = {"library": str, "name": str, "args": dict, "config": dict}
        for key, kind in expected.items():
            if not isinstance(value, dict) or not isinstance(value.get(key), kind):
                raise StorageError(f"{where}: base holds no {key!r} of type {kind.__name__}. The file is damaged.")
        return cls(**{key: value[key] for key in expected})


@dataclass(frozen=True)
class LibraryAdapter:
    """Names, builds and saves the models of one library in the library's own form.

    Attributes:
        library: The name that saved directories carry.
        describe: `describe(model, model_args)` is the model's base, or None where it is not of this library.
            `model_args` are constructor arguments that the model does not show, from `save`.
        build: `build(base)` is the dense model, on the CPU, at any weights.
        files: `files(base, spec, save_id)` are the library's own JSON files by name, for its stock loading call.
    """

    library: str
    describe: Callable[[nn.Module, dict[str, Any] | None], BaseModel | None]
    build: Callable[[BaseModel], nn.Module]
    files: Callable[[BaseModel, dict[str, Any], str], dict[str, Any]]


_HOSTS: dict[str, LibraryAdapter] = {}


def register_adapter(host: LibraryAdapter) -> LibraryAdapter:
    """The host itself, known from now on to `save` and `load`; one of the same name is replaced."""
    _HOSTS[host.library] = host
    return host


def describe(model: nn.Module, model_args: dict[str, Any] | None) -> BaseModel | None:
    """The model's base by the first host that knows it; None for a plain module."""
    for host in _HOSTS.values():
        base = host.describe(model, model_args)
        if base is not None:
            return base
    return None


def host_of(base: BaseModel) -> LibraryAdapter:
    """The host of a base's library.

    Raises:
        StorageError: there is none.
    """
    if base.library not in _HOSTS:
        known = ", ".join(_HOSTS) or "none"
        raise StorageError(
            f"the saved model is {base.name!r} of the library {base.library!r}; known libraries: {known}. "
            f"Install it (pip install {base.library}) and import bayesprune again, or build the dense model yourself "
            "and pass it: load(directory, model=...)."
        )
    return _HOSTS[base.library]


def build(base: BaseModel) -> nn.Module:
    """The dense base, built by its host; the global random numbers stay where they were.

    Raises:
        StorageError: it cannot be built, whatever the library says of it.
    """
    host = host_of(base)
    check_integers({"args": base.args, "config": base.config}, f"the base {base.name!r}")
    try:
        with torch.random.fork_rng(devices=[]):
            return host.build(base)
    except StorageError:
        raise
    except Exception as error:  # a constructor that is given anything may raise anything
        said = f"{type(error).__name__}: {error}"[:_MAX_SAID]
        raise StorageError(
            f"{base.library} does not build {base.name!r} with {reprlib.repr(base.args)}: {said}"
        ) from error
