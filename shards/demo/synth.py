"""The embedded corpus: synthesized speech and sounds, questions about both, as a SALMONN manifest with audio files.

It lets every stage run where there is no data: offline, on any machine, the same samples for the same seed and package
versions. Splits share no utterance (words and voice) and no sound; two voices are heard in the test split only.
"""

import hashlib
import json
import random
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType

import numpy as np
import soundfile
import soxr

from shards.demo.espeak import FEMALE, MALE, Synthesizer, voice_names
from shards.demo.sounds import CAPTIONS, Scene, Sound, draw_sound
from shards.files.write import write_atomically
from shards.pool import progress_bar
from shards.sample import SAMPLE_RATE

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COMMANDS = (
    "turn on the light",
    "turn off the light",
    "turn on the music",
    "stop the music",
    "next song",
    "open the door",
    "close the door",
    "open the window",
    "close the window",
    "call my mother",
    "what time is it",
    "set a timer",
)
MAX_DIGITS = 4
HELD_OUT = ("m6", "f2")  # voices of the test split only

SIZES = MappingProxyType({"train": 2_400, "valid": 120, "test": 240})
TASK_SHARES = MappingProxyType({"asr": 0.5, "audiocaption_v2": 0.2, "gender_recognition": 0.1, "QA": 0.2})
# Of ten signatures, how many belong to each split.
_BUCKETS = ("train",) * 7 + ("valid",) + ("test",) * 2

MIN_SECONDS = 0.5
PEAK = 0.5  # of full scale, before the clip's own gain
FLOOR = 0.001  # of full scale: a faint hiss, because a recording is never digitally silent


@dataclass(frozen=True)
class Utterance:
    """Words, and who says them how."""

    words: str
    voice: str
    pitch: int
    speed: int  # words a minute

    @property
    def is_female(self) -> bool:
        return self.voice.split("+")[1] in FEMALE

    @property
    def has_digits(self) -> bool:
        return self.words.split()[0] in DIGITS


@dataclass(frozen=True)
class Clip:
    """One sample before it is rendered."""

    content: Utterance | Scene
    text: str
    task: str
    question: str | None = None


class Draw:
    """Draws the clips of one split: what it hands out belongs to this split and to no other.

    A hash of what makes a clip recognizable (words and voice, or a sound's parameters) names its split, so that splits
    are disjoint whatever their sizes, and growing one leaves the others alone.
    """

    def __init__(self, split: str, seed: int) -> None:
        self.split, self.seed = split, seed
        self.rng = random.Random(f"{seed}/{split}")

    def _belongs(self, signature: str) -> bool:
        digest = hashlib.sha256(f"{self.seed}/{signature}".encode()).digest()
        return _BUCKETS[int.from_bytes(digest[:8], "big") % len(_BUCKETS)] == self.split

    def utterance(self) -> Utterance:
        """Digits or a command, in equal parts, by a man or a woman, in equal parts."""
        variants = [v for v in self.rng.choice((MALE, FEMALE)) if self.split == "test" or v not in HELD_OUT]
        while True:
            if self.rng.random() < 0.5:
                words = self.rng.choice(COMMANDS)
            else:
                words = " ".join(self.rng.choice(DIGITS) for _ in range(self.rng.randint(1, MAX_DIGITS)))
            voice = self.rng.choice(voice_names(variants))
            if self._belongs(f"{words}/{voice}"):
                return Utterance(words, voice, pitch=self.rng.randint(35, 65), speed=self.rng.randint(120, 170))

    def scene(self) -> Scene:
        """One sound, or two that differ."""
        joint = self.rng.choice(("", "", "followed by", "over"))
        kinds = self.rng.sample(tuple(CAPTIONS), k=2 if joint else 1)
        if joint == "over":
            kinds = [self.rng.choice([kind for kind in CAPTIONS if kind != "noise"]), "noise"]
        return Scene(tuple(self._sound(kind) for kind in kinds), joint)

    def _sound(self, kind: str) -> Sound:
        while True:
            sound = draw_sound(self.rng, kind)
            if self._belongs(sound.signature):
                return sound


