"""Distillation across tokenizers, with small real ones: byte-level and byte-fallback BPE, sentencepiece."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.autograd import gradcheck
from transformers import PreTrainedTokenizerFast

from distill.demo.tokenizer import train_tokenizer
from distill.objective.alignment import NO_CHUNK, Alignment, align, byte_ends, token_bytes
from distill.objective.crosstokenizer import (
    NO_TWIN,
    Translator,
    chunk_likelihood,
    chunk_logprobs,
    fused_cross_loss,
    matched_targets,
    twin_ids,
)
from distill.objective.head import Head
from distill.objective.losses import ce, forward_kl
from shards.targets.distributions import Sparse
from teachers.words.ending import End

CORPUS = ["the cat sat on the mat", "a dog barks at the cat in the garden", "café naïve", "one two three four five"] * 5
TEXTS = [
    "the cat sat on the mat",
    "  two  spaces and a dog",
    "café 猫が鳴く 🐈 naïve",  # characters of two, three and four bytes that no vocabulary below holds
    "the <sound> cat",
    "unseen WORDS, (punctuation) 42!",
    "tab\tand\nnewline",
    "a",
    "",
]


def wrap(tokenizer: Tokenizer, **options) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **options)


def byte_level(vocab_size: int) -> PreTrainedTokenizerFast:
    """As Llama 3 and Qwen have it, with a token added after training."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=["<|end|>"],
                                  show_progress=False)  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<sound>"])
    return wrap(tokenizer, eos_token="<|end|>")


def byte_fallback(prefix: bool) -> PreTrainedTokenizerFast:
    """As Llama 2 has it: spaces are ▁, one comes before the first word, unknown characters become bytes."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=90, show_progress=False))
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [piece for piece, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1]) if piece not in "éï"]
    ids = {piece: index for index, piece in enumerate(pieces)}
    merges = [tuple(m) for m in json.loads(trained.to_str())["model"]["merges"]]
    merges = [m for m in merges if all(part in ids for part in (*m, "".join(m)))]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(([normalizers.Prepend("▁")] if prefix else []) + steps)
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return wrap(tokenizer, eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, PreTrainedTokenizerFast]:
    return {
        "bytes, small": byte_level(270),
        "bytes, large": byte_level(400),
        "fallback": byte_fallback(prefix=False),
        "fallback with a space before": byte_fallback(prefix=True),
        "sentencepiece": train_tokenizer(CORPUS, tmp_path_factory.mktemp("unigram"), vocab_size=330),
    }


NAMES = ["bytes, small", "bytes, large", "fallback", "fallback with a space before", "sentencepiece"]


def encode(tokenizer, text: str) -> tuple[list[int], list[int]]:
    """Ids of the answer without its end token, and their ends in bytes."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids, byte_ends(ids, token_bytes(tokenizer), text)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_an_answers_tokens_are_its_text(tokenizers, name, text):
    ids, ends = encode(tokenizers[name], text)
    data, starts = text.encode(), [0, *ends[:-1]]
    pieces = token_bytes(tokenizers[name])
    assert (ends[-1] if ends else 0) == len(data)
    for index, start, end in zip(ids[1:], starts[1:], ends[1:]):
        assert pieces[index] == data[start:end]
    if ids:
        assert pieces[ids[0]].endswith(data[: ends[0]])


@pytest.mark.parametrize("student", NAMES)
@pytest.mark.parametrize("teacher", NAMES)
def test_chunks_are_the_shortest_spans_that_both_tokenizations_share(tokenizers, teacher, student):
    for text in TEXTS:
        (teacher_ids, teacher_ends), (student_ids, student_ends) = (
            encode(tokenizers[n], text) for n in (teacher, student)
        )
        alignment = align([*teacher_ends, 0], [*student_ends, 0], len(text.encode()))
        borders = sorted(set(teacher_ends) & set(student_ends))  # by brute force
        assert alignment.num_chunks == len(borders) + 1
        for ids, ends, chunks in (
            (teacher_ids, teacher_ends, alignment.teacher_chunk_S),
            (student_ids, student_ends, alignment.student_chunk_S),
        ):
            assert chunks.tolist() == [sum(b < end for b in borders) for end in ends] + [len(borders)]
            assert len(chunks) == len(ids) + 1


