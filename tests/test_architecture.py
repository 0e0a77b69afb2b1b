"""Imports go downwards, optional libraries stay in the files that need them, and files stay short."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import bayesprune

PACKAGE = Path(__file__).parents[1] / "bayesprune"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# From the bottom to the top, one room a row: a room imports the rows above its own alone.
ROOMS = (
    "errors",
    "foundation",
    "priors",
    "moments",
    "estimators",
    "layers",
    "convert",
    "prediction",
    "train",
    "laplace",
    "prune/graph",
    "prune/scores",
    "prune/batch_norm",
    "prune/weights",
    "prune/channels",
    "prune/grouped",
    "prune/measured",
    "prune/search",
    "prune",
    "storage",
    "bits",
    "elastic",
    "reports",
    "robustness",
    "hosts",
    "hosts/timm",
    "hosts/transformers",
    "gates",
    "app",
    "certification",
    "evi",
    "__main__",
)
FLOOR_OF = {room: floor for floor, room in enumerate(ROOMS)}

# Where each library that is optional, slow to import or for the terminal alone may be imported.
ALLOWED = {
    "constriction": ("storage/coding/",),
    "matplotlib": ("reports/",),
    "onnx": ("bits/int8.py",),
    "scipy": ("prune/grouped/",),
    "rich.live": ("app/",),
    "rich.progress": ("app/",),
    "sklearn": ("app/data/images.py",),
    "timm": ("hosts/timm/", "app/data/images.py"),
    "torch_pruning": ("prune/", "gates/inclusion.py"),
    "torchao": ("bits/int8.py",),
    "torchvision": (),
    "transformers": ("hosts/transformers/", "app/"),
    "typer": ("app/",),
}


@cache
def imported_modules(file: str) -> list[str]:
    """Dotted names that a file imports anywhere in it; `from a import b` gives a.b."""
    package, found = ["bayesprune", *Path(file).parent.parts], []
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            found += [".".join([*parents, *filter(None, [node.module]), alias.name]) for alias in node.names]
    return found


def room_of(path: str) -> str:
    """The innermost room of a file or module, by its path below the package."""
    parts = path.removesuffix(".py").removesuffix("/__init__").split("/")
    names = ("/".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in FLOOR_OF), parts[0])


def rooms_imported(file: str) -> Iterator[str]:
    """Rooms that a file imports from; "" is the package's front door, which stands above everything."""
    for name in imported_modules(file):
        if name.partition(".")[0] == "bayesprune":
            inside = name.replace(".", "/").partition("/")[2]
            room = room_of(inside)
            yield room if room in FLOOR_OF else ""


def test_every_file_is_in_a_room_and_every_room_has_files():
    assert {room_of(file) for file in FILES if file != "__init__.py"} == set(FLOOR_OF)


def test_imports_go_downwards():
    upwards = [
        f"{file} imports {room or 'the front door'}"
        for file in FILES
        if file not in ("__init__.py", "prune/__init__.py")
        for room in rooms_imported(file)
        if room != room_of(file) and FLOOR_OF.get(room, len(ROOMS)) > FLOOR_OF[room_of(file)]
    ]
    assert not upwards


def test_libraries_are_imported_only_where_they_are_needed():
    strangers = [
        f"{file} imports {name}"
        for file in FILES
        for name in imported_modules(file)
        for library, places in ALLOWED.items()
        if f"{name}.".startswith(f"{library}.") and not file.startswith(places)
    ]
    assert not strangers


def test_public_names_are_listed():
    """Those that are imported later are told to type checkers in a block of their own."""
    bound: set[str] = set()
    body = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8")).body
    for node in [inner for outer in body for inner in (outer.body if isinstance(outer, ast.If) else [outer])]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Assign):
            bound |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    assert sorted(bayesprune.__all__) == sorted(name for name in bound if not name.startswith("_"))
    assert len(set(bayesprune.__all__)) == len(bayesprune.__all__)
    assert all(hasattr(bayesprune, name) for name in bayesprune.__all__)


def test_libraries_that_take_long_are_imported_later():
    """A process that does not use them has none of them, whatever is installed; everything is there when asked for."""
    slow = ("timm", "torchvision", "transformers", "torch_pruning", "matplotlib", "sympy")
    program = (
        "import sys, bayesprune\n"
        f"print([name for name in {slow} if name in sys.modules])\n"
        "print([name for name in bayesprune.__all__ if not hasattr(bayesprune, name)])\n"
        "from bayesprune import prune_channels, reports\n"
        "print(prune_channels.__name__, hasattr(bayesprune, 'nothing'))\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == ["[]", "[]", "prune_channels False"]


def test_files_stay_short():
    """A file of more than 400 lines holds two ideas as a rule."""
    lengths = {file: len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert not {file: number for file, number in lengths.items() if number > 400}
