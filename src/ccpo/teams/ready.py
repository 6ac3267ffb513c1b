"""Ready-made teams. Each is a dozen lines of data; prompts are for instruction-tuned models and can be replaced turn by turn."""

from __future__ import annotations

from collections.abc import Mapping

from ccpo.errors import UserError, nearest
from ccpo.teams.decisions import LastTurn, Vote
from ccpo.teams.graph import Agent, Team, TurnSpec

Texts = Mapping[str, str]

ANSWER = "Put your final answer in \\boxed{}."

THINKER = (
    "{problem}\n\nYou are the analyst of a team. Think the problem through step by step and write down the analysis that a colleague "
    "needs to answer it. Do not give the final answer."
)
SOLVER = "{problem}[[\n\nA colleague's analysis, which may contain mistakes:\n{thinker}]]\n\nReason step by step. " + ANSWER


def think_solve(
    *, prompts: Texts | None = None, systems: Texts | None = None, strip_boxed: bool = True, shared: bool = False
) -> Team:
    """Thinker → Solver: the thinker writes an analysis, the solver reads it and answers (arXiv 2603.21563).

    ``strip_boxed``: a thought's trailing ``\\boxed{…}`` is hidden from the solver. ``shared``: both speak with one policy.
    """
    turns = (
        TurnSpec(name="thinker", agent="thinker", template=THINKER, strip_boxed=strip_boxed),
        TurnSpec(name="solver", agent="solver", template=SOLVER, reads=("thinker",)),
    )
    return _team("think_solve", ("thinker", "solver"), turns, LastTurn("solver"), prompts, systems, shared)


def voting(
    size: int = 3,
    *,
    rule: str = "majority",
    prompts: Texts | None = None,
    systems: Texts | None = None,
    shared: bool = False,
) -> Team:
    """``size`` agents answer alone; the vote decides (``rule``: majority, weighted, sampled)."""
    _at_least("team.size", size, 1)
    if rule not in ("majority", "weighted", "sampled"):
        raise UserError(f"team.rule is {rule!r}; it is one of majority, weighted, sampled." + nearest(rule, ["majority", "weighted", "sampled"]))
    names = tuple(f"voter{i}" for i in range(1, size + 1))
    turns = tuple(TurnSpec(name=n, agent=n, template="{problem}\n\nReason step by step. " + ANSWER) for n in names)
    return _team("voting", names, turns, Vote(names, rule), prompts, systems, shared)


def chain(size: int = 3, *, prompts: Texts | None = None, systems: Texts | None = None, shared: bool = False) -> Team:
    """``size`` agents in a row, each reading the one before; the last one's turn is the answer."""
    _at_least("team.size", size, 2)
    names = tuple(f"agent{i}" for i in range(1, size + 1))
    turns = [TurnSpec(name=names[0], agent=names[0], template="{problem}\n\nWrite down the first steps towards a solution.")]
    for before, name in zip(names, names[1:], strict=False):
        last = name == names[-1]
        task = "Finish the solution. " + ANSWER if last else "Check this and carry the solution on."
        turns.append(TurnSpec(name=name, agent=name, template=f"{{problem}}[[\n\nWork so far:\n{{{before}}}]]\n\n{task}"))
    return _team("chain", names, tuple(turns), LastTurn(names[-1]), prompts, systems, shared)


def debate(
    size: int = 3, rounds: int = 2, *, prompts: Texts | None = None, systems: Texts | None = None, shared: bool = False
) -> Team:
    """``size`` agents answer, then in each further round read the others' last answers and answer again; the majority decides."""
    _at_least("team.size", size, 2)
    _at_least("team.rounds", rounds, 1)
    names = tuple(f"debater{i}" for i in range(1, size + 1))
    turns = [TurnSpec(name=f"{n}_r1", agent=n, template="{problem}\n\nReason step by step. " + ANSWER) for n in names]
    for r in range(2, rounds + 1):
        for n in names:
            others = tuple(f"{o}_r{r - 1}" for o in names if o != n)
            turns.append(
                TurnSpec(
                    name=f"{n}_r{r}",
                    agent=n,
                    reads=others,
                    template="{problem}[[\n\nWhat the others say:\n{upstream}]]\n\nWeigh their arguments and answer again. " + ANSWER,
                )
            )
    return _team("debate", names, tuple(turns), Vote(tuple(f"{n}_r{rounds}" for n in names)), prompts, systems, shared)


def manager_workers(
    workers: int = 2, *, prompts: Texts | None = None, systems: Texts | None = None, shared: bool = False
) -> Team:
    """A manager plans, the workers each do their part of the plan, and the manager's second turn is the answer."""
    _at_least("team.workers", workers, 1)
    names = tuple(f"worker{i}" for i in range(1, workers + 1))
    turns = [TurnSpec(name="plan", agent="manager", template="{problem}\n\nSplit this into " + f"{workers} parts, one for each worker. Number them.")]
    for i, n in enumerate(names, start=1):
        turns.append(TurnSpec(name=n, agent=n, template=f"{{problem}}[[\n\nThe plan:\n{{plan}}]]\n\nYou are worker {i}. Do part {i}."))
    turns.append(
        TurnSpec(
            name="final",
            agent="manager",
            reads=names,
            template="{problem}[[\n\nWhat the workers found:\n{upstream}]]\n\nPut the parts together. " + ANSWER,
        )
    )
    return _team("manager_workers", ("manager", *names), tuple(turns), LastTurn("final"), prompts, systems, shared)


def _at_least(key: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{key} is {value}; this team needs at least {least}")


def _team(
    name: str,
    agents: tuple[str, ...],
    turns: tuple[TurnSpec, ...],
    decision: LastTurn | Vote,
    prompts: Texts | None,
    systems: Texts | None,
    shared: bool,
) -> Team:
    """Put the user's prompts (by turn, or by agent for all its turns) in the place of the ready-made ones."""
    prompts, systems = dict(prompts or {}), dict(systems or {})
    known = [*agents, *(t.name for t in turns)]
    for key in prompts:
        if key not in known:
            raise UserError(f"team.prompts.{key}: team {name!r} has no such turn or agent; it has {', '.join(dict.fromkeys(known))}." + nearest(key, known))
    for key in systems:
        if key not in agents:
            raise UserError(f"team.systems.{key}: team {name!r} has no such agent; it has {', '.join(agents)}." + nearest(key, agents))
    replaced = tuple(
        TurnSpec(
            name=t.name,
            agent=t.agent,
            template=prompts.get(t.name, prompts.get(t.agent, t.template)),
            reads=t.reads,
            strip_boxed=t.strip_boxed,
        )
        for t in turns
    )
    return Team(
        name=name,
        agents=tuple(Agent(name=a, policy="shared" if shared else None, system=systems.get(a)) for a in agents),
        turns=replaced,
        decision=decision,
    )
