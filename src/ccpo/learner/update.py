"""One training step of all policies: rows in, weights changed, metrics out."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ccpo.comm import Comm, deal, stretches
from ccpo.families import compute_dtype, is_sharded
from ccpo.learner import forward
from ccpo.learner.failure import refuse
from ccpo.learner.logprobs import score, training
from ccpo.learner.meters import Meters
from ccpo.learner.objective import Objective, mismatch
from ccpo.learner.optim import PolicyOptimizer, lr_factor
from ccpo.learner.policies import Policy, Reference
from ccpo.learner.rows import MicroBatch, TrainRow, collate, number_segments, pack
from ccpo.losses import Denominators, denominators


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateStats:
    """Metrics of a step by name (``actor/AGENT/loss``, …) and the seconds it took."""

    metrics: Mapping[str, float]
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """An agent's part of a mini-batch: counts of all its rows, and this rank's micro-batches of those that have a gradient. ``live``:
    whether any rank has one."""

    agent: str
    counts: Denominators
    batches: list[MicroBatch]
    live: bool


Work = dict[str, list[Share]]
"""A mini-batch: the shares of each policy."""

AT_ONCE = 2**24
"""Up to this many trained numbers over all policies (with LoRA, those of the adapters), ranks run all policies before they sum the gradients, which
are then all held at once. Each rank gets neighbouring rows, and so mostly those of one policy: with small models a micro-batch costs more than
its rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentRows:
    """All rows of an agent in a mini-batch; ``pieces`` are its segments with a gradient, as indices of rows."""

    policy: str
    agent: str
    rows: list[TrainRow]
    segments: list[int]
    pieces: list[list[int]]

    def work(self) -> list[int]:
        """Tokens of each piece."""
        return [sum(len(self.rows[i].prompt_ids) + len(self.rows[i].token_ids) for i in piece) for piece in self.pieces]


