"""What is logged of a step: right, the same however it is split, and without waiting for a micro-batch."""

import dataclasses
import json
import traceback

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distill.config import LossConfig, TrainConfig
from distill.distiller import Distiller
from distill.sizes.cards import find_card
from distill.training.monitoring.mfu import Utilization, count_passed_weights
from distill.training.monitoring.steplog import StepLog, rates
from shards.packing.pack import pack
from students.student import build_student
from teachers.files.loading import load_salmonn
from teachers.lora import Lora
from teachers.online import OnlineTeacher

OPTIONS = TrainConfig(steps=2, batch_size=4, micro_batch_size=4, learning_rate=2e-3, warmup_steps=0, save_every=100,
                      trackers=())  # fmt: skip


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_toys(folder)
    rows = [{"path": str(folder / "data" / "audio" / f"train-{number:03d}.wav"), "text": " ".join(tiny.WORDS[:number]),
             "task": ("asr", "audiocaption")[number % 2]} for number in range(1, 5)]  # fmt: skip
    (folder / "two.json").write_text(json.dumps({"annotation": rows}))
    pack(folder / "two.json", folder / "two", workers=1)
    return folder


def make_run(toys, run_folder, data="two", twin=False, **changes) -> Distiller:
    """A run on four clips of two tasks; `twin`: the student is its teacher."""
    model = load_salmonn(toys / "teacher")
    student = load_salmonn(toys / "teacher")
    if twin:
        student.project.requires_grad_(True)
    else:
        student = build_student(model, str(toys / "parts" / "student-llm"), lora=Lora(rank=4), quantization="none")
    data = toys / data if data == "two" else toys / "data" / data
    return Distiller(OnlineTeacher(model), student, train=data, run=run_folder, loss=LossConfig(ce=0.5),
                     options=dataclasses.replace(OPTIONS, **changes))  # fmt: skip


def test_a_tasks_loss_is_that_of_its_clips_alone_however_the_step_is_split(toys, tmp_path):
    whole, split = (make_run(toys, tmp_path / str(size), micro_batch_size=size).fit().metrics for size in (4, 1))
    for record, other in zip(whole, split):
        for task in ("asr", "audiocaption"):
            assert record[f"loss/{task}"] == pytest.approx(other[f"loss/{task}"], abs=1e-5)
    run = make_run(toys, tmp_path / "alone", steps=1)
    samples = next(iter(run.stream))
    for task in ("asr", "audiocaption"):
        own = [sample for sample in samples if sample.task == task]
        alone = make_run(toys, tmp_path / task, steps=1)
        alone._prepare()
        assert alone._step(0, iter([own])).record["loss"] == pytest.approx(whole[0][f"loss/{task}"], abs=1e-5)


def test_a_student_that_is_its_teacher_agrees_everywhere_and_another_one_less(toys, tmp_path):
    (record,) = make_run(toys, tmp_path / "twin", twin=True, steps=1).fit().metrics
    assert record["agreement"] == 1.0
    (record,) = make_run(toys, tmp_path / "other", steps=1).fit().metrics
    assert 0 <= record["agreement"] < 1


def test_a_run_of_one_task_tells_no_tasks_apart(toys, tmp_path):
    (record,) = make_run(toys, tmp_path, data="train", steps=1).fit().metrics
    assert not [name for name in record if name.startswith("loss/")]


class Reads(TorchDispatchMode):
    """Where numbers of a device are waited for, transformers' own look at a mask of padding apart."""

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            files = [frame.filename for frame in traceback.extract_stack()]
            self.places += [files] if not any("transformers" in file for file in files) else []
        return function(*args, **kwargs or {})


def test_no_figure_is_read_of_a_micro_batch(toys, tmp_path):
    run = make_run(toys, tmp_path, micro_batch_size=2)
    run._prepare()
    samples = next(iter(run.stream))
    run.update.begin(run.optimizer, 0)
    micro_batches = [run.collator(samples[:2]), run.collator(samples[2:])]
    weights, totals = dict.fromkeys(run.terms, 1.0), dict.fromkeys(run.terms, 10.0)
    log = StepLog(run.terms, run.stream.tasks)
    with Reads() as reads:
        run._forward_backward(micro_batches, weights, totals, log)
        assert reads.places == []
        assert log.read()["ce"] > 0
        float(run.student.project.weight.detach().sum())
        assert len(reads.places) == 1  # it would have been seen


def test_rates_are_those_of_all_ranks_and_waiting_is_their_mean():
    totals = {"tokens": 300, "audio_seconds": 120.0, "waited": 1.0}
    assert rates(totals, 2.0, 2) == {"seconds": 2.0, "tokens_per_second": 150.0, "audio_hours_per_hour": 60.0,
                                     "waiting": 0.25}  # fmt: skip


def test_utilization_is_the_flops_of_all_tokens_by_those_of_all_cards(toys):
    llm = load_salmonn(toys / "teacher").llm
    told = Utilization(llm, torch.device("cpu"))
    assert told(1000.0, 2) == {}  # a processor's rate is not known
    told.card = find_card("NVIDIA H100 80GB HBM3")
    assert told(1e9, 2) == {"mfu": pytest.approx(4 * count_passed_weights(llm) * 1e9 / (2 * 989e12))}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_token_passes_every_matrix_between_embeddings_and_head_and_loras(toys, quantization):
    llm = str(toys / "parts" / "student-llm")
    student = build_student(load_salmonn(toys / "teacher"), llm, lora=Lora(rank=4), quantization=quantization).llm
    sizes = student.config
    attention = 2 * sizes.hidden_size * sizes.head_dim * (sizes.num_attention_heads + sizes.num_key_value_heads)
    layer = attention + 3 * sizes.hidden_size * sizes.intermediate_size
    trained = sum(p.numel() for name, p in student.named_parameters() if "lora_" in name)
    assert count_passed_weights(student) == sizes.num_hidden_layers * layer + trained


def test_no_utilization_is_told_of_a_mixture(toys):
    llm = load_salmonn(toys / "teacher").llm
    llm.config.num_experts_per_tok = 2
    assert count_passed_weights(llm) is None


def test_tokens_are_those_of_prompt_audio_and_answer_without_padding(toys, tmp_path):
    run = make_run(toys, tmp_path, steps=1)
    batch = run.student.collate(next(iter(run.stream)))
    assert sum(row.num_tokens for row in batch.rows) == int(batch.attention_mask_BT.sum())
    (record,) = run.fit().metrics
    assert record["tokens_per_second"] * record["seconds"] == pytest.approx(int(batch.attention_mask_BT.sum()))
    assert 0 <= record["waiting"] < 1
