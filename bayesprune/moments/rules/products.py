"""Rules for products of two tensors, matmul, its kin and einsum, and for linear equations and inverses.

For y = sum_d a_d b_d of independent entries, var y = sum_d va (mb^2 + vb) + ma^2 vb, exact: three products, two where
one operand is certain. What entries share adds coherently:

* Along a dimension that is summed over (the tokens of the values that attention averages), an operand with shared part
  s has var y = sum_d (v - s) m^2 + s (sum_d m)^2, m being the other operand's means: one small product more.
* Along one that stays, it is the same rule with ma^2 replaced by the product of the means of two tokens, averaged over
  pairs. If both operands have positions of their own (queries and keys), those of the second are followed: a shift
  common to all keys is what softmax takes out.

dX = A^-1 (dB - dA X), so that with G = A^-1, var X = G^2 (var B + var A X^2), squares entry by entry: exact in B. Two
products, and one more where A is uncertain.
"""

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from bayesprune.moments.covariance import aligned, is_tracked, products_of_pairs
from bayesprune.moments.elementwise import in_place
from bayesprune.moments.gaussian import total
from bayesprune.moments.memory import MomentTensors
from bayesprune.moments.registry import follows_directions, register_rule
from bayesprune.moments.tensor import Moments, is_uncertain, parts, plain

Product = Callable[[Tensor, Tensor], Tensor]
Labels = Sequence[Any]


def bilinear(product: Product, a: Any, b: Any, labels: tuple[Labels, Labels], out: Labels) -> Moments:
    """A product of two tensors, linear in both.

    Args:
        product: Of plain tensors; it broadcasts dimensions of size 1.
        a: First operand.
        b: Second operand.
        labels: A name for each dimension of either operand; dimensions of one name run together.
        out: The names of the result's dimensions; a name that is missing is summed over.
    """
    operands = parts(a), parts(b)
    mean = product(operands[0].mean, operands[1].mean)
    dtype = torch.promote_types(mean.dtype, torch.float32)
    first, second = (_Operand(x, names, out, dtype) for x, names in zip(operands, labels, strict=True))
    with torch.autocast(mean.device.type, enabled=False):
        variance = _variance(product, first, second)
        positions = _positions(first, second) if is_tracked() else set()
        shared = _variance(product, first.between(positions), second.between(positions)) if positions else None
    return Moments(mean, variance, shared)


class _Operand:
    """A factor, in the precision of variances, with its dimensions by name; or what pairs of its positions have."""

    def __init__(self, x: MomentTensors, names: Labels, out: Labels, dtype: torch.dtype) -> None:
        self.mean, self.variance, self.names = x.mean.to(dtype), x.variance, names
        self.shared = aligned(x.shared, x.mean.dim()) if is_tracked() and x.shared is not None else None
        self.free, self.paired = set(names) & set(out), list[int]()

    def along(self, names: set[Any]) -> list[int]:
        """The dimensions of these names."""
        return [dim for dim, name in enumerate(self.names) if name in names and self.mean.shape[dim] > 1]

    @property
    def positions(self) -> set[Any]:
        """Names of the dimensions along which it shares."""
        if self.shared is None:
            return set()
        return {name for dim, name in enumerate(self.names) if self.shared.shape[dim] == 1 < self.mean.shape[dim]}

    def between(self, names: set[Any]) -> "_Operand":
        """The same for two different positions: their covariance as the variance."""
        if not (dims := self.along(names)):
            return self
        made = copy(self)
        made.paired, made.variance, made.shared = dims, None, None
        if self.shared is not None and names & self.positions:
            made.shared = self.shared.mean(dims, keepdim=True)
            sizes = [1 if dim in dims else size for dim, size in enumerate(self.mean.shape)]
            made.variance = made.shared.expand(sizes)
        return made

    def squares(self, summed: set[Any] | None = None) -> Tensor:
        """Squares of the means, or of their sums over some dimensions; of positions, the products of two."""
        sums = self.mean.sum(dims, keepdim=True) if (dims := self.along(summed or set())) else self.mean
        if not self.paired:
            return sums.square()
        return products_of_pairs(sums, [1 if dim in self.paired else size for dim, size in enumerate(sums.shape)])


