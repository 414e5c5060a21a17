"""The outputs of a LLM's blocks, kept while it runs: of a teacher to be learned, of a student to be compared with them.

Shapes: B batch, T LLM positions, D LLM width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from shards.targets.header import HEAD_INPUT
from teachers.salmonn import Salmonn


@contextmanager
def record_blocks(model: Salmonn, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """While it is open, a pass of the LLM leaves the outputs of these blocks, by number from 1: [B, T, D].

    Raises:
        ValueError: the LLM has no such block.
    """
    blocks, outputs = llm_blocks(model.llm), {}
    handles = []
    for number in layers:
        if not 1 <= number <= len(blocks):
            raise ValueError(
                f"hidden_layers names {number}, but the LLM's blocks are 1 to {len(blocks)} ({HEAD_INPUT} is the input "
                f"of the head); correct cache.hidden_layers."
            )

        def keep(module, inputs, output, number=number):
            outputs[number] = output[0] if isinstance(output, tuple) else output

        handles.append(blocks[number - 1].register_forward_hook(keep))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def llm_blocks(llm: nn.Module) -> nn.ModuleList:
    """The blocks of a LLM of any family: `layers`, `h` or what it calls the longest list in its decoder.

    Raises:
        ValueError: there is no such list.
    """
    lists = [module for module in llm.get_decoder().children() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(
            f"{type(llm).__name__} keeps its blocks in no list, but cache.hidden_layers numbers them; leave it empty "
            f"({HEAD_INPUT} alone works), or use a LLM such as Llama, Qwen, GPT-2, GPT-NeoX or BLOOM."
        )
    return max(lists, key=len)
