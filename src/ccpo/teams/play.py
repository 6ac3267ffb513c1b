"""The escape hatch: a team that is an async Python function, for loops, tool calls and whatever else no graph can say.

.. code-block:: python

    async def play(problem, speak):
        thought = await speak("thinker", "{problem} Think.")
        for _ in range(2):
            thought = await speak("critic", "{problem} [[Improve: {thought}]]", thought=thought)
        return await speak("solver", "{problem} [[{thought}]]", thought=thought) or ""

    team = PlayTeam("loop", ("thinker", "critic", "solver"), play)
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from ccpo.errors import UserError, nearest
from ccpo.teams.graph import Agent
from ccpo.types import Problem


class Speak(Protocol):
    """Lets ``agent`` speak: ``template`` may show ``{problem}`` and the ``messages`` by name. Returns what it said;
    None when the agent is removed by ``drop``, an empty text when it is removed by ``blank``."""

    async def __call__(self, agent: str, template: str, /, **messages: str | None) -> str | None: ...


Play = Callable[[Problem, Speak], Awaitable[str]]


@dataclass(frozen=True, slots=True)
class PlayTeam:
    """A team played by ``play(problem, speak)``, whose returned text is verified. Without an agent the whole play is
    run again.

    Raises :class:`~ccpo.errors.UserError` where ``play`` is not an async function of two arguments, and for names given
    twice.
    """

    name: str
    agents: tuple[Agent, ...]
    play: Play

    def __post_init__(self) -> None:
        agents = tuple(Agent(a) if isinstance(a, str) else a for a in self.agents)
        object.__setattr__(self, "agents", agents)
        names = self.agent_names
        if not names:
            raise UserError(f"team {self.name!r} has no agents; it needs at least one")
        twice = next((n for n in names if names.count(n) > 1), None)
        if twice is not None:
            raise UserError(f"team {self.name!r}: two agents have the name {twice!r}; rename one")
        if not _is_play(self.play):
            raise UserError(f"team {self.name!r}: play must be `async def play(problem, speak)`; found {self.play!r}")

    @property
    def agent_names(self) -> tuple[str, ...]:
        return tuple(a.name for a in self.agents)

    @property
    def decider(self) -> None:
        """None: a function may end with any agent's words."""
        return None

    def agent(self, name: str) -> Agent:
        found = next((a for a in self.agents if a.name == name), None)
        if found is None:
            raise UserError(
                f"team {self.name!r} has no agent {name!r}; it has "
                f"{', '.join(self.agent_names)}.{nearest(name, self.agent_names)}"
            )
        return found


def _is_play(play: object) -> bool:
    call = play if inspect.isroutine(play) else getattr(play, "__call__", None)  # noqa: B004
    if not inspect.iscoroutinefunction(call):
        return False
    try:
        inspect.signature(call).bind(None, None)
    except TypeError:
        return False
    return True
