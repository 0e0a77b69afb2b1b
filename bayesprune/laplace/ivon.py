"""Stds from the posterior that a user's own `ivon.IVON` carries (package ivon-opt).

It holds an average h of curvatures for every parameter; the precision is N (h + d), with N the effective sample size
and d the weight decay (Shen et al., 2024, arXiv 2402.17641).
"""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bayesprune.foundation.text import first_names
from bayesprune.laplace.stds import set_precision
from bayesprune.layers import named_posteriors
from bayesprune.train.optimizers import unwrapped

_KEYS = ("params", "hess", "ess", "weight_decay", "hess_init")


@torch.no_grad()
def ivon_posterior(model: nn.Module, optimizer: Optimizer) -> nn.Module:
    """The model with the stds of the posterior that the optimizer carries, in place; its means stay as they are.

    Where stds are shared (rank_one, per_channel) they are the best fit to those of single weights, see
    `bayesprune.laplace.collapse`. To follow the posterior during training, call it again, before each removal say.

    Args:
        model: A variational model whose means the optimizer trained: `to_variational` keeps the parameters, so it may
            be converted afterwards.
        optimizer: `ivon.IVON`, outside its `sampled_params`; accelerate's wrapper of one will do.

    Raises:
        TypeError: the optimizer carries no such posterior.
        ValueError: it has not trained every posterior mean of the model, has not taken a step, or its state does not
            fit its parameters.
    """
    posteriors = list(named_posteriors(model))
    if not posteriors:
        raise ValueError("the model has no variational layer; call to_variational first.")
    precisions = _precisions(unwrapped(optimizer))
    unknown = [posterior.name for posterior in posteriors if id(posterior.mean) not in precisions]
    if unknown:
        raise ValueError(
            f"ivon does not hold, or has taken no step on, {first_names(unknown)} ({len(unknown)} of the model's "
            f"{len(posteriors)} posterior means); expected the optimizer that trained them all. Leave other layers "
            "deterministic with filter_fn."
        )
    for posterior in posteriors:
        set_precision(posterior, precisions[id(posterior.mean)])
    return model


def _precisions(optimizer: Optimizer) -> dict[int, Tensor]:
    """Precisions by the id of their parameter, without those that never had a gradient.

    A group's `hess` holds the entries of all its parameters one after the other.
    """
    precisions: dict[int, Tensor] = {}
    for index, group in enumerate(optimizer.param_groups):
        missing = [key for key in _KEYS if key not in group]
        if missing:
            raise TypeError(
                f"{type(optimizer).__name__} has no {', '.join(missing)} in its parameter group {index}; expected "
                "ivon.IVON. RunningLaplace takes the gradients of any other optimizer."
            )
        parameters, hessian = group["params"], group["hess"]
        sizes = [parameter.numel() for parameter in parameters]
        if hessian.shape != (sum(sizes),):
            raise ValueError(
                f"parameter group {index} of ivon has a hess of shape {tuple(hessian.shape)} for {len(sizes)} "
                f"parameters of {sum(sizes)} entries; expected one for each. Parameters were resized since: read the "
                "posterior before channels are cut."
            )
        if not bool((hessian == group["hess_init"]).all()):  # it has stepped
            for parameter, part in zip(parameters, hessian.split(sizes), strict=True):
                if parameter.requires_grad:
                    precisions[id(parameter)] = group["ess"] * (part.view_as(parameter) + group["weight_decay"])
    return precisions
