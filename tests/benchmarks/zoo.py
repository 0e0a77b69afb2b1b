"""Tries one model of every module of timm, and writes what works for each to docs/benchmarks/zoo.md.

    python tests/benchmarks/zoo.py

Models have random weights and the smallest images they take; no network is needed. Each has a process of its own with
bounded memory, so that a crash costs one row, and a fresh process that loads what was saved. Rows that
docs/benchmarks/zoo.json holds already are kept; delete the file, or name models with `--only`, to run them again.
"""

import argparse
import json
import resource
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from rows import (
    DOCS,
    OK,
    ROOT,
    attempt,
    back,
    fresh_process,
    gives_what_was_saved,
    is_equal,
    outputs,
    run_rows,
    save_with_outputs,
    train_one_step,
)
from zoo_page import CUT, MODELS, page

MEMORY = 10 * 2**30  # bytes of address space for a row
SIZES = (32, 64, 96, 128, 160, 192, 224, 256)  # sides of the images that are tried, in pixels
NUM_CLASSES = 10


def build(name: str) -> tuple[Any, Any]:
    """The model for the smallest images that it takes, and two of them."""
    import timm
    import torch

    config = timm.get_pretrained_cfg(name)
    channels, default = (config.input_size[0], config.input_size[-1]) if config else (3, 224)
    errors = []
    for side in (*(side for side in SIZES if side < default), default):
        for options in ({"img_size": side}, {}):
            torch.manual_seed(0)
            images = pictures(2, channels, side, side)
            try:
                model = timm.create_model(name, num_classes=NUM_CLASSES, **options)
                with torch.no_grad():
                    model.train()(images)
                    return model.eval(), images
            except Exception as error:  # noqa: BLE001 (a size that the model does not take; the last one tells)
                errors.append(error)
    raise errors[-1]


def pictures(*shape: int) -> Any:
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def loss(images: Any, model: Any) -> Any:
    import torch
    from torch.nn import functional as F

    found = model(images)
    logits = found[0] if isinstance(found, tuple) else found
    return F.cross_entropy(logits, torch.arange(len(logits)) % NUM_CLASSES)


def run_model(name: str) -> dict[str, Any]:
    """The row of one model, all checks but that of the fresh process run in this one."""
    import torch

    import bayesprune as bp

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    model, images = build(name)
    row: dict[str, Any] = {"side": images.shape[-1], "parameters": sum(p.numel() for p in model.parameters())}
    stock, keys = [type(module) for module in model.modules()], list(model.state_dict())
    before = outputs(model, images)
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    bp.to_variational(model, std="per_channel")
    table = bp.conversion_table(model)
    row["layers"] = {status: sum(r.status == status for r in table) for status in ("converted", "fallback", "left")}
    attempt(row, "exact", lambda: OK if is_equal(outputs(model, images), before) else "the output changed")
    attempt(row, "step", lambda: train_one_step(model, partial(loss, images), only_some=True))
    attempt(row, "moments", lambda: moments(model, images[:1]))

    def cut() -> str:
        report = bp.prune_channels(model, images[:1], target={"macs": CUT})
        row["kept"] = round(report.achieved["macs"], 3)
        row["left_whole"] = sorted(set(report.left_whole.values()))
        return train_one_step(model, partial(loss, images), only_some=True)

    if not attempt(row, "cut", cut):
        row["most"] = most_that_goes(model, images[:1])
    with tempfile.TemporaryDirectory() as folder:

        def saved() -> str:
            save_with_outputs(bp.to_deterministic(model), Path(folder) / "cut", images)
            found = fresh_process(__file__, "--load", str(Path(folder) / "cut"), *map(str, images.shape))
            return found.get("loaded") or found["error"]

        attempt(row, "loaded", saved)
    fresh, _ = build(name)
    fresh.load_state_dict(dense)
    attempt(row, "back", lambda: back(bp.to_variational(fresh), stock, keys, images))
    attempt(row, "torch_pruning", lambda: torch_pruning_alone(fresh, images))
    return row


def moments(model: Any, images: Any) -> str:
    import torch

    import bayesprune as bp

    prediction = bp.predict(model, images, method="moments")
    finite = torch.isfinite(prediction.mean).all() and torch.isfinite(prediction.variance).all()
    if not finite:
        return "mean or variance is not finite"
    return OK if (prediction.variance > 0).any() else "no variance"


def most_that_goes(model: Any, images: Any) -> float | None:
    """The smallest of some fractions of the MACs that can be kept; None where nothing can go."""
    import bayesprune as bp
    from bayesprune.errors import BayespruneError

    for kept in (0.6, 0.7, 0.8, 0.9, 0.95):
        try:
            return round(bp.prune_channels(model, images, target={"macs": kept}).achieved["macs"], 3)
        except BayespruneError:
            continue
    return None


def torch_pruning_alone(model: Any, images: Any) -> str:
    """The stock pruner with magnitudes, told the output layer and the heads as its own example for timm does it."""
    import torch
    import torch_pruning as tp

    with torch.no_grad():
        before = tp.utils.count_ops_and_params(model, images)[0]
    attention = {m: m.num_heads for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}
    pruner = tp.pruner.BasePruner(
        model,
        images,
        tp.importance.MagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=1 - CUT**0.5,
        ignored_layers=[m for m in model.modules() if getattr(m, "out_features", None) == NUM_CLASSES],
        num_heads={m.qkv: heads for m, heads in attention.items()},
    )
    pruner.step()
    for module, heads in attention.items():
        module.head_dim = module.qkv.out_features // (3 * heads)
        if hasattr(module, "attn_dim"):
            module.attn_dim = module.head_dim * heads
    loss(images, model.train()).backward()
    kept = tp.utils.count_ops_and_params(model.eval(), images)[0] / before
    return f"{OK}, {kept:.2f}"


def load(directory: Path, shape: list[int]) -> dict[str, str]:
    """Whether the directory loads by both routes to the outputs that it holds; run in a fresh process."""
    import timm
    import torch

    import bayesprune as bp

    torch.set_num_threads(1)
    found: dict[str, str] = {}
    routes = {"load": bp.load, "timm": lambda path: timm.create_model(f"local-dir:{path}", pretrained=True)}
    for route, loader in routes.items():
        attempt(found, route, partial(gives_what_was_saved, loader, directory, pictures(*shape)))
    wrong = [f"{route}: {said}" for route, said in found.items() if said != OK]
    return {"loaded": "; ".join(wrong) or OK}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=MODELS)
    parser.add_argument("--out", type=Path, default=DOCS / "zoo")
    parser.add_argument("--row", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--load", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.row:
        print(json.dumps(run_model(args.row)))
    elif args.load:
        print(json.dumps(load(Path(args.load[0]), [int(size) for size in args.load[1:]])))
    else:
        packages = ("torch", "timm", "torch-pruning")
        run_rows(__file__, MODELS, args.only, args.out, packages=packages, page=page)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
