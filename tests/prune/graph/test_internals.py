"""What torch-pruning keeps to itself and this library needs: each name is there, and known in one place."""

import ast
from pathlib import Path

import pytest
import torch_pruning as tp

import bayesprune
from bayesprune.prune.graph.internals import NAMES, find

PACKAGE = Path(bayesprune.__file__).parent
HERE = PACKAGE / "prune" / "graph"


@pytest.mark.parametrize("name", NAMES)
def test_torch_pruning_has_the_private_name(name):
    find(name)  # where it has not, the error says which file needs it


def test_a_name_that_is_gone_is_told_with_the_file_that_needs_it(monkeypatch):
    monkeypatch.delattr(tp.ops, "_ElementWiseOp")
    with pytest.raises(ImportError, match=r"has no torch_pruning.ops._ElementWiseOp, which .*graph/find.py and"):
        find("ops._ElementWiseOp")


@pytest.mark.parametrize("name", NAMES)
def test_the_files_that_are_said_to_need_a_name_do(name):
    last = name.rpartition(".")[2]
    found = [
        line.partition(" = ")[0]
        for line in (HERE / "internals.py").read_text().splitlines()
        if f'find("{name}")' in line
    ]
    words = {last, name, *found}
    assert all(words & set(identifiers(HERE / file)) for file in NAMES[name]), (name, words)


def identifiers(file: Path):
    """Names, attributes, methods and texts in a file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        for field in ("id", "attr", "name", "value"):
            if isinstance(value := getattr(node, field, None), str):
                yield value


def test_private_names_are_imported_in_one_file():
    """Of torch-pruning's modules and names that begin with an underscore, and of its index mappings and guesses."""
    elsewhere = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch_pruning"):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                private = ("._", "index_mapping", "shape_infer", "op_counter.")
                elsewhere += [f"{file.name}: {name}" for name in names if any(part in name for part in private)]
    assert not elsewhere


def test_outside_of_the_graph_only_importances_and_groups_are_used():
    allowed = {"torch_pruning", "torch_pruning.dependency.Group"}
    for file in sorted((PACKAGE / "prune").rglob("*.py")):
        if HERE not in file.parents:
            tree = ast.parse(file.read_text(encoding="utf-8"))
            imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
            prefix = [(node, f"{node.module}." if isinstance(node, ast.ImportFrom) else "") for node in imports]
            names = {f"{before}{alias.name}" for node, before in prefix for alias in node.names}
            assert {name for name in names if name.startswith("torch_pruning")} <= allowed, file
            used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_tp(node.value)}
            assert used <= {"importance"}, file


def is_tp(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "tp"
