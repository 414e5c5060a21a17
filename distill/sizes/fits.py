"""What training, caching and answering hold on each GPU, part by part, before there is one: `distill plan --gpus N`.

Models are built on the meta device and a step of the largest micro-batch goes through them there; what it holds is
counted tensor by tensor (`memory.py`). What cannot be seen so stands in the table by name. Knows configs and sizes,
no weights.

Shapes: B clips of a micro-batch, T LLM positions, S supervised positions, R encoder frames, E encoder width, D LLM
width, V vocabulary.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from distill.config import Config
from distill.objective.head import TILE_ELEMENTS
from distill.sizes.costs import (
    BEHIND_EARS,
    Blueprint,
    Usage,
    build_on_meta,
    describe_student,
    describe_teacher,
    measure_sizes,
    student_titles,
)
from distill.sizes.memory import MemoryEfficientAttention, Peak, PeakMemory
from shards.sample import MAX_SECONDS
from students.ears import find_held
from students.student import trained_names
from teachers.lora import add_lora_
from teachers.salmonn import Salmonn

CUDA_CONTEXT = 0.6e9  # of the driver, torch's kernels and cuBLAS' workspace on each GPU: a guess until one is measured
FRAGMENTS = 0.05  # of what is allocated, in holes between the blocks of torch's allocator: another guess
FLOAT32 = 4


@dataclass(frozen=True)
class Cards:
    """The GPUs that a plan is for."""

    number: int = 2
    gigabytes: float = 24.0  # 10^9 bytes, of each
    zero_stage: int = 2  # DeepSpeed's; 0: DDP
    splits_frozen: bool = False  # FSDP2's launch, under which what is trained is DDP's

    def hold(self, need: "Need") -> bool:
        """Whether a stage fits."""
        return need.total <= self.gigabytes * 1e9


@dataclass(frozen=True)
class Need:
    """What a stage holds on each GPU: bytes by what they are for."""

    stage: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """With what no part is to blame for."""
        return sum(self.parts.values()) * (1 + FRAGMENTS) + CUDA_CONTEXT


@dataclass(frozen=True)
class Fit:
    """Whether a config fits, and with what."""

    needs: list[Need]  # as it is
    words: list[str] | None  # `key=value` with which all fit; None: no words help
    advice: str  # for people; empty where it fits as it is


def longest(given: dict) -> Usage:
    """The clip that a plan is for, where `given` does not say otherwise: as long as can be, with a long answer."""
    defaults = {"seconds": MAX_SECONDS, "prompt_tokens": 30, "answer_tokens": 100}
    return Usage(**{name: given.get(name, value) for name, value in defaults.items()})


def plan_memory(config: Config, cards: Cards, usage: Usage) -> list[Need]:
    """What each stage of a config holds on each of the cards."""
    teacher, given = describe_teacher(config)
    student = describe_student(config, teacher)
    needs = [need_of_training(config, cards, usage, student, given)]
    if config.teacher.online or config.on_policy.step_share:
        needs[0] = add_online_teacher(needs[0], config, usage, teacher, given)
    if not config.teacher.online:
        needs.append(need_of_caching(config, usage, teacher, given))
    answering = need_of_answering(student, given, usage, config.eval.batch_size * config.eval.num_beams)
    return [*needs, Need("evaluate: the student answers", answering)]


# Training


def need_of_training(config: Config, cards: Cards, usage: Usage, student: Blueprint, given: dict) -> Need:
    """A rank that trains on cached targets, or on those of a teacher that is not counted here."""
    size, split = config.train.micro_batch_size, max(1, cards.number) if cards.zero_stage else 1
    model = build_for_training(student, given)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    connector = measure_connector(model, size, usage)
    llm = measure_llm(model, size, usage, recompute=config.train.gradient_checkpointing)
    ears = measure_hearing(config, student, model, usage)
    moment_bytes = 2 if config.train.optimizer == "adamw_8bit" else 2 * FLOAT32
    beside = max(ears.total - ears.forward - llm.forward, llm.total - llm.forward, connector.total - connector.forward)
    parts = {
        **weights_of(measure_sizes(student, given), student.trained, trained),
        "gradients": trained * FLOAT32 / (split if cards.zero_stage >= 2 else 1),
        "AdamW's moments": trained * moment_bytes / split,
        "the average of what is trained": trained * FLOAT32 if config.train.ema else 0.0,
        "ZeRO's own copy of what is trained": trained * FLOAT32 / split if cards.zero_stage else 0.0,
        "ZeRO's buffer of gradients": trained * FLOAT32 if cards.zero_stage else 0.0,
        "activations of the ears": ears.forward,
        "activations of the connector": connector.forward,
        "activations of the LLM": llm.forward,
        "at the peak beside them": beside + largest_weight(student, model),
        "the objective's tiles of logits": objective_bytes(model, size, usage),
    }
    if cards.splits_frozen:
        parts |= split_blocks(parts["LLM"], model.llm, cards.number)
    parts = {name: value for name, value in parts.items() if value}
    return Need(f"train: {size} clips a micro-batch", parts)


def weights_of(sizes: dict[str, tuple[int, float]], parts: Collection[str], trained: int) -> dict[str, float]:
    """Bytes of a student's weights: some parts are trained, and float32 whatever the rest is in."""
    frozen = {part: size for part, (_, size) in sizes.items() if part not in parts}
    ears = sum(size for part, size in frozen.items() if part not in BEHIND_EARS)
    return {"ears": ears, "LLM": sum(frozen.values()) - ears, "what is trained": trained * FLOAT32}


