"""The table of model families in docs/benchmarks/families.md: what works for each family of transformers.

    python tests/benchmarks/families.py

Every family is a tiny model with random weights, made from its config; no network is needed. Each has a process of its
own, so that a crash costs one row, and a fresh process that loads what was saved. Rows that
docs/benchmarks/families.json holds already are kept; delete the file, or name families with `--only`, to run them
again.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).absolute().parents[2]
DOCS = ROOT / "docs" / "benchmarks"
TIMEOUT = 600
OK = "yes"
CHECKS = {
    "exact": "eval output unchanged by conversion",
    "step": "one training step with `attach`",
    "masked": "half of the weights removed, saved and loaded",
    "back": "back to stock classes",
    "cut": "`prune_channels`",
    "cut_loaded": "cut, saved and loaded",
}


@dataclass(frozen=True)
class Family:
    """A tiny model: its class, the values of its config that are not the default, and its inputs."""

    model: str
    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    auto: str
    kwargs: dict[str, Any] = field(default_factory=dict)


def randint(high: int, *shape: int) -> Any:
    import torch

    return torch.randint(3, high, shape, generator=torch.Generator().manual_seed(1))


def randn(*shape: int) -> Any:
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def classified_text() -> dict[str, Any]:
    return {"input_ids": randint(60, 2, 8), "labels": randint(5, 2) - 3}


def generated_text() -> dict[str, Any]:
    tokens = randint(60, 2, 8)
    return {"input_ids": tokens, "labels": tokens}


def translated_text() -> dict[str, Any]:
    return {"input_ids": randint(60, 2, 8), "labels": randint(60, 2, 6)}


def classified_images() -> dict[str, Any]:
    return {"pixel_values": randn(2, 3, 32, 32), "labels": randint(5, 2) - 3}


def images_and_texts() -> dict[str, Any]:
    return {"input_ids": randint(60, 2, 8), "pixel_values": randn(2, 3, 32, 32), "return_loss": True}


def transcribed_audio() -> dict[str, Any]:
    return {"input_features": randn(2, 8, 40), "labels": randint(60, 2, 6)}


def classified_audio() -> dict[str, Any]:
    return {"input_values": randn(2, 800), "labels": randint(5, 2) - 3}


SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER = {**SIZES, "intermediate_size": 64, "max_position_embeddings": 32, "pad_token_id": 0}
DECODER = {**SIZES, "intermediate_size": 64, "max_position_embeddings": 32}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**DECODER, **TOKENS, "num_key_value_heads": 2}
VIT = {key: value for key, value in SIZES.items() if key != "vocab_size"}
VIT |= {"intermediate_size": 64, "image_size": 32, "patch_size": 8}
CLASSIFIER, CAUSAL, SEQ2SEQ = "AutoModelForSequenceClassification", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"
IMAGE = "AutoModelForImageClassification"


def text(model: str, config: dict[str, Any]) -> Family:
    return Family(model, config, classified_text, CLASSIFIER)


def causal(model: str, config: dict[str, Any]) -> Family:
    return Family(model, config, generated_text, CAUSAL)


FAMILIES = {
    "BERT": text("BertForSequenceClassification", ENCODER),
    "RoBERTa": text("RobertaForSequenceClassification", ENCODER),
    "DistilBERT": text(
        "DistilBertForSequenceClassification",
        {"vocab_size": 64, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 32},
    ),
    "ModernBERT": text("ModernBertForSequenceClassification", {**ENCODER, **TOKENS, "cls_token_id": 1}),
    "DeBERTa-v2": text(
        "DebertaV2ForSequenceClassification",
        {**ENCODER, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
    ),
    "ELECTRA": text("ElectraForSequenceClassification", {**ENCODER, "embedding_size": 8}),
    "ALBERT": text("AlbertForSequenceClassification", {**ENCODER, "embedding_size": 8}),
    "MPNet": text("MPNetForSequenceClassification", ENCODER),
    "T5": Family(
        "T5ForConditionalGeneration",
        {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 64, "num_layers": 2, "num_heads": 4, **TOKENS}
        | {"decoder_start_token_id": 0},
        translated_text,
        SEQ2SEQ,
    ),
    "BART": Family(
        "BartForConditionalGeneration",
        {"vocab_size": 64, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64}
        | {"decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4, **TOKENS}
        | {"max_position_embeddings": 32, "decoder_start_token_id": 2, "forced_eos_token_id": 2},
        translated_text,
        SEQ2SEQ,
    ),
    "GPT-2": causal(
        "GPT2LMHeadModel", {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, **TOKENS}
    ),
    "GPT-NeoX": causal("GPTNeoXForCausalLM", {**DECODER, **TOKENS}),
    "OPT": causal(
        "OPTForCausalLM",
        {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 16, "max_position_embeddings": 32, **TOKENS},
    ),
    "Llama": causal("LlamaForCausalLM", GROUPED),
    "Mistral": causal("MistralForCausalLM", GROUPED),
    "Qwen2": causal("Qwen2ForCausalLM", GROUPED),
    "Qwen3": causal("Qwen3ForCausalLM", {**GROUPED, "head_dim": 4}),
    "Gemma": causal("GemmaForCausalLM", {**GROUPED, "head_dim": 4}),
    "Phi": causal("PhiForCausalLM", {**DECODER, **TOKENS}),
    "BLOOM": causal("BloomForCausalLM", {"vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 4, **TOKENS}),
    "Falcon": causal("FalconForCausalLM", {**SIZES, **TOKENS, "ffn_hidden_size": 64}),
    "Mixtral": causal("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}),
    "Qwen2-MoE": causal(
        "Qwen2MoeForCausalLM",
        {**GROUPED, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    "ViT": Family("ViTForImageClassification", VIT, classified_images, IMAGE),
    "DeiT": Family("DeiTForImageClassification", VIT, classified_images, IMAGE),
    "Swin": Family(
        "SwinForImageClassification",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
        classified_images,
        IMAGE,
    ),
    "ConvNeXt": Family(
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32},
        classified_images,
        IMAGE,
    ),
    "CLIP": Family(
        "CLIPModel",
        {"text_config": {**ENCODER, **TOKENS}, "vision_config": VIT, "projection_dim": 16},
        images_and_texts,
        "AutoModel",
    ),
    "Whisper": Family(
        "WhisperForConditionalGeneration",
        {"vocab_size": 64, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64}
        | {"decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 8}
        | {"max_source_positions": 20, "max_target_positions": 16, **TOKENS, "decoder_start_token_id": 1}
        | {"suppress_tokens": None, "begin_suppress_tokens": None},
        transcribed_audio,
        "AutoModelForSpeechSeq2Seq",
    ),
    "Wav2Vec2": Family(
        "Wav2Vec2ForSequenceClassification",
        {**SIZES, "intermediate_size": 64, "conv_dim": [16, 16], "conv_kernel": [10, 4], "conv_stride": [5, 4]}
        | {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16}
        | {"mask_time_prob": 0.0, "apply_spec_augment": False},
        classified_audio,
        "AutoModelForAudioClassification",
    ),
}


def build(family: Family) -> Any:
    import torch
    import transformers

    model_class = getattr(transformers, family.model)
    torch.manual_seed(0)
    return model_class(model_class.config_class(**family.config)).eval()


def outputs(model: Any, inputs: dict[str, Any]) -> list[Any]:
    """Every tensor that the model gives for these inputs."""
    import torch

    from bayesprune.prune.trace import tensors_in

    with torch.no_grad():
        return [tensor.clone() for tensor in tensors_in(model.eval()(**inputs))]


def is_equal(found: list[Any], expected: list[Any]) -> bool:
    import torch

    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def said(error: BaseException) -> str:
    """The error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400]


