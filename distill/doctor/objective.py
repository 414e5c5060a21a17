"""What `distill doctor` examines of the objective, one function a claim: returns what was measured or raises `Fault`.

Knows models, batches and losses; reads no config and no command line. Dropout is off, and LoRA's B matrices, which
start at zero and would hide the gradient of A, hold small random numbers.

Shapes: B batch, T LLM positions, S supervised positions, K kept ids, D LLM width, V vocabulary.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.config import LossConfig
from distill.doctor.plain import PLAIN, answer_of, say_plainly
from distill.objective.fused import fused_ce_kl
from distill.objective.head import Head
from distill.objective.module import Objective
from distill.objective.terms import TERMS
from distill.objective.weighing import MicroBatch, Terms, count, weigh
from distill.training.microbatch import Collator, split, trains_ears
from shards.sample import Sample
from shards.targets.codecs.table import codec_of
from shards.targets.distributions import Sparse
from students.student import trained_names
from teachers.salmonn import Salmonn

VALUE, GRADIENT = 1e-3, 1e-2  # relative differences that float32 explains


class Fault(Exception):
    """What is wrong, and what to do."""


@dataclass
class Case:
    """A few samples of a run, its student with the objective, and the teacher for as long as a check asks it."""

    objective: Objective
    collate: Collator
    samples: list[Sample]
    whole: MicroBatch  # all of them
    weights: dict[str, float]  # of the terms, in the middle of the run
    teacher: Salmonn | None  # the model itself, where there is one
    micro_batch: list[Sample]  # as the run has them
    dtype: torch.dtype  # of the run's products; the checks' own are in float32

    @property
    def is_sampled(self) -> bool:
        """Whether the targets are draws, which are right on average only."""
        header = self.collate.teacher.header
        return header is not None and codec_of(header.identity).is_random

    def sparse(self) -> Sparse:
        """What the teacher says where it says something of the student's tokens, at the temperature of the loss."""
        targets = self.whole.targets
        if targets.cross is not None:
            return Sparse(*(x[targets.cross.is_matched_S] for x in targets.cross.sparse))
        return targets.distribution.at(self.loss.temperature)

    def teacher_labels(self) -> Tensor:
        """The answers' tokens of the teacher, which are the student's where the tokenizers agree."""
        batch = self.whole.batch
        if self.whole.targets.cross is None:
            return batch.labels_S
        rows = [self.collate.teacher.rows.row(s, with_answer=True, first_prompt=False) for s in batch.samples]
        return torch.tensor([token for row in rows for token in row.answer], device=batch.labels_S.device)

    def forget_teacher(self) -> None:
        """Free the memory of a teacher whose targets are cached; the ears that it shares stay with the student."""
        if self.collate.teacher.model is None:
            self.teacher = None

    @property
    def student(self) -> Salmonn:
        return self.objective.student

    @property
    def trainable(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.objective.named_parameters() if p.requires_grad}

    @property
    def loss(self) -> LossConfig:
        """The settings of the objective."""
        return self.objective.loss

    @property
    def terms(self) -> Terms:
        """Those of the objective, and cross-entropy, whose positions are looked at in every run."""
        return {"ce": TERMS["ce"], **self.objective.terms}

    def compute(self, m: MicroBatch, weights: dict[str, float], totals: dict[str, int] | None = None) -> Tensor:
        """The part of a micro-batch in the loss of a step with these counts, or of its own, with its gradient."""
        totals = count(self.terms, m) if totals is None else totals
        return self.objective(m, weigh(self.terms, m, self.loss, weights, totals))[0]

    def only(self, term: str) -> dict[str, float]:
        """Weights of which one is 1 and the others 0."""
        return {name: float(name == term) for name in self.terms}

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """The gradient of every trainable tensor, zeros where there is none."""
        named = self.trainable
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, retain_graph=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found)}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Length of the difference of two gradients, relative to the second."""
    difference = sum(float((a[n] - b[n]).double().square().sum()) for n in b)
    return (difference / max(sum(float(g.double().square().sum()) for g in b.values()), 1e-30)) ** 0.5


def check_plain(case: Case) -> str:
    """The fused, batched objective is the plain one, in value and gradient, for each of its terms."""
    m, texts = case.whole, []
    said, ones = say_plainly(case.objective, m), [1.0] * len(m.batch.samples)
    unweighted = replace(m, is_pseudo=[False] * len(ones), sample_weights=ones)
    for term in case.objective.terms:
        if term not in PLAIN:
            texts.append(f"{term} is not written plainly")
            continue
        own, value = case.compute(unweighted, case.only(term)), PLAIN[term](said)
        a, b = float(own.detach()), float(value.detach())
        if not abs(a - b) <= VALUE * max(abs(b), 1.0):
            raise Fault(f"{term} is {a:.6g}, but written plainly it is {b:.6g}{explain(a, b, case.loss.temperature)}")
        ours, theirs = case.gradients(own), case.gradients(value)
        error = distance(ours, theirs)
        if not error <= GRADIENT:
            a, b = (sum(float(g.double().square().sum()) for g in x.values()) ** 0.5 for x in (ours, theirs))
            raise Fault(
                f"the gradient of {term} differs by {error:.1%} (length {a:.4g}, plainly {b:.4g})"
                f"{explain(a, b, case.loss.temperature)}"
            )
        texts.append(f"{term} {float(own.detach()):.4f} (gradient off by {error:.0e})")
    return ", ".join(texts)


def explain(value: float, plain: float, temperature: float) -> str:
    """The rest of a fault's text: what the ratio looks like."""
    square = temperature**2
    if square != 1 and value and abs(plain / value / square - 1) < 0.02:
        return f"; it lacks the factor T² = {square:g} of temperature {temperature:g}: multiply by it."
    return "; look for renormalized targets, another mask or another mean, and do not train until they agree."


