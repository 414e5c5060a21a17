"""Memory for time: each block of a LLM keeps its input alone, and is run again when its gradient is due.

Knows LLMs of transformers. Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
"""

from torch import nn


def recompute_blocks_(llm: nn.Module) -> None:
    """Let every block of `llm` run again in the backward, in place; its random numbers are drawn again too.

    Raises:
        ValueError: its blocks cannot.
    """
    if not llm.supports_gradient_checkpointing:
        raise ValueError(
            f"train.gradient_checkpointing is true, but {type(llm).__name__} of transformers has no block that can run "
            f"again; set it to false, and train.micro_batch_size lower if memory is short."
        )
    llm.activation_checkpointing_enable({"use_reentrant": False})


def keep_outputs_(llm: nn.Module) -> None:
    """Undo `recompute_blocks_`, in place; a LLM that it was not done to stays as it is."""
    if llm.is_activation_checkpointing:
        llm.activation_checkpointing_disable()
