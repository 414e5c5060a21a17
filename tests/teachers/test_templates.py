"""A prompt's form: the LLM's chat as its tokenizer writes it, an answer's space its own, targets that fit both."""

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import teachers.words.rows as rows_of_words
from distill.cache import cache
from distill.config import load_config
from distill.run import run
from distill.teach import build_teacher, save_teacher
from distill.teacher import load_teacher
from distill.training.monitoring.runlog import read_table
from teachers.files.loading import read_config
from teachers.words.ending import read_answer
from teachers.words.prompts import Prompts
from teachers.words.rows import RowTokenizer
from teachers.words.templates import SALMONN_TEMPLATE, TODAY, read_chat

CONTROLS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
BRACKETS = (
    "{{ date_string }} {% for m in messages %}[{{ m.role }}] {{ m.content }}{% if m.role == 'assistant' %}"
    "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def bytewise(chat: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer such as SmolLM2's, Qwen's or Llama 3's."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=CONTROLS, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    inner.train_from_iterator(["four seven seven four Transcribe this."] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=CONTROLS[1], eos_token=CONTROLS[0])
    tokenizer.chat_template = chat
    return tokenizer


def rows_in(tokenizer, template: str, end: str = "", bos: str = "") -> RowTokenizer:
    return RowTokenizer(tokenizer, Prompts({"asr": ("<SpeechHere>Transcribe this.",)}, template), end, 300, bos)


def test_a_row_in_chat_form_is_what_the_chat_template_writes_turn_ends_included():
    tokenizer = bytewise()
    form = read_chat(tokenizer)
    rows = rows_in(tokenizer, form["template"], form["end_token"], form["bos_token"])
    row = rows.row(tiny.make_sample(text="four seven"), with_answer=True, first_prompt=True)
    turns = [{"role": "user", "content": "Transcribe this."}, {"role": "assistant", "content": "four seven"}]
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    assert row.before + row.after + row.answer == whole[: whole.index(2, whole.index(2) + 1) + 1]  # to the second end
    assert row.answer[-1] == 2 and row.before[0] == 1 and row.before.count(1) == 1


def test_a_prompts_ids_are_kept_for_the_next_row_and_forgotten_with_the_tokenizer(monkeypatch):
    monkeypatch.setattr(rows_of_words, "KEPT_TEXTS", 3)
    tokenizer = bytewise()
    rows = rows_in(tokenizer, SALMONN_TEMPLATE)
    first = rows.row(tiny.make_sample(text="four"), with_answer=True, first_prompt=True)
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "encode", lambda self, text, **options: [999])
        again = rows.row(tiny.make_sample(text="four"), with_answer=True, first_prompt=True)
        assert (again.before, again.after, again.answer[0]) == (first.before, first.after, 999)
        rows.tokenizer = bytewise()
        assert rows.encode("Transcribe this.") == [999]
    for word in ("four", "seven", "this", "Transcribe this."):  # one more than are kept
        assert rows.encode(word) != [] and rows.encode(word) is not rows.encode(word)
    assert rows.encode("seven") == rows.tokenizer.encode("seven", add_special_tokens=False)


def test_a_chat_that_writes_no_bos_gets_none_and_names_the_same_date_every_day():
    form = read_chat(bytewise(BRACKETS))
    assert form == {"template": f"{TODAY} [user] {{}}[assistant]", "end_token": CONTROLS[0], "bos_token": "none"}


def test_a_space_at_the_templates_end_is_the_answers_and_sentencepiece_writes_it_itself():
    tokenizer = bytewise()
    rows = rows_in(tokenizer, "Q: {}\nA: ")
    row = rows.row(tiny.make_sample(text="four seven"), with_answer=True, first_prompt=True)
    assert row.answer == [*tokenizer.encode(" four seven"), tokenizer.eos_token_id]
    assert tokenizer.decode(row.after).endswith("\nA:")
    assert read_answer(tokenizer, row.answer, [[tokenizer.eos_token_id]]) == "four seven"
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner.train_from_iterator(["four seven"] * 9, trainers.BpeTrainer(special_tokens=["<unk>", "</s>"]))
    pieces = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    plain, spaced = (rows_in(pieces, template) for template in ("Q: {}\nA:", "Q: {}\nA: "))
    assert plain.answer_ids("four seven") == spaced.answer_ids("four seven")


def test_a_template_without_a_place_and_a_chat_that_there_is_not_are_refused():
    for field in ("teacher.template", "student.template"):
        with pytest.raises(ValueError, match=rf"{field} is 'USER:', but the prompt with its audio goes"):
            load_config("configs/fsdd.yaml", [f"{field}='USER:'", "scratch.steps=0"])
    with pytest.raises(ValueError, match="has no chat_template; give a text"):
        read_chat(bytewise(None))
    with pytest.raises(ValueError, match="has no place for the prompt"):
        read_chat(bytewise("hello"))


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Parts whose LLMs have a chat form, and a teacher in SALMONN's."""
    folder = tmp_path_factory.mktemp("templates")
    config = tiny.make_toys(folder)
    for name in ("llm", "student-llm"):
        tokenizer = AutoTokenizer.from_pretrained(folder / "parts" / name)
        tokenizer.chat_template = BRACKETS
        tokenizer.save_pretrained(folder / "parts" / name)
    return config


def losses(config) -> list[float]:
    return [record["loss"] for record in read_table(config.run_folder, config.train.steps)]


def test_a_student_that_is_asked_in_another_form_learns_the_same_from_a_cache_as_online(toys):
    words = ["student.template='Q {} A:'", "loss.feature=0", "cache.codec=dense"]
    cached = load_config(toys, ["name=cached", *words])
    online = load_config(toys, ["name=online", "teacher.online=true", *words])
    assert cache(cached) == 0 and run(cached) == 0 and run(online) == 0
    assert losses(cached) == pytest.approx(losses(online), abs=2e-3)
    assert read_config(cached.run_folder / "student")["model"].template == "Q {} A:"
    assert read_config(toys.parent / "teacher")["model"].template == SALMONN_TEMPLATE


def test_a_student_in_its_own_chat_ends_as_its_turns_do(toys):
    config = load_config(toys, ["name=chat", "student.template=chat", "teacher.online=true", "train.steps=1"])
    assert run(config) == 0
    saved = read_config(config.run_folder / "student")["model"]
    assert (saved.template, saved.end_token) == (f"{TODAY} [user] {{}}[assistant]", "</s>")


def test_a_teacher_in_chat_form_is_saved_with_its_text_and_known_by_it(toys):
    parts = toys.parent / "parts"
    words = [
        "teacher.path=''",
        f"teacher.llm={parts}/llm",
        f"teacher.whisper={parts}/whisper",
        "teach.qformer_width=64",
    ]
    config = load_config(toys, ["name=chatty", *words, "teacher.template=chat"])
    folder = save_teacher(build_teacher(config), config)
    assert read_config(folder)["model"].template == f"{TODAY} [user] {{}}[assistant]"
    load_teacher(load_config(toys, [f"teacher.path={folder}", "teacher.template=chat"]))
    config = load_config(toys, ["name=plain", *words])
    plain = save_teacher(build_teacher(config), config)
    for template, message in {
        "chat": "is 'chat', here .*, but .* was saved with 'USER",
        "'{}'": "is '{}', but .* was",
    }.items():
        with pytest.raises(ValueError, match=f"teacher.template {message}"):
            load_teacher(load_config(toys, [f"teacher.path={plain}", f"teacher.template={template}"]))