def split_blocks(num_bytes: float, llm: nn.Module, number: int) -> dict[str, float]:
    """What a rank holds of a LLM's frozen weights under FSDP2: its part, and blocks that are whole meanwhile.

    Args:
        num_bytes: what all of them take.
        llm: the LLM, on the meta device.
        number: the ranks.
    """
    outside = {*llm.get_input_embeddings().parameters(), *llm.get_output_embeddings().parameters()}  # stay whole
    whole = sum(p.numel() * p.element_size() for p in outside)
    blocks = num_bytes - whole
    two = 2 * blocks / llm.config.get_text_config().num_hidden_layers  # that which runs, and the next
    return {"LLM": whole + blocks / number, "two blocks of it, gathered": two if number > 1 else 0.0}


def build_for_training(blueprint: Blueprint, given: dict) -> Salmonn:
    """The model on the meta device, with LoRA, in the type that its products run in."""
    model = build_on_meta(blueprint, given).to(blueprint.dtype)
    with torch.device("meta"):
        if blueprint.lora is not None:
            add_lora_(model.llm, blueprint.lora)
    model.to(blueprint.dtype).train()
    trained = trained_names(model, train_ears=blueprint.trains_ears)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model


def measure_llm(model: Salmonn, size: int, usage: Usage, *, recompute: bool = False) -> Peak:
    """A forward and a backward of the LLM's blocks on `size` rows of the usage's length.

    With `recompute` each block keeps its input alone; the first block is then measured by itself.
    """
    length = row_length(model, usage)
    if not recompute:
        return run_blocks(model, size, length)
    layers = model.llm.config.get_text_config().num_hidden_layers
    inputs = layers * size * length * model.project.out_features * model.project.weight.element_size()
    one = run_blocks(model, size, length, num_layers=1)
    return Peak(inputs, inputs + one.total)


def run_blocks(model: Salmonn, size: int, length: int, num_layers: int | None = None) -> Peak:
    """What a forward and a backward of the LLM without its head hold, or of its first layers alone."""
    base, dtype = model.llm.base_model, model.project.weight.dtype
    embeds_BTD = torch.empty(size, length, model.project.out_features, device="meta", dtype=dtype, requires_grad=True)
    mask_B1TT = torch.empty(size, 1, length, length, device="meta", dtype=torch.bool)
    blocks = getattr(base, "layers", None)
    if num_layers is not None:
        base.layers = blocks[:num_layers]
    try:
        with MemoryEfficientAttention(), PeakMemory([*model.parameters(), embeds_BTD]) as memory:
            states = base(inputs_embeds=embeds_BTD, attention_mask=mask_B1TT, use_cache=False).last_hidden_state
            held = memory.held
            torch.autograd.grad(states.sum(), embeds_BTD)
    finally:
        if num_layers is not None:
            base.layers = blocks
    return Peak(held, memory.peak)