def _draw_asr(draw: Draw) -> Clip:
    utterance = draw.utterance()
    return Clip(utterance, utterance.words, "asr")


def _draw_caption(draw: Draw) -> Clip:
    scene = draw.scene()
    return Clip(scene, scene.caption, "audiocaption_v2")


def _draw_gender(draw: Draw) -> Clip:
    utterance = draw.utterance()
    return Clip(utterance, "female" if utterance.is_female else "male", "gender_recognition")


def _draw_question(draw: Draw) -> Clip:
    """A question that has one answer, about an utterance or a scene in equal parts."""
    content = draw.utterance() if draw.rng.random() < 0.5 else draw.scene()
    answers = _speech_answers(content) if isinstance(content, Utterance) else _scene_answers(content)
    question = draw.rng.choice(list(answers))
    return Clip(content, answers[question], "QA", question)


def _yes_no(claim: bool) -> str:
    return "yes" if claim else "no"


def _speech_answers(utterance: Utterance) -> dict[str, str]:
    answers = {
        "Is anybody speaking?": "yes",
        "Is the speaker a woman?": _yes_no(utterance.is_female),
        "Are there digits?": _yes_no(utterance.has_digits),
    }
    if utterance.has_digits:
        spoken = utterance.words.split()
        answers |= {
            "How many digits are spoken?": DIGITS[len(spoken)],
            "What is the first digit?": spoken[0],
            "What is the last digit?": spoken[-1],
        }
    return answers


def _scene_answers(scene: Scene) -> dict[str, str]:
    answers = {
        "Is anybody speaking?": "no",
        "Is there noise?": _yes_no("noise" in scene.kinds),
        "How many sounds are there?": DIGITS[len(scene.sounds)],
    }
    if len({"low_tone", "high_tone"} & set(scene.kinds)) == 1:
        answers["Is the tone high or low?"] = "high" if "high_tone" in scene.kinds else "low"
    if len({"rising_sweep", "falling_sweep"} & set(scene.kinds)) == 1:
        answers["Does the sweep rise or fall?"] = "rise" if "rising_sweep" in scene.kinds else "fall"
    return answers


TASKS: Mapping[str, Callable[[Draw], Clip]] = MappingProxyType(
    {"asr": _draw_asr, "audiocaption_v2": _draw_caption, "gender_recognition": _draw_gender, "QA": _draw_question}
)


def plan_clips(split: str, num_clips: int, *, seed: int = 0) -> list[Clip]:
    """The clips of one split: each task has its share of `TASK_SHARES`, and they come mixed."""
    draw = Draw(split, seed)
    bounds = list(accumulate(TASK_SHARES.values()))
    tasks = [tuple(TASK_SHARES)[bisect(bounds, (number + 0.5) / num_clips)] for number in range(num_clips)]
    draw.rng.shuffle(tasks)
    return [TASKS[task](draw) for task in tasks]


def render_clip(clip: Clip, synthesizer: Synthesizer, rng: random.Random) -> np.ndarray:
    """One clip's samples: int16 mono at 16 kHz, 0.5 to 3.5 s, with silence around what is heard."""
    if isinstance(clip.content, Scene):
        waveform_N = clip.content.render()
    else:
        utterance = clip.content
        spoken_N = synthesizer.speak(
            utterance.words, voice=utterance.voice, pitch=utterance.pitch, speed=utterance.speed
        )
        # Very high quality computes in float64: the rounded result is the same on every machine.
        waveform_N = soxr.resample(spoken_N / 32_768, synthesizer.sample_rate, SAMPLE_RATE, quality="VHQ")
        waveform_N *= PEAK * rng.uniform(0.4, 1.6) / np.abs(waveform_N).max()
    before = int(rng.uniform(0.05, 0.2) * SAMPLE_RATE)
    after = int(rng.uniform(0.05, 0.2) * SAMPLE_RATE)
    after = max(after, int(MIN_SECONDS * SAMPLE_RATE) - before - len(waveform_N))
    padded_N = np.pad(waveform_N, (before, after))
    hiss_N = np.random.Generator(np.random.PCG64(rng.randrange(2**32))).random(len(padded_N)) * 2 - 1
    return np.rint((padded_N + FLOOR * hiss_N).clip(-1, 1) * 32_767).astype(np.int16)