def attempt(row: dict[str, Any], name: str, check: Callable[[], str]) -> bool:
    """Runs one check; the row then holds "yes", or why not."""
    try:
        row[name] = check()
    except Exception as error:  # noqa: BLE001 (whatever goes wrong is the row's content)
        row[name] = said(error)
    return row[name].startswith(OK)


def run_family(name: str) -> dict[str, Any]:
    """The row of one family, all checks but those of the fresh process run in this one."""
    import torch
    from safetensors.torch import save_file

    import bayesprune as bp

    torch.set_num_threads(1)
    family = FAMILIES[name]
    inputs = family.inputs()
    row: dict[str, Any] = {"family": name, "model": family.model}
    model = build(family)
    stock = [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    before = outputs(model, inputs)
    bp.to_variational(model)
    table = bp.conversion_table(model)
    row["layers"] = {status: sum(r.status == status for r in table) for status in ("converted", "fallback", "left")}
    row["left"] = sorted({f"{r.type}: {r.reason}" for r in table if r.status == "left"})
    attempt(row, "exact", lambda: OK if is_equal(outputs(model, inputs), before) else "the output changed")
    attempt(row, "step", lambda: train_one_step(model, inputs))
    with tempfile.TemporaryDirectory() as folder:
        directories: dict[str, Path] = {}

        def masked() -> str:
            bp.prune_weights(model, sparsity=0.5)
            directories["masked"] = save(model, Path(folder) / "masked", inputs)
            return OK

        def cut() -> str:
            fresh = bp.to_variational(build(family), std="per_channel")
            example = {key: value for key, value in inputs.items() if key not in ("labels", "return_loss")}
            if family.auto == CAUSAL:
                example["use_cache"] = False  # torch-pruning fails on the concatenation with an empty cache
            if name in ("T5", "BART", "Whisper"):
                example["decoder_input_ids"] = inputs["labels"]
            report = bp.prune_channels(fresh, example, target={"macs": 0.85})
            row["removed"] = {group: len(channels) for group, channels in report.removed.items()}
            row["macs_kept"] = round(report.macs_after / report.macs_before, 4)
            row["left_whole"] = sorted(set(report.left_whole.values()))
            trained = train_one_step(fresh, inputs)
            bp.to_deterministic(fresh)
            directories["cut"] = save(fresh, Path(folder) / "cut", inputs)
            return trained

        def save(model: Any, directory: Path, inputs: dict[str, Any]) -> Path:
            bp.save(model, directory)
            expected = {f"{i:03}": tensor.contiguous() for i, tensor in enumerate(outputs(model, inputs))}
            save_file(expected, directory / "expected")
            return directory

        attempt(row, "masked", masked)
        attempt(row, "cut", cut)
        attempt(row, "back", lambda: back(model, stock, keys, inputs))
        loaded = load_in_fresh_process(name, list(directories.values())) if directories else {}
        for check, directory in directories.items():
            column = "masked" if check == "masked" else "cut_loaded"
            row[column] = loaded.get(directory.name, loaded.get("error", "the fresh process said nothing"))
    row.setdefault("cut_loaded", "not cut")
    return row


def train_one_step(model: Any, inputs: dict[str, Any]) -> str:
    """One step of AdamW with the KL; the means and stds have to move, and stay finite."""
    import torch

    import bayesprune as bp
    from bayesprune.layers import named_posteriors

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    attachment = bp.attach(optimizer, model, num_data=100)
    posteriors = [p for p in named_posteriors(model) if p.is_weight]
    means = [p.mean.detach().clone() for p in posteriors]
    stds = [p.log_std.detach().clone() for p in posteriors]
    model.train()
    torch.manual_seed(3)
    model(**inputs).loss.backward()
    optimizer.step()
    attachment.detach()
    model.eval()
    for p, mean, std in zip(posteriors, means, stds, strict=True):
        if not (torch.isfinite(p.mean).all() and torch.isfinite(p.log_std).all()):
            return f"{p.name} is not finite after the step"
        if p.mean.requires_grad and (torch.equal(p.mean, mean) or torch.equal(p.log_std, std)):
            return f"{p.name} did not move"
    return OK


def back(model: Any, stock: list[type], keys: list[str], inputs: dict[str, Any]) -> str:
    """Stock classes and keys again, with the output of the posterior means."""
    import bayesprune as bp

    before = outputs(model, inputs)
    bp.to_deterministic(model)
    if [type(module) for module in model.modules()] != stock or list(model.state_dict()) != keys:
        return "other classes or keys than before"
    return OK if is_equal(outputs(model, inputs), before) else "the output changed"


def load_in_fresh_process(name: str, directories: list[Path]) -> dict[str, str]:
    command = [sys.executable, str(Path(__file__).absolute()), "--load", name, *map(str, directories)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT, cwd=ROOT)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:400]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def load(name: str, directories: list[Path]) -> dict[str, str]:
    """Whether each directory loads by both routes to the outputs that it holds; run in a fresh process."""
    import torch
    import transformers
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    family = FAMILIES[name]
    auto = getattr(transformers, family.auto)
    found: dict[str, str] = {}
    for directory in directories:
        if directory.name == "cut":
            try:
                auto.from_pretrained(directory)
            except Exception:  # noqa: BLE001 (that it fails is what is asked for)
                continue
            found["cut"] = "from_pretrained without bayesprune loaded it silently"
    assert "bayesprune" not in sys.modules

    import bayesprune as bp

    inputs = family.inputs()
    for directory in directories:
        if directory.name in found:
            continue
        expected = [tensor for _, tensor in sorted(load_file(directory / "expected").items())]
        result: dict[str, Any] = {}
        for route, loader in (("load", bp.load), ("from_pretrained", auto.from_pretrained)):
            attempt(result, route, partial(compare, loader, directory, inputs, expected))
        wrong = [f"{route}: {said}" for route, said in result.items() if said != OK]
        found[directory.name] = "; ".join(wrong) or OK
    return found


