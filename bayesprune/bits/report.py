"""What `quantize` says it did: bits by tensor, three lengths, and the loss."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.table import Table

from bayesprune.bits.steps import Grid
from bayesprune.foundation.text import as_text


@dataclass(frozen=True)
class QuantizedTensor:
    """One tensor.

    Attributes:
        name: As in the state dict.
        numel: How many weights it has.
        num_zeros: How many of them are zero now.
        step: Mean step size.
        width: Bits that an integer of fixed width needs for all the places that are taken.
        entropy_bits: Zero-order entropy of the integers, of all weights together.
        predicted_cost: What rounding each weight to q by itself costs by the posterior, 1/2 sum (w - q)^2 / sigma^2,
            over all examples: nats under the model's own; half the squared change of the logits under the one that
            `quantize` gave it.
    """

    name: str
    numel: int
    num_zeros: int
    step: float
    width: int
    entropy_bits: float
    predicted_cost: float


@dataclass(frozen=True)
class Quantization:
    """What became of a model; prints as a table.

    Attributes:
        tensors: Those with a posterior and, where there are data, embeddings.
        kappa: The constant that set all steps; None where the widths were given.
        loss_before, loss_after: Mean loss in nats on the data; None without data.
        coded_bytes: Of all tensors of the model, entropy-coded, without the file's header; None without `constriction`.
        float_bytes: Of all tensors of the model as they lie in memory.
        kl_nats: KL divergence of the posterior from the prior before rounding; None for a model without posterior.
        grids: Where the weights of each rounded tensor stand, by name, for `bits.StraightThrough`.
    """

    tensors: tuple[QuantizedTensor, ...]
    kappa: float | None
    loss_before: float | None
    loss_after: float | None
    coded_bytes: int | None
    float_bytes: int
    kl_nats: float | None
    grids: Mapping[str, Grid] = field(default_factory=dict, repr=False, compare=False)

    @property
    def entropy_bytes(self) -> float:
        """Entropy of the integers of all rounded tensors, in bytes."""
        return sum(tensor.entropy_bits for tensor in self.tensors) / 8

    @property
    def kl_bytes(self) -> float | None:
        """KL / ln 2 in bytes: what the posterior says that the weights are worth."""
        return None if self.kl_nats is None else self.kl_nats / (8 * 0.6931471805599453)

    def to_dict(self) -> dict[str, Any]:
        """All of it but the grids as JSON values, for `save(report=...)`."""
        found = asdict(replace(self, grids={}))
        del found["grids"]
        return found | {"entropy_bytes": self.entropy_bytes, "kl_bytes": self.kl_bytes}

    def __str__(self) -> str:
        """The table as plain text, and the lengths and losses below it."""
        table = Table("tensor", "weights", "zeros", "step", "width", "bits a weight", "predicted cost")
        for row in self.tensors:
            share = row.num_zeros / max(1, row.numel)
            bits = row.entropy_bits / max(1, row.numel)
            table.add_row(
                row.name,
                f"{row.numel:,}",
                f"{share:.1%}",
                f"{row.step:.2g}",
                str(row.width),
                f"{bits:.3f}",
                f"{row.predicted_cost:.3g}",
            )
        said = [f"entropy of the integers: {self.entropy_bytes:,.0f} bytes"]
        if self.coded_bytes is not None:
            times = self.float_bytes / max(1, self.coded_bytes)
            said.append(f"all tensors, coded: {self.coded_bytes:,} bytes ({times:.1f} times smaller)")
        if self.kl_bytes is not None:
            said.append(f"KL / ln 2: {self.kl_bytes:,.0f} bytes")
        if self.loss_before is not None and self.loss_after is not None:
            said.append(f"loss on the data: {self.loss_before:.4f} -> {self.loss_after:.4f} nats")
        return as_text(table, *said)
