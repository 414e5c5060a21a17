"""The configuration of a run: every field, its unit and its only default. Knows nothing of models.

A file is read over these defaults, `key=value` words over the file; unknown keys and wrong types are refused.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from distill.config.credentials import refuse_secrets
from distill.config.files import Dumper, lay_over_, read_files, read_words
from distill.config.recipes import find_config
from distill.config.rules import CODEC_FIELDS, check_config, check_section
from distill.config.suggestions import did_you_mean, nearest_fields
from shards.audio.augmentation import Augmentation
from shards.field_types import is_null
from shards.targets.codecs.table import CODECS, find_codec
from shards.tars.source import is_remote, join_place
from students.hearing import Connector, Hearing
from teachers.lora import SALMONN_LORA, Lora

SPLITS = ("train", "valid", "test")  # each a folder of shards


@dataclass(frozen=True)
class CorpusConfig:
    """Where samples come from before they are shards."""

    kind: str = "manifest"  # "manifest": the files below; "synth": the embedded corpus is written first
    train: str = ""  # manifest of the training samples
    valid: str = ""  # manifest of the samples that choose the best checkpoint; empty: a share of train
    test: str = ""  # manifest of the samples that are scored
    valid_share: float = 0.02  # of train, when valid is empty
    channels: str = "left"  # heard of several: "left", as every SALMONN was trained, or their "mean"
    num_train: int = 2400  # samples of the embedded corpus
    shard_samples: int = 2000  # the most of a shard; processes cache shard by shard, so each should have several

    def __post_init__(self):
        check_section("corpus", self)


@dataclass(frozen=True)
class DataConfig:
    """The shards that are read, and how."""

    folder: str = "data"  # holds train/, valid/ and test/, each a folder of shards; or its URL: s3://, gs://, http://
    labelled_share: float = 1.0  # share of the training samples whose text the student may see
    labelled_only: bool = False  # leave samples without text out instead of learning the teacher's answers
    workers: int = 0  # processes that read and decode, on each rank
    max_bad: float = 0.001  # share of unreadable samples (and at least 10) above which a run stops
    max_member_mb: int = 256  # a shard with a larger member is refused before it is read
    bucket_batches: int = 0  # clips of so many batches are sorted by length before they are cut up; 0: none are
    batch_seconds: float = 0.0  # most seconds of audio a step, padding included; 0: train.batch_size alone decides
    task_weights: dict[str, float] = field(default_factory=dict)  # how often an epoch a task's clips come; else 1
    weights: str = ""  # file of `distill filter`: what each clip counts; empty: all alike

    def __post_init__(self):
        check_section("data", self)


@dataclass(frozen=True)
class TeacherConfig:
    """The frozen model that is learned from."""

    path: str = ""  # a saved folder, or a SALMONN checkpoint (.pth) together with the names below
    llm: str = ""  # the checkpoint's LLM: folder or hub id; of a saved folder: where it lies now
    whisper: str = ""  # the checkpoint's Whisper: folder or hub id
    second: str = ""  # the checkpoint's second encoder: BEATs or EAT file; empty: none
    second_kind: str = ""  # "beats" or "eat" (`teachers.ears.encoders`)
    end_token: str = ""  # text that ended the checkpoint's answers; empty: as its file says, or the tokenizer's
    bos_token: str = ""  # text of the token before the checkpoint's prompts; "none": none; empty: the tokenizer's own
    prompts: str = ""  # JSON file of the prompts it was trained with, as train_prompt.json; empty: the library's
    template: str = ""  # what stands around a prompt, which goes where {} is; "chat": the form of its LLM's own chat,
    # turn ends included; empty: as its file says, or SALMONN's
    front_end: str = "exact"  # or "shared": Whisper and BEATs from one power spectrum; its error is printed
    ears: str = "auto"  # "float32", "fp16" (on a GPU, autocast over float32 weights, as trained) or "bf16"; "auto":
    # float32 where targets go to a disk, else `precision`. A student that trains on cached targets hears in `precision`
    quantization: str = "none"  # of its LLM's linear layers, weights alone, while it is asked: "none" or "int8"
    online: bool = False  # compute targets in every step instead of reading the cache

    def __post_init__(self):
        check_section("teacher", self)


@dataclass(frozen=True)
class StudentConfig:
    """The small model that is trained. Its ears, the teacher's or smaller ones, are frozen unless it trains Whisper."""

    llm: str = ""  # folder or hub id
    whisper: str = Hearing.whisper  # its own Whisper: folder or hub id; empty: the teacher's, shared
    second: str = Hearing.second  # its own second encoder: BEATs or EAT file; empty: the teacher's, shared
    second_kind: str = Hearing.second_kind  # "beats", "eat", or "none": it has no second encoder; empty: the teacher's
    quantization: str = "nf4"  # "nf4" (double quantization) or "none"
    lora_rank: int = Lora.rank  # of the two small matrices beside each of lora_targets
    lora_alpha: float = Lora.alpha  # their product counts lora_alpha / lora_rank
    lora_dropout: float = Lora.dropout  # of what enters them, in training
    lora_targets: tuple[str, ...] = Lora.targets  # the last parts of the names of the layers that get LoRA, or
    # all-linear: every linear layer of the LLM but its head and experts; experts: a mixture's, its routers are trained
    prefix_tokens: int = 0  # learned keys and values that each layer of the LLM sees before all others, trained beside
    # LoRA; 0: none
    start: str = ""  # folder of a saved student to go on from, such as runs/r0/student; empty: start anew
    connector: str = Connector.start  # Q-Former at the start: "teacher" (its weights) or "new" (random)
    qformer_dropout: float = Connector.dropout  # in training
    windows: str = Hearing.windows  # "audio": only windows that hold audio reach the LLM; "all": also those of pure
    # padding
    ears_seconds: str = Hearing.ears_seconds  # that Whisper hears: "30", padded to all it takes; "clip"; "clip+P": and
    # P s of silence; empty: as the teacher's. A student is trained so, and cached frames are made so
    ears_quantization: str = Hearing.ears_quantization  # of the ears' linear layers, weights alone: "none", "bf16" or
    # "int8"
    whisper_layers: int = Hearing.whisper_layers  # that are kept of its Whisper's, evenly spread; 0: all
    train_ears: bool = Hearing.train_ears  # train its Whisper too, all of it; loss.frames pulls it to the teacher's
    ears_lora_rank: int = Hearing.ears_lora_rank  # of LoRA on its Whisper's linear layers, trained instead of all of
    # it; alpha is twice the rank; 0: none
    template: str = ""  # what stands around a prompt, as teacher.template; empty: the teacher's

    def __post_init__(self):
        check_section("student", self)

    @property
    def hearing(self) -> Hearing:
        """What it hears with."""
        return Hearing(**{name: getattr(self, name) for name in Hearing.__dataclass_fields__})


