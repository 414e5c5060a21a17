"""The pipeline: what it uses again is of this very config, and its stages end with it."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import soundfile
import tiny

import shards.demo.synth
from distill.cli import main
from distill.config import Config, load_config
from distill.evaluation.evaluate import evaluate_run
from distill.pipeline import launch_stage, make_shards, run_pipeline
from distill.run import find_valid, run
from distill.training.monitoring.trackers import TRACKERS
from shards.manifests.manifest import read_manifest
from shards.sample import SAMPLE_RATE


def write_corpus(folder, num_clips: int = 8) -> None:
    """Clips of tones, and the manifest `all.json` of them."""
    rows = []
    for number in range(num_clips):
        soundfile.write(folder / f"{number}.wav", tiny.tone(number), SAMPLE_RATE, subtype="PCM_16")
        rows.append({"path": f"{folder}/{number}.wav", "text": tiny.WORDS[number], "task": "asr"})
    (folder / "all.json").write_text(json.dumps({"annotation": rows}))


def configure(folder, *words: str) -> Config:
    (folder / "own.yaml").write_text(f"{{data: {{folder: {folder}/data}}, corpus: {{train: {folder}/all.json}}}}")
    return load_config(folder / "own.yaml", ["corpus.valid_share=0.25", *words])


def test_a_changed_manifest_or_share_is_not_trained_on_from_the_old_cut(tmp_path):
    write_corpus(tmp_path)
    make_shards(configure(tmp_path))
    make_shards(configure(tmp_path))
    with pytest.raises(ValueError, match=r"and corpus\.valid_share 0\.5, but .*manifests was cut from .* with 0\.25;"):
        make_shards(configure(tmp_path, "corpus.valid_share=0.5"))
    write_corpus(tmp_path, num_clips=9)
    with pytest.raises(
        ValueError, match=r"corpus\.train is .*all\.json with sha256 \w{16} and .*choose another data\."
    ):
        make_shards(configure(tmp_path))
    assert len(list(read_manifest(tmp_path / "data/manifests/train.json"))) == 6


def test_a_cut_that_was_interrupted_is_made_again(tmp_path):
    write_corpus(tmp_path)
    config = configure(tmp_path)
    config.manifest("train").parent.mkdir(parents=True)
    for name in ("train", "valid"):
        config.manifest(name).write_text('{"annotation": []}')
    make_shards(config)
    assert len(list(read_manifest(config.manifest("train")))) == 6


def test_an_embedded_corpus_of_another_size_is_not_used_again_and_one_of_another_seed_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shards.demo.synth, "SIZES", {"train": 4, "valid": 2, "test": 2})
    (tmp_path / "own.yaml").write_text(f"{{data: {{folder: {tmp_path}/data}}, corpus: {{kind: synth}}}}")
    make_shards(load_config(tmp_path / "own.yaml", ["corpus.num_train=4"]))
    manifest = tmp_path / "data" / "corpus" / "train.json"
    before = manifest.read_bytes()
    make_shards(load_config(tmp_path / "own.yaml", ["corpus.num_train=4", "seed=1"]))
    assert "exists, used again" in capsys.readouterr().err and manifest.read_bytes() == before
    with pytest.raises(ValueError, match=r"corpus\.num_train is 6, but the corpus in .*corpus was made with 4; choose"):
        make_shards(load_config(tmp_path / "own.yaml", ["corpus.num_train=6"]))
    (tmp_path / "data" / "corpus" / "corpus.json").unlink()  # as when it was interrupted
    make_shards(load_config(tmp_path / "own.yaml", ["corpus.num_train=4"]))
    assert manifest.read_bytes() == before


def test_a_pipelines_shards_hold_no_more_samples_than_its_config_says(tmp_path):
    config = configure(tmp_path, "corpus.shard_samples=3", "corpus.valid_share=0.125")
    write_corpus(tmp_path)
    make_shards(config)
    index = json.loads((config.shards("train") / "index.json").read_text())
    assert [shard["samples"] for shard in index["shards"]] == [3, 3, 1]
    with pytest.raises(ValueError, match=r"corpus\.shard_samples is 0, but must be above 0"):
        configure(tmp_path, "corpus.shard_samples=0")


def test_a_pipeline_packs_the_channels_of_its_config_and_a_run_or_score_of_splits_that_differ_is_refused(tmp_path):
    write_corpus(tmp_path)
    for channels, split in (("mean", "train"), ("left", "valid")):
        config = configure(tmp_path, f"data.folder={tmp_path}/{channels}", f"corpus.channels={channels}")
        make_shards(config)
        packed = json.loads((config.shards(split) / "index.json").read_text())
        assert packed["options"]["channels"] == channels
    shutil.rmtree(tmp_path / "left" / "train")
    (tmp_path / "mean" / "train").rename(tmp_path / "left" / "train")
    words = [f"data.folder={tmp_path}/left", f"runs={tmp_path}"]
    with pytest.raises(ValueError, match=r"channels of .*train mean, .*valid left, but .* pack one of them again"):
        run(configure(tmp_path, *words))
    (tmp_path / "run" / "student").mkdir()
    (tmp_path / "run" / "student" / "config.json").touch()
    with pytest.raises(ValueError, match=r"channels of .*train mean, .*valid left"):
        evaluate_run(configure(tmp_path, *words))


def test_validations_that_have_no_split_are_said_to_be_none(tmp_path, capsys):
    for every, said in ((5, True), (0, False)):
        assert find_valid(configure(tmp_path, f"train.eval_every={every}"), None, None) is None
        assert ("train.eval_every is 5, but" in capsys.readouterr().err) == said


@pytest.mark.parametrize("command", ["pack", "audit"])
def test_own_prompts_decide_which_tasks_there_are_and_which_need_a_question(tmp_path, capsys, command):
    soundfile.write(tmp_path / "a.wav", tiny.tone(1), 16_000)
    rows = [{"path": "a.wav", "text": "x", "task": task} for task in ("emotion", "riddle")]
    (tmp_path / "m.json").write_text(json.dumps({"annotation": [rows[0], {**rows[1], "Q": "Who?"}, rows[1]]}))
    prompts = {"emotion": "<Speech><SpeechHere></Speech> How do they feel?", "riddle": "<SpeechHere> {}"}
    (tmp_path / "own.json").write_text(json.dumps(prompts))
    out = {"pack": [str(tmp_path / "out")], "audit": ["--out", str(tmp_path / "out"), "--keep", "duplicate"]}[command]
    words = [command, str(tmp_path / "m.json"), *out, "--workers", "1"]
    assert main(words) == {"pack": 1, "audit": 0}[command]  # to audit, an unknown task is one more finding
    said = capsys.readouterr()
    assert {"pack": "is 'emotion', but there are prompts for", "audit": "unknown_task"}[command] in said.err + said.out
    assert main([*words, "--prompts", str(tmp_path / "own.json")]) == 0
    assert "missing_question" in capsys.readouterr().out
    assert main([*words, "--prompts", str(tmp_path / "gone.json")]) == 1


def test_a_pipeline_packs_the_tasks_of_its_teachers_prompts(tmp_path):
    write_corpus(tmp_path)
    rows = json.loads((tmp_path / "all.json").read_text())["annotation"]
    (tmp_path / "all.json").write_text(json.dumps({"annotation": [{**row, "task": "emotion"} for row in rows]}))
    with pytest.raises(ValueError, match=r"'emotion', but there are prompts for .* or teacher\.prompts in a config"):
        make_shards(configure(tmp_path))
    (tmp_path / "own.json").write_text('{"emotion": "<SpeechHere> How do they feel?"}')
    make_shards(configure(tmp_path, f"teacher.prompts={tmp_path}/own.json"))
    assert (tmp_path / "data/train/index.json").exists()


STAGE = """
import os, signal, sys
from distill.commandline.launch import bind_to_launcher

