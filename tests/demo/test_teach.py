"""The demo's teacher: made of the parts that its own settings ask for."""

import tiny

from distill.config import load_config
from distill.teach import has_parts, make_parts, mark_of, teach, write_mark
from distill.training.ranks import build_accelerator
from teachers.files.loading import load_salmonn

SIZES = {"steps": 1, "ear_steps": 1, "text_steps": 1, "batch_size": 4, "vocab_size": 400, "ear_width": 32,
         "ear_layers": 1, "llm_layers": 1, "student_layers": 1, "student_width": 32, "qformer_width": 32}  # fmt: skip


def test_a_teacher_is_never_made_of_parts_that_other_settings_left(tmp_path, capsys):
    tiny.make_shards(tmp_path / "data", num_samples=4)
    path = tiny.write_config(tmp_path / "toy.yaml", tmp_path / "data", "", tmp_path, teacher__path="''",
                             corpus__train=tmp_path / "data" / "train.json", student__llm="''",
                             **{f"scratch__{name}": value for name, value in SIZES.items()})  # fmt: skip
    wide, narrow = (load_config(path, [f"scratch.llm_width={width}"]) for width in (96, 64))
    folder, marks = wide.run_folder / "scratch", [mark_of(config) for config in (wide, narrow)]
    make_parts(wide, folder, build_accelerator())  # and then the job is killed, and its settings are changed
    write_mark(folder / "parts.json", marks[0])
    assert has_parts(folder, marks[0])
    assert teach(narrow) == 0
    assert "scratch is unfinished or of other settings, made anew" in capsys.readouterr().err
    assert load_salmonn(folder / "teacher").llm.config.hidden_size == 64
    assert has_parts(folder, marks[1])
