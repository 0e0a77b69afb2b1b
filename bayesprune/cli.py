"""The command line: `bayesprune compress`, `bayesprune report`, `bayesprune inspect`."""

import logging
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader
from typer import Option

from bayesprune import pipeline
from bayesprune.data import load_data
from bayesprune.errors import BayespruneError
from bayesprune.evaluate import Report
from bayesprune.evaluate.plots import require_matplotlib
from bayesprune.storage.load import read as read_saved

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Make a trained model smaller."
)

_CONSOLE = Console(width=None if sys.stdout.isatty() else 120)  # files and pipes have no width of their own


class ConsoleProgress:
    """Stages as lines; epochs as a bar with the time remaining on a terminal, as a line each elsewhere."""

    def __init__(self, console: Console, num_stages: int) -> None:
        self._console = console
        self._num_stages = num_stages
        self._stage = 0
        self._loss = float("nan")

    def stage(self, title: str) -> None:
        """A new stage begins."""
        self._stage += 1
        self._console.print(f"[bold]\\[{self._stage}/{self._num_stages}] {title}[/bold]", highlight=False)

    def say(self, text: str) -> None:
        """One line about the present stage."""
        self._console.print(f"      {text}", markup=False, highlight=False)

    def loss(self, value: float) -> None:
        """The loss of the present batch."""
        self._loss = value

    def batches(self, loader: DataLoader[Any], num_epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All batches of all epochs, shown as they go by."""
        columns = (
            TextColumn("      epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
        )
        with Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal) as bar:
            task = bar.add_task("", total=num_epochs * len(loader), epoch=f"1/{num_epochs}", loss=self._loss)
            for epoch in range(1, num_epochs + 1):
                for batch in loader:
                    yield batch
                    bar.update(task, advance=1, epoch=f"{epoch}/{num_epochs}", loss=self._loss)
                if not self._console.is_terminal:
                    self.say(f"epoch {epoch}/{num_epochs}: loss {self._loss:.3f}")


@app.command()
def compress(
    out: Annotated[Path, Option(help="Directory of the compressed model and its report.")],
    model: Annotated[str, Option(help="timm:NAME, a timm architecture.")] = "timm:resnet10t",
    checkpoint: Annotated[Path | None, Option(help="Trained weights, .safetensors or .pth; else trained here.")] = None,
    pretrained: Annotated[bool, Option(help="Start from timm's pretrained weights (needs a network).")] = False,
    data: Annotated[str, Option(help="digits, torch/NAME, hfds/NAME or an image folder.")] = "digits",
    data_dir: Annotated[Path | None, Option(help="Where torch/NAME and hfds/NAME are kept.")] = None,
    download: Annotated[bool, Option(help="Let torchvision download torch/NAME into the data directory.")] = False,
    augment: Annotated[bool, Option(help="Random crops and mirror images in training.")] = False,
    image_size: Annotated[int | None, Option(help="Side of the images. [default: that of the data]")] = None,
    target: Annotated[str | None, Option(help="Kept fraction or threshold: macs=0.5, params=0.5, snr=1.")] = None,
    tolerance: Annotated[
        float | None, Option(help="In place of a target: find the smallest model that loses at most this accuracy.")
    ] = None,
    epochs: Annotated[int, Option(min=1, help="Epochs of each training stage.")] = 8,
    train_lr: Annotated[float, Option(help="Learning rate of training without a checkpoint.")] = 3e-3,
    lr: Annotated[float, Option(help="Learning rate of the fine-tuning stages.")] = 1e-3,
    batch_size: Annotated[int, Option(min=1)] = 64,
    std: Annotated[str, Option(help="per_weight, rank_one or per_channel.")] = "per_channel",
    estimator: Annotated[str, Option(help="auto, weight_sampling, flipout, local_reparameterization.")] = "auto",
    seed: Annotated[int, Option()] = 0,
    device: Annotated[str | None, Option(help="cpu, cuda, ... [default: cuda if there is one]")] = None,
) -> None:
    """Compress a model: train or load it, learn its posteriors, remove channels, fine-tune, save, report."""
    recipe = pipeline.Recipe(
        target=_target(target, tolerance),
        tolerance=tolerance,
        num_epochs=epochs,
        train_lr=train_lr,
        lr=lr,
        std=std,
        estimator=estimator,
    )
    if not model.startswith("timm:"):
        raise typer.BadParameter(f"{model!r}; expected timm:NAME, such as timm:resnet18.", param_hint="--model")
    require_matplotlib()  # for the report, which comes last
    _check_writable(out)
    torch.manual_seed(seed)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    progress = ConsoleProgress(_CONSOLE, pipeline.NUM_STAGES)
    host = _timm_host()
    name = model.removeprefix("timm:")
    is_trained = checkpoint is not None
    loaded = load_data(
        data,
        root=data_dir,
        image_size=image_size,
        batch_size=batch_size,
        seed=seed,
        augment=augment,
        download=download,
        config=host.data_config(name) if is_trained or pretrained else None,
    )
    network = host.create(
        name,
        num_classes=loaded.num_classes,
        input_size=loaded.input_size,
        checkpoint=checkpoint,
        pretrained=pretrained,
    ).to(where)
    progress.say(f"{model} on {loaded.description}")
    result = pipeline.run(network, loaded, recipe, out, progress, name=model, is_trained=is_trained)
    _CONSOLE.print(result.table())
    progress.say(f"report: {out / 'report.html'}")
    progress.say(f'load the model: import bayesprune; model = bayesprune.load("{out}")')


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="What compress wrote.")]) -> None:
    """Show the report of a compressed model."""
    path = directory / "report.json"
    if not path.is_file():
        raise typer.BadParameter(f"no report.json in {str(directory)!r}; it is written by bayesprune compress.")
    _CONSOLE.print(Report.from_json(path.read_text(encoding="utf-8")).table())


@app.command()
def inspect(directory: Annotated[Path, typer.Argument(help="What bayesprune.save or compress wrote.")]) -> None:
    """Show what a saved directory holds, without building the model: base, shapes, zeros."""
    saved = read_saved(directory)
    base = "a plain module" if saved.base is None else f"{saved.base.library} model {saved.base.name}"
    total = sum(tensor.numel() for tensor in saved.tensors.values())
    nonzero = sum(int(tensor.count_nonzero()) for tensor in saved.tensors.values())
    versions = ", ".join(f"{name} {version}" for name, version in saved.versions.items())
    table = Table("tensor", "shape", "dtype", "nonzero", title=f"{directory}: {base}", caption=f"saved with {versions}")
    for name, tensor in saved.tensors.items():
        share = int(tensor.count_nonzero()) / max(1, tensor.numel())
        table.add_row(name, "x".join(map(str, tensor.shape)), str(tensor.dtype).removeprefix("torch."), f"{share:.1%}")
    _CONSOLE.print(table)
    _CONSOLE.print(f"{total:,} values, {nonzero:,} of them not zero", highlight=False)


def main() -> None:
    """Runs the command line; what the user can mend is told in one sentence."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.captureWarnings(True)
    try:
        app()
    except (BayespruneError, ValueError, OSError, ImportError, FloatingPointError) as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False)
        raise SystemExit(1) from error


def _target(target: str | None, tolerance: float | None) -> dict[str, float] | None:
    if tolerance is not None:
        if target is not None:
            raise typer.BadParameter(f"got --target {target} and --tolerance {tolerance}; give one of them.")
        return None
    name, _, value = (target or "macs=0.5").partition("=")
    try:
        return {name: float(value)}
    except ValueError:
        expected = "expected macs=0.5, params=0.5 or snr=1."
        raise typer.BadParameter(f"{target!r}; {expected}", param_hint="--target") from None


def _check_writable(directory: Path) -> None:
    """Fails now, not after minutes of training."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass


def _timm_host() -> ModuleType:
    from bayesprune.hosts import timm as host  # an extra: the error says how to install it

    return host


if __name__ == "__main__":
    main()
