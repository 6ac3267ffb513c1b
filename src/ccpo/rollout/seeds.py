"""Seeds of requests: a hash of what is being sampled, so that a sample does not depend on the order of the batch."""

from __future__ import annotations

from hashlib import blake2b


def seed_of(*parts: object) -> int:
    """A 63-bit seed from the parts: run seed, step, problem, turn, coalition, rollout, draw."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1