def check_differences(case: Case) -> str:
    """The gradient is the slope of the loss: a step along random coordinates changes it as the gradient says."""
    m, named = case.whole, case.trainable
    gradients = case.gradients(case.compute(m, case.weights))
    generator = torch.Generator().manual_seed(0)
    step = {n: g * (torch.rand(g.shape, generator=generator) < 0.5).to(g) for n, g in gradients.items()}
    slope = sum(float((g * step[n]).double().sum()) for n, g in gradients.items())
    loss = float(case.compute(m, case.weights).detach())
    size = 2e-3 * max(abs(loss), 1e-3) / slope if slope else 0.0
    values = []
    with torch.no_grad():
        for sign in (1, -2, 1):
            for name, parameter in named.items():
                parameter += sign * size * step[name]
            values.append(float(case.compute(m, case.weights)))
    measured, predicted = values[0] - values[1], 2 * size * slope
    if not abs(measured - predicted) <= 0.05 * abs(predicted):
        raise Fault(
            f"the loss changes by {measured:.3e} along random coordinates, but its gradient says {predicted:.3e}; a "
            f"term is computed past autograd, or a gradient lacks a factor."
        )
    return f"change {measured:.4e}, gradient says {predicted:.4e}"


def check_positions(case: Case) -> str:
    """The gradient is zero at every prompt and padding position, and not at a supervised one."""
    m, seen = case.whole, {}

    def keep(module, args, kwargs, output):
        seen["states"], seen["inputs"] = output.last_hidden_state, kwargs["inputs_embeds"]
        for tensor in seen.values():
            tensor.retain_grad()

    handle = case.student.llm.base_model.register_forward_hook(keep, with_kwargs=True)
    try:
        case.compute(m, case.only("ce")).backward()
    finally:
        handle.remove()
        case.objective.zero_grad(set_to_none=True)
    is_used_BT = seen["states"].grad.abs().amax(-1) > 0
    expected_BT = torch.zeros_like(is_used_BT)
    lengths = [(row.prompt_length, len(answer_of(case.student, s))) for row, s in zip(m.batch.rows, m.batch.samples)]
    for b, (prompt, answer) in enumerate(lengths):
        expected_BT[b, prompt - 1 : prompt + answer - 1] = True
    wrong = (is_used_BT != expected_BT).nonzero().tolist()
    if wrong:
        raise Fault(
            f"{len(wrong)} positions have a gradient that should have none, or none that should (row, position: "
            f"{wrong[:3]}), but only those before an answer's token may; the mask is off: correct the collation."
        )
    padding_BT = torch.stack([torch.arange(is_used_BT.shape[1]) >= p + a for p, a in lengths])
    if bool((seen["inputs"].grad.abs().amax(-1).cpu()[padding_BT] > 0).any()):
        raise Fault("padding has a gradient, but nothing may depend on it; correct the attention mask.")
    return f"zero at {int((~expected_BT).sum())} prompt and padding positions, not at {int(expected_BT.sum())} others"


def check_splits(case: Case) -> str:
    """Any cut of the step into micro-batches, and into the shares of two ranks, gives one loss and one gradient."""
    results, case = {}, replace(case, weights=without_split(case))
    cuts = {"1": 1, "2": 2, str(len(case.samples)): len(case.samples)}
    for name, parts in cuts.items():
        results[f"{name} micro-batches"] = step_of(case, split(case.samples, parts))
    shares = [part for rank in (0, 1) for part in split(case.samples[rank::2], 2)]
    results["two ranks"] = step_of(case, shares)
    reference_name, (reference, gradients) = next(iter(results.items()))
    for name, (loss, other) in results.items():
        error = distance(other, gradients)
        if not (abs(loss - reference) <= VALUE * max(abs(reference), 1e-3) and error <= GRADIENT):
            raise Fault(
                f"the loss is {loss:.6g} with {name} but {reference:.6g} with {reference_name}, gradients differ by "
                f"{error:.1%}; a mean is taken in each part: divide each term by its count over the whole step."
            )
    return f"loss {reference:.6f} with {', '.join(results)}"