@dataclass(frozen=True)
class CacheConfig:
    """The teacher's targets on disk."""

    folder: str = ""  # or a URL that can be written; empty: `cache` inside the data folder
    codec: str = "topk"  # "topk", "adaptive" (fewer ids where sure), "sampled", "hidden" (the head's input) or "dense"
    k: int = 64  # ids kept a position by "topk"; the most that "adaptive" keeps
    threshold: float = 3e-4  # "adaptive" keeps the ids that are at least so probable
    draws: int = 50  # of "sampled", a position
    exponent: float = 1.0  # of "sampled": draws from p ** exponent, below 1 more of the tail
    temperatures: tuple[float, ...] = (1.0, 2.0)  # those that loss.temperature may be; "hidden", "dense": any
    features: str = "int8"  # Q-Former queries as "int8" by row, "float16", or "none"; hidden states as they, or "int8"
    hidden_layers: tuple[int, ...] = ()  # LLM blocks whose outputs are kept: 1 is the first, -1 the input of the head
    frames: str = "none"  # the frozen encoders' frames too, "int8" by row or "float16": training need not run the ears
    batch_size: int = 16  # samples of one teacher forward, on each rank
    answers: str = "label"  # "label" where there is one, "teacher": always its own, "both": by turns, epoch by epoch
    max_new_tokens: int = 60  # of the teacher's own answer
    num_beams: int = 1  # of it
    transcripts: bool = False  # keep the teacher's own answer to labelled clips too, with its error rate

    def __post_init__(self):
        check_section("cache", self)


