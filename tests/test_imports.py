"""Packages import to the left only: shards, teachers, students, distill."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

import distill

ORDER = ["shards", "teachers", "students", "distill"]
ROOT = Path(__file__).parents[1]
FILES = sorted(path for package in ORDER for path in (ROOT / package).rglob("*.py"))


def test_no_room_shadows_a_package_where_a_stage_is_launched_by_its_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "distill"))
    importlib.reload(distill)
    assert str(ROOT / "distill") not in sys.path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_no_package_to_its_right(path):
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {
        n for node in nodes for n in ([a.name for a in node.names] if isinstance(node, ast.Import) else [node.module])
    }
    imported = {name.split(".")[0] for name in names if name}
    assert imported & set(ORDER) <= set(ORDER[: ORDER.index(path.relative_to(ROOT).parts[0]) + 1])