def measure_connector(model: Salmonn, size: int, usage: Usage) -> Peak:
    """A forward and a backward of LayerNorms, Q-Former and projection."""
    frames = list(frames_of(model, size, usage))
    num_windows = model.num_windows(usage.num_samples)
    num_frames_B = [model.num_frames(usage.num_samples)] * size
    with MemoryEfficientAttention(), PeakMemory(model.parameters()) as memory:
        queries_BWQE = model.qformer(model.fuse(frames), num_windows, num_frames_B)
        tokens = model.project(queries_BWQE.to(model.project.weight.dtype))
        held = memory.held
        trained = [p for p in (*model.qformer.parameters(), *model.project.parameters()) if p.requires_grad]
        torch.autograd.grad(tokens.sum(), trained, allow_unused=True)
    return Peak(held, memory.peak)


def frames_of(model: Salmonn, size: int, usage: Usage) -> Iterator[Tensor]:
    """Each encoder's frames of `size` clips."""
    for ear in (model.whisper, model.second):
        if ear is not None:
            yield torch.empty(size, model.num_frames(usage.num_samples), ear.width, device="meta",
                              dtype=model.project.weight.dtype)  # fmt: skip


def measure_hearing(config: Config, student: Blueprint, model: Salmonn, usage: Usage) -> Peak:
    """The ears in a step: frozen ones keep nothing for a backward, and where frames are cached they do not hear."""
    size = config.train.micro_batch_size
    if student.trains_ears:
        return measure_trained_ear(model, size, usage, recompute=config.train.gradient_checkpointing)
    is_cached = config.cache.frames != "none" and not config.teacher.online
    return Peak(0, 0 if is_cached else measure_ears(model, size, usage))


def measure_trained_ear(model: Salmonn, size: int, usage: Usage, *, recompute: bool = False) -> Peak:
    """A forward and a backward of Whisper, which is trained or has LoRA, on `size` clips; as `measure_llm`."""
    encoder, mel_BMX = model.whisper.encoder, model.whisper.features_on_meta(usage.num_samples)[0]
    mel_BMX = mel_BMX.to(model.project.weight.dtype).expand(size, -1, -1)
    layers = encoder.layers
    if not recompute:
        return run_ear(model.whisper, mel_BMX)
    encoder.layers = layers[:1]
    try:
        one = run_ear(model.whisper, mel_BMX)
    finally:
        encoder.layers = layers
    inputs = len(layers) * size * encoder.config.max_source_positions * model.whisper.width * mel_BMX.element_size()
    return Peak(inputs, inputs + one.total)


def run_ear(ear: nn.Module, mel_BMX: Tensor) -> Peak:
    """What a forward and a backward of Whisper hold."""
    first = next(p for p in ear.parameters() if p.requires_grad)
    with MemoryEfficientAttention(), PeakMemory([*ear.parameters(), mel_BMX]) as memory:
        frames_BRE = ear.encode(mel_BMX)
        held = memory.held
        torch.autograd.grad(frames_BRE.sum(), first)
    return Peak(held, memory.peak)


def measure_ears(model: Salmonn, size: int, usage: Usage) -> int:
    """The most that the frozen ears hold while they hear `size` clips, one encoder after the other."""
    peak = kept = 0
    for ear in (model.whisper, model.second):
        if ear is None:
            continue
        features = (x.to(model.project.weight.dtype) if x.is_floating_point() else x
                    for x in ear.features_on_meta(usage.num_samples))  # fmt: skip
        with torch.no_grad(), MemoryEfficientAttention(), PeakMemory(ear.parameters()) as memory:
            frames = ear.encode(*features)
        peak, kept = max(peak, kept + size * memory.peak), kept + size * memory.held
        del frames
    return peak


