"""Ends of answers: an end that is text, joined to the last word or not; text that spells control tokens; leftovers."""

import copy
import dataclasses
import io

import pytest
import sentencepiece
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from distill.answers import Answerer
from distill.caching.capture import Capturer
from distill.config import Config, EvalConfig
from distill.demo.scratch import build_llm
from distill.evaluation.answering import predict
from distill.objective.alignment import answer_ends, token_bytes
from students.hearing import Connector
from students.student import build_student, load_student, save_student
from teachers.blocks import llm_blocks, record_blocks
from teachers.files.checkpoint import load_checkpoint, save_checkpoint
from teachers.files.loading import load_llm
from teachers.lora import Lora, add_lora_
from teachers.online import OnlineTeacher
from teachers.words.controls import TextEncoder
from teachers.words.ending import TextEnd, has_ended, read_answer
from teachers.words.generation import EndText
from teachers.words.prompts import Prompts
from teachers.words.rows import RowTokenizer

END = "</s>"
CONTROLS = ["<|begin|>", "<|end_of_text|>", "<|eot_id|>"]
TEXTS = ["one two.", "one two", "", "one two ", "one! </s", "a </s> b", "one two.</s>", "é.", "."]


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE as Llama 3's that has merged `.</` and ` </`, and knows no `</s>`."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  special_tokens=CONTROLS, show_progress=False)  # fmt: skip
    words = [*tiny.WORDS, "USER: ASSISTANT: what do you hear? <Speech> </Speech>"]
    tokenizer.train_from_iterator(
        [w + tail for w in words for tail in (".</p>", " </p>", ".</b>", "</i>")] * 3, trainer
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=CONTROLS[0], eos_token=CONTROLS[2],
                                   clean_up_tokenization_spaces=False)  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The toys' parts with that tokenizer, and a generation config of several ends."""
    folder = tmp_path_factory.mktemp("parts")
    tiny.make_parts(folder)
    tokenizer = merging_tokenizer()
    for name in ("llm", "student-llm"):
        tokenizer.save_pretrained(folder / name)
        llm = build_llm(len(tokenizer), 64, 1, tokenizer)
        llm.generation_config = GenerationConfig(eos_token_id=[1, 2])
        llm.save_pretrained(folder / name)
    return folder


def rows_of(tokenizer, end: str = END, max_answer_tokens: int = 300) -> RowTokenizer:
    return RowTokenizer(tokenizer, Prompts({"asr": ("<SpeechHere>",)}, "{}"), end, max_answer_tokens)


def test_an_end_that_is_text_is_tokenized_in_one_piece_with_its_answer_and_written_once():
    tokenizer = merging_tokenizer()
    rows = rows_of(tokenizer)
    assert len(rows.end_ids) > 1
    for text in TEXTS:
        expected = tokenizer.encode(text.removesuffix(END) + END, add_special_tokens=False)
        assert rows.answer_ids(text) == expected
    assert rows.answer_ids("one.")[-len(rows.end_ids) :] != rows.end_ids, "the corpus merges over the seam"
    assert rows.answer_ids("one two three")[:2] + rows.end_ids == rows_of(tokenizer, END, 2).answer_ids("one two three")


@pytest.mark.parametrize("text", TEXTS)
def test_an_answer_ends_where_its_text_says_the_end_and_is_read_without_it(text):
    tokenizer = merging_tokenizer()
    rows = rows_of(tokenizer)
    end, ids = TextEnd(tokenizer, rows.end), rows.answer_ids(text)
    first = next(n for n in range(len(ids) + 1) if END in tokenizer.decode(ids[:n]))
    stop = EndText(end)
    stopped = [n for n in range(1, len(ids) + 1) if stop(torch.tensor([ids[:n]]), None).item()]
    assert stopped[0] == first and has_ended(ids[:first], [end])
    assert read_answer(tokenizer, ids[:first], [end]) == (text + END).partition(END)[0].strip()


