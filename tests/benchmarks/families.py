"""The table of model families in docs/benchmarks/families.md: what works for each family of transformers.

    python tests/benchmarks/families.py [--jobs 2]

Every family whose tiny model builds from a small config is tried, with random weights; no network is needed. Each has a
process of its own, so that a crash costs one row, and what was saved is loaded in another one that never saw the model.
Rows that docs/benchmarks/families.json holds already are kept; delete the file, or name families with `--only`, to run
them again.
"""

import argparse
import json
import multiprocessing
import platform
import sys
import tempfile
import time
import warnings
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from families_inputs import find_inputs
from families_models import build, families, model_class
from families_page import KEPT, page
from rows import (
    DOCS,
    NONE,
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

LEVELS = (KEPT, 0.8, 0.9, 0.95, 0.99)  # of the MACs, tried one after the other
MOST_PARAMETERS = 8_000_000  # of a family whose sizes are not made small by their names; it is not tried
PRELOADED = ("bert", "llama", "clip", "whisper", "detr", "mixtral", "bart", "wav2vec2", "llava")


def loss(inputs: dict[str, Any], model: Any) -> Any:
    """The model's own loss where it has one, else the mean square of all that it gives."""
    from bayesprune.foundation.model import tensors_in

    found = model(**inputs)
    own = getattr(found, "loss", None)
    if own is not None and own.requires_grad:
        return own.mean()
    return sum(t.float().square().mean() for t in tensors_in(found) if t.is_floating_point() and t.requires_grad)


def run_family(model_type: str, folder: Path) -> dict[str, Any]:
    """The row of one family, all checks but those of the process that loads what is saved to the folder here."""
    import torch

    import bayesprune as bp

    row: dict[str, Any] = {}
    try:
        kind, row["auto"] = model_class(model_type)
        row["model"] = kind.__name__
        model = build(model_type, most_parameters=MOST_PARAMETERS)
        inputs = find_inputs(model)
    except Exception as error:  # noqa: BLE001 (why it is not tried)
        row["not_built"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        return row
    plain = without_labels(inputs)
    if "decoder_input_ids" not in plain and "labels" in inputs and model.config.is_encoder_decoder:
        plain["decoder_input_ids"] = inputs["labels"]
    row["inputs"] = sorted(inputs)
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    stock, keys = [type(module) for module in model.modules()], list(model.state_dict())
    before = outputs(model, inputs)
    bp.to_variational(model, std="per_channel")
    table = bp.conversion_table(model)
    row["layers"] = {status: sum(r.status == status for r in table) for status in ("converted", "fallback", "left")}
    row["left"] = sorted({f"{r.type}: {r.reason}" for r in table if r.status == "left"})
    attempt(row, "exact", lambda: OK if is_equal(outputs(model, inputs), before) else "the output changed")
    attempt(row, "step", lambda: train_one_step(model, partial(loss, inputs), only_some=True))
    attempt(row, "moments", lambda: moments(model, plain))

    def masked() -> str:
        bp.prune_weights(model, "weights=0.5")
        save_with_outputs(model, folder / "masked", inputs)
        return OK

    attempt(row, "masked", masked)
    attempt(row, "back", lambda: back(model, stock, keys, inputs))
    fresh = build(model_type)
    fresh.load_state_dict(dense)
    bp.to_variational(fresh, std="per_channel")

    def cut() -> str:
        report, row["limit"] = as_far_as_it_goes(fresh, plain, LEVELS)
        row["kept"] = round(report.achieved["macs"], 3)
        row["heads_removed"] = sum(map(len, report.removed_heads.values()))
        row["neurons_removed"] = sum(map(len, report.removed.values()))
        row["left_whole"] = sorted(set(report.left_whole.values()))
        return train_one_step(fresh, partial(loss, inputs), only_some=True)

    def keep_cut() -> str:
        save_with_outputs(bp.to_deterministic(fresh), folder / "cut", inputs)
        return OK

    if attempt(row, "cut", cut):
        attempt(row, "cut_loaded", keep_cut)
    torch.save(inputs, folder / "inputs")
    return row


def without_labels(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if not name.endswith("labels") and name != "return_loss"}


def moments(model: Any, inputs: dict[str, Any]) -> str:
    """Whether one pass gives means and variances that are finite, and some variance."""
    import torch

    from bayesprune.foundation.model import tensors_in
    from bayesprune.moments import Moments
    from bayesprune.prediction.predict import sampling

    with torch.no_grad(), sampling(model.eval(), "moments"):
        found = [tensor for tensor in tensors_in(model(**inputs)) if isinstance(tensor, Moments)]
    if not found:
        return "no output has a variance"
    variances = [t.variance for t in found if t.variance is not None]
    if not all(part.isfinite().all() for part in (*variances, *(t.mean for t in found))):
        return "mean or variance is not finite"
    return OK if any((variance > 0).any() for variance in variances) else "no variance"


def load(folder: Path, auto_name: str, is_cut: bool) -> dict[str, str]:
    """Whether what is in the folder loads by both routes to the outputs that it holds; run in a fresh process."""
    import torch
    import transformers

    import bayesprune as bp

    inputs = torch.load(folder / "inputs", weights_only=True)
    auto = getattr(transformers, auto_name)
    found: dict[str, str] = {}
    for column, directory in {"masked": folder / "masked", "cut_loaded": folder / "cut"}.items():
        if not directory.is_dir():
            continue
        result: dict[str, Any] = {}
        for route, loader in (("load", bp.load), ("from_pretrained", auto.from_pretrained)):
            attempt(result, route, partial(gives_what_was_saved, loader, directory, inputs))
        wrong = [f"{route}: {said}" for route, said in result.items() if not said.startswith(OK)]
        found[column] = "; ".join(wrong) or max(result.values(), key=len)
    if is_cut and auto_name in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM") and "input_ids" in inputs:
        attempt(found, "generate", lambda: generate(folder, without_labels(inputs)))
    return found


def generate(folder: Path, inputs: dict[str, Any]) -> str:
    """Whether the cut model generates the same tokens with a cache as without; where not, how the uncut one does."""
    differ = "other tokens with a cache than without"
    if not caches_alter(folder / "cut", inputs):
        return OK
    return f"{differ}, before the cut as well" if caches_alter(folder / "masked", inputs) else differ


def caches_alter(directory: Path, inputs: dict[str, Any]) -> bool:
    import bayesprune as bp

    options = {"max_new_tokens": 4, "do_sample": False}
    if "input_features" in inputs:  # a token for each stretch of the sound, and none behind its end
        inputs = {**inputs, "input_ids": inputs["input_ids"][:, :4]}
    model = bp.load(directory)
    found = [model.generate(**inputs, **options, use_cache=use_cache) for use_cache in (True, False)]
    return not is_equal(found[:1], found[1:])


def run_row(model_type: str) -> dict[str, Any]:
    """The row of one family, from a process that makes and saves it, and another one that loads it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        row = in_process(run_family, model_type, folder)
        if (folder / "inputs").is_file():
            loaded = in_process(load, folder, row["auto"], row.get("cut_loaded") == OK)
            for column in ("masked", "cut_loaded"):
                if row.get(column) == OK:
                    row[column] = loaded.get(column, loaded.get("crash", "the loading process said nothing"))
            row["generate"] = loaded.get("generate", NONE)
        row.setdefault("cut_loaded", "not cut")
    return {key: value for key, value in row.items() if value not in ("", [], None)}


def main() -> None:
    known = families()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=known, metavar="FAMILY")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=DOCS / "families")
    args = parser.parse_args()
    preload()
    file = args.out.with_suffix(".json")
    done = json.loads(file.read_text()) if file.is_file() else {"rows": {}}
    wanted = args.only or [name for name in known if name not in done["rows"]]
    start = time.perf_counter()
    rows: Any = multiprocessing.get_context("fork").SimpleQueue()
    workers = [
        multiprocessing.get_context("fork").Process(target=work, args=(wanted[i :: args.jobs], known, rows))
        for i in range(args.jobs)
    ]
    for worker in workers:
        worker.start()
    for _ in wanted:
        name, row = rows.get()
        done["rows"] = dict(sorted({**done["rows"], name: row}.items()))
        packages = ("torch", "transformers", "torch-pruning")
        done["versions"] = {p: version(p) for p in packages} | {"python": platform.python_version()}
        file.write_text(json.dumps(done, indent=1) + "\n")
        args.out.with_suffix(".md").write_text(page(done))
        seen = {key: value[:100] for key, value in row.items() if isinstance(value, str)}
        print(f"{name}: {seen} ({time.perf_counter() - start:.0f} s)", flush=True)


def work(names: list[str], known: dict[str, str], rows: Any) -> None:
    for name in names:
        rows.put((name, run_row(known[name])))


def preload() -> None:
    """Imports here what every row needs, so that its process does not."""
    import torch
    import transformers
    import transformers.trainer_utils
    from transformers.models.auto import modeling_auto  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    for model_type in PRELOADED:
        model_class(model_type)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
