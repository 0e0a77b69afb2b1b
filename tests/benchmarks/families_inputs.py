"""An input for a tiny model of transformers, found by the names of its forward's arguments and by trying."""

import inspect
import re
from collections.abc import Iterator
from itertools import product
from typing import Any

from families_models import IMAGE, VOCABULARY

BATCH, TOKENS, MOST_TRIES = 2, 8, 12


def configs(config: Any) -> Iterator[Any]:
    """The config and its sub-configs."""
    yield config
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            yield from configs(value)


def setting(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these values that the config, or one of its sub-configs, has."""
    for part in configs(config):
        for name in names:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return default


def randint(low: int, high: int, *shape: int) -> Any:
    import torch

    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(1))


def randn(*shape: int) -> Any:
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def image_shape(config: Any) -> tuple[int, int, int]:
    side = setting(config, "image_size", "img_size", default=IMAGE)
    height, width = side if isinstance(side, list | tuple) else (side, side)
    channels = setting(config, "num_channels", "in_channels", "in_chans", "num_input_channels", default=3)
    return (channels if isinstance(channels, int) else 3), height, width


def values(name: str, config: Any) -> list[Any]:
    """What an argument of this name may be, the likeliest first; none for a name that is not known."""
    tokens = randint(3, min(9, setting(config, "vocab_size", default=VOCABULARY)), BATCH, TOKENS)
    channels, height, width = image_shape(config)
    frames = setting(config, "num_frames", default=2)
    mels = setting(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", "input_dim", default=16)
    mels = mels if isinstance(mels, int) else 16
    length = setting(config, "max_length", "max_source_positions", default=32)
    length = length if isinstance(length, int) else 32
    images = randn(BATCH, channels, height, width)
    found = {
        "input_ids": [tokens],
        "decoder_input_ids": [tokens],
        "bbox": [randint(0, 30, BATCH, TOKENS, 4).sort(-1).values],
        "pixel_values": [
            images,
            randn(BATCH, frames, channels, height, width),
            randn(BATCH, channels, 2 * height, 2 * width),
            randn(BATCH, channels, 64, 64),
            randn(BATCH, channels, 128, 128),
            randn(BATCH, channels, 224, 224),
        ],
        "pixel_values_videos": [randn(BATCH, frames, channels, height, width)],
        "input_values": [randn(BATCH, 2000), randn(BATCH, 1, 2000), randn(BATCH, length, mels), randn(BATCH, 32, mels)],
        "input_features": [
            randn(BATCH, mels, 2 * length),
            randn(BATCH, 32, mels),
            randn(BATCH, mels, 32),
            randn(BATCH, 64, mels),
        ],
        "past_values": [randn(BATCH, setting(config, "context_length", default=16), max(1, channels))],
    }
    return found.get(name, [])


KNOWN = (
    "input_ids",
    "decoder_input_ids",
    "bbox",
    "pixel_values",
    "pixel_values_videos",
    "input_values",
    "input_features",
    "past_values",
)


def labels(name: str, config: Any) -> list[Any]:
    """Labels for a model of this class name; none where it takes none that are known."""
    _, height, width = image_shape(config)
    kinds = {
        "SequenceClassification": [randint(0, 2, BATCH)],
        "ImageClassification": [randint(0, 2, BATCH)],
        "VideoClassification": [randint(0, 2, BATCH)],
        "AudioClassification": [randint(0, 2, BATCH)],
        "SemanticSegmentation": [randint(0, 2, BATCH, height, width)],
        "DepthEstimation": [],
        "CTC": [randint(3, 9, BATCH, 3)],
    }
    return next((found for kind, found in kinds.items() if kind in name), [randint(3, 9, BATCH, TOKENS)])


def find_inputs(model: Any) -> dict[str, Any]:
    """The first inputs that the model takes and answers with finite numbers, with labels where it takes them.

    Arguments that an error asks for by name are given in the next try.

    Raises:
        RuntimeError: none of those that were tried works.
    """
    accepted = inspect.signature(model.forward).parameters
    required = [name for name, p in accepted.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    main = getattr(model, "main_input_name", "input_ids")
    first = dict.fromkeys(name for name in ("input_ids", main, *required) if name in accepted)
    pending, tried, said = [tuple(first or (main,)), (main,)], set(), []
    while pending and len(tried) < MOST_TRIES:
        names = pending.pop(0)
        if names in tried:
            continue
        tried.add(names)
        choices = [values(name, model.config) for name in names]
        for chosen in product(*choices):
            inputs = dict(zip(names, chosen, strict=True))
            for labelled in (*with_labels(model, accepted), {}):
                error = answer(model, {**inputs, **labelled})
                if error is None:
                    return {**inputs, **labelled}
                said.append(error)
                asked = [n for n in re.findall(r"[a-z_0-9]+", error) if n in accepted and n in KNOWN and n not in names]
                pending += [(*names, *dict.fromkeys(asked))] if asked else []
        pending += [
            (*names, name) for name in ("decoder_input_ids", "pixel_values") if name in accepted and name not in names
        ]
    raise RuntimeError(
        f"{len(said)} inputs, the first: {said[0]}" if said else f"no value is known for {list(accepted)}"
    )


def with_labels(model: Any, accepted: Any) -> list[dict[str, Any]]:
    found = [{"labels": label} for label in labels(type(model).__name__, model.config)] if "labels" in accepted else []
    found += [spoken(model.config)] if "spectrogram_labels" in accepted else []
    return [*found, *([{"return_loss": True}] if "return_loss" in accepted else [])]


def spoken(config: Any) -> dict[str, Any]:
    """What FastSpeech2 is to say: two frames for every token, with pitch and energy."""
    return {
        "spectrogram_labels": randn(BATCH, 2 * TOKENS, config.num_mel_bins),
        "duration_labels": randint(2, 3, BATCH, TOKENS),
        "pitch_labels": randn(BATCH, TOKENS, 1),
        "energy_labels": randn(BATCH, TOKENS, 1),
    }


def answer(model: Any, inputs: dict[str, Any]) -> str | None:
    """What is wrong with the model's answer to these inputs; None where nothing is."""
    import torch

    from bayesprune.foundation.model import tensors_in

    try:
        with torch.no_grad():
            found = [tensor for tensor in tensors_in(model(**inputs)) if tensor.is_floating_point()]
    except Exception as error:  # noqa: BLE001 (an input that the model does not take)
        shapes = {name: tuple(getattr(value, "shape", ())) for name, value in inputs.items()}
        return f"{shapes}: {type(error).__name__}: {error}"
    return None if found and all(tensor.isfinite().all() for tensor in found) else "no finite outputs"
