"""How the fair comparison spends gradient evaluations: training before the cut, cuts in stages, fine-tuning after."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from fair_methods import COMPENSATION_NEEDS, SCORES, Net
from fair_tasks import CALIBRATION_IMAGES, Batch, Task
from torch import Tensor, nn

import bayesprune as bp
from bayesprune import gates
from bayesprune.priors import ARD, Horseshoe, Prior
from bayesprune.prune import dependency_groups, freeze_batch_norm, recalibrate_batch_norm

RECALIBRATION_BATCHES = 20
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class When:
    """The share of the gradient evaluations that is spent on training before the cut, and the number of cuts."""

    before: float = 0.0
    num_cuts: int = 1


WHENS = {
    "at once": When(),
    "in 3 stages": When(num_cuts=3),
    "after a fifth": When(0.2),
    "after two fifths": When(0.4),
    "after three fifths": When(0.6),
}
STAGE = 0.15
"""Of the steps, between one cut and the next."""


@dataclass(frozen=True)
class Phase:
    """A variational training before the cut: options of `to_variational` and of `attach`.

    Attributes:
        convert: For `to_variational`.
        attach: For `attach`.
        prior: Of its dependency groups; None is the default of `attach`.
        gates: Learning rate of gates of the channels; None is no gates.
    """

    convert: dict[str, Any]
    attach: dict[str, Any] = field(default_factory=dict)
    prior: Callable[[Any], Prior] | None = None
    gates: float | None = None


SPARSIFYING: dict[str, Any] = {"std_lr": 0.02, "max_noise_cost": None, "warmup": 0.1}
PHASES = {
    "per_channel": Phase({"std": "per_channel"}),
    "temperature 10": Phase(
        {"std": "rank_one", "relative_std": 0.3}, {"temperature": 10.0, "std_lr": 0.05, "max_noise_cost": None}
    ),
    "group ARD": Phase({}, {"temperature": 1.0, **SPARSIFYING}, ARD),
    "group ARD at temperature 10": Phase({}, {"temperature": 10.0, **SPARSIFYING}, ARD),
    "group horseshoe": Phase({}, {"temperature": 1.0, **SPARSIFYING}, partial(Horseshoe, global_scale="auto")),
    "channel gates": Phase({}, {"temperature": 1.0, **SPARSIFYING}, gates=0.1),
}
"""Phases by name; where a score names none, the training before the cut is plain."""


@dataclass(frozen=True)
class Way:
    """One way to spend the gradient evaluations."""

    score: str
    option: str
    allocation: str
    compensation: str
    when: str = "at once"
    lr: float = 0.0
    distilled: bool = False
    features: float = 0.0

    @property
    def evaluations(self) -> int:
        """Calibration images that score and compensation pass with gradients."""
        needs = SCORES[self.score].needs | COMPENSATION_NEEDS[self.compensation]
        return WHENS[self.when].num_cuts * len(needs) * CALIBRATION_IMAGES


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


def distillation(teacher: nn.Module, features: float = 0.0) -> Loss:
    """Cross-entropy beside `bp.distillation`, temperature 4 and weight 0.9."""
    distill = bp.distillation(teacher, temperature=4.0, weight=0.9, features=features)

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with distill.watch(model):
            logits = model(images)
            return distill(logits, images, F.cross_entropy(logits, labels))

    return loss


def train(
    task: Task,
    model: nn.Module,
    batches: Iterator[Batch],
    steps: range,
    total: int,
    way: Way,
    *,
    before: Callable[[torch.optim.Optimizer], object] | None = None,
) -> None:
    """These of `total` steps, learning rate by cosine to 0; `before` gets the optimizer ahead of the first."""
    loss = distillation(task.dense, way.features) if way.distilled else cross_entropy
    means = [parameter for name, parameter in model.named_parameters() if not name.endswith("log_std")]
    optimizer = task.optimizer(means, lr=way.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 + 0.5 * math.cos(math.pi * (steps.start + step) / total)
    )
    if before is not None:
        before(optimizer)
    model.train()
    with freeze_batch_norm(model) if task.keeps_statistics else nullcontext():
        for images, labels in islice(batches, len(steps)):
            optimizer.zero_grad()
            loss(model, images, labels).backward()
            optimizer.step()
            schedule.step()
    model.eval()


def trained(task: Task, way: Way, steps: int, seed: int) -> Net:
    """The network after the training before the cut."""
    if not steps:
        return Net(task, task.dense, seed)
    torch.manual_seed(seed)
    model, before = copy.deepcopy(task.dense), None
    if SCORES[way.score].phase:
        phase = PHASES[SCORES[way.score].phase]
        attach = {"num_data": task.num_data, "num_steps": steps, **phase.attach}
        model = bp.to_variational(bp.to_deterministic(model), **phase.convert)
        if phase.gates is not None:
            gates.add_channel_gates(model, task.example, lr=phase.gates)
        if phase.prior is not None:
            attach["prior"] = phase.prior(dependency_groups(model, task.example))
        before = partial(bp.attach, model=model, **attach)
    train(task, model, task.draw(steps, seed, True), range(steps), steps, way, before=before)
    if not task.keeps_statistics:
        recalibrate_batch_norm(model, task.calibration(seed))
    return Net(task, model, seed)


def fine_tuned(net: Net, way: Way, level: float | None, steps: int) -> tuple[nn.Module, nn.Module]:
    """The network after its last cut, and the same after these gradient evaluations, less what score and cuts take.

    Without a level there is one cut, of what has an SNR below one or a gate that is rather closed.
    """
    task, when = net.task, WHENS[way.when]
    total = steps - way.evaluations // task.batch_size
    batches = task.draw(total, net.seed + 1_000, True)
    model = at_once = net.model
    for number in range(1, when.num_cuts + 1):
        if number > 1:
            net = Net(task, bp.to_variational(model, estimator="mean"), net.seed)
        model = bp.to_deterministic(smaller(net, way, None if level is None else level ** (number / when.num_cuts)))
        at_once = copy.deepcopy(model)
        ends = [round(STAGE * cut * total) for cut in range(when.num_cuts)] + [total]
        train(task, model, batches, range(ends[number - 1], ends[number]), total, way)
        if not task.keeps_statistics:
            recalibrate_batch_norm(model, task.draw(RECALIBRATION_BATCHES, net.seed + 100, True))
    return at_once, model


def smaller(net: Net, way: Way, level: float | None) -> nn.Module:
    """A copy at this fraction of the MACs of the dense network; without a level by what the posterior says of each."""
    if level is None:
        model, score = copy.deepcopy(net.model), SCORES[way.score]
        target = "snr=1" if PHASES[score.phase].gates is None else "inclusion=0.5"
        report = bp.prune_channels(model, net.task.example, target, data=net.batches, dry_run=score.says_sizes)
        if score.says_sizes:
            model = copy.deepcopy(net.task.dense)
            bp.prune_channels(model, net.task.example, report.sizes, data=net.batches)
        return model
    kept = level * net.task.macs(net.task.dense) / net.task.macs(net.model)
    scores = net.allocated(way.score, way.option, way.allocation, way.compensation, kept)
    return net.cut(scores, way.compensation, kept)