def test_a_character_cut_in_two_is_a_chunk_of_its_own_bytes(tokenizers):
    text = "é"
    ids, ends = encode(tokenizers["bytes, small"], text)
    assert (len(ids), ends) == (2, [1, 2])
    whole = align([1, 2, 2], [2, 2], 2)
    assert whole.teacher_chunk_S.tolist() == [0, 0, 1] and whole.student_chunk_S.tolist() == [0, 1]
    both = align([1, 2, 2], [1, 2, 2], 2)
    assert both.teacher_chunk_S.tolist() == [0, 1, 2], "a border inside a character counts when both have it"
    by_character = align([2, 2, 2], [1, 2, 2], 2)
    assert by_character.num_chunks == 2, "offsets of a tokenizer that knows characters only part nothing inside one"


def test_a_cut_answer_is_aligned_as_far_as_both_go_and_its_end_token_is_not():
    alignment = align([3, 7, 7], [3, 5, 7, 9, 12, 12], 12)
    assert alignment.teacher_chunk_S.tolist() == [0, 1, NO_CHUNK]
    assert alignment.student_chunk_S.tolist() == [0, 1, 1, NO_CHUNK, NO_CHUNK, NO_CHUNK]


def test_end_tokens_of_any_number_are_one_chunk():
    alignment = align([4, 0, 0, 0], [2, 4, 0], 4, num_teacher_end_tokens=3)
    assert alignment.teacher_chunk_S.tolist() == [0, 1, 1, 1]
    assert alignment.student_chunk_S.tolist() == [0, 0, 1]


def test_tokens_alone_in_their_chunk_on_both_sides_are_paired():
    alignment = align([3, 5, 8, 0], [3, 4, 5, 8, 0], 8)
    assert list(zip(alignment.teacher_single_M.tolist(), alignment.student_single_M.tolist())) == [
        (0, 0),
        (2, 3),
        (3, 4),
    ]


def test_a_batch_of_alignments_keeps_its_answers_apart():
    parts = [align([3, 5, 0], [5, 0], 5), align([], [], 0, 0, 0), align([2, 0], [1, 2, 0], 2)]
    batch = Alignment.concatenate(parts)
    assert batch.num_chunks == 4
    assert batch.teacher_chunk_S.tolist() == [0, 0, 1, 2, 3]
    assert batch.student_chunk_S.tolist() == [0, 1, 2, 2, 3]
    assert list(zip(batch.teacher_single_M.tolist(), batch.student_single_M.tolist())) == [(2, 1), (4, 4)]
    assert Alignment.concatenate([]).num_chunks == 0


def test_a_text_that_the_tokenizer_normalizes_is_refused(tokenizers):
    tokenizer = byte_level(270)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    with pytest.raises(ValueError, match="NFC"):
        encode(tokenizer, "cafe\u0301")


def test_a_tokenizer_whose_tokens_are_not_bytes_of_the_text_is_refused():
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="is WordPiece, but bytes are known of"):
        token_bytes(wrap(tokenizer))


def logprobs(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -3 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 0.01


def test_a_chunks_log_probability_is_the_sum_of_its_tokens():
    values = torch.tensor([-1.0, -2.0, -4.0, -8.0])
    chunks = torch.tensor([0, 0, 1, NO_CHUNK])
    assert chunk_logprobs(values, chunks, 2).tolist() == [-3.0, -4.0]


def test_the_chunk_likelihood_is_the_kl_of_two_coins():
    alignment = align([3, 5, 0], [2, 3, 5, 0], 5)
    student_S, teacher_S = logprobs(4), logprobs(3, seed=1)
    for temperature in (1.0, 4.0, 100.0):
        q = (torch.stack([student_S[0] + student_S[1], student_S[2], student_S[3]]) / temperature).exp()
        p = (teacher_S / temperature).exp()
        coins = [torch.distributions.Bernoulli(x) for x in (p, q)]
        expected_C = temperature * torch.distributions.kl_divergence(*coins)
        torch.testing.assert_close(
            chunk_likelihood(student_S, teacher_S, alignment, temperature), expected_C, rtol=1e-5, atol=1e-9
        )


def test_the_chunk_likelihood_has_an_exact_gradient_for_the_student_and_none_for_the_teacher():
    alignment = align([3, 5, 0], [2, 3, 5, 0], 5)
    student_S, teacher_S = logprobs(4).requires_grad_(), logprobs(3, seed=1).requires_grad_()
    for temperature in (1.0, 2.0, 100.0):
        assert gradcheck(lambda x, t=temperature: chunk_likelihood(x, teacher_S.detach(), alignment, t), student_S)
    chunk_likelihood(student_S, teacher_S, alignment).sum().backward()
    assert teacher_S.grad is None


def test_the_chunk_likelihood_is_zero_when_both_give_the_chunks_the_same_chance():
    alignment = align([4, 0], [2, 4, 0], 4)
    student_S = torch.tensor([-0.5, -1.0, -0.25], requires_grad=True)
    loss_C = chunk_likelihood(student_S, torch.tensor([-1.5, -0.25]), alignment)
    (gradient,) = torch.autograd.grad(loss_C.sum(), student_S)
    assert loss_C.abs().max() < 1e-6 and gradient.abs().max() < 1e-6


@pytest.mark.parametrize("sure, unlikely", [(0.0, -0.5), (-1e-9, -90.0), (0.0, 0.0), (-90.0, 0.0), (-1e4, -1e4)])
def test_certain_and_hopeless_chunks_leave_value_and_gradient_finite(sure, unlikely):
    alignment = align([4, 0], [4, 0], 4)
    student_S = torch.tensor([sure, -1.0], requires_grad=True)
    loss_C = chunk_likelihood(student_S, torch.tensor([unlikely, -1.0]), alignment)
    (gradient,) = torch.autograd.grad(loss_C.sum(), student_S)
    assert loss_C.isfinite().all() and gradient.isfinite().all() and loss_C.min() >= -1e-6


@pytest.mark.parametrize("nats", [1e-7, 2e-6, 1e-5, 1e-3, 1.0, 50.0, 1000.0])
def test_float32_gradients_of_the_chunk_likelihood_are_those_of_float64(nats):
    alignment, teacher_S = align([4], [4], 4, 0, 0), torch.tensor([-0.3])
    for temperature in (1.0, 100.0):
        pair = []
        for dtype in (torch.float32, torch.float64):
            student_S = torch.tensor([-nats], dtype=dtype, requires_grad=True)
            loss_C = chunk_likelihood(student_S, teacher_S, alignment, temperature)
            pair.append(torch.autograd.grad(loss_C.sum(), student_S)[0].double())
        torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-5)


