"""The team as a drawing needs it: turns, who reads whom, the decision; tokens and credit by window of steps.

The graph is what ``recipe.json`` says. A run that does not say it is drawn from its prompts: a turn reads another one where
that one's message is nearly always in its prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ccpo.report.episodes import MAX_TURNS
from ccpo.report.reading import items, mapping, short, text
from ccpo.report.tally import Tally, sum_lists, windows

HEARD = 0.9  # share of prompts that hold a message from which on it is read

Turns = dict[str, dict[str, Any]]


def team_graph(recipe: Mapping[str, Any], tallies: Sequence[Tally]) -> dict[str, Any]:
    """``turns`` in topological order, each with name, agent, level and reads; ``decision`` with kind and reads; ``source``:
    "recipe", "prompts", or None where nothing is known."""
    written = mapping(recipe.get("team"))
    turns = _written_turns(written)
    source = "recipe" if turns else None
    if not turns:
        turns = _heard_turns(tallies)
        source = "prompts" if turns else None
    reads = [name for name in items(written.get("reads")) if isinstance(name, str) and name in turns]
    levels = _levels(turns)
    ordered = sorted(turns.values(), key=lambda turn: levels[turn["name"]])
    return {
        "source": source,
        "decider": text(written.get("decider")),
        "turns": [{**turn, "level": levels[turn["name"]]} for turn in ordered],
        "decision": {"kind": text(written.get("decision")), "reads": reads} if reads else None,
        "windows": [{"name": name, "tokens": _tokens(chosen)} for name, chosen in windows(tallies)],
        "prompts": _prompts(tallies),
    }


def agents_of(recipe: Mapping[str, Any], tallies: Sequence[Tally]) -> list[str]:
    """The agents in the team's order: of the recipe, else as they speak, and whoever is paid beside them."""
    written = [a[:64] for a in items(mapping(recipe.get("team")).get("agents")) if isinstance(a, str)]
    spoken = [agent for tally in tallies for agent in (*tally.speaker.values(), *tally.credit)]
    return list(dict.fromkeys([*written, *spoken]))[:MAX_TURNS]


def _written_turns(written: Mapping[str, Any]) -> Turns:
    turns: Turns = {}
    for data in map(mapping, items(written.get("turns"))[:MAX_TURNS]):
        name, agent = text(data.get("name"), 64), text(data.get("agent"), 64)
        if name and agent:
            reads = [r for r in items(data.get("reads")) if isinstance(r, str)]
            turns[name] = {"name": name, "agent": agent, "reads": reads}
    for turn in turns.values():
        turn["reads"] = [r for r in turn["reads"] if r in turns and r != turn["name"]]
    return turns


def _heard_turns(tallies: Sequence[Tally]) -> Turns:
    speakers = {name: agent for tally in tallies for name, agent in tally.speaker.items()}
    turns: Turns = {n: {"name": n, "agent": a, "reads": []} for n, a in list(speakers.items())[:MAX_TURNS]}
    for (earlier, later), (hits, total) in sum_lists(tallies, "heard").items():
        if total and hits / total >= HEARD and earlier in turns and later in turns and earlier != later:
            turns[later]["reads"].append(earlier)
    return turns


def _levels(turns: Turns) -> dict[str, int]:
    """The level of each turn: one more than the highest that it reads. A circle, which no team of ours has, is cut at its end."""
    levels: dict[str, int] = {}
    waiting = dict(turns)
    while waiting:
        ready = [n for n, turn in waiting.items() if all(r in levels for r in turn["reads"])] or list(waiting)
        for name in ready:
            reads = [levels[r] for r in waiting[name]["reads"] if r in levels]
            levels[name] = 1 + max(reads, default=-1)
        waiting = {n: turn for n, turn in waiting.items() if n not in levels}
    return levels


def _tokens(tallies: Sequence[Tally]) -> dict[str, dict[str, float | None]]:
    """By turn, its mean tokens and the share of its texts that were cut off."""
    counts = sum_lists(tallies, "tokens")
    return {turn: {"mean": short(t / n, 4), "cut": short(c / n, 4)} for turn, (t, n, c) in counts.items() if n}


def _prompts(tallies: Sequence[Tally]) -> dict[str, str]:
    """What each turn was first shown."""
    found: dict[str, str] = {}
    for tally in sorted(tallies, key=lambda t: t.step):
        for turn, prompt in tally.prompts.items():
            found.setdefault(turn, prompt)
    return found