bind_to_launcher()

def stop(number, frame):
    open(sys.argv[1] + "/stopped", "w").write(str(number))
    sys.exit(143)

for each in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(each, stop)
woken, waker = os.pipe()
os.set_blocking(waker, False)
signal.set_wakeup_fd(waker)  # a signal that comes just before the read ends it too; a pause it would not
open(sys.argv[1] + "/ready", "w").close()
os.read(woken, 1)
"""
LAUNCHER = """
import os, subprocess, sys
from distill.commandline.launch import bind_to_launcher, name_parent

bind_to_launcher()
environment = {**os.environ, **name_parent()}
subprocess.Popen([sys.executable, "-m", "stage", *sys.argv[1:]], env=environment).wait()
"""  # as that of accelerate for one process: a signal ends it at once


@pytest.mark.parametrize("module", ["stage", "launcher"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_a_signal_stops_the_running_stage_in_order_and_leaves_no_process(tmp_path, module, number):
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    os.mkfifo(tmp_path / "ready")
    program = f"from distill.pipeline import launch_stage; launch_stage({module!r}, {str(tmp_path)!r}, [], None)"
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{tmp_path}"}
    pipeline = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, text=True)
    (tmp_path / "ready").read_text()  # returns when the stage is there
    pipeline.send_signal(number)
    _, said = pipeline.communicate(timeout=60)  # ends when nobody holds stderr any more
    if number == signal.SIGKILL:
        assert pipeline.returncode == -number
    else:
        assert pipeline.returncode == 143 and "the same command goes on" in said
    assert int((tmp_path / "stopped").read_text()) in (number, signal.SIGTERM)  # a launcher's end is a SIGTERM


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("teacher.path=nope.pth", r"teacher\.path is nope\.pth, but there is nothing; give the path"),
        ("teacher.path=''", r"teacher\.path is empty, but the pipeline needs it; give it, as in teacher\.path=…"),
        ("corpus.test=nope.json", r"corpus\.test is nope\.json, but there is nothing"),
        ("teacher.second=nope.pt", r"teacher\.second is nope\.pt, but there is nothing"),
        ("student.llm=''", r"student\.llm is empty, but the pipeline needs it"),
        ("train.trackers=[aim]", r"train\.trackers names aim, but its package is not installed; run `pip install none"),
    ],
)
def test_what_a_later_stage_would_miss_is_refused_before_anything_is_packed(tmp_path, monkeypatch, word, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(TRACKERS, "aim", "none_of_this_name")
    (tmp_path / "train.json").write_text('{"annotation": []}')
    (tmp_path / "teacher").mkdir()
    config = tmp_path / "own.yaml"
    config.write_text("{corpus: {train: train.json}, teacher: {path: teacher}, student: {llm: Llama}}")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_pipeline(str(config), [word], None)
    assert not (tmp_path / "data").exists()


# All that a run has to say, and a bar of what took more than a second
TELLING = re.compile(
    r"teacher .*: answers end with |\w[\w ]* ━+ \d+/\d+ \d+ samples/s|— (teach|cache|run|export)$|"
    r"corpus: |teacher: |student: |student answers with |connector: |.*: \d+ shards \(\d+ were done\), \d+ samples|"
    r".* holds no checkpoint to go on from: step 1 is next$|warning: the teacher's cross-entropy on the answers|"
    r"\w[\w -]*: \d+/\d+, [\d.]+ (steps|clips|samples|shards)/s, \d+ s left|all stages: |"
    r"head \w+, ears \w+, products \w+: logits "
)


def run_here(module: str, path: str, words: list[str], launch: str | None) -> None:
    """A stage in this process, as `python -m` runs it."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", [module, path, *words])
        warnings.filterwarnings("ignore", f"'{module}' found in sys.modules")  # it is here already
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert ended.value.code == 0, module


