"""Prompts: the family's files as they are, another wording in evaluation, and which wording a teacher is asked in."""

import json

import pytest
import soundfile
import tiny

from distill.cache import cache
from distill.caching.identity import describe_teacher
from distill.cli import main
from distill.config import Config, EvalConfig, TeacherConfig, load_config
from distill.evaluation.answer_cache import find_answer_cache
from distill.evaluation.answering import predict
from distill.evaluation.evaluate import evaluate_run
from distill.evaluation.metrics.scores import scored_tasks
from distill.pipeline import make_shards
from distill.run import run
from distill.teacher import load_teacher
from shards.packing.encode import WHOLE_CLIP_TASKS
from shards.targets.header import read_header
from students.start import MAY_DIFFER
from teachers.files.checkpoint import save_checkpoint
from teachers.files.loading import load_salmonn, read_config, save_salmonn
from teachers.words.prompts import AUDIO_IN_FRONT, load_prompts

# the form of train_prompt.json and of test_prompt.json, in words of our own
TRAIN = {
    "asr": ["<Speech><SpeechHere></Speech> Note the talk.", "Note it.", "Talk: <SpeechHere>. Note it."],
    "audiocaption": ["Say what sounds.", " Say what is there. "],
    "asr_zh": ["<Speech><SpeechHere></Speech> 记下这段话。"],
    "slot_filling": ["<Speech><SpeechHere></Speech> Which {} is named?"],
    "own_task": "Name it.",
}
TEST = {"asr": "<Speech><SpeechHere></Speech> Note this.", "asr_de": "Schreibe mit, Wörter für Wörter."}
OF_THE_FAMILY = (
    "asr", "asr_zh", "asr_de", "translation_ec", "audiocaption", "audiocaption_v2", "QA", "gender_QA",
    "phone_recognition", "speech_query", "emotion_recognition", "lyrics_recognition", "audio_speech_description",
    "speaker_verification", "fluent_speech_audio", "speech_separation", "audio_story_telling",
    "speech_audio_query", "slot_filling", "music_description", "translation_en2ja", "translation_en2de",
    "speech_audio_coreasoning", "keywords", "speaker_diarization_asr", "gender_recognition", "translation_ce",
    "count_audio", "count_word", "audiocaption_zh", "audiocaption_de", "inference_QA", "info_retrieval",
    "info_retrieval_wotext", "phone_retrieval", "time_QA", "audio_time",
)  # fmt: skip