def test_the_end_of_merged_tokens_lies_behind_the_answer_and_a_cut_answers_nowhere():
    tokenizer = merging_tokenizer()
    rows, text = rows_of(tokenizer), "one two."
    ids, pieces = rows.answer_ids(text), token_bytes(tokenizer)
    ends = answer_ends(ids, pieces, text, rows.end)
    assert len(ends) == len(ids) and ends[-1] == len(text) + 1 and max(e for e in ends if e <= len(text)) == 7
    cut = rows_of(tokenizer, END, 1).answer_ids(text)
    assert answer_ends(cut, pieces, text, rows.end)[1:] == [None] * len(rows.end_ids)


def script(model, monkeypatch, rows: list[list[int]]) -> None:
    """Let the LLM say these ids, a row each, and id 9 behind them."""
    steps = iter(range(100))

    def say(hidden):
        step = next(steps)
        logits = torch.zeros(*hidden.shape[:-1], model.llm.config.vocab_size)
        for b in range(len(hidden)):
            row = rows[b % len(rows)]
            logits[b, -1, row[step] if step < len(row) else 9] = 50.0
        return logits

    monkeypatch.setattr(model.llm.lm_head, "forward", say)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_each_row_and_beam_is_stopped_by_its_own_end_text(parts, monkeypatch, num_beams):
    model = tiny.make_teacher(parts, end_token=END).eval()
    said = [model.rows.answer_ids(text) for text in ("one two.", "three four five six!")]
    batch = model.collate([tiny.make_sample(0), tiny.make_sample(1)], with_answer=False)
    script(model, monkeypatch, said)
    found = model.generate_ids(batch, max_new_tokens=30, num_beams=num_beams)
    if num_beams == 1:
        assert found == said
    assert [model.read(ids) for ids in found] == ["one two.", "three four five six!"] or num_beams == 2
    assert found[0] == said[0]


def test_answers_and_predictions_hold_no_end(parts, monkeypatch):
    model = tiny.make_teacher(parts, end_token=END).eval()
    script(model, monkeypatch, [model.rows.answer_ids("one two.")])
    assert model.generate([tiny.make_sample(0)], max_new_tokens=30) == ["one two."]
    script(model, monkeypatch, [model.rows.answer_ids("one two.")])
    (prediction,) = predict(model, [tiny.make_sample(0)], EvalConfig(max_new_tokens=30))
    assert prediction.hypothesis == "one two." and prediction.ended


@pytest.mark.parametrize("end", ["\n<|eot_id|>", "<|eot_id|>\n", "<|eot_id|><|eot_id|>"])
def test_an_end_of_text_and_control_tokens_ends_and_is_cut(end):
    tokenizer = merging_tokenizer()
    rows = rows_of(tokenizer, end)
    ids = rows.answer_ids("one two.")
    assert tokenizer.decode(ids) == "one two." + end
    ends = [TextEnd(tokenizer, rows.end) if rows.end.text else rows.end_ids]
    assert has_ended(ids, ends) and not has_ended(ids[:-1], ends)
    assert read_answer(tokenizer, ids, ends) == "one two."


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_repetition_penalty_of_a_padded_row_is_that_of_the_row_alone(parts, num_beams):
    model = tiny.make_teacher(parts, windows="audio").eval()
    samples = [tiny.make_sample(n, seconds=s) for n, s in enumerate((0.3, 1.9, 0.9))]
    options = {"max_new_tokens": 12, "num_beams": num_beams, "repetition_penalty": 1.3}
    alone = [model.generate_ids(model.collate([s], with_answer=False), **options)[0] for s in samples]
    together = model.collate(samples, with_answer=False)
    assert model.generate_ids(together, **options) == alone
    assert model.generate_ids(together, **options | {"repetition_penalty": 1.0}) != alone


