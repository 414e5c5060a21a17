import math
from dataclasses import replace

import pytest

from distill.evaluation.metrics.captions import bleu_4, cider_d, rouge_l
from distill.evaluation.metrics.metric import Prediction
from distill.evaluation.metrics.scores import (
    Difference,
    is_above_chance,
    name_metric,
    paired_difference,
    retained_quality,
    score,
    scored_tasks,
)


def asr(*pairs, task="asr"):
    return [Prediction(f"clip{i}", task, "synth", (right,), heard) for i, (right, heard) in enumerate(pairs)]


def test_wer_is_all_errors_over_all_words_not_the_mean_over_clips():
    predictions = asr(("a b c d e f g h i", "a b c d e f g h i"), ("x", "y"))
    assert score(predictions, normalize=False)["asr"].value == pytest.approx(1 / 10)


def test_substitutions_deletions_and_insertions_add_up_to_wer():
    found = score(asr(("one two three four", "one too four five five")), normalize=False)["asr"]
    kinds = [found.extra[kind] for kind in ("substitutions", "deletions", "insertions")]
    assert sum(kinds) == pytest.approx(found.value) == pytest.approx(4 / 4)


def test_cer_counts_characters():
    assert score(asr(("abcd", "abxd")), normalize=False)["asr"].extra["cer"] == pytest.approx(1 / 4)


def test_an_insertion_heavy_answer_scores_above_one():
    assert score(asr(("one", "one one one")), normalize=False)["asr"].value == 2.0


def test_an_empty_answer_deletes_every_word_and_a_silent_reference_counts_insertions():
    predictions = asr(("one two", ""), ("", "three"), ("", ""))
    assert score(predictions, normalize=False)["asr"].value == pytest.approx(3 / 2)


def test_the_closest_of_several_references_counts():
    prediction = Prediction("clip", "asr", "synth", ("turn the light on", "turn on the light"), "turn on the light")
    assert score([prediction])["asr"].value == 0


def test_phones_are_compared_as_they_are():
    found = score(asr(("S EH V AH N", "s EH V AH N"), task="phone_recognition"))["phone_recognition"]
    assert (found.metric, found.value) == ("per", pytest.approx(1 / 5))


def test_exact_match_ignores_case_and_punctuation_only():
    pairs = [("yes", "Yes."), ("no", "no, it is not"), ("four", "four "), ("two", "")]
    assert score(asr(*pairs, task="QA"))["QA"].value == pytest.approx(2 / 4)


@pytest.mark.parametrize(
    "right, heard, is_right",
    [
        ("(a)", "(b)", False),
        ("(a)", "A.", True),
        ("-5", "5", False),
        ("C#", "C", False),
        ("+", "-", False),
        ("[laughter]", "[music]", False),
        ("the", "a", False),
        ("की", "कि", False),
        ("ｙｅｓ", "Yes", True),
        ("it’s", "It's", True),
        ("...", "", False),
    ],
)
def test_exact_match_neither_empties_nor_merges_answers(right, heard, is_right):
    assert score(asr((right, heard), task="QA"))["QA"].value == is_right


def test_typographic_signs_and_composed_letters_are_no_word_errors():
    pairs = [("it's fine", "it’s fine"), ("well... yes", "well… yes"), ("café", "cafe\u0301"), ("ok", "ｏｋ")]
    for normalize in (True, False):
        assert score(asr(*pairs), normalize=normalize)["asr"].value == 0


def test_phones_with_marks_are_compared_composed_and_at_any_white_space():
    found = score(asr(("ã b\tc", "a\u0303 b  c"), task="phone_recognition"))
    assert found["phone_recognition"].value == 0


def test_marks_of_other_scripts_are_words_without_the_english_rules_and_these_warn():
    pairs = asr(("कि वह", "की वह"))
    assert score(pairs, normalize=False)["asr"].value == pytest.approx(1 / 2)
    with pytest.warns(UserWarning, match=r"not written in Latin letters, .* set eval\.normalize=false"):
        score(pairs)


def test_each_task_is_scored_by_its_metric_and_by_nothing_else():
    answers = ("a low tone", "a low tone"), ("noise", "clicks")
    predictions = [prediction for task in scored_tasks() for prediction in asr(*answers, task=task)]
    scores = score(predictions)
    assert scores.keys() == set(scored_tasks())
    assert all(found.metric == name_metric(task) for task, found in scores.items())
    assert all(found.num_samples == 2 for found in scores.values())


