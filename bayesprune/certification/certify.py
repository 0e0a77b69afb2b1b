"""Which predictions cannot be changed within a distance: bounds from below, an attack from above."""

import time
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from rich.table import Table
from torch import Tensor, nn

from bayesprune.certification.attack import attack
from bayesprune.certification.bounds import chord_lines, flat_lines, interval_bounds, linear_bound, tightened
from bayesprune.certification.network import Box, Network
from bayesprune.certification.semidefinite import Pairs, semidefinite_bound
from bayesprune.foundation.sharding import check_whole
from bayesprune.foundation.text import as_text

Method = Literal["interval", "linear", "sdp"]

_ALLOWANCE = 1e-9  # for rounding, of the outputs' size


@dataclass(frozen=True)
class Certificate:
    """What was proved of N examples; prints as a table.

    Attributes:
        method: Of the bounds.
        eps: Largest change of an input entry.
        verified: (N), whether no input within eps is given another label.
        margins: (N, C), lower bounds of the label's output minus each other one; infinite at the label itself.
        attacked: (N), whether the attack found an input that is given another label; never where it is verified.
        attack_margins: (N), the smallest margin that the attack found: at least the smallest of `margins`.
        seconds: Of the bounds of all examples, without the attack.
    """

    method: Method
    eps: float
    verified: Tensor
    margins: Tensor
    attacked: Tensor
    attack_margins: Tensor
    seconds: float

    def __str__(self) -> str:
        """Verified accuracy between its bounds as plain text."""
        count = max(1, len(self.verified))
        table = Table("eps", "method", "examples", "verified", "withstands the attack", "seconds an example")
        shares = (self.verified.sum() / count, 1 - self.attacked.sum() / count)
        shown = (f"{self.eps:g}", self.method, str(len(self.verified)), *(f"{float(part):.1%}" for part in shares))
        table.add_row(*shown, f"{self.seconds / count:.3g}")
        return as_text(table)


@torch.no_grad()
def certify(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    method: Method = "linear",
    *,
    box: tuple[float, float] | None = None,
    num_steps: int = 200,
    attack_steps: int = 40,
    num_pairs: int = 64,
) -> Certificate:
    """Proves for each example that no change of at most eps an entry gives it another label, or says how far it is.

    The bounds are of the function that the weights define in exact arithmetic, of posteriors at their means.
    They are computed in float64 and lowered by a billionth of the outputs' size, far more than its rounding.

    Args:
        model: A classifier of Linear, Conv, BatchNorm, ReLU, average pooling, Flatten, Dropout and sums; not changed.
        x: (N, ...) examples.
        y: (N) labels.
        eps: Largest change of an input entry, in its units.
        method: "interval" (Gowal et al., 2018) is fastest; "linear" (CROWN, Zhang et al., 2018) is never looser; "sdp"
            (Dathathri et al., 2020) goes on from there with each example that neither it verified nor the attack broke.
        box: Lowest and highest value that an input entry can have, such as (0.0, 1.0).
        num_steps: Of Adam, with "sdp".
        attack_steps: Of projected gradient descent from each of two starts.
        num_pairs: With "sdp", pairs of an example and a class that are worked on together.

    Raises:
        UnsupportedModelError: the model has a layer without a rule, forward hooks, too many units for "sdp", or is
            sharded over processes; or its layers one by one do not give its outputs.
        ValueError: the method is unknown, eps is negative, labels do not fit, or examples lie outside `box`.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> x = torch.randn(4, 2)
        >>> certify(net, x, net(x).argmax(1), 1e-6).verified
        tensor([True, True, True, True])
    """
    check_whole(model, "certify")
    _check(x, y, eps, method, box)
    network, examples, labels = Network(model), x.detach().cpu().double(), y.detach().cpu()
    low, high = (examples + sign * eps for sign in (-1, 1))
    around = Box.between(low if box is None else low.clamp(min=box[0]), high if box is None else high.clamp(max=box[1]))
    outputs = network(examples)
    if outputs.dim() != 2 or not 0 <= int(labels.min()) <= int(labels.max()) < outputs.shape[1]:
        raise ValueError(
            f"the model's output has shape {tuple(outputs.shape)} and labels go from {int(labels.min())} to "
            f"{int(labels.max())}; expected (N, C) and labels from 0 to C - 1."
        )
    network.check_outputs(examples, outputs)
    found = attack(network, around, examples, labels, num_steps=attack_steps)
    started = time.perf_counter()
    margins = _margins(network, around, labels, outputs.shape[1], method, found <= 0, num_steps, num_pairs)
    margins = margins - _ALLOWANCE * (1 + outputs.abs().amax(1, keepdim=True))
    seconds = time.perf_counter() - started
    return Certificate(method, eps, (margins > 0).all(1), margins, found <= 0, found, seconds)


def _margins(
    network: Network,
    around: Box,
    labels: Tensor,
    num_classes: int,
    method: Method,
    broken: Tensor,
    num_steps: int,
    num_pairs: int,
) -> Tensor:
    every = torch.eye(num_classes, dtype=torch.float64)
    rows = every[labels][:, None] - every  # (N, C, C); zero at the label
    before = interval_bounds(network, around)
    margins = linear_bound(network, around, list(map(flat_lines, before)), rows).value
    if method != "interval":
        before = tightened(network, around, before)
        lines = list(map(chord_lines, before))
        bound = linear_bound(network, around, lines, rows)
        flat = linear_bound(network, around, list(map(flat_lines, before)), rows).value
        margins = torch.stack([margins, bound.value, flat]).amax(0)
        margins = margins.scatter(1, labels[:, None], torch.inf)
        if method == "sdp":
            open_ = ((margins <= 0) & ~broken[:, None]).nonzero()
            for at in open_.split(num_pairs) if len(open_) else ():
                pairs = Pairs.of(around, lines, before, rows, bound, at)
                better = semidefinite_bound(network, pairs, num_steps=num_steps)
                margins[at[:, 0], at[:, 1]] = torch.maximum(margins[at[:, 0], at[:, 1]], better)
    return margins.scatter(1, labels[:, None], torch.inf)


def _check(x: Tensor, y: Tensor, eps: float, method: str, box: tuple[float, float] | None) -> None:
    if method not in get_args(Method):
        raise ValueError(f"method is {method!r}; expected one of {', '.join(get_args(Method))}.")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}; expected a number of at least 0.")
    if y.dim() != 1 or len(x) != len(y) or not len(y) or y.is_floating_point():
        raise ValueError(
            f"there are {len(x)} examples and labels of shape {tuple(y.shape)}, {y.dtype}; expected one integer each."
        )
    if box is not None and not box[0] <= float(x.min()) <= float(x.max()) <= box[1]:
        raise ValueError(
            f"examples go from {float(x.min()):g} to {float(x.max()):g}, outside the box {box}; give the values that "
            "the model is given, or another box."
        )