ODD = {"do_sample": True, "temperature": 9.0, "top_k": 3, "top_p": 0.1, "min_p": 0.5, "typical_p": 0.2,
       "epsilon_cutoff": 0.2, "eta_cutoff": 0.2, "repetition_penalty": 3.0, "encoder_repetition_penalty": 2.0,
       "no_repeat_ngram_size": 1, "encoder_no_repeat_ngram_size": 1, "bad_words_ids": [[n] for n in range(9, 200)],
       "sequence_bias": [[[7], 99.0]], "suppress_tokens": list(range(200, 300)), "renormalize_logits": True,
       "begin_suppress_tokens": list(range(3, 250)), "forced_bos_token_id": 7, "forced_eos_token_id": 8,
       "min_length": 9, "max_length": 3, "min_new_tokens": 9, "max_new_tokens": 2, "max_time": 1e-9,
       "length_penalty": -5.0, "early_stopping": True, "num_beams": 4, "num_return_sequences": 2,
       "stop_strings": ["e", "o", "a"], "exponential_decay_length_penalty": (1, 5.0), "guidance_scale": 4.0,
       "penalty_alpha": 0.6, "cache_implementation": "static", "use_cache": False, "output_scores": True,
       "return_dict_in_generate": True, "watermarking_config": {"greenlist_ratio": 0.1, "bias": 9.0},
       "remove_invalid_values": True, "pad_token_id": 77, "bos_token_id": 78, "decoder_start_token_id": 79,
       "prompt_lookup_num_tokens": 3, "token_healing": True, "low_memory": True, "num_beam_groups": 2,
       "diversity_penalty": 5.0, "dola_layers": "low", "top_h": 0.3, "prefill_chunk_size": 2}  # fmt: skip


def answer_both_ways(model) -> tuple[list[list[int]], ...]:
    """Ids of greedy answers, and of beams."""
    batch = model.collate([tiny.make_sample(0), tiny.make_sample(1, seconds=1.4)], with_answer=False)
    return tuple(model.generate_ids(batch, max_new_tokens=8, num_beams=num_beams) for num_beams in (1, 2))


@pytest.fixture(scope="module")
def answered(parts):
    """A teacher whose LLM's generation config is plain, and its answers."""
    model = tiny.make_teacher(parts).eval()
    return model, answer_both_ways(model)


@pytest.mark.parametrize("name", ODD)
def test_no_field_of_a_generation_config_changes_an_answer(answered, monkeypatch, name):
    model, expected = answered
    own = copy.deepcopy(model.llm.generation_config)
    setattr(own, name, ODD[name])
    monkeypatch.setattr(model.llm, "generation_config", own)
    assert answer_both_ways(model) == expected and model.llm.generation_config is own


def test_rows_of_a_padded_head_are_never_said(parts, tmp_path):
    tokenizer = merging_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    build_llm(len(tokenizer) + 60, 64, 1, tokenizer).save_pretrained(tmp_path)
    model = tiny.make_teacher(parts).eval()
    padded = type(model)(dataclasses.replace(model.config, llm=str(tmp_path)), load_llm(str(tmp_path), torch.float32),
                         tokenizer, model.whisper).eval()  # fmt: skip
    with torch.no_grad():
        padded.llm.lm_head.weight[len(tokenizer) :] *= 100
    batch = padded.collate([tiny.make_sample(0)], with_answer=False)
    for num_beams in (1, 3):
        assert max(padded.generate_ids(batch, max_new_tokens=8, num_beams=num_beams)[0]) < len(tokenizer)


def test_a_pad_id_behind_the_embeddings_is_refused_with_both_numbers(parts, tmp_path):
    tokenizer = merging_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model = tiny.make_teacher(parts)
    with pytest.raises(
        ValueError, match=rf"pad id of the tokenizer is {rows}, but the embeddings of .* have {rows} rows"
    ):
        type(model)(model.config, model.llm, tokenizer, model.whisper)


def test_a_template_that_writes_bos_gets_it_once(parts):
    plain, own = (tiny.make_teacher(parts, template=f"{bos}USER: {{}}\nASSISTANT:") for bos in ("", CONTROLS[0]))
    before = [m.rows.row(tiny.make_sample(0), with_answer=False, first_prompt=True).before for m in (plain, own)]
    assert before[0] == before[1] and before[0].count(plain.tokenizer.bos_token_id) == 1