def test_scores_that_need_java_are_not_available_and_never_zero():
    extra = score(asr(("a low tone", "noise"), ("noise", "noise"), task="audiocaption_v2"))["audiocaption_v2"].extra
    assert extra["spice"] == extra["meteor"] == "not available"


def test_the_share_of_answers_that_ended_is_reported():
    predictions = asr(("one", "one"), ("two", "two two two two"))
    predictions[1] = replace(predictions[1], ended=False)
    assert score(predictions)["asr"].extra["ended"] == 0.5


def test_the_interval_holds_the_value_narrows_with_clips_and_repeats_with_its_seed():
    predictions = asr(*(("one two", "one two" if i % 5 else "one too") for i in range(400)))
    many, few = (score(part, normalize=False)["asr"] for part in (predictions, predictions[:40]))
    assert many.low < many.value < many.high
    assert many.high - many.low < few.high - few.low
    assert many == score(predictions, normalize=False)["asr"] != score(predictions, normalize=False, seed=1)["asr"]
    # A proportion's: each of 400 clips has one wrong word of two with probability 0.2.
    assert many.high - many.low == pytest.approx(2 * 1.96 * math.sqrt(0.2 * 0.8 / 400) / 2, rel=0.1)


def test_the_order_of_the_predictions_does_not_matter():
    predictions = asr(("one two", "one"), ("three", "three"), ("four five", "nine five"))
    assert score(predictions) == score(predictions[::-1])


def test_a_student_that_answers_like_its_teacher_retains_everything():
    predictions = asr(*(("one two", "one too"), ("three", "three"), ("four five", "four five"), ("six", "six")) * 20)
    kept = retained_quality(predictions[::-1], predictions)["asr"]
    assert (kept.value, kept.low, kept.high) == (1.0, 1.0, 1.0)


def test_retained_quality_is_word_accuracy_over_word_accuracy():
    teacher = asr(*(("one two", "one two"), ("three four", "three fore")) * 20)
    student = asr(*(("one two", "one too"), ("three four", "three fore")) * 20)
    assert retained_quality(student, teacher, normalize=False)["asr"].value == pytest.approx((2 / 4) / (3 / 4))


def test_a_teacher_without_quality_has_nothing_to_retain():
    wrong, right = asr(("one", "two two"), ("three", "")), asr(("one", "one"), ("three", "three"))
    assert retained_quality(right, wrong) == {}
    assert retained_quality(wrong, right, normalize=False)["asr"].value == 0


def answers(task, right, heard):
    return [Prediction(f"clip{i}", task, "synth", (r,), h) for i, (r, h) in enumerate(zip(right, heard))]


def test_chance_is_the_metric_of_the_commonest_right_answer_to_every_clip():
    genders = ["Male"] * 6 + ["Female"] * 4
    assert score(answers("gender_recognition", genders, genders))["gender_recognition"].extra["chance"] == 0.6
    words = ["one", "two", "Two.", "one two three"]  # "two" to all: one, none, none and two errors of six words
    assert score(answers("asr", words, words), normalize=False)["asr"].extra["chance"] == pytest.approx(3 / 6)
    captions = ["a low tone then noise"] * 2 + ["birds sing in the tree"] * 2
    found = score(answers("audiocaption", captions, captions))["audiocaption"]
    assert (found.extra["chance"], found.value) == (pytest.approx(5), pytest.approx(10))


def test_a_teacher_that_is_not_shown_to_be_above_chance_has_nothing_to_retain():
    right = ["Male", "Female"] * 50
    guesses = ["Male"] * 55 + [right[i] for i in range(55, 60)] + ["Female"] * 40
    at_chance, good = answers("gender_recognition", right, guesses), answers("gender_recognition", right, right)
    assert score(at_chance)["gender_recognition"].value > 0.5
    assert not is_above_chance(score(at_chance)["gender_recognition"])
    assert retained_quality(good, at_chance) == {}
    assert retained_quality(at_chance, good)["gender_recognition"].value < 0.6


def test_student_and_teacher_must_answer_the_same_clips():
    predictions = asr(("one", "one"), ("two", "two"))
    with pytest.raises(
        ValueError, match=r"student's answers of task asr are 1, but 1 of them .* teacher's 2; evaluate"
    ):
        retained_quality(predictions[:1], predictions)


