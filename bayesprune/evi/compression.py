"""Self-compression: train, remove the kernels that carry nothing, retrain the smaller network, look again.

Source: Carannante, Dera, Rasool, Bouaynaya, *Self-Compression in Bayesian Neural Networks* (2020), which ranks kernels
by the Frobenius norm of their mean.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bayesprune.prune import smallest_within
from bayesprune.prune.search import Compression


@torch.no_grad()
def kernel_norm(group: Any) -> Tensor:
    """The paper's criterion, for `prune_channels` and `smallest_within`: Frobenius norm of each kernel's mean, (C,).

    Args:
        group: A dependency group of torch-pruning; its first layer is the one whose kernels are ranked.
    """
    layer, channels = group[0].dep.layer, group[0].idxs
    return layer.weight[channels].flatten(1).norm(dim=1)


def self_compress(
    model: nn.Module,
    example_inputs: Any,
    *,
    train: Callable[[nn.Module], object],
    evaluate: Callable[[nn.Module], float],
    tolerance: float,
    importance: Any = kernel_norm,
    **options: Any,
) -> Compression:
    """Trains, then removes kernels and trains on, while the validation score stays within the tolerance.

    It is `smallest_within` behind a first training, with the paper's criterion.

    Args:
        model: A network to start from; it is trained in place.
        example_inputs: Inputs of the model's forward, for counting and tracing.
        train: Trains a model in place, with an optimizer of its own: before the first cut and after each.
        evaluate: Score on validation data, higher is better; never the test split.
        tolerance: Largest loss of that score that is accepted, in its own unit.
        importance: `kernel_norm`, `bayesprune.SNRImportance()`, or another criterion of `prune_channels`.
        **options: Further options of `smallest_within` (`step`, `min_step`, `reference`, ...).
    """
    train(model)
    return smallest_within(
        model,
        example_inputs,
        evaluate=evaluate,
        tolerance=tolerance,
        fine_tune=train,
        importance=importance,
        **options,
    )
