"""A clip with several right answers is answered once and scored against all of them."""

import json

import pytest
import soundfile
import tiny

from distill.config import EvalConfig
from distill.evaluation.agreement import predict_answers
from distill.evaluation.answering import answer, evaluate
from distill.evaluation.clips import find_clips
from distill.evaluation.metrics.scores import score
from shards.packing.folder import ShardSize
from shards.packing.pack import pack
from shards.sample import SAMPLE_RATE
from shards.streaming.order import Order
from shards.streaming.stream import ShardStream

CAPTIONS = [["a low tone", "a tone is low", "one hum"], ["a high tone", "a beep", "one high beep"]]


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Two clips with three captions each, a question about one of them, and one clip without a text."""
    folder = tmp_path_factory.mktemp("split")
    rows = []
    for number in range(3):
        soundfile.write(folder / f"{number}.wav", tiny.tone(number), SAMPLE_RATE, subtype="PCM_16")
    for captions in zip(*CAPTIONS):  # a caption of each clip by turns: rows of a clip lie in two shards
        rows += [{"path": f"{n}.wav", "text": text, "task": "audiocaption"} for n, text in enumerate(captions)]
    rows += [{"path": "0.wav", "text": text, "task": "QA", "Q": q} for text, q in (("low", "How?"), ("1", "How many?"))]
    rows += [{"path": "2.wav", "text": None, "task": "audiocaption"}]
    (folder / "split.json").write_text(json.dumps({"annotation": rows}))
    pack(folder / "split.json", folder / "shards", name="split", size=ShardSize(4), workers=1)
    return folder / "shards"


def test_rows_of_one_audio_task_and_question_are_one_clip(split):
    clips = find_clips(split)
    assert sorted(clips.references.values()) == sorted([*map(tuple, CAPTIONS), ("low",), ("1",)])
    assert len(clips.left_out) == 5


def test_each_clip_is_answered_once_and_training_sees_every_row(split, tmp_path):
    tiny.make_parts(tmp_path / "parts")
    model = tiny.make_teacher(tmp_path / "parts").eval()
    options = EvalConfig(batch_size=2, max_new_tokens=3)
    predictions = answer(model, split, options)
    assert sorted(p.references for p in predictions) == sorted(find_clips(split).references.values())
    assert len({p.key for p in predictions}) == 4
    scores = evaluate(model, split, options)
    assert scores == score(predictions)
    assert {task: found.num_samples for task, found in scores.items()} == {"QA": 2, "audiocaption": 2}
    assert scores["audiocaption"].extra["references"] == 3
    assert ShardStream(split, Order(batch_size=2, epochs=1)).num_samples == 9


def test_a_split_without_a_text_is_refused_by_name(tmp_path):
    soundfile.write(tmp_path / "0.wav", tiny.tone(0), SAMPLE_RATE)
    (tmp_path / "x.json").write_text(json.dumps({"annotation": [{"path": "0.wav", "text": None, "task": "asr"}]}))
    pack(tmp_path / "x.json", tmp_path / "x", name="x", workers=1)
    with pytest.raises(ValueError, match=r"x has no clip with a text, but answers are compared with one"):
        answer(None, tmp_path / "x", EvalConfig())
    with pytest.raises(ValueError, match=r"x has no clip with a text, but answers are compared with one"):
        predict_answers(None, tmp_path / "x", EvalConfig())
