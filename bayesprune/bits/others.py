"""The tensors without posterior: embeddings, and the rest, such as norms and their running statistics.

Embeddings are rounded as weights are. How exactly one has to be known is one number, the mean over its entries, so that
a token that the data do not have is not taken for one that does not matter. The rest keeps 11 significant bits, as many
as float16 has.
"""

import copy
import math
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bayesprune.convert import to_deterministic
from bayesprune.foundation.batches import split
from bayesprune.foundation.model import eval_mode, requires_grad
from bayesprune.foundation.numbers import as_loss
from bayesprune.laplace import output_metric
from bayesprune.laplace.calibration import Loss
from bayesprune.laplace.diagonal import prior_precisions
from bayesprune.layers import Posterior, named_posteriors

_BITS = 11


def named_embeddings(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of embeddings that are not another layer's posterior, each by its first name."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    own = {id(module.weight) for module in model.modules() if isinstance(module, kinds) and module.max_norm is None}
    own -= {id(posterior.mean) for posterior in named_posteriors(model)}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in own}


def either(metric: Loss, loss: Loss) -> Loss:
    """The metric; of a model whose outputs have no form that it takes, the loss."""

    def value(model: nn.Module, batch: Any) -> Tensor:
        try:
            return metric(model, batch)
        except (TypeError, ValueError):
            return loss(model, batch)

    return value


def embedding_precisions(
    model: nn.Module, batches: Iterable[Any], *, has_own_stds: bool, metric: Loss = output_metric
) -> dict[str, float]:
    """The mean precision of each embedding's entries: squared gradients of the logits, and the prior.

    `laplace.output_metric` draws signs for all logits, so the gradients of examples are independent with mean zero, and
    the square of a batch's gradient is in expectation the sum of its examples' squares. That costs a forward and a
    backward for each batch, and the memory of a gradient.

    Args:
        model: One that has embeddings.
        batches: On its device.
        has_own_stds: Whether the model's posterior is not that of these batches. The precisions are then multiplied by
            how many times those of weights are larger than squared gradients say: the geometric mean over tensors.
        metric: Whose gradients are taken: a function of model and batch, a mean over examples.
    """
    embeddings = named_embeddings(model)
    priors = prior_precisions(model, None) if has_own_stds else {}
    posteriors = {its: prior for its, prior in priors.items() if its.is_weight}
    tensors = embeddings | {its.name: its.mean for its in posteriors}
    sums = dict.fromkeys(tensors, 0.0)
    for batch in batches:
        with torch.enable_grad(), eval_mode(model), requires_grad(model, True):
            total = as_loss(metric(model, batch), "loss") * split(model, batch).num_examples
            gradients = torch.autograd.grad(total, list(tensors.values()), allow_unused=True)
        for name, gradient in zip(tensors, gradients, strict=True):
            sums[name] += 0.0 if gradient is None else float(gradient.to_dense().double().square().mean())
    logs = [_mean_log_precision(its) - math.log(sums[its.name] + prior) for its, prior in posteriors.items()]
    scale = math.exp(sum(logs) / len(logs)) if logs else 1.0
    squares = {name: float(table.detach().double().square().mean()) for name, table in embeddings.items()}
    return {name: scale * (sums[name] + 1 / square) for name, square in squares.items() if square > 0}


def _mean_log_precision(posterior: Posterior) -> float:
    """Of the mean precision of a tensor's entries."""
    return math.log(float((-2 * posterior.log_std.detach().double()).exp().mean()))


def ordinary_names(model: nn.Module) -> Collection[str]:
    """Names of the tensors that the state dict has once the model is an ordinary one."""
    return to_deterministic(copy.deepcopy(model)).state_dict().keys()


def ordinary_tensors(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """The tensors of these names, by name."""
    found = model.state_dict()
    return {name: found[name] for name in found if name in names and isinstance(found[name], Tensor)}


def rest_of(tensors: dict[str, Tensor], own: Collection[Tensor]) -> Iterator[Tensor]:
    """Those with a fractional part that are none of `own`."""
    taken = {tensor.data_ptr() for tensor in own}
    yield from (t for t in tensors.values() if t.is_floating_point() and t.data_ptr() not in taken)


def significant(tensor: Tensor) -> Tensor:
    """The values with 11 significant bits; those that are infinite then stay as they are."""
    mantissas, exponents = torch.frexp(tensor)
    found = torch.ldexp((mantissas * 2**_BITS).round() / 2**_BITS, exponents)
    return torch.where(found.isfinite(), found, tensor)
