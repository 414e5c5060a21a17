"""The form that a prompt is put in: SALMONN's, the LLM's own chat, or a text. Knows no prompt, and imports no torch.

A text holds `{}` where the prompt with its audio goes. Where it ends with a space, that is the answer's: byte-level
tokenizers learned words with the space before them, so it is tokenized with the answer, and stays out of the prompt.
"""

SALMONN_TEMPLATE = "USER: {}\nASSISTANT:"
CHAT = "chat"  # instead of a text: the tokenizer's chat_template says it
PROMPT, ANSWER = "⁂prompt⁂", "⁂answer⁂"  # what no chat template spells, for finding where they go
TODAY = "26 Jul 2024"  # the date that Llama's chat names where no clock is asked: a prompt is the same every day
NO_BOS = "none"  # as text of the token that begins a row: nothing does


def check_template(name: str, template: str) -> None:
    """Refuse a template that has no place for the prompt and its audio.

    Raises:
        ValueError: naming the field.
    """
    if template not in ("", CHAT) and template.count("{}") != 1:
        raise ValueError(
            f"{name} is {template!r}, but the prompt with its audio goes where {{}} stands, exactly once; write it, or "
            f"{CHAT!r} for the LLM's own form."
        )


def read_chat(tokenizer) -> dict[str, str]:
    """The chat form of a tokenizer as a model's config has it: `template`, `end_token` (of a turn) and `bos_token`.

    Raises:
        ValueError: it has no chat template, or one without a place for the user's or the assistant's words.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"template is {CHAT!r}, but the tokenizer of {tokenizer.name_or_path} has no chat_template; give a text "
            f"with {{}}, or choose an instruction-tuned LLM."
        )
    user, assistant = {"role": "user", "content": PROMPT}, {"role": "assistant", "content": ANSWER}
    options = {"tokenize": False, "date_string": TODAY}
    asked = tokenizer.apply_chat_template([user], add_generation_prompt=True, **options)
    answered = tokenizer.apply_chat_template([user, assistant], **options)
    if asked.count(PROMPT) != 1 or answered.count(ANSWER) != 1 or "{}" in asked:
        raise ValueError(
            f"template is {CHAT!r}, but the chat_template of {tokenizer.name_or_path} gives {asked!r}, which has no "
            f"place for the prompt; give a text with {{}}."
        )
    bos = tokenizer.bos_token
    return {
        "template": asked.replace(PROMPT, "{}"),
        "end_token": answered.partition(ANSWER)[2].strip(),
        "bos_token": NO_BOS if bos and not asked.startswith(bos) else "",
    }


def owns_space(template: str, tokenizer) -> bool:
    """Whether an answer begins with the space that its template ends with; sentencepiece puts one there itself."""
    if not template.endswith(" "):
        return False
    first = tokenizer.convert_ids_to_tokens(tokenizer.encode("a", add_special_tokens=False))[0]
    return not first.startswith("▁")
