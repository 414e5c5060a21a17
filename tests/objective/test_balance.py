"""A mixture's routers are trained, saved and kept in balance, in 4 bits and whole; a student without any is refused."""

import dataclasses
import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from distill.config import LossConfig, TrainConfig, load_config
from distill.distiller import Distiller
from distill.doctor.doctor import build_case, run_checks
from distill.export import export, export_format
from distill.objective.module import Objective
from distill.objective.terms import TERMS
from distill.objective.terms.balance import imbalance
from distill.objective.weighing import weigh
from distill.run import run
from distill.training.microbatch import Collator
from distill.training.recompute import recompute_blocks_
from distill.training.resuming import check_changes, identify_training
from students.hearing import Connector
from students.student import build_student, load_student
from students.upcycle import upcycle
from teachers.experts import record_routers, routers_of
from teachers.lora import Lora
from teachers.online import OnlineTeacher

LORA = Lora(rank=4, targets=("q_proj", "experts"))
SAMPLES = [tiny.make_sample(1), tiny.make_sample(2, text="one two three four", seconds=1.3), tiny.make_sample(3)]
EXPERTS, TOP_K = 4, 2


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_toys(folder, teacher__online="true", precision="float32", loss__balance=0.1, loss__feature=0,
                   student__llm=folder / "parts/mixture", student__lora_targets="[q_proj,experts]")  # fmt: skip
    upcycle(str(folder / "parts/student-llm"), folder / "parts/mixture", experts=EXPERTS, top_k=TOP_K)
    return folder


def make_student(toys, *, llm="mixture", lora=LORA, quantization="none"):
    return build_student(tiny.make_teacher(toys / "parts").eval(), str(toys / "parts" / llm), lora=lora,
                         connector=Connector("new"), quantization=quantization, say=lambda text: None)  # fmt: skip


