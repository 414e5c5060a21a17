"""What is taken out of texts before they are compared, and what never is."""

import pytest

from distill.evaluation.metrics.normalization import is_latin, normalize_answer, normalize_text, split_caption


@pytest.mark.parametrize(
    "text, english, basic",
    [
        ("Four, seven.", "47", "four seven"),
        ("It's the COLOUR, isn't it?", "it is the color is not it", "it s the colour isn t it"),
        ("uh twenty one dollars", "$21", "uh twenty one dollars"),
        ("[laughter] yes (well) ok", "yes ok", "yes ok"),
        ("co\u00adoperate now…", "cooperate now", "cooperate now"),
    ],
)
def test_english_rules_join_digits_and_the_basic_ones_do_not(text, english, basic):
    assert normalize_text(text) == english
    assert normalize_text(text, english=False) == basic


@pytest.mark.parametrize("text", ["हिन्दी में", "தமிழ்", "ไทยที่", "مُحَمَّد", "שָׁלוֹם", "বাংলা", "tiếng việt", "größe", "日本語"])
def test_letters_keep_their_marks_where_the_rules_are_not_english(text):
    assert normalize_text(text, english=False) == text.casefold()


@pytest.mark.parametrize(
    "text, other",
    [
        ("it’s", "it's"),
        ("it`s", "it's"),
        ("ｉｔ’ｓ", "it's"),
        ("cafe\u0301", "café"),
        ("می\u200cخواهم", "میخواهم"),
        ("ΟΔΟΣ", "οδος"),
        ("ﬁne", "fine"),
        ("yes。", "yes"),
        ("❤\ufe0f love", "love"),
    ],
)
def test_two_ways_to_write_a_word_are_one(text, other):
    assert normalize_text(text, english=False) == normalize_text(other, english=False)


def test_latin_letters_are_told_from_others():
    assert is_latin(["tiếng việt 12", "hi"]) and is_latin(["12"]) and not is_latin(["नमस्ते", "a"])


SAME = [
    ("yes", "Yes."), ("four", " four "), ("−5", "-5"), ("–5", "-5"), ("(a)", "A)"), ("[laughter]", "laughter"),
    ("<noise>", "Noise"), ("कि", "कि।"), ("twenty-one", "twenty one"), ('"yes"', "yes"), ("'5'", "5"), ("¿Sí?", "sí"),
    ("「はい」", "はい"), ("yes —", "yes"), ("one, two", "one two"), ("ｈｉ１", "hi1"), ("Straße", "STRASSE"),
    ("-", "–"), ("U.S.", "u.s"),
]  # fmt: skip
OTHER = [
    ("-5", "5"), ("- 5", "5"), (".5", "5"), ("3.5", "35"), ("3.5", "3 5"), ("5:30", "530"), ("5-3", "53"),
    ("50%", "50"), ("$5", "5"), ("C#", "C"), ("C++", "C"), ("B-", "B"), ("B-", "B+"), ("+", "-"),
    ("<", ">"), ("?", "!"), ("...", ""), ("()", "[]"), ("[]", ""), ("(a)", "(b)"), ("[laughter]", "[music]"),
    ("a", "the"), ("a", ""), ("its", "it's"),
    ("x²", "x2"), ("cafe", "café"), ("कि", "की"), ("A/B", "AB"), ("5'", '5"'), ("&", "and"), ("#1", "1"),
    ("no", "no, not"), ("°", ""), ("♭", "♮"),
]  # fmt: skip


@pytest.mark.parametrize("text, other", SAME)
def test_answers_that_differ_in_case_quotes_or_sentence_signs_are_one(text, other):
    assert normalize_answer(text) == normalize_answer(other) != ""


@pytest.mark.parametrize("text, other", OTHER)
def test_answers_that_say_something_else_stay_apart(text, other):
    assert normalize_answer(text) != normalize_answer(other)


# What Stanford's PTBTokenizer 3.4.1 makes of them, lower-cased, without the punctuation that pycocoevalcap 1.2 drops.
TREEBANK = {
    "A high-pitched tone, then a dog's bark and 3.5 seconds of rain.":
        "a high-pitched tone then a dog 's bark and 3.5 seconds of rain",
    "It isn't raining; they can't stop. I cannot hear": "it is n't raining they ca n't stop i can not hear",
    "The 10,000 birds' wings & a 50% increase/decrease at 5:30 p.m.":
        "the 10,000 birds wings & a 50 % increase/decrease at 5:30 p.m.",
    "A man says 'hello' -- then leaves... e.g. the U.S. army": "a man says hello then leaves e.g. the u.s. army",
    "A T-shirt_bag * star # 5 $5 #1 a/b what's who'll we're gonna wanna I'm":
        "a t-shirt_bag * star # 5 $ 5 # 1 a/b what 's who 'll we 're gon na wan na i 'm",
    "naïve café — the “quoted” words’ end it’s John’s don’t": "naïve café the quoted words end it 's john 's do n't",
}  # fmt: skip


@pytest.mark.parametrize("caption", TREEBANK)
def test_captions_are_cut_as_the_coco_tools_cut_them(caption):
    assert " ".join(split_caption(caption)) == TREEBANK[caption]


def test_a_caption_of_another_script_is_cut_at_its_spaces():
    assert split_caption("एक कुत्ता भौंकता है।") == ("एक", "कुत्ता", "भौंकता", "है")
