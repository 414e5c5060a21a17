"""The documents name tests and config fields that exist."""

import re
from pathlib import Path

import pytest

from distill.config import Config
from distill.rules import value_at

ROOT = Path(__file__).parents[1]
FAULTS = (ROOT / "docs" / "faults.md").read_text()
DATA = (ROOT / "docs" / "data.md").read_text()


@pytest.mark.parametrize("named", sorted(set(re.findall(r"tests/test_\w+\.py::test_\w+", FAULTS))))
def test_every_test_that_the_table_of_faults_names_exists(named):
    path, name = named.split("::")
    assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE)


def test_every_fault_has_its_row_and_a_test():
    rows = {int(row[0]): row[1] for row in re.findall(r"^\| (\d+) \|(.*)$", FAULTS, re.MULTILINE)}
    assert set(range(1, 46)) <= set(rows)
    assert all("::test_" in row for row in rows.values())


def test_every_config_field_that_the_page_on_data_names_exists():
    for key in re.findall(r"`((?:data|train|loss|teacher)\.\w+)", DATA):
        value_at(Config(), key)
    for name in re.findall(r"^  (\w+): ", DATA, re.MULTILINE):
        assert hasattr(Config().augment, name)


def test_the_readme_has_at_most_1200_words():
    assert len((ROOT / "README.md").read_text().split()) <= 1200


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_every_link_to_a_file_leads_to_one(page):
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []
