"""How much there is to do in a step: what is asked of each policy's engine, and the rows that it is trained on.

Nothing is derived a second time here: `ccpo.trainer.Trainer` plays the step with the stand-ins of :mod:`ccpo.forecast.standin`. Of a step with
many problems a part is played and repeated.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ccpo.bootstrap import base_tokenizer
from ccpo.build import Setup, build_part, is_remote, prepare, rating_lessons_of
from ccpo.config import RunConfig
from ccpo.crew import objective_of
from ccpo.errors import UserError
from ccpo.forecast.standin import (
    Asked,
    CoinTask,
    CountingReader,
    Lengths,
    StandInCrew,
    StandInEngine,
    Tokens,
)
from ccpo.learner import TrainRow
from ccpo.learner.loading import load_tokenizer
from ccpo.learner.objective import Objective
from ccpo.loggers import Sinks
from ccpo.rollout import Voice
from ccpo.runfolder import RunFolder
from ccpo.tasks import TASKS, ProceduralTask
from ccpo.teams import Team
from ccpo.trainer import KINDS, Trainer
from ccpo.types import Problem

PLAYED = 4, 32  # at least and at most so many problems of a step are played; the rest are taken to be like them
TOKENS = 400_000  # generated tokens of them, about
REPEATS = 3  # times that a step is played, for the seconds of what is around the models
Calls = Mapping[str, Sequence[Sequence[Asked]]]


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """A step of one phase of the schedule. ``calls``: by policy, what each call of its engine asks for; ``rows``: by policy and mini-batch,
    the rows that have a gradient; ``tokens``: generated, by kind, and ``prefill``; ``host``: seconds of this machine for all that
    is neither decoding nor update (prompts, credit, episodes, …), ``played`` of the step's ``problems`` having been played for it."""

    active: tuple[str, ...]
    problems: int
    played: int
    calls: Calls
    rows: Mapping[str, Sequence[Sequence[TrainRow]]]
    tokens: Mapping[str, int]
    host: float

    @property
    def generated(self) -> int:
        """Tokens that are sampled."""
        return sum(self.tokens.get(kind, 0) for kind in KINDS)

    @property
    def trained(self) -> int:
        """Completion tokens of the rows that have a gradient."""
        return sum(len(r.token_ids) for parts in self.rows.values() for rows in parts for r in rows)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A recipe made ready: its objects, the reader of each policy's prompts, and what had to be assumed."""

    setup: Setup
    readers: Mapping[str, Any]
    assumed: tuple[str, ...]

    @property
    def policies(self) -> dict[str, str]:
        """The model's path of each policy that runs here, with an agent's own taken into account."""
        config, found = self.setup.config, {}
        for agent, policy in self.setup.policy_of.items():
            if not is_remote(config, agent):
                own = config.agents[agent].model if agent in config.agents else None
                found[policy] = own or config.model.path
        return found

    @property
    def trained(self) -> frozenset[str]:
        """The policies that some agent trains."""
        return frozenset(self.setup.policy_of[a] for a in self.setup.schedule.agents)


def make_subject(config: RunConfig, problem_tokens: int | None = None) -> Subject:
    """Check the recipe and find out how its prompts are read. ``problem_tokens``: plan with problems of so many tokens in the place of the
    recipe's data. Raises UserError."""
    assumed = []
    if problem_tokens is None:
        task = _real_task(config)
    else:
        count = max(config.rollout.prompts, 1_000)
        task = CoinTask(problems=[_problem(i, problem_tokens) for i in range(count)])
        assumed.append(f"problems have {problem_tokens} tokens")
    setup = prepare(config, task=task, tests={"none": task})
    if not isinstance(setup.team, Team):
        raise UserError(
            f"ccpo plan needs a team that is a graph; {setup.team.name!r} is a Python function, whose turns nobody knows beforehand"
        )
    bare = Subject(setup=setup, readers={}, assumed=())
    readers = {policy: _reader(path, setup, assumed) for policy, path in bare.policies.items()}
    return Subject(setup=setup, readers=readers, assumed=tuple(dict.fromkeys(assumed)))


