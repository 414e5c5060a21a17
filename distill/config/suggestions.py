"""What somebody may have meant: the nearest command, option, field or file to a word that is none. Imports no torch."""

from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from types import MappingProxyType

SIMILARITY = 0.6  # of two words, as difflib counts, from which on one may be meant by the other
MARGIN = 0.05  # below the best, what is still named
MOST = 4  # names in one hint
# What other tools call it, where no likeness of letters would tell
COMMANDS = {"train": "run", "fit": "run", "predict": "transcribe", "infer": "transcribe", "score": "evaluate",
            "test": "evaluate", "check": "doctor", "init": "new", "verify": "cache-verify"}  # fmt: skip
FIELDS = {"lr": "train.learning_rate", "epochs": "train.steps", "output_dir": "runs", "lora_r": "student.lora_rank",
          "rank": "student.lora_rank", "bs": "train.batch_size", "tau": "loss.temperature"}  # fmt: skip


def nearest(word: str, names: Iterable[str], others: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """Of `names` those that `word` may stand for, the best first; `others` are words that stand for one of them."""
    meanings = {_plain(name): name for name in names} | dict(others)
    likeness = {name: SequenceMatcher(None, _plain(word), name).ratio() for name in meanings}
    best = max(likeness.values(), default=0.0)
    near = [name for name in meanings if likeness[name] >= max(SIMILARITY, best - MARGIN)]
    near.sort(key=lambda name: -likeness[name])
    return list(dict.fromkeys(meanings[name] for name in near))[:MOST]


def nearest_fields(word: str, fields: Sequence[str]) -> list[str]:
    """Of dotted `fields` those that `word` may stand for: the same name in any section first, then what looks alike."""
    section, _, name = _plain(word).rpartition(".")
    sections = list(dict.fromkeys(field.partition(".")[0] for field in fields))
    same = [field for field in fields if field.rpartition(".")[2] == name]
    if same:
        near = nearest(section, [field.rpartition(".")[0] for field in same]) if section else []
        return [field for field in same if not near or field.rpartition(".")[0] in near][:MOST]
    if name in FIELDS:
        return [FIELDS[name]]
    if section:
        return nearest(word, fields)
    by_name: dict[str, list[str]] = {name: [name] for name in sections}
    for field in fields:
        by_name.setdefault(field.rpartition(".")[2], []).append(field)
    return list(dict.fromkeys(field for match in nearest(name, by_name) for field in by_name[match]))[:MOST]


def did_you_mean(names: Sequence[str], otherwise: str) -> str:
    """`did you mean a or b?`, or `otherwise` where there are no names."""
    if not names:
        return otherwise
    *most, last = names
    return f"did you mean {', '.join(most)} or {last}?" if most else f"did you mean {last}?"


def _plain(word: str) -> str:
    """As names are written here: small letters, underscores."""
    return word.strip().lower().replace("-", "_")
