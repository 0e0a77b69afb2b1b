"""What an attachment does to, and has to know of, the user's optimizer."""

from torch import Tensor, nn
from torch.optim import Optimizer

from bayesprune.layers import named_posteriors


def unwrapped(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose step the wrapper of accelerate calls, or timm's Lookahead, which runs no hooks of its own."""
    while True:
        inner = getattr(optimizer, "optimizer", getattr(optimizer, "_base_optimizer", None))
        if not isinstance(inner, Optimizer):
            return optimizer
        optimizer = inner


def add_to_first_group(optimizer: Optimizer, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Puts those that the optimizer does not hold into its first group; schedulers count groups, not parameters."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    added = [parameter for parameter in parameters if id(parameter) not in held]
    optimizer.param_groups[0]["params"].extend(added)
    return added


def grad_scaler_state(optimizer: Optimizer) -> tuple[float, bool]:
    """Scale of the gradients and whether they overflowed: a gradient scaler leaves both to fused optimizers."""
    scale, found = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    return (1.0 if scale is None else float(scale)), found is not None and bool(found)


def forget_removed(optimizer: Optimizer, model: nn.Module) -> None:
    """Removed weights have no gradient any more, so that moments which are zero now stay zero."""
    state = unwrapped(optimizer).state
    for posterior in named_posteriors(model):
        if (mask := posterior.mask) is not None:
            for value in state.get(posterior.mean, {}).values():
                if isinstance(value, Tensor) and value.shape == mask.shape:
                    value.mul_(mask)
