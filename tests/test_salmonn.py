"""The model: rows are contiguous, a batch is its rows, the end token is learned, a saved model is the model."""

import dataclasses

import pytest
import tiny
import torch

from teachers.loading import load_salmonn, save_salmonn
from teachers.lora import Lora, add_lora_


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    tiny.make_parts(folder)
    return folder


@pytest.fixture(scope="module")
def model(parts):
    return tiny.make_teacher(parts, windows="audio").eval()


SAMPLES = [
    tiny.make_sample(0, text="one", seconds=0.4),
    tiny.make_sample(1, text="two three four five", seconds=1.6),
    tiny.make_sample(2, text="six", seconds=0.9),
]


@torch.no_grad()
def logits(model, samples):
    batch = model.collate(samples)
    return model(batch)[0], batch


@pytest.mark.parametrize("windows", ["all", "audio"])
def test_logits_of_a_batch_are_those_of_each_row_alone(parts, windows):
    model = tiny.make_teacher(parts, windows=windows).eval()
    together, batch = logits(model, SAMPLES)
    for b, sample in enumerate(SAMPLES):
        torch.testing.assert_close(together[batch.row_S == b], logits(model, [sample])[0], atol=1e-5, rtol=1e-5)


def test_prompt_and_answer_are_contiguous_and_end_with_the_end_token(model):
    batch = model.collate(SAMPLES)
    for b, row in enumerate(batch.rows):
        length = row.prompt_length + len(row.answer)
        assert batch.attention_mask_BT[b].tolist() == [1] * length + [0] * (batch.input_ids_BT.shape[1] - length)
        assert batch.labels_S[batch.row_S == b].tolist() == row.answer
        assert row.answer[-1] == model.tokenizer.eos_token_id
        positions = batch.predicting_S[batch.row_S == b] - b * batch.input_ids_BT.shape[1]
        assert positions.tolist() == list(range(row.prompt_length - 1, length - 1))


def test_rows_for_generation_are_padded_at_the_start(model):
    batch = model.collate(SAMPLES, with_answer=False)
    assert batch.attention_mask_BT[:, -1].tolist() == [1, 1, 1]
    assert batch.attention_mask_BT[0, 0] == 0


def test_greedy_answers_of_a_batch_are_those_of_each_row_alone(model):
    together = model.generate(SAMPLES, max_new_tokens=6)
    assert together == [model.generate([sample], max_new_tokens=6)[0] for sample in SAMPLES]


def test_the_first_generated_id_is_the_argmax_of_the_first_logits(model):
    sample = SAMPLES[1]
    scores, _ = logits(model, [sample])
    ids = model.generate_ids(model.collate([sample], with_answer=False), max_new_tokens=1)
    assert ids[0][0] == int(scores[0].argmax())


def test_windows_with_audio_give_fewer_audio_tokens(parts):
    short = tiny.make_teacher(parts, windows="audio").num_audio_tokens(8_000)
    assert short == -(-25 // 17)
    assert tiny.make_teacher(parts, windows="all").num_audio_tokens(8_000) == (100 - 17) // 17 + 1


def test_a_clip_longer_than_the_ears_is_refused_by_name(model):
    with pytest.raises(ValueError, match=r"sample k007 lasts 2\.50 s, but these ears take 0\.02 to 2 s"):
        model.collate([tiny.make_sample(7, seconds=2.5)])


def test_an_unknown_task_is_refused_with_the_nearest_name(model):
    with pytest.raises(ValueError, match=r"task of sample k000 is 'asrr', but the prompts know .*did you mean 'asr'"):
        model.collate([tiny.make_sample(0, task="asrr")])


def test_an_unlabelled_sample_has_no_training_row(model):
    with pytest.raises(ValueError, match=r"text of sample k003 is None, but training needs an answer"):
        model.collate([tiny.make_sample(3, text=None)])


@pytest.mark.parametrize("lora", [False, True])
def test_a_saved_model_loads_to_identical_logits(parts, tmp_path, lora):
    model = tiny.make_teacher(parts, lora=lora).eval()
    settings = {"lora": dataclasses.asdict(Lora(rank=4, alpha=8))} if lora else {}
    save_salmonn(model, tmp_path / "saved", settings=settings)
    loaded = load_salmonn(tmp_path / "saved")
    assert torch.equal(logits(loaded, SAMPLES)[0], logits(model, SAMPLES)[0])
    save_salmonn(loaded, tmp_path / "again", settings=settings)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("saved", "again"))
    assert first == second


def test_other_frozen_weights_than_at_training_are_refused(parts, tmp_path):
    tiny.make_parts(tmp_path / "parts")
    save_salmonn(tiny.make_teacher(tmp_path / "parts"), tmp_path / "saved")
    tiny.make_parts(tmp_path / "parts", seed=1)
    with pytest.raises(ValueError, match=r"llm of .*saved has hash .*, but the model was trained with"):
        load_salmonn(tmp_path / "saved")


def test_a_missing_llm_is_named(parts, tmp_path):
    model = tiny.make_teacher(parts)
    save_salmonn(model, tmp_path / "saved")
    text = (tmp_path / "saved" / "config.json").read_text().replace(str(parts / "llm"), str(tmp_path / "gone"))
    (tmp_path / "saved" / "config.json").write_text(text)
    with pytest.raises(FileNotFoundError, match=r"llm is .*gone, but it is no folder of a causal LM here"):
        load_salmonn(tmp_path / "saved")


def test_lora_on_a_layer_that_is_not_there_is_refused(model):
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no layer named \['c_attn'\]"):
        add_lora_(model.llm, Lora(targets=("c_attn",)))


def test_frozen_ears_stay_in_evaluation_mode(parts):
    model = tiny.make_teacher(parts).train()
    assert model.training and not model.whisper.training and not model.whisper.encoder.training