class Learner:
    """Optimisers, references and settings of all policies that are trained.

    The loss settings are those of :class:`~ccpo.learner.objective.Objective`. ``total_steps`` and ``warmup_steps`` are
    steps of the trainer, by which the learning rate goes, however many updates a step makes. ``microbatch_tokens``
    bounds the padded tokens of one forward and backward pass and does not change the gradient. ``compute`` is the dtype
    of matrix products: None is bfloat16 where the hardware multiplies it. The reference of the KL is what the policies
    are when the learner is made; with LoRA it is their base. ``comm``: ranks that are all given the same rows; each runs a part of them, and the
    gradients are summed.
    """

    def __init__(
        self,
        policies: Mapping[str, Policy],
        *,
        loss: str = "ppo_clip",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        dual_clip: float | None = None,
        aggregate: str = "token-mean",
        constant: float | None = None,
        ratio_over: str = "agent",
        kl: str = "none",
        kl_coef: float = 0.0,
        entropy_coef: float = 0.0,
        importance_cap: float | None = None,
        old_logprobs: str = "auto",
        total_steps: int,
        warmup_steps: int = 0,
        decay: str = "constant",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        epochs: int = 1,
        microbatch_tokens: int = 16_384,
        compute: torch.dtype | None = None,
        comm: Comm | None = None,
    ) -> None:
        self.comm = comm or Comm()
        self.objective = Objective(
            loss=loss,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            aggregate=aggregate,
            constant=constant,
            ratio_over=ratio_over,
            kl=kl,
            kl_coef=kl_coef,
            entropy_coef=entropy_coef,
            importance_cap=importance_cap,
            old_logprobs=old_logprobs,
        )
        self.policies = dict(policies)
        self._schedule = {"warmup_steps": warmup_steps, "decay": decay, "total_steps": total_steps}
        lr_factor(0, **self._schedule)  # an unknown decay is refused here
        self._epochs, self._microbatch_tokens, self._compute = epochs, microbatch_tokens, compute
        trained = {name: policy for name, policy in self.policies.items() if policy.trainable}
        self.optimizers = {
            name: PolicyOptimizer(policy, betas=betas, eps=eps, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
            for name, policy in trained.items()
        }
        wanted = trained if self.objective.needs_reference else {}
        self._references = {name: Reference(policy) for name, policy in wanted.items()}
        self._sizes = {name: sum(p.numel() for p in policy.model.parameters()) for name, policy in trained.items()}
        numbers = sum(p.numel() for policy in trained.values() for p in policy.parameters().values())
        self._at_once = numbers <= AT_ONCE and not any(is_sharded(policy.model) for policy in trained.values())

    def step(
        self, minibatches: Sequence[Sequence[TrainRow]], *, step: int, failure_folder: Path, spent: float = 0.0
    ) -> UpdateStats:
        """Train on ``minibatches``: one update of each policy with rows, for each of them, in each epoch.

        The losses of agents that share a policy are averaged each over its own rows, and summed. Rows whose advantage
        is exactly 0 have no gradient unless there is a KL or entropy term: they are counted in the means and not run
        (so the metrics over tokens are those of the rows that were). A policy none of whose rows has a gradient is not
        updated at all, not even by momentum or weight decay; ``updates_skipped`` counts that. ``spent``: the share of the
        run's token budget that is gone, for the decay of the learning rate.

        Raises RunFailure for a loss or gradient that is not finite, with that policy's weights as they were before the
        update and the batch in ``failure_folder``; ValueError for rows of a policy that is unknown or not trained.
        """
        started = time.perf_counter()
        meters = Meters()
        factor = lr_factor(step, spent=spent, **self._schedule)
        work = [self._prepare(rows, meters) for rows in minibatches]
        for name in self.optimizers:
            self._recall(name, [shares[name] for shares in work if name in shares], meters)
        versions = {name: policy.version for name, policy in self.policies.items()}
        for _ in range(self._epochs):
            for shares_by_policy in work:
                for group in self._groups(shares_by_policy):
                    losses = {
                        name: self._gradient(name, shares, meters, fresh=self.policies[name].version == versions[name])
                        for name, shares in group.items()
                    }
                    for name, shares in group.items():
                        self._update(
                            name, shares, losses[name], meters, factor, step=step, failure_folder=failure_folder
                        )
        return UpdateStats(metrics=meters.read(self.comm), seconds=time.perf_counter() - started)

    # --- before the first update --------------------------------------------------------------------------------------

    def _prepare(self, rows: Sequence[TrainRow], meters: Meters) -> Work:
        by_agent: dict[str, dict[str, list[TrainRow]]] = {}
        for row in rows:
            if row.policy not in self.optimizers:
                state = "is not trained" if row.policy in self.policies else "is unknown"
                raise ValueError(f"a row of agent {row.agent!r} is of policy {row.policy!r}, which {state}")
            if row.token_ids:
                by_agent.setdefault(row.policy, {}).setdefault(row.agent, []).append(row)
        parts = [
            self._part(name, agent, agents[agent])
            for name in self.optimizers
            if (agents := by_agent.get(name))
            for agent in agents
        ]
        work: Work = {}
        for part, mine in zip(parts, self._mine(parts), strict=True):
            work.setdefault(part.policy, []).append(self._share(part, mine, meters))
        return work

    def _part(self, policy: str, agent: str, rows: list[TrainRow]) -> AgentRows:
        segments = number_segments(rows)
        pieces: dict[int, list[int]] = {}
        for index in self._live(rows, segments):
            pieces.setdefault(segments[index], []).append(index)
        return AgentRows(policy=policy, agent=agent, rows=rows, segments=segments, pieces=list(pieces.values()))

    def _mine(self, parts: Sequence[AgentRows]) -> list[list[int]]:
        """Which pieces of each part this rank runs."""
        ranks, rank = self.comm.size, self.comm.rank
        if ranks == 1:
            return [list(range(len(part.pieces))) for part in parts]
        if not self._at_once:
            return [deal(part.work(), ranks)[rank] for part in parts]
        work = [self._sizes[part.policy] * tokens for part in parts for tokens in part.work()]
        chosen = set(stretches(work, ranks)[rank])
        found, start = [], 0
        for part in parts:
            found.append([i for i in range(len(part.pieces)) if start + i in chosen])
            start += len(part.pieces)
        return found

    def _share(self, part: AgentRows, pieces: list[int], meters: Meters) -> Share:
        policy, rows, agent = self.policies[part.policy], part.rows, part.agent
        mine = sorted(index for number in pieces for index in part.pieces[number])
        chosen, numbers = [rows[i] for i in mine], [part.segments[i] for i in mine]
        packed = pack(chosen, numbers, self._microbatch_tokens, shared=forward.runs(policy.model))
        meters.add(agent, "rows", len(rows))
        meters.add(agent, "rows_without_signal", len(rows) - sum(map(len, part.pieces)))
        meters.add(agent, "tokens", sum(len(row.token_ids) for row in rows))
        return Share(
            agent=agent,
            counts=denominators(
                torch.tensor([len(row.token_ids) for row in rows]), torch.tensor(part.segments), self.objective.constant
            ),
            batches=[
                *(collate([chosen[i] for i in at], [numbers[i] for i in at], policy.device) for at in packed),
                *self._fillers(policy, rows[0], len(packed)),
            ],
            live=bool(part.pieces),
        )

    def _fillers(self, policy: Policy, row: TrainRow, count: int) -> list[MicroBatch]:
        """Micro-batches of no rows: ranks that hold shards of a model must all run it equally often."""
        if not is_sharded(policy.model):
            return []
        most = max(self.comm.gather_plain(count))
        return [replace(collate([row], [0], policy.device), rows=()) for _ in range(most - count)]

    def _live(self, rows: list[TrainRow], segments: list[int]) -> list[int]:
        """Indices of the rows that have a gradient, with all the rows of their segments."""
        if self.objective.needs_all_rows:
            return list(range(len(rows)))
        paid = {segment for row, segment in zip(rows, segments, strict=True) if row.advantage != 0}
        return [i for i, segment in enumerate(segments) if segment in paid]

    def _recall(self, name: str, parts: list[list[Share]], meters: Meters) -> None:
        """Give each micro-batch the log-probs that must be known from before the first update."""
        updates = self._epochs * sum(any(share.live for share in shares) for shares in parts)
        source = self.objective.old_logprobs
        forward = source == "learner" or (source == "auto" and updates > 1)
        shares = [share for part in parts for share in part]
        for share in shares:
            for batch in share.batches:
                if source == "engine":
                    batch.old_BT = batch.engine_BT
                elif forward:
                    batch.old_BT = self._score_now(name, batch)
                    if not batch.rows:
                        continue
                    meters.tokens(share.agent, mismatch(batch.old_BT, batch.engine_BT, batch.mask_BT), batch.tokens)
        if name in self._references:
            self._score_reference(name, shares)

    @torch.no_grad()
    def _score_now(self, name: str, batch: MicroBatch) -> Tensor:
        policy = self.policies[name]
        policy.activate()
        return score(policy.model, batch, self._dtype(policy))[0]

    @torch.no_grad()
    def _score_reference(self, name: str, shares: list[Share]) -> None:
        policy = self.policies[name]
        policy.activate()
        with self._references[name].model() as model:
            for share in shares:
                for batch in share.batches:
                    batch.ref_BT = score(model, batch, self._dtype(policy))[0]

    def _groups(self, work: Work) -> list[Work]:
        """The policies whose gradients are held at the same time: all, or one after the other."""
        if self._at_once and self.comm.size > 1:
            return [work]
        return [{name: shares} for name, shares in work.items()]

    # --- one update ---------------------------------------------------------------------------------------------------

    def _gradient(self, name: str, shares: list[Share], meters: Meters, *, fresh: bool) -> list[Tensor]:
        """This rank's part of the gradient, left in the weights; returns the loss of each of its micro-batches."""
        if not any(share.live for share in shares):
            return []
        self.optimizers[name].clear()
        return self._backward(name, _numbered(shares), meters, fresh=fresh)

    def _update(
        self,
        name: str,
        shares: list[Share],
        losses: list[Tensor],
        meters: Meters,
        factor: float,
        *,
        step: int,
        failure_folder: Path,
    ) -> None:
        """Change the weights by the gradients of all ranks."""
        agents = [share.agent for share in shares]
        if not any(share.live for share in shares):
            for agent in agents:
                meters.add(agent, "updates_skipped", 1)
            return
        optimizer, live = self.optimizers[name], _numbered(shares)
        by_agent = {agent: torch.zeros((), dtype=torch.float64, device=self.policies[name].device) for agent in agents}
        for loss, (share, _, _) in zip(losses, live, strict=True):
            by_agent[share.agent] += loss
        optimizer.sum_over(self.comm, list(by_agent.values()))
        norm = optimizer.clip()
        seen = torch.stack([*by_agent.values(), norm.double()]).tolist()  # a look makes the host wait: one an update
        if not all(map(math.isfinite, seen)):
            self._refuse(name, losses, norm, live, step, failure_folder)
        rate = optimizer.step(factor)
        for agent in agents:
            meters.mean(agent, "loss", by_agent[agent])
            meters.mean(agent, "grad_norm", norm)
            meters.mean(agent, "lr", rate)
            meters.add(agent, "updates", 1)

    def _backward(
        self, name: str, live: list[tuple[Share, int, MicroBatch]], meters: Meters, *, fresh: bool
    ) -> list[Tensor]:
        """Gradients of all micro-batches, summed; returns each one's loss. ``fresh``: the weights are still those that
        sampled, so that these log-probs can be held against the engine's, where no earlier ones were."""
        engine_is_old = self.objective.old_logprobs == "engine"
        policy = self.policies[name]
        policy.activate()
        losses = []
        with training(policy.model):
            for share, _, batch in live:
                logprob_BT, entropy_BT = score(policy.model, batch, self._dtype(policy))
                if not batch.rows:
                    (logprob_BT.sum() * 0.0).backward()
                    losses.append(torch.zeros((), device=policy.device))
                    continue
                loss, metrics = self.objective(logprob_BT, entropy_BT, batch, share.counts)
                loss.backward()
                losses.append(loss.detach())
                metrics.pop("tokens")
                meters.tokens(share.agent, metrics, batch.tokens)
                if fresh and (batch.old_BT is None or engine_is_old):
                    meters.tokens(share.agent, mismatch(logprob_BT, batch.engine_BT, batch.mask_BT), batch.tokens)
        return losses

    def _refuse(
        self,
        name: str,
        losses: list[Tensor],
        norm: Tensor,
        live: list[tuple[Share, int, MicroBatch]],
        step: int,
        failure_folder: Path,
    ) -> None:
        """Raises RunFailure on all ranks, for what is not finite on one of them; all have seen the sums, and so come here together."""
        values = torch.stack([*losses, norm.to(losses[0].dtype if losses else norm.dtype)]).tolist()
        broken = [i for i, value in enumerate(values[:-1]) if not math.isfinite(value)]
        if self.comm.size > 1:
            failure_folder = failure_folder / f"rank-{self.comm.rank}"
        elsewhere = any(self.comm.gather_plain(bool(broken)))

        def refuse_mine() -> None:
            if not broken and (elsewhere or not live or math.isfinite(values[-1])):
                return
            what, value = ("loss", values[broken[0]]) if broken else ("gradient norm", values[-1])
            at = [
                (share.agent, number, batch)
                for i, (share, number, batch) in enumerate(live)
                if not broken or i in broken
            ]
            raise refuse(what, value, step=step, policy=name, at=at, folder=failure_folder)

        try:
            self.comm.together(refuse_mine)
        finally:
            for optimizer in self.optimizers.values():
                optimizer.clear()

    def _dtype(self, policy: Policy) -> torch.dtype:
        return self._compute or compute_dtype(policy.device)


def _numbered(shares: Sequence[Share]) -> list[tuple[Share, int, MicroBatch]]:
    """This rank's micro-batches of a policy, each with its share and its number there."""
    return [(share, number, batch) for share in shares for number, batch in enumerate(share.batches)]
