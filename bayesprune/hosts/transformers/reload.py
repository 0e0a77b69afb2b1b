"""Makes transformers' own `from_pretrained` and `save_pretrained` read and write models of other shapes.

transformers lets a library register a quantizer: its name stands in `config.json`, and it may change the model that
is built from the config before the weights are read. Ours cuts that model to the saved shapes and makes its layers
variational. Without `import bayesprune` a model whose shapes changed is refused by transformers.

What is written under `quantization_config` is what differs from the model that the config alone describes; where
nothing does, nothing is written, and the directory is an ordinary one. Tensors keep the names they have in memory:
transformers renames them for some architectures on the way to the disk, which the stds would not follow.
"""

import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bayesprune.errors import StorageError, UnsupportedModelError
from bayesprune.hosts.transformers import layers  # noqa: F401  (registers Conv1D)
from bayesprune.hosts.transformers.closed import check_config, for_building, forget_leading, leading_out
from bayesprune.hosts.transformers.heads import has_other_sizes, with_other_class, with_other_sizes
from bayesprune.hosts.transformers.host import LIBRARY, Renaming, build, changes, hf_base, skeleton, spec_of
from bayesprune.storage import coding
from bayesprune.storage.base import BaseModel, LibraryAdapter, register_adapter
from bayesprune.storage.digests import check_json, check_seal, json_digest, sealed, tensor_header
from bayesprune.storage.load import check_same_save
from bayesprune.storage.reading import FORMAT_VERSION, read_header, read_json, read_tensors
from bayesprune.storage.rebuild import difference, rebuild, shape_differences
from bayesprune.storage.save import lost
from bayesprune.storage.spec import ModelRecord, computed_buffers, describe_model, tied_names, unsaved_buffers

METHOD = "bayesprune"


class BayespruneConfig(QuantizationConfigMixin):
    """The content of `quantization_config` in `config.json`.

    Attributes:
        architecture: Class of the saved model.
        dtype: What its config says of its dtype.
        changed: What differs from the model that the config describes.
        save_id: The same in all files of one save.
        config_sha256, sha256: Digests of the rest of `config.json` and of this entry.
    """

    def __init__(
        self,
        *,
        architecture: str = "",
        dtype: str = "",
        changed: dict[str, Any] | None = None,
        save_id: str = "",
        config_sha256: str = "",
        sha256: str = "",
        format_version: int = FORMAT_VERSION,
        **_: Any,
    ) -> None:
        if type(format_version) is not int or format_version != FORMAT_VERSION:
            raise StorageError(
                f"config.json has format_version {format_version!r}; this version of bayesprune reads "
                f"{FORMAT_VERSION}. Install the version that wrote it."
            )
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format_version = format_version
        self.architecture, self.dtype, self.save_id = architecture, dtype, save_id
        self.changed = changed if isinstance(changed, dict) and _are_names(changed.get("tied")) else {}
        self.config_sha256, self.sha256 = config_sha256, sha256


