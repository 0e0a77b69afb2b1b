"""The commands, and where a job is, on a terminal or in a file."""

import logging
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor
from typer import Option

from bayesprune.app import pipeline
from bayesprune.app.checkpoints import CheckpointEvery, Checkpoints, ResumableTask
from bayesprune.app.jobs import DEFAULTS, Request, library_of, prepare
from bayesprune.errors import BayespruneError, StorageError
from bayesprune.foundation.text import printable
from bayesprune.reports import Report
from bayesprune.reports.plots import require_matplotlib
from bayesprune.storage.coding import require_coding
from bayesprune.storage.load import read as read_saved
from bayesprune.storage.reading import TENSORS, read_bounded

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help="Make a trained model smaller."
)

_LONGEST_LINE, _MAX_LINES = 1_000, 60
_CONSOLE = Console(width=None if sys.stdout.isatty() else 120)  # files and pipes have no width of their own


@app.command()
def compress(
    out: Annotated[Path, Option(help="Directory of the compressed model and its report.")],
    model: Annotated[
        str, Option(help="timm:NAME, a timm architecture; hf:NAME, a folder or a model of the Hub.")
    ] = "timm:resnet10t",
    task: Annotated[str | None, Option(help="With hf: text-classification, causal-lm or image-classification.")] = None,
    checkpoint: Annotated[
        Path | None, Option(help="With timm: trained weights, .safetensors or .pth; else trained here.")
    ] = None,
    pretrained: Annotated[bool, Option(help="With timm: start from its pretrained weights (needs a network).")] = False,
    train: Annotated[bool, Option("--train", help="Train first, even where the weights fit the data.")] = False,
    data: Annotated[
        str | None,
        Option(
            help="Images: digits, torch/NAME, hfds/NAME or a folder. Texts: a CSV, TSV, JSON or JSON lines file (for "
            "causal-lm .txt too), a folder of such files, hfds/NAME or hfds/NAME:CONFIGURATION.",
            show_default="digits",
        ),
    ] = None,
    data_dir: Annotated[Path | None, Option(help="Where images of torch/NAME and hfds/NAME are kept.")] = None,
    download: Annotated[bool, Option(help="Let torchvision download torch/NAME into the data directory.")] = False,
    augment: Annotated[bool, Option(help="Random crops and mirror images in training.")] = False,
    image_size: Annotated[
        int | None, Option(min=1, help="Side of the images.", show_default="that of the data")
    ] = None,
    text_column: Annotated[str | None, Option(help="Column of texts.", show_default="text, sentence, ...")] = None,
    label_column: Annotated[str | None, Option(help="Column of labels.", show_default="label, labels, ...")] = None,
    max_length: Annotated[
        int | None, Option(help="Longest text, or the blocks of causal-lm, in tokens.", show_default="128")
    ] = None,
    target: Annotated[
        str | None,
        Option(
            help="Kept fraction or threshold: macs=0.5, params=0.5, snr=1; of single weights: weights=0.2. With "
            "--tolerance only what goes: macs (channels and heads) or weights."
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        Option(
            help="In place of a fraction: find the smallest model that loses at most this accuracy (0.01 is one "
            "point), or whose perplexity rises by at most this part of itself."
        ),
    ] = None,
    granularity: Annotated[
        str | None, Option(help="What may go, with commas between.", show_default="heads,mlp,width; with hf: heads,mlp")
    ] = None,
    uniform: Annotated[
        bool, Option("--uniform", help="The same share everywhere: the config of an hf model can say the sizes.")
    ] = False,
    distill: Annotated[
        bool,
        Option(help="Let the smaller model learn from the dense one's outputs as it recovers, not from labels alone."),
    ] = True,
    gates: Annotated[
        bool, Option("--gates", help="With weights: gates that learn choose them, for targets of a few per cent.")
    ] = False,
    bits: Annotated[
        int | None,
        Option(min=2, max=12, help="After the fine-tuning, round the weights to so many bits by their posterior."),
    ] = None,
    train_rounded: Annotated[
        bool, Option(help="With --bits: train rounded weights on for --epochs, held to their grids.")
    ] = True,
    coding: Annotated[
        str | None, Option(help="entropy: the smallest file of the result, without loss; needs constriction.")
    ] = None,
    levels: Annotated[
        str | None,
        Option(help="Smaller versions to save beside the result, as shares of it: macs=0.7,macs=0.4 or weights=0.5."),
    ] = None,
    corruptions: Annotated[
        bool, Option("--corruptions", help="Of images: add to the report what was lost on corrupted test images.")
    ] = False,
    epochs: Annotated[
        int | None, Option(min=1, help="Epochs of each training stage.", show_default="8; with hf: 3")
    ] = None,
    train_lr: Annotated[
        float | None, Option(help="Learning rate of training the dense model.", show_default="3e-3; with hf: 5e-5")
    ] = None,
    lr: Annotated[
        float | None, Option(help="Learning rate of the fine-tuning stages.", show_default="1e-3; with hf: 5e-5")
    ] = None,
    batch_size: Annotated[
        int | None, Option(min=1, help="Examples in a batch.", show_default="64; with hf: 32")
    ] = None,
    std: Annotated[
        str | None,
        Option(
            help="With weights or snr: per_weight, rank_one or per_channel.",
            show_default="per_weight; snr: per_channel",
        ),
    ] = None,
    estimator: Annotated[
        str, Option(help="With weights or snr: auto, weight_sampling, flipout, local_reparameterization.")
    ] = "auto",
    seed: Annotated[int, Option(min=0)] = 0,
    device: Annotated[str | None, Option(help="cpu, cuda, ...", show_default="cuda if there is one")] = None,
    checkpoint_every: Annotated[
        str, Option(help="Steps (500) or a time (30s, 10min, 2h); with hf: only the ends of trainings are kept.")
    ] = "10min",
) -> None:
    """Compress a model: train or load it, learn its posteriors where they decide, remove, fine-tune, save, report.

    Channels and heads for a budget are chosen by calibration data; single weights, and snr=1, by stds learned first.

    After a kill the same command goes on from the checkpoints in OUT.checkpoints, a folder beside OUT.
    """
    default = DEFAULTS[library_of(model)]
    wanted, by = _target(target, tolerance)
    if coding not in (None, "entropy"):
        raise typer.BadParameter(f"{coding!r}; expected entropy, or nothing for plain tensors.", param_hint="--coding")
    if coding is not None:
        require_coding()  # for the result, which comes last
    recipe = pipeline.Recipe(
        target=wanted,
        tolerance=tolerance,
        num_epochs=epochs or default.num_epochs,
        train_lr=default.train_lr if train_lr is None else train_lr,
        lr=default.lr if lr is None else lr,
        std=std,
        estimator=estimator,
        granularity=default.granularity if granularity is None else _parts(granularity),
        uniform=uniform,
        distill=distill,
        by=by,
        bits=bits,
        train_rounded=train_rounded,
        coding="entropy" if coding else None,
        levels=_parts(levels) if levels else (),
        corruptions=corruptions,
        gates=gates,
    )
    if corruptions and task in ("text-classification", "causal-lm"):
        raise typer.BadParameter("it is for images, and this task has texts; leave it out.", param_hint="--corruptions")
    if not recipe.learns_stds and std is not None:
        raise typer.BadParameter(
            "--std is for stds that are learned; a budget of MACs or parameters, and --gates, learn none. Leave it "
            "out, or give a --target of weights or snr."
        )
    request = Request(
        model=model,
        task=task,
        checkpoint=checkpoint,
        pretrained=pretrained,
        train=train,
        data=data,
        data_dir=data_dir,
        download=download,
        augment=augment,
        image_size=image_size,
        text_column=text_column,
        label_column=label_column,
        max_length=max_length,
        batch_size=batch_size or default.batch_size,
        seed=seed,
        device=device,
    )
    every = CheckpointEvery.parse(checkpoint_every)
    require_matplotlib()  # for the report, which comes last
    _check_apart(out, model, checkpoint)
    _check_writable(out)
    torch.manual_seed(seed)
    job = prepare(request)
    _CONSOLE.quiet = not job.task.is_main
    progress = ConsoleProgress(_CONSOLE, recipe.num_stages)
    asked = {name: str(value) for name, value in {**asdict(request), **asdict(recipe)}.items()}
    beside = out.absolute().with_name(f"{out.absolute().name}.checkpoints")
    checkpoints = Checkpoints(beside, asked, every, generators=job.task.generators, is_writer=job.task.is_main)
    resumable = ResumableTask(job.task, checkpoints)
    progress.say(f"{model} on {job.task.description}")
    if job.untrained is not None:
        progress.say(f"the model is trained first: {job.untrained}")
    is_trained = job.untrained is None
    result = pipeline.run(job.model, resumable, recipe, out, progress, name=model, is_trained=is_trained).report
    if result is not None:
        _CONSOLE.print(result.table())
        progress.say(f"report: {out / 'report.html'}")
        progress.say(f"load the model: {resumable.loading_instructions(out)}")
    resumable.close()


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="What compress wrote.")]) -> None:
    """Show the report of a compressed model."""
    path = directory / "report.json"
    if not path.is_file():
        raise typer.BadParameter(f"no report.json in {str(directory)!r}; it is written by bayesprune compress.")
    _CONSOLE.print(Report.from_json(read_bounded(path)).table())


