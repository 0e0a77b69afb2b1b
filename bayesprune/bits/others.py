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
from bayesprune.errors import UnsupportedModelError
from bayesprune.foundation.batches import split
from bayesprune.foundation.model import eval_mode, requires_grad
from bayesprune.laplace import output_metric
from bayesprune.laplace.diagonal import prior_precisions, sums_of_squares
from bayesprune.layers import named_posteriors

_BITS = 11


def named_embeddings(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of embeddings that are not another layer's posterior, each by its first name."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    own = {id(module.weight) for module in model.modules() if isinstance(module, kinds) and module.max_norm is None}
    own -= {id(posterior.mean) for posterior in named_posteriors(model)}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in own}


def embedding_precisions(model: nn.Module, batches: Iterable[Any], scale: float) -> dict[str, float]:
    """The mean precision of each embedding's entries: squared gradients of the logits, and the prior.

    `laplace.output_metric` draws signs for all logits, so the gradients of examples are independent with mean zero, and
    the square of a batch's gradient is in expectation the sum of its examples' squares.

    Args:
        model: One that has embeddings.
        batches: On its device.
        scale: What to multiply by, see `posterior_scale`.
    """
    embeddings = named_embeddings(model)
    sums = dict.fromkeys(embeddings, 0.0)
    for batch in batches:
        with torch.enable_grad(), eval_mode(model), requires_grad(model, True):
            total = output_metric(model, batch) * split(model, batch).num_examples
            gradients = torch.autograd.grad(total, list(embeddings.values()), allow_unused=True)
        for name, gradient in zip(embeddings, gradients, strict=True):
            sums[name] += 0.0 if gradient is None else float(gradient.double().square().mean())
    squares = {name: float(table.detach().double().square().mean()) for name, table in embeddings.items()}
    return {name: scale * (sums[name] + 1 / square) for name, square in squares.items() if square > 0}


def posterior_scale(model: nn.Module, batches: Iterable[Any]) -> float | None:
    """How many times those of `laplace.fit_laplace` in the metric of the logits a variational model's precisions are.

    The geometric mean over its tensors of weights; None where gradients of examples cannot be told apart.
    """
    try:
        squares, _ = sums_of_squares(model, batches, loss=output_metric)
    except UnsupportedModelError:
        return None
    logs = []
    for posterior, prior in prior_precisions(model, None).items():
        if posterior.is_weight and posterior.name in squares:
            own = (-2 * posterior.log_std.detach().double()).exp().mean()
            logs.append(math.log(float(own) / (float(squares[posterior.name].mean()) + prior)))
    return math.exp(sum(logs) / len(logs)) if logs else None


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
    """The values with 11 significant bits."""
    mantissas, exponents = torch.frexp(tensor)
    return torch.ldexp((mantissas * 2**_BITS).round() / 2**_BITS, exponents)
