"""The step of the variational online Newton method, a pure function of tensors.

Shen et al., "Variational Learning is Effective for Large Deep Networks", 2024, arXiv 2402.17641, Algorithm 1.
"""

# pyright: reportPrivateImportUsage=false
# torch's own optimizers use `_foreach`, one kernel for many tensors; it has no public name.

import torch
from torch import Tensor


def newton_step_(
    means: list[Tensor],
    momenta: list[Tensor],
    hessians: list[Tensor],
    gradients: list[Tensor],
    curvatures: list[Tensor],
    steps: list[int],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    clip_radius: float = float("inf"),
) -> None:
    """One step of Algorithm 1 (lines 4 to 7) on lists of tensors: changes means, momenta and hessians in place.

    Args:
        means: Means m.
        momenta: Averages g of the gradients.
        hessians: Averages h of the curvatures; h + weight_decay stays above zero, halved at most by a step.
        gradients: Gradients of the mean loss at a draw from the posterior.
        curvatures: The same times (draw - mean) / variance: unbiased estimates of the Hessian's diagonal.
            Their memory is used up.
        steps: Number of this step for each tensor, from 1.
        lr: Learning rate of the Newton step.
        betas: Decay of g and of h.
        weight_decay: d.
        clip_radius: Largest entry of the Newton step before it is multiplied by `lr`.
    """
    torch._foreach_lerp_(momenta, gradients, 1 - betas[0])

    precisions = torch._foreach_add(hessians, weight_decay)
    change = curvatures
    torch._foreach_sub_(change, hessians)
    torch._foreach_mul_(change, 1 - betas[1])
    torch._foreach_add_(hessians, change)
    torch._foreach_mul_(change, change)
    torch._foreach_addcdiv_(hessians, change, precisions, 0.5)
    torch._foreach_copy_(precisions, hessians)
    torch._foreach_add_(precisions, weight_decay)

    direction = torch._foreach_div(momenta, [1 - betas[0] ** step for step in steps])
    torch._foreach_add_(direction, means, alpha=weight_decay)
    torch._foreach_div_(direction, precisions)
    if clip_radius < float("inf"):
        torch._foreach_clamp_min_(direction, -clip_radius)
        torch._foreach_clamp_max_(direction, clip_radius)
    torch._foreach_add_(means, direction, alpha=-lr)
