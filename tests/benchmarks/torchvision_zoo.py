"""Tries models of torchvision, and YOLO of ultralytics where it is installed, and writes what works for each.

    python tests/benchmarks/torchvision_zoo.py

Models have random weights and small images; no network is needed. Detectors have frozen batch norms in their backbone,
as pretrained ones have. Each has a process of its own, and another one loads what was saved. Rows that
docs/benchmarks/torchvision.json holds already are kept; delete the file, or name models with `--only`, to run them
again. The rows of YOLO are run where ultralytics is installed.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
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
    fresh_process,
    gives_what_was_saved,
    is_equal,
    outputs,
    run_rows,
    save_with_outputs,
    train_one_step,
)
from zeros import EQUAL, equal

NUM_CLASSES = 10
CHECKS = {
    "exact": "eval output unchanged by conversion",
    "step": "one training step with `attach`",
    "equal": EQUAL,
    "cut": "`prune_channels`, then one training step; the share of the MACs that is kept, half of them being asked "
    "for; `prune_channels` warns where a detector finds more boxes than before, and then does more for them",
    "loaded": "what is left saved, and loaded by `bayesprune.load` in another process",
    "back": "converted back to stock classes and keys",
}


@dataclass(frozen=True)
class Case:
    """A model of torchvision: its kind, the side of its images in pixels, and options of its function."""

    kind: str
    side: int = 64
    options: dict[str, Any] = field(default_factory=dict)


_RPN = {"rpn_post_nms_top_n_test": 20, "rpn_post_nms_top_n_train": 20, "box_score_thresh": 0.0}
_SMALL = {"min_size": 96, "max_size": 96}
_ONE_STAGE = {**_SMALL, "score_thresh": 0.0, "topk_candidates": 50, "detections_per_img": 20}
_SSD = {"score_thresh": 0.0, "topk_candidates": 50, "detections_per_img": 20}
_MAXVIT = {"input_size": (64, 64), "stem_channels": 64, "partition_size": 2, "head_dim": 32}
_MAXVIT |= {"block_channels": [64, 128, 256, 512], "block_layers": [2, 2, 5, 2], "stochastic_depth_prob": 0.2}
MODELS = {
    "alexnet": Case("classification"),
    "convnext_tiny": Case("classification"),
    "densenet121": Case("classification"),
    "efficientnet_b0": Case("classification"),
    "efficientnet_v2_s": Case("classification"),
    "googlenet": Case("classification", options={"aux_logits": False, "init_weights": False}),
    "inception_v3": Case("classification", 80, {"aux_logits": False, "init_weights": False}),
    "maxvit_t": Case("classification", 64, _MAXVIT),
    "mnasnet0_5": Case("classification"),
    "mobilenet_v2": Case("classification"),
    "mobilenet_v3_small": Case("classification"),
    "regnet_x_400mf": Case("classification"),
    "regnet_y_400mf": Case("classification"),
    "resnet18": Case("classification"),
    "resnext50_32x4d": Case("classification"),
    "shufflenet_v2_x0_5": Case("classification"),
    "squeezenet1_0": Case("classification"),
    "swin_t": Case("classification"),
    "swin_v2_t": Case("classification"),
    "vgg11_bn": Case("classification"),
    "vit_b_16": Case("classification", options={"image_size": 64}),
    "deeplabv3_mobilenet_v3_large": Case("segmentation"),
    "deeplabv3_resnet50": Case("segmentation"),
    "fcn_resnet50": Case("segmentation"),
    "lraspp_mobilenet_v3_large": Case("segmentation"),
    "fasterrcnn_mobilenet_v3_large_320_fpn": Case("detection", 96, {**_SMALL, **_RPN}),
    "fasterrcnn_resnet50_fpn": Case("detection", 96, {**_SMALL, **_RPN}),
    "fcos_resnet50_fpn": Case("detection", 96, _ONE_STAGE),
    "keypointrcnn_resnet50_fpn": Case("detection", 96, {**_SMALL, **_RPN}),
    "maskrcnn_resnet50_fpn": Case("detection", 96, {**_SMALL, **_RPN}),
    "retinanet_resnet50_fpn": Case("detection", 96, _ONE_STAGE),
    "ssd300_vgg16": Case("detection", 300, _SSD),
    "ssdlite320_mobilenet_v3_large": Case("detection", 320, _SSD),
    "yolov8n": Case("ultralytics", 64),
    "yolo11n": Case("ultralytics", 64),
}


def build(name: str) -> Any:
    """The model, in evaluation mode, with the same random weights each time."""
    import torch
    from torch import nn

    case = MODELS[name]
    torch.manual_seed(0)
    if case.kind == "ultralytics":
        os.environ["YOLO_OFFLINE"] = "true"
        from ultralytics.nn.tasks import DetectionModel  # type: ignore[import-not-found]

        model = DetectionModel(f"{name}.yaml", nc=NUM_CLASSES, verbose=False)
    elif name == "maxvit_t":  # whose function takes images of 224 pixels and no smaller ones
        from torchvision.models import MaxVit

        model = MaxVit(num_classes=NUM_CLASSES, **case.options)
    else:
        from torchvision.models import get_model

        weights = {"weights": None} | ({} if case.kind == "classification" else {"weights_backbone": None})
        model = get_model(name, num_classes=NUM_CLASSES, **weights, **case.options)
    if case.kind == "detection":
        frozen_norms(model.backbone)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # numbers of a trained net, not zeros and ones
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.bias, -0.1, 0.1)
        elif isinstance(module, nn.Linear) and not module.weight.any():  # the head of a vision transformer
            nn.init.normal_(module.weight, std=0.1)
    return model.eval()


def frozen_norms(model: Any) -> None:
    """Puts frozen batch norms in place of the others, in place."""
    from torch import nn
    from torchvision.ops import FrozenBatchNorm2d

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                frozen = FrozenBatchNorm2d(child.num_features, child.eps)
                nn.init.uniform_(frozen.bias, -0.1, 0.1)
                setattr(module, name, frozen)


def inputs_for(name: str) -> Any:
    """Two images, or of a detector the list of one."""
    import torch

    case = MODELS[name]
    images = torch.rand(2, 3, case.side, case.side, generator=torch.Generator().manual_seed(1))
    return ([images[0]],) if case.kind == "detection" else images


def loss(name: str, inputs: Any, model: Any) -> Any:
    """A loss of the task, or what stands for one."""
    import torch
    from torch.nn import functional as F

    from bayesprune.foundation.model import tensors_in

    case = MODELS[name]
    if case.kind == "classification":
        found = model(inputs)
        return F.cross_entropy(found, torch.arange(len(found)) % NUM_CLASSES)
    if case.kind == "detection":
        target = {"boxes": torch.tensor([[8.0, 8.0, 60.0, 70.0]]), "labels": torch.tensor([1])}
        target["masks"] = torch.ones(1, case.side, case.side, dtype=torch.uint8)
        target["keypoints"] = torch.tensor([[[20.0, 20.0, 1.0]] * 17])
        return sum(model(2 * inputs[0], [target, target]).values())  # batch norm takes no single pixel
    return sum(tensor.square().mean() for tensor in tensors_in(model(inputs)))


def run_model(name: str) -> dict[str, Any]:
    """The row of one model."""
    import torch

    import bayesprune as bp

    torch.set_num_threads(1)
    model, inputs = build(name), inputs_for(name)
    row: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    inputs_one = inputs if MODELS[name].kind == "detection" else inputs[:1]
    stock, keys = [type(module) for module in model.modules()], list(model.state_dict())
    before = outputs(model, inputs)
    attempt(row, "equal", lambda: equal(build(name), inputs_one))
    bp.to_variational(model, std="per_channel")
    attempt(row, "exact", lambda: OK if is_equal(outputs(model, inputs), before) else "the output changed")
    attempt(row, "step", lambda: train_one_step(model, partial(loss, name, inputs), only_some=True))

    def cut() -> str:
        report, row["limit"] = as_far_as_it_goes(model, inputs_one)
        row["kept"] = round(report.achieved["macs"], 3)
        row["left_whole"] = dict(Counter(report.left_whole.values()))
        return train_one_step(model, partial(loss, name, inputs), only_some=True)

    attempt(row, "cut", cut)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "cut"

        def saved() -> str:
            save_with_outputs(bp.to_deterministic(model), directory, inputs)
            found = fresh_process(__file__, "--load", name, str(directory))
            return found.get("loaded", found.get("error", "")).replace(str(directory), "the directory")

        attempt(row, "loaded", saved)
    attempt(row, "back", lambda: back(bp.to_variational(build(name)), stock, keys, inputs))
    return row


def load(name: str, directory: Path) -> dict[str, str]:
    """Whether the directory loads to the outputs that it holds."""
    import torch

    import bayesprune as bp

    torch.set_num_threads(1)
    found: dict[str, str] = {}
    loader: Callable[[Path], Any] = lambda path: bp.load(path, model=build(name))  # noqa: E731
    attempt(found, "loaded", partial(gives_what_was_saved, loader, directory, inputs_for(name)))
    return found


def page(done: dict[str, Any]) -> str:
    """The page of the documentation."""
    rows = done["rows"]
    versions = ", ".join(f"{name} {number}" for name, number in done["versions"].items())
    lines = [
        "# Models of torchvision",
        "",
        "Classification, segmentation and detection, with random weights and small images, and YOLO of ultralytics:",
        f"`python tests/benchmarks/torchvision_zoo.py` ({versions}).",
        "They are plain modules to this library, which knows neither torchvision nor ultralytics. The detectors of",
        "torchvision have frozen batch norms in their backbones, as pretrained ones do.",
        "",
        *(f"- **{name}**: {what}" for name, what in CHECKS.items()),
        "",
    ]
    notes: list[str] = []
    for kind in dict.fromkeys(case.kind for case in MODELS.values()):
        names = [name for name in rows if MODELS[name].kind == kind]
        if not names:
            continue
        counts = [sum(rows[name].get(check, "").startswith(OK) for name in names) for check in CHECKS]
        lines += [
            f"## {kind.capitalize()}",
            "",
            "| model | " + " | ".join(CHECKS) + " |",
            "|---|" + "---|" * len(CHECKS),
            f"| of {len(names)} | " + " | ".join(map(str, counts)) + " |",
        ]
        for name in names:
            cells = []
            for check in CHECKS:
                value = rows[name].get(check, rows[name].get("crash", "not run"))
                if not value.startswith(OK):
                    notes.append(f"{len(notes) + 1}. {name}, {check}: {value}")
                    value = f"no [{len(notes)}]"
                elif check == "cut":
                    value = f"{rows[name]['kept']:.2f}"
                cells.append(value.removeprefix(f"{OK}, "))
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    if missing := [name for name in MODELS if name not in rows]:
        lines += [f"Not run yet: {', '.join(missing)}.", ""]
    lines += ["## What does not work, and why", "", *(notes or ["Nothing."]), ""]
    lines += ["## What keeps more than half of its MACs, and what stays whole", ""]
    limits = []
    for name, row in rows.items():
        if row.get("kept", 0) > 1:
            limits.append(f"- **{name}** ({row['kept']:.2f}): half was planned, and it finds more boxes than before")
        elif row.get("kept", 0) > CUT + 0.005:
            reasons = sorted(row["left_whole"].items(), key=lambda item: -item[1])[:4]
            shown = "; ".join(f"{reason} ({layers} layers)" for reason, layers in reasons)
            limits.append(f"- **{name}** ({row['kept']:.2f}): {shown}")
    return "\n".join([*lines, *(limits or ["Nothing."])]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=MODELS)
    parser.add_argument("--out", type=Path, default=DOCS / "torchvision")
    parser.add_argument("--row", choices=MODELS, help="print the row of one model as JSON")
    parser.add_argument("--load", nargs=2, help="print whether what a model was saved to loads")
    args = parser.parse_args()
    if args.row:
        print(json.dumps(run_model(args.row)))
    elif args.load:
        print(json.dumps(load(args.load[0], Path(args.load[1]))))
    else:
        packages = ["torch", "torchvision", "torch-pruning"]
        left_out = set()
        if find_spec("ultralytics"):
            packages.append("ultralytics")
        else:
            left_out = {name for name, case in MODELS.items() if case.kind == "ultralytics"}
        results = args.out.with_suffix(".json")
        done = json.loads(results.read_text())["rows"] if results.is_file() else {}
        only = args.only or [name for name in MODELS if name not in done.keys() | left_out]
        run_rows(__file__, MODELS, only, args.out, packages=packages, page=page)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
