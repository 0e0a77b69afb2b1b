"""timm: how its models are named and rebuilt, and the entry point behind `timm.create_model("local-dir:...")`.

Importing this module registers both. Without it timm says "Unknown model (bayesprune_pruned)" for a saved directory.
"""

import dataclasses
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from bayesprune.errors import StorageError
from bayesprune.hosts.timm_names import ARCHITECTURE, ENTRYPOINT_ARGS, NOT_FOR_BUILDING, is_plain_name
from bayesprune.layers import VariationalLayer, register_layer
from bayesprune.layers.stock import VariationalConv2d
from bayesprune.storage import base as bases
from bayesprune.storage.base import BaseModel, LibraryAdapter, register_adapter
from bayesprune.storage.load import check_file, check_same_save, fill, read
from bayesprune.storage.reading import bounded_building
from bayesprune.storage.rebuild import for_other_head, rebuild, with_new
from bayesprune.storage.spec import ModelRecord

try:
    import timm
    from timm.data.config import resolve_data_config
    from timm.layers.conv2d_same import Conv2dSame
    from timm.models import PretrainedCfg, is_model, load_checkpoint, register_model
except ImportError as error:
    raise ImportError(
        f"bayesprune.hosts.timm.reload needs timm >= 1.0.23 ({error}): pip install 'bayesprune[timm]'"
    ) from error

# Where the dense weights came from, and how they were to be converted, is not true of the saved ones.
_SOURCE_KEYS = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load", "label_offset")


def timm_base(model: nn.Module, model_args: Mapping[str, Any] | None = None) -> BaseModel | None:
    """The architecture a timm model was created as, and with what arguments; None for any other module.

    Recent timm versions remember the arguments; for older ones `num_classes` and `in_chans` are read off the model.

    Args:
        model: Any module.
        model_args: Arguments of `timm.create_model` that the model does not show; None leaves one out.

    Raises:
        StorageError: an argument that timm remembers cannot be written as JSON.
    """
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        return None
    if not is_model(config["architecture"]):
        return None
    args = {k: v for k, v in getattr(model, "_model_args", {}).items() if k not in ENTRYPOINT_ARGS}
    if isinstance(num_classes := getattr(model, "num_classes", None), int):
        args["num_classes"] = num_classes
    size: list[int] = list(config.get("input_size") or (3, 224, 224))
    if (in_chans := _in_chans(model, config)) not in (None, size[0]):
        args["in_chans"] = in_chans
    args = {k: v for k, v in (args | dict(model_args or {})).items() if v is not None}
    for key, value in args.items():
        if not _is_json(value):
            raise StorageError(
                f"the timm model was created with {key}={value!r}, which JSON cannot hold; pass its name or another "
                f"plain value as model_args={{{key!r}: ...}}, or None to leave it out."
            )
    size[0] = args.get("in_chans", size[0])
    if (image := args.get("img_size")) is not None:
        size[1:] = (image, image) if isinstance(image, int) else image
    kept = {k: v for k, v in config.items() if k not in _SOURCE_KEYS and _is_json(v)}
    kept |= {"input_size": size} | {k: args[k] for k in ("num_classes",) if k in args}
    # What is built now to compare with the model is to be what is built from the file: lists, no tuples.
    return BaseModel("timm", config["architecture"], *json.loads(json.dumps([args, kept])))


def build(base: BaseModel) -> nn.Module:
    """The dense timm model, with fresh weights.

    Raises:
        StorageError: timm does not know the name, or the arguments are not for the constructor.
    """
    if not is_plain_name(base.name) or not is_model(base.name):
        raise StorageError(
            f"timm {timm.__version__} has no architecture {base.name!r}. Import the module that registers it, or "
            "install the timm version the model was saved with (it is in bayesprune.json)."
        )
    if forbidden := NOT_FOR_BUILDING & base.args.keys():
        raise StorageError(
            f"the arguments to build timm's {base.name!r} with hold {', '.join(sorted(forbidden))}; expected only what "
            "the architecture's constructor takes."
        )
    known = {field.name for field in dataclasses.fields(PretrainedCfg)} - set(_SOURCE_KEYS)
    config = {k: tuple(v) if isinstance(v, list) else v for k, v in base.config.items() if k in known}
    model = timm.create_model(base.name, pretrained=False, pretrained_cfg=config, **base.args)
    vars(model).setdefault("_model_args", dict(base.args))  # so that older timm versions remember them as well
    return model


