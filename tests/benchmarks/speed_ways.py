"""What the speed tables measure: networks, and this library's ways to train them."""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import product
from time import process_time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

import bayesprune as bp
from bayesprune.layers import variational_layers
from bayesprune.train import Attachment

NETWORKS = {
    "mlp": "MLP 784-512-512-10, batch 128",
    "resnet18": "ResNet-18 (timm), 64x64, batch 16",
    "bert": "BERT encoder (4 layers, 256 wide, 4 heads), 64 tokens, batch 16",
}
SCALES = {"layers": (1, 4, 16, 64), "width": (256, 512, 1024, 2048, 4096), "batch": (1, 8, 64, 512)}
QUICK = "quick"
STRUCTURES = ("per_weight", "rank_one", "per_channel")
ESTIMATORS = ("weight_sampling", "flipout", "local_reparameterization", "moments")
EVERY_ROW = (("per_weight", "mean"), *product(STRUCTURES, ESTIMATORS))
DETERMINISTIC, AGAIN, MEAN = "deterministic", "deterministic, once more", "per_weight, mean"
OF_SCALING = (
    "per_weight, weight_sampling",
    "per_weight, local_reparameterization",
    "per_weight, moments",
    "rank_one, local_reparameterization",
    "per_channel, local_reparameterization",
)
PROFILED = (
    DETERMINISTIC,
    "per_weight, weight_sampling",
    "per_weight, local_reparameterization",
    "rank_one, local_reparameterization",
    "per_channel, local_reparameterization",
)
NUM_DATA = 50_000
LR = 1e-4


@dataclass
class Task:
    """A network with ten classes, and a batch for it."""

    net: nn.Module
    x: Tensor
    labels: Tensor
    compiled: bool = False

    def runner(self, model: nn.Module) -> Callable[..., Any]:
        """The model, compiled where the task asks for that."""
        return torch.compile(model, dynamic=False) if self.compiled else model

    def loss(self, output: Any) -> Tensor:
        """Cross-entropy; in expectation where the output has moments."""
        return F.cross_entropy(getattr(output, "logits", output), self.labels)


@dataclass
class Way:
    """One way to train a network and to predict with it.

    Attributes:
        name: Its row.
        model: Whose mode decides and whose gradients are set to None.
        optimizer: What moves the parameters.
        loss: Forward, loss and what it needs of the KL.
        evaluate: A prediction without noise; None where the library has none.
        draw: A prediction with noise, or of moments.
        noise: What forward and backward run in.
        prepare: What has to be set before this way runs, outside the times.
        state: More tensors, nested, that live as long as the training.
        marks: Times before and after the hook, in the order in which steps were taken.
    """

    name: str
    model: nn.Module
    optimizer: Optimizer
    loss: Callable[[], Tensor]
    evaluate: Callable[[], Any] | None
    draw: Callable[[], Any] | None
    noise: Callable[[], AbstractContextManager] = nullcontext
    prepare: Callable[[], None] = lambda: None
    state: Callable[[], Any] = dict
    marks: list[float] = field(default_factory=list)


def task(name: str, *, compiled: bool = False) -> Task:
    """A network of `NETWORKS`, or a point of `SCALES` such as "layers 16"."""
    torch.manual_seed(0)
    if name == QUICK:
        net, x = _mlp(8, 16, 2), torch.randn(4, 8)
    elif name == "mlp":
        layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
        net, x = nn.Sequential(*layers), torch.randn(128, 784)
    elif name == "resnet18":
        import timm

        net, x = timm.create_model("resnet18", num_classes=10), torch.randn(16, 3, 64, 64)
    elif name == "bert":
        from transformers import BertConfig, BertForSequenceClassification

        shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = BertConfig(vocab_size=1000, num_labels=10, **shape, **dropout)
        net, x = BertForSequenceClassification(config), torch.randint(0, 1000, (16, 64))
    else:
        what, value = name.split()
        shape = {"layers": 4, "width": 512, "batch": 64} | {what: int(value)}
        net, x = _mlp(shape["width"], shape["width"], shape["layers"]), torch.randn(shape["batch"], shape["width"])
    return Task(net, x, torch.randint(0, 10, (len(x),)), compiled)


def _mlp(inputs: int, width: int, num_layers: int) -> nn.Module:
    """Hidden layers of one width, and a classifier."""
    layers: list[nn.Module] = []
    for index in range(num_layers):
        layers += [nn.Linear(width if index else inputs, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def adam(model: nn.Module) -> Adam:
    """The optimizer of all rows but IVON's: torch's fused Adam."""
    return Adam(model.parameters(), lr=LR, fused=True)


def deterministic(of: Task, name: str = DETERMINISTIC) -> Way:
    """The network as it is."""
    model = copy.deepcopy(of.net)
    run = of.runner(model)
    return Way(name, model, adam(model), lambda: of.loss(run(of.x)), lambda: run(of.x), None)


def ours(of: Task, rows: Iterable[tuple[str, str]] = EVERY_ROW) -> Iterator[Way]:
    """Structures with estimators; every one, and the hook alone: a converted network trained at its means."""
    shared: dict[str, tuple] = {}
    for std, estimator in rows:
        if std not in shared or of.compiled:
            shared[std] = _attached(of, std)
        yield _our_way(of, std, estimator, *shared[std])


def _attached(of: Task, std: str) -> tuple[nn.Module, Adam, Attachment, list[float]]:
    """A converted network, its optimizer, the attachment, and a list of the times when the hook began and ended."""
    model = bp.to_variational(copy.deepcopy(of.net), std=std)
    optimizer, marks = adam(model), []
    optimizer.register_step_pre_hook(lambda *_: marks.append(process_time()))
    attachment = bp.attach(optimizer, model, num_data=NUM_DATA)
    optimizer.register_step_pre_hook(lambda *_: marks.append(process_time()))
    return model, optimizer, attachment, marks


def _our_way(
    of: Task,
    std: str,
    estimator: str,
    model: nn.Module,
    optimizer: Adam,
    attachment: Attachment,
    marks: list[float],
) -> Way:
    run = of.runner(model)

    def prepare() -> None:
        for _, layer in variational_layers(model):
            layer.estimator = estimator

    noisy = bp.prediction.compile_moments(model) if of.compiled and estimator == "moments" else run

    def draw() -> Any:
        with bp.sampling(model, estimator):
            return noisy(of.x)

    return Way(
        name=f"{std}, {estimator}",
        model=model,
        optimizer=optimizer,
        loss=lambda: of.loss(noisy(of.x)),
        evaluate=lambda: run(of.x),
        draw=None if estimator == "mean" else draw,
        prepare=prepare,
        state=attachment.state_dict,
        marks=marks,
    )
