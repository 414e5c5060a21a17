"""Configs: every recipe loads, a wrong key, type, choice or a credential is refused with its name."""

import inspect
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.cli import main
from distill.command import guard
from distill.config import (
    CacheConfig,
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    StudentConfig,
    TrainConfig,
    load_config,
    to_yaml,
)
from distill.config.recipes import recipe_files
from distill.student import lora_of
from students.hearing import Connector, Hearing
from students.student import build_student
from teachers.lora import Lora

RECIPES = sorted(recipe_files().values())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(path):
    assert load_config(path).name


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.stepz=3", r"field is train\.stepz, but there is none of that name; did you mean train\.steps\?"),
        ("train.steps=many", r"train\.steps is 'many', but must be a whole number; correct it"),
        ("train.steps=", r"train\.steps is empty, but must have a value; give one"),
        ("train.steps=1e3", r"train\.steps is '1e3', but must be a whole number"),
        ("train.steps='3'", r"train\.steps is '3', but must be a whole number"),
        ("train.steps=[3]", r"train\.steps is \['3'\], but must be a whole number"),
        ("train.steps={a: 1}", r"train\.steps is \{'a': '1'\}, but must be a whole number"),
        ("train.learning_rate=nan", r"train\.learning_rate is 'nan', but must be a number"),
        ("train.learning_rate=.inf", r"train\.learning_rate is '\.inf', but must be a number"),
        ("teacher.online=maybe", r"teacher\.online is 'maybe', but must be true or false"),
        ("train.trackers=wandb", r"train\.trackers is 'wandb', but must be a list, of text each"),
        ("loss.hidden_layers={a: 1}", r"loss\.hidden_layers is \{'a': '1'\}, but must be a whole number to a whole"),
        ("augment.gain_range=[1,2,3]", r"augment\.gain_range is \['1', '2', '3'\], but must be a list of 2"),
        ("augment.noise_share=x", r"augment\.noise_share is 'x', but must be a number"),
        ("train=5", r"train is '5', but is a section with fields; write train\.FIELD=value"),
        ("trian.steps=5", r"field is trian\.steps, but there is none of that name; did you mean train\.steps"),
        ("train.steps=0", r"train\.steps is 0, but must be above 0"),
        ("cache.codec=zip", r"cache\.codec is 'zip', but must be one of topk, "),
        ("data.labelled_share=2", r"data\.labelled_share is 2\.0, but is a share from 0 to 1"),
        ("hub_token=x", r"hub_token looks like a credential"),
        ("name=hf" + "_abcdefghijklmnopqrstuvwx", r"name looks like a credential"),
        ("precision=fp8", r"precision is 'fp8', but must be one of auto, float32, bf16, fp16"),
        ("steps", r"override is 'steps', but must read section\.key=value in one word"),
        ("loss.hidden_layers={1", r"override is '.*=\{1', but its value is not YAML \(.*\); correct the command"),
        ("student.llm=", r"student\.llm is empty, but must have a value; give one"),
        ("train.max_grad_norm=0", r"train\.max_grad_norm is 0\.0, but must be above 0"),
        ("student.lora_rank=0", r"student\.lora_rank is 0, but must be above 0"),
        ("eval.max_new_tokens=0", r"eval\.max_new_tokens is 0, but must be above 0"),
        ("data.workers=-1", r"data\.workers is -1, but must be 0 or more"),
        ("train.min_learning_rate=1", r"train\.min_learning_rate is 1, but train\.learning_rate, the peak, is 0\.003"),
        ("name=../../x", r"name is '\.\./\.\./x', but the run's folder is runs/NAME; give a name without slashes"),
        ("name=..", r"name is '\.\.', but the run's folder is runs/NAME"),
        ("name=''", r"name is '', but the run's folder is runs/NAME"),
        ("cache.temperatures=[]", r"cache\.temperatures is \[\], but all must be above 0 and 1\.0 among them"),
        ("cache.temperatures=[2]", r"cache\.temperatures is \[2\.0\], but all must be above 0 and 1\.0 among them"),
        ("cache.temperatures=[1,0]", r"cache\.temperatures is \[1\.0, 0\.0\], but all must be above 0"),
        ("loss.temperature=3", r"loss\.temperature is 3, but the teacher's targets are kept at 1, 2 alone; use"),
        ("loss.kl_parameter=0.5", r"loss\.kl_parameter is 0\.5, but forward_kl takes none"),
        ("loss.kl_kind=jsd", r"loss\.kl_parameter is None, but jsd takes one strictly between 0 and 1"),
        (
            "loss.hidden=1",
            r"loss\.hidden is above 0, but the teacher's targets hold no states of layer -1; cache again",
        ),
        (
            "loss.schedules.klo=linear 0",
            r"names klo, but the terms are ce, kl, feature, hidden, frames, chunk",
        ),
        ("loss.schedules.kl=line 0", r"demo\.yaml: loss\.schedules\.kl: schedule is 'line', but it must be one of"),
    ],
)
def test_a_wrong_override_is_refused(word, message):
    with pytest.raises(ValueError, match=message):
        load_config(RECIPES[0], [word])


