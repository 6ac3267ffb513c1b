"""Alarms about what an agent is worth to its team."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ccpo.alarms.base import EXAM_Z, MIN_STEPS, T_STEPS, Alarm, View

IDLE = 0.02
"""Points of reward below which an agent's effect counts as none, if its bounds also exclude ``MATTERS``."""
MATTERS = 0.10
"""Points of reward that an agent must be shown not to be worth before it is called idle."""
HOPELESS = 0.10
"""Mean reward below which nobody can be told to help: there is nothing to lose."""
NEVER = 0.02
"""Share of plays in which a voter's absence changes the reward, below which it has no say; the bound must exclude ``OFTEN``."""
OFTEN = 0.05
"""That share of another voter says that votes are open at all: in a vote that is always right nobody has a say."""
HARM = 0.02
"""Points of reward that the team gains without an agent."""
LOST = 0.05
"""Points of accuracy alone that an agent has lost."""
CAPTURED = 0.95
"""Share of contested votes that one voter wins. Of three voters of like skill each wins two thirds; a voter who is never wrong among two who are
right in 60% of the cases wins 75%."""


def idle_agent(view: View) -> list[Alarm]:
    """An agent whose removal does not matter."""
    found = []
    for agent in view.shape.helpers:
        told = [e for e in (_window_effect(view, agent), _exam_effect(view, agent)) if e is not None]
        idle = [e for e in told if -HARM <= e["effect"] < IDLE and e["low"] > -MATTERS and e["high"] < MATTERS]
        if idle and not any(e["low"] > IDLE for e in told):
            found.append(_idle(agent, idle[-1], f"the team's reward changes by {-idle[-1]['effect']:+.3f}"))
    return found + _idle_voters(view)


def _idle_voters(view: View) -> list[Alarm]:
    shares = {a: m for a in dict.fromkeys(view.shape.voters.values()) if (m := view.problems(f"changed/{a}"))}
    found = []
    for agent, share in shares.items():
        high = share.share_bounds()[1]
        others = [m.share_bounds()[0] for a, m in shares.items() if a != agent]
        if share.mean < NEVER and high < OFTEN < max(others, default=0.0):
            evidence = {"changed": share.mean, "high": high, "others_low": max(others), "problems": int(share.n)}
            found.append(_idle(agent, evidence, f"the vote's reward changes in {share.mean:.1%} of the plays"))
    return found


def _idle(agent: str, evidence: Mapping[str, Any], what: str) -> Alarm:
    return Alarm(
        level="warn",
        name="idle_agent",
        title=f"{agent} makes no difference",
        what=f"Without {agent} {what}: it is along for the ride, and what it is paid is noise.",
        remedy="a rule that pays its own contribution (credit.kind: auto or removal); look at what it says, and at whether its readers' "
        "prompts make use of it; or train a smaller team.",
        agent=agent,
        evidence=evidence,
    )


def harmful_agent(view: View) -> list[Alarm]:
    """An agent that hurts."""
    found = []
    for agent in view.shape.agents:
        if agent == view.shape.decider:
            continue
        told = [e for e in (_window_effect(view, agent), _exam_effect(view, agent)) if e is not None]
        bad = [e for e in told if e["high"] < 0 and e["effect"] < -HARM]
        if not bad or any(e["high"] > HARM for e in told if e not in bad) or not _worse_than_others(view, agent):
            continue
        gain = -bad[-1]["effect"]
        found.append(
            Alarm(
                level="warn",
                name="harmful_agent",
                title=f"{agent} hurts the team",
                what=f"Without {agent} the team's reward is {gain:.3f} higher: its messages mislead, or its votes are wrong more often than "
                "the others'.",
                remedy="look at rollouts that are right without it; train it longer while the others rest (trainer.schedule: alternating); give "
                "it a better model or prompt; or leave it out.",
                agent=agent,
                evidence=bad[-1],
            )
        )
    return found


def _worse_than_others(view: View, agent: str) -> bool:
    """Of a voter: where all are more often wrong than right every voter makes the vote worse, and none is to blame."""
    if agent not in view.shape.voters.values():
        return True
    relative = view.problems(f"relative/{agent}")
    return relative is not None and relative.bounds()[1] < 0 and relative.mean < -HARM


