"""Counterfactual rewards that are reused while nobody who spoke in them has changed.

A solver that is frozen during the thinker's phase answers a problem alone with the same success rate throughout the phase, so its
solo rewards need not be drawn again when the problem comes back. This helps only where a phase revisits problems; the hit rate is
reported. ``policy="always"`` reuses across updates as well, draws a tenth of the hits again and reports how far they have drifted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from ccpo.rollout.seeds import seed_of
from ccpo.types import Coalition

RECHECK = 10  # with "always", one in so many stale hits is drawn again


@dataclass(slots=True, kw_only=True)
class CounterfactualCache:
    """Rewards by (problem id, coalition), each with the signature of the policies that spoke in them."""

    policy: Literal["auto", "off", "always"] = "auto"
    entries: dict[str, tuple[str, list[float]]] = field(default_factory=dict)
    hits: int = 0
    misses: int = 0
    drifts: list[float] = field(default_factory=list)

    def find(self, problem: str, coalition: Coalition, signature: str, draws: int, step: int) -> list[float] | None:
        """``draws`` cached rewards, or None where they must be decoded."""
        if self.policy == "off":
            return None
        known = self.entries.get(_key(problem, coalition))
        fresh = known is not None and known[0] == signature
        recheck = not fresh and seed_of("recheck", problem, *coalition, step) % RECHECK == 0
        if known is None or len(known[1]) < draws or not (fresh or (self.policy == "always" and not recheck)):
            self.misses += 1
            return None
        self.hits += 1
        return known[1][:draws]

    def store(self, problem: str, coalition: Coalition, signature: str, rewards: list[float], *, lasting: bool) -> None:
        """Keep ``rewards``; in mode auto only if ``lasting``: none of those who spoke is being trained in this step."""
        if self.policy == "off" or not (lasting or self.policy == "always"):
            return
        known = self.entries.get(_key(problem, coalition))
        if known is not None and known[0] != signature:
            self.drifts.append(abs(fmean(rewards) - fmean(known[1])))
        self.entries[_key(problem, coalition)] = (signature, list(rewards))

    def report(self) -> dict[str, float]:
        """Metrics since the last report: hits, misses, hit rate, mean drift of rewards that were drawn again."""
        asked = self.hits + self.misses
        metrics = {"cache/hits": float(self.hits), "cache/hit_rate": self.hits / asked if asked else 0.0}
        if self.drifts:
            metrics["cache/drift"] = fmean(self.drifts)
        self.hits = self.misses = 0
        self.drifts.clear()
        return metrics

    def to_json(self) -> dict[str, Any]:
        return {key: [signature, rewards] for key, (signature, rewards) in self.entries.items()}

    def load_json(self, data: dict[str, Any]) -> None:
        self.entries = {
            key: (str(signature), [float(r) for r in rewards]) for key, (signature, rewards) in data.items()
        }


def _key(problem: str, coalition: Coalition) -> str:
    return "\x1f".join((problem, *coalition))