@pytest.fixture
def files(tmp_path):
    """The two files, as UTF-8 with their own letters."""
    for name, content in (("train", TRAIN), ("test", TEST)):
        (tmp_path / f"{name}_prompt.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return tmp_path / "train_prompt.json", tmp_path / "test_prompt.json"


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    tiny.make_toys(folder, train__eval_every=4, eval__max_new_tokens=4)
    for split in ("valid", "test"):
        tiny.make_shards(folder / "data", split=split, num_samples=3)
    return folder


def test_the_familys_files_are_taken_as_they_are_and_what_is_left_out_is_told_once(files, capsys):
    train, test = files
    for _ in range(2):
        prompts = load_prompts(train, "{}", test)
    assert prompts.by_task["asr"] == (TRAIN["asr"][0], TRAIN["asr"][2])
    assert prompts.by_task["audiocaption"] == (
        f"{AUDIO_IN_FRONT}Say what sounds.",
        f"{AUDIO_IN_FRONT}Say what is there.",
    )
    assert prompts.by_task["asr_zh"] == tuple(TRAIN["asr_zh"])
    assert prompts.by_task["own_task"] == (f"{AUDIO_IN_FRONT}Name it.",)
    assert prompts.evaluation == {"asr": TEST["asr"], "asr_de": AUDIO_IN_FRONT + TEST["asr_de"]}
    assert prompts.asking == {"slot_filling"}
    said = [line for line in capsys.readouterr().err.splitlines() if str(train) in line]
    assert said == [f"prompts file {train}: left out, as SALMONN's trainers do, without <SpeechHere>: 1 of 3 of asr"]


def test_a_file_is_read_as_utf_8_whatever_the_locale_with_and_without_a_byte_order_mark(files, monkeypatch):
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    monkeypatch.setattr("locale.getencoding", lambda: "ascii")
    for encoding in ("utf-8", "utf-8-sig"):
        files[0].write_text(json.dumps(TRAIN, ensure_ascii=False), encoding=encoding)
        assert load_prompts(files[0], "{}").by_task["asr_zh"] == tuple(TRAIN["asr_zh"])
    assert "asr_zh" in load_prompts(None, "{}").by_task
    files[0].write_text(json.dumps(TRAIN, ensure_ascii=False), encoding="gb18030")
    with pytest.raises(ValueError, match=r"train_prompt\.json is not JSON in UTF-8"):
        load_prompts(files[0], "{}")


def test_evaluation_asks_in_its_own_words_and_training_never_does(files):
    prompts = load_prompts(files[0], "ASK {} ANSWER", files[1])
    key = "k1"
    assert prompts.choose("asr", key, None, first=True) == ("ASK <Speech>", "</Speech> Note this. ANSWER")
    assert {prompts.choose("asr", f"k{i}", None) for i in range(9)} == {
        ("ASK <Speech>", "</Speech> Note the talk. ANSWER"),
        ("ASK Talk: ", ". Note it. ANSWER"),
    }
    first_of_training = ("ASK <Speech>", "</Speech> Say what sounds. ANSWER")
    assert prompts.choose("audiocaption", key, None, first=True) == first_of_training  # the other file lacks it
    assert prompts.choose("asr_de", key, None, first=True)[1].endswith("Wörter für Wörter. ANSWER")
    with pytest.raises(ValueError, match=r"is 'asr_de', but the prompts know .*did you mean 'asr_zh'|'asr'"):
        prompts.choose("asr_de", key, None)
    assert prompts == load_prompts(files[0], "ASK {} ANSWER")  # what was trained with is the same


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"asr": "<SpeechHear> Note it."}, r"'<SpeechHear> Note it\.' for 'asr', but the audio's place is spelt"),
        ({"asr": ["<speech> Note it."]}, r"for 'asr', but the audio's place is spelt <SpeechHere>"),
        ({"asr": " "}, r"has \[' '\] for 'asr', but must be"),
        ({"asr": "<SpeechHere> {} or {}"}, r"exactly once, and \{\} at most once"),
        ({"asr": "<SpeechHere> <SpeechHere>"}, r"must stand in it exactly once"),
        ({"asr": []}, r"task 'asr' has no prompt"),
    ],
)
def test_what_a_file_gets_wrong_is_refused_in_training_and_in_evaluation(tmp_path, content, message):
    (tmp_path / "own.json").write_text(json.dumps(content))
    for arguments in ((tmp_path / "own.json", "{}"), (None, "{}", tmp_path / "own.json")):
        with pytest.raises(ValueError, match=message):
            load_prompts(*arguments)


def test_every_task_of_the_family_is_known_with_few_short_instructions_and_has_a_metric():
    prompts = load_prompts(None, "{}")
    assert set(OF_THE_FAMILY) == set(prompts.by_task) == set(scored_tasks())
    assert set(prompts.by_task) >= WHOLE_CLIP_TASKS
    assert prompts.asking == {"QA", "gender_QA", "inference_QA", "info_retrieval", "slot_filling", "time_QA"}
    for task, texts in prompts.by_task.items():
        assert len(texts) <= 2 and all(text.startswith(AUDIO_IN_FRONT) and len(text) < 125 for text in texts)
        assert not any("?" in text or "？" in text for text in texts), f"{task} is asked and not told"


def test_audit_and_pack_know_the_familys_tasks(tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", tiny.tone(1), 16_000)
    rows = [{"path": "a.wav", "text": "x", "task": task, "Q": "word"} for task in OF_THE_FAMILY]
    (tmp_path / "m.json").write_text(json.dumps({"annotation": rows}))
    assert main(["pack", str(tmp_path / "m.json"), str(tmp_path / "out"), "--workers", "1"]) == 0
    assert f"{len(rows)} samples" in capsys.readouterr().out
    (tmp_path / "m.json").write_text(json.dumps({"annotation": [{**rows[0], "task": "lyric_recognition"}]}))
    assert main(["pack", str(tmp_path / "m.json"), str(tmp_path / "none"), "--workers", "1"]) == 1
    assert "did you mean 'lyrics_recognition'?" in capsys.readouterr().err


def test_a_task_that_only_evaluation_asks_is_packed_for_evaluation_alone(tmp_path, files):
    soundfile.write(tmp_path / "a.wav", tiny.tone(1), 16_000)
    row = {"path": str(tmp_path / "a.wav"), "text": "x"}
    for name, task in (("train", "asr"), ("test", "asr_de")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"annotation": [{**row, "task": task}]}))
    (tmp_path / "c.yaml").write_text(f"data: {{folder: {tmp_path}/data}}\nteacher: {{prompts: {files[0]}}}\n")
    words = [f"corpus.train={tmp_path}/train.json", f"corpus.test={tmp_path}/test.json", "corpus.valid_share=0"]
    with pytest.raises(ValueError, match=r"is 'asr_de', but there are prompts for "):
        make_shards(load_config(tmp_path / "c.yaml", words))
    make_shards(load_config(tmp_path / "c.yaml", [*words, f"eval.prompts={files[1]}"]))
    assert (tmp_path / "data/test/index.json").exists()


