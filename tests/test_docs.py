"""What the documentation shows exists: names, keyword arguments, commands; examples in docstrings run."""

import ast
import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

import bayesprune

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "bayesprune").rglob("*.py")
)


def blocks(page: str) -> list[str]:
    """Python blocks of a page; a diff counts as what it makes of the code."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(r"^```(python|diff)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [re.sub(r"^[+ ] ", "", code, flags=re.MULTILINE) if kind == "diff" else code for kind, code in found]


def public_name(node: ast.AST) -> str | None:
    """`a.b` of an expression `bp.a.b` or `bayesprune.a.b`."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join(reversed(names)) if isinstance(node, ast.Name) and node.id in ("bp", "bayesprune") else None


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_code_uses_what_exists(page):
    for tree in map(ast.parse, blocks(page)):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (name := public_name(node.func)):
                function = bayesprune
                for part in name.split("."):
                    function = getattr(function, part)
                keywords = {keyword.arg: None for keyword in node.keywords}
                inspect.signature(function).bind(*node.args, **keywords)


@pytest.mark.parametrize("page", PAGES)
def test_names_in_text_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in re.findall(r"`@?bp\.([A-Za-z_]+)", text):
        assert name in bayesprune.__all__, f"{page} names bp.{name}"


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings_run(module):
    results = doctest.testmod(importlib.import_module(module))
    assert results.failed == 0


def test_readme_commands_are_complete():
    """Each starts from `python3 -m venv`, installs extras that exist, and stands on a line of its own."""
    commands = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) == 2
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for command in commands:
        environment = command.split()[3]
        steps = command.split(" && ")
        assert len(steps) == 3
        assert all(step.startswith(f"{environment}/bin/") for step in steps[1:])
        for extra in re.search(r'"\.\[(.*)\]"', command)[1].split(","):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra
