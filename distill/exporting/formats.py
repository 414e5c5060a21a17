"""A finished student for other programs: `distill export RUN OUT --format …`, with what each loses, printed.

Each format takes the student with its LoRA merged, and writes its LLM as that program reads it. The ears stay in torch:
none of these programs hears, all of them take embeddings. The error is that of what was written, read back.

Shapes: S positions of answers, V vocabulary.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from shards.files.write import write_atomically
from shards.sample import Sample
from shards.status import print_status
from students.quantize import quantize_4bit_
from teachers.experts import is_fused
from teachers.salmonn import Salmonn

HOW = "USE.md"  # how the folder is used


@dataclass(frozen=True)
class Format:
    """A way to write a LLM.

    Args:
        help: a line for who chooses.
        write: writes the LLM of a folder (LoRA merged) into another one; gives the LLM back as that program computes
            with it.
        how: what to do with it, in Markdown.
    """

    help: str
    write: Callable[[Path, Path], nn.Module]
    how: str


def write_bf16(llm_folder: Path, out: Path) -> nn.Module:
    """A plain folder of transformers in bfloat16."""
    llm = AutoModelForCausalLM.from_pretrained(llm_folder, dtype=torch.bfloat16)
    llm.save_pretrained(out)
    copy_tokenizer(llm_folder, out)
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)


def write_bnb(llm_folder: Path, out: Path) -> nn.Module:
    """A folder of transformers whose layers are in NF4 again, as bitsandbytes stores them.

    Raises:
        ValueError: it is a mixture, whose experts transformers reads back from no such folder.
    """
    llm = AutoModelForCausalLM.from_pretrained(llm_folder, dtype=torch.float32)
    if any(is_fused(module) for module in llm.modules()):
        raise ValueError(
            f"llm is a {type(llm).__name__}, but a *-bnb-4bit folder has no form for its experts; choose --format "
            f"vllm, or export without --format."
        )
    quantize_4bit_(llm)
    llm.config.quantization_config = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16",
    }  # fmt: skip
    llm.save_pretrained(out)
    copy_tokenizer(llm_folder, out)
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)


def write_gguf_file(llm_folder: Path, out: Path, kind: str) -> nn.Module:
    """One GGUF file whose matrices are of a kind."""
    from distill.exporting.gguf import write_gguf  # gguf is an extra

    tensors = write_gguf(llm_folder, out / f"llm-{kind.lower()}.gguf", kind)
    llm = AutoModelForCausalLM.from_pretrained(llm_folder, dtype=torch.float32)
    parameters = dict(llm.named_parameters())
    with torch.no_grad():
        for name, array in tensors.items():
            parameters[name].copy_(torch.from_numpy(np.array(array)))
    return llm


def copy_tokenizer(source: Path, out: Path) -> None:
    """The tokenizer's files beside the weights."""
    for pattern in ("tokenizer*", "special_tokens_map.json", "*.jinja", "generation_config.json"):
        for file in source.glob(pattern):
            shutil.copyfile(file, out / file.name)


VLLM = """Ears in torch, LLM in vLLM, which takes embeddings:
```python
import vllm
from students import load_student

student = load_student("STUDENT")  # `distill export RUN STUDENT --whole`: its ears and its connector
llm = vllm.LLM("llm", enable_prompt_embeds=True)
batch = student.collate([sample], with_answer=False, first_prompt=True)
embeds = student.embed(batch, student.hear(batch))[0]
print(llm.generate({"prompt_embeds": embeds.bfloat16()}, vllm.SamplingParams(temperature=0))[0].outputs[0].text)
```"""
LLAMA_CPP = """Ears in torch or by `distill export --device openvino`, LLM in llama.cpp, which takes embeddings: fill
`llama_batch_init(n, n_embd, 1)`'s `embd` with the rows that `student.embed` (or `DeviceStudent.embed`) gives, with
`token = NULL` and positions 0 … n − 1, call `llama_decode`, and go on with token ids."""
BNB = """`AutoModelForCausalLM.from_pretrained("llm")` loads it on a GPU; embeddings go in as `inputs_embeds`."""
FORMATS = {
    "vllm": Format("its LLM with LoRA merged in bfloat16, for vLLM and transformers", write_bf16, VLLM),
    "bnb": Format("the same in NF4 again, a *-bnb-4bit folder", write_bnb, BNB),
    "gguf-q8_0": Format("the same as GGUF in 8 bits, for llama.cpp", partial(write_gguf_file, kind="Q8_0"), LLAMA_CPP),
    "gguf-iq4_nl": Format(
        "the same as GGUF in 4 bits, on another grid", partial(write_gguf_file, kind="IQ4_NL"), LLAMA_CPP
    ),
}


def write_format(name: str, student: Salmonn, merged: Path, out: Path, samples: Sequence[Sample]) -> None:
    """Write a student's LLM in a format, print its error, and say how it is used.

    Args:
        name: one of the names of `FORMATS`.
        student: as it was trained.
        merged: folder of its LLM with LoRA merged.
        out: folder to write into.
        samples: clips that both answer.
    """
    form = FORMATS[name]
    folder = out / "llm" if name in ("vllm", "bnb") else out
    folder.mkdir(exist_ok=True)
    llm = form.write(merged, folder).eval()
    text = describe_error(student, llm, samples)
    print_status(f"{name}: {text}")
    write_atomically(out / HOW, f"# {name}\n\n{form.help}. Against the trained student: {text}.\n\n{form.how}\n")


@torch.no_grad()
def describe_error(student: Salmonn, llm: nn.Module, samples: Sequence[Sample]) -> str:
    """How far a LLM's logits along the student's clips are from the student's own, in one line."""
    batch = student.collate(samples)
    heard = student.hear(batch)
    embeds_BTD = student.embed(batch, heard)
    found = []
    for one in (student.llm, llm):
        logits = one(inputs_embeds=embeds_BTD.float(), attention_mask=batch.attention_mask_BT, use_cache=False).logits
        found.append(logits.flatten(0, 1)[batch.predicting_S].float())
    expected_SV, got_SV = found
    logprobs = [logits.log_softmax(-1) for logits in found]
    kl = (logprobs[0].exp() * (logprobs[0] - logprobs[1])).sum(-1).mean()
    error = (got_SV - expected_SV).norm() / expected_SV.norm()
    top1 = (got_SV.argmax(-1) == expected_SV.argmax(-1)).float().mean()
    return f"logits {error:.1e} off, KL {kl:.1e} nats a token, top-1 {top1:.1%} over {len(expected_SV)} tokens"
