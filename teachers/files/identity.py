"""All that a model's word depends on, as plain data: the part of it that an online teacher and a cache have in common.

A model is known by its contents, wherever it lies.
"""

from dataclasses import asdict

import torch

from teachers.ears.precision import describe_precision
from teachers.files.cacheparts import hash_prompts
from teachers.files.loading import PARTS, hash_frozen_parts, hash_tensors, own_tensors
from teachers.salmonn import Salmonn
from teachers.words.vocabulary import Vocabulary

EARS = ("whisper.", "second.")  # whose tensors are hashed in one precision, whatever they are loaded in
FRONT_END = "teachers.frontend 2"  # 2: clips under 1 s are heard with silence up to it


def describe_model(model: Salmonn, dtype: torch.dtype) -> dict:
    """Weights, settings, words and front end of a model.

    Args:
        model: with its LLM's weights or without.
        dtype: the data type of the products around it.
    """
    own = {name: x.to(dtype) if name.startswith(EARS) else x for name, x in own_tensors(model).items()}
    return {
        "teacher_weights": {"own": hash_tensors(own), **hash_frozen_parts(model)},
        "teacher_config": {name: value for name, value in asdict(model.config).items() if name not in PARTS},
        "llm_width": model.project.out_features,
        "tokenizer": asdict(Vocabulary.of(model.tokenizer)) | {"name": "cached"},
        "prompts": hash_prompts(model.rows.prompts),
        "front_end": FRONT_END,
        "dtype": str(dtype),
        "ears": describe_precision(model.whisper),
        "ends": {"own": model.rows.end_ids, "stops": model.end_ids},
        **({} if model.llm_bits == "none" else {"llm_bits": model.llm_bits}),  # caches of before have no such word
    }
