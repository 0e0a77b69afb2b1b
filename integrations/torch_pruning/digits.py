"""A torch-pruning script of one's own with the posterior's signal as its criterion, on scikit-learn's digits."""

import timm
import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import nn

import bayesprune as bp
from bayesprune.app.data.images import Data, load_data
from bayesprune.reports import accuracy, count_parameters


def train(model: nn.Module, data: Data, *, num_epochs: int) -> None:
    """The user's own loop, with the KL attached."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    bp.attach(optimizer, model, num_data=data.num_data)
    model.train()
    for _ in range(num_epochs):
        for images, labels in data.train:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()


def run(*, name: str = "resnet10t", num_epochs: int = 4, data: Data | None = None) -> dict[str, float]:
    """Accuracy on the test split and the fraction of parameters kept."""
    torch.manual_seed(0)
    data = data or load_data("digits")
    model = timm.create_model(name, num_classes=data.num_classes, in_chans=data.in_chans)
    before = count_parameters(model).total
    bp.to_variational(model, std="per_channel")
    train(model, data, num_epochs=num_epochs)

    pruner = tp.pruner.BasePruner(
        model,
        torch.zeros(1, *data.input_size),
        importance=bp.SNRImportance(),
        pruning_ratio=0.3,
        ignored_layers=[model.get_classifier()],
    )
    pruner.step()

    train(model, data, num_epochs=num_epochs)
    bp.to_deterministic(model)
    return {"accuracy": accuracy(model, data.test), "parameters kept": count_parameters(model).total / before}


if __name__ == "__main__":
    for key, value in run().items():
        print(f"{key}: {value:.4f}")
