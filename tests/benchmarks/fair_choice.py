"""Which way of spending a score is shown, by validation images, and how far two rows are from each other."""

import base64
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from fair_methods import ALLOCATIONS, SCORES, SEARCHED
from fair_tasks import LEVELS, LRS
from fair_training import Way
from torch import Tensor

Row = dict[str, Any]
AT_CUT, AT_END = "cut", "end"
PLAIN_WHENS = ("at once", "in 3 stages", "after two fifths")
PHASED_WHENS = ("after two fifths", "after a fifth", "after three fifths")
NO_NUMBER = "SNR below one"
"""In place of the level."""
GATHERED = "conditioned"  # the compensation under which options and allocations are tried


class Difference(NamedTuple):
    """A mean difference of accuracies, and its standard error; both in points."""

    points: float
    standard_error: float


def paired(ours: Sequence[Tensor], control: Sequence[Tensor]) -> Difference:
    """How much more images the first classifies rightly, of rows with equal seeds and images.

    Seeds and images are both samples: the squared error is that of the mean over seeds plus that of the mean over
    images, which counts what is neither's twice. One seed has images alone.

    Args:
        ours: For each seed, whether each image is right, (N,).
        control: The same of another row.
    """
    differences = torch.stack(list(ours)).double() - torch.stack(list(control)).double()
    num_seeds, num_images = differences.shape
    variance = differences.mean(0).var() / num_images
    if num_seeds > 1:
        variance = variance + differences.mean(1).var() / num_seeds
    return Difference(100 * float(differences.mean()), 100 * float(variance.sqrt()))


def packed(is_right: Tensor) -> str:
    """Truth values (N,) as text."""
    return base64.b64encode(zlib.compress(np.packbits(is_right.numpy()).tobytes(), 9)).decode()


def unpacked(text: str, number: int) -> Tensor:
    """The first `number` truth values of a text."""
    bits = np.unpackbits(np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8), count=number)
    return torch.from_numpy(bits).bool()


def way_of(row: Row) -> Way:
    """How a row spent its gradient evaluations."""
    return Way(**{field.name: row["run"][field.name] for field in fields(Way)})


def matching(rows: Iterable[Row], **key: Any) -> list[Row]:
    """Rows whose runs hold these values."""
    return [row for row in rows if key.items() <= row.get("run", {}).items()]


def stops(rows: Iterable[Row], regime: str, task: str, score: str) -> list[Row]:
    """The test rows of a score that was told no number, by seed: at the end of the regime."""
    its = matching(rows, task=task, regime=regime, score=score, level=NO_NUMBER, part="test", at=AT_END)
    return sorted(its, key=lambda row: row["run"]["seed"])


def level_of(stopped: Row, dense_macs: int) -> float:
    """The level at which others are set beside a row that stopped by itself."""
    return round(stopped["macs"] / dense_macs, 3)


def best(rows: Iterable[Row]) -> Row | None:
    """The row with the highest accuracy, the first of equals."""
    return max(rows, key=lambda row: row["accuracy"], default=None)


def cut_tries(score: str, task: str) -> list[Way]:
    """Options and allocations to try first, with the compensation that takes seconds."""
    return [
        Way(score, option, allocation, GATHERED, **before_the_cut(score, task))
        for option in SCORES[score].options
        for allocation in ALLOCATIONS
        if allocation not in SEARCHED
    ]


def cut_rows(rows: Iterable[Row], regime: str, task: str, score: str, level: float) -> list[Row]:
    """What was tried of a score right after the cut; without a training before it, it is the same in all regimes."""
    regime = regime if SCORES[score].phase else "none"
    return matching(rows, regime=regime, task=task, score=score, level=level, part="validation", at=AT_CUT)


def chosen_cut(rows: Iterable[Row], regime: str, task: str, score: str, level: float) -> Way | None:
    """The best option, allocation and compensation of a score on validation images, right after the cut."""
    found = best(cut_rows(rows, regime, task, score, level))
    return way_of(found) if found else None


def whens(score: str) -> tuple[str, ...]:
    """When a score may cut."""
    return PHASED_WHENS if SCORES[score].phase else PLAIN_WHENS


def chosen(rows: Sequence[Row], regime: str, task: str, score: str, level: float) -> Way | None:
    """The way of a score that is shown: of the nearest level at which settings were chosen.

    The moment and the learning rate are those that were best at the last level, the first ones where none was tried.
    """
    way = chosen_cut(rows, regime, task, score, min(LEVELS[task], key=lambda at: abs(at - level)))
    if way is None or regime == "none":
        return way
    last = LEVELS[task][-1]
    found = best(matching(rows, task=task, regime=regime, score=score, level=last, part="validation", at=AT_END))
    when, lr = (found["run"]["when"], found["run"]["lr"]) if found else (whens(score)[0], LRS[task][0])
    return replace(way, when=when, lr=lr, distilled=True)


def few_tries(score: str, task: str) -> list[Way]:
    """Three allocations with the first option, compensated layer by layer, for networks where a cut takes minutes."""
    phase, option = before_the_cut(score, task), SCORES[score].options[0]
    return [Way(score, option, name, "layer by layer", **phase) for name in ("inside layers", *SEARCHED)]


def before_the_cut(score: str, task: str) -> dict[str, Any]:
    """How the training before the cut goes while options and allocations are tried; nothing where there is none."""
    return {"when": PHASED_WHENS[0], "lr": LRS[task][0], "distilled": True} if SCORES[score].phase else {}


def further_tries(way: Way) -> list[Way]:
    """The best of the first without compensation, and with that layer by layer, which the searched allocations see."""
    return [
        replace(way, compensation="none"),
        *(replace(way, allocation=name, compensation="layer by layer") for name in (way.allocation, *SEARCHED)),
    ]
