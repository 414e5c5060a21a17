"""Published figures of GPUs, for plans. Knows no model."""

from dataclasses import dataclass

SHARE = 0.3  # of its published rate that a card reaches: an assumption until one has been measured


@dataclass(frozen=True)
class Card:
    """One kind of GPU; rates are a second.

    Attributes:
        name: as it is chosen by.
        flops: dense products in bf16, or in fp16 where it has no bf16.
        memory: bytes read.
        gigabytes: 10^9 bytes that it holds.
        link: bytes to the others of its node, one way.
        network: bytes to other nodes, one way, its share of the node's.
    """

    name: str
    flops: float
    memory: float
    gigabytes: float
    link: float = 25e9  # PCIe 4
    network: float = 1.25e9  # 10 Gb/s


CARDS = {
    card.name: card
    for card in (
        Card("T4", 65e12, 0.32e12, 16),
        Card("V100", 125e12, 0.9e12, 32, link=150e9),
        Card("A10", 125e12, 0.6e12, 24),
        Card("L4", 121e12, 0.3e12, 24),
        Card("RTX3090", 71e12, 0.936e12, 24),
        Card("RTX4090", 165e12, 1.0e12, 24),
        Card("L40S", 362e12, 0.864e12, 48),
        Card("A100", 312e12, 2.0e12, 80, link=300e9, network=25e9),
        Card("H100", 989e12, 3.35e12, 80, link=450e9, network=50e9),
        Card("H200", 989e12, 4.8e12, 141, link=450e9, network=50e9),
    )
}  # NVIDIA's data sheets, without sparsity; of the RTX cards with float32 sums


def find_card(name: str) -> Card:
    """A card's figures by its name, or by what torch calls it ("NVIDIA H100 80GB HBM3").

    Raises:
        ValueError: its figures are not here.
    """
    plain = name.upper().replace(" ", "").replace("-", "")
    known = [key for key in sorted(CARDS, key=len, reverse=True) if key.upper() in plain]
    if not known:
        raise ValueError(f"card is {name!r}, but figures are known of {', '.join(CARDS)}; name one of them.")
    return CARDS[known[0]]
