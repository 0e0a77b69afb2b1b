"""Finds a mask in rounds: train, remove some, go back to an earlier state or go on, look again.

Frankle and Carbin, 2019 (arXiv:1803.03635) go back to the start of the training, Frankle et al., 2020
(arXiv:1912.05671) to a little later; Renda et al., 2020 (arXiv:2003.02389) keep the weights and start the learning rate
anew. All rank by magnitude; here any score of the posterior ranks, and the stds are part of the state that comes back.
With a fit in place of the training it is removal in one shot with re-estimation in between, as in oBERT (Kurtic et al.,
2022, arXiv:2203.07259).
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bayesprune.foundation.model import load_values
from bayesprune.foundation.text import first_names
from bayesprune.layers import variational_layers
from bayesprune.prune.batch_norm import recalibrate_batch_norm, repeatable
from bayesprune.prune.weights.prune import WeightReport, prune_weights
from bayesprune.prune.weights.schedule import Ramp, shares

_LOGGER = logging.getLogger(__name__)


def discover_mask(
    model: nn.Module,
    target: str,
    *,
    train: Callable[[nn.Module, int], object],
    rounds: int,
    rewind: Mapping[str, Tensor] | None = None,
    ramp: Ramp = "geometric",
    data: Iterable[Any] | None = None,
    **options: Any,
) -> tuple[WeightReport, ...]:
    """Finds a mask in rounds and reports each; the masks stay on the model, which is changed in place.

    A round trains, removes weights up to its share of the target, and rewinds. After the last one the model is as right
    after its removal: train it once more, as you would have in another round.

    Args:
        model: A variational model.
        target: "weights=0.2", the fraction of the weights that is kept in the end.
        train: Called as train(model, round), counted from 1, with removed weights at zero, where they stay. It makes
            its own optimizer, and its posterior ranks: a training under `attach`, or `fit_laplace` on calibration data.
        rounds: In how many removals.
        rewind: A copy of the model's state dict at an earlier time, `copy.deepcopy(model.state_dict())`. After each
            removal the kept weights, their stds and all else go back to it. None goes on from where training ended.
        ramp: How much each round removes: the same fraction of what is left in every round ("geometric"), or fast at
            first and slowly at the end ("cubic").
        data: Batches for recalibrating batch norm after each round.
        **options: Further options of `prune_weights` (`score`, `scope`, `min_kept`).

    Raises:
        ValueError: a number is out of range, or `rewind` is the live state, or one of another model.

    Examples:
        >>> import torch, bayesprune as bp
        >>> model = bp.to_variational(torch.nn.Linear(8, 3))
        >>> batches = [(torch.randn(32, 8), torch.randint(3, (32,)))]
        >>> def train(model, round):
        ...     bp.laplace.fit_laplace(model, batches)
        >>> reports = bp.prune.discover_mask(model, "weights=0.25", train=train, rounds=2)
        >>> reports[-1].kept
        6
    """
    targets = shares(target, rounds, ramp=ramp)
    if rewind is not None:
        _check(model, rewind)
    data, reports = repeatable(data), []
    for number, share in enumerate(targets, start=1):
        train(model, number)
        reports.append(report := prune_weights(model, share, **options))
        _LOGGER.info("discover_mask: round %d of %d, %s", number, rounds, report.summary())
        if rewind is not None:
            load_values(model, {**rewind, **_masks(model)})
        if data is not None:
            recalibrate_batch_norm(model, data)
    return tuple(reports)


def _masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks in the model's state dict, under every name that they have there."""
    layers = [layer for _, layer in variational_layers(model)]
    masks = {id(layer.mask(name, whole=True)) for layer in layers for name in layer.masked_names()}
    return {key: value for key, value in model.state_dict(keep_vars=True).items() if id(value) in masks}


def _check(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = model.state_dict(keep_vars=True)
    places = {tensor.data_ptr() for tensor in own.values() if torch.is_tensor(tensor) and tensor.numel()}
    if any(tensor.data_ptr() in places for tensor in state.values() if torch.is_tensor(tensor) and tensor.numel()):
        raise ValueError(
            "rewind is the live state of the model, which training changes; pass copy.deepcopy(model.state_dict())."
        )
    expected = set(own) - set(_masks(model))
    given = {key for key in state if not (key.endswith("_mask") and key.removesuffix("_mask") in expected)}
    if wrong := sorted(expected ^ given):
        raise ValueError(
            f"rewind does not fit the model: {first_names(wrong, most=5)} "
            f"{'is' if len(wrong) == 1 else 'are'} in one of them alone. Pass the state of this model at an earlier "
            "time, with to_variational done."
        )
