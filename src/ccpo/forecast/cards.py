"""Accelerators by their makers' figures."""

from __future__ import annotations

from dataclasses import dataclass

from ccpo.errors import UserError, nearest


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """``flops``: dense bfloat16 operations a second, with float32 sums; ``bandwidth``: bytes a second of its memory; ``memory``: bytes.
    ``link``: bytes a second that it sends to another card of its node, one way; ``network``: to another node, one way."""

    name: str
    flops: float
    bandwidth: float
    memory: float
    link: float
    network: float
    source: str


def _card(
    name: str, teraflops: float, bandwidth: float, memory: float, link: float, network: float, source: str
) -> Card:
    """From TFLOP/s, GB/s, GB, GB/s both ways together, GB/s one way."""
    return Card(
        name=name,
        flops=teraflops * 1e12,
        bandwidth=bandwidth * 1e9,
        memory=memory * 1e9,
        link=link * 1e9 / 2,
        network=network * 1e9,
        source=source,
    )


CARDS = {
    card.name: card
    for card in (
        _card("a100-40", 312, 1_555, 40, 600, 25, "NVIDIA A100 datasheet, SXM 40 GB; DGX A100: 200 Gb/s a GPU"),
        _card("a100-80", 312, 2_039, 80, 600, 25, "NVIDIA A100 datasheet, SXM 80 GB; DGX A100: 200 Gb/s a GPU"),
        _card("h100", 989, 3_350, 80, 900, 50, "NVIDIA H100 datasheet, SXM; DGX H100: 400 Gb/s a GPU"),
        _card("h200", 989, 4_800, 141, 900, 50, "NVIDIA H200 datasheet, SXM; DGX H200: 400 Gb/s a GPU"),
        _card("b200", 2_250, 8_000, 180, 1_800, 50, "NVIDIA DGX B200 datasheet, an eighth of it; 400 Gb/s a GPU"),
        _card("l40s", 362, 864, 48, 64, 12.5, "NVIDIA L40S datasheet; PCIe 4.0 x16; network assumed 100 Gb/s a GPU"),
        _card("l4", 121, 300, 24, 64, 12.5, "NVIDIA L4 datasheet; PCIe 4.0 x16; network assumed 100 Gb/s a GPU"),
        _card("4090", 165, 1_008, 24, 64, 12.5, "NVIDIA Ada whitepaper; PCIe 4.0 x16; network assumed 100 Gb/s a GPU"),
    )
}
CPU = "cpu"
NODE = 8  # cards of a node


def card_of(name: str) -> Card:
    """The card of that name. Raises UserError."""
    if name.lower() not in CARDS:
        known = (*CARDS, CPU)
        raise UserError(f"--gpu: found {name!r}; it is one of {', '.join(known)}.{nearest(name.lower(), known)}")
    return CARDS[name.lower()]
