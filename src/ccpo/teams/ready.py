r"""Ready-made teams, with prompts for instruction-tuned models on questions whose answer goes into ``\boxed{}``.

Every prompt can be replaced: ``prompts`` maps a turn's name, or an agent's for all of its turns, to a template.
``system`` is one system prompt, or one by agent. ``shared_policy`` lets all agents speak with the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from ccpo.errors import UserError, nearest
from ccpo.teams.decisions import LastTurn, Majority, Sampled, Weighted
from ccpo.teams.graph import Agent, Team, TurnSpec

Prompts = Mapping[str, str]
System = str | Mapping[str, str] | None

ANSWER = r"Reason step by step, and put your final answer within \boxed{}."

THINKER = (
    "{problem}\n\nThink about this problem for a colleague who will write the final solution. Say what matters: the "
    "idea, the steps, the intermediate results and the places where one goes wrong. Do not state the final answer and "
    "do not write \\boxed{}."
)

SOLVER = r"""{problem}[[

A colleague has thought about this problem:
{thinker}

Use what is right in these thoughts and correct what is wrong.]]

Reason step by step, and put your final answer within \boxed{}."""

VOTER = "{problem}\n\n" + ANSWER

FIRST = VOTER

DEBATER = (
    "{problem}[[\n\nYour previous answer:\n{OWN}]][[\n\nOther agents have answered:\n\n{upstream}\n\n"
    "Compare these answers with your own reasoning.]]\n\n" + ANSWER
)

LINK = r"""{problem}[[

A colleague has worked on this problem before you:
{PREVIOUS}

Check this work, correct what is wrong and carry it on.]]

Reason step by step, and put your final answer within \boxed{}."""

PLAN = (
    "{problem}\n\nYou lead a team of {COUNT}. Do not solve the problem yourself. Split it into parts that can be "
    "worked on at the same time, one for each worker, worker1 to worker{COUNT}, and write for each of them "
    "what to find out."
)

WORKER = """{problem}[[

The manager's plan:
{plan}

You are {NAME}. Do your part of this plan.]]

Work step by step, and state clearly what you have found."""

FINAL = r"""{problem}[[

Your plan:
{plan}]][[

Your workers report:

{upstream}

Check these reports and put them together.]]

