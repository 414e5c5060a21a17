"""What each part of teacher and student costs: parameters, bytes and FLOPs a sample, for any config, without weights.

The models are built on the meta device from the sizes in their configs: of a local folder or the hub's local copy, else
the published ones in `known_models.json`, else the hub's. `table.py` shows the figures.

Shapes: B batch, T LLM positions, S supervised positions, L audio tokens, X mel frames, M mel bins, D LLM width.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.initialization import no_init_weights

from distill.config import Config
from distill.demo.scratch import build_llm, build_whisper, teacher_config
from distill.student import lora_of, student_llm
from distill.teach import lora_of as lora_of_teacher
from distill.teach import salmonn_config
from distill.teacher import teacher_path
from shards.sample import SAMPLE_RATE
from students.quantize import nf4_bytes
from teachers.ears.encoders import ENCODERS, WHISPER, build_encoder, find_encoder
from teachers.ears.length import FULL
from teachers.ears.shape import reshape_ears_
from teachers.ears.whisper import whisper_fields
from teachers.experts import Experts, split_experts_
from teachers.files.loading import refuse_foreign
from teachers.int8 import int8_bytes, is_linear
from teachers.kinds import KINDS, find_kind
from teachers.lora import Lora, add_lora_
from teachers.salmonn import Salmonn, SalmonnConfig
from teachers.words.prefix import add_prefix_, is_of_prefix
from teachers.words.templates import SALMONN_TEMPLATE

KNOWN_MODELS = Path(__file__).with_name("known_models.json")
NO_TOKENIZER = SimpleNamespace(bos_token_id=0, eos_token_id=0, pad_token_id=0)
TRAINED = ("LayerNorms", "Q-Former", "projection", "LoRA", "prefix")
BEHIND_EARS = ("LayerNorms", "Q-Former", "projection", "LLM embeddings", "LLM body", "LoRA", "prefix", "LLM head")


@dataclass(frozen=True)
class Usage:
    """The sample that FLOPs are counted for."""

    seconds: float = 10.0  # of audio
    prompt_tokens: int = 20  # text around the audio
    answer_tokens: int = 30  # with the end token

    @property
    def num_samples(self) -> int:
        """Of the audio."""
        return round(self.seconds * SAMPLE_RATE)


@dataclass(frozen=True)
class Part:
    """One part of a model. FLOPs are of one sample's forward; a multiplication and an addition are two."""

    name: str
    parameters: int
    bytes: float
    flops: int


@dataclass(frozen=True)
class Blueprint:
    """All that decides a model's sizes."""

    config: SalmonnConfig
    lora: Lora | None
    dtype: torch.dtype  # of what is frozen
    is_4bit: bool = False
    is_8bit: bool = False
    kind: str = "saved"  # of `teachers.kinds.KINDS`; a student is built as that is
    trains_ears: bool = False  # of a student: all of its Whisper, or the LoRA that this has

    @property
    def trained(self) -> tuple[str, ...]:
        """The parts that a student trains; LoRA on its Whisper is among the LoRA."""
        is_whole = self.trains_ears and not self.config.ears_lora_rank
        return (*TRAINED, *([find_encoder(WHISPER).title] if is_whole else []))


def ear_titles() -> tuple[str, ...]:
    """The parts of a table that are encoders."""
    return tuple(find_encoder(name).title for name in ENCODERS)


def describe_teacher(config: Config) -> tuple[Blueprint, dict[str, PretrainedConfig]]:
    """The teacher that a run's config names, and the configs of parts that are yet to be trained here."""
    dtype = frozen_dtype(config)
    if is_of_given_parts(config):
        return Blueprint(salmonn_config(config), lora_of_teacher(config.teach), dtype), {}
    path, how = teacher_path(config), {"dtype": dtype, "is_8bit": config.teacher.quantization == "int8"}
    if not config.teacher.path:
        return Blueprint(teacher_config(config.scratch, path.parent), None, **how), scratch_configs(config)
    kind = find_kind(path)
    return Blueprint(*KINDS[kind].describe(config.teacher, path), kind=kind, **how), {}


def is_of_given_parts(config: Config) -> bool:
    """Whether `distill teach` makes the teacher of parts that the config names; such a config has no student."""
    return bool(config.teacher.llm) and not config.teacher.path and not config.scratch.steps


def describe_student(config: Config, teacher: Blueprint) -> Blueprint:
    """The student: the teacher's Q-Former sizes, and its ears or those that the config names, on its own LLM."""
    hearing, is_4bit = config.student.hearing, config.student.quantization == "nf4"
    own = {"llm": student_llm(config), "prefix_tokens": config.student.prefix_tokens}
    salmonn = dataclasses.replace(hearing.of(teacher.config), **own)
    return Blueprint(salmonn, lora_of(config), frozen_dtype(config), is_4bit, trains_ears=hearing.trains_ears)


