"""Stds from an optimizer that carries a posterior: the library's `OnlineNewton`, or the user's own `ivon.IVON`.

Both hold an average h of curvatures for every parameter; its precision is N (h + d), with N the effective sample size
and d the weight decay (Shen et al., 2024, arXiv 2402.17641).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bayesprune.laplace.stds import set_precision
from bayesprune.layers import Posterior, named_posteriors
from bayesprune.train.online_newton import OnlineNewton
from bayesprune.train.optimizers import unwrapped

_IVON_KEYS = ("params", "hess", "ess", "weight_decay", "hess_init")


@torch.no_grad()
def online_newton_posterior(model: nn.Module, optimizer: Optimizer) -> nn.Module:
    """The model with the stds of the posterior that the optimizer carries, in place; its means stay as they are.

    Where stds are shared (rank_one, per_channel) they are the best fit to those of single weights, see
    `bayesprune.laplace.collapse`. To follow the posterior during training, call it again, before each removal say.

    Args:
        model: A variational model whose means the optimizer trained: `to_variational` keeps the parameters, so it may
            be converted afterwards.
        optimizer: `bayesprune.train.OnlineNewton`, or `ivon.IVON` of the package ivon-opt, outside its
            `sampled_params`; accelerate's wrapper of one will do.

    Raises:
        TypeError: the optimizer carries no posterior.
        ValueError: it has not trained every posterior mean of the model, has not taken a step, or its state does not
            fit its parameters.
    """
    optimizer = unwrapped(optimizer)
    posteriors = list(named_posteriors(model))
    if not posteriors:
        raise ValueError("the model has no variational layer; call to_variational first.")
    if isinstance(optimizer, OnlineNewton):
        found = {posterior: optimizer.precision(posterior.mean) for posterior in posteriors}
    else:
        precisions = _of_ivon(optimizer)
        found = {posterior: precisions.get(id(posterior.mean)) for posterior in posteriors}
    _check(found, optimizer)
    for posterior, precision in found.items():
        assert precision is not None, "checked above"
        set_precision(posterior, precision)
    return model


def _of_ivon(optimizer: Optimizer) -> dict[int, Tensor]:
    """Precisions by the id of their parameter; parameters that never had a gradient are not in it.

    A group's `hess` holds the entries of all its parameters one after the other.
    """
    precisions: dict[int, Tensor] = {}
    for index, group in enumerate(optimizer.param_groups):
        missing = [key for key in _IVON_KEYS if key not in group]
        if missing:
            raise TypeError(
                f"{type(optimizer).__name__} has no {', '.join(missing)} in its parameter group {index}; expected "
                "bayesprune.train.OnlineNewton or ivon.IVON. adam_laplace takes the moments of Adam."
            )
        parameters, hessian = group["params"], group["hess"]
        sizes = [parameter.numel() for parameter in parameters]
        if hessian.shape != (sum(sizes),):
            raise ValueError(
                f"parameter group {index} of {type(optimizer).__name__} has a hess of shape {tuple(hessian.shape)} "
                f"for {len(sizes)} parameters of {sum(sizes)} entries; expected one for each. Parameters were resized "
                "since: read the posterior before channels are cut."
            )
        if bool((hessian == group["hess_init"]).all()):
            continue  # not stepped
        for parameter, part in zip(parameters, hessian.split(sizes), strict=True):
            if parameter.requires_grad:
                precisions[id(parameter)] = group["ess"] * (part.view_as(parameter) + group["weight_decay"])
    return precisions


def _check(found: dict[Posterior, Tensor | None], optimizer: Optimizer) -> None:
    kind = type(optimizer).__name__
    held: dict[int, Any] = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    strangers = [posterior.name for posterior in found if id(posterior.mean) not in held]
    if strangers:
        raise ValueError(
            f"{kind} does not hold {_some(strangers)} of the model's {len(found)} posterior means; expected the "
            "optimizer that trained them all. Leave other layers deterministic with filter_fn."
        )
    still = [posterior.name for posterior, precision in found.items() if precision is None]
    if still:
        raise ValueError(
            f"{kind} has taken no step on {_some(still)} of the model's {len(found)} posterior means, so it says "
            "nothing of their stds; expected it to have trained them all. Leave such layers deterministic with "
            "filter_fn."
        )
    for posterior, precision in found.items():
        assert precision is not None, "checked above"
        if precision.shape != posterior.mean.shape:
            raise ValueError(
                f"{kind} has a posterior of shape {tuple(precision.shape)} for {posterior.name}, which has shape "
                f"{tuple(posterior.mean.shape)}; read the posterior before channels are cut."
            )


def _some(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''} ({len(names)})"
