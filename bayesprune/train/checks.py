"""What `attach` refuses, and what it warns of."""

import warnings
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bayesprune.errors import UnsupportedModelError
from bayesprune.layers import Posterior
from bayesprune.layers.sharding import whole

_REFUSED = ("FullyShardedDataParallel", "DeepSpeedOptimizerWrapper", "LBFGS")


def check_options(
    num_data: int, temperature: float, warmup_steps: int, std_lr: float, max_noise_cost: float | None
) -> None:
    """Refuses numbers out of range.

    Raises:
        ValueError: one of them is.
    """
    if not num_data > 0:
        raise ValueError(f"num_data is {num_data!r}; expected the number of training examples, above 0.")
    if temperature < 0 or warmup_steps < 0 or std_lr < 0:
        raise ValueError(
            f"temperature={temperature!r}, warmup_steps={warmup_steps!r}, std_lr={std_lr!r}; expected none below 0."
        )
    if max_noise_cost is not None and not max_noise_cost > 0:
        raise ValueError(f"max_noise_cost is {max_noise_cost!r}; expected a number above 0, or None for no bound.")


def check_types(optimizer: Optimizer, model: nn.Module) -> None:
    """Refuses what cuts means and stds apart.

    Raises:
        UnsupportedModelError: DeepSpeed, FSDP 1, or an optimizer that calls its closure several times.
    """
    for kind in (type(optimizer), type(model)):
        if kind.__module__.startswith("deepspeed") or kind.__name__ in _REFUSED:
            raise UnsupportedModelError(
                f"attach got {kind.__name__}, which flattens parameters, steps inside backward or calls its closure "
                "several times; expected a first-order optimizer, with DDP or FSDP2 where training is distributed."
            )


def check_groups(
    optimizer: Optimizer, posteriors: Collection[Posterior], attached: Iterable[Collection[Posterior]]
) -> None:
    """Refuses an optimizer of another model, and one that has an attachment; warns of weight decay.

    Args:
        optimizer: The optimizer.
        posteriors: Those to attach.
        attached: Those of each attachment that it has.

    Raises:
        ValueError: it holds none of the means, or has an attachment to them.
    """
    means = {id(posterior.mean) for posterior in posteriors}
    held = 0
    decay = 0.0
    for group in optimizer.param_groups:
        count = sum(id(parameter) in means for parameter in group["params"])
        held += count
        decay = max(decay, group.get("weight_decay", 0.0) if count else 0.0)
    if any(not set(posteriors).isdisjoint(others) for others in attached):
        raise ValueError(
            f"{type(optimizer).__name__} has an attachment to this model already; call its detach() first."
        )
    if not held:
        raise ValueError(
            f"{type(optimizer).__name__} holds none of the model's {len(means)} posterior means; expected the "
            "optimizer of this very model. Create it from model.parameters() and attach both together."
        )
    if decay:
        warnings.warn(
            f"{type(optimizer).__name__} has weight_decay={decay:g} on posterior means, a second Gaussian prior beside "
            "the one attached; set weight_decay=0 for them, unless that is meant.",
            stacklevel=3,
        )


@torch.no_grad()
def collapsed_layers(posteriors: Iterable[Posterior]) -> Iterator[tuple[str, float]]:
    """Names of the weights that all have an SNR below 1, and the largest; those removed altogether are passed over."""
    found: list[tuple[str, Tensor, Tensor | None]] = []
    for posterior in posteriors:
        if posterior.is_weight:
            mask = posterior.layer.mask(posterior.parameter, whole=True)
            log_snr = posterior.mean.abs().to(posterior.log_std.dtype).log_().sub_(posterior.log_std).amax()
            found.append((posterior.name, whole(log_snr).exp(), None if mask is None else mask.any()))
    for name, largest, is_there in found:  # what has to wait for the device does so when all is under way
        if float(largest) < 1 and (is_there is None or bool(is_there)):
            yield name, float(largest)
