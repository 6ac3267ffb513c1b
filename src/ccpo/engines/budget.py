"""How many tokens are decoded together where a recipe leaves it open (``rollout.decode_tokens: auto``).

On a GPU the cache is what decides how fast a team speaks: a step of 16 rows takes as long as one of 100. So it gets what training leaves."""

from __future__ import annotations

LEAST = 65_536
"""Tokens; also what a CPU gets, whose steps take longer with every row."""
ROOM = 0.25
"""Share of a GPU's memory that is left to activations and logits."""
TAKEN = 0.8
"""Share of what is then left that the caches take: they are rounded up, prompts are run beside them, and allocators leave gaps."""


def decode_budget(*, total: float, free: float, coming: float, token: float) -> int:
    """Tokens, prompts and texts with their padding, that each decoder may hold in its cache.

    In bytes: the GPU's memory, what of it is ``free`` when policies and decoders are loaded, what training takes beside its activations
    (``coming``: the optimiser's states and gradients), and one ``token`` in the caches of all decoders together.
    """
    return max(LEAST, int(TAKEN * (free - coming - ROOM * total) / token))


def without_room(decode_tokens: int | str) -> int:
    """The recipe's ``rollout.decode_tokens`` where no GPU's memory is known."""
    return LEAST if decode_tokens == "auto" else int(decode_tokens)