@dataclass(frozen=True)
class LossConfig:
    """The objective: weights of its terms, each a mean over its own global count."""

    ce: float = 1.0  # cross-entropy on the answer
    pseudo_ce: float = 1.0  # factor of `ce` where the answer is the teacher's own
    kl: float = 1.0  # divergence from the teacher, times temperature squared
    kl_kind: str = "forward_kl"  # or reverse_kl, jsd, skewed_kl, skewed_reverse_kl, total_variation
    kl_parameter: float | None = None  # beta of jsd, alpha of the skewed ones, between 0 and 1; others take none
    temperature: float = 1.0  # of the divergence; must be one of those the cache keeps
    feature: float = 1.0  # distance of the Q-Former queries to the teacher's
    feature_kind: str = "mse"  # "mse", "cosine", "smooth_l1", or "relation": how alike each clip's windows are
    hidden: float = 0.0  # distance of the LLM's hidden states to the teacher's, when they are cached
    hidden_kind: str = "cosine"  # as feature_kind; widths that differ meet through a learned projector
    hidden_layers: dict[int, int] = field(default_factory=dict)  # teacher's blocks, from 1, to the student's; -1 is
    # what enters the head, and {-1: -1} where nothing is named
    frames: float = 0.0  # distance of the student's Whisper frames to the teacher's, where its Whisper is trained
    frames_kind: str = "mse"  # as feature_kind; widths that differ meet through a learned projector
    cross_tokenizer: str = "refuse"  # when the student's ids mean other tokens: "refuse", or "chunk": the terms below
    chunk: float = 1.0  # likelihood of the answer's chunks at whose ends both tokenizers agree; `kl`: where they match
    chunk_temperature: float = 100.0  # of the chunks' likelihood
    balance: float = (
        0.0  # imbalance of a mixture's experts, the mean over its layers; transformers' usual: 0.001 to 0.02
    )
    schedules: dict[str, str] = field(default_factory=dict)  # by term: "linear END", "cosine END", … "warmup STEPS"
    task_weights: dict[str, float] = field(default_factory=dict)  # what a task's samples count; 1 where not named

    def __post_init__(self):
        check_section("loss", self)

    @property
    def layer_pairs(self) -> dict[int, int]:
        """Which of the teacher's layers each of the student's is compared with."""
        return self.hidden_layers or {-1: -1}


@dataclass(frozen=True)
class OnPolicyConfig:
    """What the student says itself, scored by the teacher: in rounds (`distill answers`), or within each step."""

    round: int = 0  # number of the round, whose answers lie in the cache's folder `round-N`; 0: none
    share: float = 0.0  # of the answered clips that training sees with the student's answer, drawn anew each epoch
    clips: float = 1.0  # share of the training clips that the student answers
    step_share: float = 0.0  # of a step's clips that the student answers within it, for the teacher to score
    temperature: float = 0.0  # of its answers; 0: greedy
    max_new_tokens: int = 60  # of its answers

    def __post_init__(self):
        check_section("on_policy", self)


