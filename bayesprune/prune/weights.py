"""Removes single weights: unstructured to a sparsity or an SNR threshold, or in N:M patterns.

Removed weights are zeros and stay zeros through further training. Zeros make a compressed file smaller; they do not
make the model faster on ordinary hardware (removed channels do, see `prune_channels`).
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bayesprune.layers import Posterior, VariationalLayer, named_posteriors, variational_layers
from bayesprune.layers.sharding import whole
from bayesprune.prune.scores import snr

Score = Callable[[Posterior], Tensor]


@dataclass(frozen=True)
class WeightRow:
    """One weight tensor: its name, how many weights it has and keeps, and why it was passed over, if it was."""

    name: str
    total: int
    kept: int
    note: str = ""


@dataclass(frozen=True)
class WeightReport:
    """What `prune_weights` did; prints as a table."""

    rows: tuple[WeightRow, ...]

    @property
    def total(self) -> int:
        """Weights of all variational layers, biases apart."""
        return sum(row.total for row in self.rows)

    @property
    def kept(self) -> int:
        """How many of them are kept."""
        return sum(row.kept for row in self.rows)

    @property
    def sparsity(self) -> float:
        """The fraction removed."""
        return 1 - self.kept / self.total

    def __str__(self) -> str:
        """The table as plain text."""
        title = f"{self.kept:,} of {self.total:,} weights kept (sparsity {self.sparsity:.2%})"
        table = Table("weight", "total", "kept", "sparsity", "note", title=title)
        for row in self.rows:
            table.add_row(row.name, f"{row.total:,}", f"{row.kept:,}", f"{1 - row.kept / row.total:.1%}", row.note)
        console = Console(width=120, no_color=True)
        with console.capture() as capture:
            console.print(table)
        return capture.get()


@torch.no_grad()
def prune_weights(
    model: nn.Module,
    *,
    sparsity: float | None = None,
    snr_below: float | None = None,
    pattern: str | None = None,
    scope: str = "global",
    score: Score = snr,
) -> WeightReport:
    """Removes single weights of the variational layers, biases apart; in place. Exactly one target is given.

    What was removed before stays removed and counts. Removed weights are zeros, draw no noise, do not count in the KL,
    and stay zeros through further training with any torch optimizer, attached or not. With FSDP 2 every process calls
    it, has all scores for a moment, and keeps the masks whole.

    Args:
        model: A variational model.
        sparsity: Fraction of weights to remove in all, 0 to 1.
        snr_below: Remove weights whose SNR is below this; 1 removes what is more noise than signal.
        pattern: "N:M", such as "2:4": keep the best N of every M consecutive inputs of each output. Layers whose number
            of inputs is not a multiple of M are left, and said so.
        scope: Whether `sparsity` ranks all weights together ("global") or each layer's apart ("layer").
        score: Score of a posterior's weights, the lowest going first: `scores.snr`, or `scores.magnitude` as a control.

    Raises:
        ValueError: not exactly one target, one out of range, NaN scores, or a model without variational layers.
    """
    posteriors = [posterior for posterior in named_posteriors(model) if posterior.is_weight]
    _check(posteriors, sparsity, snr_below, pattern, scope)
    if snr_below is not None:
        keeps = {posterior: _scores(posterior, snr) >= snr_below for posterior in posteriors}
    elif pattern is not None:
        keeps = {posterior: _keep_pattern(posterior, pattern, score) for posterior in posteriors}
    elif scope == "layer":
        keeps = {posterior: _keep_best([posterior], sparsity, score)[0] for posterior in posteriors}
    else:
        keeps = dict(zip(posteriors, _keep_best(posteriors, sparsity, score), strict=True))
    rows = []
    holders = _holders(model)
    for posterior, keep in keeps.items():
        total, note = posterior.mean.numel(), ""
        if keep is None:
            note = f"{_inputs(posterior)[1]} inputs are not a multiple of {_parse(pattern)[1]}"
        else:
            keep = keep & ~_removed(posterior)
            for layer, name in holders[id(posterior.mean)]:
                layer.set_mask(name, keep)
        rows.append(WeightRow(posterior.name, total, total - int(_removed(posterior).sum()), note))
    return WeightReport(tuple(rows))


def _keep_best(posteriors: list[Posterior], sparsity: float | None, score: Score) -> list[Tensor]:
    """Exactly the best (1 - sparsity) of the weights of all these posteriors; ties go by position."""
    assert sparsity is not None, "checked by the caller"
    scores = [_scores(posterior, score) for posterior in posteriors]
    flat = torch.cat([s.flatten().cpu() for s in scores])
    keep = torch.ones(flat.numel(), dtype=torch.bool)
    if count := round(sparsity * flat.numel()):
        threshold = flat.kthvalue(count).values  # several times faster than sorting all
        keep = flat > threshold
        ties = (flat == threshold).nonzero().flatten()
        keep[ties[count - int((flat < threshold).sum()) :]] = True
    pieces = keep.split([s.numel() for s in scores])
    return [piece.view(s.shape).to(s.device) for piece, s in zip(pieces, scores, strict=True)]


def _keep_pattern(posterior: Posterior, pattern: str | None, score: Score) -> Tensor | None:
    n, m = _parse(pattern)
    dim, num_inputs = _inputs(posterior)
    if num_inputs % m:
        return None
    scores = _scores(posterior, score).movedim(dim, -1)
    groups = scores.reshape(-1, m)
    keep = torch.zeros_like(groups, dtype=torch.bool)
    keep.scatter_(1, groups.topk(n, dim=1).indices, True)
    return keep.view(scores.shape).movedim(-1, dim).contiguous()


def _inputs(posterior: Posterior) -> tuple[int, int]:
    """The dimension of the weight that numbers inputs, and how many of them each output has."""
    dim = 1 - posterior.unit_dims[-1]
    groups = getattr(posterior.layer, "groups", 1) if dim == 0 else 1
    return dim, posterior.mean.shape[dim] // groups


def _holders(model: nn.Module) -> dict[int, list[tuple[VariationalLayer, str]]]:
    """The layers that hold each posterior mean, several where it is tied, by the mean's id."""
    holders: dict[int, list[tuple[VariationalLayer, str]]] = defaultdict(list)
    for _, layer in variational_layers(model):
        for name in layer.active_names():
            holders[id(getattr(layer, name))].append((layer, name))
    return holders


