"""Gradients of single turns, small enough to keep: a random projection of ``grad log pi(turn)`` for each turn.

Any credit rule's gradient estimate is a weighted sum of these *scores*, so that once they are known a further rule costs
nothing but its weights. The projection is a sketch: it multiplies every coordinate with a random sign and folds the vector
onto ``J`` buckets. Inner products are kept in expectation, with a standard error of about ``|x||y| / sqrt(J)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ccpo.errors import RunFailure
from ccpo.learner import Policy, TrainRow, forward
from ccpo.learner.logprobs import score
from ccpo.learner.objective import Objective
from ccpo.learner.rows import collate, number_segments, pack
from ccpo.losses import denominators
from ccpo.rollout.seeds import seed_of

BUCKETS = 2039  # a prime: rows of a weight matrix then do not lie on each other's buckets
MICROBATCH = 16_384


class Sketch:
    """A random linear map of a policy's gradient to ``[J]`` (a count sketch, Charikar et al. 2002, with folded buckets).

    ``S(x)[j] = sum over i with (i + offset) mod J = j of sign[i] x[i]``, signs independent and fair. Then
    ``E <S(x), S(y)> = <x, y>``; where a policy has at most J weights the inner products are exact.
    """

    def __init__(self, policy: Policy, *, buckets: int = BUCKETS, seed: int = 0) -> None:
        self.policy, self.buckets = policy, buckets
        policy.activate()
        self.parameters = list(policy.parameters().values())
        self._signs: list[Tensor] = []
        generator = torch.Generator().manual_seed(seed_of("sketch", seed, policy.name) % 2**63)
        for parameter in self.parameters:
            padded = -(-parameter.numel() // buckets) * buckets
            signs = torch.randint(0, 2, (padded,), generator=generator, dtype=torch.int8).mul_(2).sub_(1)
            self._signs.append(signs.to(parameter.device))

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.parameters)

    def __call__(self, gradient: Sequence[Tensor | None]) -> Tensor:
        """The sketch ``[J]`` of one gradient, a tensor a parameter (None: zero), in float64 on the CPU."""
        total = torch.zeros(self.buckets, dtype=torch.float64)
        offset = 0
        for part, parameter, signs in zip(gradient, self.parameters, self._signs, strict=True):
            if part is not None:
                padded = torch.nn.functional.pad(part.flatten().float(), (0, signs.numel() - part.numel()))
                folded = (padded * signs).view(-1, self.buckets).sum(0).double().cpu()
                total += folded.roll(offset % self.buckets)
            offset += parameter.numel()
        return total


class Scores:
    """``grad log pi`` of texts, sketched, each distinct text once (the same prompt, words, policy and temperature)."""

    def __init__(self, sketches: Mapping[str, Sketch], compute: torch.dtype) -> None:
        self.sketches, self.compute = sketches, compute
        self._known: dict[tuple[object, ...], int] = {}
        self._scores: list[Tensor] = []

    def learn(self, rows: Iterable[TrainRow]) -> None:
        """Compute the scores of ``rows`` that are not known yet."""
        wanted: dict[str, dict[tuple[object, ...], TrainRow]] = {}
        for row in rows:
            if (key := _key(row)) not in self._known:
                wanted.setdefault(row.policy, {})[key] = row
        for policy, by_key in wanted.items():
            sketch = self.sketches[policy]
            sketch.policy.activate()
            for key, row in by_key.items():
                self._known[key] = len(self._scores)
                self._scores.append(sketch(self._gradient(sketch, row)))

    def of(self, rows: Sequence[TrainRow]) -> Tensor:
        """The scores of known rows, ``[B, J]``."""
        if not rows:
            return torch.zeros(0, next(iter(self.sketches.values())).buckets, dtype=torch.float64)
        return torch.stack([self._scores[self._known[_key(row)]] for row in rows])

    def _gradient(self, sketch: Sketch, row: TrainRow) -> Sequence[Tensor | None]:
        if not row.token_ids:
            return [None] * len(sketch.parameters)
        batch = collate([row], [0], sketch.policy.device)
        logprob_BT, _ = score(sketch.policy.model, batch, self.compute)
        total = logprob_BT[batch.mask_BT].sum()
        if not torch.isfinite(total):
            raise RunFailure(f"a turn of agent {row.agent!r} has a log-probability of {total.item()} under its policy")
        return torch.autograd.grad(total, sketch.parameters, allow_unused=True)


def exact_gradient(
    policy: Policy, objective: Objective, rows: Sequence[TrainRow], compute: torch.dtype
) -> Sequence[Tensor]:
    """``-grad`` of the objective over one agent's ``rows``, a tensor a parameter: what an update of the learner would follow,
    computed the way the learner does."""
    policy.activate()
    parameters = list(policy.parameters().values())
    total = [torch.zeros_like(p) for p in parameters]
    rows = [row for row in rows if row.token_ids]
    if not rows:
        return total
    segments = number_segments(rows)
    counts = denominators(torch.tensor([len(r.token_ids) for r in rows]), torch.tensor(segments), objective.constant)
    for part in pack(rows, segments, MICROBATCH, shared=forward.runs(policy.model)):
        batch = collate([rows[i] for i in part], [segments[i] for i in part], policy.device)
        logprob_BT, entropy_BT = score(policy.model, batch, compute)
        loss, _ = objective(logprob_BT, entropy_BT, batch, counts)
        for sum_, gradient in zip(total, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if gradient is not None:
                sum_ -= gradient
    return total


def _key(row: TrainRow) -> tuple[object, ...]:
    return (row.policy, row.temperature, row.prompt_ids, row.token_ids)