def without_split(case: Case) -> dict[str, float]:
    """The weights of the terms, without those that are said to depend on the cut."""
    return {name: 0.0 if case.terms[name].depends_on_split else case.weights[name] for name in case.terms}


def step_of(case: Case, parts: Sequence[Sequence[Sample]]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of a step that is cut in these parts; empty ones are stand-ins, as in training."""
    micro_batches = [case.collate(list(part)) for part in parts]
    counts = [count(case.terms, m) for m in micro_batches]
    totals = {name: sum(found[name] for found in counts) for name in case.terms}
    losses = [case.compute(m, case.weights, totals) for m in micro_batches]
    return float(sum(losses).detach()), case.gradients(sum(losses))


def check_zero(case: Case) -> str:
    """A student that says what the teacher says has no divergence and no gradient of it, residual mass included."""
    loss = case.loss
    logprobs_SK, residual_S = (x[:64].double() for x in case.sparse()[1:])
    outcomes_SC = torch.cat([logprobs_SK, residual_S[:, None]], 1)
    mass_S = outcomes_SC.exp().sum(1)
    if not case.is_sampled and not torch.allclose(mass_S, torch.ones_like(mass_S), atol=1e-3):
        raise Fault(
            f"the kept ids and the mass outside them sum to {float(mass_S.min()):.4f}, but must to 1; the residual is "
            f"lost or of another temperature: cache again."
        )
    num_kept = logprobs_SK.shape[1]
    ids_SK = torch.arange(num_kept, device=logprobs_SK.device).expand(len(logprobs_SK), -1)
    states_SC = (loss.temperature * outcomes_SC).clamp(min=-1e4).requires_grad_()
    head_CC, one_S = torch.eye(num_kept + 1, dtype=torch.double, device=states_SC.device), torch.ones_like(residual_S)
    value = fused_ce_kl(
        states_SC, Head(head_CC), ids_SK[:, 0], Sparse(ids_SK, logprobs_SK, residual_S), 0 * one_S, one_S,
        loss.temperature, divergence=case.objective.divergence,
    ).loss_S.sum()  # fmt: skip
    slope = torch.autograd.grad(value, states_SC)[0].abs().max()
    value = abs(float(value.detach()))
    if not (value < 1e-4 and float(slope) < 1e-4):
        raise Fault(
            f"the divergence of the teacher from itself is {value:.3g} with a slope of {float(slope):.3g}, but must be "
            f"0; the mass outside the kept ids is dropped or renormalized: keep it as one more outcome."
        )
    return f"divergence {value:.1e}, slope {float(slope):.1e}"


def is_zero_by_arithmetic(name: str, num_queries: int) -> bool:
    """Whether the scores of an attention cannot depend on a tensor, so that its gradient is zero but for rounding.

    A key's bias adds one number to all scores of a query. Where the Q-Former has one query, its self-attention weighs
    that one with 1, whatever query and key are. And to an expert of a mixture none of the tokens may have gone.
    """
    is_alone = num_queries == 1 and re.search(r"qformer.*\.attention\.attention\.(query|key)\.", name) is not None
    return name.endswith("key.bias") or is_alone or ".experts." in name


def check_gradients(case: Case) -> str:
    """LoRA, connector and perhaps Whisper are trained: each tensor has a finite gradient, not zero; no other has."""
    trained = trained_names(case.student, train_ears=trains_ears(case.student))
    for name, parameter in case.student.named_parameters():
        is_own = name in trained
        if is_own != parameter.requires_grad:
            state = "frozen" if is_own else "trained"
            raise Fault(
                f"{name} is {state}, but LoRA, connector and the routers of experts with LoRA are trained and nothing "
                f"else, or Whisper whole; set "
                f"requires_grad so before the optimizer is built."
            )
    case.compute(case.whole, case.weights).backward()
    grads = {name: p.grad for name, p in case.objective.named_parameters() if p.requires_grad or p.grad is not None}
    case.objective.zero_grad(set_to_none=True)
    for name, grad in grads.items():
        if grad is None or not bool(torch.isfinite(grad).all()):
            found = "none" if grad is None else "not finite"
            raise Fault(f"the gradient of {name} is {found}, but must be finite; find what detaches or overflows it.")
        if not bool((grad != 0).any()) and not is_zero_by_arithmetic(name, case.student.config.num_queries):
            raise Fault(f"the gradient of {name} is zero, but it is to be trained; find what detaches it.")
    return f"{len(grads)} trained tensors have one, no other"
