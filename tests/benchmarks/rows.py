"""What the tables of model zoos share: one process a row, rows that are kept, checks that say yes or why not."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).absolute().parents[2]
DOCS = ROOT / "docs" / "benchmarks"
TIMEOUT = 900
OK, NONE = "yes", "-"


def outputs(model: Any, inputs: Any) -> list[Any]:
    """Every tensor that the model gives in evaluation mode for these inputs: keywords, or one tensor."""
    import torch

    from bayesprune.prune.trace import tensors_in

    with torch.no_grad():
        found = model.eval()(**inputs) if isinstance(inputs, dict) else model.eval()(inputs)
        return [tensor.clone() for tensor in tensors_in(found)]


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
    """Whether the loaded model gives what the saved one gave."""
    from safetensors.torch import load_file

    expected = [tensor for _, tensor in sorted(load_file(directory / "expected").items())]
    return OK if is_equal(outputs(load(directory), inputs), expected) else "other outputs than before"


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


def attempt(row: dict[str, Any], name: str, check: Callable[[], str]) -> bool:
    """Runs one check; the row then holds "yes", or why not."""
    try:
        row[name] = check()
    except Exception as error:  # noqa: BLE001 (whatever goes wrong is the row's content)
        row[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:900]
    return row[name].startswith(OK)


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
