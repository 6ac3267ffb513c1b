"""From a recipe to objects: checks every name and argument before a model is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model

from ccpo import credit as credit_rules
from ccpo.config import CONTEXT, Part, RunConfig
from ccpo.engines.vllm import COOLEST, HOTTEST
from ccpo.errors import UserError, nearest
from ccpo.explain import explain
from ccpo.imports import load_object
from ccpo.rating_lessons import RatingLessons
from ccpo.rollout import AskRatings, Limits, Sampling, plant
from ccpo.schedule import ProblemSampler, Schedule
from ccpo.tasks import TASKS, ProceduralTask, Task, limited
from ccpo.teams import TEAMS, PlayTeam, Team, Weighted, check_raters
from ccpo.types import Removal


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A recipe's objects, short of the models. ``tests`` are the evaluation's data sets by name. ``branch``: the tree
    of rollouts, "auto" where a planner chooses it."""

    config: RunConfig
    team: Team | PlayTeam
    task: Task
    tests: Mapping[str, Task]
    rule: Any
    schedule: Schedule
    policy_of: Mapping[str, str]
    samplings: Mapping[str, Sampling]
    limits: Limits
    branch: tuple[int, ...] | str = ()

    @property
    def removal(self) -> Removal:
        return Removal(self.config.rollout.removal)

    @property
    def free_removals(self) -> bool:
        """Whether no agent's removal, and so no coalition's, decodes anything: a vote. Of a function nobody can tell beforehand."""
        team = self.team
        return isinstance(team, Team) and all(team.plan((name,), self.removal).free for name in team.agent_names)


def build_part(table: Mapping[str, Callable[..., Any]], part: Part, where: str) -> Any:
    """Call what ``part`` names (a key of ``table``, or ``module:attribute``) with its arguments, checked against its
    signature. Raises UserError with the path of the key, what was found, what is allowed and the nearest name.
    """
    if ":" in part.kind:
        target = load_object(part.kind, f"{where}.kind")
    elif part.kind in table:
        target = table[part.kind]
    else:
        raise UserError(
            f"{where}.kind: found {part.kind!r}; it is one of {', '.join(table)}, or module:attribute of your own."
            + nearest(part.kind, table)
        )
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    fields = {
        name: (hints.get(name, Any), ... if p.default is inspect.Parameter.empty else p.default)
        for name, p in inspect.signature(target).parameters.items()
        if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    }
    schema = create_model("Arguments", __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True), **fields)
    try:
        checked = schema(**part.arguments)
    except ValidationError as error:
        raise UserError(explain(error, schema, "recipe", part.arguments, inside=where)) from None
    return target(**{name: getattr(checked, name) for name in part.arguments})


def prepare(
    config: RunConfig, *, team: Any = None, task: Any = None, tests: Mapping[str, Any] | None = None, credit: Any = None
) -> Setup:
    """The objects of ``config``; those passed in take the place of what it names. Raises UserError."""
    team = team or build_part(TEAMS, config.team, "team")
    if task is None and config.task is None:
        raise UserError("recipe: task: this key is required; for example task: {kind: file, path: train.jsonl}")
    task = task if task is not None else _task(config, config.task, "task")
    rule = credit or build_part(credit_rules.RULES, config.credit, "credit")
    _check_agents(config, team)
    _check_settings(config, team)
    _check_remotes(config, team)
    _check_process(config, team, task)
    if ratings_of(rule) is not None:
        check_raters(team, ratings_of(rule).prompt)
    if config.bootstrap.ratings:
        _check_rating_lessons(config, team, task, rule)
    ProblemSampler(
        total=len(task), batch=config.rollout.prompts, seed=config.run.seed
    )  # refuses a task smaller than a step
    trainable = tuple(name for name in team.agent_names if not _frozen(config, name))
    rule.needs(team.agent_names, team.decider, trainable)  # refuses a team that the rule cannot pay
    return Setup(
        config=config,
        team=team,
        task=task,
        tests=tests or _tests(config, task),
        rule=rule,
        schedule=Schedule(
            agents=trainable,
            alternating=config.trainer.schedule == "alternating",
            period=config.trainer.period,
            first=config.trainer.first,
        ),
        policy_of={name: _policy(config, team, name) for name in team.agent_names},
        samplings={name: _sampling(config, name) for name in team.agent_names},
        limits=Limits(
            max_prompt_tokens=config.rollout.max_prompt_tokens,
            max_message_tokens=config.rollout.max_message_tokens,
            truncated_is_zero=config.rollout.truncated == "zero",
        ),
        branch=branch_of(config, team, rule),
    )