def _real_task(config: RunConfig) -> Any:
    if config.task is None:
        raise UserError("recipe: task: this key is required; give it, or --problem-tokens N to plan without data")
    try:
        return build_part(TASKS, config.task, "task")
    except UserError as error:
        raise UserError(f"{error} (To plan without the data: --problem-tokens N, the length of a problem.)") from None


def _problem(number: int, tokens: int) -> Problem:
    text = f"{number} ".ljust(4 * tokens, "?")[: 4 * tokens]
    return Problem(id=str(number), text=text, answer="right")


def _reader(path: str, setup: Setup, assumed: list[str]) -> Any:
    """A tokenizer, where there is one on this machine."""
    if path == "bootstrap":
        task = setup.task
        if isinstance(task, ProceduralTask):
            return base_tokenizer(setup.team, task, rating_lessons_of(setup))
        raise UserError(
            "model.path is 'bootstrap', whose tokenizer is made from a procedural task; set model.path to a Hugging Face model, or leave "
            "--problem-tokens out"
        )
    folder = Path(path).expanduser()
    if folder.is_dir() and any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return load_tokenizer(path)
    assumed.append(f"four characters are a token (no tokenizer of {path} here)")
    return CountingReader()


def work_of(
    subject: Subject,
    lengths: Lengths,
    silent: Mapping[str, float] | None = None,
    positions: Mapping[str, int] | None = None,
) -> list[StepWork]:
    """The work of a step in each phase of the schedule: one for a simultaneous schedule, one an agent for an alternating one.

    ``silent``: by agent, the share of its rows that have no gradient; None: those that the coins leave without. ``positions``: by policy, how
    many its model has. Raises UserError for requests that no model of so many could be asked.
    """
    schedule, config = subject.setup.schedule, subject.setup.config
    starts = [schedule.period * i for i in range(len(schedule.agents))] if schedule.alternating else [0]
    played = _played(subject.setup, lengths)
    small = config.model_copy(
        update={
            "rollout": config.rollout.model_copy(update={"prompts": played, "cache": "off"}),
            "optim": config.optim.model_copy(update={"minibatches": 1}),
            "trainer": config.trainer.model_copy(update={"async_depth": 0}),  # steps are played one after another
        }
    )
    task = CoinTask(problems=subject.setup.task)
    return [
        _phase(replace(subject.setup, config=small, task=task), subject, lengths, silent, positions or {}, s)
        for s in starts
    ]


def _played(setup: Setup, lengths: Lengths) -> int:
    """How many of a step's problems are played: the largest divisor up to ``PLAYED``, or all where that would be few."""
    prompts = setup.config.rollout.prompts
    texts = [lengths.share * setup.samplings[turn.agent].max_tokens for turn in setup.team.turns]
    limit = min(prompts, max(PLAYED[0], min(PLAYED[1], int(TOKENS / (setup.config.rollout.samples * sum(texts))))))
    best = max(d for d in range(1, limit + 1) if prompts % d == 0)
    return best if best >= limit / 4 else prompts


