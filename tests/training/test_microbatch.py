"""Micro-batches: an online teacher computes in the precision of the caching job."""

import numpy as np
import pytest
import tiny
import torch

from distill.caching.capture import Capturer
from distill.config import load_config
from distill.training.microbatch import Collator
from students.student import build_student
from teachers.files.loading import load_salmonn
from teachers.lora import Lora
from teachers.online import OnlineTeacher


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_toys(folder, precision="bf16")
    return folder


@pytest.mark.parametrize("shares_ears", [True, False])
def test_an_online_teacher_says_in_bf16_what_the_caching_job_writes(toys, shares_ears):
    model = load_salmonn(toys / "teacher", dtype=torch.bfloat16)
    heard_with = model if shares_ears else load_salmonn(toys / "teacher", dtype=torch.bfloat16)
    student = build_student(heard_with, str(toys / "parts" / "student-llm"), lora=Lora(rank=4), dtype=torch.bfloat16)
    samples = [tiny.make_sample(number) for number in range(3)]
    teacher = OnlineTeacher(model)
    records = Capturer(teacher, load_config(toys / "toy.yaml"))(samples)
    collate = Collator(teacher, student, torch.device("cpu"), torch.bfloat16)
    assert collate.shares_ears == shares_ears
    online = collate(samples).targets
    cached_S = np.concatenate([records[sample.key].label_logprobs_S for sample in samples])
    torch.testing.assert_close(online.label_logprobs_S, torch.from_numpy(cached_S), rtol=0, atol=1e-6)


def test_frozen_ears_are_as_narrow_as_the_llm_and_give_float32_frames(toys):
    narrow, wide = (load_salmonn(toys / "teacher", dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    assert {p.dtype for p in narrow.whisper.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in narrow.qformer.parameters()} == {torch.float32}
    batch = wide.collate([tiny.make_sample(number) for number in range(2)])
    for own, exact in zip(narrow.frames(batch.waveforms_BN, batch.num_samples_B),
                          wide.frames(batch.waveforms_BN, batch.num_samples_B)):  # fmt: skip
        assert own.dtype == torch.float32
        assert (own - exact).norm() < 2e-2 * exact.norm()