def branch_of(config: RunConfig, team: Team | PlayTeam, rule: Any) -> tuple[int, ...] | str:
    """The tree of rollouts: the recipe's, else the rule's own wish, else none; "auto" leaves it to the planner."""
    wanted = config.rollout.branch
    if wanted is None:
        wanted = getattr(rule, "branch", None)
        if not isinstance(team, Team) or wanted is None:
            return ()
    if not isinstance(team, Team):
        raise UserError(
            "rollout.branch is for teams that are a graph; a team that is a Python function has no levels: set it to null"
        )
    if wanted == "auto":
        if config.rollout.samples < 2:
            raise UserError("a tree of rollouts needs at least two a problem: set rollout.samples to 2 or more")
        return "auto" if len(team.levels) > 1 else ()
    return plant(team, wanted, config.rollout.samples).branch


def ratings_of(rule: Any) -> AskRatings | None:
    """How a rule wants every agent to rate every rollout; None where it does not."""
    if not getattr(rule, "rates", False):
        return None
    asked = {f.name: getattr(rule, f.name) for f in fields(AskRatings) if hasattr(rule, f.name)}
    return AskRatings(**asked)


def rating_lessons_of(setup: Setup) -> RatingLessons | None:
    """What the tiny base model learns of rating; None where it learns nothing of it, or where nobody can teach it."""
    wanted = setup.config.bootstrap.ratings
    return _rating_lessons(setup.config, setup.team, setup.task, setup.rule) if wanted else None


def _rating_lessons(config: RunConfig, team: Any, task: Any, rule: Any) -> RatingLessons | None:
    if not isinstance(team, Team) or not isinstance(task, ProceduralTask):
        return None  # neither has a teacher: refused where the base would be made
    return RatingLessons(team, task, ratings_of(rule).prompt, config.bootstrap.rating_noise)


def _check_rating_lessons(config: RunConfig, team: Any, task: Any, rule: Any) -> None:
    """Raises UserError for ratings that the tiny base model could not learn, or that nobody would ask it for."""
    if "bootstrap" not in [config.model.path, *(agent.model for agent in config.agents.values())]:
        raise UserError(
            "bootstrap.ratings is true, but no model is made by bootstrap: model.path is another; set bootstrap.ratings: false"
        )
    asked = ratings_of(rule)
    if asked is None:
        raise UserError(
            "bootstrap.ratings is true, but the credit rule asks for no ratings; set credit.kind: sepo, or bootstrap.ratings: false"
        )
    if asked.prompt is None:
        raise UserError(
            "bootstrap.ratings is true, but credit.prompt is not set, and the library's own rating prompt is too long for the tiny base "
            "model; give it a short one, for example credit.prompt: 'R{problem}:{upstream}|{OUTCOME}|'"
        )
    if asked.strict:
        raise UserError(
            "bootstrap.ratings teaches ratings in few characters, which are no JSON; set credit.strict: false"
        )
    lessons = _rating_lessons(config, team, task, rule)
    if lessons is None:
        return
    longest, prompt = lessons.longest() + 1, max(lessons.prompts(), key=len)
    if asked.max_tokens < longest:
        raise UserError(
            f"credit.max_tokens is {asked.max_tokens}, and a rating by {len(team.agent_names)} agents that bootstrap.ratings teaches has "
            f"{longest} tokens, a character each; set credit.max_tokens: {longest} or more"
        )
    if not prompt.isascii():
        raise UserError("credit.prompt: the tiny base model reads ASCII characters alone; found others in it")
    room = min(config.rollout.max_prompt_tokens, CONTEXT - asked.max_tokens)
    if len(prompt) > room:
        raise UserError(
            f"credit.prompt has {len(prompt)} characters with nothing in it, and the tiny base model, which reads a character a token, has room for "
            f"{room} (rollout.max_prompt_tokens, and a context of {CONTEXT} less credit.max_tokens); give it a shorter one"
        )


