"""What the criterion benchmark compares: which weights or channels go, at equal numbers of gradient evaluations.

Every row trains with the same loop, masks and selection; a method differs in the score, and in what it adds to the
training: noise and a KL, an L1 penalty, DepGraph's group regulariser.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.laplace import RunningLaplace
from bayesprune.layers import Posterior, named_posteriors
from bayesprune.prune import PruneSchedule, SNRScore
from bayesprune.prune.scores.weights import magnitude, snr

NUM_DATA, BATCH = 45_000, 64
EXAMPLE = torch.zeros(1, 3, 32, 32)
DECAY = 0.98
TAYLOR_BATCHES, HESSIAN_IMAGES = 4, 256
Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Method:
    """A row of the tables.

    Attributes:
        name: What is shown.
        score: What ranks: for weights a key of `weight_score`, for channels of `channel_importance`.
        std: Structure of the stds where the training is variational; None is plain training.
        l1: Weight of the L1 penalty on weights while they are being removed.
        group_reg: Weight of DepGraph's regulariser before the removal (channels).
        temperature: Weight of the KL in a variational training.
        relative_std: What its stds start at, over each layer's root mean square.
        std_lr: What moves them.
        conditioned: Batches of 64 at each cut (of weights there are several, of channels one) for Kronecker factors, by
            which the weights that are left make up for it; each is paid for as a gradient evaluation.
    """

    name: str
    score: str
    std: str | None = None
    l1: float = 0.0
    group_reg: float = 0.0
    conditioned: int = 0
    temperature: float = 0.1
    relative_std: float = 0.1
    std_lr: float = 0.02


@dataclass(frozen=True)
class Budget:
    """Gradient evaluations, each on one batch of 64: `before` the removal of channels and `after` it, or together."""

    before: int
    after: int
    lr: float

    @property
    def total(self) -> int:
        """All of them."""
        return self.before + self.after


class Gradients:
    """Moving averages of a model's gradients, for the scores of the controls; bias-corrected."""

    def __init__(self, model: nn.Module) -> None:
        self.posteriors = [posterior for posterior in named_posteriors(model) if posterior.is_weight]
        self.averages: dict[str, Tensor] = {}
        self.steps = 0

    @torch.no_grad()
    def add(self) -> None:
        self.steps += 1
        for posterior in self.posteriors:
            gradient = posterior.mean.grad
            assert gradient is not None, "every layer runs in every step"
            average = self.averages.setdefault(posterior.name, torch.zeros_like(gradient))
            average.mul_(DECAY).add_(gradient, alpha=1 - DECAY)

    def taylor(self, posterior: Posterior) -> Tensor:
        """|weight * mean gradient|: the first-order change of the loss."""
        return (posterior.mean.detach() * self.averages[posterior.name]).abs() / (1 - DECAY**self.steps)


def lamp(posterior: Posterior) -> Tensor:
    """w^2 / (sum of the squares that are not smaller, in its layer): Lee et al., 2021, arXiv:2010.07611, Eq. 1."""
    squares = posterior.mean.detach().square().flatten()
    order = squares.argsort()
    ascending = squares[order]
    rest = ascending.flip(0).cumsum(0).flip(0).clamp_min(1e-30)
    return torch.empty_like(squares).index_copy_(0, order, ascending / rest).view(posterior.mean.shape)


def random(posterior: Posterior) -> Tensor:
    return torch.rand(posterior.mean.shape)


def weight_score(name: str, gradients: Gradients) -> Callable[[Posterior], Tensor]:
    """A score of single weights by name; "snr 0.5" is `SNRScore(0.5)`. Those with stds read them off the model."""
    if name.startswith("snr "):
        return SNRScore(float(name.split()[1]))
    scores: dict[str, Any] = {"magnitude": magnitude, "lamp": lamp, "random": random, "obd": snr}
    return scores.get(name, gradients.taylor)


