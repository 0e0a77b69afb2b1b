"""Trains a timm model on scikit-learn's digits, halves its MACs, and loads the result back through timm."""

import argparse
import copy
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import bayesprune as bp
from bayesprune.app.data.images import Data, load_data
from bayesprune.reports import accuracy


def train(model: nn.Module, loader: DataLoader, *, num_epochs: int, lr: float, num_data: int | None = None) -> None:
    """The user's own loop; `num_data` attaches the KL."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    attachment = None if num_data is None else bp.attach(optimizer, model, num_data=num_data)
    model.train()
    for _ in range(num_epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    if attachment is not None:
        attachment.detach()
    model.eval()


def run(out: Path, *, name: str = "resnet10t", num_epochs: int = 5, data: Data | None = None) -> dict[str, float]:
    """Accuracies on the test split before and after, and the fraction of the MACs kept."""
    torch.manual_seed(0)
    data = data or load_data("digits")
    model = timm.create_model(name, num_classes=data.num_classes, in_chans=data.in_chans)
    train(model, data.train, num_epochs=num_epochs, lr=3e-3)
    before = accuracy(copy.deepcopy(model), data.test)

    bp.to_variational(model, std="per_channel")
    train(model, data.train, num_epochs=num_epochs, lr=1e-3, num_data=data.num_data)
    images = next(iter(data.train))[0]
    report = bp.prune_channels(model, images[:1], target="macs=0.5", data=[images])
    bp.to_deterministic(model)
    train(model, data.train, num_epochs=num_epochs, lr=1e-3)

    bp.save(model, out)
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.no_grad():
        difference = float((loaded(images) - model(images)).abs().max())
    return {
        "accuracy before": before,
        "accuracy after": accuracy(loaded, data.test),
        "MACs kept": report.macs_after / report.macs_before,
        "difference after loading": difference,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/timm-digits"))
    for key, value in run(parser.parse_args().out).items():
        print(f"{key}: {value:.4f}")