def write_corpus(
    folder: Path,
    *,
    seed: int = 0,
    sizes: Mapping[str, int] = SIZES,
    unlabelled_share: float = 0.25,
    show_progress: bool = False,
) -> None:
    """Write the corpus: `audio/`, and SALMONN manifests with paths relative to the folder.

    `train.json` is the student's: a share of it has no `text`. `train_full.json` holds the same clips, every one with
    its text, for the teacher. The manifests come last and each under its final name at once: where `test.json` exists,
    the corpus is complete.

    Args:
        folder: made where it is missing; a corpus already there is overwritten.
        seed: another seed draws other clips and allots utterances to splits anew.
        sizes: clips of `train`, `valid` and `test`; about half are asr.
        unlabelled_share: the share of the train clips, in [0, 1], to be answered by the teacher (pseudo-labels).
        show_progress: draw a bar on stderr.

    Raises:
        ValueError: a size of an unknown split, or a share outside [0, 1].
    """
    if set(sizes) != set(SIZES):
        raise ValueError(f"sizes is given for {sorted(sizes)}, but the splits are {sorted(SIZES)}; name these.")
    if not 0 <= unlabelled_share <= 1:
        raise ValueError(f"unlabelled_share is {unlabelled_share}, but it is a share in [0, 1]; choose one there.")
    folder = Path(folder)
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    for name in ("train_full", *SIZES):  # those of an older corpus would speak for half of a new one
        (folder / f"{name}.json").unlink(missing_ok=True)
    synthesizer = Synthesizer()
    manifests = {}
    with progress_bar("synthesizing", sum(sizes.values()), show=show_progress) as advance:
        for split in SIZES:
            manifests[split] = []
            for entry in _write_clips(folder, split, plan_clips(split, sizes[split], seed=seed), synthesizer, seed):
                manifests[split].append(entry)
                advance(1)
    manifests = {"train_full": manifests["train"], **manifests}
    manifests["train"] = _drop_texts(manifests["train"], unlabelled_share, random.Random(f"{seed}/unlabelled"))
    for name, annotation in manifests.items():
        text = json.dumps({"annotation": annotation}, indent=1) + "\n"
        write_atomically(folder / f"{name}.json", text)


def _write_clips(
    folder: Path, split: str, clips: Iterable[Clip], synthesizer: Synthesizer, seed: int
) -> Iterator[dict]:
    """Render and write each clip, wav and flac in turn; yield the manifest's entries."""
    rng = random.Random(f"{seed}/{split}")
    for number, clip in enumerate(clips):
        path = Path("audio") / f"{split}-{number:05d}.{('wav', 'flac')[number % 2]}"
        soundfile.write(folder / path, render_clip(clip, synthesizer, rng), SAMPLE_RATE, subtype="PCM_16")
        entry = {"path": path.as_posix(), "text": clip.text, "task": clip.task}
        entry |= {"Q": clip.question} if clip.question is not None else {}
        yield entry | ({"speaker": clip.content.voice} if isinstance(clip.content, Utterance) else {})


def _drop_texts(annotation: list[dict], share: float, rng: random.Random) -> list[dict]:
    """The same entries, of which exactly this share has no text."""
    unlabelled = set(rng.sample(range(len(annotation)), round(share * len(annotation))))
    return [
        {key: value for key, value in entry.items() if not (number in unlabelled and key == "text")}
        for number, entry in enumerate(annotation)
    ]