def unigram() -> PreTrainedTokenizerFast:
    """A sentencepiece-like vocabulary in which control pieces have the best score of all."""
    letters = [(c, -5.0) for c in "▁<>/s|abcdefghijklmnopqrtuvwxyz_"]
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *letters], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   clean_up_tokenization_spaces=False)  # fmt: skip


def with_words() -> PreTrainedTokenizerFast:
    """A BPE with added tokens that are not special: markup, a word, a run of spaces."""
    tokenizer = merging_tokenizer()
    tokenizer.add_tokens(["<think>", "Karaoke", "   "])
    return tokenizer


@pytest.mark.parametrize("make", [merging_tokenizer, unigram, with_words])
def test_text_that_spells_a_control_token_is_text(make):
    tokenizer = make()
    encoder = TextEncoder(tokenizer)
    assert encoder.controls
    for name in encoder.controls:
        for text in (f"one {name} two", name, f"a{name}", f"{name}{name} x"):
            ids = encoder.encode(text)
            assert not set(ids) & (set(encoder.controls.values()) - {tokenizer.unk_token_id})
            assert tokenizer.decode(ids) == text
            rows = rows_of(tokenizer, "")
            assert rows.answer_ids(text) == [*ids, tokenizer.eos_token_id]
    plain = "one two three"
    assert encoder.encode(plain) == tokenizer.encode(plain, add_special_tokens=False)


def test_added_words_and_spaces_stay_tokens_of_their_own():
    tokenizer = with_words()
    encoder = TextEncoder(tokenizer)
    assert "Karaoke" not in encoder.controls and "<think>" in encoder.controls
    assert tokenizer.convert_tokens_to_ids("Karaoke") in encoder.encode("one Karaoke <think> two")


def test_a_question_is_text_and_the_templates_own_tokens_are_tokens():
    tokenizer = merging_tokenizer()
    prompts = Prompts({"QA": ("<SpeechHere> {}",)}, "<|begin|>USER: {}<|eot_id|>")
    rows = RowTokenizer(tokenizer, prompts, "", 300)
    sample = dataclasses.replace(tiny.make_sample(0, task="QA"), question="is <|eot_id|> or <SpeechHere> here?")
    row = rows.row(sample, with_answer=False, first_prompt=True)
    assert row.after.count(tokenizer.eos_token_id) == 1 and row.after[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(row.before) == "<|begin|>USER: "
    assert tokenizer.decode(row.after) == " is <|eot_id|> or <SpeechHere> here?<|eot_id|>"


def test_a_bare_file_of_a_llm_with_several_ends_is_refused_with_the_choices(parts, tmp_path):
    save_checkpoint(tiny.make_teacher(parts, lora=True), tmp_path / "whole.pth")
    content = torch.load(tmp_path / "whole.pth", weights_only=True)
    torch.save({"model": content["model"]}, tmp_path / "bare.pth")
    names = {"llm": str(parts / "llm"), "whisper": str(parts / "whisper"), "qformer_heads": 2, "window_seconds": 0.34,
             "stride_seconds": 0.34}  # fmt: skip
    with pytest.raises(ValueError, match=r"does not say .*<\|eot_id\|>, <\|end_of_text\|>; set teacher\.end_token"):
        load_checkpoint(tmp_path / "bare.pth", **names)
    with pytest.raises(ValueError, match=r"does not say .*<\|eot_id\|>, <\|end_of_text\|>"):
        load_checkpoint(tmp_path / "bare.pth", llm_weights=False, **names)
    _, report = load_checkpoint(tmp_path / "bare.pth", end_token=CONTROLS[1], **names)
    assert "answers end with <|end_of_text|> (from teacher.end_token)" in str(report)
    assert "stop at <|eot_id|> (from the LLM's generation_config)" in str(report)
    _, report = load_checkpoint(tmp_path / "whole.pth", **names)
    assert "answers end with <|eot_id|> (from the file's config)" in str(report)


def test_a_folder_of_an_adapter_is_refused_by_name(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/llm"}')
    with pytest.raises(ValueError, match=r"holds a PEFT adapter on some/llm, no LLM; merge it"):
        load_llm(str(tmp_path), torch.float32)


FAMILIES = {
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512}, "c_attn"),
    "gpt_neox": (
        GPTNeoXForCausalLM,
        GPTNeoXConfig,
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
        "query_key_value",
    ),
    "bloom": (BloomForCausalLM, BloomConfig, {"hidden_size": 32, "n_layer": 2, "n_head": 2}, "query_key_value"),
}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_student_of_another_family_hears_answers_and_is_saved(parts, tmp_path, family):
    kind, config, sizes, target = FAMILIES[family]
    tokenizer = merging_tokenizer()
    tokenizer.save_pretrained(tmp_path / "llm")
    torch.manual_seed(0)
    kind(config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=2, **sizes)).save_pretrained(tmp_path / "llm")
    teacher, lora = tiny.make_teacher(parts), Lora(rank=2, targets=(target,))
    student = build_student(
        teacher, str(tmp_path / "llm"), lora=lora, quantization="none", connector=Connector("new")
    ).eval()
    samples = [tiny.make_sample(0), tiny.make_sample(1, text="three", seconds=1.5)]
    logits_SV, _ = student(batch := student.collate(samples))
    for b, sample in enumerate(samples):
        torch.testing.assert_close(
            student(student.collate([sample]))[0], logits_SV[batch.row_S == b], atol=1e-4, rtol=1e-4
        )
    with record_blocks(student, [2]) as outputs:
        student(batch)
    assert outputs[2].shape[-1] == 32 and len(llm_blocks(student.llm)) == 2
    together = student.generate_ids(student.collate(samples, with_answer=False), max_new_tokens=5)
    assert together == [
        student.generate_ids(student.collate([s], with_answer=False), max_new_tokens=5)[0] for s in samples
    ]
    save_student(student, tmp_path / "student", lora=lora, quantization="none")
    assert torch.equal(load_student(tmp_path / "student")(batch)[0], logits_SV)
    with pytest.raises(ValueError, match=rf"no layer named \['q_proj'\]; choose among its linear layers: .*{target}"):
        add_lora_(load_llm(str(tmp_path / "llm"), torch.float32), Lora(targets=("q_proj",)))