def _check_agents(config: RunConfig, team: Team | PlayTeam) -> None:
    for section, names in (("agents", config.agents), ("rollout.boxed_reward", config.rollout.boxed_reward)):
        for name in names:
            if name not in team.agent_names:
                raise UserError(
                    f"{section}.{name}: the team {team.name!r} has no such agent; it has {', '.join(team.agent_names)}."
                    + nearest(name, team.agent_names)
                )
    if isinstance(team, Team) and isinstance(config.bootstrap.noise, dict):
        for name in config.bootstrap.noise:
            if name not in team.order:
                raise UserError(
                    f"bootstrap.noise.{name}: the team {team.name!r} has no such turn; it has {', '.join(team.order)}."
                    + nearest(name, team.order)
                )


def _check_settings(config: RunConfig, team: Team | PlayTeam) -> None:
    if config.rollout.removal == Removal.FROZEN and isinstance(team, PlayTeam):
        raise UserError(
            "rollout.removal 'frozen' is not available for a team that is a Python function; use drop or blank"
        )
    if config.trainer.first is not None and config.trainer.schedule != "alternating":
        raise UserError(
            "trainer.first is set but trainer.schedule is 'simultaneous'; set trainer.schedule: alternating"
        )
    if config.advantage == "maxrl" and config.credit.kind not in ("shared", "own") and ":" not in config.credit.kind:
        raise UserError(
            f"advantage 'maxrl' divides by a success rate, and credit {config.credit.kind!r} can be negative; use it with credit "
            "'shared' or 'own', or set credit: {kind: auto, scale: mean}"
        )
    if config.model.engine == "vllm":
        _check_vllm(config, team)
    if config.trainer.async_depth:
        _check_async(config)
    if config.loss.kl != "none" and config.loss.kl_coef == 0:
        raise UserError(f"loss.kl is {config.loss.kl!r} but loss.kl_coef is 0; give it a weight, or set loss.kl: none")


def _check_async(config: RunConfig) -> None:
    """What cannot speak while its weights are being changed."""
    engine = config.model.engine
    if engine == "transformers" or (engine == "vllm" and config.model.vllm.url is None):
        why = (
            "speaks with the very weights that the update changes"
            if engine == "transformers"
            else "sleeps during an update"
        )
        raise UserError(
            f"trainer.async_depth: model.engine {engine!r} {why}; set model.engine: native, or trainer.async_depth: 0"
            + (", or give vLLM GPUs of its own (model.vllm.url)" if engine == "vllm" else "")
        )


def _check_vllm(config: RunConfig, team: Team | PlayTeam) -> None:
    """What vLLM's log-probs and its range of temperatures do not allow."""
    for name in team.agent_names:
        sampling = _sampling(config, name)
        at = f"agents.{name}" if name in config.agents else "rollout"
        if not is_remote(config, name) and not _frozen(config, name) and (sampling.top_p < 1 or sampling.top_k):
            raise UserError(
                f"{at}.top_p and .top_k: agent {name!r} is trained on samples that are cut (top_p {sampling.top_p:g}, top_k {sampling.top_k}), "
                "and vLLM's log-probs are those after the cut; set top_p: 1 and top_k: 0, or model.engine: native"
            )
        if sampling.temperature and not COOLEST <= sampling.temperature <= HOTTEST:
            raise UserError(
                f"{at}.temperature: it is {sampling.temperature:g}; vLLM takes 0 and {COOLEST:g} to {HOTTEST:g}"
            )
    if config.model.vllm.url is not None and config.model.sharing == "separate" and len(team.agent_names) > 1:
        models = {config.agents[a].model for a in team.agent_names if a in config.agents}
        if len(models - {None, config.model.path}):
            raise UserError(
                "model.vllm.url: a server has one model, and the agents have several; give them one, or set model.vllm.url: null"
            )