NO_TERM = ("loss.ce=0", "loss.kl=0", "loss.feature=0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            NO_TERM,
            r"loss\.ce, loss\.kl, loss\.feature, loss\.hidden, loss\.frames are all 0, but a student learns",
        ),
        ((*NO_TERM, "loss.schedules.kl=constant warmup 9"), r"are all 0, but a student learns"),
        (
            ("cache.codec=sampled", "loss.temperature=2"),
            r"loss\.kl_kind is forward_kl at loss\.temperature 2, but draws",
        ),
        (
            ("cache.codec=sampled", "loss.kl_kind=reverse_kl"),
            r"loss\.kl_kind is reverse_kl at loss\.temperature 1, but",
        ),
        (
            ("loss.kl_kind=jsd", "loss.kl_parameter=1"),
            r"loss\.kl_parameter is 1\.0, but jsd takes one strictly between",
        ),
    ],
)
def test_words_that_contradict_each_other_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        load_config(RECIPES[0], words)


@pytest.mark.parametrize(
    "words",
    [
        (*NO_TERM, "loss.cross_tokenizer=chunk"),
        (*NO_TERM, "loss.schedules.kl=linear 1"),
        ("loss.temperature=3", "cache.codec=hidden"),
        ("loss.temperature=3", "cache.temperatures=[1,3]"),
        ("loss.temperature=2", "cache.codec=sampled", "teacher.online=true"),
        ("loss.hidden=1", "cache.codec=hidden"),
        ("loss.hidden=1", "teacher.online=true"),
        ("loss.hidden=1", "loss.hidden_layers={2: 1}", "cache.hidden_layers=[2]"),
        ("student.llm=''", "name=a.b-c_1"),
    ],
)
def test_words_that_agree_are_taken(words):
    assert load_config(RECIPES[0], words)


UNREAD = {
    "corpus.train": "x.json",
    "corpus.valid_share": 0.5,
    "corpus.channels": "mean",
    "cache.threshold": 0.1,
    "cache.draws": 9,
    "cache.exponent": 0.5,
    "loss.chunk": 0.5,
    "loss.chunk_temperature": 5,
    "loss.hidden_kind": "mse",
    "on_policy.clips": 0.5,
    "on_policy.temperature": 1,
    "on_policy.max_new_tokens": 9,
    "eval.length_penalty": 2,
    "augment.noise_range": [1, 2],
    "augment.mask_bands": 1,
    "augment.teacher_hears": "same",
}
WITHOUT = {"loss.kl": {"loss.temperature": 2, "loss.kl_kind": "reverse_kl"}, "loss.ce": {"loss.pseudo_ce": 0.5},
           "loss.feature": {"loss.feature_kind": "cosine"}}  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [[f"{key}={value}"] for key, value in UNREAD.items()]
    + [[f"{key}={value}", f"{term}=0"] for term, fields in WITHOUT.items() for key, value in fields.items()]
    + [[f"cache.codec={codec}", "cache.k=9"] for codec in ("hidden", "dense", "sampled")]
    + [[f"scratch.{name}=0.5"] for name in ("learning_rate", "seconds", "window_seconds")]
    + [
        [f"scratch.{name}=32", "teacher.path=saved"]
        for name in ("llm_width", "ear_layers", "num_queries", "vocab_size")
    ]
    + [["corpus.kind=manifest"]],  # beside the recipe's own corpus.num_train
    ids=lambda words: words[0],
)
def test_a_field_that_nothing_would_read_is_refused_with_what_would(tmp_path, words):
    (tmp_path / "c.yaml").write_text("corpus: {kind: synth, num_train: 9}\n")
    with pytest.raises(ValueError, match=r"is .*, but nothing reads it without .*; set that, or leave .* at "):
        load_config(tmp_path / "c.yaml", words)