def test_a_released_checkpoint_without_its_prompts_gets_one_line_and_its_cache_says_so(toys, files, capsys):
    save_checkpoint(tiny.make_teacher(toys / "parts"), toys / "salmonn.pth")
    parts = {"llm": str(toys / "parts/llm"), "whisper": str(toys / "parts/whisper"), "end_token": "</s>"}
    released, given = (
        Config(teacher=TeacherConfig(path=str(toys / "salmonn.pth"), prompts=prompts, **parts), precision="float32")
        for prompts in ("", str(files[0]))
    )
    saved = Config(teacher=TeacherConfig(path=str(toys / "teacher")), precision="float32")
    found, said = {}, {}
    for name, config in (("released", released), ("given", given), ("saved", saved)):
        found[name] = describe_teacher(load_teacher(config), config).identity["wording"]
        said[name] = [line for line in capsys.readouterr().err.splitlines() if "wordings" in line]
    assert found == {
        "released": "the library's, which this teacher was not trained with",
        "given": "of a prompts file",
        "saved": "the library's",
    }
    assert len(said["released"]) == 1 and not said["given"] and not said["saved"]
    assert "trained with others; give teacher.prompts those, prompts/train_prompt.json of its" in said["released"][0]


def test_caching_and_training_ask_as_trained_and_every_answer_as_evaluated(toys, files, tmp_path, monkeypatch):
    asked = []
    choose = type(load_prompts(None, "{}")).choose

    def note(self, task, key, question, *, first=False):
        parts = choose(self, task, key, question, first=first)
        asked.append((first, parts[1]))
        return parts

    monkeypatch.setattr("teachers.words.prompts.Prompts.choose", note)
    own = "</Speech> Note this.\nASSISTANT:"
    words = [f"eval.prompts={files[1]}", "name=asked"]
    config = load_config(toys / "toy.yaml", words)
    cache(config)
    assert asked and not any(first for first, _ in asked) and own not in {text for _, text in asked}
    header = read_header(config.cache_folder)
    assert describe_teacher(load_teacher(load_config(toys / "toy.yaml")), config).fingerprint == header.fingerprint
    assert run(config) == 0
    assert {text for first, text in asked if first} == {own} and {
        text for first, text in asked if not first
    }.isdisjoint({own})
    asked.clear()
    evaluate_run(config)
    assert {text for _, text in asked} == {own}
    student = config.run_folder / "student"
    assert read_config(student)["model"].eval_prompts == str(files[1]) and "eval_prompts" in MAY_DIFFER
    asked.clear()
    soundfile.write(tmp_path / "a.wav", tiny.tone(1), 16_000)
    assert main(["transcribe", str(student), str(tmp_path / "a.wav"), "--max-new-tokens", "2"]) == 0
    assert {text for _, text in asked} == {own}
    kept = find_answer_cache(config)
    assert kept.exists() and kept != find_answer_cache(load_config(toys / "toy.yaml", ["name=asked"]))
    files[1].write_text(json.dumps({"asr": "Note this now."}))
    assert find_answer_cache(config) != kept


def test_a_saved_model_is_asked_in_other_words_and_back(toys, files):
    save_salmonn(tiny.make_teacher(toys / "parts", eval_prompts=str(files[1])), files[0].parent / "model")
    model = load_salmonn(files[0].parent / "model")
    sample = tiny.make_sample(1)
    rows = [model.rows.row(sample, with_answer=False, first_prompt=True).after]
    model.set_eval_prompts("")
    rows.append(model.rows.row(sample, with_answer=False, first_prompt=True).after)
    assert (
        rows[0]
        != rows[1]
        == tiny.make_teacher(toys / "parts").rows.row(sample, with_answer=False, first_prompt=True).after
    )
    assert predict(model, [sample], EvalConfig(max_new_tokens=2))[0].key == sample.key