def launch_the_first(module: str, *arguments) -> None:
    """The stage that imports most in a process of its own, as all are; the others pay no imports again."""
    (launch_stage if module == "distill.teach" else run_here)(module, *arguments)


@contextmanager
def warnings_of_processes() -> Iterator[list[warnings.WarningMessage]]:
    """The warnings that Python would print in processes of their own."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        yield warned


def test_the_demo_goes_from_nothing_to_a_scorecard_and_uses_all_of_it_again(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(shards.demo.synth, "SIZES", {"train": 24, "valid": 8, "test": 8})
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # the pipeline sets it for its process
    words = [f"runs={tmp_path}/runs", f"data.folder={tmp_path}/data", "corpus.num_train=24", "data.workers=0"]
    words += ["scratch.steps=2", "scratch.ear_steps=2", "scratch.text_steps=2", "train.steps=2", "train.batch_size=8"]
    words += ["train.warmup_steps=1", "eval.max_new_tokens=4"]
    demo = str(Path(__file__).resolve().parents[1] / "configs" / "demo.yaml")
    monkeypatch.setattr("distill.pipeline.launch_stage", launch_the_first)
    with warnings_of_processes() as warned:
        run_pipeline(demo, words, None)
    card = json.loads((tmp_path / "runs" / "demo" / "scorecard.json").read_text())
    assert card["training"]["steps"] == 2 and card["device"]["scores"].keys() == card["student"]["scores"].keys()
    said = capfd.readouterr().err
    noise = [line for line in said.splitlines() if not TELLING.match(line)]
    assert not noise and not warned, (noise, [str(warning.message) for warning in warned])
    monkeypatch.setattr("distill.pipeline.launch_stage", run_here)  # no need of processes: nothing is left to do
    run_pipeline(demo, words, None)
    said = capfd.readouterr().err
    for stage in ("corpus: ", "teacher: ", "cache: ", "device: "):
        assert any(line.startswith(stage) and line.endswith("used again") for line in said.splitlines()), stage
    assert "demo is trained, used again: after step 2" in said
    assert json.loads((tmp_path / "runs" / "demo" / "scorecard.json").read_text())["retained"] == card["retained"]