class BayespruneQuantizer(HfQuantizer):
    """Cuts and converts the model that transformers built, before it reads the weights; quantizes nothing."""

    quantization_config: BayespruneConfig  # type: ignore[assignment]
    spec: ModelRecord | None = None
    _decoded: TemporaryDirectory | None = None

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        """The model with the saved shapes and layers, still on the meta device.

        Raises:
            StorageError: the files do not fit the config or the model.
        """
        config = self.quantization_config
        if not checkpoint_files or not all(str(file).endswith(".safetensors") for file in checkpoint_files):
            raise StorageError(
                f"a model with quant_method {METHOD!r} is read from safetensors files, not from "
                f"{list(checkpoint_files or ())}. Pass the directory or repository it was saved to."
            )
        where = str(Path(checkpoint_files[0]).parent / "config.json")
        for path in checkpoint_files:
            if os.path.normpath(Path(path).parent) != os.path.normpath(Path(where).parent):
                raise StorageError(f"{path} is not in {Path(where).parent}, where the model's other files are.")
        # Some models make tensors by torch.Tensor(size), which is on the CPU whatever device is asked for.
        nn.Module.to(model, torch.device("meta"))
        found = _headers(checkpoint_files, where, config.save_id)
        rename = Renaming((name for name, _ in model.named_modules(remove_duplicate=False)), model.base_model_prefix)
        tensors = {new: meta for name, meta in found.items() if (new := rename.tensor(name))}
        spec, fresh = self._spec(model, tensors, Path(where))
        tensors = {spec.tied.get(name, name) if name in spec.shapes else name: meta for name, meta in tensors.items()}
        recorded = {name: shape for name, shape in spec.shapes.items() if name not in spec.tied} | spec.computed
        if fresh is not None:  # what the saved model had and this one has not is left out
            tensors = {name: meta for name, meta in tensors.items() if name in recorded and name not in fresh}
            state = model.state_dict()
            tensors |= {name: torch.empty(recorded[name], dtype=state[name].dtype, device="meta") for name in fresh}
        shapes = {name: tuple(meta.shape) for name, meta in tensors.items()}
        if problems := shape_differences(shapes, recorded, str(Path(where).parent)):
            raise StorageError(
                f"the tensors of {Path(where).parent} do not fit its config.json.\n" + "\n".join(problems)
            )
        self._decoded = _check_digests(config, checkpoint_files, Path(where))
        wanted = model.config.dtype
        if isinstance(wanted, torch.dtype) and str(wanted).removeprefix("torch.") != config.dtype:
            tensors = {name: _cast(name, meta, wanted, spec) for name, meta in tensors.items()}
        rebuild(model, spec, tensors)
        # transformers would fill them with anything, and masks are applied as soon as they are there.
        for layer, key, _ in _tied_buffers(model, spec):
            layer._buffers[key] = None
        for layer, key in _computed_buffers(model, spec):
            layer._non_persistent_buffers_set.discard(key)  # so that transformers reads them
        parameters = dict(model.named_parameters(remove_duplicate=False))
        model.all_tied_weights_keys = {alias: first for alias, first in spec.tied.items() if alias in parameters}
        self.spec = spec
        return model

    def _spec(
        self, model: PreTrainedModel, found: dict[str, Tensor], where: Path
    ) -> tuple[ModelRecord, frozenset[str] | None]:
        """What to make of the model, and which of its tensors are new; None where it is just what was saved."""
        config, saved = self.quantization_config, read_json(where)
        if type(model).__name__ != config.architecture:
            return with_other_class(config.changed, model, found, str(where))
        if not has_other_sizes(model, saved):
            return spec_of(config.changed, model, str(where)), None
        _check_config(saved, config, where)  # a model is built from it
        return with_other_sizes(config.changed, model, saved, str(where))

    def update_attn_implementation(self, config: Any) -> Any:
        """The same config: transformers asks for it before it builds the model, so this is where it is checked.

        The file itself only where the config knows its directory, as it does for the Auto classes; it is checked again
        afterwards.

        Raises:
            StorageError: `config.json` is not as it was saved, or leads out of its directory.
        """
        check_config(config, may_be_asked_for=True)
        where = Path(config.name_or_path) / "config.json"
        found = read_json(where) if config.name_or_path and where.is_file() else {}
        entry = found.get("quantization_config")
        if isinstance(entry, dict) and entry.get("save_id") == self.quantization_config.save_id:
            _check_config(found, self.quantization_config, where)
        return config

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        """None: the files hold the names that the model has in memory."""
        return []

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """The model, once its tied buffers are tied again; no quantized one, so it can be cast and trained.

        Raises:
            StorageError: a tensor was not read, or names share tensors otherwise than recorded.
        """
        assert self.spec is not None, "the model was prepared before"
        if self._decoded is not None:
            self._decoded.cleanup()
            self._decoded = None
        for layer, key, first in _tied_buffers(model, self.spec):
            layer._buffers[key] = model.get_buffer(first)
        for layer, key in _computed_buffers(model, self.spec):
            layer._non_persistent_buffers_set.add(key)
        vars(model).pop("quantization_method", None)
        vars(model)["is_quantized"] = False
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_is_quantized", None)
        if tied_names(model) != self.spec.tied:
            raise StorageError(
                f"{type(model).__name__} shares tensors between other names than recorded: "
                f"{sorted(set(tied_names(model).items()) ^ set(self.spec.tied.items()))[:6]}."
            )
        return model

    def get_state_dict_and_metadata(  # type: ignore[override]
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Answers `save_pretrained`, after the config was told how the model differs from it at this time."""
        base = hf_base(model)
        if base is None:
            raise UnsupportedModelError(f"{type(model).__name__} is no class of transformers; use bayesprune.save.")
        save_id = uuid.uuid4().hex
        dense = skeleton(base)
        if other := lost(model, dense):
            raise StorageError(
                difference("classes and functions", "that no file can say", other)
                + "\nUse bayesprune.save(model, directory, plain=True), and load with bayesprune.load(..., model=...)."
            )
        computed = computed_buffers(model, dense)
        spec = replace(describe_model(model, dense), computed=computed).to_json()
        values = quantization_config(base, spec, save_id)
        vars(model).pop("_weight_conversions", None)
        vars(model.config).pop("quantization_config", None)
        if values is None:
            return None, {}
        forget_leading(model.config)
        self.quantization_config = BayespruneConfig(**values)
        model.config.quantization_config = self.quantization_config
        vars(model)["_weight_conversions"] = []  # the names in memory, as in the spec
        tensors = {k: v for k, v in model.state_dict().items() if k not in spec["tied"]}
        tensors |= {k: v for k, v in unsaved_buffers(model).items() if k in computed}
        return tensors, {"save_id": save_id, **tensor_header(tensors)}

    def is_serializable(self) -> bool:  # type: ignore[override]
        """Yes."""
        return True

    @property
    def is_trainable(self) -> bool:  # type: ignore[override]
        """Yes, like any model."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Yes; the Trainer would ask for adapters otherwise."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Yes."""
        return True


def _tied_buffers(model: nn.Module, spec: ModelRecord) -> Iterator[tuple[nn.Module, str, str]]:
    """Module and key of every buffer that is another one under a second name, and the name of that one."""
    for alias, first in spec.tied.items():
        owner, _, key = alias.rpartition(".")
        if key in (module := model.get_submodule(owner))._buffers:
            yield module, key, first


def _computed_buffers(model: nn.Module, spec: ModelRecord) -> Iterator[tuple[nn.Module, str]]:
    """Module and key of every buffer outside the state dict whose values are in the files."""
    for name in spec.computed:
        owner, _, key = name.rpartition(".")
        yield model.get_submodule(owner), key


def follow_saves(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, whose own `save_pretrained` (the Trainer's too) writes what `from_pretrained` reads again.

    Models from `load` and `from_pretrained` do so already. What is written is the model as it is at that time.

    Raises:
        UnsupportedModelError: the model is quantized by another library.
    """
    found = getattr(model, "hf_quantizer", None)
    if isinstance(found, HfQuantizer) and not isinstance(found, BayespruneQuantizer):
        raise UnsupportedModelError(
            f"{type(model).__name__} is quantized with {found.quantization_config.quant_method}; expected a model with "
            "floating point weights."
        )
    if found is None:
        vars(model)["hf_quantizer"] = BayespruneQuantizer(BayespruneConfig())
    return model


def quantization_config(base: BaseModel, spec: dict[str, Any], save_id: str) -> dict[str, Any] | None:
    """The entry of `config.json`; None where the config says all there is."""
    if (changed := changes(spec, skeleton(base))) is None:
        return None
    config = base.args["config"]
    values = BayespruneConfig(
        architecture=base.name,
        dtype=config["dtype"],
        changed=changed,
        save_id=save_id,
        config_sha256=json_digest(for_building(config)),
    )
    return sealed(values.to_dict())


def files(base: BaseModel, spec: dict[str, Any], save_id: str) -> dict[str, Any]:
    """transformers' `config.json`, and `generation_config.json` for a model that generates."""
    config = dict(base.args["config"])
    if (values := quantization_config(base, spec, save_id)) is not None:
        config["quantization_config"] = values
    generation = base.config.get("generation_config")
    return {"config.json": config} | ({} if generation is None else {"generation_config.json": generation})


def _build(base: BaseModel) -> nn.Module:
    try:
        return follow_saves(build(base))
    except StrictDataclassError as error:
        raise StorageError(f"transformers does not take the saved config of {base.name}: {error}") from error


def _check_config(found: dict[str, Any], config: BayespruneConfig, where: Path) -> None:
    if names := leading_out(found):
        raise StorageError(f"{where} holds {', '.join(names[:4])}, which lead out of it; bayesprune.save writes none.")
    check_json(for_building(found), config.config_sha256, str(where))


def _are_names(tied: Any) -> bool:
    return isinstance(tied, dict) and all(isinstance(first, str) for first in tied.values())


def _check_digests(config: BayespruneConfig, files: Sequence[str], where: Path) -> TemporaryDirectory | None:
    """Refuses a config or tensors that are not those that were saved.

    Coded files are decoded into a temporary directory, and what is read from now on is in it.
    """
    found = read_json(where)
    values = found.get("quantization_config")
    if not isinstance(values, dict) or values.get("save_id") != config.save_id:
        raise StorageError(f"{where} is not the config.json that belongs to the files beside it. Copy both anew.")
    check_seal(values, f"quantization_config in {where}")
    _check_config(found, config, where)
    directory = None
    for index, path in enumerate(files):
        tensors, header = read_tensors(Path(path))
        if coding.is_coded(read_header(Path(path))[1], path):
            assert isinstance(files, list), "transformers reads the list that it hands over"
            directory = directory or TemporaryDirectory(prefix="bayesprune-")
            files[index] = str(Path(directory.name) / f"{index}.safetensors")
            save_file(tensors, files[index], metadata=header)
    return directory


def _headers(files: Sequence[str], where: str, save_id: str) -> dict[str, Tensor]:
    """The tensors of safetensors files by name, on the meta device."""
    found: dict[str, Tensor] = {}
    for path in files:
        tensors, metadata = read_header(Path(path))
        found |= tensors
        check_same_save(str(path), metadata.get("save_id"), where, save_id)
    return found


def _cast(name: str, tensor: Tensor, dtype: torch.dtype, spec: ModelRecord) -> Tensor:
    """The tensor in the dtype that was asked for, but stds in float32 whatever it is."""
    is_companion = name.rpartition(".")[0] in spec.variational and name.endswith("_log_std")
    return tensor if is_companion or not tensor.is_floating_point() else tensor.to(dtype)


HOST = register_adapter(LibraryAdapter(LIBRARY, hf_base, _build, files))
if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(BayespruneConfig)
    register_quantizer(METHOD)(BayespruneQuantizer)
