"""Tries one model of every module of timm, and writes what works for each to docs/benchmarks/zoo.md.

    python tests/benchmarks/zoo.py

Models have random weights and the smallest images they take; no network is needed. Each has a process of its own with
bounded memory, so that a crash costs one row, and another one that never saw it loads what was saved. Rows that
docs/benchmarks/zoo.json holds already are kept where no check is missing in them; delete the file, or name models with
`--only`, to run them again, and say `--keep-peer` where what it says of torch-pruning alone, the slowest column, is to
stay as it was.
"""

import argparse
import copy
import json
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rows import (
    CUT,
    DOCS,
    OK,
    ROOT,
    as_far_as_it_goes,
    attempt,
    back,
    gives_what_was_saved,
    in_process,
    is_equal,
    outputs,
    save_with_outputs,
    train_one_step,
)
from zeros import by_channel, equal
from zoo_page import CHECKS, MODELS, page

MEMORY = 10 * 2**30  # bytes of address space for a row
HOST_TIME = 40  # seconds for torch-pruning alone, which does not end for some models
SIZES = (32, 64, 96, 128, 160, 192, 224, 256)  # sides of the images that are tried, in pixels
NUM_CLASSES = 10
ARGUMENTS = {"deepseek_vit_412m": {"depth": 2}}  # of models that are too large for a row's memory otherwise


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
                model = timm.create_model(name, num_classes=NUM_CLASSES, **options, **ARGUMENTS.get(name, {}))
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


def run_model(name: str, directory: Path, peer: str | None) -> dict[str, Any]:
    """The row of one model, all checks but that of the process that loads what is saved to the directory here."""
    import torch

    import bayesprune as bp

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    model, images = build(name)
    row: dict[str, Any] = {"shape": list(images.shape), "parameters": sum(p.numel() for p in model.parameters())}
    stock, keys = [type(module) for module in model.modules()], list(model.state_dict())
    attempt(row, "equal", lambda: equal(copy.deepcopy(model), images[:1], stand_in))
    before = outputs(model, images)
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    bp.to_variational(model, std="per_channel")
    table = bp.conversion_table(model)
    row["layers"] = {status: sum(r.status == status for r in table) for status in ("converted", "fallback", "left")}
    attempt(row, "exact", lambda: OK if is_equal(outputs(model, images), before) else "the output changed")
    attempt(row, "step", lambda: train_one_step(model, partial(loss, images), only_some=True))
    attempt(row, "moments", lambda: moments(model, images[:1]))

    def cut() -> str:
        report, row["limit"] = as_far_as_it_goes(model, images[:1])
        row["kept"] = round(report.achieved["macs"], 3)
        row["left_whole"] = dict(Counter(report.left_whole.values()))
        return train_one_step(model, partial(loss, images), only_some=True)

    attempt(row, "cut", cut)

    def saved() -> str:
        save_with_outputs(bp.to_deterministic(model), directory, images)
        return OK

    attempt(row, "saved", saved)
    fresh, _ = build(name)
    fresh.load_state_dict(dense)
    attempt(row, "back", lambda: back(bp.to_variational(fresh), stock, keys, images))
    attempt(row, "torch_pruning", lambda: peer or within(HOST_TIME, lambda: torch_pruning_alone(fresh, images)))
    return row


def stand_in(module: Any) -> Callable | None:
    """What stands for the forward of a module of timm that counts channels, but by a function of torch for norms."""
    from timm.layers.grn import GlobalResponseNorm
    from timm.layers.norm import RmsNorm, RmsNorm2d, SimpleNorm, SimpleNorm2d
    from timm.models.csatv2 import SpatialAttention

    if isinstance(module, SpatialAttention):  # of the mean over channels and their maximum
        return lambda x: x.new_ones(len(x), 1, 7, 7)
    if isinstance(module, GlobalResponseNorm):
        return lambda x: by_channel(x, module.channel_dim, module.weight, module.bias)
    if isinstance(module, RmsNorm | RmsNorm2d | SimpleNorm | SimpleNorm2d):
        return lambda x: by_channel(x, 1 if isinstance(module, RmsNorm2d | SimpleNorm2d) else -1, module.weight)
    return None


def within(seconds: int, check: Callable[[], str]) -> str:
    """The check's answer; a TimeoutError where it takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        return check()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def moments(model: Any, images: Any) -> str:
    import torch

    import bayesprune as bp

    prediction = bp.predict(model, images, method="moments")
    finite = torch.isfinite(prediction.mean).all() and torch.isfinite(prediction.variance).all()
    if not finite:
        return "mean or variance is not finite"
    return OK if (prediction.variance > 0).any() else "no variance"


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
    wrong = [f"{route}: {said}" for route, said in found.items() if not said.startswith(OK)]
    return {"loaded": "; ".join(wrong) or OK}


def run_row(name: str, peer: str | None = None) -> dict[str, Any]:
    """The row of one model, from a process that makes and saves it, and another one that loads it.

    Args:
        name: Of the model.
        peer: What an earlier run found of torch-pruning alone; None runs it.
    """
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "cut"
        row = in_process(run_model, name, directory, peer)
        saved = row.pop("saved", None)
        if saved == OK:
            found = in_process(load, directory, row["shape"])
            saved = found.get("loaded", found.get("crash"))
        row["loaded"] = saved
    return {key: value for key, value in row.items() if value}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=MODELS)
    parser.add_argument("--keep-peer", action="store_true", help="keep what the rows say of torch-pruning alone")
    parser.add_argument("--out", type=Path, default=DOCS / "zoo")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    import timm  # noqa: F401 (here, so that the processes of the rows need not)
    import torch
    import torch_pruning  # noqa: F401

    import bayesprune  # noqa: F401

    torch.set_num_threads(1)
    results = args.out.with_suffix(".json")
    done = json.loads(results.read_text()) if results.is_file() else {"rows": {}}
    if args.keep_peer:
        done.setdefault("peer_versions", done["versions"])
    done["versions"] = {package: version(package) for package in ("torch", "timm", "torch-pruning")}
    for name in args.only or [name for name in MODELS if not done["rows"].get(name, {}).keys() >= CHECKS.keys()]:
        start = time.perf_counter()
        peer = done["rows"].get(name, {}).get("torch_pruning") if args.keep_peer else None
        done["rows"][name] = row = run_row(name, peer)
        done["rows"] = {name: done["rows"][name] for name in MODELS if name in done["rows"]}
        results.write_text(json.dumps(done, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(page(done))
        seen = {key: value[:100] for key, value in row.items() if isinstance(value, str)}
        print(f"{name}: {seen} ({time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