def student_titles(config: Config, teacher: Blueprint, find: Callable[..., Set[str]]) -> set[str]:
    """Titles of the student's ears that one of `students.ears`' `find_…` finds: those that are its teacher's, say."""
    student = describe_student(config, teacher)
    kinds = {"whisper": WHISPER, "second": student.config.second_kind}
    found = find(teacher.config, student.config, train_ears=student.trains_ears)
    return {find_encoder(kinds[name]).title for name in found if kinds[name]}


def frozen_dtype(config: Config) -> torch.dtype:
    """Of frozen weights on the GPU that a table is for."""
    return torch.float32 if config.precision == "float32" else torch.bfloat16


def scratch_configs(config: Config) -> dict[str, PretrainedConfig]:
    """Of the parts that `distill teach` has not made yet, by their paths; the vocabulary is as large as allowed."""
    folder, scratch = config.run_folder / "scratch", config.scratch
    with torch.device("meta"):
        llms = {
            "llm": build_llm(scratch.vocab_size, scratch.llm_width, scratch.llm_layers, NO_TOKENIZER),
            "student-llm": build_llm(scratch.vocab_size, scratch.student_width, scratch.student_layers, NO_TOKENIZER),
            "whisper": build_whisper(scratch),
        }
    return {str(folder / name): model.config for name, model in llms.items()}


def model_config(name: str) -> PretrainedConfig:
    """A model's config by folder or hub id: from this disk, from the published sizes kept here, or from the hub.

    Raises:
        FileNotFoundError: none of them has it.
        ValueError: only code of its own repository can run it.
    """
    if Path(name).is_dir():
        refuse_foreign(name)
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError):
        known = json.loads(KNOWN_MODELS.read_text())
    if name in known:
        return AutoConfig.for_model(**known[name])
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"model is {name!r}, but it is no folder here, the hub does not give it ({str(error).splitlines()[0]}) and "
            f"its sizes are not among {len(known)} known ones; name one of {', '.join(sorted(known)[:4])}, …"
        ) from error


def build_on_meta(blueprint: Blueprint, given: dict[str, PretrainedConfig]) -> Salmonn:
    """The model without weights and without LoRA; its rows cannot be tokenized."""
    config = blueprint.config
    plain = dataclasses.replace(
        config, prompts="", eval_prompts="", end_token="", bos_token="", template=SALMONN_TEMPLATE
    )
    llm_config = _find(config.llm, given)
    with torch.device("meta"):
        if (build_empty := KINDS[blueprint.kind].build_empty) is not None:
            return build_empty(plain, llm_config, blueprint.dtype, NO_TOKENIZER)
        llm = AutoModelForCausalLM.from_config(llm_config, dtype=blueprint.dtype)
        if blueprint.is_4bit:
            split_experts_(llm)  # as the quantizer leaves them
        if config.prefix_tokens:
            add_prefix_(llm, config.prefix_tokens)
        with no_init_weights():  # values that nobody sees
            whisper = build_encoder(WHISPER, whisper_fields(_find(config.whisper, given).to_dict())).to(blueprint.dtype)
            second = None
            if config.second:
                sizes = find_encoder(config.second_kind).sizes_of(config.second)
                second = build_encoder(config.second_kind, sizes).to(blueprint.dtype)
        reshape_ears_(whisper, second, **config.ears_form)
        return Salmonn(plain, llm, NO_TOKENIZER, whisper, second).eval().requires_grad_(False)


def _find(name: str, given: dict[str, PretrainedConfig]) -> PretrainedConfig:
    return given[name] if name in given else model_config(name)


def measure(blueprint: Blueprint, usage: Usage, given: dict[str, PretrainedConfig] | None = None) -> list[Part]:
    """Every part of a model with its cost; parts that a model lacks are not listed."""
    model = build_on_meta(blueprint, given or {})
    num_samples = round(usage.seconds * SAMPLE_RATE)
    num_tokens = model.num_audio_tokens(num_samples)
    flops = {**_count_ears(model, num_samples), **_count_connector(model, num_samples)}
    length = usage.prompt_tokens + num_tokens + usage.answer_tokens
    flops["LLM body"] = _count_body(model, length)
    head = model.llm.get_output_embeddings()
    flops["LLM head"] = count_flops(lambda: head(_empty(usage.answer_tokens, head.in_features, like=head)))
    sizes = _measure_sizes_(model, blueprint)
    if "LoRA" in sizes:
        flops["LoRA"] = 2 * length * count_passed(model.llm)
    in_order = (*ear_titles(), *BEHIND_EARS)
    names = [name for name in in_order if name in sizes or name in flops]  # a tied head has no weights of its own
    return [Part(name, *sizes.get(name, (0, 0.0)), flops.get(name, 0)) for name in names]


def measure_sizes(
    blueprint: Blueprint, given: dict[str, PretrainedConfig] | None = None
) -> dict[str, tuple[int, float]]:
    """Parameters and bytes of each part of a model that it has."""
    return _measure_sizes_(build_on_meta(blueprint, given or {}), blueprint)