def _scores(posterior: Posterior, score: Score) -> Tensor:
    scores = whole(score(posterior))
    if bad := int(scores.isnan().sum()):
        raise ValueError(
            f"the scores of {posterior.name} have {bad} of {scores.numel()} values that are NaN; expected numbers. "
            "Check whether training diverged."
        )
    return scores.masked_fill(_removed(posterior), -torch.inf)


def _removed(posterior: Posterior) -> Tensor:
    mask, mean = posterior.layer.mask(posterior.parameter, whole=True), posterior.mean
    return torch.zeros(mean.shape, dtype=torch.bool, device=mean.device) if mask is None else ~mask


def _parse(pattern: str | None) -> tuple[int, int]:
    parts = str(pattern).split(":")
    if len(parts) == 2 and all(part.isdigit() for part in parts) and 0 < int(parts[0]) < int(parts[1]):
        return int(parts[0]), int(parts[1])
    raise ValueError(f'pattern is {pattern!r}; expected "N:M" with 0 < N < M, such as "2:4".')


def _check(
    posteriors: list[Posterior], sparsity: float | None, snr_below: float | None, pattern: str | None, scope: str
) -> None:
    if not posteriors:
        raise ValueError("prune_weights got a model without variational layers; call to_variational first.")
    given = {"sparsity": sparsity, "snr_below": snr_below, "pattern": pattern}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ValueError(f"prune_weights got {named or 'no target'}; expected exactly one of {', '.join(given)}.")
    if sparsity is not None and not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is {sparsity!r}; expected a fraction from 0 to 1.")
    if snr_below is not None and not snr_below >= 0:
        raise ValueError(f"snr_below is {snr_below!r}; expected a ratio of 0 or more.")
    if pattern is not None:
        _parse(pattern)
    if scope not in ("global", "layer"):
        raise ValueError(f'scope is {scope!r}; expected "global" or "layer".')