def test_an_unknown_task_is_refused_by_name():
    with pytest.raises(ValueError, match=r"task is 'arc' \(clip0\), but there is a metric for asr, .* only; correct"):
        score(asr(("one", "one"), task="arc"))


def test_references_without_a_word_are_refused():
    with pytest.raises(ValueError, match="the references of task asr are 1 empty texts after normalization"):
        score(asr(("[music]", "one")))


# Captions. The expected values were computed with pycocoevalcap 1.2 (CiderScorer(n=4, sigma=6), BleuScorer with the
# closest reference length, Rouge) on the same words.
HYPOTHESES = ["a dog barks loudly while rain falls", "a low tone followed by noise", "a man is speaking", "birds sing"]
REFERENCES = [
    ["a dog barks while the rain falls", "a dog is barking in the rain"],
    ["a low tone followed by noise", "a low beep then noise"],
    ["a woman is speaking", "a person talks"],
    ["many birds sing in a tree", "birds are singing"],
]


def test_cider_d_equals_pycocoevalcap():
    expected = [2.60612522, 5.82695981, 1.11111111, 1.63752419]
    assert cider_d(HYPOTHESES, REFERENCES) == pytest.approx(expected, abs=1e-8)


def test_bleu_4_equals_pycocoevalcap():
    assert bleu_4(HYPOTHESES, REFERENCES) == pytest.approx(0.535729495, abs=1e-8)


def test_rouge_l_equals_pycocoevalcap():
    expected = [0.8571428571428571, 1.0, 0.75, 0.45864661654135336]
    assert [rouge_l(h, r) for h, r in zip(HYPOTHESES, REFERENCES)] == pytest.approx(expected, abs=1e-12)


def test_captions_with_several_references_are_one_clip_in_every_score():
    """By hand: every word and bigram of the answer is in one of the two references, the longer n-grams in the first."""
    prediction = Prediction("clip", "audiocaption", "", ("a dog barks in rain", "a dog barks"), "a dog barks in rain")
    other = Prediction("other", "audiocaption", "", ("birds sing in a tree", "birds sing"), "birds sing in a tree")
    found = score([prediction, other])["audiocaption"]
    assert (found.num_samples, found.extra["references"]) == (2, 2)
    assert (found.extra["bleu_4"], found.extra["rouge_l"]) == (1, 1)
    one_by_one = [Prediction(f"{p.key}{r}", p.task, "", (r,), p.hypothesis) for p in (prediction, other)
                  for r in p.references]  # fmt: skip
    assert score(one_by_one)["audiocaption"].extra["bleu_4"] < 0.8


def test_a_perfect_caption_of_four_words_scores_ten_in_cider_and_one_elsewhere():
    captions = ["a low tone then noise", "birds sing in the tree"]
    single = [[caption] for caption in captions]
    assert cider_d(captions, single) == pytest.approx([10, 10])
    assert bleu_4(captions, single) == pytest.approx(1)
    assert rouge_l(captions[0], single[0]) == pytest.approx(1)


def test_an_empty_caption_scores_zero():
    assert cider_d(["", "noise"], [["a low tone"], ["noise"]])[0] == 0
    assert bleu_4([""], [["a low tone"]]) == 0
    assert rouge_l("", ["a low tone"]) == 0


def test_repeating_a_right_word_does_not_raise_cider():
    references = [["a dog barks in the rain"], ["a low tone"]]
    once, often = cider_d(["a dog barks", ""], references)[0], cider_d(["a dog dog dog barks", ""], references)[0]
    assert often < once


def test_a_paired_difference_is_of_the_means_over_runs_and_knows_clips_that_are_hard_for_both():
    def run(wrong):
        return [
            Prediction(f"c{i}", "asr", "toys", ("one two",), "nine nine" if i in wrong else "one two")
            for i in range(40)
        ]

    hard = set(range(20))
    found = paired_difference([run(hard), run(hard)], [run(hard | {20}), run(hard | {20, 21})])["asr"]
    assert found.value == pytest.approx(-1.5 / 40)
    assert -0.15 < found.low < found.value < found.high <= 0
    assert paired_difference([run(hard)], [run(hard)])["asr"] == Difference(0, 0, 0)
    with pytest.raises(ValueError, match=r"clips of the runs are \[39, 40\] and not the same ones"):
        paired_difference([run(hard)], [run(hard)[1:]])
