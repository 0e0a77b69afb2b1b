"""Trains a ViT of transformers on scikit-learn's digits with Trainer, halves its MACs, loads it by from_pretrained."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, ViTConfig

import bayesprune as bp
from bayesprune.app.data.images import Data, load_data
from bayesprune.hosts.transformers import BayesPruneCallback

SIDE = 8


def rows(data: Dataset) -> list[dict[str, Any]]:
    """The examples as the Trainer takes them."""
    return [{"pixel_values": image, "labels": label} for image, label in data]  # type: ignore[attr-defined]


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def trainer(model: nn.Module, data: Data, callback: BayesPruneCallback | None = None, **options: Any) -> Trainer:
    """The user's own Trainer; the callback is all that is added."""
    args = TrainingArguments(
        output_dir=str(Path(tempfile.gettempdir()) / "transformers-digits"),
        per_device_train_batch_size=32,
        weight_decay=0.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    return Trainer(
        model,
        args,
        train_dataset=rows(data.train.dataset),  # type: ignore[arg-type]
        eval_dataset=rows(data.test.dataset),  # type: ignore[arg-type]
        compute_metrics=accuracy,
        callbacks=[callback] if callback else None,
    )


def run(out: Path, *, num_epochs: int = 10, data: Data | None = None) -> dict[str, float]:
    """Accuracies on the test split before and after, and what was kept."""
    torch.manual_seed(0)
    data = data or load_data("digits", image_size=SIDE)
    config = ViTConfig(
        image_size=data.input_size[-1],
        num_channels=data.in_chans,
        patch_size=4,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        initializer_range=0.1,
    )
    config.num_labels = data.num_classes
    model = AutoModelForImageClassification.from_config(config)
    trainer(model, data, num_train_epochs=num_epochs, learning_rate=2e-3).train()
    before = trainer(model, data).evaluate()["eval_accuracy"]

    callback = BayesPruneCallback(convert={"std": "per_channel"})
    trainer(model, data, callback, num_train_epochs=num_epochs, learning_rate=1e-3).train()
    images = next(iter(data.test))[0]
    report = bp.prune_channels(
        model, {"pixel_values": images[:1]}, target="macs=0.5", granularity=("heads", "mlp"), uniform=True
    )
    bp.to_deterministic(model)
    trainer(model, data, num_train_epochs=num_epochs, learning_rate=1e-3).train()

    bp.save(model, out)
    loaded = AutoModelForImageClassification.from_pretrained(out)
    with torch.no_grad():
        difference = (loaded(images).logits - model.eval()(images).logits).abs().max()
    return {
        "accuracy before": before,
        "accuracy after": trainer(loaded, data).evaluate()["eval_accuracy"],
        "MACs kept": report.achieved["macs"],
        "heads kept": float(np.mean([row.kept_heads / row.heads for row in report.rows if row.heads])),
        "difference after loading": float(difference),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/transformers-digits"))
    for key, value in run(parser.parse_args().out).items():
        print(f"{key}: {value:.4f}")
