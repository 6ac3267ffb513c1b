"""Teams written as data: the mapping that a YAML recipe holds, made into a :class:`~ccpo.teams.Team`.

.. code-block:: yaml

    name: critic
    agents: {writer: {}, critic: {system: You are strict.}}
    turns:
      draft:  {agent: writer, template: "{problem}"}
      review: {agent: critic, template: "{problem} [[Draft: {draft}]]"}
      final:  {agent: writer, template: "{problem} [[Draft: {draft}]] [[Review: {review}]]"}
    decision: {kind: last_turn, turn: final}

Agents may be a plain list of names; turns may be a list of mappings with a ``name``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ccpo.errors import UserError, nearest
from ccpo.teams.decisions import DECISIONS, Decision, Function, LastTurn
from ccpo.teams.graph import Agent, Team, TurnSpec
from ccpo.teams.play import PlayTeam

_AGENT_KEYS = ("policy", "system")
_TURN_KEYS = ("agent", "template", "reads", "max_tokens", "strip_boxed")


def team_from_dict(data: Mapping[str, Any]) -> Team:
    """The team that ``data`` describes. Raises :class:`~ccpo.errors.UserError` that names the key, and what is wrong
    with the graph."""
    _mapping("team", data)
    _keys("team", data, ("name", "agents", "turns", "decision"), needed=("agents", "turns", "decision"))
    return custom(**data)


def custom(
    *,
    agents: Sequence[str] | Mapping[str, Mapping[str, Any] | None],
    turns: Sequence[Mapping[str, Any]] | Mapping[str, Mapping[str, Any]],
    decision: Mapping[str, Any],
    name: str = "custom",
) -> Team:
    """A team of your own: see the module for the form of its parts."""
    return Team(
        str(name),
        tuple(_agent(key, value) for key, value in _named("team.agents", agents)),
        tuple(_turn(key, value) for key, value in _named("team.turns", turns)),
        _decision(decision),
    )


def _agent(name: str, data: Mapping[str, Any]) -> Agent:
    _keys(f"team.agents.{name}", data, _AGENT_KEYS)
    return Agent(name, **data)


def _turn(name: str, data: Mapping[str, Any]) -> TurnSpec:
    _keys(f"team.turns.{name}", data, _TURN_KEYS, needed=("agent", "template"))
    if not isinstance(data.get("strip_boxed", False), bool):
        raise UserError(f"team.turns.{name}.strip_boxed is {data['strip_boxed']!r}; write true or false")
    return TurnSpec(name, **data)


def _decision(data: Mapping[str, Any]) -> Decision:
    where = "team.decision"
    _mapping(where, data)
    kind = data.get("kind")
    if kind not in DECISIONS:
        raise UserError(f"{where}.kind is {kind!r}; allowed: {', '.join(DECISIONS)}.{nearest(str(kind), DECISIONS)}")
    rule = DECISIONS[kind]
    keys = ("turn",) if issubclass(rule, LastTurn) else ("fn", "turns") if rule is Function else ("turns",)
    _keys(where, data, ("kind", *keys), needed=keys)
    arguments = {key: data[key] for key in keys}
    if isinstance(arguments.get("fn"), str):
        arguments["fn"] = _imported(arguments["fn"])
    if "turns" in arguments and not isinstance(arguments["turns"], Sequence):
        raise UserError(f"{where}.turns is {arguments['turns']!r}; write a list of turns")
    return rule(**arguments)


def _imported(path: str) -> Callable[..., str]:
    """The attribute of a module that the user names as ``module:attribute``."""
    module, colon, attribute = path.partition(":")
    if not colon:
        raise UserError(f"team.decision.fn is {path!r}; name a function as module:attribute")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"team.decision.fn is {path!r}, which cannot be imported: {error}") from None


def _named(where: str, data: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """Pairs of name and keys from a mapping by name, a list of mappings with ``name``, or a list of names."""
    if isinstance(data, Mapping):
        pairs = [(str(name), {} if value is None else value) for name, value in data.items()]
    elif isinstance(data, Sequence) and not isinstance(data, str):
        pairs = [_named_item(where, item) for item in data]
    else:
        raise UserError(f"{where} is {data!r}; write a list, or a mapping by name")
    for name, value in pairs:
        _mapping(f"{where}.{name}", value)
    return pairs


def _named_item(where: str, item: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(item, str):
        return item, {}
    _mapping(where, item)
    if "name" not in item:
        raise UserError(f"{where}: an entry of the list has no name: {dict(item)!r}")
    return str(item["name"]), {key: value for key, value in item.items() if key != "name"}


def _mapping(where: str, data: Any) -> None:
    if not isinstance(data, Mapping):
        raise UserError(f"{where} is {data!r}; write a mapping of keys and values")


def _keys(where: str, data: Mapping[str, Any], allowed: Sequence[str], needed: Sequence[str] = ()) -> None:
    for key in data:
        if key not in allowed:
            raise UserError(f"{where}.{key}: unknown key; allowed: {', '.join(allowed)}.{nearest(str(key), allowed)}")
    for key in needed:
        if key not in data:
            raise UserError(f"{where}.{key}: this key is required")


def outline(team: Team | PlayTeam) -> dict[str, Any]:
    """The graph of a team as plain data, for drawing: ``agents``, ``decider``, ``turns`` in topological order with agent and reads,
    ``decision`` with kind and reads. A team that is a function has neither turns nor decision."""
    graph: dict[str, Any] = {"agents": list(team.agent_names), "decider": team.decider, "turns": [], "decision": None}
    if isinstance(team, Team):
        graph["turns"] = [{"name": t.name, "agent": t.agent, "reads": list(t.reads)} for t in team.turns_in_order]
        graph["decision"] = {"kind": str(team.decision.kind), "reads": list(team.decision.reads)}
    return graph