@dataclass(frozen=True)
class TrainConfig:
    """The training loop. A step is one optimizer update on `batch_size` samples over all ranks."""

    steps: int = 1000  # updates of the whole run
    batch_size: int = 32  # samples a step, over all ranks
    micro_batch_size: int = 32  # samples a backward, on each rank
    learning_rate: float = 1e-4  # peak
    min_learning_rate: float = 0.0  # at the last step
    warmup_steps: int = 100  # in which the learning rate climbs to its peak
    schedule: str = "cosine"  # of the rate after its peak: "cosine", "linear", "constant", or "wsd": flat, then linear
    decay_share: float = 0.2  # of the run's steps, the last ones, in which "wsd" falls
    optimizer: str = "adamw"  # or "adamw_8bit": moments in 8 bits (bitsandbytes), where they are not split by ZeRO
    weight_decay: float = 0.01  # on matrices only
    beta2: float = 0.98  # of AdamW; beta1 is 0.9
    max_grad_norm: float = 1.0  # of the whole gradient, above which it is scaled down
    clip: str = "fixed"  # "fixed": at max_grad_norm; "running": after 25 steps at a limit that follows recent norms
    clip_deviations: float = 2.5  # of "running": standard deviations of the limit above the mean of recent norms
    ema: float = 0.0  # decay a step of the average of what is trained, which is validated and saved; 0: there is none
    gradient_checkpointing: bool = False  # run each block of the LLM again in the backward instead of keeping what it
    # computed: a step takes about a third longer and a fraction of the memory; the gradient is the same
    kernels: str = "none"  # "liger": RMSNorms and gated MLPs of the LLM by the package's kernels, on a GPU
    eval_every: int = 0  # steps between validations; 0: only at the end
    best_metric: str = "mean"  # that chooses the best validation: "mean" of what every task lacks, or one task: "asr"
    early_stop: int = 0  # validations in a row without a better one after which the run ends; 0: it goes on
    save_every: int = 100  # steps between checkpoints
    stop_after: int = 0  # stop after this step and go on at the next start, for queues with a time limit; 0: do not
    keep: int = 2  # newest checkpoints that stay, beside the best
    max_minutes: float = 0.0  # stop in order after so long, and go on at the next start; 0: no end
    hang_minutes: float = 30.0  # a step, save or start that takes so long ends it with every thread's stack; 0: never
    max_bad_steps: int = 3  # steps in a row with a loss or norm that is not finite, or a spike, that end the run
    spike_deviations: float = 0.0  # standard deviations above the mean of recent steps at which a loss or norm is a
    # spike, and its step left out; 0: none is
    max_returns: int = 0  # times that the run goes back to its last good checkpoint instead, and on with other clips
    trackers: tuple[str, ...] = ("tensorboard",)  # also wandb, mlflow, trackio, …; [] for none
    resume: str = "auto"  # "auto": go on if there is a checkpoint; "must": refuse if none; "never": refuse if one
    allow_change: list[str] = field(default_factory=list)  # fields that a resumed run may change, [loss.kl] say

    def __post_init__(self):
        check_section("train", self)


@dataclass(frozen=True)
class EvalConfig:
    """How answers are made and counted."""

    batch_size: int = 32  # clips answered at once
    max_new_tokens: int = 60  # of an answer
    num_beams: int = 1  # 1: greedy
    repetition_penalty: float = 1.0  # above 1: ids of the answer so far become less likely
    length_penalty: float = 1.0  # of a beam's score, as the exponent of its length: above 1 favors long answers
    normalize: bool = True  # Whisper's English text normalizer before WER
    prompts: str = ""  # JSON file of what is asked, as test_prompt.json; empty: the first of training's of each task
    device: bool = False  # at its end the pipeline exports the student for devices, and that folder is scored too

    def __post_init__(self):
        check_section("eval", self)