def largest_weight(blueprint: Blueprint, model: Salmonn) -> float:
    """Bytes of the largest 4-bit weight when it is read back for its product; 0 for a LLM that is not in 4 bits."""
    if not blueprint.is_4bit:
        return 0.0
    head = model.llm.get_output_embeddings()
    linears = [m.weight for m in model.llm.modules() if isinstance(m, nn.Linear) and m is not head]
    return max(w.numel() * w.element_size() for w in linears)


def objective_bytes(model: Salmonn, size: int, usage: Usage) -> float:
    """Logits of a tile, its rows of the head in float32, and the two means of rows that become the gradient."""
    positions, width = size * usage.answer_tokens, model.project.out_features
    rows = TILE_ELEMENTS["cuda"] / max(1, positions)
    vocab_size = model.llm.get_output_embeddings().out_features
    rows = min(rows, vocab_size)
    return FLOAT32 * (2 * rows * positions + rows * width + 4 * positions * width)


def row_length(model: Salmonn, usage: Usage) -> int:
    """Positions of a row: prompt, audio, answer."""
    return usage.prompt_tokens + model.num_audio_tokens(usage.num_samples) + usage.answer_tokens


# Caching and answering


def need_of_caching(config: Config, usage: Usage, teacher: Blueprint, given: dict) -> Need:
    """The teacher that hears, is scored on the answers and, where clips have none, answers itself."""
    size = config.cache.batch_size
    parts = need_of_answering(teacher, given, usage, size * config.cache.num_beams)
    beams, forward = parts.pop("keys and values"), measure_targets(teacher, given, size, usage)
    parts["its answers' keys and values" if beams > forward else "a forward, with all logits"] = max(beams, forward)
    return Need(f"cache: {size} clips a batch", parts)


def add_online_teacher(need: Need, config: Config, usage: Usage, teacher: Blueprint, given: dict) -> Need:
    """A training rank that holds its teacher too; ears with the same weights are there once."""
    sizes = measure_sizes(teacher, given)
    llm = sum(size for part, (_, size) in sizes.items() if part in BEHIND_EARS)
    held = student_titles(config, teacher, find_held)
    ears = sum(size for part, (_, size) in sizes.items() if part not in BEHIND_EARS and part not in held)
    targets = measure_targets(teacher, given, config.train.micro_batch_size, usage)
    parts = need.parts | {"the online teacher's LLM and connector": llm}
    if ears:
        parts["the online teacher's ears"] = ears
    parts["at the peak beside them"] = max(parts["at the peak beside them"], targets)
    return Need(f"{need.stage}, teacher online", parts)


def need_of_answering(blueprint: Blueprint, given: dict, usage: Usage, num_rows: int) -> dict[str, float]:
    """A model that answers `num_rows` rows at once, beams among them."""
    sizes = measure_sizes(blueprint, given)
    model = build_on_meta(blueprint, given)
    text = model.llm.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    a_position = 2 * text.num_hidden_layers * heads * head_size * blueprint.dtype.itemsize
    ears = sum(size for part, (_, size) in sizes.items() if part not in BEHIND_EARS)
    return {
        "ears": ears,
        "LLM and connector": sum(size for _, size in sizes.values()) - ears,
        "keys and values": num_rows * row_length(model, usage) * a_position,
    }


def measure_targets(blueprint: Blueprint, given: dict, size: int, usage: Usage) -> float:
    """The teacher's forward on `size` clips: its ears, or its logits with their logarithms, whichever is more."""
    model = build_on_meta(blueprint, given).to(blueprint.dtype)
    vocab_size = model.llm.get_output_embeddings().out_features
    logits = 3 * FLOAT32 * size * usage.answer_tokens * vocab_size  # as they come, float32, their log-softmax
    return max(measure_ears(model, size, usage), logits)


# Words


