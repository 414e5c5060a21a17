"""Every fenced block of README and docs, run in order in an empty folder, on toys that bear the names the pages use.

Commands run in this process, the stages of `distill pipeline` too (tests/test_pipeline.py launches them). What no toy
can do (two GPUs, an installation) is checked instead: launch files, make's targets and what they name must exist.
"""

import glob
import importlib
import json
import re
import shlex
import shutil
from functools import partial
from pathlib import Path
from string import Template

import pytest
import soundfile
import tiny
import yaml

from distill.cli import main
from distill.command import run_stage
from distill.config import load_config
from distill.config.recipes import find_launch
from distill.evaluation.answering import measure_cost
from shards.manifests.manifest import read_manifest
from teachers.files.checkpoint import save_checkpoint

ROOT = Path(__file__).parents[1]
# whose blocks tests/training/test_extending.py, tests/device/test_device.py and tests/commandline/test_recipes.py run
ELSEWHERE = {"extending.md", "device.md", "recipes.md"}
PAGES = ["CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md") if p.name not in ELSEWHERE)]
SMALL = {
    "data": {"workers": 0},
    "teacher": {"llm": "parts/llm", "whisper": "parts/whisper", "second": "", "second_kind": "", "end_token": ""},
    "teach": {"qformer_width": 64, "qformer_layers": 1, "lora_rank": 4},
    "student": {"llm": "parts/student-llm", "lora_rank": 4},
    "cache": {"k": 16, "batch_size": 4, "max_new_tokens": 4, "num_beams": 1},
    "train": {"steps": 2, "batch_size": 4, "micro_batch_size": 4, "warmup_steps": 1, "save_every": 2, "eval_every": 0},
    "eval": {"num_beams": 1, "max_new_tokens": 4},
}  # what a recipe becomes for the toys; its other fields stay


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Path:
    """A folder with the models, recordings and configs that the pages name."""
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_parts(folder / "parts", student_width=64)  # of whole NF4 blocks, which a device's graph takes
    save_teachers(folder)
    for name, count in (("train", 24), ("test", 4)):
        write_manifest(folder / "my", name, count)
    write_librispeech(folder / "LibriSpeech")
    (folder / "recordings").mkdir()
    for number in range(2):
        soundfile.write(folder / f"recordings/{number}.wav", tiny.tone(number), 16_000)
    shutil.copytree(ROOT / "configs", folder / "configs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("salmonn_3b_to_1b", "teacher_stage1", "teacher_stage2"):
        recipe = folder / f"configs/{name}.yaml"
        recipe.write_text(yaml.safe_dump(shrink(yaml.safe_load(recipe.read_text()))))
    return folder


def save_teachers(folder: Path) -> None:
    """A SALMONN checkpoint, and what the demo leaves."""
    (folder / "checkpoints").mkdir()
    save_checkpoint(tiny.make_teacher(folder / "parts", lora=True), folder / "checkpoints/llama_stage2_ckpt.pth")
    scratch = folder / "runs/demo/scratch"
    tiny.save_teacher(folder / "parts", scratch / "teacher")
    shutil.copytree(folder / "parts/student-llm", scratch / "student-llm")
    for split in ("train", "valid"):
        tiny.make_shards(folder / "data/demo", split=split, num_samples=8)


def write_manifest(folder: Path, name: str, count: int) -> None:
    """`my/train.json` and the like: paths beside it, no two clips alike."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number in range(count):
        clip = f"{name}-{number}.wav"
        soundfile.write(folder / clip, tiny.tone(number, 0.6 + len(name) / 100), 16_000)
        rows.append({"path": clip, "text": f"{tiny.WORDS[number % 10]} {tiny.WORDS[number // 10]}", "task": "asr"})
    (folder / f"{name}.json").write_text(json.dumps({"annotation": rows}))


def write_librispeech(folder: Path) -> None:
    """Four speakers to train on and one to test on, in LibriSpeech's form."""
    for number, part in enumerate(["train-clean-100"] * 4 + ["test-clean"]):
        chapter = folder / part / str(100 + number) / "7"
        chapter.mkdir(parents=True)
        for clip in range(2):
            name = f"{100 + number}-7-000{clip}"
            soundfile.write(chapter / f"{name}.flac", tiny.tone(7 * number + clip, 0.6), 16_000)
            with open(chapter / f"{100 + number}-7.trans.txt", "a") as file:
                file.write(f"{name} {tiny.WORDS[number].upper()} {tiny.WORDS[clip].upper()}\n")


def shrink(recipe: dict) -> dict:
    """A recipe for the toys."""
    return {**recipe, **{section: {**recipe.get(section, {}), **fields} for section, fields in SMALL.items()}}


@pytest.fixture
def place(toys, tmp_path, monkeypatch) -> Path:
    """An empty folder that holds links to the toys, as the one to be in."""
    folder = tmp_path / "place"
    shutil.copytree(toys, folder)
    own = yaml.safe_load((folder / "configs/salmonn_3b_to_1b.yaml").read_text())
    corpus = {"train": "my/train.json", "test": "my/test.json"}
    (folder / "my.yaml").write_text(yaml.safe_dump({**own, "corpus": corpus}))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("distill.evaluation.evaluate.measure_cost", partial(measure_cost, runs=1))
    monkeypatch.setattr(
        "distill.pipeline.launch_stage", lambda module, path, words, launch: run_here(module, path, *words)
    )
    return folder


def blocks_of(page: str) -> list[tuple[str, str]]:
    """Language and text of a page's fenced blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def run_bash(text: str) -> None:
    """Each line of a block: variables, globs and continued lines as a shell has them."""
    variables: dict[str, str] = {}
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(Template(line).substitute(variables), comments=True)
        if words and all(re.match(r"[A-Z]+=", word) for word in words):
            variables |= dict(word.split("=", 1) for word in words)
        elif words:
            run_command([found for word in words for found in (sorted(glob.glob(word)) or [word])])


def run_command(words: list[str]) -> None:
    """Run one command, or check what it names."""
    match words:
        case ["distill", *rest]:
            if "--launch" in rest:
                at = rest.index("--launch")
                find_launch(rest[at + 1])
                rest = rest[:at] + rest[at + 2 :]
            if any(word.startswith("on_policy.") for word in rest):
                rest = [*rest, "on_policy.max_new_tokens=4"]  # as in SMALL, where nothing would read it
            assert main(rest) == 0, words
        case ["accelerate", "launch", "--config_file", file, "-m", module, *rest]:
            assert Path(file).is_file()
            run_here(module, *rest)
        case ["make", *targets]:
            assert all(re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for target in targets)
        case ["source", ".venv/bin/activate"]:
            assert re.search(r"-m venv \.venv$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        case _:
            pytest.fail(f"{shlex.join(words)} is run by no test; add its case here")


def run_here(module: str, *words: str) -> None:
    """What a launcher runs in each of its processes."""
    assert run_stage(getattr(importlib.import_module(module), module.rpartition(".")[2]), words) == 0, words


def run_block(language: str, text: str, names: dict) -> None:
    """Run a block, or read it as what it is."""
    if language == "bash":
        run_bash(text)
    elif language == "python":
        few = re.sub(r"\bsteps=\d+, batch_size=\d+", "steps=2, batch_size=4", text)  # as in SMALL
        exec(compile(few, "block", "exec"), names)
    elif language == "yaml":
        Path("block.yaml").write_text(text)
        load_config("block.yaml")
    elif language == "json":
        Path("block.json").write_text(text)
        assert list(read_manifest(Path("block.json")))
    else:
        assert language == "text", f"a block is of {language!r}; say bash, python, yaml, json, or text for output"


def run_page(page: str) -> int:
    """Every block of a page, in order; Python's see what earlier ones defined. Returns how many worked."""
    names: dict = {}
    blocks = blocks_of(page)
    for language, text in blocks:
        run_block(language, text, names)
    return len(blocks)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)])
def test_every_block_of_a_page_works_in_order(place, page):
    assert run_page(page) == len(blocks_of(page))


def test_a_newcomer_goes_by_the_readme_from_recordings_to_a_transcript_on_another_machine(
    place, tmp_path, monkeypatch, capsys
):
    run_page("README.md")
    assert {path.name for path in Path("audited").iterdir()} == {"audit.jsonl", "test.json", "train.json"}
    assert json.loads(Path("runs/salmonn_3b_to_1b/scorecard.json").read_text())["student"]
    assert sorted(path.name for path in Path("subtitles").iterdir()) == ["0.srt", "1.srt"]
    (tmp_path / "other").mkdir()
    shutil.move("my-student", tmp_path / "other/student")
    soundfile.write(tmp_path / "other/new.wav", tiny.tone(3), 16_000)
    monkeypatch.chdir(tmp_path / "other")
    monkeypatch.setenv("HOME", str(tmp_path / "other"))
    place.rename(tmp_path / "gone")  # the machine that made it
    capsys.readouterr()
    assert main(["transcribe", "student", "new.wav", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["file"] == "new.wav"
