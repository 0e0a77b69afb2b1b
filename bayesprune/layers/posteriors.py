"""The posteriors of a model, one by one."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from bayesprune.foundation.kinds import kind_of
from bayesprune.foundation.sharding import whole_mask
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
        return kind_of(self.layer).unit_dims if self.is_weight else ()


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


def removable_weights(model: nn.Module) -> list[Posterior]:
    """The posteriors whose single weights may go: no biases, and nothing that is frozen.

    Raises:
        ValueError: the model has no variational layer, or none that trains.
    """
    weights = [posterior for posterior in named_posteriors(model) if posterior.is_weight]
    if not weights:
        raise ValueError("no weights to remove in a model without variational layers; call to_variational first.")
    found = [posterior for posterior in weights if not posterior.is_frozen]
    if not found:
        raise ValueError(
            f"frozen weights are not removed, and all {len(weights)} weight tensors with a posterior are frozen "
            "(requires_grad=False). Call model.requires_grad_(True) first if the model was frozen for evaluation alone."
        )
    return found


def holders_of(model: nn.Module) -> dict[int, list[tuple[VariationalLayer, str]]]:
    """The layers that hold each posterior mean, several where it is tied, by the mean's id."""
    holders: dict[int, list[tuple[VariationalLayer, str]]] = defaultdict(list)
    for _, layer in variational_layers(model):
        for name in layer.active_names():
            holders[id(getattr(layer, name))].append((layer, name))
    return holders


def make_masks(model: nn.Module) -> nn.Module:
    """Gives all weights that may be removed a mask which keeps all of them; in place.

    A weight gets its mask at its first removal otherwise. What copies a model's tensors by position, or loads into
    those that are there (averages of weights, FSDP, the best checkpoint at the end of a training), has to find the
    masks, so it comes after this. `attach(..., prune=...)` does it by itself.

    Args:
        model: A variational model.

    Raises:
        ValueError: the model has no variational layer, or none that trains.
    """
    holders = holders_of(model)
    for posterior in removable_weights(model):
        if posterior.layer.mask(posterior.parameter, whole=True) is None:
            mean = posterior.mean
            mask = whole_mask(mean, True)
            for layer, name in holders[id(mean)]:
                layer.set_mask(name, mask)
    return model
