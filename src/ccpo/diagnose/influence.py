"""Influence: how much the next turn changes when a message is not there.

The reader's own sampled words are read again under its prompt without the message, and its token distributions compared. An agent
whose messages change nothing cannot help, whatever it is paid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ccpo.diagnose.moments import Estimate
from ccpo.diagnose.subject import Subject
from ccpo.learner import TrainRow
from ccpo.learner.logprobs import completion_logits
from ccpo.learner.rows import collate
from ccpo.pay import row_of
from ccpo.teams import TurnSpec, render_prompt
from ccpo.types import Group, Problem, Rollout

ROWS = 16  # rows of one forward pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """``distance``: total variation between the reader's token distributions with and without the message, mean over its tokens, in
    [0, 1]. ``kl``: their divergence KL(with, without), nats a token. ``shift``: mean ``|difference|`` of the log-probabilities
    of the tokens that it said. Errors are over problems."""

    speaker: str
    reader: str
    distance: Estimate
    kl: Estimate
    shift: Estimate

    def to_json(self) -> dict[str, object]:
        return {
            "speaker": self.speaker,
            "reader": self.reader,
            "distance": self.distance.to_json(),
            "kl": self.kl.to_json(),
            "shift": self.shift.to_json(),
        }


def measure_influence(subject: Subject, groups: Sequence[Group]) -> list[Edge]:
    """One :class:`Edge` for each message that a turn of the team's graph reads, over all rollouts of ``groups``."""
    edges = []
    for spec in subject.team.turns_in_order:
        for speaker in spec.reads:
            edges.append(_edge(subject, groups, speaker, spec))
    return edges


def _edge(subject: Subject, groups: Sequence[Group], speaker: str, spec: TurnSpec) -> Edge:
    pairs, problem_of = [], []
    for p, group in enumerate(groups):
        for rollout in group.rollouts:
            if not rollout.turn(spec.name).prompt_ids:
                continue  # an endpoint's: nobody sees its distributions
            row = row_of(rollout.turn(spec.name), 0.0, 0)
            if row.token_ids:
                pairs.append((row, replace(row, prompt_ids=_prompt(subject, group.problem, rollout, spec, speaker))))
                problem_of.append(p)
    columns = _compare(subject, spec.agent, pairs) if pairs else torch.zeros(3, 0, dtype=torch.float64)
    distance, kl, shift = (_over_problems(column, problem_of) for column in columns)
    return Edge(speaker=speaker, reader=spec.name, distance=distance, kl=kl, shift=shift)


def _prompt(subject: Subject, problem: Problem, rollout: Rollout, spec: TurnSpec, dropped: str) -> tuple[int, ...]:
    heard: Mapping[str, str | None] = {
        name: None if name == dropped else rollout.turn(name).message for name in spec.reads
    }
    return render_prompt(
        spec,
        {"problem": problem.text, **heard},
        subject.voices[spec.agent].tokenizer,
        system=subject.team.agent(spec.agent).system,
        budget=subject.limits.max_prompt_tokens,
        max_message_tokens=subject.limits.max_message_tokens,
    ).ids


@torch.no_grad()
def _compare(subject: Subject, agent: str, pairs: Sequence[tuple[TrainRow, TrainRow]]) -> Tensor:
    """``[3, B]``: distance, divergence and shift of each row, means over its tokens."""
    policy = subject.policy_of(agent)
    policy.activate()
    parts = []
    for start in range(0, len(pairs), ROWS):
        part = pairs[start : start + ROWS]
        with_BT, without_BT = (
            collate([pair[side] for pair in part], range(len(part)), policy.device) for side in (0, 1)
        )
        mask_BT, ids_BT = with_BT.mask_BT, with_BT.ids_BL[:, -with_BT.mask_BT.shape[1] :]
        log_p, log_q = (
            (completion_logits(policy.model, b, subject.compute).double() / b.temperature_B[:, None, None]).log_softmax(
                -1
            )
            for b in (with_BT, without_BT)
        )
        p_BTV = log_p.exp()
        values = (
            0.5 * (p_BTV - log_q.exp()).abs().sum(-1),
            torch.where(p_BTV > 0, p_BTV * (log_p - log_q), 0.0).sum(-1),
            (log_p - log_q).gather(-1, ids_BT[..., None]).squeeze(-1).abs(),
        )
        tokens_B = mask_BT.sum(1)
        parts.append(torch.stack([torch.where(mask_BT, v, 0.0).sum(1) / tokens_B for v in values]).cpu())
    return torch.cat(parts, dim=1)


def _over_problems(value_B: Tensor, problem_of: Sequence[int]) -> Estimate:
    if not len(value_B):
        return Estimate(value=None, error=None)
    places = torch.tensor(problem_of)
    means = torch.stack([value_B[places == p].mean() for p in sorted(set(problem_of))])
    error = float(means.std() / len(means) ** 0.5) if len(means) > 1 else None
    return Estimate(value=float(means.mean()), error=error)
