"""Bars show where somebody looks, and nowhere else."""

import io
import sys

import pytest

from bayesprune.foundation import progress
from bayesprune.foundation.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "option", "environment", "shows"),
    [
        (Terminal, None, "", True),
        (Terminal, None, "0", True),
        (Terminal, None, "1", False),
        (Terminal, False, "", False),
        (Terminal, True, "1", True),
        (io.StringIO, None, "", False),
        (io.StringIO, True, "", True),
    ],
)
def test_a_bar_shows_on_a_terminal_or_when_it_was_asked_for(monkeypatch, stream, option, environment, shows):
    monkeypatch.setattr(progress, "_DELAY", 0.0)
    shown = stream()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setenv("TQDM_DISABLE", environment)
    assert list(progress_bar([1, 2, 3], "Counts", "number", progress=option)) == [1, 2, 3]
    assert ("Counts" in shown.getvalue()) is shows


def test_what_is_soon_over_shows_no_bar(monkeypatch):
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    with progress_bar(None, "Counts", "number", total=3) as bar:
        bar.update()
    assert shown.getvalue() == ""
