import json
import random
from collections import Counter

import numpy as np
import pytest
import soundfile

from distill.evaluation.metrics.metric import Prediction
from distill.evaluation.metrics.scores import score
from shards.demo.espeak import FEMALE, MALE, Synthesizer
from shards.demo.sounds import CAPTIONS, draw_sound, render_sound
from shards.demo.synth import (
    HELD_OUT,
    MIN_SECONDS,
    TASK_SHARES,
    Utterance,
    plan_clips,
    write_corpus,
)
from shards.manifests.manifest import read_manifest
from shards.sample import SAMPLE_RATE

SIZES = {"train": 40, "valid": 10, "test": 20}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, sizes=SIZES, unlabelled_share=0.25)
    return folder


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())["annotation"]


def test_the_same_seed_writes_the_same_samples(corpus, tmp_path):
    write_corpus(tmp_path, sizes=SIZES, unlabelled_share=0.25)
    for name in ("train", "train_full", "valid", "test"):
        assert read(tmp_path, name) == read(corpus, name)
        for entry in read(corpus, name):
            again, _ = soundfile.read(tmp_path / entry["path"], dtype="int16")
            first, _ = soundfile.read(corpus / entry["path"], dtype="int16")
            assert np.array_equal(again, first), entry


def test_another_seed_draws_other_clips():
    assert plan_clips("train", 20, seed=0) != plan_clips("train", 20, seed=1)


def test_growing_a_split_leaves_the_others_alone(corpus, tmp_path):
    write_corpus(tmp_path, sizes={**SIZES, "test": 30})
    assert read(tmp_path, "valid") == read(corpus, "valid")
    assert read(tmp_path, "train_full") == read(corpus, "train_full")


def test_every_clip_lasts_between_half_a_second_and_three_and_a_half(corpus):
    for name in SIZES:
        for entry in read(corpus, name):
            info = soundfile.info(corpus / entry["path"])
            assert (info.samplerate, info.channels) == (16_000, 1)
            assert MIN_SECONDS <= info.duration <= 3.5


def test_the_named_share_of_train_has_no_text_and_train_full_has_them_all(corpus):
    train, full = read(corpus, "train"), read(corpus, "train_full")
    assert sum("text" not in entry for entry in train) == 10
    assert [entry | {"text": whole["text"]} for entry, whole in zip(train, full)] == full
    assert all("text" in entry for name in ("valid", "test") for entry in read(corpus, name))


def test_each_task_has_its_share_and_only_questions_have_a_q(corpus):
    train = read(corpus, "train")
    assert Counter(entry["task"] for entry in train) == {task: share * 40 for task, share in TASK_SHARES.items()}
    assert all(("Q" in entry) == (entry["task"] == "QA") for entry in train)


def test_the_manifest_names_the_voice_of_speech_and_reads_as_any_manifest(corpus):
    entries = list(read_manifest(corpus / "train.json"))
    assert len(entries) == 40 and sum(entry.text is None for entry in entries) == 10
    assert all(entry.path.exists() for entry in entries)
    assert all(entry.speaker.split("+")[1] in MALE + FEMALE for entry in entries if entry.task == "asr")
    assert all(entry.speaker is None for entry in entries if entry.task == "audiocaption_v2")


def test_a_perfect_model_gets_full_marks():
    clips = plan_clips("test", 240)
    predictions = [Prediction(str(i), clip.task, "synth", (clip.text,), clip.text) for i, clip in enumerate(clips)]
    values = {task: found.value for task, found in score(predictions).items()}
    assert values == pytest.approx({"asr": 0, "audiocaption_v2": 10, "gender_recognition": 1, "QA": 1})


def test_splits_share_no_utterance_and_no_sound():
    signatures = {}
    for split, size in {"train": 2_400, "valid": 400, "test": 400}.items():
        signatures[split] = set()
        for clip in plan_clips(split, size):
            content = clip.content
            if isinstance(content, Utterance):
                signatures[split].add((content.words, content.voice))
            else:
                signatures[split].update(sound.signature for sound in content.sounds)
        assert len(signatures[split]) > size / 2
    assert not signatures["train"] & signatures["valid"]
    assert not signatures["train"] & signatures["test"]
    assert not signatures["valid"] & signatures["test"]


