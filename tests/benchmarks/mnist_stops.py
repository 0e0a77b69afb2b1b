"""Where criteria with no number to choose stop by themselves: evidence above 0, inclusion below 1/2."""

import torch
from mnist_methods import Data, Network, Phase, mlp, network, train
from torch import Tensor

import bayesprune as bp
from bayesprune import gates
from bayesprune.layers import variational_layers
from bayesprune.prune import EvidenceImportance, evidence

RULES = ("evidence, weights", "evidence, units", "inclusion, weights", "inclusion, units")
EXAMPLE = torch.zeros(2, 784)


def stop(rule: str, start: dict[str, Tensor], data: Data, phase: Phase) -> Network:
    """The MLP after variational training from `start`, without what the rule removes.

    Evidence: ARD per output unit. Inclusion: a Gaussian slab of each layer's size, with a gate for every weight (prior
    probability 1 %) or for every hidden unit (0.01 %).
    """
    prior = bp.priors.ARD("channel") if rule.startswith("evidence") else bp.priors.Gaussian("layer_rms")
    net = network(mlp(), prior=prior)
    net.model.load_state_dict({k: v for k, v in start.items() if "log_std" not in k}, strict=False)
    if rule == "inclusion, weights":
        gates.add_weight_gates(net.model)
    elif rule == "inclusion, units":
        gates.add_channel_gates(net.model, EXAMPLE)
    train(net, data, phase)
    net.model.eval()
    if rule == "evidence, weights":
        found = evidence(net.model, prior)
        for name, layer in variational_layers(net.model):
            layer.set_mask("weight", found[f"{name}.weight"] <= 0)
    elif rule == "evidence, units":
        bp.prune_channels(net.model, EXAMPLE, target="evidence=0", importance=EvidenceImportance(prior))
    elif rule == "inclusion, weights":
        gates.close(net.model)
    else:
        bp.prune_channels(net.model, EXAMPLE, target="inclusion=0.5")
    return net
