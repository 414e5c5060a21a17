"""What `distill doctor` examines of the data and the targets, in the way of `objective.py`.

Shapes: B batch, T LLM positions, S supervised positions, K kept ids.
"""

import torch

from distill.doctor.objective import Case, Fault
from distill.doctor.plain import answer_of
from shards.targets.distributions import Distribution
from teachers.online import OnlineTeacher
from teachers.words.ending import has_ended

NATS = 0.1  # mean difference of log-probabilities that a cache's codec and 16 bits explain


def check_rows(case: Case) -> str:
    """The batch is laid out as its rows say: labels, their positions, the mask and the padding."""
    batch, student = case.whole.batch, case.student
    length = batch.input_ids_BT.shape[1]
    answers = [answer_of(student, sample) for sample in batch.samples]
    starts = [row.prompt_length for row in batch.rows]
    labels = torch.tensor([token for answer in answers for token in answer])
    places = torch.tensor([b * length + s - 1 + i for b, s in enumerate(starts) for i in range(len(answers[b]))])
    found_S, found_places_S = batch.labels_S.cpu(), batch.predicting_S.cpu()
    if not torch.equal(found_S, labels):
        raise Fault(
            f"labels are {found_S[:6].tolist()} …, but the answers' tokens are {labels[:6].tolist()} …; a label is the "
            f"next token, neither shifted nor cut: correct the collation of the batch."
        )
    if not torch.equal(found_places_S, places):
        raise Fault(
            f"supervised positions are {found_places_S[:4].tolist()} …, but the states before the answers' tokens "
            f"stand at {places[:4].tolist()} …; the mask is off by {int(found_places_S[0] - places[0])}: correct the "
            f"collation of the batch."
        )
    ends = torch.tensor([s + len(answer) for s, answer in zip(starts, answers)])
    mask_BT = torch.arange(length) < ends[:, None]
    if not torch.equal(batch.attention_mask_BT.cpu().bool(), mask_BT):
        raise Fault("the attention mask does not end where the rows do, but padding must not be attended; correct it.")
    return f"{len(labels)} labels of {len(answers)} answers stand where their tokens are predicted"


def check_padding(case: Case) -> str:
    """The pad id is a row of the embeddings that no text uses."""
    student, pad_id = case.student, case.student.rows.pad_id
    rows = student.llm.get_input_embeddings().weight.shape[0]
    if not 0 <= pad_id < rows:
        raise Fault(
            f"pad id is {pad_id}, but the embeddings have {rows} rows; use a reserved token of the vocabulary or the "
            f"end token, and add none."
        )
    reserved = {*student.tokenizer.all_special_ids, *student.rows.end_ids}
    if pad_id not in reserved:
        token = student.tokenizer.convert_ids_to_tokens(pad_id)
        raise Fault(
            f"pad id is {pad_id} ({token!r}), but that is a token of texts; use a reserved token or the end token."
        )
    batch = case.whole.batch
    is_padding_BT = batch.attention_mask_BT == 0
    if bool((batch.input_ids_BT[is_padding_BT] != pad_id).any()):
        raise Fault(f"padding holds other ids than the pad id {pad_id}, but nothing else may stand there; correct it.")
    return f"id {pad_id}, reserved, at {int(is_padding_BT.sum())} positions that nobody attends to"


def check_end(case: Case) -> str:
    """Every answer ends with the end token, it is learned, and generation stops at it."""
    batch, student, end = case.whole.batch, case.student, case.student.rows.end_ids
    for b, sample in enumerate(batch.samples):
        labels = batch.labels_S[batch.row_S == b].tolist()
        if not has_ended(labels, student.ends[:1]):
            raise Fault(
                f"the answer to {sample.key} ends with ids {labels[-len(end) :]}, but the end token is {end}; without "
                f"it answers never end: do not cut it, and do not mask a pad id that equals it."
            )
    return f"ids {end}, learned in each of {len(batch.samples)} answers; generation stops there"