@app.command()
def inspect(directory: Annotated[Path, typer.Argument(help="What bayesprune.save or compress wrote.")]) -> None:
    """Show what a saved directory holds, without building the model: base, shapes, zeros."""
    saved = read_saved(directory)
    base = "a plain module" if saved.base is None else f"{saved.base.library} model {saved.base.name}"
    total = sum(tensor.numel() for tensor in saved.tensors.values())
    nonzero = {name: _nonzero(tensor) for name, tensor in saved.tensors.items()}
    versions = ", ".join(f"{name} {version}" for name, version in saved.versions.items())
    title, caption = Text(printable(f"{directory}: {base}")), Text(printable(f"saved with {versions}"))
    table = Table("tensor", "shape", "dtype", "nonzero", title=title, caption=caption)
    for name, tensor in saved.tensors.items():
        shape, dtype = "x".join(map(str, tensor.shape)), str(tensor.dtype).removeprefix("torch.")
        share = f"{nonzero[name] / max(1, tensor.numel()):.1%}"
        table.add_row(*map(Text, (printable(name), printable(shape), dtype, share)))
    _CONSOLE.print(table)
    _CONSOLE.print(f"{total:,} values, {sum(nonzero.values()):,} of them not zero", highlight=False)
    for name, size in saved.levels.sizes.items():
        _CONSOLE.print(f"level {printable(name)}: {size:,} bytes of tensors", highlight=False)