def compare(loader: Callable[[Path], Any], directory: Path, inputs: dict[str, Any], expected: list[Any]) -> str:
    return OK if is_equal(outputs(loader(directory), inputs), expected) else "other outputs than before"


def run_all(only: list[str] | None, out: Path) -> None:
    """Runs what is missing, one process a family, and writes the table after each."""
    done = json.loads(out.with_suffix(".json").read_text()) if out.with_suffix(".json").is_file() else {"rows": {}}
    for name in only or [name for name in FAMILIES if name not in done["rows"]]:
        start = time.perf_counter()
        command = [sys.executable, str(Path(__file__).absolute()), "--family", name]
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT, cwd=ROOT)
            row = json.loads(run.stdout.strip().splitlines()[-1]) if run.returncode == 0 else None
            error = (run.stderr.strip().splitlines() or ["no message"])[-1]
        except subprocess.TimeoutExpired:
            row, error = None, f"not done after {TIMEOUT} s"
        row = row or {"family": name, "model": FAMILIES[name].model, "crash": error[:400]}
        done["rows"][name] = row
        done["versions"] = {package: version(package) for package in ("torch", "transformers", "torch-pruning")}
        done["versions"]["python"] = platform.python_version()
        done["rows"] = {name: done["rows"][name] for name in FAMILIES if name in done["rows"]}
        out.with_suffix(".json").write_text(json.dumps(done, indent=1) + "\n")
        out.with_suffix(".md").write_text(page(done))
        print(f"{name}: {summary(row)} ({time.perf_counter() - start:.0f} s)", flush=True)