def converted(dense: nn.Module, method: Method | None = None) -> nn.Module:
    """A copy whose weights can be masked; plain training runs at the means, as if it had not been converted."""
    model = copy.deepcopy(dense)
    if method is None or method.std is None:
        return bp.to_variational(model, estimator="mean").train()
    return bp.to_variational(model, std=method.std, relative_std=method.relative_std).train()


def train(
    model: nn.Module,
    batches: Batches,
    num_steps: int,
    lr: float,
    *,
    method: Method | None = None,
    precision: torch.dtype = torch.bfloat16,
    each_gradient: Callable[[int], object] = lambda step: None,
    each_step: Callable[[int], object] = lambda step: None,
    before: Callable[[torch.optim.Optimizer], object] = lambda optimizer: None,
) -> None:
    """SGD with momentum 0.9, learning rate by cosine to 0; products in this precision."""
    means = [parameter for name, parameter in model.named_parameters() if not name.endswith("log_std")]
    optimizer = torch.optim.SGD(means, lr=lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    if method is not None and method.std is not None:
        bp.attach(
            optimizer,
            model,
            num_data=NUM_DATA,
            temperature=method.temperature,
            std_lr=method.std_lr,
            max_noise_cost=None,
        )
    before(optimizer)
    model.train()
    for step, (images, labels) in enumerate(islice(batches, num_steps), start=1):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            outputs = model(images)
        optimizer.zero_grad()
        F.cross_entropy(outputs.float(), labels).backward()
        each_gradient(step)
        optimizer.step()
        schedule.step()
        each_step(step)


def prune_weights(dense: nn.Module, method: Method, sparsity: float, batches: Batches, budget: Budget) -> nn.Module:
    """Gradual removal (cubic, between a tenth and 0.7 of the steps) while training goes on.

    In 30 cuts, or where each is paid for in 10: `batches` has the evaluations of both kinds.
    """
    model = converted(dense, method)
    num_cuts = 10 if method.conditioned else 30
    num_steps = budget.total - num_cuts * method.conditioned
    schedule = PruneSchedule(f"weights={1 - sparsity}", begin=0.1, end=0.7, num_updates=num_cuts)
    gradients, laplace = Gradients(model), None
    score = weight_score(method.score, gradients)

    def follow(optimizer: torch.optim.Optimizer) -> None:
        nonlocal laplace
        if method.std is None:
            laplace = RunningLaplace(optimizer, model, num_data=NUM_DATA, batch_size=BATCH, decay=DECAY)

    def each_gradient(step: int) -> None:
        gradients.add()
        if method.l1 and step <= 0.7 * num_steps:
            for posterior in gradients.posteriors:
                posterior.mean.grad.add_(posterior.mean.detach().sign(), alpha=method.l1)

    def each_step(step: int) -> None:
        removal = schedule.removal_after(step, num_steps)
        if removal is None:
            return
        if laplace is not None:
            laplace.update()
        if not method.conditioned:
            bp.prune_weights(model, f"weights={1 - removal}", score=score)
            return
        calibration = list(islice(batches, method.conditioned))
        posterior = bp.laplace.fit_kronecker(model.eval(), calibration, num_data=NUM_DATA)
        bp.prune_weights(model, f"weights={1 - removal}", score=score)
        bp.laplace.condition_on_zeros(model, posterior)
        model.train()

    train(
        model,
        batches,
        num_steps,
        budget.lr,
        method=method,
        each_gradient=each_gradient,
        each_step=each_step,
        before=follow,
    )
    return bp.to_deterministic(model)


def prepare_channels(
    dense: nn.Module, method: Method, batches: Batches, budget: Budget, precision: torch.dtype = torch.bfloat16
) -> tuple[nn.Module, RunningLaplace | None]:
    """The training before the removal, alike for all methods with the same noise and penalties."""
    model, laplace = converted(dense, method), None
    weights = [posterior for posterior in named_posteriors(model) if posterior.is_weight]
    whole = [layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d) and not _is_inner(name)]
    pruner = tp.pruner.GroupNormPruner(
        model,
        EXAMPLE,
        tp.importance.GroupMagnitudeImportance(),
        reg=method.group_reg,
        ignored_layers=[*whole, model.linear],  # it fails at the shortcuts, whose channels cannot go anyway
    )

    def follow(optimizer: torch.optim.Optimizer) -> None:
        nonlocal laplace
        if method.std is None:
            laplace = RunningLaplace(optimizer, model, num_data=NUM_DATA, batch_size=BATCH, decay=DECAY)

    def each_gradient(step: int) -> None:
        if method.group_reg:
            pruner.regularize(model)
        for posterior in weights if method.l1 else ():
            posterior.mean.grad.add_(posterior.mean.detach().sign(), alpha=method.l1)

    options = {"method": method, "precision": precision, "each_gradient": each_gradient, "before": follow}
    train(model, batches, budget.before, budget.lr, **options)
    if laplace is not None:
        laplace.update()
    return model, laplace


