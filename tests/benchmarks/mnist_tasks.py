"""What the MNIST tables hold: networks, data, levels, and the length and settings of every training."""

from dataclasses import dataclass
from typing import Any

from mnist_methods import Phase

POSTERIOR, TUNED, L1 = "posterior", "posterior, tuned temperature", "L1"
SELECTED = {L1: "l1", TUNED: "temperature"}
"""What is chosen on validation images for a method."""
STRUCTURES = {
    POSTERIOR: "per_weight",
    TUNED: "per_weight",
    "posterior, rank_one": "rank_one",
    "posterior, per_channel": "per_channel",
}
CONTROLS = ("magnitude", L1, "random", "lamp", "obd", "taylor")


@dataclass(frozen=True)
class Level:
    """One stop of the cascade: percent of weights or unit counts, epochs of cutting on the way, epochs after it."""

    target: float | tuple[int, ...]
    cut: float
    after: float


@dataclass(frozen=True)
class Task:
    """One network on one data set, cut by weights or by units."""

    name: str
    data: str
    net: str
    methods: tuple[str, ...]
    levels: tuple[Level, ...]
    dense: Phase
    tune: Phase
    cut: Phase
    after: Phase
    l1_weights: tuple[float, ...]
    selected_at: int = 0
    temperatures: tuple[float, ...] = ()

    def choices(self, method: str) -> tuple[float, ...]:
        """What a method's setting is chosen from."""
        return {L1: self.l1_weights, TUNED: self.temperatures}[method]

    @property
    def by_units(self) -> bool:
        return isinstance(self.levels[0].target, tuple)


def levels(*given: tuple[Any, float, float]) -> tuple[Level, ...]:
    return tuple(Level(*values) for values in given)


SCRATCH = Phase(6, 2e-3, shift=1)
TUNE = Phase(8, 3e-3, end=0.5, ramp=0.6, std_lr=3e-3, shift=1)
CUT = Phase(0, 5e-3, end=1.0, std_lr=5e-3, shift=1)
AFTER = Phase(0, 3e-3, shift=1)
LENET = (
    Phase(2, 2e-3, shift=1),
    Phase(3, 2e-3, end=0.5, ramp=0.6, std_lr=1e-2, shift=1),
    Phase(0, 3e-3, end=1.0, std_lr=1e-2, shift=1),
    Phase(0, 3e-3, shift=1),
)
TEMPERATURES = (0.03, 0.1, 0.3, 1.0)
L1_WEIGHTS = (1e-5, 3e-5, 1e-4, 3e-4)
L1_GROUPS = (*L1_WEIGHTS, 1e-3)
WEIGHT_LEVELS = levels((10, 1, 1), (5, 1, 1), (2, 2, 2), (1, 5, 6), (0.5, 3, 4), (0.3, 2, 4), (0.15, 2, 4))
UNIT_LEVELS = levels(((200, 120, 60), 2, 4), ((97, 71, 33), 5, 40))
ALL = (POSTERIOR, *CONTROLS)
UNITS = (POSTERIOR, "magnitude", L1, "random", "taylor")
TASKS = (
    Task("MNIST weights", "MNIST", "mlp", ALL, WEIGHT_LEVELS, SCRATCH, TUNE, CUT, AFTER, L1_WEIGHTS, 3),
    Task("MNIST units", "MNIST", "mlp", UNITS, UNIT_LEVELS, SCRATCH, TUNE, CUT, AFTER, L1_GROUPS, 1),
    Task(
        "LeNet-5 weights",
        "MNIST",
        "lenet5",
        (POSTERIOR, "magnitude", L1, "random"),
        levels((5, 0.5, 0), (1, 1, 0), (0.357, 3, 12)),
        *LENET,
        (1e-5, 1e-4),
        2,
    ),
    Task(
        "LeNet-5 units",
        "MNIST",
        "lenet5",
        (POSTERIOR, "magnitude", L1, "random"),
        levels(((10, 20, 200, 60), 1, 0), ((5, 10, 76, 16), 2, 30)),
        *LENET,
        (1e-5, 1e-4),
        1,
    ),
    Task(
        "Fashion-MNIST weights",
        "FashionMNIST",
        "mlp",
        ALL,
        levels((10, 1, 1), (5, 1, 1), (2, 2, 2), (1, 3, 4), (0.5, 2, 4)),
        SCRATCH,
        TUNE,
        CUT,
        AFTER,
        L1_WEIGHTS[1:],
        3,
        TEMPERATURES,
    ),
    Task(
        "Fashion-MNIST units",
        "FashionMNIST",
        "mlp",
        UNITS,
        levels(((200, 120, 60), 2, 4), ((97, 71, 33), 3, 15)),
        SCRATCH,
        TUNE,
        CUT,
        AFTER,
        L1_GROUPS[2:],
        1,
        TEMPERATURES,
    ),
)