def _positions(a: _Operand, b: _Operand) -> set[Any]:
    """Names of the dimensions along which the product shares."""
    found = (a.positions | b.positions) & (a.free | b.free)
    if not found:  # a mean over tokens that share: whatever counts the means are positions again
        return a.free - b.free if b.positions else b.free - a.free if a.positions else set()
    return found - (a.free - b.free) if found - a.free else found


def _variance(product: Product, a: _Operand, b: _Operand) -> Tensor | None:
    terms, is_split = list[Tensor](), False
    if a.variance is not None:
        squares = b.squares() if b.variance is None else b.squares() + b.variance
        if a.shared is not None and (summed := a.positions - a.free):
            sums = b.squares(summed)
            if b.variance is not None:
                sums = sums + b.variance.sum(b.along(summed), keepdim=True)
            terms += product((a.variance - a.shared).clamp_min(0), squares), product(a.shared, sums)
            is_split = True
        else:
            terms.append(product(a.variance, squares))
    if b.variance is not None:
        if b.shared is not None and (summed := b.positions - b.free):
            terms += product(a.squares(), (b.variance - b.shared).clamp_min(0)), product(a.squares(summed), b.shared)
            is_split = True
        else:
            terms.append(product(a.squares(), b.variance))
    if not terms:
        return None
    # What shares with a negative sign, as probabilities do, may cancel more than there is.
    return total(terms).clamp_min(0) if is_split and not a.paired and not b.paired else total(terms)


@register_rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.linalg.matmul)
def matmul(input: Any, other: Any) -> Any:
    """A (..., P, D) times B (..., D, Q); vectors as torch has them."""
    if input.dim() == 1:
        return matmul(input.unsqueeze(0), other).squeeze(-1 if other.dim() == 1 else -2)
    if other.dim() == 1:
        return matmul(input, other.unsqueeze(-1)).squeeze(-1)
    num_leading = max(input.dim(), other.dim()) - 2
    leading = [f"leading {i}" for i in range(num_leading)]
    names = (
        [*leading[num_leading + 2 - input.dim() :], "p", "d"],
        [*leading[num_leading + 2 - other.dim() :], "d", "q"],
    )
    return bilinear(torch.matmul, input, other, names, [*leading, "p", "q"])


@register_rule(Tensor.__rmatmul__)
def reverse_matmul(input: Any, other: Any) -> Any:
    """B A."""
    return matmul(other, input)


@register_rule(torch.mm, Tensor.mm, torch.bmm, Tensor.bmm)
def matrix_product(input: Any, mat2: Any) -> Any:
    """Of two matrices, or of batches of them."""
    return matmul(input, mat2)


@register_rule(torch.mv, Tensor.mv)
def matrix_vector(input: Any, vec: Any) -> Any:
    """A matrix times a vector."""
    return matmul(input, vec)


@register_rule(torch.dot, Tensor.dot)
def dot(input: Any, tensor: Any = None, *, other: Any = None) -> Any:
    """The inner product of two vectors."""
    return matmul(input, other if tensor is None else tensor)


@register_rule(torch.outer, Tensor.outer, torch.ger, Tensor.ger)
def outer(input: Any, vec2: Any) -> Any:
    """The product of all pairs."""
    return input.unsqueeze(-1) * vec2


@register_rule(torch.inner, Tensor.inner)
@follows_directions
def inner(input: Any, other: Any) -> Any:
    """Products summed over the last dimension of both."""
    if not input.dim() or not other.dim():
        return input * other
    return tensordot(input, other, ([-1], [-1]))


