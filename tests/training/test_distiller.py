"""The loop: split batches, cached targets, resumed runs and bad steps give the losses they should."""

import dataclasses
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate.parallelism_config import ParallelismConfig
from safetensors.torch import load_file

from distill.cache import cache
from distill.config import LossConfig, TrainConfig, load_config
from distill.distiller import Distiller, Run
from distill.run import run, wrap_teacher
from distill.training import checkpoint
from distill.training.checkpoint import find_checkpoint, prune, save_checkpoint
from distill.training.identity import identify_settings
from distill.training.ranks import OTHER_SPLITS, build_accelerator, refuse_other_splits
from distill.training.resuming import check_changes, compare
from distill.training.update.spikes import BadStepsError
from shards.packing.pack import pack
from shards.streaming.order import Order
from shards.streaming.selection import Selection
from shards.streaming.stream import ShardStream
from students.hearing import Connector
from students.student import build_student, load_student, save_student
from teachers.cached import CachedTeacher
from teachers.files.loading import load_salmonn, own_tensors
from teachers.lora import Lora
from teachers.online import OnlineTeacher

OPTIONS = TrainConfig(
    steps=5,
    batch_size=4,
    micro_batch_size=4,
    learning_rate=2e-3,  # Adam makes of a rounding error in a tiny gradient a step of this size
    warmup_steps=2,
    save_every=100,
    min_learning_rate=1e-4,
)
LORA = Lora(rank=4)
STATE = {"identity": {}, "stream": {}, "best": {}}  # beside a checkpoint's tensors


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_toys(folder, cache__codec="dense", cache__features="float16")
    tiny.make_shards(folder / "data", split="valid", num_samples=4)
    cache(load_config(folder / "toy.yaml"))
    return folder


def make_distiller(toys, run_folder, teacher=None, **changes) -> Distiller:
    """A run on the toys; online teacher by default."""
    model = load_salmonn(toys / "teacher")
    student = build_student(model, str(toys / "parts" / "student-llm"), lora=LORA, connector=Connector("new"))
    loss, valid = changes.pop("loss", LossConfig()), changes.pop("valid", None)
    return Distiller(teacher or OnlineTeacher(model), student, train=toys / "data" / "train", valid=valid, loss=loss,
                     options=dataclasses.replace(OPTIONS, **changes), run=run_folder)  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(toys):
    return make_distiller(toys, toys / "uninterrupted").fit().losses


@pytest.mark.parametrize("name, split", OTHER_SPLITS.items())
def test_a_launch_or_accelerator_that_splits_models_in_another_way_is_refused(toys, tmp_path, monkeypatch, name, split):
    accelerator = build_accelerator()
    monkeypatch.setenv(name, "true")
    for build in (build_accelerator, lambda: make_distiller(toys, Run(tmp_path, accelerator=accelerator))):
        with pytest.raises(ValueError, match=f"splits models by {split}, but runs are split by DDP, DeepSpeed"):
            build()


def test_an_accelerator_with_a_parallelism_config_is_refused_without_a_word_of_the_launch():
    with pytest.raises(ValueError, match="splits models by a parallelism_config"):
        refuse_other_splits(SimpleNamespace(parallelism_config=ParallelismConfig(), state=build_accelerator().state))
    refuse_other_splits(build_accelerator())


def test_losses_fall(uninterrupted):
    assert len(uninterrupted) == 5
    assert uninterrupted[-1] < uninterrupted[0]


def test_a_resumed_run_draws_the_dropout_of_the_uninterrupted_one(toys, tmp_path):
    def make(folder, **changes) -> Distiller:
        model = load_salmonn(toys / "teacher")
        lora = dataclasses.replace(LORA, dropout=0.2)
        student = build_student(model, str(toys / "parts" / "student-llm"), lora=lora,
                                connector=Connector(dropout=0.2))  # fmt: skip
        return Distiller(OnlineTeacher(model), student, train=toys / "data" / "train", run=tmp_path / folder,
                         options=dataclasses.replace(OPTIONS, **changes))  # fmt: skip

    make("part", stop_after=3).fit()
    losses = make("part").fit().losses
    assert losses == make("whole").fit().losses
    assert losses[0] != make_distiller(toys, tmp_path / "none", steps=3).fit().losses[0]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_losses_do_not_depend_on_micro_batches(toys, tmp_path, uninterrupted, micro_batch_size):
    result = make_distiller(toys, tmp_path, micro_batch_size=micro_batch_size).fit()
    assert result.losses == pytest.approx(uninterrupted, abs=1e-5)


