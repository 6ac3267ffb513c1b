"""Teams as data: what a recipe writes under ``team: {kind: graph, …}``."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ccpo.errors import UserError, nearest
from ccpo.teams.decisions import Decision, Function, Judge, LastTurn, Vote
from ccpo.teams.graph import Agent, Team, TurnSpec

DECISIONS = ("last", "judge", "majority", "weighted", "sampled", "function")


def graph(
    *, agents: Sequence[str | Mapping[str, Any]], turns: Sequence[Mapping[str, Any]], decision: Mapping[str, Any] | None = None, name: str = "team"
) -> Team:
    """A team from plain data.

    ``agents``: names, or mappings with name, policy, system. ``turns``: mappings with name, agent (default: the name), template,
    reads, max_tokens, strip_boxed. ``decision``: ``{kind: last|judge, turn: NAME}``, ``{kind: majority|weighted|sampled, turns: [NAME…]}`` or
    ``{kind: function, fn: module:function, turns: […]}``. Raises UserError naming what is wrong.
    """
    return Team(
        name=name,
        agents=tuple(_record(Agent, {"name": a} if isinstance(a, str) else a, f"team.agents.{i}") for i, a in enumerate(agents)),
        turns=tuple(_record(TurnSpec, {"agent": t.get("name"), **t}, f"team.turns.{i}") for i, t in enumerate(turns)),
        decision=_decision(decision, name),
    )


def _record(cls: type, data: Mapping[str, Any], where: str) -> Any:
    known = [n for n, p in inspect.signature(cls).parameters.items()]
    for key in data:
        if key not in known:
            raise UserError(f"{where}.{key}: unknown key. Allowed: {', '.join(known)}." + nearest(key, known))
    for key, parameter in inspect.signature(cls).parameters.items():
        if parameter.default is inspect.Parameter.empty and data.get(key) is None:
            raise UserError(f"{where}: {key!r} is required")
    for key in ("name", "agent", "template", "policy", "system"):
        if data.get(key) is not None and not isinstance(data[key], str):
            raise UserError(f"{where}.{key}: found {data[key]!r}; expected text")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    return cls(**values)


def _decision(data: Mapping[str, Any] | None, team: str) -> Decision:
    if not data:
        raise UserError(
            f"team {team!r} has no decision: say which turn or vote is its answer, for example decision: {{kind: last, turn: NAME}}"
        )
    kind, rest = data.get("kind"), {k: v for k, v in data.items() if k != "kind"}
    if kind not in DECISIONS:
        raise UserError(f"team.decision.kind is {kind!r}; it is one of {', '.join(DECISIONS)}." + nearest(str(kind), DECISIONS))
    wanted = {"last": {"turn"}, "judge": {"turn"}, "function": {"fn", "turns"}}.get(kind, {"turns"})
    if set(rest) != wanted:
        raise UserError(f"team.decision of kind {kind!r} takes {', '.join(sorted(wanted))}; found {', '.join(sorted(rest)) or 'nothing'}")
    if kind in ("last", "judge"):
        return (LastTurn if kind == "last" else Judge)(str(rest["turn"]))
    if not isinstance(rest["turns"], list) or not rest["turns"]:
        raise UserError(f"team.decision.turns is {rest['turns']!r}; expected a list of turn names")
    turns = tuple(map(str, rest["turns"]))
    return Function(load_object(rest["fn"], "team.decision.fn"), turns) if kind == "function" else Vote(turns, kind)


def load_object(path: str, where: str) -> Callable[..., Any]:
    """The object at ``module:attribute``; modules are looked for beside the current folder too. Raises UserError."""
    module_name, colon, attribute = str(path).partition(":")
    if not colon:
        raise UserError(f"{where}: found {path!r}; expected module:attribute, for example my_rules:MyRule")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{where}: cannot import {module_name!r} ({error}); run from the folder it is in, or install it") from None
    if not hasattr(module, attribute):
        raise UserError(f"{where}: module {module_name!r} has no {attribute!r}." + nearest(attribute, dir(module)))
    return getattr(module, attribute)
