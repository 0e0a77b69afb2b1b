"""The posteriors of a model, one by one."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from bayesprune.layers.base import VariationalLayer


@dataclass(frozen=True)
class Posterior:
    """The posterior of one parameter of a model.

    Attributes:
        name: The parameter's name in the model, as in its state dict.
        layer: The layer that holds it.
        parameter: Its name in the layer.
    """

    name: str
    layer: VariationalLayer
    parameter: str

    @property
    def mean(self) -> nn.Parameter:
        """The posterior means: the stock parameter itself."""
        return getattr(self.layer, self.parameter)

    @property
    def log_std(self) -> Tensor:
        """Log stds, broadcastable to the means."""
        return self.layer.log_std(self.parameter)

    @property
    def mask(self) -> Tensor | None:
        """True where the weight is kept; None while nothing was removed."""
        return self.layer.mask(self.parameter)

    @property
    def log_std_parts(self) -> list[nn.Parameter]:
        """The parameters whose broadcast sum is the log std."""
        return self.layer.log_std_parts(self.parameter)

    @property
    def is_frozen(self) -> bool:
        """Whether the mean is not to change, its `requires_grad` being off; nothing of it is removed then."""
        return not self.mean.requires_grad

    @property
    def is_weight(self) -> bool:
        """Whether it is a weight, not a bias."""
        return self.layer.is_weight(self.parameter)

    @property
    def unit_dims(self) -> tuple[int, ...]:
        """Dimensions that number output units; empty for what is no weight."""
        return self.layer.unit_dims if self.is_weight else ()


def variational_layers(model: nn.Module) -> Iterator[tuple[str, VariationalLayer]]:
    """Name and layer of every variational layer, shared ones once."""
    for name, module in model.named_modules():
        if isinstance(module, VariationalLayer):
            yield name, module


def named_posteriors(model: nn.Module) -> Iterator[Posterior]:
    """Every posterior of a model; a tied parameter once, under its first name."""
    seen: set[int] = set()
    for prefix, layer in variational_layers(model):
        for name in layer.active_names():
            mean = getattr(layer, name)
            if id(mean) not in seen:
                seen.add(id(mean))
                yield Posterior(f"{prefix}.{name}" if prefix else name, layer, name)