@register_rule(torch.linalg.vecdot)
@follows_directions
def vecdot(x: Any, y: Any, *, dim: int = -1) -> Any:
    """Products summed over one dimension."""
    return torch.matmul(x.movedim(dim, -1).unsqueeze(-2), y.movedim(dim, -1).unsqueeze(-1))[..., 0, 0]


@register_rule(torch.tensordot)
def tensordot(a: Any, b: Any, dims: Any = 2, out: None = None) -> Any:
    """Products summed over pairs of dimensions, as many last and first ones or those of two lists."""
    if isinstance(dims, int):
        dims = list(range(a.dim() - dims, a.dim())), list(range(dims))
    ours, theirs = ([dim % x.dim() for dim in own] for own, x in zip(dims, (a, b), strict=True))
    labels = [("a", dim) for dim in range(a.dim())], [("b", dim) for dim in range(b.dim())]
    for dim, other in zip(ours, theirs, strict=True):
        labels[1][other] = labels[0][dim]
    out_labels = [
        name
        for own, summed in ((labels[0], ours), (labels[1], theirs))
        for d, name in enumerate(own)
        if d not in summed
    ]
    return bilinear(
        lambda x, y: torch.tensordot(x, y, (ours, theirs)),  # type: ignore[arg-type]
        a,
        b,
        labels,
        out_labels,
    )


@register_rule(torch.linalg.cross, torch.cross, Tensor.cross)
@follows_directions
def cross(input: Any, other: Any, *, dim: int = -1) -> Any:
    """The vector product of vectors of three along a dimension."""
    return input.roll(-1, dim) * other.roll(1, dim) - input.roll(1, dim) * other.roll(-1, dim)