def check_cache(case: Case) -> str:
    """The targets are this teacher's on these clips: the log-probabilities of the labels agree, kept ones and all."""
    m, targets, labels_S = case.whole, case.whole.targets, case.teacher_labels()
    stored = -float(targets.label_logprobs_S.mean())
    distribution = targets.distribution
    if not case.is_sampled and (distribution.is_complete or 1.0 in distribution.log_partition_S):
        logprobs_SK = distribution.at(1.0).logprobs_SK
        is_label_SK = (distribution.ids_SK == labels_S[:, None]) & (logprobs_SK > -torch.inf)
        kept_S = is_label_SK.any(1)
        off = (logprobs_SK.where(is_label_SK, 0).sum(1) - targets.label_logprobs_S)[kept_S].abs()
        if bool(kept_S.any()) and not float(off.mean()) <= NATS:
            raise Fault(
                f"the cross-entropy from the kept ids differs from the stored one by {float(off.mean()):.3g} nats a "
                f"label, but both are the teacher's; rows are shifted or the tail was renormalized: cache again."
            )
    if case.teacher is None:
        return f"stored CE {stored:.4f} on {len(labels_S)} labels"
    # across tokenizers the student's rows hold other ids, rightly
    batch = m.batch if targets.cross is None else case.teacher.collate(m.batch.samples)
    now = OnlineTeacher(case.teacher).targets(batch)
    off = float((now.label_logprobs_S - targets.label_logprobs_S).abs().mean())
    if not off <= NATS:
        raise Fault(
            f"the stored log-probabilities of the labels differ from this teacher's by {off:.3g} nats, but must not; "
            f"the cache is stale or of another teacher: run `distill cache` again."
        )
    if not case.is_sampled:
        check_tail(case, now.distribution)
    return f"stored CE {stored:.4f} on {len(labels_S)} labels; the teacher's now differs by {off:.1e} nats a label"


def check_tail(case: Case, now: Distribution) -> None:
    """The kept ids' log-probabilities and the mass outside them are those of the teacher's whole distribution."""
    temperature, kept = case.loss.temperature, case.whole.targets.distribution
    ids_SK, logprobs_SK, residual_S = kept.at(temperature)
    is_kept_SK = logprobs_SK > -torch.inf
    now_SK = now.at(temperature).logprobs_SK.gather(1, ids_SK).where(is_kept_SK, -torch.inf)
    off = float((now_SK - logprobs_SK)[is_kept_SK].abs().mean())
    stored, outside = float(residual_S.exp().mean()), float((1 - now_SK.exp().sum(1)).clamp(min=0).mean())
    if not (off <= NATS and abs(stored - outside) <= 0.1 * outside + 1e-3):
        raise Fault(
            f"the kept log-probabilities differ from the teacher's by {off:.3g} nats and the mass outside them is "
            f"{stored:.3g} of {outside:.3g}; the tail was renormalized or dropped: cache again."
        )


def check_agreement(case: Case) -> str:
    """The teacher's first choice at a position is its label as often as the teacher itself expects."""
    targets, labels_S = case.whole.targets, case.teacher_labels()
    ids_SK, logprobs_SK, _ = targets.distribution.at(case.loss.temperature)
    top_S = ids_SK.gather(1, logprobs_SK.argmax(1, keepdim=True))[:, 0]
    agreement = float((top_S == labels_S).float().mean())
    late = float((top_S[:-1] == labels_S[1:]).float().mean())
    expected = float(targets.label_logprobs_S.exp().mean())
    is_telling = expected * len(labels_S) >= 3  # a teacher that is never sure has no first choice to speak of
    if (is_telling and agreement < 0.5 * expected) or late > agreement + 0.2:
        raise Fault(
            f"the teacher's first choice is the label at {agreement:.0%} of the positions ({late:.0%} one position "
            f"late), but it expects {expected:.0%}; labels and targets are shifted against each other."
        )
    return f"{agreement:.0%} of {len(labels_S)} positions, {expected:.0%} expected"


def check_alignment(case: Case) -> str:
    """Both tokenizers spell the answers, and meet in chunks."""
    teacher, cross = case.collate.teacher, case.whole.targets.cross
    if teacher.num_unaligned:
        raise Fault(
            f"{teacher.num_unaligned} answers are not spelled by both sides' tokens, so cross-entropy alone learns "
            f"from them; write the texts as the tokenizers normalize them (often Unicode NFC)."
        )
    matched = float(cross.is_matched_S.float().mean())
    num_chunks, num_tokens = cross.alignment.num_chunks, len(cross.is_matched_S)
    return f"{num_chunks} chunks of {num_tokens} tokens; {matched:.0%} of them are one token on both sides"
