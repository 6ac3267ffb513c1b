"""From credit to training rows: advantages by turn, and one row for each text that was spoken."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ccpo import credit as credit_rules
from ccpo.learner import TrainRow
from ccpo.rollout import Played
from ccpo.teams import PlayTeam, Team
from ccpo.types import CreditInputs, CreditOutputs, FinishReason, Turn


@dataclass(frozen=True, kw_only=True)
class Payroll:
    """How credit becomes advantage: the estimator's name, whether rows of groups without spread are left out of a batch-wide
    whitening, and per agent what it is paid for writing ``\\boxed``."""

    estimator: str
    skip_flat: bool = False
    boxed_reward: Mapping[str, float]

    def credit(self, outputs: CreditOutputs, played: Played) -> dict[str, Tensor]:
        """Each agent's credit with its format reward, ``[P, N]``."""
        return {agent: credit_PN + self._boxed(agent, played) for agent, credit_PN in outputs.credit.items()}

    def advantage(self, credit_PN: Tensor, agent: str, played: Played) -> Tensor:
        """What the policy loss multiplies the agent's log-probabilities with, ``[P, N]``; 0 where it said nothing."""
        P, N = credit_PN.shape
        tokens_PN = torch.tensor(
            [[sum(t.completion.tokens for t in r.turns if t.agent == agent) for r in g.rollouts] for g in played.groups]
        )
        if self.estimator == "reinforce++" and self.skip_flat:
            # whitening would move the zero credit of groups that the rule leaves out
            tokens_PN = tokens_PN * credit_rules.has_spread(played.reward_PN)[:, None]
        group_B = torch.arange(P).repeat_interleave(N)
        advantage_PN = self._estimate(credit_PN.flatten(), group_B, tokens_PN.flatten()).reshape(P, N)
        return advantage_PN * (tokens_PN > 0)

    def by_turn(self, outputs: CreditOutputs, agent: str, played: Played) -> dict[str, Tensor]:
        """Advantages of those turns of ``agent`` that are paid apart from it."""
        boxed = self._boxed(agent, played)
        return {
            turn: self.advantage(outputs.turn_credit[turn] + boxed, agent, played)
            for turn in played.turns[agent]
            if turn in outputs.turn_credit
        }

    def solo(self, outputs: CreditOutputs) -> dict[str, Tensor]:
        """Advantages of the counterfactual answers that the rule trains on, ``[P, draws]``."""
        return {
            agent: self._estimate(
                credit.flatten(),
                torch.arange(credit.shape[0]).repeat_interleave(credit.flatten(1).shape[1]),
                torch.ones(credit.numel(), dtype=torch.long),
            ).reshape(credit.shape[0], -1)
            for agent, credit in outputs.solo_credit.items()
        }

    @property
    def _estimate(self) -> Callable[..., Tensor]:
        return credit_rules.ESTIMATORS[self.estimator]

    def _boxed(self, agent: str, played: Played) -> Tensor | float:
        """The optional format reward: what an agent is paid for writing ``\\boxed``."""
        bonus = self.boxed_reward.get(agent, 0.0)
        if not bonus:
            return 0.0
        wrote = [
            [any("\\boxed" in t.completion.text for t in r.turns if t.agent == agent) for r in g.rollouts]
            for g in played.groups
        ]
        return bonus * torch.tensor(wrote).float()


def credit_inputs(team: Team | PlayTeam, active: tuple[str, ...], played: Played) -> CreditInputs:
    """What a credit rule is given of a step's rollouts."""
    return CreditInputs(
        agents=team.agent_names,
        decider=team.decider,
        active=active,
        reward_PN=played.reward_PN,
        without=played.without,
        score=played.score,
        turns=played.turns,
        tree=played.tree,
        swap=played.swap,
        silent=played.silent,
        process=played.process,
        shares=played.shares,
        shares_valid=played.shares_valid,
    )


def training_rows(
    played: Played,
    outputs: CreditOutputs,
    advantage: Mapping[str, Tensor],
    by_turn: Mapping[str, Tensor],
    solo: Mapping[str, Tensor],
    minibatches: int,
) -> list[list[TrainRow]]:
    """Rows of every text an active agent spoke, and of the solo answers that the rule trains on; problems split among
    mini-batches. A text that several rollouts share is one row, paid the mean over them."""
    rows: list[list[TrainRow]] = [[] for _ in range(minibatches)]
    segment = 0
    for p, group in enumerate(played.groups):
        target = rows[p * len(rows) // len(played.groups)]
        for agent, advantage_PN in advantage.items():
            weight = outputs.weight.get(agent, 1.0)
            paid: dict[int, list[float]] = {}
            for n, rollout in enumerate(group.rollouts):
                for turn in rollout.turns:
                    if turn.agent == agent:
                        value = float(by_turn.get(turn.name, advantage_PN)[p, n]) * weight
                        paid.setdefault(id(turn), []).append(value)
            for rollout in group.rollouts:
                segment += 1
                for turn in rollout.turns:
                    values = paid.pop(id(turn), None) if turn.agent == agent else None
                    if values is not None:
                        target.append(row_of(turn, sum(values) / len(values), segment))
        for agent, advantage_PD in solo.items():
            solos = [c for c in group.counterfactuals if c.removed == outputs.solo_coalition[agent]]
            for d, answer in enumerate(solos):
                segment += 1
                value = float(advantage_PD[p, d]) * outputs.solo_weight[agent]
                target += [row_of(turn, value, segment) for turn in answer.turns if turn.agent == agent]
    return rows


def row_of(turn: Turn, advantage: float, segment: int) -> TrainRow:
    """The training row of one text."""
    return TrainRow(
        policy=turn.policy,
        agent=turn.agent,
        prompt_ids=turn.prompt_ids,
        token_ids=turn.completion.token_ids,
        engine_logprobs=turn.completion.logprobs,
        advantage=advantage,
        segment=segment,
        temperature=turn.temperature,
    )


def lists(values: Mapping[str, Tensor]) -> dict[str, list[list[float]]]:
    """As plain lists, for the episodes."""
    return {name: value_PN.tolist() for name, value_PN in values.items()}


def turn_lengths(played: Played) -> dict[str, float]:
    """Mean length and truncation rate of each agent's turns, a text that rollouts share counted once."""
    lengths: dict[str, list[int]] = defaultdict(list)
    cut: dict[str, int] = defaultdict(int)
    for group in played.groups:
        for turn in distinct_turns(group.rollouts):
            completion = turn.completion
            lengths[turn.agent].append(completion.tokens)
            cut[turn.agent] += completion.finish is FinishReason.LENGTH
    return {f"completions/{a}/mean_length": sum(v) / len(v) for a, v in lengths.items()} | {
        f"completions/{a}/clipped_ratio": cut[a] / len(v) for a, v in lengths.items()
    }


def distinct_turns(rollouts: Sequence[object]) -> list[Turn]:
    """The texts of a group's rollouts, each once."""
    return list({id(turn): turn for rollout in rollouts for turn in rollout.turns}.values())  # type: ignore[attr-defined]