def test_held_out_voices_are_heard_in_the_test_split_only():
    def variants(split):
        clips = plan_clips(split, 600)
        return {clip.content.voice.split("+")[1] for clip in clips if isinstance(clip.content, Utterance)}

    assert variants("train") == variants("valid") == {*MALE, *FEMALE} - {*HELD_OUT}
    assert variants("test") == {*MALE, *FEMALE}


def test_answers_are_true_of_what_is_heard():
    checked = Counter()
    for clip in plan_clips("train", 2_000):
        if clip.question == "How many digits are spoken?":
            assert ("zero", "one", "two", "three", "four").index(clip.text) == len(clip.content.words.split())
        elif clip.question == "Does the sweep rise or fall?":
            assert ("rising_sweep" in clip.content.kinds) == (clip.text == "rise")
        elif clip.question == "Is there noise?":
            assert ("noise" in clip.content.caption) == (clip.text == "yes")
        elif clip.task == "gender_recognition":
            assert (clip.content.voice.split("+")[1] in FEMALE) == (clip.text == "female")
        else:
            continue
        checked[clip.question] += 1
    assert len(checked) == 4 and min(checked.values()) > 5


def dominant_hz(waveform_N):
    return np.abs(np.fft.rfft(waveform_N)).argmax() * SAMPLE_RATE / len(waveform_N)


@pytest.mark.parametrize("kind", CAPTIONS)
def test_a_sound_is_what_its_caption_says(kind):
    sound = draw_sound(random.Random(0), kind)
    waveform_N = render_sound(sound)
    quarter = len(waveform_N) // 4
    early, late = dominant_hz(waveform_N[:quarter]), dominant_hz(waveform_N[-quarter:])
    power = np.abs(np.fft.rfft(waveform_N)) ** 2
    flatness = np.exp(np.log(power + 1e-12).mean()) / power.mean()  # 1 of a flat spectrum, 0 of a line
    holds = {
        "low_tone": early == pytest.approx(late, abs=10) and early < 450,
        "high_tone": early == pytest.approx(late, abs=10) and early > 1_500,
        "rising_sweep": late > 2 * early,
        "falling_sweep": early > 2 * late,
        "noise": flatness > 0.3,
        "clicks": np.abs(waveform_N[200:]).max() > 0 and np.mean(np.abs(waveform_N) < 1e-4) > 0.8,
    }
    assert holds[kind]
    assert np.abs(waveform_N).max() <= sound.amplitude / 1_000 + 1e-9


def test_what_was_spoken_before_does_not_change_a_new_synthesizer():
    first, second = Synthesizer(), Synthesizer()
    heard = first.speak("four seven", voice="en+f5")
    first.speak("stop the music", voice="en-us+m3")
    assert np.array_equal(second.speak("four seven", voice="en+f5"), heard)
    assert len(heard) > 0.3 * first.sample_rate


def test_a_voice_that_espeak_lacks_is_refused():
    with pytest.raises(ValueError, match="voice is 'en-xx', but eSpeak NG does not know it"):
        Synthesizer().speak("one", voice="en-xx")


def test_an_interrupted_overwrite_leaves_no_manifest(tmp_path, monkeypatch):
    sizes = {"train": 4, "valid": 1, "test": 1}
    write_corpus(tmp_path, sizes=sizes)
    assert len(list(tmp_path.glob("*.json"))) == 4

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Synthesizer, "speak", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_corpus(tmp_path, seed=1, sizes=sizes)
    assert list(tmp_path.glob("*.json")) == []


def test_wrong_sizes_and_shares_are_refused(tmp_path):
    with pytest.raises(ValueError, match="sizes is given for"):
        write_corpus(tmp_path, sizes={"train": 1, "dev": 1, "test": 1})
    with pytest.raises(ValueError, match=r"unlabelled_share is 1.5, but it is a share in \[0, 1\]"):
        write_corpus(tmp_path, unlabelled_share=1.5)
    assert not list(tmp_path.iterdir())
