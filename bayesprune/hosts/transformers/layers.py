"""The layers of transformers that are none of torch's: GPT-2's `Conv1D`, a linear layer with a transposed weight.

Experts that hold their matrices in stacked parameters are those of `bayesprune.layers.experts`. Embeddings, and what
is tied to them, stay deterministic.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesprune.estimators import Gradients
from bayesprune.foundation.kinds import TRANSPOSED_LINEAR
from bayesprune.layers import VariationalLayer, register_layer

try:
    from transformers.pytorch_utils import Conv1D
except ImportError as error:
    raise ImportError(
        f"bayesprune.hosts.transformers needs transformers >= 5 ({error}): pip install 'bayesprune[transformers]'"
    ) from error

_PLAIN = (Tensor, nn.Parameter)


@register_layer(Conv1D)
class VariationalHFConv1D(VariationalLayer, Conv1D):
    """Linear layer with a posterior over weight (I, O) and bias (O)."""

    layer_kind = TRANSPOSED_LINEAR

    def operation(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x weight + bias."""
        if bias is None or type(x) not in _PLAIN or type(weight) not in _PLAIN:
            return F.linear(x, weight.t(), bias)  # moments follow the positions of (N, T, I)
        output = torch.addmm(bias, x.reshape(-1, x.size(-1)), weight)  # as the stock forward, to the last bit
        return output.view(*x.shape[:-1], weight.shape[1])

    def pullback(self, gradient: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, bool]) -> Gradients:
        """Two products."""
        rows = x.reshape(-1, x.shape[-1])
        of_x = gradient @ weight.t() if needed[0] else None
        return of_x, rows.t() @ gradient.reshape(-1, gradient.shape[-1]) if needed[1] else None

    def meets_one_position(self, x: Tensor) -> bool:
        """An input of (N, I), not of tokens (N, T, I)."""
        return x.dim() <= 2
