"""A gate for every single weight (as in Zhang et al., 2023, arXiv 2311.12526), and what gates say.

What differs: without a target the gates here have a prior, and the weights behind them a slab, so that the density
follows from the ELBO. With one, their loss has a penalty on the mean gate's distance from it; here it holds exactly.
"""

from torch import Tensor, nn

from bayesprune.foundation.kinds import kind_of
from bayesprune.foundation.target import PATTERN, Target
from bayesprune.gates.gate import GateOptions, WeightGate, gated, keep_slow_path, named_gates
from bayesprune.layers import removable_weights, variational_layers
from bayesprune.prune.weights.prune import whole_note

_NO_BLOCKS = "its inputs come in no such blocks."


def add_weight_gates(
    model: nn.Module,
    target: str | Target | None = None,
    *,
    prior_inclusion: float = 1e-2,
    initial_inclusion: float = 0.99,
    temperature: float = 0.5,
    lr: float = 1e-2,
) -> nn.Module:
    """Gives every weight of the variational layers, biases and what is frozen apart, a gate; in place.

    Until training the output in evaluation mode is what it was. `attach` finds the gates, adds their KL and moves them;
    `close` turns those with an inclusion probability up to 1/2, or outside the likeliest pattern, into removed weights.

    Args:
        model: A variational model; one with gates of channels is fine.
        target: What the gates are held to while they learn: "weights=0.0015", that share of the gated weights is open,
            which is reached after three fifths of the training; or "2:4", the best two of every four consecutive
            inputs, from a tenth of the training on. The gates of a block are then one choice among its six patterns,
            more generally among all N of M where those are at most 100 (4:8 has 70); with more each gate learns by
            itself, and the best N of a block are open all the same. `attach` then needs `num_steps`. The gates have no
            prior then and are not drawn: which of them are open is decided by their logits in training, too. None
            leaves the density to the prior and the data.
        prior_inclusion: Prior probability that a weight is there. Every open gate costs -ln of it in nats, beside the
            KL of the weight itself.
        initial_inclusion: Posterior probability at the start.
        temperature: Of the binary concrete relaxation.
        lr: Learning rate of the gates' logits: about what one step moves each by; with a target it is what a gradient
            of ordinary size moves its logit by, the root mean square of those of all gates, and other logits move by as
            much more or less as theirs is.

    Raises:
        ValueError: the model has no variational layer, or none that trains, has gates on weights, a number is out of
            range, or no tensor has a multiple of the M of a pattern as inputs.
    """
    goal = None
    if target is not None:
        goal = Target.parse(target, ("weights", PATTERN), "add_weight_gates", is_partial=True)
    options = GateOptions(prior_inclusion, initial_inclusion, temperature, lr)
    posteriors = removable_weights(model)
    if any(isinstance(gate, WeightGate) for _, gate in named_gates(model)):
        raise ValueError("the model has gates on its weights already; call gates.close first.")
    if goal is not None and goal.pattern is not None:
        posteriors = [posterior for posterior in posteriors if not whole_note(posterior, goal.pattern)]
        if not posteriors:
            raise ValueError(f'no tensor of the model can have the pattern "{goal}": {_NO_BLOCKS}')
    gates = {id(p.mean): WeightGate(p.mean, options, goal, kind_of(p.layer).input_dim) for p in posteriors}
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
    shape, by the name of the parameter. Under a pattern they are sums over the patterns of the block, N for each.

    Raises:
        ValueError: the model has no gates.
    """
    found = {name: gate.probabilities.detach() for name, gate in named_gates(model)}
    if not found:
        raise ValueError("the model has no gates; call gates.add_channel_gates or gates.add_weight_gates first.")
    return found
