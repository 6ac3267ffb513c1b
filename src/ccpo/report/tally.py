"""What a step's episodes say of credit, counted once for each file and then added up over any window of steps.

A rollout is *correct* where its reward is full, as in ``pass@k`` of the evaluation. Joint against solo, over pairs of a
rollout and a play without the agent: *helped* (the reward is higher with it), *hurt* (lower), *redundant* (the same, and
full), *hopeless* (the same, and not full).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ccpo.report.episodes import Group, Play, Rollout
from ccpo.report.reading import short

SOLVED = 0.999
MAX_AGENTS = 32

Edge = tuple[str, str]


def is_correct(reward: float) -> bool:
    return reward >= SOLVED


@dataclass(slots=True)
class Tally:
    """Counts of one step. ``credit``: by agent, credit and reward of each rollout in turn. ``pairs``: by agent, helped, hurt, redundant,
    hopeless, and how many of these had a reward between 0 and 1. ``signal``: by agent, groups and those with an advantage.
    ``tokens``: by turn, tokens, turns and those cut off.
    ``heard``: by pair of turns, how often the first one's message is in the second one's prompt, of how often it could be."""

    step: int
    rollouts: int = 0
    reward: float = 0.0
    credit: dict[str, array] = field(default_factory=dict)
    pairs: dict[str, list[int]] = field(default_factory=dict)
    signal: dict[str, list[int]] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    speaker: dict[str, str] = field(default_factory=dict)
    heard: dict[Edge, list[int]] = field(default_factory=dict)
    prompts: dict[str, str] = field(default_factory=dict)

    def add(self, group: Group) -> None:
        for rollout in group.rollouts:
            self.rollouts += 1
            self.reward += rollout.reward
            for agent, value in rollout.credit.items():
                self.credit.setdefault(agent, array("d")).extend((value, rollout.reward))
            for turn in rollout.turns:
                self.speaker.setdefault(turn.name, turn.agent)
                if turn.tokens is not None:
                    counts = self.tokens.setdefault(turn.name, [0, 0, 0])
                    for i, value in enumerate((turn.tokens, 1, turn.finish == "length")):
                        counts[i] += value
            self._listen(rollout)
        for agent in {agent for rollout in group.rollouts for agent in rollout.advantage}:
            counts = self.signal.setdefault(agent, [0, 0])
            counts[0] += 1
            counts[1] += any(rollout.advantage.get(agent) for rollout in group.rollouts)
        for rollout, play in joint_and_without(group):
            counts = self.pairs.setdefault(play.removed[0], [0, 0, 0, 0, 0])
            counts[effect(rollout.reward, play.reward)] += 1
            counts[4] += not {rollout.reward, play.reward} <= {0.0, 1.0}

    def paid(self, agent: str) -> Iterable[tuple[float, float]]:
        """Pairs of an agent's credit and the reward."""
        flat = self.credit.get(agent, ())
        return zip(flat[::2], flat[1::2], strict=True)

    def _listen(self, rollout: Rollout) -> None:
        for i, later in enumerate(rollout.turns):
            if not later.prompt:
                continue
            self.prompts.setdefault(later.name, later.prompt)
            for earlier in rollout.turns[:i]:
                message = earlier.message.strip()[:200]
                if len(message) >= 3:
                    counts = self.heard.setdefault((earlier.name, later.name), [0, 0])
                    counts[0] += message in later.prompt
                    counts[1] += 1


def effect(joint: float, without: float) -> int:
    """0 helped, 1 hurt, 2 redundant, 3 hopeless."""
    if joint != without:
        return int(joint < without)
    return 2 if is_correct(joint) else 3


def joint_and_without(group: Group) -> Iterable[tuple[Rollout, Play]]:
    """Pairs of a rollout and a play without one agent that answers to it."""
    by_n = {rollout.n: (rollout,) for rollout in group.rollouts}
    for play in group.plays:
        if len(play.removed) == 1:
            for rollout in group.rollouts if play.rollout is None else by_n.get(play.rollout, ()):
                yield rollout, play