def test_the_student_keeps_the_weights_of_its_best_validation(toys, tmp_path):
    distiller = make_distiller(toys, tmp_path, valid=toys / "data" / "valid", eval_every=1, keep=1, learning_rate=0.05)
    result = distiller.fit()
    lines = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    errors = [line.pop("error") for line in lines]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert result.best_step == 1 + errors.index(min(errors))
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved == sorted({f"step-{result.best_step:06d}", "step-000005"})
    best = load_file(tmp_path / "checkpoints" / f"step-{result.best_step:06d}" / "trainable.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in own_tensors(distiller.student).items())


def test_a_wrong_path_of_validation_shards_is_refused_before_the_first_step(toys, tmp_path):
    with pytest.raises(ValueError, match="no shard matches"):
        make_distiller(toys, tmp_path, valid=toys / "data" / "vallid")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": None, "task": "asr"}, r"valid is .*valid, but none of its 2 clips has a text that answers are"),
        (
            {"text": "one", "task": "speech_translation"},
            r"with answers to speech_translation, but there are metrics of",
        ),
    ],
)
def test_a_validation_split_that_cannot_be_scored_is_refused_before_the_first_step(toys, tmp_path, row, message):
    rows = [{"path": str(toys / "data" / "audio" / f"valid-00{number}.wav"), **row} for number in (0, 1)]
    (tmp_path / "valid.json").write_text(json.dumps({"annotation": rows}))
    pack(tmp_path / "valid.json", tmp_path / "valid", workers=1)
    with pytest.raises(ValueError, match=message):
        make_distiller(toys, tmp_path / "run", valid=tmp_path / "valid")


def test_resumed_run_repeats_the_uninterrupted_losses_bit_by_bit(toys, tmp_path, uninterrupted):
    first = make_distiller(toys, tmp_path, stop_after=2).fit()
    assert first.preempted and first.losses == uninterrupted[:2]
    second = make_distiller(toys, tmp_path).fit()
    assert second.losses == uninterrupted


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(toys, tmp_path, uninterrupted, capsys):
    make_distiller(toys, tmp_path, save_every=1, stop_after=3).fit()
    file = tmp_path / "checkpoints" / "step-000003" / "trainable.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert make_distiller(toys, tmp_path).fit().losses == uninterrupted
    assert "step-000003 is passed over: trainable.safetensors has another sha256" in capsys.readouterr().err


@pytest.mark.parametrize("call", range(1, 10))
def test_a_crash_while_a_checkpoint_is_written_costs_only_that_checkpoint(tmp_path, call):
    tensors = {"a": torch.arange(4.0)}
    save_checkpoint(tmp_path, 1, STATE, tensors, tensors)
    child = os.fork()
    if child == 0:
        left = [call]

        def fatal(function):
            def wrapper(*arguments):
                left[0] -= 1
                return os._exit(86) if left[0] == 0 else function(*arguments)

            return wrapper

        checkpoint.save_file = fatal(checkpoint.save_file)
        os.fsync, os.replace = fatal(os.fsync), fatal(os.replace)
        save_checkpoint(tmp_path, 2, STATE, tensors, tensors)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 86
    assert find_checkpoint(tmp_path, print).step == (2 if call == 9 else 1)  # it has its name before the last sync


