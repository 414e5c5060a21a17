"""Decoding: beams and penalties give the reference's ids; every row ends of its own accord, at ids or at a sequence."""

import dataclasses

import pytest
import tiny
import torch
from test_checkpoint import reference, samples_of  # noqa: F401 (a fixture)

from distill.config import EvalConfig
from distill.evaluation.answering import predict
from teachers.salmonn import Salmonn
from teachers.words.ending import has_ended, truncate_after_end
from teachers.words.generation import EndSequence

SALMONN = {"num_beams": 4, "repetition_penalty": 1.0, "length_penalty": 1.0}  # of decode configs in both trainers


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    tiny.make_parts(folder)
    return tiny.make_teacher(folder).eval()


@pytest.mark.shared
@pytest.mark.parametrize("name", ["A0", "A1", "B"])
def test_beam_search_gives_the_references_ids(reference, name):  # noqa: F811
    model, _, tensors, scenarios = reference
    batch = model.collate(samples_of(name, tensors, scenarios[name]), with_answer=False, first_prompt=True)
    assert model.generate_ids(batch, max_new_tokens=24, **SALMONN) == scenarios[name]["generate_beams4"]


@pytest.mark.shared
@pytest.mark.parametrize("name", ["A0", "A1"])
def test_salmonns_own_stop_id_gives_its_shorter_answers(reference, name):  # noqa: F811
    model, _, tensors, scenarios = reference
    batch = model.collate(samples_of(name, tensors, scenarios[name]), with_answer=False, first_prompt=True)
    ids = model.generate_ids(batch, max_new_tokens=24)[0]
    assert truncate_after_end(ids, [[2]]) == scenarios[name]["generate_beams1"][0]


@pytest.mark.shared
def test_a_beam_of_a_batch_is_the_beam_of_the_row_alone(reference):  # noqa: F811
    model, _, tensors, scenarios = reference
    samples = samples_of("A0", tensors, scenarios["A0"]) + samples_of("A1", tensors, scenarios["A1"])
    together = model.generate(samples, max_new_tokens=24, **SALMONN)
    assert together == [model.generate([sample], max_new_tokens=24, **SALMONN)[0] for sample in samples]


def score_plainly(model: Salmonn, prompt_BTD: torch.Tensor, ids: list[int], penalty: float) -> torch.Tensor:
    """Log-probabilities of the next id after a prompt and ids, no cache: the textbook way."""
    embeds = torch.cat([prompt_BTD, model.llm.get_input_embeddings()(torch.tensor([ids], dtype=torch.long))], 1)
    scores_V = model.llm(inputs_embeds=embeds).logits[0, -1].log_softmax(-1)
    for token in set(ids):
        scores_V[token] *= penalty if scores_V[token] < 0 else 1 / penalty
    return scores_V


@torch.no_grad()
def search_plainly(model: Salmonn, sample, *, beams: int, steps: int, penalty: float, exponent: float) -> list[int]:
    """Beam search without a cache, one hypothesis at a time; it ends when no running one can enter the best."""
    batch = model.collate([sample], with_answer=False, first_prompt=True)
    prompt_BTD = model.embed(batch, model.hear(batch))
    ends, running, finished = set(model.end_ids), [(0.0, [])], []
    for step in range(steps):
        grown = []
        for total, ids in running:
            best = score_plainly(model, prompt_BTD, ids, penalty).topk((1 + len(ends)) * beams)
            grown += [(total + float(s), [*ids, int(t)]) for s, t in zip(best.values, best.indices)]
        grown = sorted(grown, key=lambda pair: -pair[0])
        is_last = step == steps - 1
        finished += [(s / len(ids) ** exponent, ids) for s, ids in grown[:beams] if ids[-1] in ends or is_last]
        finished = sorted(finished, key=lambda pair: -pair[0])[:beams]
        running = [(s, ids) for s, ids in grown if ids[-1] not in ends][:beams]
        if len(finished) == beams and running[0][0] / (step + 1) ** exponent < finished[-1][0]:
            break
    return finished[0][1]


