"""The documents name tests and config fields that exist."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from distill.cli import build_command_parser, build_parser
from distill.commandline.commands import COMMANDS
from distill.commandline.reference import make_reference
from distill.config import Config, list_fields
from distill.config.fields import SECTIONS
from distill.config.rules import value_at

ROOT = Path(__file__).parents[1]
FAULTS = (ROOT / "docs" / "faults.md").read_text()
DATA = (ROOT / "docs" / "data.md").read_text()


@pytest.mark.parametrize("named", sorted(set(re.findall(r"tests/(?:\w+/)?test_\w+\.py::test_\w+", FAULTS))))
def test_every_test_that_the_table_of_faults_names_exists(named):
    path, name = named.split("::")
    assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE)


def test_every_fault_has_its_row_and_a_test():
    rows = {int(row[0]): row[1] for row in re.findall(r"^\| (\d+) \|(.*)$", FAULTS, re.MULTILINE)}
    assert set(range(1, 47)) <= set(rows)
    assert all("::test_" in row for row in rows.values())


def test_no_two_faults_that_were_found_here_have_one_number():
    numbers = [int(number) for number in re.findall(r"^\| (\d+) \|", FAULTS, re.MULTILINE)]
    own = [number for number in numbers if number > 61]  # those up to it are the project's, in one or several rows
    assert sorted(own) == sorted(set(own))


def test_every_config_field_that_the_page_on_data_names_exists():
    for key in re.findall(r"`((?:data|train|loss|teacher|eval)\.\w+)", DATA):
        value_at(Config(), key)
    for block in re.findall(r"^```yaml\n(.*?)^```", DATA, re.MULTILINE | re.DOTALL):
        for section, fields in yaml.safe_load(block).items():
            assert [name for name in fields if not hasattr(getattr(Config(), section), name)] == []


def test_every_message_in_the_table_of_symptoms_is_one_that_the_library_says():
    table = FAULTS.split("## Symptom and remedy")[1].split("\n\n")[1]
    folders = ("shards", "teachers", "students", "distill")
    said = "".join(path.read_text() for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    said = re.sub(r'"\s*\n\s*f?"', "", said)  # a text over several lines of code
    messages = [text for text in re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)]
    parts = [part.strip() for message in messages for part in message.split("…")]
    assert len(messages) > 10 and [part for part in parts if part not in said] == []


def test_every_command_option_and_field_that_a_message_names_is_one():
    parsers = [build_parser(), *(build_command_parser(name) for name in COMMANDS)]
    options = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    options |= {"--threads", "--config_file", "--module"}  # of `python -m students.device` and of accelerate
    fields = {*list_fields(), "student.embed"}
    sections = "|".join(SECTIONS)
    wrong = []
    for place, text in texts_of_code():
        named = re.findall(r"(?<![\w(;{-])--[a-z]\w*(?:-\w+)*", text)
        wrong += [(place, option) for option in named if option not in options]
        named = re.findall(rf"(?<![\w./])(?:{sections})\.(?!json|pth)\w*[a-z0-9](?![\w(*.])", text)
        wrong += [(place, field) for field in named if field not in fields]
        wrong += [(place, name) for name in re.findall(r"`distill ([a-z][a-z-]*)", text) if name not in COMMANDS]
    assert wrong == []


def texts_of_code() -> Iterator[tuple[str, str]]:
    """Every text of the product's code, docstrings and pages of HTML apart, with its place."""
    folders = ("shards", "teachers", "students", "distill")
    for path in (path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        alone = {node.value for node in nodes if isinstance(node, ast.Expr)}
        texts = [node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        yield from (
            (f"{path.relative_to(ROOT)}:{node.lineno}", node.value)
            for node in texts
            if node not in alone and "<html" not in node.value
        )


def test_every_field_that_the_table_of_symptoms_names_exists():
    table = FAULTS.split("## Symptom and remedy")[1].split("\n\n")[1]
    keys = set(re.findall(r"`((?:data|train|loss|teacher|student|cache|eval)\.\w+)", table))
    assert keys and keys <= set(list_fields())


def test_the_reference_is_up_to_date_and_knows_every_field_and_command():
    page = (ROOT / "docs" / "reference.md").read_text()
    assert page == make_reference(), "docs/reference.md is of another version; `make docs` makes it again"
    assert all(f"\n| `{field}` | " in page for field in list_fields())
    assert all(f"\n### distill {name}\n" in page for name in COMMANDS)


def test_the_readme_has_at_most_1200_words():
    assert len((ROOT / "README.md").read_text().split()) <= 1200


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_every_link_to_a_file_leads_to_one(page):
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_the_site_has_every_page_and_its_links_stay_inside():
    names = [name for entry in yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"] for name in entry.values()]
    assert sorted(names) == sorted(["index.md", *(path.name for path in ROOT.glob("docs/*.md"))])
    spec = importlib.util.spec_from_file_location("mkdocs_hooks", ROOT / "mkdocs_hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    for folder, pages in ((ROOT, ["README.md"]), (ROOT / "docs", [path.name for path in ROOT.glob("docs/*.md")])):
        for page in pages:
            links = re.findall(r"\]\(([^)#\s]+)", hooks.keep_inside((folder / page).read_text(), folder))
            assert [link for link in links if "://" not in link and not (ROOT / "docs" / link).exists()] == []


def test_what_can_be_added_has_the_home_and_the_dict_that_contributing_names():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    lines = re.findall(r"`([A-Z_]+)` in\s+`([\w/.]+)`", text)
    assert len(lines) >= 13
    missing = [(name, path) for name, path in lines
               if not re.search(rf"^{name}\b", (ROOT / path).read_text(), re.MULTILINE)]  # fmt: skip
    assert missing == []


def test_every_place_that_contributing_names_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    places = {
        place for place in re.findall(r"`((?:shards|teachers|students|distill|tests|docs|benchmarks)/[\w/.]*)`", text)
    }
    assert (
        len(places) > 25
        and [place for place in sorted(places) if "NAME" not in place and not (ROOT / place).exists()] == []
    )