def solo_lost(view: View) -> list[Alarm]:
    """An agent that could work alone and no longer can."""
    found = []
    for agent in view.shape.agents:
        if agent in view.shape.helpers:
            continue
        told = [e for e in (_window_loss(view, agent), _exam_loss(view, agent)) if e is not None]
        lost = [e for e in told if e["loss_low"] > LOST]
        if lost:
            before, after = lost[-1]["before"], lost[-1]["after"]
            found.append(
                Alarm(
                    level="warn",
                    name="solo_lost",
                    title=f"{agent} has lost its solo skill",
                    what=f"Alone {agent} was right in {before:.0%} of the cases and now in {after:.0%}: it has come to lean on the others, and "
                    "the team breaks where they fail.",
                    remedy="train it on its answers alone too (credit: {kind: ccpo_v1, gate: trajectory}); a KL to where it started (loss.kl: k3, "
                    "loss.kl_coef: 0.01); a lower learning rate.",
                    agent=agent,
                    evidence=lost[-1],
                )
            )
    return found


def captured_vote(view: View) -> list[Alarm]:
    """A vote that one voter decides."""
    shares = {a: m for a in dict.fromkeys(view.shape.voters.values()) if (m := view.problems(f"won/{a}"))}
    found = []
    for agent, share in shares.items():
        low = share.share_bounds()[0]
        others = [m.share_bounds()[1] for a, m in shares.items() if a != agent]
        if share.mean >= CAPTURED and others and low > max(others):
            found.append(
                Alarm(
                    level="warn",
                    name="captured_vote",
                    title=f"{agent} decides every vote",
                    what=f"Where the voters disagree, {agent}'s answer wins in {share.mean:.0%} of the votes and no other's in more than "
                    f"{max(others):.0%}: the others abstain, or are never as sure.",
                    remedy="look at whether the others' answers can be read (score, answers) and are not truncated; a vote in which every voice "
                    "counts once (team.vote: majority); pay voters their own contribution (credit.kind: auto).",
                    agent=agent,
                    evidence={"won": share.mean, "low": low, "others_high": max(others), "problems": int(share.n)},
                )
            )
    return found


# --- where the figures come from ---------------------------------------------------------------------------------------


def _window_effect(view: View, agent: str) -> dict[str, Any] | None:
    """What the agent adds to the reward, from the counterfactual plays of the window; None where it is hopeless or untold."""
    effect, reward = view.problems(f"effect/{agent}"), view.problems("reward")
    if effect is None or reward is None or reward.mean < HOPELESS:
        return None
    low, high = effect.bounds()
    where = f"training, steps {view.span[0]}–{view.span[1]}"
    return {"from": where, "effect": effect.mean, "low": low, "high": high, "problems": int(effect.n)}


def _exam_effect(view: View, agent: str) -> dict[str, Any] | None:
    """The same from the newest evaluation that has it."""
    exam = next((e for e in reversed(view.exams) if agent in e["report"].get("without", {})), None)
    if exam is None or exam["report"]["team"]["mean"] < HOPELESS:
        return None
    team, without = exam["report"]["team"], exam["report"]["without"][agent]
    effect = team["mean"] - without["mean"]
    reach = EXAM_Z * math.hypot(_error(team), _error(without))
    found = {"from": f"evaluation after step {exam['step']}", "effect": effect, "low": effect - reach}
    return found | {"high": effect + reach, "problems": exam["report"]["problems"]}


def _window_loss(view: View, agent: str) -> dict[str, Any] | None:
    """What the agent's accuracy alone has lost from the first steps to the last."""
    before, after = view.first.get(f"alone/{agent}"), view.steps(f"alone/{agent}")
    if before is None or before.n < MIN_STEPS or after is None:
        return None
    reach = T_STEPS * math.hypot(before.error, after.error)
    return _loss("training", before.mean, after.mean, reach)


def _exam_loss(view: View, agent: str) -> dict[str, Any] | None:
    """The same from the first and the newest evaluation."""
    exams = [e["report"]["alone"][agent] for e in view.exams if agent in e["report"].get("alone", {})]
    if len(exams) < 2:
        return None
    before, after = exams[0], exams[-1]
    reach = EXAM_Z * math.hypot(_error(before), _error(after))
    return _loss("evaluations", before["mean"], after["mean"], reach)


def _loss(where: str, before: float, after: float, reach: float) -> dict[str, Any]:
    return {"from": where, "before": before, "after": after, "loss_low": before - after - reach}


def _error(interval: Mapping[str, float]) -> float:
    """The standard error behind a 95% interval."""
    return (interval["high"] - interval["low"]) / (2 * 1.959964)
