"""Tiny models to save, as they come out of a compression, and the outputs they are compared by."""

import json
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
import transformers
from torch import nn

import bayesprune as bp
from tests.hosts.transformers.families import ENCODER, FAMILIES, build

TOKENS = torch.arange(3, 19).view(2, 8)


def bert(head: str = "BertForSequenceClassification", **config: Any) -> nn.Module:
    torch.manual_seed(0)
    return getattr(transformers, head)(transformers.BertConfig(**{**ENCODER, **config})).eval()


def cut(model: nn.Module, removed: int = 3, layer: int = 1) -> nn.Module:
    """Without the first neurons of one of BERT's layers."""
    block = getattr(model, "bert", model).encoder.layer[layer]
    cut_between(block.intermediate.dense, block.output.dense, removed)
    return model


def cut_between(first: nn.Linear, second: nn.Linear, removed: int = 3) -> None:
    """Without the first channels that one layer puts out and the other takes."""
    tp.prune_linear_out_channels(first, list(range(removed)))
    tp.prune_linear_in_channels(second, list(range(removed)))


def masked(model: nn.Module, std: str = "per_weight") -> nn.Module:
    bp.prune_weights(bp.to_variational(model, std=std), "weights=0.5")
    return model.eval()


def gpt2() -> nn.Module:
    return build(FAMILIES["GPT-2"])


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    output = model.eval()(TOKENS)
    return output.logits if "logits" in output else output.last_hidden_state


def same_state(model: nn.Module, other: nn.Module) -> bool:
    state, others = model.state_dict(), other.state_dict()
    return state.keys() == others.keys() and all(torch.equal(state[name], others[name]) for name in state)


def config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def rewrite(path: Path, change: Any) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