def _check_remotes(config: RunConfig, team: Team | PlayTeam) -> None:
    """What an agent behind an endpoint cannot do: be sampled by top-k, weigh its ballot by log-probs, be the whole team."""
    remote = [name for name in team.agent_names if is_remote(config, name)]
    for name in remote:
        top_k = _sampling(config, name).top_k
        if top_k:
            raise UserError(
                f"agents.{name}.top_k: it is {top_k}, and chat completions know no top-k; set agents.{name}.top_k: 0 (and, where the "
                f"endpoint knows it, agents.{name}.remote.extra: {{top_k: {top_k}}})"
            )
        if _weighs(team, name):
            raise UserError(
                f"agents.{name}.remote: the decision 'weighted' weighs ballots by log-probs, and an endpoint shows none; use "
                "decision 'majority'"
            )
    if remote and len(remote) == len(team.agent_names):
        raise UserError(
            f"agents: all of team {team.name!r} ({', '.join(remote)}) are behind endpoints (remote), so nothing can be trained; give at "
            "least one a model"
        )
    if config.trainer.first in remote:
        raise UserError(
            f"trainer.first: agent {config.trainer.first!r} is behind an endpoint (remote) and cannot be trained; name another"
        )


def _weighs(team: Team | PlayTeam, agent: str) -> bool:
    """Whether the decision weighs what ``agent`` says by its log-probs."""
    if not isinstance(team, Team) or not isinstance(team.decision, Weighted):
        return False
    return any(team.turn(turn).agent == agent for turn in team.decision.reads)


def _check_process(config: RunConfig, team: Team | PlayTeam, task: Task) -> None:
    if not config.process:
        return
    if not hasattr(task, "process"):
        raise UserError(
            f"process is {config.process:g}, but task {task.name!r} judges no turns; set process: 0, or give the task a method "
            "process(triples) -> scores"
        )
    if not isinstance(team, Team):
        raise UserError("process rewards are for teams that are a graph; a Python function has no turns by name")


def _frozen(config: RunConfig, agent: str) -> bool:
    return agent in config.agents and config.agents[agent].frozen


def is_remote(config: RunConfig, agent: str) -> bool:
    """Whether an agent speaks through an endpoint."""
    return agent in config.agents and config.agents[agent].remote is not None


def _policy(config: RunConfig, team: Team | PlayTeam, agent: str) -> str:
    """The name of the policy an agent speaks with: its own, its team's shared one, or the run's single one; an endpoint's has an @."""
    if is_remote(config, agent):
        return f"{agent}@remote"
    if config.model.sharing == "shared":
        return "shared"
    return team.agent(agent).policy or agent


def _sampling(config: RunConfig, agent: str) -> Sampling:
    base, own = config.rollout, config.agents.get(agent)
    values = {name: getattr(base, name) for name in ("max_tokens", "temperature", "top_p", "top_k", "stop")}
    if own is not None:
        values |= {name: value for name in values if (value := getattr(own, name)) is not None}
    return Sampling(**{**values, "stop": tuple(values["stop"])})


def _task(config: RunConfig, part: Part, where: str) -> Task:
    """The task that ``part`` names, with the run's time limit of a verdict unless the part has its own."""
    task = build_part(TASKS, part, where)
    return task if "seconds" in part.arguments else limited(task, config.rollout.verify_seconds)


def _tests(config: RunConfig, task: Task) -> dict[str, Task]:
    """The data sets of the evaluation: those named, else the held-out split of a procedural task, else the training
    data itself."""
    if config.eval.tasks:
        return {name: _task(config, part, f"eval.tasks.{name}") for name, part in config.eval.tasks.items()}
    if isinstance(task, ProceduralTask):
        return {"heldout": replace(task, split="test", size=config.eval.problems)}
    return {"train": task}
