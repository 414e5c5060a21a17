"""A SALMONN trained on given parts: what is frozen stays, ears run once, stage 2 starts from stage 1."""

from pathlib import Path

import pytest
import tiny
import torch

from distill.config import load_config
from distill.run import run
from distill.sizes.costs import Blueprint, measure_sizes
from distill.teach import build_teacher, lora_of, salmonn_config, teach
from distill.training.monitoring.runlog import read_table
from distill.training.stopping import PREEMPTED
from teachers.cached import CachedTeacher
from teachers.files.checkpoint import load_checkpoint
from teachers.files.loading import load_salmonn

ROOT = Path(__file__).parents[2]
SMALL = {"qformer_width": 64, "qformer_layers": 1, "lora_rank": 4, "lora_dropout": 0, "qformer_dropout": 0,
         "windows": "audio", "checkpoint": True}  # fmt: skip


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teach")
    tiny.make_parts(folder / "parts")
    tiny.make_shards(folder / "data")
    return folder


def write(toys: Path, name: str, **changes):
    """A config of a teacher on the toys' parts."""
    parts = {"teacher__path": "''", "teacher__llm": toys / "parts" / "llm",
             "teacher__whisper": toys / "parts" / "whisper"}  # fmt: skip
    values = parts | {f"teach__{field}": value for field, value in SMALL.items()} | changes
    path = tiny.write_config(toys / f"{name}.yaml", toys / "data", "''", toys / "parts", name=name, **values)
    return load_config(path)


def losses(config) -> list[float]:
    return [record["loss"] for record in read_table(config.run_folder, config.train.steps)]


def test_connector_and_lora_learn_and_ears_and_llm_stay_and_the_folder_is_a_teacher(toys):
    config = write(toys, "whole", train__steps=8, train__learning_rate=1e-2)
    start = dict(build_teacher(config).named_parameters())
    assert teach(config) == 0
    teacher = load_salmonn(config.run_folder / "teacher")
    moved = {name for name, p in teacher.named_parameters() if not torch.equal(p, start[name])}
    assert not {name for name in moved if "lora_" not in name and name.startswith(("whisper", "llm"))}
    assert {"project.weight", "ln_speech.weight", "qformer.query"} <= moved and any("lora_B" in name for name in moved)
    first, *_, last = losses(config)
    assert last < 0.9 * first
    released, _ = load_checkpoint(
        config.run_folder / "teacher.pth", llm=config.teacher.llm, whisper=config.teacher.whisper, windows="audio"
    )
    samples = [tiny.make_sample(1), tiny.make_sample(2)]
    with torch.no_grad():
        own, theirs = (model(model.collate(samples))[0] for model in (teacher, released))
    assert torch.allclose(own, theirs, atol=1e-5)


def test_kept_frames_train_as_ears_do_and_are_made_once_and_serve_no_student(toys, capsys):
    heard = write(toys, "heard")
    kept = write(toys, "kept", cache__frames="float16")
    again = write(toys, "again", cache__frames="float16", train__steps=6)
    assert [teach(config) for config in (heard, kept)] == [0, 0]
    assert losses(kept) == pytest.approx(losses(heard), abs=2e-3)
    written = [path.stat().st_mtime_ns for path in sorted((toys / "data" / "frames").glob("*.tar"))]
    capsys.readouterr()
    assert teach(again) == 0 and losses(again)[0] == losses(kept)[0]
    assert written == [path.stat().st_mtime_ns for path in sorted((toys / "data" / "frames").glob("*.tar"))]
    with pytest.raises(ValueError, match="holds frames of ears alone, but targets are asked for"):
        CachedTeacher(toys / "data" / "frames")
    other = write(toys, "other", cache__frames="int8")
    with pytest.raises(ValueError, match=r'features.frames: cached "float16", this run "int8"'):
        teach(other)


def test_a_second_stage_starts_where_the_first_ended_and_only_from_one_of_its_shape(toys):
    one = write(toys, "stage1")
    assert teach(one) == 0
    folder = one.run_folder / "teacher"
    two = write(toys, "stage2", teach__start=folder, train__steps=5)
    first, second = load_salmonn(folder), build_teacher(two)
    own = {name: p for name, p in second.named_parameters() if p.requires_grad}
    assert own and all(torch.equal(p, first.get_parameter(name)) for name, p in own.items())
    assert teach(two) == 0 and len(losses(two)) == 5
    with pytest.raises(ValueError, match=r"teach.start is .*, whose lora rank is 4, but this run's is 8"):
        build_teacher(write(toys, "wide", teach__start=folder, teach__lora_rank=8))
    with pytest.raises(ValueError, match=r"is of model_type llama, but a folder that this library saved is needed"):
        build_teacher(write(toys, "llm", teach__start=toys / "parts" / "llm"))
    with pytest.raises(FileNotFoundError, match=r"holds no config.json, but a saved model does"):
        build_teacher(write(toys, "none", teach__start=toys / "nothing"))


def test_a_teacher_that_was_stopped_goes_on_and_a_student_learns_from_it(toys):
    whole, stopped = write(toys, "unbroken"), write(toys, "broken", train__stop_after=2)
    assert teach(whole) == 0 and teach(stopped) == PREEMPTED
    assert not (stopped.run_folder / "teacher").exists()
    assert teach(write(toys, "broken")) == 0
    assert losses(stopped) == losses(whole)
    student = load_config(toys / "broken.yaml", [
        "name=student", f"teacher.path={stopped.run_folder}/teacher", "teacher.online=true", "train.steps=1",
    ])  # fmt: skip
    assert run(student) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher__path": "some/teacher"}, "teacher.path is some/teacher, but `distill teach` makes a teacher"),
        ({"teacher__whisper": "''"}, "teacher.whisper is empty, but a teacher is made of parts"),
        ({"teacher__llm": "''"}, "teacher.llm is empty, but a teacher is made of parts"),
    ],
)
def test_a_teacher_of_no_parts_or_one_that_is_there_already_is_refused(toys, changes, message):
    with pytest.raises(ValueError, match=message):
        teach(write(toys, "refused", **changes))


def test_settings_of_a_teacher_that_nothing_reads_are_refused(toys):
    with pytest.raises(ValueError, match=r"teach.lora_rank is 4, but nothing reads it without scratch.steps=0"):
        write(toys, "scratch", teacher__llm="''", teacher__whisper="''", scratch__steps=3)
    parts = {"teacher__llm": toys / "parts" / "llm", "scratch__steps": 3}
    with pytest.raises(ValueError, match=r"teacher.llm is .*, but scratch.steps is 3 and makes a teacher of its own"):
        tiny.write_config(toys / "both.yaml", toys / "data", "''", toys / "parts", **parts)
    with pytest.raises(ValueError, match=r"teach.qformer_width is 100, but a head is 64 wide"):
        write(toys, "odd", teach__qformer_width=100)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_recipes_teacher_has_salmonns_official_shapes(stage):
    config = load_config(ROOT / "configs" / f"teacher_stage{stage}.yaml")
    sizes = measure_sizes(Blueprint(salmonn_config(config), lora_of(config.teach), torch.float32))
    millions = {part: round(parameters / 1e6, 2) for part, (parameters, _) in sizes.items()}
    assert millions["Whisper encoder"] == pytest.approx(637, abs=1) and millions["BEATs"] == pytest.approx(90.7, abs=1)
    assert millions["Q-Former"] + millions["projection"] == pytest.approx(25.2, abs=0.1)
    assert sizes["LoRA"][0] == 28 * 8 * (2 * 3072 + 3072 + 1024)  # q and v of 28 blocks, rank 8
