"""The training step that `attach` stands for, written with autograd: what the hook is compared with."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.priors import Prior
from bayesprune.train.kl import bind_prior
from tests.oracles import HandMadeAdam

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd_momentum_fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0, fused=True),
}
optimizers = pytest.mark.parametrize("name", OPTIMIZERS)
NUM_DATA = 20  # few, so that the KL matters
BATCHES = 4


def stock_net() -> nn.Module:
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 4, 3, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3), nn.Linear(3, 3)).double()


def net(std: str = "per_weight") -> nn.Module:
    return bp.to_variational(stock_net(), std=std, relative_std=0.2).double()


def batches(count: int = BATCHES) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(8, 1, 4, 4, dtype=torch.float64, generator=generator),
            torch.randint(0, 3, (8,), generator=generator),
        )
        for _ in range(count)
    ]


def stds_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith("log_std")}


def others_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if not name.endswith("log_std")}


def losses(model: nn.Module, batch: tuple[Tensor, Tensor], accumulation: int) -> Iterable[Tensor]:
    """The mean loss of a batch in equal parts, whose sum is the loss of the batch."""
    x, y = batch
    for x_part, y_part in zip(x.chunk(accumulation), y.chunk(accumulation), strict=True):
        yield nn.functional.cross_entropy(model(x_part), y_part) / accumulation


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    accumulation: int = 1,
    after_step: Callable[[], object] = lambda: None,
    data: list[tuple[Tensor, Tensor]] | None = None,
) -> None:
    """An ordinary loop, which knows nothing of posteriors."""
    torch.manual_seed(2)
    for batch in batches() if data is None else data:
        optimizer.zero_grad()
        for loss in losses(model, batch, accumulation):
            loss.backward()
        optimizer.step()
        after_step()


def train_on_elbo(
    model: nn.Module,
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    *,
    accumulation: int = 1,
    prior: Prior | None = None,
    temperature: float = 0.1,
    warmup: float = 0.0,
    std_lr: float = 1e-2,
    schedule: Callable[[int], float] = lambda step: 1.0,
) -> None:
    """The same run on mean NLL + weight * KL by autograd; an Adam written by hand for the stds."""
    bound = bind_prior(model, bp.priors.Gaussian() if prior is None else prior)
    stds, others = stds_of(model), others_of(model)
    optimizer = make_optimizer(list(others.values()))
    base_lr = optimizer.param_groups[0]["lr"]
    adams = {name: HandMadeAdam(std_lr) for name in stds}
    torch.manual_seed(2)
    for step, batch in enumerate(batches()):
        ramp = min(1.0, (step + 1) / (warmup * BATCHES)) if warmup else 1.0
        weight = temperature * ramp / NUM_DATA
        loss = sum(losses(model, batch, accumulation))
        kl = sum(prior.kl(p.mean, p.log_std, p.mask) for p, prior in bound.items())
        names = {**others, **stds}
        gradients = dict(zip(names, torch.autograd.grad(loss + weight * kl, list(names.values())), strict=True))
        for name, parameter in others.items():
            parameter.grad = gradients[name]
        optimizer.param_groups[0]["lr"] = base_lr * schedule(step)
        optimizer.step()
        with torch.no_grad():
            for name, part in stds.items():
                part.copy_(adams[name].moved(part, gradients[name]))
            for posterior, bound_prior in bound.items():
                clamp(posterior.log_std_parts, bound_prior.max_log_std)


def clamp(parts: list[nn.Parameter], largest: float) -> None:
    """No std above the prior's; of a rank-one pair the row gives way, by as much as its largest std asks."""
    if len(parts) == 1:
        parts[0].clamp_(max=largest)
        return
    row, column = parts
    excess = (row + column - largest).clamp_min(0).flatten(1).amax(1)
    row.sub_(excess.view(row.shape))


def assert_same_parameters(model: nn.Module, expected: nn.Module, start: nn.Module, rel: float = 1e-9) -> None:
    """Both models moved from `start`, and to the same place up to this fraction of the way."""
    for name, parameter in model.named_parameters():
        way = (expected.get_parameter(name) - start.get_parameter(name)).abs().max()
        assert way > 1e-4, f"{name} has not moved"
        error = (parameter - expected.get_parameter(name)).abs().max()
        assert error < rel * way, f"{name}: {error:.3g} of {way:.3g}"