def windows(tallies: Sequence[Tally]) -> list[tuple[str, list[Tally]]]:
    """All steps, and their thirds where there are at least six; in the order of steps."""
    ordered = sorted(tallies, key=lambda t: t.step)
    found = [("all steps", ordered)]
    if len(ordered) >= 6:
        cuts = [round(len(ordered) * i / 3) for i in range(4)]
        names = ("first third", "middle third", "last third")
        found += [(name, ordered[a:b]) for name, a, b in zip(names, cuts, cuts[1:], strict=False)]
    return found


def sum_lists(tallies: Iterable[Tally], what: str) -> dict:
    """By key, the sums of the lists of counts that the tallies hold under ``what``."""
    total: dict = {}
    for tally in tallies:
        for key, counts in getattr(tally, what).items():
            mine = total.setdefault(key, [0] * len(counts))
            for i, count in enumerate(counts):
                mine[i] += count
    return total


def credit_summary(tallies: Sequence[Tally], agents: Sequence[str]) -> list[dict]:
    """By window of steps: what each agent was paid when the team was right and when it was wrong, and what its removal does."""
    return [_window(name, chosen, agents) for name, chosen in windows(tallies)]


def _window(name: str, tallies: Sequence[Tally], agents: Sequence[str]) -> dict:
    pairs, signal = sum_lists(tallies, "pairs"), sum_lists(tallies, "signal")
    found = []
    for agent in agents[:MAX_AGENTS]:
        paid = [pair for tally in tallies for pair in tally.paid(agent)]
        groups, moving = signal.get(agent, (0, 0))
        found.append(
            {
                "agent": agent,
                "correct": box([c for c, r in paid if is_correct(r)]),
                "wrong": box([c for c, r in paid if not is_correct(r)]),
                "mean": short(math.fsum(c for c, _ in paid) / len(paid)) if paid else None,
                "corr": short(correlation(paid), 4),
                "pairs": pairs.get(agent),
                "groups": groups,
                "signal": short(moving / groups, 4) if groups else None,
            }
        )
    rollouts = sum(t.rollouts for t in tallies)
    return {
        "name": name,
        "from": tallies[0].step if tallies else None,
        "to": tallies[-1].step if tallies else None,
        "rollouts": rollouts,
        "reward": short(math.fsum(t.reward for t in tallies) / rollouts, 4) if rollouts else None,
        "agents": found,
    }


def box(values: list[float]) -> dict[str, float | None] | None:
    """A box plot by Tukey: quartiles (linear interpolation), whiskers at the last value within 1.5 of the box's height, the
    mean, and how many lie outside; None without values."""
    if not values:
        return None
    values = sorted(values)
    q1, median, q3 = (quantile(values, q) for q in (0.25, 0.5, 0.75))
    reach = 1.5 * (q3 - q1)
    inside = [v for v in values if q1 - reach <= v <= q3 + reach]
    found = {"q1": q1, "median": median, "q3": q3, "low": inside[0], "high": inside[-1]}
    found |= {"min": values[0], "max": values[-1], "mean": math.fsum(values) / len(values)}
    return {key: short(v) for key, v in found.items()} | {"n": len(values), "outside": len(values) - len(inside)}


def quantile(ordered: Sequence[float], q: float) -> float:
    """The q-quantile of sorted values, between neighbours by linear interpolation."""
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Pearson's correlation; None where one side is constant."""
    if len(pairs) < 2:
        return None
    x, y = zip(*pairs, strict=True)
    if min(x) == max(x) or min(y) == max(y):
        return None
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    sxy = math.fsum((a - mean_x) * (b - mean_y) for a, b in pairs)
    sxx, syy = math.fsum((a - mean_x) ** 2 for a in x), math.fsum((b - mean_y) ** 2 for b in y)
    scale = math.sqrt(sxx) * math.sqrt(syy)
    return max(-1.0, min(1.0, sxy / scale)) if 0 < scale < math.inf else None
