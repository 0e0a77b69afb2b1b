"""Where the job is, on a terminal or in a file."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from bayesprune.reports.printable import printable

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
