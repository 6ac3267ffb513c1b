"""Teams: agents, the graph of their turns, removal as graph surgery, decision rules, prompts."""

from __future__ import annotations

from collections.abc import Callable

from ccpo.teams.boxed import strip_boxed
from ccpo.teams.chat import Prompt, PromptTooLong, render_prompt
from ccpo.teams.decisions import (
    DECISIONS,
    Ballot,
    Decided,
    Decision,
    Function,
    Judge,
    LastTurn,
    Majority,
    Sampled,
    Weighted,
)
from ccpo.teams.graph import Agent, Team, TurnSpec
from ccpo.teams.plan import Fate, Plan
from ccpo.teams.play import PlayTeam, Speak
from ccpo.teams.rating import check_raters, rating_turn, speakers
from ccpo.teams.rating_parse import equal_shares, parse_rating
from ccpo.teams.ready import chain, debate, manager_workers, single, think_solve, voting
from ccpo.teams.spec import custom, outline, team_from_dict
from ccpo.teams.templates import Template
from ccpo.teams.votes import ABSTAIN, VoteKind, majority_BK, recount_without

TEAMS: dict[str, Callable[..., Team]] = {
    "think_solve": think_solve,
    "voting": voting,
    "chain": chain,
    "debate": debate,
    "manager_workers": manager_workers,
    "single": single,
    "custom": custom,
}

__all__ = [
    "ABSTAIN",
    "DECISIONS",
    "TEAMS",
    "Agent",
    "Ballot",
    "Decided",
    "Decision",
    "Fate",
    "Function",
    "Judge",
    "LastTurn",
    "Majority",
    "Plan",
    "PlayTeam",
    "Prompt",
    "PromptTooLong",
    "Sampled",
    "Speak",
    "Team",
    "Template",
    "TurnSpec",
    "VoteKind",
    "Weighted",
    "chain",
    "check_raters",
    "custom",
    "debate",
    "equal_shares",
    "majority_BK",
    "manager_workers",
    "outline",
    "parse_rating",
    "rating_turn",
    "recount_without",
    "render_prompt",
    "single",
    "speakers",
    "strip_boxed",
    "team_from_dict",
    "think_solve",
    "voting",
]