@dataclass(frozen=True)
class ScratchConfig:
    """A small teacher trained here from nothing, and the LLM its student starts from. Unused with a real teacher."""

    steps: int = 0  # of the teacher's training; 0: the teacher is given
    batch_size: int = 32  # samples a step
    learning_rate: float = 1e-3  # peak
    ear_steps: int = 300  # of the ears' pre-training by CTC on the corpus' transcripts
    text_steps: int = 300  # of each LLM's pre-training on the corpus' text
    vocab_size: int = 500  # at most, of the sentencepiece tokenizer
    seconds: float = 3.6  # longest clip the ears take
    ears_seconds: str = "30"  # that its Whisper hears, as student.ears_seconds; "30" is all of the seconds above
    ear_width: int = 96  # of its Whisper
    ear_layers: int = 3  # of it
    llm_width: int = 128  # of the teacher's LLM
    llm_layers: int = 3  # of it
    student_width: int = 64  # of the student's LLM
    student_layers: int = 2  # of it
    qformer_width: int = 96  # of the Q-Former
    qformer_layers: int = 1  # of it
    window_seconds: float = 0.34  # of the audio that one Q-Former call sees
    num_queries: int = 1  # audio tokens a window

    def __post_init__(self):
        check_section("scratch", self)


@dataclass(frozen=True)
class TeachConfig:
    """A SALMONN that `distill teach` trains on `teacher.llm`, `teacher.whisper` and `teacher.second`, all frozen, with
    the loop of `train`. New are the connector and LoRA; sizes that are not here are SALMONN's."""

    start: str = ""  # folder of a saved teacher to go on from, such as runs/stage1/teacher; empty: start anew
    lora_rank: int = SALMONN_LORA.rank  # of the two small matrices beside each of lora_targets
    lora_alpha: float = SALMONN_LORA.alpha  # their product counts lora_alpha / lora_rank
    lora_dropout: float = 0.1  # of what enters them, in training
    lora_targets: tuple[str, ...] = SALMONN_LORA.targets  # the last parts of the names of the layers that get LoRA
    window_seconds: float = 0.333333  # of the audio that one Q-Former call sees
    num_queries: int = 1  # audio tokens a window
    windows: str = "all"  # "all": also windows of pure padding, as SALMONN; "audio": only those that hold audio
    ears_seconds: str = "30"  # that Whisper hears, as student.ears_seconds
    qformer_width: int = 768  # a head for every 64
    qformer_layers: int = 2  # of it
    qformer_dropout: float = 0.1  # in training
    checkpoint: bool = False  # write SALMONN's own format, teacher.pth, beside the folder

    def __post_init__(self):
        check_section("teach", self)