def test_a_stop_on_a_saving_step_writes_one_checkpoint(toys, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(checkpoint, "save_checkpoint", lambda _, step, *rest: written.append(step))
    make_distiller(toys, tmp_path, save_every=2, stop_after=2).fit()
    assert written == [2]


def test_a_whole_checkpoint_is_never_taken_away_and_a_damaged_one_is_replaced(tmp_path):
    tensors = {"a": torch.arange(4.0)}
    first = save_checkpoint(tmp_path, 1, STATE, tensors, tensors)
    number = first.stat().st_ino
    assert save_checkpoint(tmp_path, 1, STATE, tensors, tensors).stat().st_ino == number
    (first / "trainable.safetensors").write_bytes(b"")
    save_checkpoint(tmp_path, 1, STATE, tensors, tensors)
    assert checkpoint.damage(first) is None


def test_checkpoints_are_ours_by_name_and_in_order_by_number(tmp_path):
    tensors, told = {"a": torch.arange(4.0)}, []
    for name in ("step-best", "step-000999-backup", "step-12", "step-0000020"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-000998").write_text("a stray file")
    kept = {path.name for path in tmp_path.iterdir()}
    for step in (20, 999_999, 1_000_000, 1_000_100):
        save_checkpoint(tmp_path, step, STATE, tensors, tensors)
        prune(tmp_path, step, keep=2, best_step=20)
    ours = {"step-000020", "step-1000000", "step-1000100"}
    assert {path.name for path in tmp_path.iterdir()} == kept | ours
    assert find_checkpoint(tmp_path, told.append).step == 1_000_100 and not told


def test_a_damaged_later_checkpoint_takes_no_whole_ones_place(tmp_path):
    tensors = {"a": torch.arange(4.0)}
    for step in (1, 5):
        save_checkpoint(tmp_path, step, STATE, tensors, tensors)
    (tmp_path / "step-000005" / "moments.safetensors").unlink()
    save_checkpoint(tmp_path, 2, STATE, tensors, tensors)
    prune(tmp_path, 2, keep=1, best_step=0)
    assert find_checkpoint(tmp_path, print).step == 2


@pytest.mark.parametrize("damage", ["file of none", "state of another", "copied", "unlisted"])
def test_a_checkpoint_is_whole_with_all_its_files_and_its_own_step_alone(tmp_path, damage):
    tensors, told = {"a": torch.arange(4.0)}, []
    save_checkpoint(tmp_path, 1, STATE, tensors, tensors)
    two = save_checkpoint(tmp_path, 2, STATE, tensors, tensors)
    manifest = json.loads((two / "manifest.json").read_text())
    if damage == "file of none":
        (two / "moments.safetensors").unlink()
    if damage == "unlisted":
        del manifest["moments.safetensors"]
    if damage == "state of another":
        manifest["state.json"] = [4, "not the hash"]
    if damage == "copied":
        shutil.copytree(two, tmp_path / "step-000003")
    (two / "manifest.json").write_text(json.dumps(manifest))
    assert find_checkpoint(tmp_path, told.append).step == (2 if damage == "copied" else 1)
    assert len(told) == 1 and "is passed over: " in told[0]


def test_cached_targets_give_the_losses_of_online_targets(toys, tmp_path, uninterrupted):
    teacher = wrap_teacher(load_config(toys / "toy.yaml"), load_salmonn(toys / "teacher"))
    assert isinstance(teacher, CachedTeacher)
    result = make_distiller(toys, tmp_path, teacher=teacher).fit()
    assert result.losses == pytest.approx(uninterrupted, abs=5e-3)


@pytest.mark.parametrize("codec", ["topk", "adaptive", "dense"])
def test_caching_again_from_nothing_gives_the_same_bytes(toys, tmp_path, codec):
    tars = []
    for name in ("first", "second"):
        words = [f"cache.folder={tmp_path / name}", f"cache.codec={codec}", "data.labelled_share=0.5"]
        assert cache(load_config(toys / "toy.yaml", words)) == 0
        tars.append([path.read_bytes() for path in sorted((tmp_path / name).glob("*.targets.tar"))])
    assert len(tars[0]) == 3 and tars[0] == tars[1]


def test_a_cache_that_is_complete_is_used_again(toys, capsys):
    assert cache(load_config(toys / "toy.yaml")) == 0
    assert "holds the targets of all 3 shards, used again" in capsys.readouterr().err


def test_a_cache_of_another_teacher_is_refused_with_what_differs(toys, tmp_path):
    tiny.make_parts(tmp_path / "parts", seed=3)
    tiny.save_teacher(tmp_path / "parts", tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"(?s)cache\.json was cached as .*teacher_weights\.llm: cached .*, this run "):
        wrap_teacher(load_config(toys / "toy.yaml"), load_salmonn(tmp_path / "teacher"))


def test_targets_of_another_answer_are_refused(toys):
    teacher = CachedTeacher(toys / "data" / "cache")
    model = load_salmonn(toys / "teacher")
    stream = ShardStream(toys / "data" / "train", Order(batch_size=2), Selection(targets=toys / "data" / "cache"))
    samples = [dataclasses.replace(sample, text="nine nine") for sample in next(iter(stream))]
    with pytest.raises(ValueError, match=r"another answer; cache this sample again"):
        teacher.targets(model.collate(samples))


def test_an_unlabelled_clip_gets_the_answer_that_the_teacher_gives(toys):
    teacher = OnlineTeacher(load_salmonn(toys / "teacher"), max_new_tokens=4)
    sample = tiny.make_sample(4, text=None)
    labelled, is_pseudo = teacher.label([sample, tiny.make_sample(5)])
    assert is_pseudo == [True, False]
    assert labelled[0].text == teacher.model.generate([sample], max_new_tokens=4)[0]


def test_kl_of_the_teacher_to_itself_is_zero(toys, tmp_path):
    model = load_salmonn(toys / "teacher")
    twin = load_salmonn(toys / "teacher")
    twin.project.requires_grad_(True)
    loss = LossConfig(ce=0.0, kl=1.0, feature=1.0)
    options = dataclasses.replace(OPTIONS, steps=1, learning_rate=1e-9, min_learning_rate=0.0)
    run = Distiller(OnlineTeacher(model), twin, train=toys / "data" / "train", loss=loss, options=options,
                    run=tmp_path)  # fmt: skip
    assert run.fit().losses == pytest.approx([0.0], abs=1e-6)


def test_losses_that_are_not_finite_stop_the_run_and_leave_weights_finite(toys, tmp_path):
    run = make_distiller(toys, tmp_path, max_bad_steps=2)
    project = run.student.project.weight
    project.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(BadStepsError, match=r"for 2 steps in a row, but must be finite; look at samples"):
        run.fit()
    assert torch.isfinite(project).all()


def test_another_batch_size_does_not_resume(toys, tmp_path):
    make_distiller(toys, tmp_path, stop_after=1).fit()
    with pytest.raises(
        ValueError, match=r"step-000001 is of a run with other .*\(train\.batch_size: 4 there, 2 here\)"
    ):
        make_distiller(toys, tmp_path, batch_size=2, micro_batch_size=2).fit()


CHANGES = {
    "learning_rate": 1e-3, "min_learning_rate": 0.0, "warmup_steps": 1, "weight_decay": 0.1, "beta2": 0.9,
    "max_grad_norm": 2.0, "steps": 6,
}  # fmt: skip


def test_what_changes_the_result_of_a_run_is_refused_by_name_unless_it_is_allowed(toys, tmp_path, capsys):
    make_distiller(toys, tmp_path, stop_after=1).fit()
    with pytest.raises(ValueError, match="is of a run with other settings") as error:
        make_distiller(toys, tmp_path, **CHANGES)
    for field, value in CHANGES.items():
        assert f"train.{field}: {getattr(OPTIONS, field)} there, {value} here" in str(error.value)
    harmless = {"micro_batch_size": 2, "save_every": 3, "keep": 1, "max_minutes": 60.0, "hang_minutes": 5.0}
    make_distiller(toys, tmp_path, **harmless)
    make_distiller(toys, tmp_path, allow_change=[f"train.{field}" for field in CHANGES], **CHANGES)
    assert (
        "goes on with another train.beta2, as train.allow_change says: 0.98 there, 0.9 here" in capsys.readouterr().err
    )


def test_more_steps_after_a_finished_run_say_what_becomes_of_the_schedule(toys, tmp_path, capsys):
    make_distiller(toys, tmp_path, steps=2).fit()
    with pytest.raises(ValueError, match=r"\(train\.steps: 2 there, 1 here\)"):
        make_distiller(toys, tmp_path, steps=1)
    assert len(make_distiller(toys, tmp_path, steps=4).fit().losses) == 4
    said = capsys.readouterr().err
    assert "was done after 2 steps and goes on to 4: its schedule runs over all 4 now, so the learning rate, " in said
    assert "0.0001 at the end of the first part, is 0.002 at step 3 and falls to 0.00105 at the last" in said


def test_steps_may_change_where_nothing_depends_on_the_last_one(toys, tmp_path, capsys):
    constant = {"learning_rate": 1e-3, "min_learning_rate": 1e-3}
    make_distiller(toys, tmp_path, stop_after=1, **constant).fit()
    make_distiller(toys, tmp_path, steps=3, **constant)
    assert "goes on to step 3 instead of 5; nothing in it depends on the last step" in capsys.readouterr().err


def test_every_other_setting_that_changed_is_said_when_a_run_goes_on(toys, tmp_path, capsys):
    words = [f"runs={tmp_path}", "name=own", "student.quantization=none"]
    run(load_config(toys / "toy.yaml", [*words, "train.stop_after=1"]))
    capsys.readouterr()
    run(load_config(toys / "toy.yaml", [*words, "train.stop_after=2", "data.max_bad=0.1"]))
    said = capsys.readouterr().err
    assert "own goes on with another train.stop_after: 1 there, 2 here" in said
    assert "own goes on with another data.max_bad: 0.001 there, 0.1 here" in said
    (tmp_path / "own" / "config.yaml").write_text("[")
    run(load_config(toys / "toy.yaml", [*words, "train.stop_after=3"]))
    assert "config.yaml cannot be read, so what changed" in capsys.readouterr().err


def test_a_run_whose_loss_or_teacher_changed_does_not_resume_and_says_field_by_field_what(toys, tmp_path, capsys):
    words = [f"runs={tmp_path}", "name=own", "train.stop_after=1", "teacher.online=true"]
    run(load_config(toys / "toy.yaml", words))
    assert "own holds no checkpoint to go on from: step 1 is next" in capsys.readouterr().err
    before = (tmp_path / "own" / "config.yaml").read_bytes()
    changes = ["loss.kl=0.25", "loss.task_weights.asr=2", "cache.max_new_tokens=9"]
    with pytest.raises(ValueError, match=r"step-000001 is of a run with other settings") as error:
        run(load_config(toys / "toy.yaml", [*words, *changes]))
    for change in (
        "loss.kl: 1.0 there, 0.25 here",
        "loss.task_weights.asr: nothing there, 2.0 here",
        "targets.answers.max_new_tokens: 8 there, 9 here",
    ):
        assert change in str(error.value)
    assert (tmp_path / "own" / "config.yaml").read_bytes() == before
    tiny.make_parts(tmp_path / "parts", seed=3)
    tiny.save_teacher(tmp_path / "parts", tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"targets\.teacher_weights\.\w+: \w{16} there, \w{16} here"):
        run(load_config(toys / "toy.yaml", [*words, f"teacher.path={tmp_path}/teacher"]))


def test_a_run_of_a_release_without_some_settings_goes_on_where_they_are_as_it_was_without_them(toys, tmp_path):
    words = [f"runs={tmp_path}", "name=own", "student.quantization=none", "teacher.online=true"]
    run(load_config(toys / "toy.yaml", [*words, "train.stop_after=1"]))
    path = tmp_path / "own" / "checkpoints" / "step-000001" / "state.json"
    state = json.loads(path.read_text())
    for section, field in (("student", "ears_seconds"), ("student", "prefix_tokens"), ("loss", "balance")):
        del state["identity"][section][field]
    del state["identity"]["targets"]["teacher_config"]["ears_seconds"]
    check = {"checkpoint": path.parent, "done": 1, "options": TrainConfig(), "has_schedules": False, "say": print}
    here = json.loads(path.read_text())["identity"]
    check_changes(state["identity"], here, **check)
    for section, field, value, message in (
        ("student", "prefix_tokens", 4, r"\(student\.prefix_tokens: 0 there, 4 here\)"),
        ("targets", "teacher_config", {**here["targets"]["teacher_config"], "ears_seconds": "clip"},
         r"\(targets\.teacher_config\.ears_seconds: 30 there, clip here\)"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            check_changes(state["identity"], here | {section: here[section] | {field: value}}, **check)


def test_a_change_that_is_allowed_by_name_is_said_and_made_and_no_other(toys, tmp_path, capsys):
    words = [f"runs={tmp_path}", "name=own", "train.steps=2", "train.allow_change=[loss.kl]"]
    run(load_config(toys / "toy.yaml", [*words, "train.stop_after=1"]))
    with pytest.raises(ValueError, match=r"\(loss\.ce: 1\.0 there, 0\.5 here\)"):
        run(load_config(toys / "toy.yaml", [*words, "loss.kl=0.25", "loss.ce=0.5"]))
    capsys.readouterr()
    assert run(load_config(toys / "toy.yaml", [*words, "loss.kl=0.25"])) == 0
    said = capsys.readouterr().err
    assert "own goes on with another loss.kl, as train.allow_change says: 1.0 there, 0.25 here" in said
    first, second = (json.loads(line)["kl"] for line in (tmp_path / "own" / "metrics.jsonl").read_text().splitlines())
    assert second < 0.5 * first  # a term is logged with its weight


def test_a_teacher_that_was_moved_is_the_same_teacher(toys, tmp_path):
    words = [f"runs={tmp_path}", "name=own", "teacher.online=true", f"teacher.path={tmp_path}/teacher"]
    words += ["train.steps=2"]
    shutil.copytree(toys / "teacher", tmp_path / "teacher")
    run(load_config(toys / "toy.yaml", [*words, "train.stop_after=1"]))
    (tmp_path / "teacher").rename(tmp_path / "moved")
    assert run(load_config(toys / "toy.yaml", [*words[:3], f"teacher.path={tmp_path}/moved", words[-1]])) == 0


def test_a_students_parts_are_known_by_their_contents_wherever_they_lie(toys, tmp_path):
    for name in ("student-llm", "whisper"):
        shutil.copytree(toys / "parts" / name, tmp_path / "there" / name)

    def identify(folder):
        config = load_config(toys / "toy.yaml", [f"student.whisper={folder}/whisper"])
        return identify_settings(config.student, f"{folder}/student-llm")

    began = identify(tmp_path / "there")
    (tmp_path / "there").rename(tmp_path / "moved")
    assert identify(tmp_path / "moved") == began
    for part, name in (("llm", "student-llm"), ("whisper", "whisper")):
        for file in ("model.safetensors", "config.json"):
            path = tmp_path / "moved" / name / file
            data = path.read_bytes()
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
            assert [field for field, _ in compare(began, identify(tmp_path / "moved"))] == [part]
            path.write_bytes(data)
    assert identify(tmp_path / "moved") == began


def test_resume_must_and_never_are_obeyed(toys, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.resume is 'must', but .* holds no whole checkpoint"):
        make_distiller(toys, tmp_path, resume="must").fit()
    make_distiller(toys, tmp_path, stop_after=1).fit()
    with pytest.raises(FileExistsError, match=r"train\.resume is 'never', but .*step-000001 is a checkpoint"):
        make_distiller(toys, tmp_path, resume="never").fit()


def test_only_lora_and_the_connector_get_gradients(toys, tmp_path):
    run = make_distiller(toys, tmp_path)
    assert {n.split(".")[0] for n in run.named if "lora_" not in n} == {"ln_speech", "qformer", "project"}
    assert not any(p.requires_grad for p in run.student.whisper.parameters())


def test_a_saved_4_bit_student_answers_as_before(toys, tmp_path):
    run = make_distiller(toys, tmp_path / "run")
    run.fit()
    student = run.student.eval()
    save_student(student, tmp_path / "student", lora=LORA, quantization="nf4")
    samples = [tiny.make_sample(1), tiny.make_sample(2)]
    assert load_student(tmp_path / "student").generate(samples, max_new_tokens=5) == student.generate(
        samples, max_new_tokens=5
    )
    kinds = {type(module).__name__ for module in student.llm.modules()}
    assert "Linear4bit" in kinds


def test_a_student_of_another_vocabulary_is_refused(toys, tmp_path):
    from distill.demo.scratch import build_llm
    from distill.demo.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["a b c", "other words"], tmp_path / "llm", vocab_size=300)
    build_llm(len(tokenizer), 32, 1, tokenizer).save_pretrained(tmp_path / "llm")
    model = load_salmonn(toys / "teacher")
    student = build_student(model, str(tmp_path / "llm"), lora=LORA, connector=Connector("new"))
    with pytest.raises(ValueError, match=r"vocabulary of the student .* is not that of the teacher"):
        Distiller(OnlineTeacher(model), student, train=toys / "data" / "train", run=tmp_path)


def test_a_checkpoint_that_a_full_disk_does_not_take_leaves_those_before_it_and_nothing_else(tmp_path):
    tensors = {"a": torch.arange(4000.0)}
    save_checkpoint(tmp_path, 1, STATE, tensors, tensors)
    (tmp_path / ".step-000002.0123.tmp").mkdir()  # of a process that was killed
    with (
        tiny.full_disk(3000),
        pytest.raises(OSError, match=r"step-000002 cannot be written \(File too large\), but .*; free space"),
    ):
        save_checkpoint(tmp_path, 2, STATE, tensors, tensors)
    assert find_checkpoint(tmp_path, print).step == 1 and [path.name for path in tmp_path.iterdir()] == ["step-000001"]
