"""Propagated mean and variance against weight samples, on small random networks and on two trained ones.

    python tests/benchmarks/moments_accuracy.py --data-dir DATA --out docs/benchmarks/moments_accuracy.json

A network a row; what is finished is kept, a second start goes on. Without --data-dir the trained ones are left out.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import timm
import torch
import transformers as hf
from torch import Tensor, nn

import bayesprune as bp
from bayesprune.moments import parts, settings

SETTINGS = {"num_samples": 1000, "relative_std": 0.05, "num_directions": 16}
COVARIANCES = ("diagonal", "shared", "low_rank")
TEXT = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
TEXT |= {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# At the stock initialisation (0.02, layer scale 1e-6) the blocks hardly matter beside the residual stream.
TEXT |= {"initializer_range": 0.1}
TOKENS = 24


def image_model(name: str, size: int, **options: Any) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A timm model at random weights, batch norm at the statistics of random images, and its forward on four others."""
    model = timm.create_model(name, pretrained=False, num_classes=10, **options).train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        for _ in range(8):
            model(torch.randn(16, 3, size, size))
    images = torch.randn(4, 3, size, size)
    return model.eval(), lambda network: network(images)


def text_model(config: Any, kind: Any, **inputs: Tensor) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A transformers model at random weights, and its logits on four random texts."""
    given = {"input_ids": torch.randint(3, 100, (4, TOKENS))} | inputs
    return kind.from_config(config).eval(), lambda network: network(**given).logits


def random_networks() -> dict[str, Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]]:
    """The architectures, small, by name."""
    vit = {"img_size": 64, "embed_dim": 96, "depth": 4, "num_heads": 3}
    swin = {"img_size": 64, "window_size": 4, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4)}
    gpt2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}
    gpt2 |= {"initializer_range": 0.1}
    t5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_heads": 4, "vocab_size": 100}
    classify, generate = hf.AutoModelForSequenceClassification, hf.AutoModelForCausalLM
    return {
        "resnet18": lambda: image_model("resnet18", 64, zero_init_last=False),
        "resnet26d": lambda: image_model("resnet26d", 64, zero_init_last=False),
        "mobilenetv3_small_100": lambda: image_model("mobilenetv3_small_100", 64),
        "efficientnet_b0": lambda: image_model("efficientnet_b0", 64),
        "convnext_atto": lambda: image_model("convnext_atto", 64, ls_init_value=0.5),
        "vit, class token": lambda: image_model("vit_tiny_patch16_224", 64, **vit),
        "vit, mean of tokens": lambda: image_model("vit_tiny_patch16_224", 64, global_pool="avg", **vit),
        "swin": lambda: image_model("swin_tiny_patch4_window7_224", 64, **swin),
        "BERT": lambda: text_model(hf.BertConfig(**TEXT), classify),
        "Llama": lambda: text_model(hf.LlamaConfig(num_key_value_heads=2, **TEXT), generate),
        "T5": lambda: text_model(
            hf.T5Config(decoder_start_token_id=0, **t5),
            hf.AutoModelForSeq2SeqLM,
            decoder_input_ids=torch.randint(3, 100, (4, 8)),
        ),
        "GPT-2": lambda: text_model(hf.GPT2Config(**gpt2), generate),
    }


def trained_networks(data_dir: Path) -> dict[str, Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]]:
    """A ResNet-20 for CIFAR-10 and a small Llama for stories, on their own data."""

    def resnet20() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        import cifar_resnet

        images, _ = next(cifar_resnet.Images(data_dir / "cifar10", "test", slice(1)).batches())
        return cifar_resnet.trained_resnet20(data_dir).eval(), lambda network: network(images)

    def stories() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        path = data_dir / "weights" / "tinystories656k"
        text = (data_dir / "text" / "tinystories_val.txt").read_text(encoding="utf-8")[:2000]
        tokens = hf.AutoTokenizer.from_pretrained(path)(text, return_tensors="pt").input_ids[:, : 4 * TOKENS]
        tokens = tokens.reshape(4, TOKENS)
        return hf.AutoModelForCausalLM.from_pretrained(path).eval(), lambda network: network(tokens).logits

    return {"ResNet-20, trained": resnet20, "TinyStories Llama, trained": stories}


@torch.no_grad()
def measure(make: Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]) -> dict[str, Any]:
    """Ratios of propagated to sampled variance, and the error of the shift of the mean over its size."""
    torch.manual_seed(0)
    model, run = make()
    bp.to_variational(model, relative_std=SETTINGS["relative_std"])
    plain, mean, squares, start = run(model).double(), 0.0, 0.0, time.process_time()
    with bp.sampling(model):
        for count in range(1, SETTINGS["num_samples"] + 1):
            sample = run(model).double()
            step = sample - mean
            mean, squares = mean + step / count, squares + step * (sample - mean - step / count)
    sampled, shift = squares / (count - 1), mean - plain
    found: dict[str, Any] = {
        "seconds_a_sample": (time.process_time() - start) / count,
        "error_of_sampled_shift": ((sampled / count).sum().sqrt() / shift.norm()).item(),
    }
    for covariance in COVARIANCES:
        start = time.process_time()
        with bp.sampling(model, "moments"), settings(covariance=covariance, num_directions=SETTINGS["num_directions"]):
            got, variance, _ = parts(run(model))
        ratio = (variance / sampled)[sampled > 0]
        low, median, high = ratio.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=ratio.dtype)).tolist()
        error = (got.double() - mean).norm() / shift.norm()
        seconds = time.process_time() - start
        found[covariance] = {"median": median, "low": low, "high": high, "shift": error.item(), "seconds": seconds}
    return found


def table(runs: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    head = f"""# Moments against weight samples

Written by `python tests/benchmarks/moments_accuracy.py --table` from moments_accuracy.json, the results of the same
program.

Small configurations, stds at {100 * SETTINGS["relative_std"]:.0f} % of each layer's RMS, four inputs, {SETTINGS["num_samples"]:,} weight samples as the
truth; low rank has {SETTINGS["num_directions"]} directions. **Variance**: median over outputs of propagated over sampled, first and last
decile in brackets. **Shift**: error of the mean's shift (from the output at the posterior means), over its size; the
last column is the standard error of the sampled shift itself on that scale: near 1, nothing can be told.

| network | variance, diagonal | variance, shared | variance, low rank | shift, diagonal | shift, shared | shift, low rank | error of samples |
|---|---|---|---|---|---|---|---|"""  # noqa: E501
    lines = [head]
    for run in runs:
        ratios = [f"{run[c]['median']:.2f} ({run[c]['low']:.2f}-{run[c]['high']:.2f})" for c in COVARIANCES]
        shifts = [f"{run[c]['shift']:.2f}" for c in COVARIANCES]
        lines.append(f"| {run['network']} | {' | '.join(ratios + shifts)} | {run['error_of_sampled_shift']:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs what is missing, and writes results and table."""
    options = common.parser(__doc__ or "", "docs/benchmarks/moments_accuracy.json").parse_args()
    torch.set_num_threads(1)
    runs = common.read(options.out, SETTINGS)
    if not options.table:
        networks = random_networks()
        if options.data_dir is not None:
            networks |= trained_networks(Path(options.data_dir))
        for name in [name for name in networks if name not in {run["network"] for run in runs}]:
            runs.append({"network": name, **measure(networks[name])})
            print(runs[-1], flush=True)
            common.write(options.out, SETTINGS, runs)
    options.out.with_suffix(".md").write_text(table(runs), encoding="utf-8")


if __name__ == "__main__":
    main()
