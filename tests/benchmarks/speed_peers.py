"""The same training by other libraries, each as its own documentation shows it, as far as they are installed.

    pip install bayesian-torch==0.5.0 torchbnn==1.2 ivon-opt==0.1.3 fastbnns==0.4.3

All of them add the KL to the loss (IVON has none) and train with the same fused Adam (IVON is an optimizer of its own).
None is told apart by what it optimises: the price is that of its step. FastBNNs makes its stds with a stride of zero,
which no optimizer of torch takes; they get memory of their own here.
"""

import copy
import importlib
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from speed_ways import LR, NUM_DATA, Task, Way, adam
from torch import Tensor, nn

PACKAGES = ("bayesian-torch", "torchbnn", "ivon-opt", "fastbnns")


def installed() -> dict[str, str]:
    """Version of each peer that is here."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def peers(of: Task) -> Iterator[Way]:
    """All ways of the peers that are installed."""
    makers: dict[str, Callable[[Task], Iterator[Way]]] = {
        "bayesian-torch": _bayesian_torch,
        "torchbnn": _torchbnn,
        "ivon-opt": _ivon,
        "fastbnns": _fastbnns,
    }
    for package in installed():
        yield from makers[package](of)


def _bayesian_torch(of: Task) -> Iterator[Way]:
    library: Any = importlib.import_module("bayesian_torch.models.dnn_to_bnn")
    prior = {"prior_mu": 0.0, "prior_sigma": 1.0, "posterior_mu_init": 0.0, "posterior_rho_init": -3.0}
    for kind in ("Reparameterization", "Flipout"):
        model = copy.deepcopy(of.net)
        library.dnn_to_bnn(model, prior | {"type": kind, "moped_enable": True, "moped_delta": 0.1})
        model.to(of.x.device)
        yield _with_kl(of, f"bayesian-torch, {kind.lower()}", model, lambda model=model: library.get_kl_loss(model))


def _torchbnn(of: Task) -> Iterator[Way]:
    library: Any = importlib.import_module("torchbnn")
    model = copy.deepcopy(of.net)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in (nn.Linear, nn.Conv2d):
                setattr(parent, name, _torchbnn_layer(library, child))
    kl = library.BKLLoss(reduction="sum")
    yield _with_kl(of, "torchbnn", model, lambda: kl(model).squeeze())


def _torchbnn_layer(library: Any, layer: nn.Module) -> nn.Module:
    """The library's layer of this shape, at these weights."""
    options: dict[str, Any] = {"prior_mu": 0.0, "prior_sigma": 0.1, "bias": layer.bias is not None}
    if isinstance(layer, nn.Linear):
        found = library.BayesLinear(in_features=layer.in_features, out_features=layer.out_features, **options)
    else:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        found = library.BayesConv2d(**{name: getattr(layer, name) for name in names}, **options)
    with torch.no_grad():
        found.weight_mu.copy_(layer.weight)
        found.weight_log_sigma.fill_(-4.0)
        if layer.bias is not None:
            found.bias_mu.copy_(layer.bias)
    return found.to(layer.weight.device)


def _with_kl(of: Task, name: str, model: nn.Module, kl: Callable[[], Tensor]) -> Way:
    """A library whose layers draw at every forward, with the KL in the loss."""
    return Way(
        name,
        model,
        adam(model),
        loss=lambda: of.loss(model(of.x)) + kl() / NUM_DATA,
        evaluate=None,
        draw=lambda: model(of.x),
    )


def _ivon(of: Task) -> Iterator[Way]:
    library: Any = importlib.import_module("ivon")
    model = copy.deepcopy(of.net)
    optimizer = library.IVON(model.parameters(), lr=LR, ess=NUM_DATA)

    def draw() -> Any:
        with optimizer.sampled_params():
            return model(of.x)

    yield Way(
        "IVON",
        model,
        optimizer,
        loss=lambda: of.loss(model(of.x)),
        evaluate=lambda: model(of.x),
        draw=draw,
        noise=lambda: optimizer.sampled_params(train=True),
    )


def _fastbnns(of: Task) -> Iterator[Way]:
    base, losses, types = (importlib.import_module(f"fastbnns.bnn.{name}") for name in ("base", "losses", "types"))
    for kind in ("sampling", "moments"):
        model = base.BNN(of.net, wrapper_kwargs_global={"resample_mean": False}).to(of.x.device)
        for parameter in model.parameters():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        kl = losses.KLDivergence()

        def forward(model: nn.Module = model, kind: str = kind) -> Any:
            return model(types.MuVar(of.x) if kind == "moments" else of.x)

        def loss(model: nn.Module = model, kl: Any = kl, forward: Callable[[], Any] = forward) -> Tensor:
            output = forward()
            if not isinstance(output, types.MuVar):
                return of.loss(output) + kl(model) / NUM_DATA
            p = output.mu.softmax(-1)
            expected = of.loss(output.mu) + 0.5 * ((p - p.square()) * output.var).sum(-1).mean()
            return expected + kl(model) / NUM_DATA

        yield Way(f"FastBNNs, {kind}", model, adam(model), loss=loss, evaluate=None, draw=forward)
