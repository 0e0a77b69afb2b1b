"""What the tables of model zoos share: one process a row, rows that are kept, checks that say yes or why not."""

import json
import multiprocessing
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).absolute().parents[2]
DOCS = ROOT / "docs" / "benchmarks"
TIMEOUT = 900
OK, NONE, ROUNDED = "yes", "-", "yes but for rounding"
ROUNDING = 1e-6  # of the largest output
CUT = 0.5  # of the MACs


def outputs(model: Any, inputs: Any) -> list[Any]:
    """Every tensor that the model gives in evaluation mode: for keywords, a tuple of arguments, or one tensor."""
    import torch

    from bayesprune.foundation.model import run_forward, tensors_in

    torch.manual_seed(2)  # some models draw in evaluation mode, too
    with torch.no_grad():
        return [tensor.clone() for tensor in tensors_in(run_forward(model.eval(), inputs))]


def is_equal(found: list[Any], expected: list[Any]) -> bool:
    """Whether both hold the same tensors, to the last bit."""
    import torch

    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def save_with_outputs(model: Any, directory: Path, inputs: Any) -> Path:
    """Saves the model, and beside it what it gives for the inputs."""
    from safetensors.torch import save_file

    import bayesprune as bp

    bp.save(model, directory)
    found = {f"{i:03}": tensor.contiguous() for i, tensor in enumerate(outputs(model, inputs))}
    save_file(found, directory / "expected")
    return directory


def gives_what_was_saved(load: Callable[[Path], Any], directory: Path, inputs: Any) -> str:
    """Whether the loaded model gives what the saved one gave: to the last bit, or but for rounding.

    A process that reads weights in place may find them at other addresses, and products of matrices round otherwise.
    Copied, they stand where torch puts them, and the last bit is right again.
    """
    from safetensors.torch import load_file

    expected = [tensor for _, tensor in sorted(load_file(directory / "expected").items())]
    model = load(directory)
    if is_equal(found := outputs(model, inputs), expected):
        return OK
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    is_rounding = is_equal(outputs(model, inputs), expected)
    difference = farthest(found, expected)
    return ROUNDED if is_rounding or difference <= ROUNDING else f"other outputs than before, by {difference:.1e}"


def farthest(found: list[Any], expected: list[Any]) -> float:
    """How far tensors are from others, over the largest of each; infinity where their shapes differ."""
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(found, expected, strict=True) if b.numel()]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)


def train_one_step(model: Any, loss: Callable[[Any], Any], *, only_some: bool = False) -> str:
    """One step of AdamW with the KL; means and stds have to move and stay finite.

    Args:
        model: A variational model.
        loss: Its loss.
        only_some: Whether some posteriors may stay where they are, those that this input does not reach.
    """
    import torch

    import bayesprune as bp
    from bayesprune.layers import named_posteriors

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    attachment = bp.attach(optimizer, model, num_data=100)
    posteriors = [p for p in named_posteriors(model) if p.is_weight]
    means = [p.mean.detach().clone() for p in posteriors]
    stds = [p.log_std.detach().clone() for p in posteriors]
    model.train()
    torch.manual_seed(3)
    loss(model).backward()
    optimizer.step()
    attachment.detach()
    model.eval()
    moved = 0
    for p, mean, std in zip(posteriors, means, stds, strict=True):
        if not (torch.isfinite(p.mean).all() and torch.isfinite(p.log_std).all()):
            return f"{p.name} is not finite after the step"
        if p.mean.requires_grad and (torch.equal(p.mean, mean) or torch.equal(p.log_std, std)):
            if not only_some:
                return f"{p.name} did not move"
        else:
            moved += 1
    return OK if moved else "nothing moved"


def back(model: Any, stock: list[type], keys: list[str], inputs: Any) -> str:
    """Stock classes and keys again, with the output of the posterior means."""
    import bayesprune as bp

    before = outputs(model, inputs)
    bp.to_deterministic(model)
    if [type(module) for module in model.modules()] != stock or list(model.state_dict()) != keys:
        return "other classes or keys than before"
    return OK if is_equal(outputs(model, inputs), before) else "the output changed"


HALF_OR_MORE = (CUT, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


def as_far_as_it_goes(model: Any, inputs: Any, levels: Collection[float] = HALF_OR_MORE) -> tuple[Any, str]:
    """Cuts to the first level of the MACs that the model lets it reach, and says what limits it."""
    import bayesprune as bp
    from bayesprune.errors import InfeasibleTargetError

    limit = ""
    least = 0.0
    for kept in levels:
        if kept < least:
            continue
        try:
            return bp.prune_channels(model, inputs, target=f"macs={kept}"), limit
        except InfeasibleTargetError as error:
            last, limit = error, limit or str(error)
            if found := re.search(r"at least ([\d.]+) of the macs stay", str(error)):
                least = float(found[1])
    raise last


def attempt(row: dict[str, Any], name: str, check: Callable[[], str]) -> bool:
    """Runs one check; the row then holds "yes", or why not."""
    try:
        row[name] = check()
    except Exception as error:  # noqa: BLE001 (whatever goes wrong is the row's content)
        row[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:900]
    return row[name].startswith(OK)


def fresh_process(program: str, *args: str) -> dict[str, Any]:
    """What the program prints as JSON in a process of its own; {"error": ...} where it prints none."""
    command = [sys.executable, program, *args]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {TIMEOUT} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"error": f"exit status {done.returncode}: {last}"[:400]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_rows(
    program: str,
    names: Collection[str],
    only: Collection[str] | None,
    out: Path,
    *,
    packages: Collection[str],
    page: Callable[[dict[str, Any]], str],
) -> None:
    """Runs the rows that the results file has not, or `only` these, and writes file and page after each."""
    done = json.loads(out.with_suffix(".json").read_text()) if out.with_suffix(".json").is_file() else {"rows": {}}
    for name in only or [name for name in names if name not in done["rows"]]:
        start = time.perf_counter()
        row = fresh_process(program, "--row", name)
        done["rows"][name] = {"crash": row["error"]} if "error" in row else row
        versions = {package: version(package) for package in packages} | {"python": platform.python_version()}
        done["versions"] = done.get("versions", {}) | versions
        done["rows"] = {name: done["rows"][name] for name in names if name in done["rows"]}
        out.with_suffix(".json").write_text(json.dumps(done, indent=1) + "\n")
        out.with_suffix(".md").write_text(page(done))
        seen = {key: value[:100] for key, value in row.items() if isinstance(value, str)}
        print(f"{name}: {seen} ({time.perf_counter() - start:.0f} s)", flush=True)


def in_process(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """What the function returns in a process that starts with nothing but the imports of this one."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, args))
    process.start()
    sender.close()
    found = {"crash": f"not done after {TIMEOUT} s"}
    if receiver.poll(TIMEOUT):
        try:
            found = receiver.recv()
        except EOFError:
            process.join()
            found = {"crash": f"exit status {process.exitcode}"}
    process.kill()
    process.join()
    return found


def _send(sender: Any, function: Callable[..., dict[str, Any]], args: tuple[Any, ...]) -> None:
    row: dict[str, Any] = {}
    if attempt(row, "crash", lambda: sender.send(function(*args)) or OK):
        return
    sender.send(row)
