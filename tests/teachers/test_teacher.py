"""The protocol of a teacher: what implements it can be learned from, and nothing asks which of them it has."""

import ast
import dataclasses
from pathlib import Path

import pytest
import tiny
import torch

from distill import Distiller, LossConfig, Run, TeacherConfig, TrainConfig
from distill.training.microbatch import Collator
from distill.training.resuming import compare
from shards.targets.distributions import Distribution
from students import build_student
from teachers import Lora, OnlineTeacher, Targets, Teacher, Vocabulary, load_salmonn
from teachers.ears.precision import set_ear_precision_
from teachers.teacher import NoTeacher

ROOT = Path(__file__).parents[2]
PRODUCT = [path for package in ("shards", "teachers", "students", "distill") for path in (ROOT / package).rglob("*.py")]
KINDS = {"CachedTeacher", "CrossTeacher", "CrossedTargets", "NoTeacher", "OnlineTeacher"}
CLIPS = [{"audio": tiny.tone(n), "text": "one two"} for n in range(4)]


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    tiny.make_parts(folder / "parts")
    tiny.save_teacher(folder / "parts", folder / "teacher")
    return folder


@pytest.fixture
def student(toys):
    return build_student(load_salmonn(toys / "teacher"), str(toys / "parts" / "student-llm"), lora=Lora(rank=4),
                         quantization="none")  # fmt: skip


class Sure(Teacher):
    """Says that every label is certain; it has no model, no cache and no answer of its own."""

    def __init__(self, student):
        self.student = student

    @property
    def identity(self):
        return {"sure": 1}

    @property
    def vocab(self):
        return Vocabulary.of(self.student.tokenizer)

    @property
    def rows(self):
        return self.student.rows

    def label(self, samples):
        return samples, [False] * len(samples)

    def targets(self, batch, frames=None):
        logits_SV = torch.full((len(batch.labels_S), self.vocab.size), -50.0)
        logits_SV.scatter_(1, batch.labels_S[:, None], 0.0)
        return Targets(
            Distribution.from_logits(logits_SV), None, [], logits_SV.gather(1, batch.labels_S[:, None])[:, 0]
        )


def test_a_toy_of_the_protocol_teaches_and_its_certainty_is_the_cross_entropy(student, tmp_path):
    run = Distiller(Sure(student), student, train=CLIPS, loss=LossConfig(feature=0), run=tmp_path,
                    options=TrainConfig(steps=2, batch_size=4, trackers=()))  # fmt: skip
    first = run.fit().metrics[0]
    assert first["kl"] == pytest.approx(first["ce"], rel=1e-4) and first["kl"] > 1
    assert run.identity["targets"] == {"sure": 1}


CHANGED = {
    "ears": lambda model: set_ear_precision_(model.whisper, "bf16"),
    "teacher_config.template": lambda model: change(model, template="Q: {}"),
    "teacher_config.front_end": lambda model: change(model, second="beats", second_kind="beats", front_end="shared"),
    "dtype": lambda model: model.llm.to(torch.bfloat16),
    "ends.stops": lambda model: setattr(model.llm.generation_config, "eos_token_id", 7),
    "teacher_weights.own": lambda model: model.project.weight.data.add_(1),
}


def change(model, **settings):
    model.config = dataclasses.replace(model.config, **settings)


@pytest.mark.parametrize("field", CHANGED)
def test_a_model_that_would_say_something_else_is_another_teacher(toys, field):
    before = OnlineTeacher(load_salmonn(toys / "teacher")).identity
    model = load_salmonn(toys / "teacher")
    assert OnlineTeacher(model).identity == before
    CHANGED[field](model)
    assert field in dict(compare(before, OnlineTeacher(model).identity))


def test_a_run_goes_on_with_its_teachers_ears_and_its_precision_alone(toys, student, tmp_path):
    options = TrainConfig(steps=1, batch_size=4, trackers=())

    def begin(teacher, student, precision):
        return Distiller(teacher, student, train=CLIPS, run=Run(tmp_path, precision=precision), options=options)

    begin(toys / "teacher", student, precision="float32").fit()
    other = TeacherConfig(path=str(toys / "teacher"), ears="bf16")
    with pytest.raises(ValueError, match=r"settings \(targets\.ears: float32 there, bf16 here\)"):
        begin(other, student, precision="float32")
    with pytest.raises(ValueError, match=r"precision: float32 there, bfloat16 here"):
        begin(toys / "teacher", student, precision="bf16")


def test_a_teacher_that_lacks_a_part_of_the_protocol_cannot_be_made():
    class Speechless(Teacher):
        vocab = rows = identity = None

        def label(self, samples):
            return samples, []

    with pytest.raises(TypeError, match=r"abstract method '?targets"):
        Speechless()


def test_what_is_no_teacher_is_refused_with_what_may_be_given(student, tmp_path):
    with pytest.raises(ValueError, match=r"teacher is a int, but must be a model, a path, .* or None; give one"):
        Distiller(3, student, train=CLIPS, run=tmp_path)


def test_no_teacher_leaves_the_labels_alone_to_be_learned(student):
    samples = [tiny.make_sample(n) for n in range(2)]
    m = Collator(NoTeacher(), student, torch.device("cpu"), torch.float32)(samples)
    assert m.targets is None and m.frames is None and m.is_pseudo == [False, False]
    assert [sample.text for sample in m.batch.samples] == ["one two", "one two"]


def asks_for_a_kind(node: ast.AST) -> bool:
    """Whether a call asks which teacher there is: its class, or whether it has a part of the protocol."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        return False
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} | {
        n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)
    }
    if node.func.id == "isinstance":
        return bool(names & KINDS)
    about = ast.unparse(node.args[0]).split(".")[-1] if node.args else ""
    return node.func.id in ("getattr", "hasattr") and about == "teacher" and isinstance(node.args[1], ast.Constant)


@pytest.mark.parametrize(
    "code", ["getattr(self.teacher, 'model', None)", "hasattr(teacher, 'rows')", "isinstance(x, a | OnlineTeacher)"]
)
def test_the_rule_below_sees_the_three_ways_to_ask(code):
    assert any(map(asks_for_a_kind, ast.walk(ast.parse(code))))


def test_no_product_code_asks_which_kind_of_teacher_it_has():
    asking = {str(path.relative_to(ROOT)): [node.lineno for node in ast.walk(ast.parse(path.read_text()))
                                            if asks_for_a_kind(node)] for path in PRODUCT}  # fmt: skip
    assert len(asking) > 100 and {path: lines for path, lines in asking.items() if lines} == {}