def _measure_sizes_(model: Salmonn, blueprint: Blueprint) -> dict[str, tuple[int, float]]:
    """As `measure_sizes`, of a model that is built already; it gets the blueprint's LoRA."""
    head = model.llm.get_output_embeddings()
    linears = [m.weight for m in model.llm.modules() if is_linear(m) and m is not head]
    few_bits = {}
    if blueprint.is_4bit:
        few_bits = {weight: nf4_bytes(weight.numel()) for weight in linears}
    elif blueprint.is_8bit:
        few_bits = {weight: int8_bytes(*weight.shape) for weight in linears}
    if blueprint.lora is not None:
        with torch.device("meta"), no_init_weights():
            add_lora_(model.llm, blueprint.lora)
    return _size_parts(model, few_bits)


def count_passed(llm: nn.Module) -> int:
    """Parameters of a LLM's LoRA that a token passes: of a mixture, those of as many experts as it goes to."""
    mixtures = [module for module in llm.modules() if isinstance(module, Experts)]
    trained, of_experts = (
        sum(p.numel() for m in ms for p in m.parameters() if p.requires_grad) for ms in ([llm], mixtures)
    )
    if not of_experts:
        return trained
    return trained - of_experts + of_experts * llm.config.get_text_config().num_experts_per_tok // len(mixtures[0].up)


def _size_parts(model: Salmonn, few_bits: Mapping[nn.Parameter, float]) -> dict[str, tuple[int, float]]:
    """Parameters and bytes of each part; `few_bits` has the bytes of those weights that are not kept as they are."""
    sizes: dict[str, tuple[int, float]] = {}
    for name, parameter in model.named_parameters():
        number = parameter.numel()
        size = few_bits.get(parameter, number * parameter.element_size())
        title = "LoRA" if parameter.requires_grad else part_of(name, model.config)  # a mixture's routers go with it
        known = sizes.get(title, (0, 0.0))
        sizes[title] = (known[0] + number, known[1] + size)
    return sizes


def part_of(name: str, config: SalmonnConfig) -> str:
    """The part that a tensor of a `Salmonn` belongs to."""
    if "lora_" in name:
        return "LoRA"
    if is_of_prefix(name):
        return "prefix"
    if name.startswith("llm."):
        return {"embed_tokens": "LLM embeddings", "lm_head": "LLM head"}.get(name.split(".")[-2], "LLM body")
    kinds = {"whisper": WHISPER, "second": config.second_kind}
    if (ear := name.split(".")[0]) in kinds:
        return find_encoder(kinds[ear]).title
    titles = {"ln_speech": "LayerNorms", "ln_audio": "LayerNorms",
              "qformer": "Q-Former", "project": "projection"}  # fmt: skip
    return titles[name.split(".")[0]]


def count_flops(forward: Callable) -> int:
    """FLOPs of a forward on the meta device."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops()


def count_layers(owner: nn.Module, forward: Callable) -> int:
    """FLOPs of a forward through `owner.layers` and what is around them: where all are alike, two tell of all."""
    layers = getattr(owner, "layers", ())
    if len(layers) < 3 or len({_form(layer) for layer in layers}) > 1:
        return count_flops(forward)
    try:
        owner.layers = layers[:1]
        one = count_flops(forward)
        owner.layers = layers[:2]
        return one + (len(layers) - 1) * (count_flops(forward) - one)
    finally:
        owner.layers = layers


def _form(layer: nn.Module) -> tuple:
    """What alike layers have in common: their modules, and the shapes of their parameters."""
    return tuple((name, type(m), *(p.shape for p in m.parameters(recurse=False))) for name, m in layer.named_modules())


def _count_ears(model: Salmonn, num_samples: int) -> dict[str, int]:
    ears = [ear for ear in (model.whisper, model.second) if ear is not None]
    features = {ear: ear.features_on_meta(num_samples) for ear in ears}
    if model.config.ears_seconds != FULL:
        features[model.whisper] = (*features[model.whisper], [model.num_speech_frames(num_samples)])
    return {ear.title: count_layers(getattr(ear, "encoder", ear), partial(ear.encode, *features[ear])) for ear in ears}


def _count_connector(model: Salmonn, num_samples: int) -> dict[str, int]:
    width = model.whisper.width + (model.second.width if model.second is not None else 0)
    frames_BRE = _empty(1, model.num_frames(num_samples), width)
    num_windows, project = model.num_windows(num_samples), model.project
    tokens_LE = _empty(model.num_audio_tokens(num_samples), project.in_features, like=project)
    flops = {"projection": count_flops(lambda: project(tokens_LE))}
    if model.qformer is not None:
        flops["Q-Former"] = count_flops(lambda: model.qformer(frames_BRE, num_windows))
    return flops


def _count_body(model: Salmonn, length: int) -> int:
    embeddings = model.llm.get_input_embeddings()
    split_experts_(model.llm)  # the product of fused ones is not counted
    embeds_BTD = _empty(1, length, embeddings.embedding_dim, like=embeddings)
    mask = _empty(1, 1, length, length, like=embeddings)  # given whole: transformers looks into smaller ones
    base = model.llm.base_model
    return count_layers(base, lambda: base(inputs_embeds=embeds_BTD, attention_mask=mask, use_cache=False))


def _empty(*shape: int, like: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype if like is None else like.weight.dtype, device="meta")