def _is_inner(name: str) -> bool:
    return name.startswith("layer") and name.endswith("conv1")


def channel_importance(name: str, model: nn.Module, batches: Batches) -> tuple[tp.importance.Importance, int]:
    """An importance by name, and how many gradient evaluations it takes."""
    if name.startswith("snr "):
        return bp.SNRImportance(float(name.split()[1])), 0
    if name == "taylor":
        for images, labels in (next(batches) for _ in range(TAYLOR_BATCHES)):
            F.cross_entropy(model.eval()(images), labels).backward()
        return tp.importance.TaylorImportance(), TAYLOR_BATCHES
    if name == "hessian":
        squares: dict[nn.Parameter, Tensor] = {}
        for _ in range(HESSIAN_IMAGES // BATCH):
            for image, label in zip(*next(batches), strict=True):
                model.zero_grad()
                F.cross_entropy(model.eval()(image[None]), label[None]).backward()
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        total = squares.setdefault(parameter, torch.zeros_like(parameter))
                        total.addcmul_(parameter.grad, parameter.grad, value=1 / HESSIAN_IMAGES)
        for parameter, square in squares.items():
            parameter.grad = square  # torch-pruning's own sum keeps the last image alone
        return tp.importance.HessianImportance(), HESSIAN_IMAGES // BATCH
    importances: dict[str, Callable[[], tp.importance.Importance]] = {
        "magnitude": tp.importance.MagnitudeImportance,
        "magnitude, no normaliser": lambda: tp.importance.MagnitudeImportance(normalizer=None),
        "lamp": tp.importance.LAMPImportance,
        "random": tp.importance.RandomImportance,
    }
    return importances[name](), 0


def prune_channels(
    prepared: nn.Module,
    method: Method,
    macs: float,
    batches: Batches,
    budget: Budget,
    precision: torch.dtype = torch.bfloat16,
) -> tuple[nn.Module, nn.Module, int]:
    """The network cut to this fraction of its MACs, the same after plain fine-tuning, and that one's steps."""
    cut = copy.deepcopy(prepared)
    importance, spent = channel_importance(method.score, cut, batches)
    compensate = None
    if method.conditioned:
        posterior = bp.laplace.fit_kronecker(cut.eval(), islice(batches, method.conditioned), num_data=NUM_DATA)
        compensate = partial(bp.laplace.condition_on_channels, cut, posterior)
    spent += method.conditioned
    bp.prune_channels(cut, EXAMPLE, target=f"macs={macs}", importance=importance, before_cut=compensate)
    bp.to_deterministic(cut).zero_grad()
    tuned = converted(cut)
    train(tuned, batches, budget.after - spent, budget.lr, precision=precision)
    return cut, bp.to_deterministic(tuned), budget.after - spent
