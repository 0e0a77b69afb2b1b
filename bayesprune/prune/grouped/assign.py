"""Which channels make a group: the assignment by which least is lost when all other weights go.

After Zhang et al. (2020, arXiv:2002.08127), who train towards it; here the trained layer is given. The weights between
output channel o and input channel c cost M_oc when they go and the rest of the row makes up for it. Rows and columns
are divided into g groups of equal size so that the groups hold as much of M as possible: with the columns given, the
best rows are a linear assignment, and the other way round; these two take turns from several starts.
"""

import torch
from torch import Tensor

_NUM_STARTS = 6
_MAX_TURNS = 30
_FINEST = 16  # groups from which coarser ones are made


def block_costs(mean: Tensor, precision: Tensor, num_taps: int) -> Tensor:
    """M (R, I): what the weights between an output and an input channel are worth, the rest of the row given.

    w^T ([P^-1]_cc)^-1 w for the taps w of a channel c: twice the log posterior density that is lost (Optimal Brain
    Surgeon by blocks).

    Args:
        mean: Weights (R, I * taps).
        precision: Between the columns, (C, C), positive definite.
        num_taps: Columns of a channel, which stand side by side.
    """
    covariance = torch.linalg.inv(precision)
    num_channels = len(precision) // num_taps
    blocks = covariance.view(num_channels, num_taps, num_channels, num_taps)
    own = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (I, taps, taps)
    w = mean.view(len(mean), num_channels, num_taps)
    return torch.einsum("rit,itu,riu->ri", w, torch.linalg.inv(own), w)


def assign(costs: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """The group of every row (R,) and of every column (I,), all of equal size.

    Args:
        costs: What is lost without each entry, (R, I); both sizes are multiples of the number of groups.
        num_groups: g.

    Raises:
        ImportError: scipy is missing.
    """
    values = costs.detach().cpu().double()
    generator = torch.Generator().manual_seed(0)
    starts = [_best(values[_unlike_rows(values, num_groups, generator)].T) for _ in range(_NUM_STARTS)]
    if 2 * num_groups <= _FINEST and not any(size % (2 * num_groups) for size in values.shape):
        starts.append(assign(costs, 2 * num_groups)[1] // 2)  # two finer groups make one
    best, found = -1.0, None
    for columns in starts:
        held = -1.0
        for _ in range(_MAX_TURNS):
            rows = _best(values @ _one_hot(columns, num_groups))
            columns = _best(values.T @ _one_hot(rows, num_groups))
            now = float(values[rows[:, None] == columns[None]].sum())
            if now > best:
                best, found = now, (rows, columns)
            if now <= held * (1 + 1e-9):
                break
            held = now
    assert found is not None, "no cost is negative"
    return found


def _unlike_rows(costs: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Rows that read other columns than each other, the first at random: one of each group, where there are groups."""
    directions = torch.nn.functional.normalize(costs.clamp_min(0).sqrt(), dim=1)
    chosen = [int(torch.randint(len(costs), (), generator=generator))]
    while len(chosen) < number:
        likeness = (directions @ directions[chosen].T).amax(1)
        likeness[chosen] = torch.inf
        chosen.append(int(likeness.argmin()))
    return torch.tensor(chosen)


def _best(benefit: Tensor) -> Tensor:
    """The group of each of R items, R / g in every group, by what it brings there, (R, g)."""
    from scipy.optimize import linear_sum_assignment

    num_items, num_groups = benefit.shape
    size = num_items // num_groups
    _, places = linear_sum_assignment(benefit.repeat_interleave(size, dim=1).numpy(), maximize=True)
    return torch.from_numpy(places // size)


def _one_hot(groups: Tensor, num_groups: int) -> Tensor:
    return torch.nn.functional.one_hot(groups, num_groups).double()