@register_rule(torch._grouped_mm)  # type: ignore[attr-defined]
@follows_directions
def grouped_mm(input: Any, mat2: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """The rows of each group (T, D), which end at these numbers, times a matrix of its own (G, D, Q).

    Experts run so: each its tokens.
    """
    if input.dim() != 2 or mat2.dim() != 3 or offs is None:
        raise NotImplementedError(
            "moments: _grouped_mm has a rule for groups of rows (T, D) and matrices (G, D, Q) only."
        )
    ends = plain(offs).tolist()
    starts = [0, *ends[:-1]]
    groups = [input[start:end] @ mat2[i] for i, (start, end) in enumerate(zip(starts, ends, strict=True))]
    groups = [group if bias is None else group + bias[i] for i, group in enumerate(groups)]
    left = input.shape[0] - ends[-1]
    found = torch.cat([*groups, torch.zeros_like(plain(groups[-1]))[:1].expand(left, -1)] if left else groups)
    return found if out_dtype is None else found.to(out_dtype)


def _add_product(first: str, second: str, *, sums: bool = False) -> None:
    """Registers beta input + alpha A B under all its names; `sums` adds up the batch."""

    @follows_directions
    def rule(input: Any, *matrices: Any, beta: Any = 1, alpha: Any = 1, **named: Any) -> Any:
        a, b = (*matrices, *(named[name] for name in (first, second)[len(matrices) :]))
        product = torch.matmul(a, b)
        product = product.sum(0) if sums else product
        product = product if alpha == 1 else product * alpha
        return product if beta == 0 else product + (input if beta == 1 else input * beta)

    name = {"mat1": "addmm", "batch1": "addbmm" if sums else "baddbmm", "mat": "addmv"}[first]
    register_rule(getattr(torch, name), getattr(Tensor, name))(rule)
    register_rule(getattr(Tensor, f"{name}_"))(in_place(rule, getattr(Tensor, name)))


_add_product("mat1", "mat2")
_add_product("batch1", "batch2")
_add_product("batch1", "batch2", sums=True)
_add_product("mat", "vec")


@register_rule(torch.einsum)
def einsum(equation: str, *operands: Any) -> Any:
    """Two operands by an equation; of one, sums and permutations.

    Raises:
        NotImplementedError: three operands or more, or a diagonal.
    """
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    names, out = _subscripts(equation, [x.dim() for x in operands])
    if len(operands) == 1 and len(set(names[0])) == len(names[0]):
        ((x,), (own,)) = operands, names
        dims = [dim for dim, name in enumerate(own) if name not in out]
        kept = [name for name in own if name in out]
        return (x.sum(dims) if dims else x).permute([kept.index(name) for name in out])
    if len(operands) != 2 or any(len(set(own)) < len(own) for own in names):
        raise NotImplementedError(
            f"moments: einsum({equation!r}) of {len(operands)} tensors has no rule; expected two operands without "
            "diagonals. Write it as products of two."
        )
    return bilinear(lambda a, b: torch.einsum(equation, a, b), *operands, (names[0], names[1]), out)


def _subscripts(equation: str, num_dims: list[int]) -> tuple[list[list[Any]], list[Any]]:
    """The names of the dimensions of each operand and of the result; an ellipsis is numbered from the right."""
    inputs, _, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if "->" not in equation:
        letters = inputs.replace(",", "").replace(".", "")
        out = ("..." if "..." in inputs else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    spans = [n - len(term.replace(".", "")) if "..." in term else 0 for term, n in zip(terms, num_dims, strict=True)]

    def named(term: str, span: int) -> list[Any]:
        before, dots, after = term.partition("...")
        return [*before, *(range(-span, 0) if dots else ()), *after]

    return [named(term, span) for term, span in zip(terms, spans, strict=True)], named(out, max(spans))


@register_rule(torch.linalg.solve_triangular)
def solve_triangular(A: Any, B: Any, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Any:
    """X of A X = B, or of X A = B, where one triangle of A counts, and its diagonal unless it is taken as ones."""
    if not left:
        return solve_triangular(A.mT, B.mT, upper=not upper, unitriangular=unitriangular).mT
    counts = torch.ones(A.shape[-2:], dtype=torch.bool, device=A.device)
    edge = int(unitriangular)
    counts = counts.triu(edge) if upper else counts.tril(-edge)

    def solve(b: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(parts(A).mean, b, upper=upper, unitriangular=unitriangular)

    return _solved(A, B, solve, counts)


@register_rule(torch.linalg.solve)
def solve(A: Any, B: Any, *, left: bool = True) -> Any:
    """X of A X = B, or of X A = B; a vector is one column."""
    if not left:
        return solve(A.mT, B.mT).mT
    if B.dim() == 1 or B.shape == A.shape[:-1]:
        return solve(A, B.unsqueeze(-1)).squeeze(-1)
    return _solved(A, B, lambda b: torch.linalg.solve(parts(A).mean, b), None)


@register_rule(torch.inverse, Tensor.inverse)
def inverse(input: Any) -> Any:
    """The inverse of a matrix."""
    return solve(input, torch.eye(input.shape[-1], dtype=input.dtype, device=input.device).expand(input.shape))


@register_rule(torch.linalg.inv)
def linalg_inverse(A: Any) -> Any:
    """The same."""
    return inverse(A)


def _solved(a: Any, b: Any, solve: Any, counts: Tensor | None) -> Moments:
    (before, noise, _), (right, own, _) = parts(a), parts(b)
    mean = solve(right)
    dtype = torch.promote_types(mean.dtype, torch.float32)
    spread = torch.zeros((), dtype=dtype, device=mean.device) if own is None else own
    if noise is not None:
        noise = noise if counts is None else noise * counts
        spread = spread + noise @ mean.to(dtype).square()
    inverse = solve(torch.eye(before.shape[-1], dtype=before.dtype, device=before.device).expand(before.shape))
    assert is_uncertain(a) or is_uncertain(b), "a rule is for uncertain tensors"
    return Moments(mean, inverse.to(dtype).square() @ spread.expand(mean.shape))
