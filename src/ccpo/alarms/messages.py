"""Alarms about what agents say: to each other, to the verifier, and whether they come to an end."""

from __future__ import annotations

from ccpo.alarms.base import Alarm, Moments, View

EMPTY = 0.05
"""Share of messages that say nothing. A healthy agent's are never empty."""
COPIED = 0.30
"""Share of messages that are a text their speaker was shown."""
LEAKED = 0.20
"""Share of messages that declare the final answer though their prompt does not ask for it."""
TRUNCATED = 0.10
"""Share of turns that are cut off. A few per cent are usual for long reasoning; each is paid 0, whatever it was worth."""
HACKED = 5
"""Problems in the window with an answer that passed and cannot have been right. Each one alone is a contradiction; several are no slip."""
READ = 5
"""Problems with a passing answer that could be read, which show that this verifier does read answers."""


def empty_messages(view: View) -> list[Alarm]:
    """Messages that say nothing."""
    return [
        Alarm(
            level="warn",
            name="empty_messages",
            title=f"{agent} says nothing",
            what=f"{share.mean:.0%} of {agent}'s messages have no letter and no number: its readers work alone.",
            remedy="a lower learning rate or a KL to where it started (loss.kl: k3), a credit that sees its contribution (credit.kind: auto "
            "or removal); look at whether its prompt or a stop string ends it at once.",
            agent=agent,
            evidence=_evidence(share),
        )
        for agent, share in _shares(view, "empty", EMPTY)
    ]


def copied_messages(view: View) -> list[Alarm]:
    """Messages that repeat what their reader knows."""
    return [
        Alarm(
            level="warn",
            name="copied_messages",
            title=f"{agent} repeats what it was told",
            what=f"{share.mean:.0%} of {agent}'s messages are the problem or another agent's message over again: tokens that add nothing.",
            remedy="say in its prompt what it is to add; a credit that sees its contribution (credit.kind: auto or removal); start from a "
            "model that follows the prompt.",
            agent=agent,
            evidence=_evidence(share),
        )
        for agent, share in _shares(view, "copied", COPIED)
    ]


def leaked_answer(view: View) -> list[Alarm]:
    """Thoughts that give the final answer away."""
    found = []
    for agent, share in _shares(view, "leaked", LEAKED):
        found.append(
            Alarm(
                level="warn" if view.shape.forbidden else "info",
                name="leaked_answer",
                title=f"{agent} gives the final answer away",
                what=f"{share.mean:.0%} of {agent}'s messages declare the final answer, which its prompt does not ask for: its readers learn to "
                "copy, and the team is one agent with a scribe.",
                remedy="take the boxed answer off before others read it (team.strip_boxed: true); forbid it in the prompt; or make a team in which "
                "agents may answer (debate, voting).",
                agent=agent,
                evidence=_evidence(share),
            )
        )
    return found


def truncation(view: View) -> list[Alarm]:
    """Turns that are cut off."""
    return [
        Alarm(
            level="warn",
            name="truncation",
            title=f"{agent} is cut off",
            what=f"{share.mean:.0%} of {agent}'s turns end at max_tokens: they are paid nothing whatever they were worth, and long thoughts are "
            "unlearned.",
            remedy=f"raise rollout.max_tokens or agents.{agent}.max_tokens; ask for brevity in the prompt; rollout.truncated: keep.",
            agent=agent,
            evidence=_evidence(share),
        )
        for agent, share in _shares(view, "truncated", TRUNCATED)
    ]


def reward_hacking(view: View) -> list[Alarm]:
    """Answers that pass and cannot be right: without text, without an answer in it, or against every reference."""
    empty, unread, keys = (_count(view, f"hack/{name}") for name in ("empty", "unread", "keys"))
    if _count(view, "hack/read") < READ:
        unread = 0  # a verifier that reports no answers at all
    if max(empty, unread, keys) < HACKED:
        return []
    seen = {
        f"{empty:.0f} problems with an empty answer that passed": empty,
        f"{unread:.0f} problems with a passing answer in which nothing could be read": unread,
        f"{keys:.0f} texts that passed against three or more different references": keys,
    }
    return [
        Alarm(
            level="warn",
            name="reward_hacking",
            title="the verifier passes what cannot be right",
            what=f"In the window: {'; '.join(text for text, number in seen.items() if number >= HACKED)}. The team is being trained to "
            "please the verifier.",
            remedy="run the verifier on these texts by hand and close the hole; a stricter one (verifier: exact, where: boxed). Do not "
            "believe the reward until then.",
            agent=None,
            evidence={"empty": empty, "unread": unread, "keys": keys},
        )
    ]


def _shares(view: View, name: str, threshold: float) -> list[tuple[str, Moments]]:
    """The agents whose share is above the threshold with certainty."""
    told = [(a, share) for a in view.shape.agents if (share := view.problems(f"{name}/{a}")) is not None]
    return [(agent, share) for agent, share in told if share.share_bounds()[0] > threshold]


def _count(view: View, name: str) -> float:
    return view.recent.get(name, Moments()).total


def _evidence(share: Moments) -> dict[str, float]:
    low, high = share.share_bounds()
    return {"share": share.mean, "low": low, "high": high, "problems": int(share.n)}
