"""Every alarm by name: a function of a :class:`~ccpo.alarms.base.View` that returns what it found."""

from __future__ import annotations

from collections.abc import Callable

from ccpo.alarms.agents import captured_vote, harmful_agent, idle_agent, solo_lost
from ccpo.alarms.base import Alarm, View
from ccpo.alarms.messages import copied_messages, empty_messages, leaked_answer, reward_hacking, truncation
from ccpo.alarms.signals import engine_mismatch, exploding_normalisation, no_signal, same_as_shared

ALARMS: dict[str, Callable[[View], list[Alarm]]] = {
    "idle_agent": idle_agent,
    "harmful_agent": harmful_agent,
    "solo_lost": solo_lost,
    "captured_vote": captured_vote,
    "empty_messages": empty_messages,
    "copied_messages": copied_messages,
    "leaked_answer": leaked_answer,
    "truncation": truncation,
    "reward_hacking": reward_hacking,
    "no_signal": no_signal,
    "same_as_shared": same_as_shared,
    "exploding_normalisation": exploding_normalisation,
    "engine_mismatch": engine_mismatch,
}

NEED_TEAM = frozenset(("idle_agent", "harmful_agent", "solo_lost", "captured_vote", "leaked_answer", "same_as_shared"))
"""Those that say nothing true without the recipe: who decides, who votes, whose prompt asks for an answer, which rule pays."""
