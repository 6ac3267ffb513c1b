"""The escape hatch: a team that is an async Python function, for loops, branches and tool calls that no graph can say."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from ccpo.errors import UserError
from ccpo.teams.graph import Agent
from ccpo.types import Problem


class Speak(Protocol):
    """``await speak("thinker", prompt)``: the agent's answer to the prompt; None where the agent was removed, an empty string where it was blanked."""

    def __call__(self, agent: str, prompt: str) -> Awaitable[str | None]: ...


@dataclass(frozen=True, kw_only=True)
class PlayTeam:
    """A team played by ``async def play(problem, speak) -> str``, whose returned text is verified.

    When agents are removed the function runs again: ``speak`` gives None for them, and what another agent had said to the very same prompt is
    kept; only prompts that changed are decoded again. ``play`` must be deterministic apart from what is spoken.
    """

    name: str = "play"
    agents: tuple[Agent, ...]
    play: Callable[[Problem, Speak], Awaitable[str]]

    def __post_init__(self) -> None:
        if not self.agents:
            raise UserError(f"team {self.name!r} has no agents")
        if not inspect.iscoroutinefunction(self.play):
            raise UserError(f"team {self.name!r}: play must be an async function (async def play(problem, speak))")

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(agent.name for agent in self.agents)

    @property
    def decider(self) -> None:
        """Unknown: the function makes the answer."""
        return None

    def agent(self, name: str) -> Agent:
        return next(a for a in self.agents if a.name == name)