def test_a_sentencepiece_tokenizer_run_by_itself_spells_its_control_pieces(tmp_path):
    texts = ["one two three </p> <b> <s", *tiny.WORDS] * 3
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=330, hard_vocab_limit=False,
        byte_fallback=True, character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    tokenizer = SentencePieceBackend(vocab_file=str(tmp_path / "spiece.model"), bos_token="<s>", eos_token="</s>",
                                     unk_token="<unk>", add_bos_token=False)  # fmt: skip
    encoder = TextEncoder(tokenizer)
    for name in ("<s>", "</s>"):
        assert encoder.controls[name] in tokenizer.encode(f"one {name} two", add_special_tokens=False)
        ids = encoder.encode(f"one {name} two")
        assert encoder.controls[name] not in ids
        assert tokenizer.decode(ids) == f"one {name} two"


def test_a_students_answer_keeps_the_ids_it_was_said_in_and_ends_once(parts):
    teacher = tiny.make_teacher(parts, end_token=END)
    student = build_student(teacher, str(parts / "student-llm"), lora=Lora(rank=2), quantization="none",
                            connector=Connector("new"), say=lambda line: None).eval()  # fmt: skip
    config = Config(name="toy", precision="float32")
    answerer = Answerer(student, Capturer(OnlineTeacher(teacher), config), config)
    rows, sample = teacher.rows, tiny.make_sample(0)
    whole = rows.answer_ids("one two.")
    spelled = [*rows.text.encode("one"), *rows.end_ids]  # in other tokens than the text's own
    cut = rows.text.encode("one two three")
    for said, text, expected in (
        (whole, "one two.", whole),
        (spelled, "one", spelled),
        (cut, "one two three", [*cut, *rows.end_ids]),
    ):
        put = answerer.say.put(sample, said)
        assert (put.text, list(put.answer_ids)) == (text, expected)
    assert rows.row(answerer.say.put(sample, whole), with_answer=True, first_prompt=True).answer == whole
