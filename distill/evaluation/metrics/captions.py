"""Caption scores: CIDEr-D, BLEU-4 and ROUGE-L of a set of clips, each with one or more reference captions.

The definitions are those of pycocoevalcap (`cider/cider_scorer.py` with its clipping and length penalty, `bleu`,
`rouge`), to the last digit on equal words. Words differ a little: theirs are Stanford's Java tokenizer's, ours those of
`split_caption`. It knows captions, nothing of models. SPICE and METEOR need Java and are reported as not available,
never as 0.
"""

import math
from collections import Counter
from collections.abc import Sequence

from distill.evaluation.metrics.metric import NOT_AVAILABLE, Metric, Prediction, Tally
from distill.evaluation.metrics.normalization import split_caption

MAX_ORDER = 4  # of n-grams
SIGMA = 6.0  # CIDEr-D: words of length difference that cost 1 - exp(-1/2)
CIDER_SCALE = 10.0
BETA = 1.2  # ROUGE-L: weight of recall

Words = tuple[str, ...]


def _count_ngrams(words: Words) -> list[Counter]:
    """How often each n-gram occurs; one counter an order, 1 to 4."""
    return [Counter(zip(*(words[i:] for i in range(order)))) for order in range(1, MAX_ORDER + 1)]


def cider_d(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each clip; the set's score is their mean.

    It is CIDEr-D and neither CIDEr nor SPIDEr (which averages it with SPICE). The scale is pycocoevalcap's: 10 for a
    perfect caption of four words or more, 2.5 for one of a single word, since the higher n-grams are empty. The rarity
    of words comes from the references of all clips given, so the score of one clip depends on the others, and is 0
    when there is only one.

    Args:
        hypotheses: one caption a clip.
        references: one or more captions a clip.

    Returns:
        One score a clip, 0 to 10.

    Source: Vedantam, Zitnick, Parikh, "CIDEr: Consensus-based Image Description Evaluation", 2015, section 6.
    """
    counted = [[_count_ngrams(split_caption(caption)) for caption in captions] for captions in references]
    document_frequency: Counter = Counter()
    for captions in counted:
        document_frequency.update({ngram for orders in captions for counts in orders for ngram in counts})
    log_num_clips = math.log(len(references))

    def weigh(orders: list[Counter]) -> list[dict[Words, float]]:
        return [
            {gram: count * (log_num_clips - math.log(max(1, document_frequency[gram]))) for gram, count in c.items()}
            for c in orders
        ]

    scores = []
    for hypothesis, captions in zip(hypotheses, counted):
        weighed = weigh(_count_ngrams(split_caption(hypothesis)))
        length = len(split_caption(hypothesis))
        similarities = [
            _similarity(weighed, weigh(orders), max(0, length - 1), orders[1].total()) for orders in captions
        ]
        scores.append(CIDER_SCALE * sum(similarities) / len(similarities))
    return scores


def _similarity(hypothesis: list[dict], reference: list[dict], hypothesis_size: int, reference_size: int) -> float:
    """Mean over the orders of the clipped cosine, times a Gaussian of the difference in size (in bigrams)."""
    cosines = []
    for ours, theirs in zip(hypothesis, reference):
        product = sum(min(weight, theirs[gram]) * theirs[gram] for gram, weight in ours.items() if gram in theirs)
        norm = math.hypot(*ours.values()) * math.hypot(*theirs.values())
        cosines.append(product / norm if norm else 0.0)
    penalty = math.exp(-((hypothesis_size - reference_size) ** 2) / (2 * SIGMA**2))
    return penalty * sum(cosines) / MAX_ORDER


def bleu_4(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU-4 of the whole set: clipped n-gram precision, orders 1 to 4, with the brevity penalty; 0 to 1.

    The reference length of a clip is that of its closest reference, the shorter of two equally close. No smoothing.

    Source: Papineni et al., "BLEU: a Method for Automatic Evaluation of Machine Translation", 2002.
    """
    correct, guessed = [0] * MAX_ORDER, [0] * MAX_ORDER
    hypothesis_length = reference_length = 0
    for hypothesis, captions in zip(hypotheses, references):
        words = split_caption(hypothesis)
        split_captions = [split_caption(caption) for caption in captions]
        counted = [_count_ngrams(caption) for caption in split_captions]
        for order, counts in enumerate(_count_ngrams(words)):
            most = Counter()
            for orders in counted:
                most |= orders[order]
            correct[order] += (counts & most).total()
            guessed[order] += counts.total()
        hypothesis_length += len(words)
        reference_length += min((abs(len(caption) - len(words)), len(caption)) for caption in split_captions)[1]
    if not all(correct):
        return 0.0
    brevity = min(0.0, 1 - reference_length / hypothesis_length)
    return math.exp(brevity + sum(math.log(c / g) for c, g in zip(correct, guessed)) / MAX_ORDER)


def rouge_l(hypothesis: str, references: Sequence[str]) -> float:
    """ROUGE-L of one clip: F-score (beta 1.2) of the longest common subsequence; 0 to 1.

    Precision and recall are each the best over the references, as pycocoevalcap takes them.

    Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, section 3.
    """
    words = split_caption(hypothesis)
    lengths = [(_longest_common(words, caption), len(caption)) for caption in map(split_caption, references)]
    precision = max((common / len(words) for common, _ in lengths), default=0.0) if words else 0.0
    recall = max((common / size for common, size in lengths if size), default=0.0)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common(first: Words, second: Words) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        previous = row
        row = [0]
        for column, other in enumerate(second):
            row.append(previous[column] + 1 if word == other else max(row[column], previous[column + 1]))
    return row[-1]


def count_captions(predictions: Sequence[Prediction], normalize: bool) -> Tally:
    """CIDEr-D and the others; captions are always lower-cased and stripped of punctuation, whatever `normalize` is."""
    hypotheses = [prediction.hypothesis for prediction in predictions]
    references = [prediction.references for prediction in predictions]
    extra = {
        "bleu_4": bleu_4(hypotheses, references),
        "rouge_l": sum(map(rouge_l, hypotheses, references)) / len(hypotheses),
        "spice": NOT_AVAILABLE,
        "meteor": NOT_AVAILABLE,
    }
    return Tally.of_values(cider_d(hypotheses, references), extra)


CIDER_D = Metric(
    title="CIDEr-D",
    tasks=(
        "audiocaption",
        "audiocaption_v2",
        "audiocaption_zh",
        "audiocaption_de",
        "audio_speech_description",
        "fluent_speech_audio",
        "audio_story_telling",
        "music_description",
        "translation_ec",  # of translations read `bleu_4`
        "translation_ce",
        "translation_en2ja",
        "translation_en2de",
        "speech_query",
        "speech_audio_query",
        "speech_audio_coreasoning",
    ),
    tally=count_captions,
    plain=lambda text, normalize: " ".join(split_caption(text)),
    best=CIDER_SCALE,
)