def data_config(name: str) -> dict[str, Any]:
    """Image preparation of an architecture's pretrained weights: size, mean, std, interpolation, crop.

    Raises:
        ValueError: timm has no such architecture.
    """
    _check_known(name)
    config = timm.get_pretrained_cfg(name)
    return resolve_data_config(pretrained_cfg={} if config is None else config.to_dict())


def create(
    name: str,
    *,
    num_classes: int,
    input_size: tuple[int, int, int],
    checkpoint: Path | None = None,
    pretrained: bool = False,
) -> nn.Module:
    """A timm model for images of this size (channels, height, width), with trained weights where they are given.

    Raises:
        ValueError: timm has no such architecture, or the checkpoint does not fit it.
        FileNotFoundError: the checkpoint is missing.
    """
    _check_known(name)
    if checkpoint is not None and not checkpoint.is_file():
        raise FileNotFoundError(f"no checkpoint {str(checkpoint)!r}; expected a .safetensors or .pth file.")
    args: dict[str, Any] = {"num_classes": num_classes, "in_chans": input_size[0], "pretrained": pretrained}
    try:
        model = timm.create_model(name, img_size=input_size[1:], **args)
    except TypeError:  # convolutional networks take images of any size
        model = timm.create_model(name, **args)
    if checkpoint is not None:
        try:
            load_checkpoint(model, str(checkpoint), strict=True)
        except (RuntimeError, KeyError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
            raise ValueError(
                f"checkpoint {str(checkpoint)!r} does not fit {name} with {num_classes} classes and {input_size[0]} "
                f"input channels, or is no file of tensors: {error}"
            ) from error
    return model


def files(base: BaseModel, spec: dict[str, Any], save_id: str) -> dict[str, Any]:
    """timm's `config.json`, which names our entry point and holds what that needs."""
    num_classes = {k: base.args[k] for k in ("num_classes",) if k in base.args}
    args = {"base": base.name, "base_args": base.args, "spec": spec, "save_id": save_id} | num_classes
    config = {"architecture": ARCHITECTURE, **num_classes, "model_args": args, "pretrained_cfg": base.config}
    return {"config.json": config}


def bayesprune_pruned(
    pretrained: bool = False,
    *,
    base: str | None = None,
    base_args: dict[str, Any] | None = None,
    spec: dict[str, Any] | None = None,
    save_id: str | None = None,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """The model of a saved directory, for `timm.create_model("local-dir:DIRECTORY", pretrained=True)`.

    timm passes what `config.json` holds. With `pretrained=False` the model has the saved shapes and fresh weights.
    As with timm's own models, it is in training mode, and arguments that change no shape (`drop_rate`,
    `drop_path_rate`, ...) may be given, and another `num_classes`: the head is a new one then, untrained and
    deterministic.

    Raises:
        StorageError: it is not called for a local directory, the directory is damaged, or an argument contradicts the
            saved model.
    """
    if base is None or spec is None or not isinstance(pretrained_cfg, dict):
        raise StorageError(
            f"{ARCHITECTURE} is not an architecture to create by name: it belongs to a directory that bayesprune.save "
            f'wrote. Use timm.create_model("local-dir:DIRECTORY", pretrained=True).'
        )
    is_local = pretrained_cfg.get("source") == "local-dir"
    directory = Path(pretrained_cfg["file"]) if is_local else Path()
    saved = read(directory) if is_local else None
    if saved is not None:  # nothing is built from a file that was not checked
        check_same_save(str(directory / "config.json"), save_id, str(directory / "bayesprune.json"), saved.save_id)
        check_file(saved, directory / "config.json")
    config = {k: v for k, v in pretrained_cfg.items() if k not in _SOURCE_KEYS}
    for key in ("pretrained_model_args", "cache_dir"):
        kwargs.pop(key, None)
    said = {"library": "timm", "name": base, "args": base_args or {}, "config": config}
    described = ModelRecord.from_json(spec, "config.json")
    with bounded_building(_claimed(described) if saved is None else saved.tensors, len(described.classes)):
        skeleton, dense = _skeleton(BaseModel.from_json(said, "config.json"), kwargs)
    vars(skeleton)["pretrained_cfg"].update(pretrained_cfg_overlay or {})  # how images are prepared, not what is built
    if not pretrained:
        return rebuild(skeleton, described if dense is None else for_other_head(described, dense, skeleton)[0])
    if saved is None:
        raise StorageError(
            f"{ARCHITECTURE} reads weights from a local directory, not from {pretrained_cfg.get('source')!r}. Download "
            'it (huggingface_hub.snapshot_download) and use timm.create_model("local-dir:DIRECTORY", pretrained=True).'
        )
    if dense is not None:
        other, fresh = for_other_head(saved.spec, dense, skeleton)
        saved = dataclasses.replace(saved, spec=other, tensors=with_new(saved.tensors, other, fresh, skeleton))
    return fill(skeleton, saved, directory)


def _claimed(spec: ModelRecord) -> dict[str, torch.Tensor]:
    """The tensors that a spec says there are, where no file of tensors is at hand to say so."""
    try:
        return {name: torch.empty(shape, device="meta") for name, shape in spec.shapes.items()}
    except RuntimeError as error:
        raise StorageError(f"config.json: spec has shapes of no tensor: {error}. It is damaged.") from error


def _check_known(name: str) -> None:
    if not is_model(name):
        similar = ", ".join(timm.list_models(f"*{name[:6]}*")[:5]) or "none with a similar name"
        raise ValueError(f"timm {timm.__version__} has no architecture {name!r}; it has {similar}.")


def _skeleton(base: BaseModel, overrides: Mapping[str, Any]) -> tuple[nn.Module, nn.Module | None]:
    """The dense model with the arguments of the call; the saved one as well where they ask for another head."""
    changed = {k: v for k, v in overrides.items() if k not in base.args or _text(v) != _text(base.args[k])}
    saved = bases.build(base)
    if not changed:
        return saved, None
    asked = bases.build(dataclasses.replace(base, args=base.args | changed))
    alike = {k: v for k, v in changed.items() if k != "num_classes"}
    same_head = bases.build(dataclasses.replace(base, args=base.args | alike)) if len(alike) < len(changed) else asked
    if _shapes(same_head) != _shapes(saved):
        raise StorageError(
            f"the arguments {changed} give a {base.name!r} of other shapes than the saved one, created with "
            f"{base.args}. Create the model without them, and change it afterwards."
        )
    return asked, None if _shapes(asked) == _shapes(saved) else saved


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _in_chans(model: nn.Module, config: Mapping[str, Any]) -> int | None:
    if isinstance(found := getattr(model, "in_chans", None), int):
        return found
    first = config.get("first_conv")
    layer = dict(model.named_modules()).get(first) if isinstance(first, str) else None
    return layer.in_channels if isinstance(layer, nn.Conv2d) else None


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _text(value: Any) -> str:
    return json.dumps(value, default=repr)


@register_layer(Conv2dSame)
class VariationalConv2dSame(VariationalConv2d, Conv2dSame):
    """TensorFlow-style padding: its own forward, which is linear in its weight."""

    operation = VariationalLayer.operation


HOST = register_adapter(LibraryAdapter("timm", timm_base, build, files))
if not is_model(ARCHITECTURE):
    register_model(bayesprune_pruned)