def balance_of(toys, student, *parts):
    """The term alone over micro-batches of one step, and the gradient of each trained tensor."""
    loss, terms = LossConfig(kl=0, feature=0, balance=1.0), {"balance": TERMS["balance"]}
    teacher = OnlineTeacher(tiny.make_teacher(toys / "parts").eval())
    objective, collate = (
        Objective(student, loss, torch.float32, terms, widths={}),
        Collator(teacher, student, student.device, torch.float32),
    )
    micro_batches = [collate(list(part)) for part in parts]
    total = {"balance": sum(terms["balance"].count(m) for m in micro_batches)}
    values = [objective(m, weigh(terms, m, loss, {"balance": 1.0}, total))[0] for m in micro_batches]
    named = {name: p for name, p in student.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(sum(values), list(named.values()), allow_unused=True)
    return float(sum(values).detach()), dict(zip(named, grads)), micro_batches


def test_the_imbalance_is_transformers_own_k_where_experts_are_alike_and_e_where_k_do_everything():
    torch.manual_seed(0)
    logits, mask = torch.randn(3, 7, EXPERTS), torch.ones(3, 7)
    mask[1, 4:] = 0
    found = imbalance(logits[mask.bool()], TOP_K).mean()
    theirs = load_balancing_loss_func((logits.flatten(0, 1),), EXPERTS, TOP_K, mask)
    assert float(found) == pytest.approx(float(theirs), rel=1e-6)
    assert float(imbalance(torch.zeros(5, EXPERTS), TOP_K).mean()) == pytest.approx(TOP_K)
    sure = torch.tensor([[9.0, 9.0, -9.0, -9.0]]).expand(5, -1)
    assert float(imbalance(sure, TOP_K).mean()) == pytest.approx(EXPERTS, rel=1e-6)


def test_a_router_that_follows_its_gradient_spreads_the_tokens():
    torch.manual_seed(0)
    hidden, router = torch.randn(200, 8), torch.nn.Linear(8, EXPERTS)
    router.bias.data[0] = 3.0  # nearly all go there
    optimizer = torch.optim.SGD(router.parameters(), lr=1.0)
    values = []
    for _ in range(60):
        values.append(imbalance(router(hidden), TOP_K).mean())
        optimizer.zero_grad()
        values[-1].backward()
        optimizer.step()
    assert values[0] > TOP_K + 0.5 and values[-1] < TOP_K + 0.05


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_term_is_the_layers_mean_over_all_positions_and_reaches_every_router(toys, quantization):
    student = make_student(toys, quantization=quantization).train()
    value, grads, (m,) = balance_of(toys, student, SAMPLES)
    heard = student.hear(m.batch)
    mask = m.batch.attention_mask_BT
    output = student.llm(
        inputs_embeds=student.embed(m.batch, heard), attention_mask=mask, output_router_logits=True, use_cache=False
    )
    theirs = [load_balancing_loss_func((logits,), EXPERTS, TOP_K, mask) for logits in output.router_logits]
    assert value == pytest.approx(float(sum(theirs).detach()) / len(theirs), rel=1e-5)
    routers = [f"llm.{name}.weight" for name in routers_of(student.llm)]
    assert len(routers) == len(theirs) and all(bool((grads[name] != 0).any()) for name in routers)


def test_an_expert_without_a_token_has_a_gradient_of_zeros_and_not_none(toys):
    student = make_student(toys, quantization="nf4").train()
    (router,) = routers_of(student.llm).values()
    router.weight.data = torch.zeros_like(router.weight)  # the same two of all ties
    with record_routers(student.llm) as routing:
        student(student.collate(SAMPLES))[0].sum().backward()
    called = set(routing[0].softmax(-1).topk(TOP_K).indices.unique().tolist())
    grads = {name: p.grad for name, p in student.named_parameters() if ".experts.up." in name and "lora_B" in name}
    assert len(called) == TOP_K and len(grads) == EXPERTS and all(grad is not None for grad in grads.values())
    assert {int(name.split(".")[-4]) for name, grad in grads.items() if bool(grad.any())} == called


def test_blocks_that_run_again_have_the_same_value_and_gradient(toys):
    student = make_student(toys, quantization="nf4").train()
    value, grads, _ = balance_of(toys, student, SAMPLES)
    recompute_blocks_(student)
    again, others, _ = balance_of(toys, student, SAMPLES)
    assert again == value
    assert all(grads[n] is None if g is None else torch.equal(g, grads[n]) for n, g in others.items())


def test_a_step_in_two_micro_batches_is_their_mean_by_positions(toys):
    student = make_student(toys).train()
    parts = SAMPLES[:2], SAMPLES[2:]
    value, _, (one, two) = balance_of(toys, student, *parts)
    counts = [int(m.batch.attention_mask_BT.sum()) for m in (one, two)]
    alone = [balance_of(toys, student, part)[0] for part in parts]
    assert value == pytest.approx(sum(c * v for c, v in zip(counts, alone)) / sum(counts), rel=1e-6)


def test_a_run_trains_the_routers_with_the_experts_and_the_folder_holds_both(toys, tmp_path):
    config = load_config(toys / "toy.yaml", [f"runs={tmp_path}", "train.micro_batch_size=2"])
    run(config)
    lines = [json.loads(line) for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["balance"] > 0 and line["loss"] == pytest.approx(line["ce"] + line["kl"] + line["balance"])
               for line in lines if "balance" in line)  # fmt: skip
    kept = load_file(config.run_folder / "student" / "model.safetensors")
    start = make_student(toys, quantization="nf4").state_dict()
    router = "llm.model.layers.0.mlp.gate.weight"
    assert not torch.equal(kept[router], start[router]) and kept[router].dtype == torch.float32
    assert sum(".experts.up." in name for name in kept) == 2 * EXPERTS
    student = load_student(config.run_folder / "student")
    assert torch.equal(student.state_dict()[router], kept[router])
    with torch.no_grad():
        logits = student(student.collate(SAMPLES))[0]
        merged = load_student(export(config.run_folder, tmp_path / "merged", merge=True))
        torch.testing.assert_close(merged(merged.collate(SAMPLES))[0], logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"llm is a MixtralForCausalLM, but a \*-bnb-4bit folder has no form for its"):
        export_format(config.run_folder, tmp_path / "bnb", "bnb")
    assert not (tmp_path / "bnb").exists()
    on = Distiller(toys / "teacher", config.run_folder / "student", train=toys / "data" / "train", run=tmp_path / "on")
    assert router in on.named  # a saved student's routers go on


def test_doctor_finds_the_mixture_right(toys):
    found = run_checks(build_case(load_config(toys / "toy.yaml")), ["splits", "gradients", "positions"])
    assert [(name, is_right) for name, is_right, text in found] == [
        ("splits", True), ("gradients", True), ("positions", True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("llm", "targets", "message"),
    [
        ("student-llm", ("q_proj",), "this student's LLM, a LlamaForCausalLM, has no routers that could be balanced; "),
        ("mixture", ("q_proj",), "this student's routers are frozen; add experts to student.lora_targets"),
    ],
)
def test_a_student_without_trained_routers_is_refused(toys, tmp_path, llm, targets, message):
    student = make_student(toys, llm=llm, lora=dataclasses.replace(LORA, targets=targets))
    with pytest.raises(ValueError, match=message):
        Distiller(toys / "teacher", student, train=toys / "data" / "train", loss=LossConfig(balance=0.1),
                  run=tmp_path / "run")  # fmt: skip


def test_a_config_whose_routers_are_frozen_is_refused_before_anything_is_loaded(toys):
    with pytest.raises(ValueError, match=r"loss\.balance is 0\.1, but student\.lora_targets has no experts"):
        load_config(toys / "toy.yaml", ["student.lora_targets=[q_proj]"])


def test_a_run_of_before_there_was_such_a_term_goes_on(tmp_path):
    here = {"loss": dataclasses.asdict(LossConfig()), **identify_training(TrainConfig())}
    there = here | {"loss": {name: value for name, value in here["loss"].items() if name != "balance"}}
    where = {"checkpoint": tmp_path, "done": 1, "options": TrainConfig(), "has_schedules": False, "say": print}
    check_changes(there, here, **where)
    with pytest.raises(ValueError, match=r"loss\.balance: 0\.0 there, 0\.1 here"):
        check_changes(there, here | {"loss": here["loss"] | {"balance": 0.1}}, **where)


def test_a_llm_without_experts_has_no_such_target(toys):
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no layer named \['experts'\]"):
        make_student(toys, llm="student-llm")
