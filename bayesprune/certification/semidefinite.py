"""The first-order semidefinite certificate (Dathathri et al., 2020): a bound by one eigenvalue, for any multipliers.

The input and what each ReLU gives are variables, each scaled to z in [-1, 1] by its interval. What is known of
a = relu(p) is added to minus the margin with multipliers: a >= 0, a >= p, a (p - a) = 0, and that a lies below the
chord over p's interval. The sum is a quadratic, c + g'z + z'Hz / 2. With M = [[0, g'], [g, H]] and any kappa it is at
most

    c + 1/2 (kappa_0 - e + sum_i max(0, kappa_i - e)),  e = min(0, smallest eigenvalue of diag(kappa) - M),

over all z in [-1, 1]. Adam lowers that in the multipliers and kappa; Lanczos gives the eigenvalue by passes through the
network alone. What differs from the paper: the chord, with which the start is the linear bound itself, so that each
step is a gain on it; the eigenvector of the last step starts the next search; at the end M is assembled and its
eigenvalue is that of LAPACK, less its bound of rounding errors.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bayesprune.certification.bounds import LinearBound, Lines
from bayesprune.certification.network import Box, Network
from bayesprune.errors import UnsupportedModelError

MOST_VARIABLES = 8192
"""Inputs and units that are not fixed: a matrix of that size is assembled (0.5 GB) for the last eigenvalue."""


@dataclass(frozen=True)
class Pairs:
    """P pairs of an example and another class: boxes, lines, what is bounded, and where the linear bound left it.

    Attributes:
        box: Of inputs (P, ...).
        lines: Around each ReLU.
        before: Box of what each ReLU is given.
        objectives: (P, C), minus the margin as a linear function of the output.
        coefficients: By ReLU (P, ...), those of its output on the way to the linear bound of minus the margin.
    """

    box: Box
    lines: list[Lines]
    before: list[Box]
    objectives: Tensor
    coefficients: list[Tensor]

    @classmethod
    def of(
        cls, box: Box, lines: list[Lines], before: list[Box], rows: Tensor, bound: LinearBound, at: Tensor
    ) -> "Pairs":
        """Those at indices (P, 2) of example and row."""
        first, second = at.unbind(1)
        return cls(
            Box(box.center[first], box.radius[first]),
            [Lines(*(part[first] for part in line)) for line in lines],
            [Box(part.center[first], part.radius[first]) for part in before],
            -rows[first, second],
            [-part[first, second] for part in bound.coefficients],
        )


@torch.enable_grad()
def semidefinite_bound(network: Network, pairs: Pairs, *, num_steps: int, lanczos_steps: int = 12) -> Tensor:
    """Lower bounds of the margins (P); never above the true minimum, whatever the multipliers have come to.

    Raises:
        UnsupportedModelError: more than `MOST_VARIABLES` variables are free.
    """
    dual = _Dual(network, pairs)
    count = int(dual.free.sum(1).max())
    if count > MOST_VARIABLES:
        raise UnsupportedModelError(
            f"the semidefinite bound has {count:,} variables here (inputs and units that are not fixed); expected at "
            f'most {MOST_VARIABLES:,}. Use method="linear".'
        )
    best, multipliers = torch.full((len(pairs.objectives),), torch.inf, dtype=torch.float64), dual.start()
    kept = [part.clone() for part in multipliers]
    rates = dual.rates(multipliers)
    leaves = [(part / rate).requires_grad_(True) for part, rate in zip(multipliers, rates, strict=True)]
    optimizer = torch.optim.Adam(leaves, lr=_LEARNING_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.02 ** (step / max(1, num_steps)))
    vector = None
    for _ in range(num_steps):
        present = [leaf * rate for leaf, rate in zip(leaves, rates, strict=True)]
        vector = dual.smallest_vector([part.detach() for part in present], vector, lanczos_steps)
        bound = dual.bound(present, vector)
        better = bound.detach() < best
        best = torch.where(better, bound.detach(), best)
        for old, new in zip(kept, present, strict=True):
            old[better] = new.detach()[better]
        optimizer.zero_grad()
        bound.sum().backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for leaf, is_signed in zip(leaves, dual.signed, strict=True):
                if not is_signed:
                    leaf.clamp_(min=0)
    return -dual.sound_bound(kept)


_LEARNING_RATE = 0.1


class _Dual:
    """The quadratic and its bound. Multipliers: four by ReLU, then kappa (P, 1 + V)."""

    def __init__(self, network: Network, pairs: Pairs) -> None:
        self.network, self.pairs = network, pairs
        after = [Box.between(box.low.relu(), box.high.relu()) for box in pairs.before]
        self.boxes = [pairs.box, *after]
        self.shapes = [box.center.shape[1:] for box in self.boxes]
        self.free = torch.cat([box.radius.flatten(1) > 0 for box in self.boxes], 1)
        self.generator = torch.Generator().manual_seed(0)
        self.signed = [*[False, False, True, False] * len(after), True]

    def start(self) -> list[Tensor]:
        """Those under which the bound is the linear one."""
        found: list[Tensor] = []
        for coefficient, lines in zip(self.pairs.coefficients, self.pairs.lines, strict=True):
            down, up = (-coefficient).relu(), coefficient.relu()
            found += [down * (1 - lines.low_slope), down * lines.low_slope, torch.zeros_like(up), up]
        kappa = self.gradients(found, torch.zeros(self.free.shape, dtype=torch.float64))[0].abs() * self.free
        return [*found, torch.cat([kappa.sum(1, keepdim=True), kappa], 1)]

    def rates(self, multipliers: list[Tensor]) -> list[Tensor]:
        """The size of the multipliers, by pair and ReLU: Adam's steps are parts of it."""
        found: list[Tensor] = []
        for coefficient, after in zip(self.pairs.coefficients, self.boxes[1:], strict=True):
            size, width = (_mean(part) for part in (coefficient.abs(), after.radius))
            found += [size, size, size / width, size]
        return [*found, _mean(multipliers[-1][:, 1:])]

    def lagrangian(self, multipliers: list[Tensor], z: Tensor) -> Tensor:
        """Its values (P) at z (P, V)."""
        parts = z.split([shape.numel() for shape in self.shapes], 1)
        values = [
            box.center + box.radius * part.view_as(box.center) for box, part in zip(self.boxes, parts, strict=True)
        ]
        terms: list[Tensor] = []

        def relu(number: int, p: Tensor) -> Tensor:
            a, line = values[1 + number], self.pairs.lines[number]
            positive, above, product, chord = multipliers[4 * number : 4 * number + 4]
            gap = p - a
            term = positive * a - above * gap + product * a * gap
            terms.append((term + chord * (line.high_slope * p + line.high_offset - a)).flatten(1).sum(1))
            return a

        output = self.network.run(values[0], relu)
        return (self.pairs.objectives * output).sum(1) + sum(terms)

    def gradients(self, multipliers: list[Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient g + Hz (P, V), and the values (P)."""
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            value = self.lagrangian(multipliers, z)
            (grad,) = torch.autograd.grad(value.sum(), z)
        return grad, value.detach()

    def smallest_vector(self, multipliers: list[Tensor], start: Tensor | None, num_steps: int) -> Tensor:
        """The Ritz vector (P, 1 + V) of the smallest eigenvalue of diag(kappa) - M, from this start."""
        kappa = multipliers[-1]
        linear, _ = self.gradients(multipliers, torch.zeros_like(kappa[:, 1:]))

        def product(vector: Tensor) -> Tensor:
            first, rest = vector[:, :1], vector[:, 1:]
            curved = self.gradients(multipliers, rest)[0] - linear
            return kappa * vector - torch.cat([(linear * rest).sum(1, keepdim=True), first * linear + curved], 1)

        noise = torch.randn(kappa.shape, generator=self.generator, dtype=kappa.dtype) * self._mask()
        noise = noise / noise.norm(dim=1, keepdim=True)
        start = noise if start is None else start + 0.1 * noise  # an eigenvector alone would find no other
        return smallest_ritz_vector(product, start, min(num_steps, kappa.shape[1]))

    def bound(self, multipliers: list[Tensor], vector: Tensor) -> Tensor:
        """The bound (P) with the Rayleigh quotient of a unit vector in place of the smallest eigenvalue."""
        kappa, first, rest = multipliers[-1], vector[:, 0], vector[:, 1:]
        values = self.lagrangian(multipliers, torch.zeros_like(rest))
        plus, minus = self.lagrangian(multipliers, rest), self.lagrangian(multipliers, -rest)
        quotient = (kappa * vector.square()).sum(1) - first * (plus - minus) - (plus + minus - 2 * values)
        return self._closed(values, kappa, quotient.clamp(max=0))

    def _closed(self, constant: Tensor, kappa: Tensor, smallest: Tensor) -> Tensor:
        rest = (kappa[:, 1:] - smallest[:, None]).relu() * self.free
        return constant + 0.5 * (kappa[:, 0] - smallest + rest.sum(1))

    def _mask(self) -> Tensor:
        return torch.cat([torch.ones(len(self.free), 1, dtype=torch.bool), self.free], 1)

    @torch.no_grad()
    def sound_bound(self, multipliers: list[Tensor]) -> Tensor:
        """The bound (P) with M assembled, pair by pair, and its eigenvalue from below."""
        found: list[Tensor] = []
        for number in range(len(self.free)):
            one = _Dual(self.network, _only(self.pairs, number))
            parts = [part[number : number + 1] for part in multipliers]
            free = one.free[0].nonzero().flatten()
            linear, constant = one.gradients(parts, torch.zeros(1, one.free.shape[1], dtype=torch.float64))
            rows = [one._hessian_rows(parts, some, linear)[:, free] for some in free.split(256)]
            matrix = torch.zeros(len(free) + 1, len(free) + 1, dtype=torch.float64)
            matrix[1:, 1:] = torch.cat(rows)
            matrix[0, 1:] = matrix[1:, 0] = linear[0, free]
            matrix = parts[-1][0, one._mask()[0]].diag() - (matrix + matrix.T) / 2
            slack = 4 * len(matrix) * torch.finfo(torch.float64).eps * matrix.norm()
            smallest = (torch.linalg.eigvalsh(matrix)[:1] - slack).clamp(max=0)
            found.append(one._closed(constant, parts[-1], smallest))
        return torch.cat(found)

    def _hessian_rows(self, multipliers: list[Tensor], units: Tensor, linear: Tensor) -> Tensor:
        """Rows of H (U, V) of a dual of one pair."""
        basis = torch.zeros(len(units), self.free.shape[1], dtype=torch.float64)
        basis[torch.arange(len(units)), units] = 1.0
        many = _Dual(self.network, _only(self.pairs, 0, len(units)))
        repeated = [part.expand(len(units), *part.shape[1:]) for part in multipliers]
        return many.gradients(repeated, basis)[0] - linear


def _mean(part: Tensor) -> Tensor:
    """Over all but the first dimension, which stay as ones; a little above zero."""
    return part.mean(tuple(range(1, part.dim())), keepdim=True).clamp_min(1e-12)


def _only(pairs: Pairs, number: int, times: int = 1) -> Pairs:
    """One pair, so many times."""

    def take(part: Tensor) -> Tensor:
        return part[number : number + 1].expand(times, *part.shape[1:])

    boxes = [Box(take(box.center), take(box.radius)) for box in (pairs.box, *pairs.before)]
    lines = [Lines(*map(take, line)) for line in pairs.lines]
    return Pairs(boxes[0], lines, boxes[1:], take(pairs.objectives), list(map(take, pairs.coefficients)))


def smallest_ritz_vector(product: Callable[[Tensor], Tensor], start: Tensor, num_steps: int) -> Tensor:
    """Lanczos with full orthogonalisation, one problem a row: unit vectors (P, V) for the smallest eigenvalue.

    Where a space closes before the last step, zeros follow; a zero comes out where no eigenvalue in it is negative.
    """
    basis = [start / start.norm(dim=1, keepdim=True)]
    largest = torch.zeros(len(start), dtype=start.dtype)
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    for step in range(num_steps):
        image = product(basis[-1])
        largest = torch.maximum(largest, image.norm(dim=1))
        diagonal.append((image * basis[-1]).sum(1))
        known = torch.stack(basis, 1)
        for _ in range(2):
            image = image - torch.einsum("pkv,pk->pv", known, torch.einsum("pkv,pv->pk", known, image))
        size = image.norm(dim=1)
        if step + 1 < num_steps:
            size = size * (size > 1e-9 * largest)
            beside.append(size)
            basis.append(image * torch.where(size > 0, 1 / size, 0.0)[:, None])
    matrix = torch.diag_embed(torch.stack(diagonal, 1))
    if beside:
        off = torch.diag_embed(torch.stack(beside, 1), offset=1)
        matrix = matrix + off + off.mT
    vectors = torch.linalg.eigh(matrix).eigenvectors[:, :, 0]
    found = torch.einsum("pkv,pk->pv", torch.stack(basis, 1), vectors)
    return found / found.norm(dim=1, keepdim=True).clamp_min(1e-300)