def main() -> None:
    """Runs the command line; what the user can mend is told in one sentence."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.captureWarnings(True)
    try:
        app()
    except (BayespruneError, ValueError, OSError, ImportError, FloatingPointError) as error:
        lines = [printable(line, _LONGEST_LINE) for line in str(error).splitlines()[:_MAX_LINES]]
        Console(stderr=True).print(Text.assemble(("error:", "red"), " ", "\n".join(lines)), highlight=False)
        raise SystemExit(1) from error


def _nonzero(tensor: Tensor) -> int:
    """How many of the values are not zero, of any dtype that can be compared with zero."""
    try:
        return int(tensor.ne(0).count_nonzero())
    except RuntimeError as error:
        raise StorageError(f"a tensor of dtype {tensor.dtype} cannot be inspected: {error}") from error


def _target(target: str | None, tolerance: float | None) -> tuple[str | None, Literal["macs", "weights"]]:
    """The target, None where a tolerance stands in its place, and what is counted."""
    wanted = target or ("macs=0.5" if tolerance is None else "macs")
    by = "weights" if wanted.partition("=")[0].strip() == "weights" else "macs"
    if tolerance is not None:
        if wanted not in ("macs", "weights"):
            raise typer.BadParameter(
                f"got --target {target} and --tolerance {tolerance}; give one of them, or --target macs or weights, "
                "which says what goes and leaves it to the tolerance how much."
            )
        return None, by
    return wanted, by


def _parts(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(part.strip() for part in text.split(","))


def _check_apart(out: Path, model: str, checkpoint: Path | None) -> None:
    """Refuses to write the result over what it is made of."""
    sources = [Path(model.partition(":")[2])] if library_of(model) == "hf" else []
    if checkpoint is not None and checkpoint.name == TENSORS:
        sources.append(checkpoint.parent)
    if any(source.is_dir() and source.resolve() == out.resolve() for source in sources):
        raise typer.BadParameter(
            f"{str(out)!r} holds the weights that the model starts from, which the result would overwrite; expected "
            "another directory.",
            param_hint="--out",
        )


def _check_writable(directory: Path) -> None:
    """Fails now, not after minutes of training."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
        pass


_LONGEST = 4_000  # characters of a line: a command to copy is whole


class ConsoleProgress:
    """Stages as lines; epochs as a bar with the time remaining on a terminal, as a line each elsewhere."""

    def __init__(self, console: Console, num_stages: int) -> None:
        self._console = console
        self._num_stages = num_stages
        self._stage = 0

    def stage(self, title: str) -> None:
        """A new stage begins."""
        self._stage += 1
        head = f"[{self._stage}/{self._num_stages}] {printable(title)}"
        self._console.print(Text(head, style="bold"), highlight=False)

    def say(self, text: str) -> None:
        """One line about the present stage."""
        self._console.print(f"      {printable(text, longest=_LONGEST)}", markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def training(self, num_epochs: int, steps_per_epoch: int) -> Iterator[Callable[[float], None]]:
        """Shows the steps that it is told of."""
        columns = (
            TextColumn("      epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
        )
        is_terminal = self._console.is_terminal
        step = 0
        with Progress(*columns, console=self._console, transient=True, disable=not is_terminal) as bar:
            task = bar.add_task("", total=num_epochs * steps_per_epoch, epoch=f"1/{num_epochs}", loss="")

            def advance(loss: float) -> None:
                nonlocal step
                epoch, shown = step // steps_per_epoch + 1, "" if math.isnan(loss) else f"loss {loss:.3f}"
                step += 1
                bar.update(task, advance=1, epoch=f"{epoch}/{num_epochs}", loss=shown)
                if not is_terminal and step % steps_per_epoch == 0:
                    self.say(f"epoch {epoch}/{num_epochs}: {shown}")

            yield advance
