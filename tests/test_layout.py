"""The house: which way imports point, how full a folder may be, and that each idea has one home."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import distill
from benchmarks.house import (
    MOST_FILES,
    PACKAGES,
    count_edits,
    count_files,
    find_british_words,
    find_circles,
    find_climbs,
    find_cut_sentences,
    find_homes,
    find_long_functions,
    find_long_signatures,
    find_unused_fields,
    import_graph,
    measure_docstrings,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def graph():
    return import_graph()


def test_no_room_shadows_a_package_where_a_stage_is_launched_by_its_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "distill"))
    importlib.reload(distill)
    assert str(ROOT / "distill") not in sys.path


def test_a_module_imports_no_package_to_its_right(graph):
    def place(name: str) -> int:
        return PACKAGES.index(name.split(".")[0])

    assert [(name, other) for name, others in graph.items() for other in others if place(other) > place(name)] == []


def test_a_room_of_distill_imports_none_of_a_floor_above_its_own(graph):
    assert find_climbs(graph) == []


def test_no_modules_hang_in_a_circle_through_functions_or_strings_either(graph):
    assert find_circles(graph) == []


def test_a_folder_is_read_in_one_look():
    assert {folder: number for folder, number in count_files().items() if number > MOST_FILES} == {}


def test_every_room_is_on_the_map():
    folders = {path.parent.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert [folder.as_posix() for folder in sorted(folders) if f"`{folder.as_posix()}/`" not in text] == []


def test_what_the_map_and_the_questions_name_is_there():
    texts = [(ROOT / name).read_text() for name in ("CONTRIBUTING.md", "benchmarks/results/where_is.md")]
    named = {name for text in texts for name in re.findall(r"`((?:\w+/)+\w*(?:\.\w+)?)`", text)}
    assert len(named) > 80
    assert [name for name in sorted(named) if "NAME" not in name and not (ROOT / name).exists()] == []


def test_no_signature_has_more_arguments_than_a_reader_keeps_in_mind():
    assert find_long_signatures() == {}


def test_no_function_is_longer_than_a_screen():
    assert find_long_functions() == {}


def test_every_field_of_a_config_is_in_a_recipe_a_document_or_a_benchmark():
    assert find_unused_fields() == []


def test_a_further_part_of_each_kind_takes_one_line():
    kinds = {"codec", "encoder", "metric", "teacher_kind", "data_set", "command", "term", "divergence"}
    edits = count_edits()
    assert edits.keys() >= {*kinds, "feature_distance"}
    assert {kind: number for kind, number in edits.items() if number != 1} == {}


def test_every_public_name_says_what_it_is():
    said, total = measure_docstrings()
    assert said / total > 0.98


def test_no_argument_is_described_from_the_middle_of_a_sentence():
    assert find_cut_sentences() == []


def test_words_have_one_spelling():
    assert find_british_words() == []


def test_whole_files_are_written_hashed_and_locked_in_one_place_each():
    assert {idea: places for idea, places in find_homes().items() if len(places) != 1} == {}


def test_every_package_is_among_those_that_are_installed():
    rooms = {".".join(path.parent.relative_to(ROOT).parts) for p in PACKAGES for path in (ROOT / p).rglob("*.py")}
    assert rooms <= set((ROOT / "setup.cfg").read_text().split())


@pytest.mark.parametrize("module", ["distill.config", "distill.cli", "distill.command"])
def test_what_help_and_a_wrong_word_need_imports_no_torch(module):
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