@pytest.mark.parametrize(
    "words",
    [
        ("cache.codec=adaptive", "cache.threshold=0.1"),
        ("cache.codec=sampled", "cache.draws=9", "cache.exponent=0.5"),
        ("loss.cross_tokenizer=chunk", "loss.chunk=0.5", "loss.chunk_temperature=5", "loss.kl=0", "loss.temperature=2"),
        ("loss.kl=0", "loss.schedules.kl=linear 1", "loss.temperature=2"),
        ("on_policy.round=1", "on_policy.clips=0.5", "on_policy.temperature=1"),
        ("eval.num_beams=2", "eval.length_penalty=2"),
        ("augment.noise_share=0.5", "augment.noise_range=[1,2]", "cache.frames=none"),
        ("corpus.kind=manifest", "corpus.num_train=2400", "corpus.valid=x", "corpus.valid_share=0"),
    ],
)
def test_a_field_that_something_reads_is_taken(words):
    assert load_config(RECIPES[0], words)


@pytest.mark.parametrize("codec", ["adaptive", "sampled", "hidden", "dense"])
def test_another_codec_in_a_word_leaves_out_what_the_file_says_of_its_own(tmp_path, codec):
    write(tmp_path, c="cache: {codec: topk, k: 32, batch_size: 3}")
    cache = load_config(tmp_path / "c.yaml", [f"cache.codec={codec}"]).cache
    assert (cache.k, cache.batch_size) == (32 if codec == "adaptive" else CacheConfig.k, 3)
    assert load_config(tmp_path / "c.yaml", [f"cache.codec={codec}", "cache.codec=topk"]).cache.k == 32


def test_a_schedule_of_chunks_that_are_not_compared_is_refused():
    with pytest.raises(ValueError, match=r"loss\.schedules names chunk, but that term is there only with loss\.cross"):
        load_config(RECIPES[0], ["loss.schedules.chunk=linear 0"])


