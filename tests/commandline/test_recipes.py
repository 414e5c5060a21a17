"""The recipes: published sizes of what they name, one cache for all students of a teacher, and the page on them."""

import shutil
from functools import cache
from itertools import takewhile
from pathlib import Path

import pytest
from test_blocks import blocks_of, run_page

from distill.config import load_config
from distill.sizes.costs import Blueprint, Usage, describe_student, describe_teacher, measure, measure_sizes

ROOT = Path(__file__).parents[2]
RECIPES = [
    path for folder in ("configs", "configs/mixtures") for path in sorted((ROOT / folder).glob("salmonn_*.yaml"))
]
PAGE = (ROOT / "docs" / "recipes.md").read_text()
MEASURED: dict[str, dict] = {}  # models of billions, each built once for the table and what is published


def measure_once(blueprint: Blueprint, given: dict) -> dict[str, tuple[int, float]]:
    """`measure_sizes`, with a memory."""
    if (key := repr((blueprint, given))) not in MEASURED:
        MEASURED[key] = measure_sizes(blueprint, given)
    return MEASURED[key]


@cache
def sizes_of(name: str) -> dict[str, tuple[int, float]]:
    """Parameters and bytes of each part of a recipe's student."""
    config = load_config(name)
    teacher, given = describe_teacher(config)
    return measure_once(describe_student(config, teacher), given)


@pytest.mark.parametrize(
    ("name", "whisper", "llm"),  # published parameters, in millions
    [
        ("salmonn_3b_to_1b_turbo", 637.0, 1235.814),
        ("salmonn_3b_to_3b_nf4", 636.8, 3212.750),
        ("salmonn_3b_to_deepseek_15b", 636.8, 1777.088),
        ("salmonn_3b_to_05b_small_ears", 88.154, 494.033),
        # the dense LLM, and of each layer's feed-forward seven copies; routers are counted with what is trained
        ("salmonn_3b_to_moe_1b", 636.8, 1235.814 + 7 * 16 * 3 * 2048 * 8192 / 1e6),
        ("salmonn_3b_to_moe_3b", 636.8, 3212.750 + 7 * 28 * 3 * 3072 * 8192 / 1e6),
    ],
)
def test_a_recipes_student_has_the_published_parameters(name, whisper, llm):
    sizes = sizes_of(name)
    assert sizes["Whisper encoder"][0] / 1e6 == pytest.approx(whisper, abs=0.05)
    parts = ("LLM embeddings", "LLM body", "LLM head")
    assert sum(sizes[part][0] for part in parts if part in sizes) / 1e6 == pytest.approx(llm, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "ears"),
    [
        ("salmonn_3b_to_1b", {"BEATs"}),
        ("salmonn_3b_to_1b_turbo", {"BEATs"}),
        ("salmonn_3b_to_1b_eat", {"EAT"}),
        ("salmonn_3b_to_1b_no_beats", set()),
        ("salmonn_3b_to_05b_small_ears", set()),
    ],
)
def test_a_recipes_student_has_the_second_encoder_of_its_name(name, ears):
    assert {"BEATs", "EAT"} & sizes_of(name).keys() == ears


def test_a_mixtures_routers_and_the_lora_of_its_experts_are_what_it_trains():
    config = load_config("salmonn_3b_to_moe_1b")
    teacher, given = describe_teacher(config)
    blueprint, rank = describe_student(config, teacher), config.student.lora_rank
    attention = 16 * rank * (2 * (2048 + 2048) + 2 * (2048 + 512))
    of_an_expert = rank * ((2048 + 2 * 8192) + (8192 + 2048))
    routers = 16 * 8 * 2048
    assert sizes_of("salmonn_3b_to_moe_1b")["LoRA"][0] == attention + 16 * 8 * of_an_expert + routers
    # a token passes two experts of eight
    flops = {part.name: part.flops for part in measure(blueprint, Usage(seconds=30.0), given)}
    length = 20 + 88 + 30
    assert flops["LoRA"] == 2 * length * (attention + 16 * 2 * of_an_expert + routers)
    active = 16 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 2 * 3 * 2048 * 8192 + 8 * 2048)
    assert flops["LLM body"] == pytest.approx(2 * length * active, rel=0.02)  # and the products of attention


def test_every_student_of_a_teacher_learns_from_the_same_cache():
    by_teacher = {}
    for path in RECIPES:
        config = load_config(path)
        by_teacher.setdefault(config.teacher, []).append((config.cache, config.data, config.precision))
    assert len(by_teacher) == 2
    assert all(len(set(map(repr, made_of))) == 1 for made_of in by_teacher.values())
    assert len({config[0][0].folder for config in by_teacher.values()}) == 2


def test_no_two_recipes_write_into_one_run_folder():
    assert len({load_config(path).run_folder for path in RECIPES}) == len(RECIPES)


def test_every_block_of_the_page_works_and_it_holds_the_table_that_its_command_prints(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("distill.sizes.table.measure_sizes", measure_once)
    assert run_page("docs/recipes.md") == len(blocks_of("docs/recipes.md"))
    lines = list(takewhile(lambda line: line.startswith("|"), capsys.readouterr().out.splitlines()))
    assert len(lines) == len(RECIPES) + 4 and "\n".join(lines) in PAGE
    columns = lines[0].split("|")[1:-1]
    assert len(set(columns)) == len(columns)


def test_the_page_names_every_recipe():
    assert all(f"`{path.stem}`" in PAGE for path in RECIPES)