@dataclass(frozen=True)
class Config:
    """A run."""

    name: str = "run"  # of the run
    seed: int = 0  # of all that is drawn at random
    runs: str = "runs"  # the run's folder is `runs/NAME`
    precision: str = "auto"  # of products: "float32", "bf16", "fp16" with loss scaling, or "auto": on a GPU bf16 where
    # it has that (Ampere and later), else fp16; on a CPU float32
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: Augmentation = field(default_factory=Augmentation)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    on_policy: OnPolicyConfig = field(default_factory=OnPolicyConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    scratch: ScratchConfig = field(default_factory=ScratchConfig)
    teach: TeachConfig = field(default_factory=TeachConfig)

    def __post_init__(self):
        check_section("", self)
        check_config(self)

    @property
    def run_folder(self) -> Path:
        return Path(self.runs) / self.name

    @property
    def cache_folder(self) -> str | Path:
        """Where the teacher's targets are: a folder, or the URL of one."""
        return join_place(self.cache.folder, "") if self.cache.folder else join_place(self.data.folder, "cache")

    @property
    def answers_folder(self) -> str | Path:
        """Where the student's answers of the round are, with the teacher's targets."""
        return join_place(self.cache_folder, f"round-{self.on_policy.round}")

    def manifest(self, split: str) -> Path | None:
        """The manifest that a split is packed from; None where there is none."""
        if self.corpus.kind == "synth":
            return Path(self.data.folder) / "corpus" / f"{split}.json"
        if self.cuts_valid and split in ("train", "valid"):
            return Path(self.data.folder) / "manifests" / f"{split}.json"
        named = getattr(self.corpus, split)
        return Path(named) if named else None

    @property
    def cuts_valid(self) -> bool:
        """Whether the validation split is cut from the training manifest."""
        return self.corpus.kind == "manifest" and not self.corpus.valid and self.corpus.valid_share > 0

    def shards(self, split: str) -> str | Path:
        """The folder of a split's shards, or its URL: "train", "valid" or "test"."""
        place = join_place(self.data.folder, split)
        return f"{place}/" if is_remote(str(place)) else place


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and `section.key=value` words over the defaults.

    Args:
        path: the path of the file; or a run's folder, or a recipe's name.
        overrides: the words.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a key is unknown, of the wrong type or out of range, or holds what looks like a secret.
    """
    path = find_config(path)
    tree: dict = {}
    for file, layer in [*read_files(path), (path, read_words(overrides, takes_text))]:
        refuse_secrets(layer, str(file))
        check_keys(layer, str(file))
        leave_out_other_codec_(tree.get("cache", {}), layer.get("cache", {}).get("codec"))
        lay_over_(tree, layer)
    try:
        return Config(**{name: SECTIONS[name](**value) if name in SECTIONS else value for name, value in tree.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


SECTIONS = {outer.name: outer.type for outer in dataclasses.fields(Config) if dataclasses.is_dataclass(outer.type)}
FIELDS = {  # the type of every field by its dotted name, in the order of the dataclasses
    name: kind
    for outer in dataclasses.fields(Config)
    for name, kind in (
        [(f"{outer.name}.{own.name}", own.type) for own in dataclasses.fields(outer.type)]
        if outer.name in SECTIONS
        else [(outer.name, outer.type)]
    )
}


def list_fields() -> list[str]:
    """The dotted name of every field."""
    return list(FIELDS)


def takes_text(key: str) -> bool:
    """Whether a field takes text, or an entry of one that takes texts by name, such as `loss.schedules.kl`."""
    return FIELDS.get(key) is str or FIELDS.get(key.rpartition(".")[0]) == dict[str, str]


def check_keys(layer: dict, origin: str) -> None:
    """Refuse what no field can take, and leave out sections whose fields are all commented out, in place.

    Args:
        layer: what a file or the words say.
        origin: the file's name.

    Raises:
        ValueError: naming the key, and those that it may mean.
    """
    for name in [name for name, value in layer.items() if name in SECTIONS and is_null(value)]:
        del layer[name]
    for name, value in layer.items():
        inner = {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) and value else {}
        for key, one in (inner or {name: value}).items():
            if key not in FIELDS and key not in SECTIONS:
                meant = did_you_mean(nearest_fields(key, list_fields()), "`distill new` writes all of them.")
                raise ValueError(f"{origin}: field is {key}, but there is none of that name; {meant}")
            if "${" in str(one):
                raise ValueError(
                    f"{origin}: {key} is {one}, but nothing stands in for ${{…}} here; write the value itself, or let "
                    f"the shell put it behind the command, as {key}=$NAME."
                )
        if name in SECTIONS and not isinstance(value, dict):
            raise ValueError(f"{origin}: {name} is {value!r}, but is a section with fields; write {name}.FIELD=value.")


def leave_out_other_codec_(cache: dict, codec: str | None) -> None:
    """Take out, in place, what a file says for its own codec where another is laid over it that does not read it."""
    if codec in CODECS:
        for name in set(CODEC_FIELDS) - set(find_codec(codec).settings):
            cache.pop(name, None)


def to_yaml(config: Config) -> str:
    """The resolved config as YAML."""
    tree = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples as lists, which is how YAML has them
    tree["loss"]["hidden_layers"] = config.loss.hidden_layers
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def fingerprint(value) -> str:
    """sha256 of plain data and dataclasses as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=dataclasses.asdict)
    return hashlib.sha256(text.encode()).hexdigest()