def test_no_chunk_gives_no_value_and_a_zero_gradient():
    student_S = logprobs(2).requires_grad_()
    loss_C = chunk_likelihood(student_S, logprobs(1), align([7, 0][:1], [3, 5], 9, 0, 0))
    assert loss_C.shape == (0,)
    (gradient,) = torch.autograd.grad(loss_C.sum(), student_S)
    assert not gradient.any()


def test_twins_stand_for_the_same_bytes_and_are_nobody_elses(tokenizers):
    for teacher in tokenizers.values():
        for student in tokenizers.values():
            teacher_pieces, student_pieces = token_bytes(teacher), token_bytes(student)
            ends = {teacher.eos_token_id: student.eos_token_id}
            twins = twin_ids(teacher_pieces, student_pieces, ends)
            assert twins[teacher.eos_token_id] == student.eos_token_id
            found = [(t, s) for t, s in enumerate(twins.tolist()) if s != NO_TWIN]
            assert len({s for _, s in found}) == len(found) > 256 / 2
            assert all(teacher_pieces[t] == student_pieces[s] for t, s in found if t != teacher.eos_token_id)


def test_a_tokenizer_is_its_own_twin(tokenizers):
    pieces = token_bytes(tokenizers["bytes, large"])
    assert torch.equal(twin_ids(pieces, pieces), torch.arange(len(pieces)))


def test_matched_targets_are_the_teachers_own_when_the_tokenizers_agree():
    ends, labels = [2, 4, 5, 0], torch.tensor([3, 1, 4, 0])
    teacher_SV = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    logprobs_SK, ids_SK = teacher_SV.topk(2, -1)
    residual_S = teacher_SV.scatter(1, ids_SK, -torch.inf).logsumexp(-1)
    teacher = Sparse(ids_SK, logprobs_SK, residual_S)
    positions_M, matched = matched_targets(align(ends, ends, 5), torch.arange(6), labels, labels, teacher)
    for found, expected in zip((positions_M, *matched), (torch.arange(4), *teacher)):
        torch.testing.assert_close(found, expected)


def test_the_mass_of_an_id_without_a_twin_moves_into_the_bucket():
    # the teacher's 0, 1, 2 are the student's 2, nothing, 0; the student says teacher's probabilities where it can
    twins, teacher_V = torch.tensor([2, NO_TWIN, 0]), torch.tensor([[0.5, 0.3, 0.15]])
    alignment = align([1], [1], 1, 0, 0)
    teacher = Sparse(torch.tensor([[0, 1, 2]]), teacher_V.log(), torch.tensor([0.05]).log())
    positions_M, matched = matched_targets(alignment, twins, torch.tensor([0]), torch.tensor([2]), teacher)
    assert positions_M.tolist() == [0]
    torch.testing.assert_close(matched.log_residual_S.exp(), torch.tensor([0.35]))
    student_SV = torch.tensor([[0.15, 0.2, 0.5, 0.15]]).log()
    assert forward_kl(student_SV, matched, 1.0).abs().item() < 1e-6