@pytest.mark.parametrize("name", ["config", "base"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [1\ntrain: {", r"is not YAML \(while parsing a flow sequence .*\); correct the file"),
        ("name: a\nname: b", r"is not YAML \(.*found duplicate key name"),
        (
            "a: &a [x, x]\n" + "".join(f"{n}: &{n} [{'*' + p + ',' * 9}]\n" for p, n in zip("abcde", "bcdef")),
            r"is not YAML",
        ),
        ("name: !!python/object/apply:os.getcwd []", r"is not YAML \(could not determine a constructor"),
        ("name: \udcff", r"is not YAML \('utf-8' codec can't decode"),
        ("- name", r"holds a list and a config is keys and values"),
        ("name", r"holds one value and a config is keys and values"),
        ("a: &a [*a]", r"is not YAML \(it holds more values, or deeper ones, than a config"),
        (
            "a: &a [x]\n" + "".join(f"{n}: &{n} [{', '.join(['*' + p] * 9)}]\n" for p, n in zip("abcdefg", "bcdefgh")),
            r"is not YAML \(it holds more values",
        ),
        ("a: " + "[" * 12 + "]" * 12, r"is not YAML \(it holds more values, or deeper ones"),
        ("[a]: b", r"is not YAML \(found a key that is a list or a mapping"),
        ("name: a\n---\nname: b", r"is not YAML \(expected a single document"),
    ],
)
def test_a_file_that_is_no_yaml_mapping_is_refused_on_one_line(tmp_path, name, text, message):
    (tmp_path / f"{name}.yaml").write_bytes(text.encode(errors="surrogateescape"))
    if name == "base":
        write(tmp_path, config="base: base.yaml")
    with pytest.raises(ValueError, match=rf"^{name} (of .*)?is .*{name}\.yaml, but that .*{message}") as caught:
        load_config(tmp_path / "config.yaml")
    assert "\n" not in str(caught.value)


def test_a_value_is_what_its_field_is_however_yaml_would_read_it(tmp_path):
    text = """
name: 007
runs: yes
data: {folder: 2024-01-02, max_bad: 1e-4, labelled_only: Yes, workers: 1_0}
student: {llm: "null", lora_alpha: 8, lora_targets: [q_proj, on]}
loss: {kl_parameter: ~, hidden: 1, hidden_layers: {-1: -1}, task_weights: {1: 2}}
cache: {codec: hidden}
"""
    config = load_config(write(tmp_path, c=text) / "c.yaml")
    assert (config.name, config.runs, config.data.folder) == ("007", "yes", "2024-01-02")
    assert (config.data.max_bad, config.data.labelled_only, config.data.workers) == (1e-4, True, 10)
    assert (config.student.llm, config.student.lora_targets) == ("null", ("q_proj", "on"))
    assert config.loss.kl_parameter is None and config.loss.hidden_layers == {-1: -1}
    assert config.loss.task_weights == {"1": 2.0} and type(config.student.lora_alpha) is float
    assert load_config(write(tmp_path, again=to_yaml(config)) / "again.yaml") == config


@pytest.mark.parametrize(
    "text", ["/data/My Corpus #2", "[1", "@x", "*.json", "a: b", "{x", "</s>", "100%", "- x", "!x", "&x", "true", "ü b"]
)
def test_a_word_gives_a_text_field_what_stands_there(text):
    assert load_config(RECIPES[0], [f"eval.prompts={text}"]).eval.prompts == text
    assert load_config(RECIPES[0], [f"eval.prompts='{text}'"]).eval.prompts == text


def test_an_entry_of_a_field_of_names_is_set_beside_the_others(tmp_path):
    loss = "{hidden: 1, schedules: {kl: linear 0.5}, hidden_layers: {1: 1}}"
    write(tmp_path, c=f"loss: {loss}\ncache: {{hidden_layers: [1, 2]}}")
    loss = load_config(tmp_path / "c.yaml", ["loss.schedules.ce=linear 0.5", "loss.hidden_layers.2=2"]).loss
    assert loss.schedules == {"kl": "linear 0.5", "ce": "linear 0.5"} and loss.hidden_layers == {1: 1, 2: 2}


def test_a_missing_config_names_those_beside_it(tmp_path):
    (tmp_path / "there.yaml").write_text("name: x")
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml, but there is nothing of that name; recipes: .*there"):
        load_config(tmp_path / "gone.yaml")


def write(folder: Path, **files: str) -> Path:
    """YAML files by name; the folder."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_a_file_is_read_over_its_base_and_words_over_both(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, whole="name: whole\nseed: 1\ntrain:\n  steps: 5\n  batch_size: 6\n")
    write(tmp_path / "sub", own="base: ../whole.yaml\nname: own\ntrain:\n  steps: 7\n")
    config = load_config(tmp_path / "sub" / "own.yaml", ["train.batch_size=8"])
    assert (config.name, config.seed, config.train.steps, config.train.batch_size) == ("own", 1, 7, 8)


def test_a_resolved_config_is_complete_without_its_base(tmp_path):
    write(tmp_path, whole="seed: 3\nloss:\n  schedules:\n    kl: cosine 0.1\n", own="base: whole.yaml\nname: own\n")
    config = load_config(tmp_path / "own.yaml")
    (tmp_path / "moved").mkdir()
    write(tmp_path / "moved", config=to_yaml(config))
    assert "base" not in to_yaml(config) and load_config(tmp_path / "moved" / "config.yaml") == config


@pytest.mark.parametrize(
    ("whole", "own", "error", "message"),
    [
        (
            "",
            "base: gone.yaml",
            FileNotFoundError,
            r"base of .*own\.yaml is .*gone\.yaml, but there is no such",
        ),
        ("base: other.yaml", "base: whole.yaml", ValueError, r"whole\.yaml, but that has the base other\.yaml itself"),
        (
            "",
            "base: own.yaml",
            ValueError,
            r"base of .*own\.yaml is .*own\.yaml, but that has the base",
        ),
        ("trian: 1", "base: whole.yaml", ValueError, r"whole\.yaml: field is trian, but there is none"),
        ("hub_token: x", "base: whole.yaml", ValueError, r"whole\.yaml: hub_token looks like a credential"),
    ],
)
def test_a_base_that_cannot_be_read_is_refused_by_its_name(tmp_path, whole, own, error, message):
    with pytest.raises(error, match=message):
        load_config(write(tmp_path, whole=whole, own=own) / "own.yaml")


@pytest.mark.parametrize("text", ["${oc.env:HF_TOKEN}", "a/${name}"])
def test_nothing_of_the_environment_or_of_another_field_comes_into_a_config(tmp_path, text):
    with pytest.raises(ValueError, match=r"student\.llm is .*\}, but nothing stands in for \$\{…\} here; write"):
        load_config(RECIPES[0], [f"student.llm={text}"])
    with pytest.raises(ValueError, match=r"c\.yaml: student\.llm is .*, but nothing stands in for"):
        load_config(write(tmp_path, c=f"student: {{llm: '{text}'}}") / "c.yaml")


def test_a_base_is_no_word_of_the_command_line():
    with pytest.raises(ValueError, match=r"field is base, but there is none of that name"):
        load_config(RECIPES[0], ["base=demo.yaml"])


def test_an_error_is_one_line_and_exit_code_1(capsys):
    assert main(["run", "nowhere/gone.yaml"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: config is nowhere/gone.yaml") and captured.err.count("\n") == 1


def test_help_names_every_stage_in_order(capsys):
    main([])
    text = capsys.readouterr().out
    stages = ["audit", "pack", "cache", "run", "evaluate"]
    assert sorted(stages, key=text.index) == stages


def test_pack_refuses_an_unknown_task(tmp_path, capsys):
    (tmp_path / "m.json").write_text('{"annotation": [{"path": "a.wav", "text": "x", "task": "asrr"}]}')
    assert main(["pack", str(tmp_path / "m.json"), str(tmp_path / "out")]) == 1
    assert "did you mean 'asr'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--debug", "run"], ["run", "--debug"]])
def test_debug_stands_before_or_behind_the_command(words):
    with pytest.raises(FileNotFoundError):
        main([*words, "gone.yaml"])


def test_a_manifest_given_twice_is_said_in_the_form_of_an_error(tmp_path, capsys):
    (tmp_path / "good.json").write_text('{"annotation": []}')
    (tmp_path / "a.wav").touch()
    assert main(["pack", str(tmp_path / "good.json"), str(tmp_path / "a.wav")]) == 1
    assert capsys.readouterr().err.endswith("a.wav is a file, but a folder is to be made there; name another one.\n")


def raise_(error: Exception):
    raise error


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (
            lambda: Path("/proc/x").mkdir(),
            "error: /proc/x cannot be used (No such file or directory), but this command",
        ),
        (lambda: raise_(OSError(28, "disk of x is full")), "error: disk of x is full\n"),
        (lambda: raise_(OSError(28, os.strerror(28))), "error: a file cannot be used (No space left on device), but"),
        (
            lambda: raise_(torch.OutOfMemoryError("CUDA out of memory. Tried 20.00 GiB. GPU 0 has 2 GiB. See\nmore.")),
            "error: memory of the GPU is full (CUDA out of memory. Tried 20.00 GiB. GPU 0 has 2 GiB), but a step must "
            "fit; lower train.micro_batch_size, data.batch_seconds, cache.batch_size or eval.batch_size, or set",
        ),
    ],
)
def test_what_the_system_and_torch_say_is_put_in_the_form_of_an_error(capsys, work, message):
    assert guard(work, debug=False) == 1
    assert capsys.readouterr().err.startswith(message)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(steps=-3), r"^train\.steps is -3, but must be above 0; correct it\.$"),
        (lambda: TrainConfig(steps=2.5), r"^train\.steps is 2\.5, but must be a whole number"),
        (lambda: TrainConfig(steps="10"), r"^train\.steps is '10', but must be a whole number"),
        (lambda: TrainConfig(steps=True), r"^train\.steps is True, but must be a whole number"),
        (lambda: TrainConfig(learning_rate=float("nan")), r"^train\.learning_rate is nan, but must be a number"),
        (lambda: TrainConfig(beta2=1.0), r"^train\.beta2 is 1\.0, but must be 0 or more and below 1"),
        (lambda: TrainConfig(hang_minutes=-1), r"^train\.hang_minutes is -1\.0, but must be 0 or more"),
        (lambda: TrainConfig(resume="yes"), r"^train\.resume is 'yes', but must be one of auto, must, never"),
        (
            lambda: TrainConfig(allow_change="loss.kl"),
            r"^train\.allow_change is 'loss\.kl', but must be a list, of",
        ),
        (
            lambda: TrainConfig(min_learning_rate=1.0),
            r"^train\.min_learning_rate is 1, but train\.learning_rate, the",
        ),
        (lambda: LossConfig(ce=-1), r"^loss\.ce is -1\.0, but a weight is 0 or more; correct it\.$"),
        (lambda: LossConfig(kl_kind="kl"), r"^loss\.kl_kind is 'kl', but must be one of forward_kl"),
        (lambda: LossConfig(task_weights={"asr": -1}), r"^loss\.task_weights\.asr is -1\.0, but must be 0 or more"),
        (lambda: LossConfig(hidden_layers={"a": 1}), r"^loss\.hidden_layers is \{'a': 1\}, but must be a whole number"),
        (lambda: DataConfig(labelled_share=2), r"^data\.labelled_share is 2\.0, but is a share from 0 to 1"),
        (lambda: StudentConfig(lora_rank=0), r"^student\.lora_rank is 0, but must be above 0"),
        (lambda: CacheConfig(temperatures=[2]), r"^cache\.temperatures is \[2\.0\], but all must be above 0"),
        (lambda: EvalConfig(normalize="no"), r"^eval\.normalize is 'no', but must be true or false"),
        (lambda: Config(train=LossConfig()), r"^train is LossConfig\(.*, but must be a TrainConfig"),
        (
            lambda: Config(loss=LossConfig(temperature=3)),
            r"^loss\.temperature is 3, but the teacher's targets are kept at 1, 2 alone",
        ),
    ],
)
def test_python_is_refused_what_the_command_line_is_and_in_its_words(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_python_and_yaml_make_the_same_section_of_the_same_values():
    loss = LossConfig(ce=1, schedules={"kl": "linear 0"}, hidden_layers={2: 1})
    words = ["loss.schedules.kl=linear 0", "loss.hidden_layers={2: 1}", "loss.ce=1"]
    read = load_config(RECIPES[0], [*words, "loss.hidden=1", "cache.hidden_layers=[2]"]).loss
    assert (repr(loss.ce), loss.schedules, loss.hidden_layers) == (repr(read.ce), read.schedules, read.hidden_layers)
    assert CacheConfig(temperatures=[1, 2]) == CacheConfig(temperatures=(1.0, 2.0))
    assert TrainConfig(steps=np.int64(3)).steps.__class__ is int


def test_the_defaults_of_python_are_those_of_the_command_line():
    build = inspect.signature(build_student).parameters
    config = StudentConfig()
    assert build["lora"].default == lora_of(Config()) == Lora()
    assert build["quantization"].default == config.quantization
    assert build["hearing"].default == Config().student.hearing == Hearing()
    assert build["connector"].default == Connector(config.connector, config.qformer_dropout) == Connector()


@pytest.mark.parametrize("field", ["llm", "whisper", "second", "second_kind", "end_token", "bos_token", "prompts"])
def test_what_a_config_says_of_a_teacher_that_is_made_here_is_refused(tmp_path, field):
    value = "eat" if field == "second_kind" else "x"
    (tmp_path / "c.yaml").write_text("scratch: {steps: 9}\n")
    with pytest.raises(ValueError, match=rf"teacher\.{field} is '{value}', but scratch\.steps is 9 and makes"):
        load_config(tmp_path / "c.yaml", [f"teacher.{field}={value}"])
    load_config(tmp_path / "c.yaml", [f"teacher.{field}={value}", "teacher.path=saved"])
