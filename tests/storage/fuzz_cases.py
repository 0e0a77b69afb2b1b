"""Small saved directories of every kind, for mutations: plain, variational, sharded, timm's, Hugging Face's."""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

import bayesprune as bp
from bayesprune.storage.levels import Level
from tests.storage.judging import Case

IMAGES = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TOKENS = torch.arange(3, 19).view(2, 8)


def net() -> nn.Module:
    layers = (nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.LeakyReLU(), nn.Flatten(), nn.Linear(8 * 225, 4))
    return nn.Sequential(*layers)


def cut_net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = net()
    tp.prune_conv_out_channels(model[0], [0, 3])
    tp.prune_batchnorm_out_channels(model[1], [0, 3])
    tp.prune_linear_in_channels(model[4], [*range(225), *range(3 * 225, 4 * 225)])
    return model


def save_plain(**options: Any) -> Callable[[Path, int], None]:
    return lambda directory, seed: bp.save(cut_net(seed), directory, history=[{"note": "first"}], **options)


def save_variational(directory: Path, seed: int) -> None:
    model = bp.to_variational(cut_net(seed), std="rank_one")
    bp.prune_weights(model, "weights=0.5")
    bp.save(model, directory)


def save_levels(**options: Any) -> Callable[[Path, int], None]:
    """A level that lost channels, with a bias of its own, and two that have zeros."""

    def save(directory: Path, seed: int) -> None:
        model = cut_net(seed)
        kept = torch.tensor([0, 2, 3, 5])
        columns = (kept[:, None] * 225 + torch.arange(225)).flatten()
        small = copy.deepcopy(model)
        tp.prune_conv_out_channels(small[0], [1, 4])
        tp.prune_batchnorm_out_channels(small[1], [1, 4])
        tp.prune_linear_in_channels(small[4], sorted(set(range(6 * 225)) - set(columns.tolist())))
        small[4].bias.data.add_(1)
        found = {"0.weight": (kept,), "0.bias": (kept,), "4.weight": (None, columns)}
        found |= {f"1.{name}": (kept,) for name in ("weight", "bias", "running_mean", "running_var")}
        sparse = copy.deepcopy(model)
        sparse[4].weight.data[:, ::2] = 0
        sparser = copy.deepcopy(sparse)
        sparser[4].weight.data[:, ::3] = 0
        levels = [Level("macs=0.5", small, found), Level("weights=0.5", sparse), Level("weights=0.3", sparser)]
        bp.save(model, directory, levels=levels, **options)

    return save


def load_level(target: str) -> Callable[[Path], nn.Module]:
    return lambda directory: bp.load(directory, target, model=net())


def load_plain(directory: Path) -> nn.Module:
    return bp.load(directory, model=net())


def plain_cases() -> dict[str, Case]:
    routes = {"bp.load": load_plain}
    return {
        "plain module": Case(save_plain(), routes, IMAGES),
        "plain module in shards": Case(save_plain(max_shard_size="12KB"), routes, IMAGES),
        "coded plain module": Case(save_plain(coding="entropy"), routes, IMAGES),
        "variational module with masks": Case(save_variational, routes, IMAGES),
        "level of channels": Case(save_levels(), {"bp.load": load_level("macs=0.5")}, IMAGES),
        "coded level of weights": Case(save_levels(coding="entropy"), {"bp.load": load_level("weights=0.3")}, IMAGES),
    }


def timm_cases() -> dict[str, Case]:
    import timm

    def save(directory: Path, seed: int, **options: Any) -> None:
        torch.manual_seed(seed)
        model = timm.create_model("test_resnet", num_classes=5)
        block = model.layer1[0]
        tp.prune_conv_out_channels(block.conv1, [0, 1, 2])
        tp.prune_batchnorm_out_channels(block.bn1, [0, 1, 2])
        tp.prune_conv_in_channels(block.conv2, [0, 1, 2])
        bp.save(model, directory, **options)

    def create(directory: Path) -> nn.Module:
        return timm.create_model(f"local-dir:{directory}", pretrained=True)

    routes = {"bp.load": bp.load, "timm.create_model": create}
    coded = functools.partial(save, coding="entropy")
    return {"timm test_resnet": Case(save, routes, IMAGES), "coded timm test_resnet": Case(coded, routes, IMAGES)}


def transformers_cases() -> dict[str, Case]:
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)

    def save(**options: Any) -> Callable[[Path, int], None]:
        def write(directory: Path, seed: int) -> None:
            torch.manual_seed(seed)
            model = transformers.LlamaForCausalLM(config)
            for layer, removed in zip(model.model.layers, (4, 9), strict=True):
                for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                    tp.prune_linear_out_channels(linear, list(range(removed)))
                tp.prune_linear_in_channels(layer.mlp.down_proj, list(range(removed)))
            bp.save(model, directory, **options)

        return write

    def save_two_towers(directory: Path, seed: int) -> None:
        """Its towers are built by an Auto class, from configs of their own."""
        torch.manual_seed(seed)
        vision = transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
        both = transformers.LlavaConfig(vision_config=vision, text_config=config, image_token_index=31)
        model = transformers.LlavaForConditionalGeneration(both)
        mlp = model.model.language_model.layers[0].mlp
        for linear in (mlp.gate_proj, mlp.up_proj):
            tp.prune_linear_out_channels(linear, [0, 1])
        tp.prune_linear_in_channels(mlp.down_proj, [0, 1])
        bp.save(model, directory)

    def save_wrapped(directory: Path, seed: int) -> None:
        """timm builds it, from a name and arguments in the config."""
        torch.manual_seed(seed)
        options = transformers.TimmWrapperConfig(architecture="test_resnet", num_labels=5)
        bp.save(transformers.TimmWrapperForImageClassification(options), directory)

    auto = transformers.AutoModelForCausalLM
    routes = {"bp.load": bp.load, "from_pretrained": auto.from_pretrained}
    return {
        "Llama": Case(save(), routes, TOKENS),
        "coded Llama": Case(save(coding="entropy"), routes, TOKENS),
        "Llama in shards": Case(save(max_shard_size="10KB"), routes, TOKENS),
        "LLaVA": Case(
            save_two_towers,
            {"bp.load": bp.load, "from_pretrained": transformers.AutoModelForImageTextToText.from_pretrained},
            TOKENS,
        ),
        "timm wrapped by transformers": Case(save_wrapped, {"bp.load": bp.load}, IMAGES),
    }
