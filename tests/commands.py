"""Runs a command of the command line in this process."""

import sys

import pytest

from bayesprune.app import commands


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    old = sys.argv
    sys.argv = ["bayesprune", *arguments]
    try:
        with pytest.raises(SystemExit) as ended:
            commands.main()
    finally:
        sys.argv = old
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err
