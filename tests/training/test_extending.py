"""`docs/extending.md` runs as it stands; teachers, students and samples are taken in every form that it names."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile
import tiny
import torch

from distill import Distiller, EvalConfig, LossConfig, Own, OwnTerm, TrainConfig
from distill.cache import cache
from distill.config import load_config
from distill.training.identity import identify_fit
from distill.training.resuming import compare
from shards.packing.items import pack_items
from shards.streaming.order import Order
from shards.streaming.selection import Selection
from shards.streaming.stream import ShardStream
from shards.tars.archive import ShardError
from students import build_student, load_student, save_student
from teachers import CachedTeacher, Lora, load_salmonn
from teachers.teacher import NoTeacher

OPTIONS = TrainConfig(steps=2, batch_size=4, warmup_steps=1, trackers=())
LORA = Lora(rank=4)
DOC = Path(__file__).parents[2] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_toys(folder)
    student = make_student(folder)
    save_student(student, folder / "student", lora=LORA, quantization="none")
    cache(load_config(folder / "toy.yaml", ["data.labelled_share=0.5", "student.quantization=none"]))
    return folder


def make_student(toys, **changes):
    return build_student(load_salmonn(toys / "teacher"), str(toys / "parts" / "student-llm"), lora=LORA,
                         quantization="none", **changes)  # fmt: skip


def fit(toys, folder, teacher=None, student=None, **changes):
    options = changes.pop("options", OPTIONS)
    train = changes.pop("train", toys / "data" / "train")
    return Distiller(teacher, student or toys / "student", train=train, options=options, run=folder, **changes)


def test_every_block_of_the_document_runs(toys, tmp_path):
    names = {"teacher": toys / "teacher", "student": toys / "student", "data": toys / "data/train", "runs": tmp_path}
    blocks = re.findall(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert len(blocks) == 7
    for block in blocks:
        exec(compile(block, str(DOC), "exec"), names)
    assert len(names["heard"][0].segments) > 2 and names["heard"][0].segments[-1].end == 5.0


def test_a_model_a_folder_and_a_teacher_by_path_train_alike(toys, tmp_path):
    first = fit(toys, tmp_path / "a", toys / "teacher").fit()
    second = fit(toys, tmp_path / "b", load_salmonn(toys / "teacher"), make_student(toys)).fit()
    assert first.losses == second.losses and len(first.losses) == 2


def test_a_cache_is_read_as_its_header_says_it_was_made(toys, tmp_path):
    run = fit(toys, tmp_path / "a", toys / "data" / "cache")
    assert run.stream.selection.labelled_share == CachedTeacher(toys / "data" / "cache").labelled_share == 0.5
    assert len(run.fit().losses) == 2
    stream = ShardStream(toys / "data" / "train", Order(batch_size=4), Selection(targets=toys / "data" / "cache"))
    with pytest.raises(ValueError, match=r"labelled_share of the stream is 1, but .*cache was made with 0\.5"):
        fit(toys, tmp_path / "b", toys / "data" / "cache", train=stream)
    for loss, message in ((LossConfig(temperature=3), r"kept at 1, 2 alone"), (LossConfig(hidden=1), "no states of")):
        with pytest.raises(ValueError, match=message):
            fit(toys, tmp_path / "c", toys / "data" / "cache", loss=loss)


def test_splits_in_which_other_channels_were_heard_are_refused(toys, tmp_path):
    shutil.copytree(toys / "data" / "train", tmp_path / "valid")
    listing = json.loads((tmp_path / "valid" / "index.json").read_text())
    listing["options"]["channels"] = "mean"
    (tmp_path / "valid" / "index.json").write_text(json.dumps(listing))
    stream = ShardStream(toys / "data" / "train", Order(batch_size=4))
    for train in (stream, toys / "data" / "train", str(toys / "data" / "train" / "*.tar")):
        with pytest.raises(ShardError, match=r"channels of .*train left, .*valid mean, but .* hear several channels"):
            fit(toys, tmp_path / "a", train=train, valid=tmp_path / "valid")


def test_a_finished_fit_called_again_gives_the_whole_runs_result(toys, tmp_path):
    options = TrainConfig(steps=3, batch_size=4, trackers=())
    run = fit(toys, tmp_path, toys / "teacher", options=TrainConfig(steps=3, batch_size=4, trackers=(), stop_after=1),
              valid=toys / "data" / "train", answers=EvalConfig(max_new_tokens=2))  # fmt: skip
    assert run.fit().preempted
    whole = fit(toys, tmp_path, toys / "teacher", options=options, valid=toys / "data" / "train",
                answers=EvalConfig(max_new_tokens=2))  # fmt: skip
    result = whole.fit()
    assert [r["step"] for r in result.metrics] == [1, 2, 3] and "valid/asr" in result.metrics[-1] and result.scores
    again = whole.fit()  # the same object
    other = fit(toys, tmp_path, toys / "teacher", whole.student, options=options, valid=toys / "data" / "train")
    for found in (again, other.fit()):
        assert (found.metrics, found.losses, found.scores) == (result.metrics, result.losses, result.scores)
    pandas = pytest.importorskip("pandas")
    assert list(pandas.DataFrame(result.metrics)["loss"]) == result.losses


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": LossConfig(kl=0.5)}, r"loss\.kl: 1\.0 there, 0\.5 here"),
        ({"student": 7}, r"student\.own: \w{16} there, \w{16} here"),
        ({"teacher": None}, r"targets: .* there, nothing here"),
        ({"options": TrainConfig(steps=2, batch_size=4, learning_rate=1e-3)}, r"train\.learning_rate: 0\.0001 there"),
        ({"own": Own({"mine": OwnTerm(1.0, lambda seen: seen.logits_SV.sum(-1))})}, r"terms: nothing there"),
    ],
)
def test_another_run_in_the_same_folder_is_refused_field_by_field(toys, finished, changes, message):
    seed = changes.get("student")
    given = {"teacher": toys / "teacher", **changes}
    if seed is not None:
        given["student"] = make_student(toys, seed=seed)
    with pytest.raises(ValueError, match=message):
        fit(toys, finished, **given)


def test_a_students_frozen_parts_are_known_by_their_contents_and_said_once(toys, tmp_path):
    llm = shutil.copytree(toys / "parts" / "student-llm", tmp_path / "llm")
    student = build_student(load_salmonn(toys / "teacher"), str(llm), lora=LORA, quantization="none")
    began = identify_fit(student, NoTeacher(), LossConfig(), {}, {})
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        data = (llm / name).read_bytes()
        (llm / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        now = identify_fit(student, NoTeacher(), LossConfig(), {}, {})
        assert [field for field, _ in compare(began, now)] == ["student.frozen.llm"]
        (llm / name).write_bytes(data)
    given = {"student": {"llm": "as a config's settings say it"}}
    assert identify_fit(student, NoTeacher(), LossConfig(), {}, given)["student"].keys() == {"own", "llm"}


@pytest.fixture(scope="module")
def finished(toys):
    fit(toys, toys / "finished", toys / "teacher").fit()
    return toys / "finished"


def test_samples_of_python_and_of_hugging_face_become_the_same_shards_once(toys, tmp_path, capsys):
    clips = [(tiny.tone(n, 0.5 + 0.1 * n), "one two") for n in range(3)]
    paths = [tmp_path / f"{n}.wav" for n in range(3)]
    for path, (waveform_N, _) in zip(paths, clips):
        soundfile.write(path, waveform_N, 16_000, subtype="FLOAT")
    dicts = [{"audio": (x, 16_000), "text": text} for x, text in clips]
    hub = datasets.Dataset.from_dict({"audio": [str(p) for p in paths], "sentence": [text for _, text in clips]})
    hub = hub.cast_column("audio", datasets.Audio(decode=False))
    first = pack_items(dicts, tmp_path / "out", "train", max_seconds=2.0)
    assert pack_items(iter(dicts), tmp_path / "out", "train", max_seconds=2.0) == first
    assert "holds these 3 samples, used again" in capsys.readouterr().out
    second = pack_items(hub, tmp_path / "out", "train", max_seconds=2.0)
    rows = [{"audio": str(path), "sentence": "one two"} for path in paths]
    of_unknown_columns = datasets.IterableDataset.from_generator(lambda: iter(rows))
    for streamed in (hub.to_iterable_dataset(), of_unknown_columns):
        assert pack_items(streamed, tmp_path / "out", "train", max_seconds=2.0) == second
    batches = [next(iter(ShardStream(folder, Order(batch_size=3, epochs=1)))) for folder in (first, second)]
    read = [sorted(sample.sha256 for sample in batch) for batch in batches]
    assert read[0] == read[1] and not list((tmp_path / "out").glob(".*"))
    run = fit(toys, tmp_path / "run", train=dicts)
    assert len(run.fit().losses) == 2
    with pytest.raises(ValueError, match="the stream's state has data"):
        fit(toys, tmp_path / "run", train=dicts[:2])


def test_a_manifest_is_packed_once_into_the_runs_folder(toys, tmp_path, capsys):
    manifest = toys / "data" / "train.json"
    changes = {"train": manifest, "valid": str(manifest), "answers": EvalConfig(max_new_tokens=2)}
    result = fit(toys, tmp_path, **changes).fit()
    assert len(result.losses) == 2 and result.scores and "(0 were done), 12 samples" in capsys.readouterr().err
    assert fit(toys, tmp_path, **changes).fit().losses == result.losses
    assert "(1 were done), 12 samples" in capsys.readouterr().err
    assert sorted(path.name[:6] for path in (tmp_path / "data").iterdir()) == ["train-", "valid-"]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], r"train holds no sample"),
        ([5], r"train\[0\] is int, but a sample is a Sample or a dict with audio and text"),
        ([{"audio": np.zeros(9)}], r"train\[0\] is audio, but a sample is"),
        ([{"audio": np.zeros(9, int), "text": "a"}], r"train\[0\]\.audio is int64 of shape \(9,\), but must be a path"),
        ([{"audio": "gone.wav", "text": "a"}], r"train\[0\]\.audio is gone\.wav, but cannot be read"),
        ({"train": [], "test": []}, r"train holds splits \(train, test\), but one is needed"),
        (datasets.Dataset.from_dict({"audio": ["a"], "words": ["b"]}), r"columns of train are audio, words, but none"),
    ],
)
def test_what_is_no_sample_is_refused_by_its_place(tmp_path, items, message):
    with pytest.raises((ValueError, OSError), match=message):
        pack_items(items, tmp_path, "train")


def test_callbacks_hear_every_event_in_order_and_a_misspelt_one_is_refused(toys, tmp_path):
    heard = []

    class All:
        def __getattr__(self, name):
            raise AttributeError(name)

    for name in ("on_start", "on_step", "on_validation", "on_save", "on_end", "on_close"):
        setattr(All, name, lambda self, run, *args, name=name: heard.append(name))
    fit(toys, tmp_path, valid=toys / "data" / "train", answers=EvalConfig(max_new_tokens=2), callbacks=[All()]).fit()
    assert heard == ["on_start", "on_step", "on_step", "on_validation", "on_save", "on_end", "on_close"]
    heard.clear()
    fit(toys, tmp_path, valid=toys / "data" / "train", callbacks=[All()]).fit()
    assert heard == []

    class Misspelt:
        def on_stepp(self, run, record):
            """Never called."""

    with pytest.raises(ValueError, match=r"callback Misspelt has the event on_stepp, .* did you mean on_step\?"):
        fit(toys, tmp_path / "b", callbacks=[Misspelt()])


def test_a_callback_that_fails_ends_the_run_which_the_same_call_goes_on_with(toys, tmp_path):
    closed = []

    class Fails:
        def on_step(self, run, record):
            raise RuntimeError("no")

        def on_close(self, run):
            closed.append(True)

    with pytest.raises(RuntimeError, match="no"):
        fit(toys, tmp_path, callbacks=[Fails()]).fit()
    assert closed and len(fit(toys, tmp_path).fit().losses) == 2


def test_an_own_term_does_not_depend_on_micro_batches(toys, tmp_path):
    terms = {"mine": OwnTerm(0.5, lambda seen: seen.hidden_SD.square().mean(-1))}
    loss = LossConfig(ce=0, kl=0, feature=0)
    losses = [
        fit(toys, tmp_path / str(size), toys / "teacher", loss=loss, own=Own(terms),
            options=TrainConfig(steps=2, batch_size=4, micro_batch_size=size, trackers=())).fit()
        for size in (1, 4)
    ]  # fmt: skip
    assert losses[0].losses == pytest.approx(losses[1].losses, abs=1e-5)
    assert losses[0].metrics[0]["mine"] == pytest.approx(losses[0].losses[0])
    with pytest.raises(ValueError, match=r"terms names 'kl', but that name is taken"):
        fit(toys, tmp_path / "b", own=Own({"kl": terms["mine"]}))


def test_the_packages_faces_import_nothing_before_they_are_asked():
    code = "import sys, teachers, students; from distill import TrainConfig; print(TrainConfig().steps)"
    code += "; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "1000\n"


def test_a_loaded_student_is_trained_on(toys, tmp_path):
    run = fit(toys, tmp_path, student=str(toys / "student"))
    assert {n.split(".")[0] for n in run.named if "lora_" not in n} == {"ln_speech", "qformer", "project"}
    before = load_student(toys / "student").project.weight
    run.fit()
    assert not torch.equal(run.student.project.weight, before)
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
