import pytest
from transformers import AutoTokenizer

from distill.demo.tokenizer import _train_sentencepiece, train_tokenizer
from shards.demo.synth import plan_clips

PROMPTS = ["USER: <Speech>", "</Speech> Can you transcribe the speech?\nASSISTANT:"]
TRICKY = [
    *PROMPTS,
    "four seven two nine",
    "a low tone followed by noise",
    " leading, trailing and  double  spaces ",
    "lines\nand\ttabs\r\n",
    "naïve ☃ 日本語 🎺",
    "1,234.5 UPPER lower",
    "",
    " ",
]


@pytest.fixture(scope="module")
def texts():
    clips = plan_clips("train", 300)
    return [clip.text for clip in clips] + [clip.question for clip in clips if clip.question] + PROMPTS * 20


@pytest.fixture(scope="module")
def folder(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts, folder, vocab_size=520)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", TRICKY)
def test_every_text_comes_back_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_pieces_of_a_prompt_join_to_the_whole(tokenizer):
    pieces = ["USER: <Speech>", "</Speech> What", " is this?\n", "ASSISTANT:", "noise", tokenizer.eos_token]
    ids = [token for piece in pieces for token in tokenizer(piece, add_special_tokens=False).input_ids]
    assert tokenizer.decode(ids) == "".join(pieces)


def test_pieces_are_those_of_sentencepiece(tokenizer, texts):
    processor = _train_sentencepiece(texts, 520)
    for text in [*texts, *TRICKY]:
        assert tokenizer(text, add_special_tokens=False).input_ids == processor.encode(text)


def test_special_tokens_are_inside_the_vocabulary(tokenizer):
    ids = tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    assert ids == (0, 1, 2, 3)
    assert len(tokenizer) == tokenizer.vocab_size <= 520
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == ["<unk>", "<s>", "</s>", "<pad>"]
    assert tokenizer("noise").input_ids[0] == tokenizer.bos_token_id
    assert tokenizer("noise", tokenizer.eos_token, add_special_tokens=False).input_ids[-1] == 2


def test_offsets_point_at_the_text_of_each_token(tokenizer):
    text = "stop the  music"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [text[start:end] for start, end in encoded.offset_mapping]
    assert "".join(spans) == text
    assert spans == [tokenizer.decode([token]) for token in encoded.input_ids]


def test_frequent_words_are_one_token(tokenizer):
    assert len(tokenizer("four seven two", add_special_tokens=False).input_ids) == 3


def test_training_again_gives_the_same_file(texts, folder, tmp_path):
    train_tokenizer(texts, tmp_path, vocab_size=520)
    assert (tmp_path / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_vocabulary_without_room_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size is 200, but 4 special tokens, 256 bytes .* choose 264 or more"):
        train_tokenizer(["abc cab"], tmp_path, vocab_size=200)


def test_a_corpus_without_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="texts is empty"):
        train_tokenizer(["", ""], tmp_path, vocab_size=520)
