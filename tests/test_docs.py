"""What the documentation shows exists: names, keyword arguments, commands; examples in docstrings run."""

import ast
import doctest
import importlib
import inspect
import operator
import re
from pathlib import Path

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


def fault_of_call(name: str, node: ast.Call) -> str | None:
    """Why a call of `bp.name` would fail; None where it would not."""
    try:
        function = operator.attrgetter(name)(bayesprune)
        inspect.signature(function).bind(*node.args, **{keyword.arg: None for keyword in node.keywords})
    except (AttributeError, TypeError) as error:
        return str(error)
    return None


def test_code_uses_what_exists():
    calls = [
        (page, name, node)
        for page in PAGES
        for tree in map(ast.parse, blocks(page))
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and (name := public_name(node.func))
    ]
    assert len(calls) > 100
    faults = [f"{page}: bp.{name}: {fault}" for page, name, node in calls if (fault := fault_of_call(name, node))]
    assert not faults


def test_names_in_text_exist():
    found = [
        (page, name)
        for page in PAGES
        for name in re.findall(r"`@?bp\.([A-Za-z_]+)", (ROOT / page).read_text(encoding="utf-8"))
    ]
    assert len(found) > 30
    assert not [(page, name) for page, name in found if name not in bayesprune.__all__]


def test_examples_in_docstrings_run():
    results = {module: doctest.testmod(importlib.import_module(module)) for module in MODULES}
    assert sum(result.attempted for result in results.values()) > 80
    assert not {module: result for module, result in results.items() if result.failed}


def test_examples_in_docstrings_are_a_section():
    """Under `Example:` the pages show a quotation, and the strict build takes a printed list for a link."""
    sources = {module: inspect.getsource(importlib.import_module(module)) for module in MODULES}
    assert not [module for module, source in sources.items() if re.search(r"^ *Example:$", source, re.MULTILINE)]


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


def test_counts_of_models_are_those_of_the_tables():
    """What README and guides say of how many models work, beside the stages of both tables."""

    def numbers(page: str, pattern: str) -> list[int]:
        found = re.search(pattern, " ".join((ROOT / page).read_text(encoding="utf-8").split()))
        assert found is not None, f"{page} says nothing like {pattern}"
        return [int(number) for number in found.groups()]

    families = "docs/benchmarks/families.md"
    cut, moments = (numbers(families, rf"\| {stage} \| (\d+) \| (\d+) \(") for stage in ("cut loaded", "moments"))
    zoo = numbers("docs/benchmarks/zoo.md", r"\| of (\d+) \|(?: \d+ \|){5} (\d+) \|")[::-1]
    models = r"(\d+) of (\d+) timm models and (\d+) of (\d+) families of transformers are cut and load again"
    assert numbers("README.md", models) == zoo + cut
    assert numbers("docs/huggingface.md", r"of (\d+), (\d+) lose channels or heads and load again") == cut[::-1]
    assert numbers("docs/moments.md", r"Of (\d+) \[families of transformers\]\(\S+\) (\d+) run") == moments[::-1]
