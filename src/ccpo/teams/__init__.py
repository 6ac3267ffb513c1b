"""Teams: who speaks, who reads whom, and how one answer comes of it."""

from ccpo.teams.chat import Prompt, render_prompt
from ccpo.teams.decisions import Ballot, Decided, Decision, Function, Judge, LastTurn, Vote
from ccpo.teams.graph import Agent, Fate, Plan, Team, TurnSpec
from ccpo.teams.play import PlayTeam, Speak
from ccpo.teams.ready import chain, debate, manager_workers, think_solve, voting
from ccpo.teams.spec import graph, load_object
from ccpo.teams.templates import Template, strip_boxed

TEAMS = {
    "think_solve": think_solve,
    "voting": voting,
    "chain": chain,
    "debate": debate,
    "manager_workers": manager_workers,
    "graph": graph,
}

__all__ = [
    "TEAMS",
    "Agent",
    "Ballot",
    "Decided",
    "Decision",
    "Fate",
    "Function",
    "Judge",
    "LastTurn",
    "Plan",
    "PlayTeam",
    "Prompt",
    "Speak",
    "Team",
    "Template",
    "TurnSpec",
    "Vote",
    "chain",
    "debate",
    "graph",
    "load_object",
    "manager_workers",
    "render_prompt",
    "strip_boxed",
    "think_solve",
    "voting",
]
