"""How much of its cards' published rate a step uses: model FLOPs utilization, of the student's LLM.

A token costs a forward and a backward to what came in, 2 FLOPs each for every weight of a matrix that it passes: frozen
weights have no gradient of their own. Ears, connector, attention and head are left out, as is what gradient
checkpointing computes again, so it is a lower bound. Source: Chowdhery et al., "PaLM", 2022, appendix B.
"""

import torch
from torch import nn

from distill.sizes.cards import Card, find_card

FLOPS = 4  # of a token for each weight that it passes: two forward, two backward


class Utilization:
    """Tells the share of the published rate.

    Args:
        llm: the student's.
        device: what this rank computes on; the others' are alike.
    """

    def __init__(self, llm: nn.Module, device: torch.device):
        self.card, self.num_weights = card_of(device), count_passed_weights(llm)

    def __call__(self, tokens_per_second: float, num_ranks: int) -> dict[str, float]:
        """`mfu`, a share of 1; nothing where the rate of the cards is not known, or how many weights a token passes."""
        if self.card is None or self.num_weights is None:
            return {}
        return {"mfu": FLOPS * self.num_weights * tokens_per_second / (num_ranks * self.card.flops)}


def card_of(device: torch.device) -> Card | None:
    """A GPU's published figures, where they are known."""
    if device.type != "cuda":
        return None
    try:
        return find_card(torch.cuda.get_device_name(device))
    except ValueError:  # a card of another name, of which nothing can be told
        return None


def count_passed_weights(llm: nn.Module) -> int | None:
    """Weights of the matrices between embeddings and head, LoRA's with them, each one whole however few bits it has;
    None of a mixture, which sends each token elsewhere."""
    if hasattr(llm.config.get_text_config(), "num_experts_per_tok"):
        return None
    head = llm.get_output_embeddings()
    linears = (m for m in llm.modules() if isinstance(m, nn.Linear) and m is not head)
    return sum(m.in_features * m.out_features for m in linears)