@pytest.mark.parametrize(("penalty", "exponent"), [(1.0, 1.0), (1.5, 1.0), (1.0, 0.0), (1.3, 2.0)])
def test_beams_with_penalties_are_those_of_a_plain_search(model, penalty, exponent, monkeypatch):
    sample = tiny.make_sample(3)
    batch = model.collate([sample], with_answer=False, first_prompt=True)
    first = model.collate([dataclasses.replace(sample, text="")], first_prompt=True)
    likely = model(first)[0][0].topk(8).indices.tolist()  # ids that end some hypotheses early and not all of them
    monkeypatch.setattr(model.llm.generation_config, "eos_token_id", likely[1::3])
    expected = search_plainly(model, sample, beams=3, steps=5, penalty=penalty, exponent=exponent)
    found = model.generate_ids(
        batch, max_new_tokens=5, num_beams=3, repetition_penalty=penalty, length_penalty=exponent
    )
    assert found == [expected]


def test_a_length_penalty_prefers_longer_answers(model, monkeypatch):
    sample = tiny.make_sample(3)
    first = model.collate([dataclasses.replace(sample, text="")], first_prompt=True)
    monkeypatch.setattr(model.llm.generation_config, "eos_token_id", model(first)[0][0].topk(8).indices.tolist()[1::3])
    batch = model.collate([sample], with_answer=False, first_prompt=True)
    short, long = (model.generate_ids(batch, max_new_tokens=5, num_beams=3, length_penalty=p)[0] for p in (0.0, 3.0))
    assert len(short) < len(long)


@torch.no_grad()
def test_greedy_with_a_repetition_penalty_is_the_plain_arithmetic(model):
    sample = tiny.make_sample(4)
    batch = model.collate([sample], with_answer=False, first_prompt=True)
    prompt_BTD, ids = model.embed(batch, model.hear(batch)), []
    for _ in range(6):
        # transformers penalizes raw logits in greedy search, log-probabilities in beam search
        embeds = torch.cat([prompt_BTD, model.llm.get_input_embeddings()(torch.tensor([ids], dtype=torch.long))], 1)
        logits_V = model.llm(inputs_embeds=embeds).logits[0, -1]
        for token in set(ids):
            logits_V[token] *= 1.8 if logits_V[token] < 0 else 1 / 1.8
        ids.append(int(logits_V.argmax()))
    assert model.generate_ids(batch, max_new_tokens=6, repetition_penalty=1.8) == [truncate_after_end(ids, model.ends)]


def test_the_config_reaches_the_search(model, monkeypatch):
    sample, asked = tiny.make_sample(5), []
    given = {"max_new_tokens": 6, "num_beams": 2, "repetition_penalty": 2.0, "length_penalty": 0.5}
    expected, answer = model.generate([sample], **given), model.answer_ids
    monkeypatch.setattr(
        model, "answer_ids", lambda samples, **options: asked.append(options) or answer(samples, **options)
    )
    assert [p.hypothesis for p in predict(model, [sample], EvalConfig(**given))] == expected
    assert asked == [given]


def test_an_end_of_several_ids_ends_each_row_and_its_last_id_alone_does_not():
    stop = EndSequence([7, 8])
    rows = torch.tensor([[1, 7, 8], [7, 1, 8], [7, 8, 1]])
    assert stop(rows, None).tolist() == [True, False, False]
    assert stop(rows[:, :1], None).tolist() == [False, False, False]
    assert truncate_after_end([1, 8, 7, 8, 5], [[7, 8], [9]]) == [1, 8, 7, 8]
    assert truncate_after_end([1, 9, 7, 8], [[7, 8], [9]]) == [1, 9]
    assert not has_ended([], [[9]]) and not has_ended([8], [[7, 8]])


def test_an_answer_ends_with_the_text_of_its_end_token(tmp_path):
    tiny.make_parts(tmp_path)
    model = tiny.make_teacher(tmp_path, end_token="one two").eval()
    assert len(model.rows.end_ids) > 1
    batch = model.collate([tiny.make_sample(0)], with_answer=False)
    head, ends = model.llm.lm_head, iter([5, *model.rows.end_ids, 6, 6])

    class Scripted(torch.nn.Module):
        """A head that says what it is told."""

        def forward(self, states):
            logits = torch.zeros(*states.shape[:-1], head.out_features)
            logits[..., next(ends)] = 1.0
            return logits

    model.llm.lm_head = Scripted()
    assert model.generate_ids(batch, max_new_tokens=8) == [[5, *model.rows.end_ids]]