def format_needs(needs: list[Need], cards: Cards, usage: Usage) -> str:
    """A table of every stage's parts on one card, in GB, and whether it fits."""
    launch = f"ZeRO-{cards.zero_stage}" if cards.zero_stage else "FSDP2" if cards.splits_frozen else "DDP"
    lines = [
        f"on each of {cards.number} GPUs of {cards.gigabytes:g} GB, {launch}; clips of {usage.seconds:g} s, prompts of "
        f"{usage.prompt_tokens} tokens, answers of {usage.answer_tokens}; GB, 10^9 bytes"
    ]
    for need in needs:
        fits = "fits" if cards.hold(need) else f"does not fit in {cards.gigabytes:g}"
        lines.append(f"\n{need.stage}: {need.total / 1e9:.2f} ({fits})")
        lines += [f"  {name:<40}{size / 1e9:>8.2f}" for name, size in need.parts.items()]
        rest = need.total - sum(need.parts.values())
        lines.append(f"  {'driver, kernels, holes':<40}{rest / 1e9:>8.2f}")
    return "\n".join(lines)


def describe_needs(needs: list[Need], cards: Cards) -> list[dict]:
    """The same for a script, in bytes."""
    return [{"stage": n.stage, "bytes": n.total, "fits": cards.hold(n), "parts": n.parts} for n in needs]


def advise(config: Config, cards: Cards, usage: Usage) -> list[str] | None:
    """The `key=value` words with which every stage fits, the mildest first; none are needed: []; none help: None.

    None of them changes what a step computes, but for a teacher that is cached instead of online, or asked in int8.
    """
    words, needs = shrink(config, cards, usage, plan_memory(config, cards, usage))
    return words if all(map(cards.hold, needs)) else None


def shrink(config: Config, cards: Cards, usage: Usage, needs: list[Need]) -> tuple[list[str], list[Need]]:
    """The words of `advise` as far as there are any, and what each stage holds with them; `needs` without."""
    words: list[str] = []
    while short := [need for need in needs if not cards.hold(need)]:
        change = next_change(config, short)
        if change is None:
            break
        section, name, value = change
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
        words = [w for w in words if not w.startswith(f"{section}.{name}=")] + [
            f"{section}.{name}={str(value).lower()}"
        ]
        needs = plan_memory(config, cards, usage)
    return words, needs


def next_change(config: Config, short: list[Need]) -> tuple[str, str, object] | None:
    """The mildest change that is left for the stages that do not fit: section, field and value."""
    stages = {need.stage.split(":")[0] for need in short}
    if "train" in stages and not config.train.gradient_checkpointing:
        return "train", "gradient_checkpointing", True
    sizes = {
        "train": ("train", "micro_batch_size"),
        "cache": ("cache", "batch_size"),
        "evaluate": ("eval", "batch_size"),
    }
    for stage, (section, name) in sizes.items():
        size = getattr(getattr(config, section), name)
        if stage in stages and size > 1:
            return section, name, size // 2
    if "train" in stages and config.teacher.online:
        return "teacher", "online", False
    return ("teacher", "quantization", "int8") if "cache" in stages and config.teacher.quantization == "none" else None


def find_fit(config: Config, cards: Cards, usage: Usage) -> Fit:
    """What each stage holds, and what to change where one does not fit."""
    needs = plan_memory(config, cards, usage)
    if all(map(cards.hold, needs)):
        return Fit(needs, [], "")
    words, least = shrink(config, cards, usage, needs)
    if all(map(cards.hold, least)):
        return Fit(needs, words, f"It fits with {' '.join(words)}")
    return Fit(needs, None, refuse(least, words))


def refuse(least: list[Need], words: list[str]) -> str:
    """That nothing helps: what the largest stage needs with all words, and what would help."""
    most = max(least, key=lambda need: need.total)
    return (
        f"No batch is small enough: even with {' '.join(words) or 'the smallest'} {most.stage} needs "
        f"{most.total / 1e9:.2f} GB; take a smaller LLM, student.quantization=nf4, or a larger card."
    )
