"""A gate for every single weight (as in Zhang et al., 2023, arXiv 2311.12526), and what gates say.

What differs: the gates here have a prior, and the weights behind them a slab, so that the density follows from the ELBO
and is not a target of its own.
"""

from torch import Tensor, nn

from bayesprune.gates.gate import GateOptions, WeightGate, gated, keep_slow_path, named_gates
from bayesprune.layers import named_posteriors, variational_layers


def add_weight_gates(
    model: nn.Module,
    *,
    prior_inclusion: float = 1e-2,
    initial_inclusion: float = 0.99,
    temperature: float = 0.5,
    lr: float = 1e-2,
) -> nn.Module:
    """Gives every weight of the variational layers, biases apart, a gate; in place.

    Until training the output in evaluation mode is what it was. `attach` finds the gates, adds their KL and moves them;
    `close` turns those with an inclusion probability up to 1/2 into removed weights.

    Args:
        model: A variational model; one with gates of channels is fine.
        prior_inclusion: Prior probability that a weight is there. Every open gate costs -ln of it in nats, beside the
            KL of the weight itself.
        initial_inclusion: Posterior probability at the start.
        temperature: Of the binary concrete relaxation.
        lr: Learning rate of the gates' logits.

    Raises:
        ValueError: the model has no variational layer, has gates on weights, or a number is out of range.
    """
    options = GateOptions(prior_inclusion, initial_inclusion, temperature, lr)
    posteriors = [posterior for posterior in named_posteriors(model) if posterior.is_weight]
    if not posteriors:
        raise ValueError("add_weight_gates got a model without variational layers; call to_variational first.")
    if any(isinstance(gate, WeightGate) for _, gate in named_gates(model)):
        raise ValueError("the model has gates on its weights already; call gates.close first.")
    gates = {id(p.mean): WeightGate(tuple(p.mean.shape), options, p.mean.device) for p in posteriors}
    for _, layer in variational_layers(model):
        for name in layer.active_names():
            if (gate := gates.get(id(getattr(layer, name)))) is not None:  # tied weights have one gate
                layer.add_module(f"{name}_gate", gate.train(layer.training))
                layer.posterior_hook = gated
        layer.register_forward_pre_hook(keep_slow_path)
    return model


def inclusion_probabilities(model: nn.Module) -> dict[str, Tensor]:
    """Posterior probabilities that gates are open, by name.

    Those of channels are (U,), for U units, by the name of the group's first layer; those of weights have the weight's
    shape, by the name of the parameter.

    Raises:
        ValueError: the model has no gates.
    """
    found = {name: gate.probabilities.detach() for name, gate in named_gates(model)}
    if not found:
        raise ValueError("the model has no gates; call gates.add_channel_gates or gates.add_weight_gates first.")
    return found
