"""Lets the config of a model of transformers say the sizes that a uniform cut gave it.

A model whose config says all its shapes loads without this library. Whether it does is not decided by a table of
architectures: the fields that counted what was cut are changed, and a model that is built from that config must have
the shapes of the cut one.
"""

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import nn

from bayesprune.layers import VariationalLayer
from bayesprune.prune.graph.group import ChannelGroup

_LOGGER = logging.getLogger(__name__)

_HEADS = (
    *("num_attention_heads", "num_heads", "n_head", "n_heads", "encoder_attention_heads", "decoder_attention_heads"),
    *("num_key_value_heads", "num_kv_heads"),
)
_MLP = (
    *("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner", "hidden_dim"),
    *("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"),
)
_WIDTH = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim")


def follow_config(model: nn.Module, removed: Sequence[tuple[ChannelGroup, int]]) -> dict[str, int] | None:
    """Sets the fields of the model's config to the new sizes; which, or None where no config can say them.

    Args:
        model: After the cut.
        removed: Every group, and how many units left it.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "attribute_map") or not hasattr(config, "to_dict"):
        return None
    heads = _sizes((before, after) for group, count in removed for before, after in _heads(group, count))
    channels = _sizes((before, after) for group, count in removed for before, after in _channels(group, count))
    dims = {group.unit_size for group, count in removed if group.attention and count}
    for with_width, with_dim in product((False, True), (False, True) if len(dims) == 1 else (False,)):
        changed: dict[str, int] = {}
        for path, part in _parts(config):
            for name in (*_HEADS, *_MLP, *(_WIDTH if with_width else ())):
                value = vars(part).get(name)
                if (
                    name == "n_inner" and name in vars(part) and value is None
                ):  # GPT-2's way to say four times the width
                    value = 4 * getattr(part, "hidden_size", 0)
                sizes = heads if name in _HEADS else channels
                if type(value) is int and sizes.get(value, value) != value:
                    changed[f"{path}{name}"] = sizes[value]
                    if with_dim and name in _HEADS:  # some models take it from a field that others do not have
                        changed[f"{path}head_dim"] = min(dims)
        proposal = copy.deepcopy(config)
        _set(proposal, changed)
        described = _described_by(type(model), proposal)
        if described is not None and _shapes(described) == _shapes(model):
            _follow_attributes(model, described)
            own = [id(part) for _, part in _parts(config)]
            configs = {id(found): found for module in model.modules() if (found := getattr(module, "config", None))}
            for other in configs.values():  # T5's two stacks have copies of their own
                if other is config or (type(other) is type(config) and id(other) not in own):
                    _set(other, changed)
            return changed
    return None


def _set(config: Any, values: Mapping[str, int]) -> None:
    for path, part in _parts(config):
        for key, value in values.items():
            prefix, name = key[: len(path)], key[len(path) :]
            if prefix == path and "." not in name:
                setattr(part, name, value)


def _heads(group: ChannelGroup, count: int) -> Iterator[tuple[int, int]]:
    """Numbers before and after of query heads, and of key and value heads where they are less."""
    units, each = len(group.units), group.heads_per_unit
    for factor in {each, 1} if each else ():
        yield units * factor, (units - count) * factor


def _channels(group: ChannelGroup, count: int) -> Iterator[tuple[int, int]]:
    units = len(group.units)
    for factor in {group.unit_size, 1} if not group.is_heads else ():  # a gate and its values are one fused layer
        yield units * factor, (units - count) * factor


def _sizes(pairs: Iterable[tuple[int, int]]) -> dict[int, int]:
    """New size by old size, as far as all groups of an old size have one new size."""
    found: dict[int, set[int]] = {}
    for before, after in pairs:
        found.setdefault(before, set()).add(after)
    return {before: after.pop() for before, after in found.items() if len(after) == 1}


def _parts(config: Any) -> Iterator[tuple[str, Any]]:
    """The config and those inside it, each with the prefix of its fields."""
    yield "", config
    for name, value in vars(config).items():
        if hasattr(value, "attribute_map"):
            yield f"{name}.", value


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that the stock model has too."""
    companions = {
        f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, VariationalLayer)
        for key in (*module._parameters, *module._buffers)
        if key not in module.posterior_names
    }
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in companions}


def _follow_attributes(model: nn.Module, described: nn.Module) -> None:
    """Gives modules the sizes that they keep as attributes, as `LlamaMLP.intermediate_size`."""
    fresh = dict(described.named_modules())
    for name, module in model.named_modules():
        values = vars(fresh[name]) if name in fresh else {}
        for key in (*_HEADS, *_MLP, *_WIDTH):
            if type(value := values.get(key)) is int and type(vars(module).get(key)) is int:
                setattr(module, key, value)


def _described_by(model_class: Any, config: Any) -> nn.Module | None:
    """The model, on the meta device, that a config describes; None for none, or a config that may not be saved."""
    try:
        read = type(config).from_dict(config.to_dict())
        if hasattr(read, "validate"):
            read.validate()
        with torch.device("meta"):
            return model_class(read)
    except Exception as error:  # noqa: BLE001 (the own checks of configs raise types of libraries not imported here)
        _LOGGER.debug("%s does not describe the cut model: %s", type(config).__name__, error)
        return None
