"""Imports go downwards, optional libraries stay in the files that need them, and files stay short."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import bayesprune

PACKAGE = Path(__file__).parents[1] / "bayesprune"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# From the bottom to the top: a unit (a module or a folder of bayesprune) imports its own row and the rows above it.
ROWS = (
    ("batches", "calls", "errors", "noise", "priors", "states", "tables"),
    ("moments",),
    ("estimators",),
    ("layers",),
    ("conversion", "convert", "macs", "predictive", "train", "prune", "laplace"),
    ("compiling", "gates"),
    ("storage", "evaluate", "evi"),
    ("hosts",),
    ("data", "checkpoints"),
    ("pipeline", "loader_task"),
    ("cli",),
)
ROW_OF = {unit: row for row, units in enumerate(ROWS) for unit in units}

# Where each library that is optional, slow to import or for the terminal alone may be imported.
ALLOWED = {
    "matplotlib": ("evaluate/",),
    "rich.live": ("cli.py", "cli/"),
    "rich.progress": ("cli.py", "cli/"),
    "sklearn": ("data.py",),
    "timm": ("hosts/timm.py", "data.py"),
    "torch_pruning": ("prune/",),
    "torchvision": (),
    "transformers": ("hosts/transformers/",),
    "typer": ("cli.py", "cli/"),
}


def imported_modules(file: str) -> Iterator[str]:
    """Dotted names that a file imports anywhere in it; `from a import b` gives a.b."""
    package = ["bayesprune", *Path(file).parent.parts]
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            yield from (".".join([*parents, *filter(None, [node.module]), alias.name]) for alias in node.names)


def unit_of(file: str) -> str:
    return file.partition("/")[0].removesuffix(".py")


def units_imported(file: str) -> set[str]:
    names = (name.split(".") for name in imported_modules(file))
    return {parts[1] for parts in names if parts[0] == "bayesprune" and len(parts) > 1}


@pytest.mark.parametrize("file", [file for file in FILES if file != "__init__.py"])
def test_imports_go_downwards(file):
    unit = unit_of(file)
    assert unit in ROW_OF, f"{file}: give {unit!r} a row in this test"
    # A name that is no unit was imported from the package's front door, which stands above everything.
    upwards = {name for name in units_imported(file) if ROW_OF.get(name, len(ROWS)) > ROW_OF[unit]}
    assert not upwards, f"{file} imports upwards: {', '.join(sorted(upwards))}"


def test_units_of_one_row_do_not_import_each_other_in_a_circle():
    graph = {unit: set() for unit in ROW_OF}
    for file in FILES:
        if file != "__init__.py":
            graph[unit_of(file)] |= units_imported(file) - {unit_of(file)}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(ROW_OF)


@pytest.mark.parametrize("library", ALLOWED)
def test_library_is_imported_only_where_it_is_needed(library):
    importers = [file for file in FILES if any(f"{name}.".startswith(f"{library}.") for name in imported_modules(file))]
    strangers = [file for file in importers if not file.startswith(ALLOWED[library])]
    assert not strangers, f"{library} is imported in {', '.join(strangers)}"


def test_public_names_are_listed():
    bound: set[str] = set()
    for node in ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Assign):
            bound |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    assert sorted(bayesprune.__all__) == sorted(name for name in bound if not name.startswith("_"))
    assert len(set(bayesprune.__all__)) == len(bayesprune.__all__)
    assert all(hasattr(bayesprune, name) for name in bayesprune.__all__)


@pytest.mark.parametrize("file", FILES)
def test_files_stay_short(file):
    num_lines = len((PACKAGE / file).read_text(encoding="utf-8").splitlines())
    assert num_lines <= 400, f"{file} has {num_lines} lines: does it hold two ideas?"