def test_a_single_token_that_is_spelled_with_another_space_is_no_match(tokenizers):
    teacher, student = tokenizers["fallback with a space before"], tokenizers["fallback"]
    (teacher_ids, teacher_ends), (student_ids, student_ends) = encode(teacher, "a"), encode(student, "a")
    alignment = align(teacher_ends, student_ends, 1, 0, 0)
    assert alignment.num_chunks == 1, "its likelihood is compared all the same"
    labels = torch.tensor(teacher_ids), torch.tensor(student_ids)
    twins = twin_ids(token_bytes(teacher), token_bytes(student))
    logprobs_SK = torch.full((len(teacher_ids), 1), -0.1)
    kept = Sparse(torch.tensor(teacher_ids)[:, None], logprobs_SK, logprobs_SK[:, 0])
    assert matched_targets(alignment, twins, *labels, kept)[0].tolist() == []


class CrossBatch:
    """Two answers, a teacher's targets for them, and a student with a random head."""

    def __init__(self, teacher, student, temperature: float):
        texts, generator = ["the cat sat", "café 🐈 dog"], torch.Generator().manual_seed(0)
        translator = Translator(
            teacher, student, *(End("", (t.eos_token_id,), (t.eos_token_id,)) for t in (teacher, student))
        )
        answers = [[[*encode(t, text)[0], t.eos_token_id] for t in (teacher, student)] for text in texts]
        alignment = Alignment.concatenate([translator.align(text, *pair) for text, pair in zip(texts, answers)])
        theirs, self.labels_S = (torch.tensor([i for pair in answers for i in pair[side]]) for side in (0, 1))
        logits_SV = 3 * torch.randn(
            len(theirs), len(translator.teacher_pieces), generator=generator, dtype=torch.float64
        )
        self.teacher_logprobs_S = logits_SV.log_softmax(-1).gather(1, theirs[:, None])[:, 0]
        soft_SV = (logits_SV / temperature).log_softmax(-1)
        logprobs_SK, ids_SK = soft_SV.topk(40, -1)
        sparse = Sparse(ids_SK, logprobs_SK, soft_SV.scatter(1, ids_SK, -torch.inf).logsumexp(-1))
        self.targets = translator.translate(alignment, theirs, self.labels_S, self.teacher_logprobs_S, sparse)
        size = len(self.labels_S), 6
        self.hidden_SD = torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()
        self.weight_VD = torch.randn(len(translator.student_pieces), 6, generator=generator, dtype=torch.float64)
        self.ce_weight_S, self.kl_weight_S = torch.rand(2, size[0], generator=generator, dtype=torch.float64)
        self.chunk_weight_C = torch.rand(alignment.num_chunks, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("teacher, student", [("bytes, large", "sentencepiece"), ("fallback", "bytes, small")])
def test_the_fused_objective_equals_the_plain_terms_in_value_and_gradient(tokenizers, teacher, student, temperature):
    batch = CrossBatch(tokenizers[teacher], tokenizers[student], temperature)
    targets, weights = batch.targets, (batch.ce_weight_S, batch.kl_weight_S, batch.chunk_weight_C)
    assert 2 <= targets.is_matched_S.sum() < len(batch.labels_S), "the end tokens match, and not every token does"
    fused = fused_cross_loss(batch.hidden_SD, Head(batch.weight_VD), batch.labels_S, targets, *weights, temperature)
    logits_SV = batch.hidden_SD @ batch.weight_VD.T
    ce_S = ce(logits_SV, batch.labels_S)
    kl_S = forward_kl(logits_SV, targets.sparse, temperature)
    kl_S = kl_S.where(targets.is_matched_S, 0)
    chunk_C = chunk_likelihood(-ce_S, batch.teacher_logprobs_S, targets.alignment)
    plain = sum((weight * value).sum() for weight, value in zip(weights, (ce_S, kl_S, chunk_C)))
    for found, expected in zip(fused, (plain, ce_S, kl_S, chunk_C)):
        torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, batch.hidden_SD)[0] for loss in (fused.loss, plain)]
    torch.testing.assert_close(*gradients)


def test_a_student_with_the_teachers_tokenizer_gets_the_teachers_targets_whole(tokenizers):
    batch = CrossBatch(tokenizers["bytes, large"], tokenizers["bytes, large"], 1.0)
    assert batch.targets.is_matched_S.all()
    torch.testing.assert_close(
        batch.targets.sparse.logprobs_SK.exp().sum(1) + batch.targets.sparse.log_residual_S.exp(),
        torch.ones(len(batch.labels_S), dtype=torch.float64),
    )
