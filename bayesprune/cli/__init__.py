"""The command line: `bayesprune compress`, `bayesprune report`, `bayesprune inspect`."""

from bayesprune.cli.app import app, main

__all__ = ["app", "main"]
