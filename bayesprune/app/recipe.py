"""What a compression is to do: the options of `bayesprune compress` and of `bp.compress`, checked."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

from bayesprune.convert import check_options
from bayesprune.foundation import defaults
from bayesprune.foundation.target import Target
from bayesprune.prune.channels.checks import checked_target
from bayesprune.storage.levels import KINDS as LEVEL_KINDS

SMALL_CUT = "macs=0.95"  # a search needs one at least


@dataclass(frozen=True)
class Recipe:
    """A way to compress a model.

    Attributes:
        target: "weights=0.2", the fraction of single weights that is kept, or a target of `prune_channels`; None
            searches for the smallest model within `tolerance`.
        tolerance: Largest accepted loss on validation data, a fraction: by so much accuracy may fall, or by such a part
            of itself perplexity rise.
        num_epochs: Epochs of each training stage.
        train_lr: Learning rate where the model is trained first.
        lr: Learning rate of the variational and the last fine-tuning.
        std: Structure of the stds, where they are learned; None is "per_weight" where single weights go, else
            "per_channel".
        estimator: Estimator of the variational fine-tuning, where there is one.
        granularity: What may go, as for `prune_channels`.
        uniform: Whether the same fraction of every group goes, so that a config can say the sizes.
        relative_std: Initial std as a fraction of the root mean square of the layer's weights.
        distill: Whether the smaller model learns from the dense one, too, in each training after a removal.
        bits: Width to which the weights are rounded after the fine-tuning; None leaves them as they are.
        train_rounded: Whether rounded weights are trained on for as long again, held to their grids; where that is
            worse on validation data it is undone.
        coding: "entropy" saves the result in as few bytes as it has entropy.
        corruptions: Whether the report says what was lost on corrupted test images.
        levels: Targets of smaller versions that are saved beside the result, as fractions of it.
        by: What the search counts: "macs", and removes channels and heads, or "weights". A target says it itself.
        gates: Whether gates held to the target choose the single weights, in place of stds that are learned first.
    """

    target: str | None
    tolerance: float | None
    num_epochs: int
    train_lr: float
    lr: float
    std: str | None
    estimator: str
    granularity: tuple[str, ...]
    uniform: bool = False
    relative_std: float = defaults.RELATIVE_STD
    distill: bool = True
    by: Literal["macs", "weights"] = "macs"
    bits: int | None = None
    train_rounded: bool = True
    coding: Literal["entropy"] | None = None
    levels: tuple[str, ...] = ()
    gates: bool = False
    corruptions: bool = False

    def __post_init__(self) -> None:
        """Refuses now what would be refused after minutes of training."""
        check_options(self.structure, self.relative_std, self.estimator)
        if not isinstance(self.num_epochs, Integral) or self.num_epochs < 1:
            raise ValueError(f"num_epochs is {self.num_epochs!r}; expected 1 or more.")
        for name in ("train_lr", "lr"):
            if not isinstance(getattr(self, name), Real) or not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a learning rate of 0 or more.")
        if self.bits is not None and not 2 <= self.bits <= 12:
            raise ValueError(f"bits is {self.bits!r}; expected the width of a weight, from 2 to 12.")
        if self.coding not in (None, "entropy"):
            raise ValueError(f'coding is {self.coding!r}; expected "entropy", or nothing for plain tensors.')
        if isinstance(self.levels, str):
            raise ValueError(f"levels is {self.levels!r}; expected several targets, such as ({self.levels!r},).")
        names = [str(Target.parse(level, LEVEL_KINDS, "levels", is_partial=True)) for level in self.levels]
        if len(set(names)) < len(names):
            raise ValueError(f"levels has two of one name: {', '.join(names)}. Give each target once.")
        if self.tolerance is not None and not self.tolerance >= 0:
            raise ValueError(f"tolerance is {self.tolerance!r}; expected the largest accepted loss, 0 or more.")
        if self.gates and (self.target is None or not self.removes_weights):
            raise ValueError("gates choose single weights for a target; give one, such as weights=0.01.")
        if self.estimator != defaults.ESTIMATOR and not self.learns_stds:
            raise ValueError(
                f"estimator is {self.estimator!r}, and no stds are learned: a budget of MACs or parameters, and gates, "
                "learn none. Leave it out, or give a target of weights or snr."
            )
        if not self.removes_weights:
            checked_target(self.goal, None, self.granularity, self.uniform, 1)
        elif self.uniform:
            raise ValueError("single weights were to be removed, which changes no size; leave uniform out.")

    @property
    def goal(self) -> Target:
        """The target, or in a search a small cut of its kind."""
        text = self.target or ("weights=0.95" if self.by == "weights" else SMALL_CUT)
        return Target.parse(text, ("macs", "params", "snr", "weights"), "compress", is_partial=True)

    @property
    def removes_weights(self) -> bool:
        """Whether single weights go, by a target or in a search."""
        return self.goal.kind == "weights"

    @property
    def structure(self) -> str:
        """Structure of the stds."""
        return self.std or ("per_weight" if self.removes_weights else "per_channel")

    @property
    def learns_stds(self) -> bool:
        """Whether stds say what goes, so that they have to be learned first."""
        return self.goal.kind not in ("macs", "params") and not self.gates

    @property
    def num_stages(self) -> int:
        """Number of stages that `run` announces."""
        return 4 + self.learns_stds + (self.bits is not None)

    @property
    def removal(self) -> str:
        """The stage that removes, by name."""
        if self.removes_weights:
            return "Remove single weights"
        names = {"heads": "heads", "mlp": "neurons"}
        return f"Remove {' and '.join(names.get(kind, 'channels') for kind in self.granularity)}"
