"""Packages import to the left only: shards, teachers, students, distill."""

import ast
from pathlib import Path

import pytest

ORDER = ["shards", "teachers", "students", "distill"]
FILES = sorted(path for package in ORDER for path in (Path(__file__).parents[1] / package).glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_module_imports_no_package_to_its_right(path):
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {
        n for node in nodes for n in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module])
    }
    imported = {name.split(".")[0] for name in names if name}
    assert imported & set(ORDER) <= set(ORDER[: ORDER.index(path.parent.name) + 1])
