"""How an agent speaks: the engine of its policy, its tokenizer, its sampling; and the prompt of a turn."""

from __future__ import annotations

from dataclasses import dataclass

from ccpo.engines.base import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """An agent's sampling parameters (see :class:`ccpo.types.Request`)."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Voice:
    """What one agent speaks with. ``version`` is the number of updates its policy has had: with the policy's name and the
    sampling it says whether a cached counterfactual still holds."""

    agent: str
    policy: str
    engine: Engine
    tokenizer: object
    sampling: Sampling
    version: int = 0

    @property
    def signature(self) -> str:
        return f"{self.policy}@{self.version}:{self.sampling}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What bounds a prompt, by the reader's tokenizer, and what a truncated turn does to its rollout."""

    max_prompt_tokens: int = 4096
    max_message_tokens: int | None = None
    truncated_is_zero: bool = True
