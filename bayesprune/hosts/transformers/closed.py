"""What a file may say of a model of transformers: plain values for what its config declares, nothing that leads out.

A config of transformers takes any key and any value, and some lead out of the directory they were read from: to code
(`auto_map`), to kernels of a hub (`attn_implementation`), to a timm model in another folder (`architecture`), and by
`attribute_map` any name leads to any other. So the file's keys are cut first (`for_building`), the config that came of
them is checked name by name (`check_config`), and all is built where there is no network and nobody to ask (`closed`).
"""

import dataclasses
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import constants
from transformers import GenerationConfig, PreTrainedConfig, dynamic_module_utils

from bayesprune.errors import StorageError
from bayesprune.hosts import timm_names

# Said by the saved model's own files, or leading out of them: no part of what a model is built from.
_NOT_FOR_BUILDING = frozenset({"quantization_config", "auto_map", "_name_or_path", "name_or_path"})
_NOT_FOR_BUILDING |= {"transformers_weights", "custom_pipelines", "distributed_config"}
_IMPLEMENTATIONS = frozenset(
    f"{prefix}{kind}_implementation{suffix}"
    for prefix in ("", "_")
    for kind in ("attn", "experts")
    for suffix in ("", "_internal")
)
_NOT_FOR_BUILDING |= _IMPLEMENTATIONS
_OWN_IMPLEMENTATIONS: tuple[str | None, ...] = (None, "eager", "sdpa", "grouped_mm", "batched_mm")
_LEADING = frozenset({"auto_map", "attribute_map", "transformers_weights", "custom_pipelines"})
# Objects whose keys are the user's own words.
_WORDS = frozenset({"id2label", "label2id", "vocabulary_map"})
_TIMM_NAMES = frozenset({"architecture", "backbone"})


def for_building(config: dict[str, Any]) -> dict[str, Any]:
    """The config, and those inside it, without what is not for building."""
    return {
        key: value if key in _WORDS else _cut(value) for key, value in config.items() if key not in _NOT_FOR_BUILDING
    }


def leading_out(config: Any) -> list[str]:
    """The keys of a `config.json`, at any depth, that would have transformers read or run something else."""
    if isinstance(config, list):
        return [name for item in config for name in leading_out(item)]
    if not isinstance(config, dict):
        return []
    found = [
        key
        for key, value in config.items()
        if key in _LEADING or (key in _IMPLEMENTATIONS and value not in _OWN_IMPLEMENTATIONS)
    ]
    return found + [name for key, value in config.items() if key not in _WORDS for name in leading_out(value)]


def check_config(config: PreTrainedConfig, *, may_be_asked_for: bool = False) -> None:
    """Refuses a config that holds more than values: for what it declares, and for names that mean nothing else.

    Args:
        config: As transformers made it of a file, before a model is made of it.
        may_be_asked_for: Whether the caller may have named another attention or experts, which then need no hub.

    Raises:
        StorageError: it, or a config in it, holds something that leads out of the file.
    """
    for found in _configs(config, set()):
        kind, values = type(found), _values(found)
        declared = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
        for name, value in values.items():
            if name in _IMPLEMENTATIONS:
                is_fine = "/" not in str(value) if may_be_asked_for else value in _OWN_IMPLEMENTATIONS
            elif name in _LEADING or (name not in declared and _is_taken(kind, name)):
                is_fine = False
            elif name in _TIMM_NAMES:
                is_fine = value is None or timm_names.is_plain_name(value)
            elif name == "model_args":
                is_fine = not (isinstance(value, dict) and timm_names.NOT_FOR_BUILDING & value.keys())
            else:
                is_fine = name in _WORDS or not leading_out(value)
            if not is_fine:
                raise StorageError(
                    f"the config of {kind.__name__} says {name}={str(value)[:80]!r}, which would have transformers "
                    "read or run something beside the saved files. If it is meant, load without it, and set it after."
                )


def check_generation(config: dict[str, Any]) -> None:
    """Refuses a generation config with values that would hide methods of its class.

    Raises:
        StorageError: there is one.
    """
    if hidden := [name for name in config if callable(getattr(GenerationConfig, name, None))]:
        raise StorageError(f"the generation config says {', '.join(hidden[:4])}, which are methods. It is damaged.")


def forget_leading(config: PreTrainedConfig) -> None:
    """Takes what leads out of a file from a config that is to be written by transformers itself, and from those in it.

    A config that came from the Hub names the code that a class of transformers has taken the place of.
    """
    for found in _configs(config, set()):
        for name in _LEADING:
            _values(found).pop(name, None)


@contextmanager
def closed() -> Iterator[None]:
    """Inside, huggingface_hub asks no server, and transformers does not ask the user whether code may be run."""
    offline, seconds = constants.HF_HUB_OFFLINE, dynamic_module_utils.TIME_OUT_REMOTE_CODE
    try:
        constants.HF_HUB_OFFLINE, dynamic_module_utils.TIME_OUT_REMOTE_CODE = True, 0
        yield
    finally:
        constants.HF_HUB_OFFLINE, dynamic_module_utils.TIME_OUT_REMOTE_CODE = offline, seconds


def _cut(value: Any) -> Any:
    if isinstance(value, list):
        return [_cut(item) for item in value]
    return for_building(value) if isinstance(value, dict) else value


def _configs(value: Any, seen: set[int]) -> Iterator[PreTrainedConfig]:
    """The configs in a value, each once."""
    if isinstance(value, PreTrainedConfig) and id(value) not in seen:
        seen.add(id(value))
        yield value
        value = _values(value)
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _configs(item, seen)


def _values(config: PreTrainedConfig) -> dict[str, Any]:
    """What the config itself holds; its own lookup follows `attribute_map`."""
    return object.__getattribute__(config, "__dict__")


def _is_taken(kind: type[PreTrainedConfig], name: str) -> bool:
    """Whether a value of this name hides something of the class other than a setting: a method, or a table of names."""
    found = inspect.getattr_static(kind, name, None)
    if found is None or hasattr(type(found), "__set__"):
        return False
    return name.startswith("_") or isinstance(found, dict) or callable(getattr(kind, name))
