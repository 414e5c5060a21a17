"""What of the teacher a target cache carries, so that training needs no teacher: tokenizer, prompts, and the head.

They lie in the cache's folder `teacher`, written once and whole; the cache's header holds their hashes. The head is
there only where targets are hidden states, which become logits through it. Knows no target.

Shapes: V vocabulary, D LLM width.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import AutoTokenizer

from shards.files.hash import remember_hash
from shards.files.space import explain_full_disk
from shards.files.write import as_system_errors, folder_atomically, remove_leftovers
from shards.targets.header import CacheHeader
from teachers.files.loading import hash_tensors
from teachers.files.weights import open_safetensors, read_json
from teachers.logits import logit_transform
from teachers.salmonn import Salmonn
from teachers.words.prompts import Prompts
from teachers.words.rows import RowTokenizer

FOLDER, HEAD, TOKENIZER, PROMPTS = "teacher", "head.safetensors", "tokenizer", "prompts.json"


def head_tensor(model: Salmonn) -> Tensor:
    """The weight of the teacher's head, detached.

    Raises:
        ValueError: the head is not one float matrix, so that hidden states alone do not give the logits.
    """
    head = model.llm.get_output_embeddings()
    is_bare = logit_transform(model.llm.config.get_text_config()) == {"softcap": None, "logit_scale": 1.0}
    if type(head) is not nn.Linear or head.bias is not None or not is_bare:
        raise ValueError(
            f"head of {model.config.llm} is {head}, but cache.codec=hidden needs a linear layer without bias, LoRA, "
            f"quantization, soft cap or scale; choose another codec."
        )
    return head.weight.detach()


def hash_head(weight_VD: Tensor) -> str:
    """sha256 of a head's type, shape and bytes."""
    return hash_tensors({"weight": weight_VD})


def hash_prompts(prompts: Prompts) -> str:
    """sha256 of every task's prompts."""
    text = json.dumps({t: list(p) for t, p in prompts.by_task.items()}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def save_parts(cache: Path, model: Salmonn, *, with_head: bool) -> None:
    """Write the folder `teacher` of a cache, unless it is there; of two processes one wins, and both find it whole.

    Raises:
        OSError: the disk is full; nothing is left under the folder's name.
    """
    final = cache / FOLDER
    if not final.is_dir():
        try:
            with explain_full_disk(cache, "the teacher's tokenizer and head need"), folder_atomically(final) as folder:
                _write_parts(folder, model, with_head=with_head)
        except OSError:
            if not final.is_dir():  # else another process was first, and may have cleared ours away
                raise
    remove_leftovers(cache, FOLDER)  # of a process that was killed, or that finds `final` here


def _write_parts(folder: Path, model: Salmonn, *, with_head: bool) -> None:
    with as_system_errors():
        model.tokenizer.save_pretrained(folder / TOKENIZER)
    prompts = {"by_task": dict(model.rows.prompts.by_task), "template": model.rows.prompts.template}
    (folder / PROMPTS).write_text(json.dumps(prompts))
    if with_head:
        (folder / HEAD).write_bytes(save({"weight": head_tensor(model).cpu().contiguous()}))


def load_head(cache: Path, header: CacheHeader) -> Tensor:
    """The teacher's head from a cache, float32 where the CPU multiplies; weight_VD.

    Raises:
        ValueError: it is missing, or is not the one that the header names.
    """
    path, expected = cache / FOLDER / HEAD, header.identity["codec"]["head"]
    if not path.is_file():
        raise ValueError(
            f"{path} is not there, but targets of codec hidden need the head {expected[:16]}; restore it, or delete "
            f"{cache} and cache again."
        )
    with open_safetensors(path) as file:
        weight_VD = file.get_tensor("weight")
    found = remember_hash(path, lambda _: hash_head(weight_VD), "head")
    if found != expected:
        raise ValueError(f"{path} has hash {found[:16]}, but was cached as {expected[:16]}; restore it or cache again.")
    return weight_VD if torch.cuda.is_available() else weight_VD.float()


def load_rows(cache: Path, header: CacheHeader) -> RowTokenizer:
    """What turns a sample into the teacher's own rows, from a cache; it makes rows without audio tokens.

    Raises:
        ValueError: tokenizer or prompts are missing, or are not those that the header names.
    """
    folder, settings = cache / FOLDER, header.identity["teacher_config"]
    if not (folder / PROMPTS).is_file():
        raise ValueError(f"{folder} is not whole, but holds a cache's tokenizer and prompts; restore it.")
    stored = read_json(folder / PROMPTS, "by_task", "template")
    prompts = Prompts(stored["by_task"], stored["template"])
    if hash_prompts(prompts) != header.identity["prompts"]:
        raise ValueError(
            f"{folder / PROMPTS} has hash {hash_prompts(prompts)[:16]}, but was cached as "
            f"{header.identity['prompts'][:16]}; restore it or cache again."
        )
    tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZER)
    given = [settings[name] for name in ("end_token", "max_answer_tokens", "bos_token")]
    return RowTokenizer(tokenizer, prompts, *given)