def summary(row: dict[str, Any]) -> str:
    return row.get("crash") or ", ".join(f"{check} {row.get(check, 'missing')[:100]}" for check in CHECKS)


def page(done: dict[str, Any]) -> str:
    """The page of the documentation."""
    versions = ", ".join(f"{name} {number}" for name, number in done["versions"].items())
    lines = [
        "# Model families of transformers",
        "",
        "What works for each family, found on tiny models with random weights by",
        f"`python tests/benchmarks/families.py` ({versions}).",
        "Saved models are loaded in a fresh process, by `bayesprune.load` and by transformers' own",
        "`from_pretrained` after `import bayesprune`; 'yes' means that every output is equal to the last bit by both.",
        "A cut model that is loaded without bayesprune has to be refused by transformers. Language models are given to",
        "`prune_channels` with `use_cache=False`: torch-pruning fails on the cache of some.",
        "",
        *(f"- **{name.replace('_', ' ')}**: {what}" for name, what in CHECKS.items()),
        "",
        "| family | layers converted, left | "
        + " | ".join(check.replace("_", " ") for check in CHECKS)
        + " | MACs kept |",
        "|---|---|" + "---|" * (len(CHECKS) + 1),
    ]
    notes: list[str] = []
    for name, row in done["rows"].items():
        cells = []
        for check in CHECKS:
            value = row.get(check, row.get("crash", "not run"))
            if value not in (OK, "not cut"):
                notes.append(f"{len(notes) + 1}. {name}, {check}: {value}")
                value = f"no [{len(notes)}]"
            cells.append(value)
        counts = row.get("layers", {})
        converted = counts.get("converted", 0) + counts.get("fallback", 0)
        kept = row.get("macs_kept", "")
        lines.append(f"| {name} | {converted}, {counts.get('left', 0)} | {' | '.join(cells)} | {kept} |")
    lines += ["", "## What does not work, and why", "", *(notes or ["Nothing."])]
    reasons = sorted({reason for row in done["rows"].values() for reason in row.get("left", ())})
    lines += ["", "## Layers that stay deterministic", "", *(f"- {reason}" for reason in reasons)]
    whole: dict[str, list[str]] = {}
    for name, row in done["rows"].items():
        for reason in row.get("left_whole", ()):
            whole.setdefault(reason, []).append(name)
    lines += ["", "## Why `prune_channels` leaves other layers whole", ""]
    lines += [f"- {reason} ({', '.join(names)})" for reason, names in sorted(whole.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=FAMILIES)
    parser.add_argument("--out", type=Path, default=DOCS / "families")
    parser.add_argument("--family", choices=FAMILIES, help=argparse.SUPPRESS)
    parser.add_argument("--load", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.family:
        print(json.dumps(run_family(args.family)))
    elif args.load:
        print(json.dumps(load(args.load[0], [Path(directory) for directory in args.load[1:]])))
    else:
        run_all(args.only, args.out)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