Reason step by step, and put your final answer within \boxed{}."""

VOTES = {rule.kind: rule for rule in (Majority, Weighted, Sampled)}


def think_solve(
    *,
    prompts: Prompts | None = None,
    system: System = None,
    shared_policy: str | None = None,
    strip_boxed: bool = False,
) -> Team:
    """Thinker → Solver: one thinks, the other reads the thought and answers (CCPO, arXiv 2603.21563).

    ``strip_boxed`` takes a trailing boxed answer off the thought before the solver sees it (v2's runs).
    """
    turns = [
        TurnSpec("thinker", "thinker", THINKER, strip_boxed=strip_boxed),
        TurnSpec("solver", "solver", SOLVER),
    ]
    return _team("think_solve", ("thinker", "solver"), turns, LastTurn("solver"), prompts, system, shared_policy)


def single(*, prompts: Prompts | None = None, system: System = None) -> Team:
    """One agent that answers alone: what any team has to be better than."""
    return _team(
        "single", ("single",), [TurnSpec("single", "single", VOTER)], LastTurn("single"), prompts, system, None
    )


def voting(
    k: int = 3,
    *,
    decision: str = "majority",
    prompts: Prompts | None = None,
    system: System = None,
    shared_policy: str | None = None,
) -> Team:
    """``voter1`` … ``voterK`` answer alone and the vote decides (``majority``, ``weighted`` or ``sampled``)."""
    names = _names("voter", k)
    turns = [TurnSpec(name, name, VOTER) for name in names]
    return _team("voting", names, turns, _vote(decision)(names), prompts, system, shared_policy)


def chain(
    k: int = 3,
    *,
    prompts: Prompts | None = None,
    system: System = None,
    shared_policy: str | None = None,
    strip_boxed: bool = False,
) -> Team:
    """``agent1`` → … → ``agentK``: each carries on the work of the one before it, the last one answers."""
    names = _names("agent", k)
    turns = [TurnSpec(names[0], names[0], FIRST, strip_boxed=strip_boxed and k > 1)]
    for before, name in pairwise(names):
        template = LINK.replace("{PREVIOUS}", f"{{{before}}}")
        turns.append(TurnSpec(name, name, template, strip_boxed=strip_boxed and name != names[-1]))
    return _team("chain", names, turns, LastTurn(names[-1]), prompts, system, shared_policy)


def debate(
    k: int = 3,
    rounds: int = 2,
    *,
    decision: str = "majority",
    prompts: Prompts | None = None,
    system: System = None,
    shared_policy: str | None = None,
) -> Team:
    """``debater1`` … ``debaterK`` answer, then in each further round read everybody's answer of the round before and
    answer again; a vote over the last round decides. Turns are named ``debater1_round1``. ``rounds=1`` is voting."""
    names = _names("debater", k)
    _at_least("rounds", rounds, 1)
    turns = [TurnSpec(f"{name}_round1", name, FIRST) for name in names]
    for number in range(2, rounds + 1):
        for name in names:
            own = f"{name}_round{number - 1}"
            others = [f"{other}_round{number - 1}" for other in names if other != name]
            template = DEBATER.replace("{OWN}", f"{{{own}}}")
            turns.append(TurnSpec(f"{name}_round{number}", name, template, reads=(own, *others)))
    last = [f"{name}_round{rounds}" for name in names]
    return _team("debate", names, turns, _vote(decision)(last), prompts, system, shared_policy)


def manager_workers(
    k: int = 3, *, prompts: Prompts | None = None, system: System = None, shared_policy: str | None = None
) -> Team:
    """The manager plans (turn ``plan``), ``worker1`` … ``workerK`` do their parts, the manager reads them and answers
    (turn ``final``)."""
    workers = _names("worker", k)
    turns = [TurnSpec("plan", "manager", PLAN.replace("{COUNT}", str(k)))]
    turns += [TurnSpec(name, name, WORKER.replace("{NAME}", name)) for name in workers]
    turns.append(TurnSpec("final", "manager", FINAL, reads=("plan", *workers)))
    return _team("manager_workers", ("manager", *workers), turns, LastTurn("final"), prompts, system, shared_policy)


def _team(
    name: str,
    agents: Sequence[str],
    turns: Sequence[TurnSpec],
    decision: LastTurn | Majority | Weighted | Sampled,
    prompts: Prompts | None,
    system: System,
    shared_policy: str | None,
) -> Team:
    prompts = prompts or {}
    _known("prompts", prompts, dict.fromkeys([*(t.name for t in turns), *agents]))
    systems = dict.fromkeys(agents, system) if isinstance(system, str) else dict(system or {})
    _known("system", systems, agents)
    return Team(
        name,
        tuple(Agent(a, policy=shared_policy, system=systems.get(a)) for a in agents),
        tuple(_with_prompt(t, prompts) for t in turns),
        decision,
    )


def _with_prompt(turn: TurnSpec, prompts: Prompts) -> TurnSpec:
    template = prompts.get(turn.name, prompts.get(turn.agent))
    return turn if template is None else turn.with_template(template)


def _known(what: str, given: Mapping[str, object], known: Sequence[str] | Mapping[str, None]) -> None:
    for name in given:
        if name not in known:
            raise UserError(
                f"{what} has {name!r}, which this team does not know; allowed: "
                f"{', '.join(known)}.{nearest(name, known)}"
            )


def _names(prefix: str, k: int) -> tuple[str, ...]:
    _at_least("k", k, 1)
    return tuple(f"{prefix}{i}" for i in range(1, k + 1))


def _at_least(what: str, value: int, least: int) -> None:
    if type(value) is not int or value < least:
        raise UserError(f"team.{what} is {value!r}; it is a whole number of at least {least}")


def _vote(kind: str) -> Callable[[Sequence[str]], Majority | Weighted | Sampled]:
    if kind not in VOTES:
        raise UserError(f"team.decision is {kind!r}; a vote is one of {', '.join(VOTES)}.{nearest(str(kind), VOTES)}")
    return VOTES[kind]
