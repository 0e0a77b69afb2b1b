"""The default temperature of the KL."""

from torch import nn

from bayesprune.foundation import defaults
from bayesprune.layers import named_posteriors

_FACTOR = 0.4


def default_temperature(model: nn.Module, num_data: int) -> float:
    """min(0.1, 0.4 sqrt(num_data / number of weights)): colder where there are many weights for each example.

    The KL is a sum over weights and the loss a mean over examples, so that at a fixed temperature the prior outweighs
    the data of a large model that is fine-tuned on few examples. The rule is one of thumb: MiniLM on SST-2 (10.6
    million weights, 6,228 sentences) wants 0.01 and is no better than magnitude at 0.1; up to 16
    weights for an example it is 0.1.

    Args:
        model: A variational model.
        num_data: Terms that the training loss is a mean over.
    """
    num_weights = sum(posterior.mean.numel() for posterior in named_posteriors(model) if posterior.is_weight)
    return min(defaults.LARGEST_TEMPERATURE, _FACTOR * (num_data / max(num_weights, 1)) ** 0.5)
