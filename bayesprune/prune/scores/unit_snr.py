"""What a unit costs once the others have made up for it: the squared signal-to-noise ratio of the unit as a vector.

Under the matrix normal posterior of a layer that reads a unit, of precision G (x) A around the means W, the weights W_S
of the unit's columns S have the squared signal-to-noise ratio tr(G W_S ([A^-1]_SS)^-1 W_S^T). Half of it is by how much
the loss of an example rises, in nats and to second order, when the unit leaves and the other weights of the layer are
moved to make up for it (Optimal Brain Surgeon by blocks; van der Ouderaa et al., 2024, use it for language models). The
costs of all layers that read a unit add up; who makes it pays nothing, since nobody reads it any more.

Units leave one at a time, and what is left is conditioned on it (Frantar & Alistarh, 2022):

    W <- W - W_S ([A^-1]_SS)^-1 [A^-1]_S,       A^-1 <- A^-1 - [A^-1]_:,S ([A^-1]_SS)^-1 [A^-1]_S,

so that of two units which say the same the first is free and the second is not.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_pruning.dependency import Group

from bayesprune.laplace import KroneckerFactors, KroneckerPosterior
from bayesprune.laplace.matrices import definite, removed_columns, to_matrix
from bayesprune.layers import VariationalLayer
from bayesprune.prune.graph.group import ChannelGroup, by_channel
from bayesprune.prune.scores.channels import Criterion

Readers = Mapping[tuple[str, nn.Module], Mapping[int, Sequence[int]]]
"""Positions along the inputs of each layer that reads units, by root channel; layers with their names."""

_DENSE = 0.8  # share of a matrix that is left, below which it is copied without the rest
_DAMPING = 0.01  # of A, as a fraction of its mean diagonal; conditioning takes the same


class UnitSNRImportance(Criterion):
    """A torch-pruning importance: what each channel or head costs in nats when the others have made up for it.

    Channels leave one after the other, and a channel's score is what its turn costs, or what an earlier one cost where
    that was more: the lowest scores are those that leave together at least cost. A group of which no reader is in the
    posterior gets None.

    It knows the channels of one model: after a cut fit the posterior anew, and make another. Scores of a group raise a
    ValueError where a layer that reads it has another shape than its posterior.

    Args:
        model: The model that the posterior was fitted to.
        posterior: What `fit_kronecker` returned for it. Its loss says what the cost is of.

    Examples:
        >>> import torch, bayesprune as bp
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = bp.to_variational(model)
        >>> x = torch.randn(32, 4)
        >>> importance = bp.prune.UnitSNRImportance(model, bp.laplace.fit_kronecker(model, [x]))
        >>> report = bp.prune_channels(model, x, "macs=0.5", importance=importance)
    """

    is_of_one_model = True

    def __init__(self, model: nn.Module, posterior: KroneckerPosterior) -> None:
        self._posterior = posterior
        self._names = {id(module): name for name, module in model.named_modules()}

    @torch.no_grad()
    def scores(self, group: Group) -> Tensor | None:
        """Scores (C,) of the root channels of a dependency group, each a unit by itself; None where none is known."""
        return self._scores(readers_in(group, self._names), [(root,) for root in group[0].root_idxs])

    @torch.no_grad()
    def of_group(self, group: ChannelGroup) -> Tensor | None:
        """Scores (C,) of the root channels of a group of units; those of a unit are equal."""
        return self._scores(readers_of(group), group.units)

    def _scores(self, readers: Readers, units: Sequence[Sequence[int]]) -> Tensor | None:
        systems = [
            system
            for (name, layer), positions in readers.items()
            if isinstance(layer, VariationalLayer) and name in self._posterior
            for system in _systems(
                _checked_factors(name, layer, self._posterior[name]),
                [removed_columns(layer, [p for root in unit for p in positions.get(root, ())]) for unit in units],
            )
        ]
        if not systems:
            return None
        costs, highest = [0.0] * len(units), 0.0
        for unit, cost in removal_costs(systems, len(units)):
            costs[unit] = highest = max(highest, cost)
        return by_channel(units, costs)


def readers_of(group: ChannelGroup) -> Readers:
    """The layers that read the units of a group; a copy of a model has the names of the model."""
    members = [m for m in group.members if m.axis[1] == "in"]
    return {(m.axis[0], m.layer): m.positions for m in members if isinstance(m.layer, nn.Module)}


def readers_in(group: Group, names: Mapping[int, str]) -> Readers:
    """The layers that read the channels of a dependency group of torch-pruning, by the names of modules by id."""
    readers: dict[tuple[str, nn.Module], dict[int, list[int]]] = {}
    for item in group:
        layer, root_idxs = item.dep.layer, item.root_idxs
        if item.dep.handler.__name__ == "prune_in_channels" and root_idxs is not None and None not in root_idxs:
            positions = readers.setdefault((names.get(id(layer), ""), layer), {})
            for root, position in zip(root_idxs, item.idxs, strict=True):
                positions.setdefault(root, []).append(position)
    return readers


def _checked_factors(name: str, layer: VariationalLayer, factors: KroneckerFactors) -> KroneckerFactors:
    """The factors of a layer, which still has the shape that it had when they were fitted."""
    weight, fitted = to_matrix(layer, layer.get_parameter("weight")).shape, factors.mean.shape
    with_bias = torch.Size([*weight[:2], weight[2] + 1]) if "bias" in layer.active_names() else weight
    if fitted not in (weight, with_bias):
        raise ValueError(
            f"{name} has a matrix of {tuple(with_bias)} (groups, outputs, inputs), and its posterior was fitted to one "
            f"of {tuple(fitted)}: the model was cut since. Fit the posterior again and make another UnitSNRImportance."
        )
    return factors


class _System:
    """A block of one layer's posterior between columns that are left: W^T G W, and the inverse of A.

    Attributes:
        units: Which units have columns in it, (U,).
        columns: Their columns, (U, s); where a unit has fewer, columns without weight at the end fill up.
    """

    def __init__(self, gram: Tensor, precision: Tensor, columns: list[Tensor]) -> None:
        self.units = torch.tensor([unit for unit, own in enumerate(columns) if len(own)])
        size, width = precision.shape[0], max(map(len, columns))
        self.gram = F.pad(gram, (0, width, 0, width))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(precision))
        self.inverse = torch.block_diag(inverse, torch.eye(width, dtype=inverse.dtype))
        filler = torch.arange(size, size + width)
        self.columns = torch.stack([torch.cat([own, filler[: width - len(own)]]) for own in columns if len(own)])
        self._is_left = torch.ones(len(self.gram), dtype=torch.bool)

    def costs(self) -> Tensor:
        """Half the squared SNR of each unit as a vector, (U,)."""
        rows, columns = self.columns[:, :, None], self.columns[:, None, :]
        gram, inverse = self.gram[rows, columns], self.inverse[rows, columns]
        if gram.shape[1] == 1:
            return 0.5 * (gram / inverse).flatten()
        solved = torch.cholesky_solve(gram, torch.linalg.cholesky(inverse))
        return 0.5 * solved.diagonal(dim1=1, dim2=2).sum(1)

    def remove(self, units: Tensor) -> bool:
        """Conditions what is left on the weights of these units being zero; whether any of them has columns here."""
        is_gone = torch.isin(self.units, units)
        if not is_gone.any():
            return False
        goes = self.columns[is_gone].unique()
        goes = goes[goes < len(self.gram) - self.columns.shape[1]]
        across, between = self.inverse[goes], self.gram[goes]
        move = torch.cholesky_solve(across, torch.linalg.cholesky(across[:, goes]))
        self.gram.addmm_(torch.cat([move, between]).mT, torch.cat([between[:, goes] @ move - between, -move]))
        self.inverse.addmm_(across.mT, move, alpha=-1)
        self.units, self.columns = self.units[~is_gone], self.columns[~is_gone]
        self._is_left[goes] = False
        for matrix in (self.gram, self.inverse):
            matrix[goes] = 0.0
            matrix[:, goes] = 0.0
        if int(self._is_left.sum()) < _DENSE * len(self._is_left):
            left = self._is_left.nonzero()[:, 0]
            self.gram, self.inverse = (m.index_select(0, left).index_select(1, left) for m in (self.gram, self.inverse))
            self.columns = (self._is_left.cumsum(0) - 1)[self.columns]
            self._is_left = self._is_left[left]
        return True


def removal_costs(systems: Sequence[_System], num_units: int) -> Iterable[tuple[int, float]]:
    """Units in the order in which they leave, the cheapest of those left first, and what each costs in nats.

    Of more than 128 units the cheapest 128th of those left leaves at a time.
    """
    parts = [system.costs() for system in systems]
    is_left = torch.ones(num_units, dtype=torch.bool)
    while is_left.any():
        total = torch.zeros(num_units, dtype=torch.double)
        for system, costs in zip(systems, parts, strict=True):
            total.index_add_(0, system.units, costs)
        order = total.masked_fill(~is_left, torch.inf).argsort(stable=True)
        gone = order[: max(1, int(is_left.sum()) // 128)]
        yield from zip(gone.tolist(), total[gone].tolist(), strict=True)
        is_left[gone] = False
        for number, system in enumerate(systems):
            if system.remove(gone):
                parts[number] = system.costs()


def _systems(factors: KroneckerFactors, columns: list[Tensor]) -> Iterable[_System]:
    """The blocks of a layer's posterior in which units (masks (G, C) each) have columns."""
    for group, inside, between in factors.blocks():
        own = [mask[group, inside].nonzero()[:, 0] for mask in columns]
        if any(map(len, own)):
            yield _System(factors.gram(group, inside), definite(between, _DAMPING), own)
