"""Makes transformers' own `from_pretrained` and `save_pretrained` read and write models of other shapes.

transformers lets a library register a quantizer: its name stands in `config.json`, and it may change the model that
is built from the config before the weights are read. Ours cuts that model to the saved shapes and makes its layers
variational. Without `import bayesprune` a model whose shapes changed is refused by transformers.

What is written under `quantization_config` is what differs from the model that the config alone describes; where
nothing does, nothing is written, and the directory is an ordinary one. Tensors keep the names they have in memory:
transformers renames them for some architectures on the way to the disk, which the stds would not follow.
"""

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bayesprune.errors import StorageError, UnsupportedModelError
from bayesprune.hosts.transformers import layers  # noqa: F401  (registers Conv1D)
from bayesprune.hosts.transformers.changes import Renaming, changes, spec_of
from bayesprune.hosts.transformers.host import LIBRARY, build, hf_base, skeleton
from bayesprune.storage.base import Base, Host, register_host
from bayesprune.storage.files import FORMAT_VERSION
from bayesprune.storage.load import check_same_save
from bayesprune.storage.rebuild import rebuild, shape_differences
from bayesprune.storage.spec import Spec, describe_model, tied_names

METHOD = "bayesprune"


class BayespruneConfig(QuantizationConfigMixin):
    """What stands under `quantization_config` in `config.json`.

    Attributes:
        architecture: Class of the saved model.
        dtype: What its config says of its dtype.
        changed: What differs from the model that the config describes.
        save_id: The same in all files of one save.
    """

    def __init__(
        self,
        *,
        architecture: str = "",
        dtype: str = "",
        changed: dict[str, Any] | None = None,
        save_id: str = "",
        format_version: int = FORMAT_VERSION,
        **_: Any,
    ) -> None:
        if format_version != FORMAT_VERSION:
            raise StorageError(
                f"config.json has format_version {format_version!r}; this version of bayesprune reads "
                f"{FORMAT_VERSION}. Install the version that wrote it."
            )
        self.quant_method = METHOD  # type: ignore[assignment]
        self.format_version = format_version
        self.architecture, self.dtype = architecture, dtype
        self.changed = changed or {}
        self.save_id = save_id


class BayespruneQuantizer(HfQuantizer):
    """Cuts and converts the model that transformers built, before it reads the weights; quantizes nothing."""

    quantization_config: BayespruneConfig  # type: ignore[assignment]
    spec: Spec | None = None

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
        spec = spec_of(config.changed, model, where)
        found = _headers(checkpoint_files, where, config.save_id)
        same_class = type(model).__name__ == config.architecture
        rename = Renaming((name for name, _ in model.named_modules(remove_duplicate=False)), model.base_model_prefix)
        tensors = {new: meta for name, meta in found.items() if (new := rename.tensor(name))}
        tensors = {spec.tied.get(name, name) if name in spec.shapes else name: meta for name, meta in tensors.items()}
        recorded = {name: shape for name, shape in spec.shapes.items() if name not in spec.tied}
        if not same_class:  # another head: its own tensors are fresh, those of the saved head are left out
            fresh = {name: tensor for name, tensor in model.state_dict().items() if name in recorded}
            tensors = fresh | {name: meta for name, meta in tensors.items() if name in recorded}
        shapes = {name: tuple(meta.shape) for name, meta in tensors.items()}
        if problems := shape_differences(shapes, recorded, str(Path(where).parent)):
            raise StorageError(
                f"the tensors of {Path(where).parent} do not fit its config.json.\n" + "\n".join(problems)
            )
        wanted = model.config.dtype
        if isinstance(wanted, torch.dtype) and str(wanted).removeprefix("torch.") != config.dtype:
            tensors = {name: _cast(name, meta, wanted, spec) for name, meta in tensors.items()}
        rebuild(model, spec, tensors)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        model.all_tied_weights_keys = {alias: first for alias, first in spec.tied.items() if alias in parameters}
        self.spec = spec
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """None: the files hold the names that the model has in memory."""
        return []

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        """The model, once its tied buffers are tied again; no quantized one, so it can be cast and trained.

        Raises:
            StorageError: a tensor was not read, or names share tensors otherwise than recorded.
        """
        assert self.spec is not None, "the model was prepared before"
        buffers = dict(model.named_buffers(remove_duplicate=False))
        for alias, first in self.spec.tied.items():
            if alias in buffers:
                owner, _, key = alias.rpartition(".")
                setattr(model.get_submodule(owner), key, buffers[first])
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
        """What `save_pretrained` asks for; the config now says how the model differs from it, as it is at this time."""
        base = hf_base(model)
        if base is None:
            raise UnsupportedModelError(f"{type(model).__name__} is no class of transformers; use bayesprune.save.")
        save_id = uuid.uuid4().hex
        spec = describe_model(model, skeleton(base)).to_json()
        values = quantization_config(base, spec, save_id)
        vars(model).pop("_weight_conversions", None)
        vars(model.config).pop("quantization_config", None)
        if values is None:
            return None, {}
        self.quantization_config = BayespruneConfig(**values)
        model.config.quantization_config = self.quantization_config
        vars(model)["_weight_conversions"] = []  # the names in memory, as in the spec
        return {k: v for k, v in model.state_dict().items() if k not in spec["tied"]}, {"save_id": save_id}

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


def quantization_config(base: Base, spec: dict[str, Any], save_id: str) -> dict[str, Any] | None:
    """The entry of `config.json`; None where the config says all there is."""
    if (changed := changes(spec, skeleton(base))) is None:
        return None
    return BayespruneConfig(
        architecture=base.name, dtype=base.args["config"]["dtype"], changed=changed, save_id=save_id
    ).to_dict()


def files(base: Base, spec: dict[str, Any], save_id: str) -> dict[str, Any]:
    """transformers' `config.json`, and `generation_config.json` for a model that generates."""
    config = dict(base.args["config"])
    if (values := quantization_config(base, spec, save_id)) is not None:
        config["quantization_config"] = values
    generation = base.config.get("generation_config")
    return {"config.json": config} | ({} if generation is None else {"generation_config.json": generation})


def _build(base: Base) -> nn.Module:
    return follow_saves(build(base))


def _headers(files: Sequence[str], where: str, save_id: str) -> dict[str, Tensor]:
    """The tensors of safetensors files by name, on the meta device."""
    found: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                found |= {name: _meta(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
        except (OSError, SafetensorError) as error:
            raise StorageError(f"{path} cannot be read: {error}. Save or copy it anew.") from error
        check_same_save(str(path), metadata.get("save_id"), where, save_id)
    return found


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _meta(tensor: Any) -> Tensor:
    if tensor.get_dtype() not in _DTYPES:
        raise StorageError(f"a tensor of dtype {tensor.get_dtype()}; expected one of {', '.join(_DTYPES)}.")
    return torch.empty(tensor.get_shape(), dtype=_DTYPES[tensor.get_dtype()], device="meta")


def _cast(name: str, tensor: Tensor, dtype: torch.dtype, spec: Spec) -> Tensor:
    """The tensor in the dtype that was asked for, but stds in float32 whatever it is."""
    is_companion = name.rpartition(".")[0] in spec.variational and name.endswith("_log_std")
    return tensor if is_companion or not tensor.is_floating_point() else tensor.to(dtype)


HOST = register_host(Host(LIBRARY, hf_base, _build, files))
if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(METHOD)(BayespruneConfig)
    register_quantizer(METHOD)(BayespruneQuantizer)
