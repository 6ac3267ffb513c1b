"""The prompt of a rating turn: after the verifier has spoken, an agent reads the whole play and shares out its outcome (SEPO,
arXiv 2603.21563v2)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from ccpo.errors import UserError, nearest
from ccpo.teams.graph import Team, TurnSpec
from ccpo.teams.play import PlayTeam
from ccpo.teams.rating_parse import key_of
from ccpo.teams.templates import PROBLEM, UPSTREAM, Template

ANSWER = "team_answer"
"""What a rating prompt calls the team's answer."""

RATING = """{problem}

A team of {COUNT} agents has worked on this problem: {AGENTS}. You were {RATER}. This is what they said.

{SAID}

The team's answer: {team_answer}

The answer has been checked, and the outcome is: {OUTCOME}. {QUESTION}

Reply with one JSON object and nothing else:
{"outcome": "correct" or "wrong", "{KEY}": [{SHARES}], "brief_reason": "one short sentence"}
Repeat the outcome as it was checked. {RULE}"""

QUESTIONS = {
    "correct": "How much of this success is due to each agent?",
    "wrong": "How much of this failure is due to each agent?",
}

PAIRS = ", ".join(f"[{k / 10:g}, {1 - k / 10:g}]" for k in range(9, 0, -1))
PAIR_RULE = f'"pair" is one of {PAIRS}.'
SHARES_RULE = 'Each share is a multiple of 0.1, "shares" has one for each agent in this order, and they sum to 1.'

Speakers = tuple[tuple[str, str], ...]
"""The turns of a play in order: the name and the agent of each."""


def speakers(turns: Sequence[object]) -> Speakers:
    """The speakers of turns, or of their specs. Names are those that templates can show: a function's turn is called after
    its agent, whose name may have a hyphen."""
    return tuple((turn.name.replace("-", "_"), turn.agent) for turn in turns)


@lru_cache(maxsize=1024)
def rating_turn(
    rater: str, agents: tuple[str, ...], said: Speakers, outcome: str, prompt: str | None = None
) -> TurnSpec:
    """The turn in which ``rater`` rates a play: it reads the problem, every turn of ``said`` and the team's answer.

    ``outcome`` is "correct" or "wrong". ``prompt`` takes the place of the library's own template: it may show
    ``{problem}``, ``{upstream}``, single turns, ``{team_answer}``, and has ``{RATER}``, ``{OUTCOME}``, ``{AGENTS}``
    replaced. Raises UserError where it shows anything else, and where a turn of the team has the name ``team_answer``.
    """
    names = tuple(name for name, _ in said)
    if ANSWER in names:
        raise UserError(f"a turn has the name {ANSWER!r}, by which rating prompts call the team's answer; rename it")
    text = (RATING if prompt is None else prompt).replace("{RATER}", rater).replace("{OUTCOME}", outcome)
    text = text.replace("{AGENTS}", _list(agents))
    if prompt is None:
        text = _own_words(text, agents, said, outcome)
    shown = Template.parse(text).names
    for name in shown:
        if name not in (PROBLEM, UPSTREAM, ANSWER, *names):
            raise UserError(
                f"the rating prompt shows {{{name}}}; it can show {', '.join((PROBLEM, UPSTREAM, ANSWER, *names))}."
                + nearest(name, (PROBLEM, UPSTREAM, ANSWER, *names))
            )
    reads = tuple(n for n in (*names, ANSWER) if n in shown or (n != ANSWER and UPSTREAM in shown))
    return TurnSpec(name=f"rating_{rater.replace('-', '_')}"[:64], agent=rater, template=text, reads=reads)


def check_raters(team: Team | PlayTeam, prompt: str | None) -> None:
    """Raises UserError where a team cannot rate itself: fewer than two agents, or a prompt that does not fit its turns."""
    if len(team.agent_names) < 2:
        raise UserError(
            f"credit: ratings share an outcome among agents, and team {team.name!r} has only one; use credit.kind: shared"
        )
    said = speakers(team.turns_in_order) if isinstance(team, Team) else ()
    for rater in team.agent_names:
        rating_turn(rater, team.agent_names, said, "correct", prompt)


def _own_words(text: str, agents: tuple[str, ...], said: Speakers, outcome: str) -> str:
    K = len(agents)
    filled = {
        "{COUNT}": str(K),
        "{QUESTION}": QUESTIONS[outcome],
        "{KEY}": key_of(K),
        "{SHARES}": ", ".join(f"share of {agent}" for agent in agents),
        "{RULE}": PAIR_RULE if K == 2 else SHARES_RULE,
        # the last: a turn may be called RULE
        "{SAID}": "\n\n".join(f"{_speaker(name, agent)}:\n{{{name}}}" for name, agent in said),
    }
    for mark, words in filled.items():
        text = text.replace(mark, words)
    return text


def _speaker(name: str, agent: str) -> str:
    return agent if name == agent else f"{agent} ({name})"


def _list(agents: Sequence[str]) -> str:
    return f"{', '.join(agents[:-1])} and {agents[-1]}" if len(agents) > 1 else agents[0]
