"""A team in words and lists, for files: who is there, who speaks when after having heard whom, and how it is decided."""

from __future__ import annotations

from typing import Any

from ccpo.teams.graph import Team
from ccpo.teams.play import PlayTeam


def describe(team: Team | PlayTeam) -> dict[str, Any]:
    """What a run's ``recipe.json`` says of its team.

    ``agents``; ``decider``: the one agent whose turn is the answer, or None; ``decision``: the rule's kind, None for a function that
    plays the team; ``reads``: the turns that the decision reads; ``turns`` in topological order, each with ``name``, ``agent``,
    what it ``reads`` and the template of its ``prompt``; ``free``: the agents whose removal decodes nothing, as that of a voter whom nobody hears.
    """
    named = {"name": team.name, "agents": list(team.agent_names), "decider": team.decider}
    if isinstance(team, PlayTeam):
        return named | {"decision": None, "reads": [], "turns": [], "free": []}
    return named | {
        "decision": str(team.decision.kind),
        "reads": list(team.decision.reads),
        "turns": [
            {"name": t.name, "agent": t.agent, "reads": list(t.reads), "prompt": t.template}
            for t in team.turns_in_order
        ],
        "free": [name for name in team.agent_names if name != team.decider and team.plan((name,)).free],
    }
