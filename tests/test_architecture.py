"""Imports go downwards, optional libraries stay in the files that need them, and files stay short."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

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


def test_every_unit_has_a_row():
    assert {unit_of(file) for file in FILES if file != "__init__.py"} == set(ROW_OF)


def test_imports_go_downwards():
    # A name that is no unit was imported from the package's front door, which stands above everything.
    upwards = [
        f"{file} imports {name}"
        for file in FILES
        for name in units_imported(file)
        if file != "__init__.py" and ROW_OF.get(name, len(ROWS)) > ROW_OF[unit_of(file)]
    ]
    assert not upwards


def test_units_of_one_row_do_not_import_each_other_in_a_circle():
    graph = {unit: set() for unit in ROW_OF}
    for file in FILES:
        if file != "__init__.py":
            graph[unit_of(file)] |= units_imported(file) - {unit_of(file)}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(ROW_OF)


def test_libraries_are_imported_only_where_they_are_needed():
    strangers = [
        f"{file} imports {name}"
        for file in FILES
        for name in imported_modules(file)
        for library, rooms in ALLOWED.items()
        if f"{name}.".startswith(f"{library}.") and not file.startswith(rooms)
    ]
    assert not strangers


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


def test_files_stay_short():
    """A file of more than 400 lines holds two ideas as a rule."""
    lengths = {file: len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert not {file: number for file, number in lengths.items() if number > 400}
