"""What the benchmark programs share: where the data is, and results files that a second start continues."""

import json
import os
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch


def spread(values: Sequence[float], digits: int = 1, *, of_mean: bool = False) -> str:
    """Mean ± standard deviation of several values, or ± the standard error of their mean; one value alone."""
    deviation = stdev(values) / (len(values) ** 0.5 if of_mean else 1) if len(values) > 1 else None
    return f"{mean(values):,.{digits}f}" + ("" if deviation is None else f" ± {deviation:,.{digits}f}")


def parser(description: str, out: str) -> ArgumentParser:
    """Options of every benchmark: --data-dir (or BAYESPRUNE_DATA), --out, --seeds, --table."""
    options = ArgumentParser(description=description)
    options.add_argument("--data-dir", type=Path, default=os.environ.get("BAYESPRUNE_DATA"), help="or BAYESPRUNE_DATA")
    options.add_argument("--out", type=Path, default=Path(out), help=f"results file ({out})")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--table", action="store_true", help="only write the table from the results file")
    return options


def read(path: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The finished runs of a results file, none where there is no file.

    Raises:
        SystemExit: the file's runs were made with other settings.
    """
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["settings"] != json.loads(json.dumps(settings)):
        raise SystemExit(
            f"{path} holds runs with the settings {found['settings']}; expected {settings}. Use another --out."
        )
    return found["runs"]


def write(path: Path, settings: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    """Replaces the results file in one step, so that a stopped program leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"settings": settings, "runs": runs}, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def keep(value: Any, path: Path) -> None:
    """Saves what later runs load in one step, so that a stopped program leaves a whole file or none."""
    torch.save(value, partial := path.with_suffix(".partial"))
    partial.replace(path)
