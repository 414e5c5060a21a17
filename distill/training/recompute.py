"""Memory for time: each block of a LLM keeps its input alone, and is run again when its gradient is due; so does each
layer of a Whisper that is trained.

Knows LLMs of transformers. Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
"""

from functools import partial

from torch.utils.checkpoint import checkpoint

from teachers.salmonn import Salmonn


def recompute_blocks_(student: Salmonn) -> None:
    """Let every block of a student run again in the backward, in place; its random numbers are drawn again too.

    Raises:
        ValueError: its LLM's blocks cannot.
    """
    llm, whisper = student.llm, student.whisper
    if not llm.supports_gradient_checkpointing:
        raise ValueError(
            f"train.gradient_checkpointing is true, but {type(llm).__name__} of transformers has no block that can run "
            f"again; set it to false, and train.micro_batch_size lower if memory is short."
        )
    llm.activation_checkpointing_enable({"use_reentrant": False})
    if any(p.requires_grad for p in whisper.parameters()):
        for layer in whisper.encoder.layers:  # transformers' own way is for training mode, in which ears never are
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def keep_outputs_(student: Salmonn) -> None:
    """Undo `recompute_blocks_`, in place; a student that it was not done to stays as it is."""
    if student.llm.is_activation_checkpointing:
        student.llm.activation_checkpointing_disable()
    for layer in student.whisper.encoder.layers:
        vars(layer).pop("forward", None)
