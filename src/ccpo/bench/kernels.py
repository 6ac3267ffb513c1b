"""Credit alone: from rewards to advantages, and from ballots to credit, against the loop that one writes first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ccpo.bench.timing import Comparison, in_turns
from ccpo.credit import ESTIMATORS, RULES
from ccpo.errors import RunFailure
from ccpo.teams.votes import with_and_without
from ccpo.types import CreditInputs

SAMPLES = 8
LOOP = 20_000  # rollouts that the loop is given; its time is linear in them
EPS = 1e-6


def inputs_of(rollouts: int, K: int, seed: int = 0) -> CreditInputs:
    """Random rewards of a team in which nobody decides alone, with one counterfactual draw a rollout for each agent."""
    g = torch.Generator().manual_seed(seed)
    P = rollouts // SAMPLES
    agents = tuple(f"agent{k:02d}" for k in range(K))
    without = {(a,): torch.randint(0, 2, (P, SAMPLES, 1), generator=g).float() for a in agents}
    return CreditInputs(
        agents=agents,
        decider=None,
        active=agents,
        reward_PN=torch.randint(0, 2, (P, SAMPLES), generator=g).float(),
        without=without,
    )


def ours(inputs: CreditInputs, group_B: Tensor) -> dict[str, Tensor]:
    """Removal credit, then GRPO's advantage, ``[P * N]`` an agent."""
    rule = RULES["removal"](pairing="paired")
    outputs, _ = rule(inputs, rule.start())
    return {agent: ESTIMATORS["grpo"](c.flatten(), group_B) for agent, c in outputs.credit.items()}


def loop(reward: Sequence[Sequence[float]], without: Sequence[Sequence[Sequence[float]]]) -> list[list[list[float]]]:
    """The same in plain Python, ``[K][P][N]``."""
    advantages = []
    for agent in without:
        rows = []
        for group, removed in zip(reward, agent, strict=True):
            credit = [r - w for r, w in zip(group, removed, strict=True)]
            mean = sum(credit) / len(credit)
            spread = (sum((c - mean) ** 2 for c in credit) / (len(credit) - 1)) ** 0.5
            rows.append([(c - mean) / (spread + EPS) if spread > 0 else 0.0 for c in credit])
        advantages.append(rows)
    return advantages


def ballots_of(rollouts: int, K: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Answers ``[B, K]`` of five kinds, the first of which is right, and their scores."""
    g = torch.Generator().manual_seed(seed)
    answer_BK = torch.randint(0, 5, (rollouts, K), generator=g)
    return answer_BK, (answer_BK == 0).float()


def vote_credit(answer_BK: Tensor, score_BK: Tensor) -> Tensor:
    """``R - R_without`` of every voter, ``[K, B]``."""
    reward_B, without_KB = with_and_without(answer_BK, score_BK)
    return torch.sub(reward_B, without_KB, out=without_KB)


def vote_loop(answers: Sequence[Sequence[int]]) -> list[list[float]]:
    """The same in plain Python, ``[B][K]``."""

    def reward(votes: Sequence[int]) -> float:
        if not votes:
            return 0.0
        counts = Counter(votes)
        most = max(counts.values())
        tied = [a for a, n in counts.items() if n == most]
        return (0 in tied) / len(tied)

    return [[reward(row) - reward([*row[:k], *row[k + 1 :]]) for k in range(len(row))] for row in answers]


def _advantages(rollouts: int, K: int, repeats: int) -> Comparison:
    inputs, few = inputs_of(rollouts, K), inputs_of(min(rollouts, LOOP), K)
    group_B = torch.arange(rollouts // SAMPLES).repeat_interleave(SAMPLES)
    reward, without = few.reward_PN.tolist(), [w[..., 0].tolist() for w in few.without.values()]
    ours_few = ours(few, group_B[: few.reward_PN.numel()])
    apart = (torch.stack([*ours_few.values()]) - torch.tensor(loop(reward, without)).flatten(1)).abs().max().item()
    return _compared(
        "removal credit and GRPO advantage",
        rollouts,
        K,
        {"ccpo": lambda: ours(inputs, group_B), "loop": lambda: loop(reward, without)},
        apart,
        repeats,
    )


def _votes(rollouts: int, K: int, repeats: int) -> Comparison:
    answer_BK, score_BK = ballots_of(rollouts, K)
    few_BK, few_score_BK = ballots_of(min(rollouts, LOOP), K)
    few = few_BK.tolist()
    apart = (vote_credit(few_BK, few_score_BK).T - torch.tensor(vote_loop(few))).abs().max().item()
    return _compared(
        "votes counted and recounted",
        rollouts,
        K,
        {"ccpo": lambda: vote_credit(answer_BK, score_BK), "loop": lambda: vote_loop(few)},
        apart,
        repeats,
    )


def _compared(name: str, rollouts: int, K: int, sides: dict, apart: float, repeats: int) -> Comparison:
    if not apart <= 1e-4:
        raise RunFailure(f"{name}: the vectorised credit is {apart:.1e} from the loop's")
    seconds = in_turns(sides, repeats=repeats)
    factor = rollouts / min(rollouts, LOOP)
    seconds["loop"] = [s * factor for s in seconds["loop"]]
    return Comparison(
        part="credit",
        name=f"{name}, {rollouts:,} rollouts, {K} agents",
        shape={"rollouts": rollouts, "agents": K, "loop_rollouts": min(rollouts, LOOP)},
        seconds=seconds,
        work=rollouts,
        unit="rollouts",
        ours="ccpo",
        base="loop",
        extra={"error": apart},
    )


def run(mode: str, *, repeats: int) -> Iterator[Comparison]:
    """On one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for rollouts in (100_000, 1_000_000) if mode == "full" else (100_000,):
            for K in (2, 4, 16) if mode == "full" else (2,):
                yield _advantages(rollouts, K, repeats)
                yield _votes(rollouts, K, repeats)
    finally:
        torch.set_num_threads(threads)
