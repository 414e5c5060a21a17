"""Trains a small tokenizer on a corpus, saved as a folder that transformers loads: a sentencepiece BPE model as Llama 2
has it, or a byte-level one as Qwen has it.

The demo's teacher and student use the first. It knows texts, nothing of prompts or models. Every text encodes without
loss: what the vocabulary lacks becomes bytes, and nothing is normalized. (`▁`, U+2581, stands for the space, as in
every sentencepiece model: a text that holds it decodes to a space there.)
"""

import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPACE = "▁"
UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"  # ids 0, 1, 2, 3: padding needs no resized embedding
BYTE_PAD, BYTE_EOS = "<|endoftext|>", "<|im_end|>"  # Qwen's own names; the first begins a text, too
NUM_BYTES = 256


def train_tokenizer(texts: Iterable[str], folder: Path, *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer and save it so that `AutoTokenizer.from_pretrained(folder)` loads it.

    Args:
        texts: what the model will read and write, prompts included; their order does not matter to speed or loss.
        folder: where `tokenizer.json` and `tokenizer_config.json` go; made where it is missing.
        vocab_size: ids at most; a small corpus may hold fewer pieces than that. `len(tokenizer)` is what came out.

    Returns:
        The tokenizer, with `bos_token`, `eos_token` and `pad_token` inside its vocabulary. It puts `<s>` before a text
        unless `add_special_tokens` is False.

    Raises:
        ValueError: there is no text, or `vocab_size` has no room for the special tokens, the bytes and the characters.
    """
    texts = [text for text in texts if text]
    characters = set("".join(texts)) - {" "}
    required = len((UNK, BOS, EOS, PAD)) + NUM_BYTES + len(characters | {SPACE})
    if not texts:
        raise ValueError("texts is empty, but a tokenizer is trained on texts; pass the corpus's prompts and answers.")
    if vocab_size < required:
        raise ValueError(
            f"vocab_size is {vocab_size}, but 4 special tokens, 256 bytes and this corpus's {len(characters) + 1} "
            f"characters need {required}; choose {required} or more."
        )
    tokenizer = _build_fast(_train_sentencepiece(texts, vocab_size))
    tokenizer.save_pretrained(folder)
    return tokenizer


def _train_sentencepiece(texts: list[str], vocab_size: int) -> sentencepiece.SentencePieceProcessor:
    """A BPE model with byte fallback that leaves every character as it is."""
    serialized = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=serialized,
        model_type="bpe",  # unigram finds no piece that only one word of a small corpus holds
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,  # a piece of a prompt is encoded alone and must not gain a space
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        unk_piece=UNK,
        bos_piece=BOS,
        eos_piece=EOS,
        pad_piece=PAD,
        num_threads=1,  # the same pieces on every machine
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=serialized.getvalue())


def _halves(piece: str, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to cut a piece in two pieces."""
    cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
    return [(left, right) for left, right in cuts if left in ids and right in ids]


def _build_fast(processor: sentencepiece.SentencePieceProcessor) -> PreTrainedTokenizerFast:
    """The same pieces in the `tokenizers` library, which knows offsets; a piece's id is its rank among the merges."""
    ids = {processor.id_to_piece(i): i for i in range(len(processor))}
    merges = [
        pair
        for piece, i in ids.items()
        if not (processor.is_control(i) or processor.is_byte(i) or processor.is_unknown(i))
        for pair in sorted(_halves(piece, ids), key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    ]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=UNK, fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, processor.bos_id())]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def train_byte_tokenizer(texts: Iterable[str], folder: Path, *, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer and save it so that `AutoTokenizer.from_pretrained(folder)` loads it.

    Args:
        texts: what the model will read and write.
        folder: where its files go.
        vocab_size: ids at most, the 256 bytes and two special tokens among them.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[BYTE_PAD, BYTE_EOS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BYTE_PAD,
        eos_token=BYTE_EOS,
        pad_token=BYTE_PAD,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    return fast
