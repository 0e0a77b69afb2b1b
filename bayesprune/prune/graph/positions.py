"""Which positions along an axis leave with each root channel of a group."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor


class Positions(Mapping[int, Sequence[int]]):
    """Positions along one axis by root channel; as two index vectors, for there may be many.

    Attributes:
        roots: Root channels, one for each position.
        places: The positions, in the same order.

    Example:
        >>> fused = Positions.by_root({0: [0, 4], 1: [1, 5]})
        >>> fused[1], fused.of(torch.tensor([1, 0])).tolist()
        ([1, 5], [1, 5, 0, 4])
    """

    def __init__(self, roots: Sequence[int], places: Sequence[int]) -> None:
        self.roots, self.places = (torch.tensor(values, dtype=torch.long) for values in (roots, places))

    @classmethod
    def by_root(cls, positions: Mapping[int, Sequence[int]]) -> "Positions":
        """Positions that are given by root channel."""
        roots = chain.from_iterable([root] * len(found) for root, found in positions.items())
        return cls(list(roots), list(chain.from_iterable(positions.values())))

    def of(self, roots: Tensor) -> Tensor:
        """The positions that leave with these root channels, one root channel after the other, each in its order."""
        if self._table is not None and int(roots.max()) < len(self._table):
            return self._table[roots].flatten()
        return torch.tensor([place for root in roots.tolist() for place in self.get(root, ())], dtype=torch.long)

    @cached_property
    def is_even(self) -> bool:
        """Whether every root channel has as many positions."""
        return len(set(self._counts.tolist())) == 1

    @cached_property
    def num_places(self) -> int:
        """How many positions there are, those of several root channels once."""
        return len(self.places.unique())

    @cached_property
    def num_roots(self) -> int:
        """How many root channels there are."""
        return len(self._counts)

    @cached_property
    def _counts(self) -> Tensor:
        counts = torch.bincount(self.roots)
        return counts[counts > 0]

    @cached_property
    def _table(self) -> Tensor | None:
        """Positions by root channel, where root channels are 0 to C - 1 and have as many each, (C, n)."""
        if not self.is_even or int(self.roots.max()) >= self.num_roots:
            return None
        order = (self.roots * (1 + int(self.places.max())) + self.places).argsort()
        return self.places[order].view(self.num_roots, -1)

    @cached_property
    def _by_root(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for root, place in zip(self.roots.tolist(), self.places.tolist(), strict=True):
            found.setdefault(root, []).append(place)
        return {root: sorted(places) for root, places in found.items()}

    def __getitem__(self, root: int) -> list[int]:
        return self._by_root[root]

    def __iter__(self) -> Iterator[int]:
        return iter(self._by_root)

    def __len__(self) -> int:
        return self.num_roots