def _phase(
    setup: Setup,
    subject: Subject,
    lengths: Lengths,
    silent: Mapping[str, float] | None,
    positions: Mapping[str, int],
    start: int,
) -> StepWork:
    crew, engines = _crew(setup, subject.readers, lengths, positions)
    host, metrics = [], {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(setup, crew, RunFolder(folder), Sinks({}))  # type: ignore[arg-type]
        trainer.step = start
        for _ in range(REPEATS):
            for engine in engines.values():
                engine.calls.clear()
            before, clock = sum(e.seconds for e in engines.values()), time.perf_counter()
            metrics = trainer.train_step()
            host.append(time.perf_counter() - clock - sum(e.seconds for e in engines.values()) + before)
    config, full = setup.config, subject.setup.config
    times = full.rollout.prompts // config.rollout.prompts
    rows = _plain(_live(crew.learner.rows, full, silent), engines)
    names = [*dict.fromkeys(row.policy for row in rows)]
    by_policy = {
        name: _minibatches([r for r in rows if r.policy == name], times, full.optim.minibatches) for name in names
    }
    kinds = (*KINDS, "prefill")
    return StepWork(
        active=setup.schedule.active(start),
        problems=full.rollout.prompts,
        played=config.rollout.prompts,
        calls={name: [_repeated(call, times) for call in e.calls] for name, e in engines.items() if e.calls},
        rows=by_policy,
        tokens={kind: int(metrics.get(f"tokens/{kind}", 0)) * times for kind in kinds},
        host=statistics.median(host[1:]) * times,
    )


def _crew(
    setup: Setup, readers: Mapping[str, Any], lengths: Lengths, positions: Mapping[str, int]
) -> tuple[StandInCrew, dict[str, StandInEngine]]:
    engines: dict[str, StandInEngine] = {}

    def voices(suffix: str = "") -> dict[str, Voice]:
        found = {}
        for agent, policy in setup.policy_of.items():
            name, reader = policy + suffix, readers.get(policy) or CountingReader()
            if name not in engines:
                engines[name] = StandInEngine(
                    policy=name, lengths=lengths, reader=_length_of(reader), positions=positions.get(policy)
                )
            sampling = setup.samplings[agent]
            marked = replace(sampling, stop=(*sampling.stop, agent))
            found[agent] = Voice(agent=agent, policy=name, engine=engines[name], tokenizer=reader, sampling=marked)
        return found

    crew = StandInCrew(voices(), voices("@start") if setup.config.rollout.removal == "frozen" else {})
    return crew, engines


def _length_of(tokenizer: Any) -> Any:
    from ccpo.teams.reader import reader_of

    return reader_of(tokenizer)


def _live(rows: Sequence[TrainRow], config: RunConfig, silent: Mapping[str, float] | None) -> list[TrainRow]:
    """The rows that are run, as `ccpo.learner.update.Learner` chooses them."""
    if Objective(**objective_of(config)).needs_all_rows:
        return list(rows)
    if silent is not None:
        return [r for r in rows if random.Random(f"live/{r.segment}").random() >= silent.get(r.agent, 0.0)]
    paid = {row.segment for row in rows if row.advantage != 0}
    return [row for row in rows if row.segment in paid]


def _plain(rows: Sequence[TrainRow], engines: Mapping[str, StandInEngine]) -> list[TrainRow]:
    """The rows with prompts by number, as the calls have them."""
    return [
        replace(row, prompt_ids=Tokens(len(row.prompt_ids), (0, engines[row.policy].keys[row.prompt_ids])))  # type: ignore[arg-type]
        for row in rows
    ]


def _repeated(call: Sequence[Asked], times: int) -> list[Asked]:
    return [replace(a, prompt_ids=_other(a.prompt_ids, k)) for k in range(times) for a in call]


def _minibatches(rows: Sequence[TrainRow], times: int, parts: int) -> list[list[TrainRow]]:
    """The rows of all problems, split among the mini-batches in their order."""
    every = _again(rows, times)
    size = len(every) / parts
    return [every[round(i * size) : round((i + 1) * size)] for i in range(parts)]


def _again(rows: Sequence[TrainRow], times: int) -> list[TrainRow]:
    """The rows, and those of ``times - 1`` as many other problems."""
    span = 1 + max(row.segment for row in rows)
    return [
        replace(
            row,
            prompt_ids=_other(row.prompt_ids, k),
            token_ids=_other(row.token_ids, k),
            segment=row.segment + k * span,
        )
        for k in range(times)
        for row in rows
    ]


def _other(tokens: Any, k: int) -> Any:
    """The same of another problem."""
    return tokens if k == 0 else Tokens(tokens.size, (k, tokens.key))
