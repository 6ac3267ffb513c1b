"""The loop: problems → rollouts and the counterfactuals they need → credit → advantage → update → what is kept on disk."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from ccpo import credit as credit_rules
from ccpo.ahead import Ahead
from ccpo.alarms import Alarm, Shape, Watch
from ccpo.build import Setup, ratings_of
from ccpo.crew import Crew
from ccpo.errors import EndpointTrouble
from ccpo.evaluate import Exam, evaluate, headline
from ccpo.learner import load_checkpoint, save_checkpoint
from ccpo.loggers import Sinks
from ccpo.pay import Payroll, credit_inputs, lists, training_rows, turn_lengths
from ccpo.planner import Planner
from ccpo.rollout import Ask, CounterfactualCache, Played, Rater, play_team, rating_report, write_episodes
from ccpo.runfolder import RunFolder, read_json
from ccpo.schedule import ProblemSampler
from ccpo.signals import stopping
from ccpo.teams import describe

KINDS = ("joint", "counterfactual", "rating")
"""What generated tokens are spent on."""

ECHO = 2.0  # seconds
Progress = Callable[[int, Mapping[str, float]], None]
Warn = Callable[[int, Alarm], None]


class Trainer:
    """Trains the crew of a :class:`~ccpo.build.Setup` and writes everything to its run folder."""

    def __init__(
        self,
        setup: Setup,
        crew: Crew,
        folder: RunFolder,
        sinks: Sinks,
        progress: Progress = lambda step, metrics: None,
        warn: Warn = lambda step, alarm: None,
    ) -> None:
        self.setup, self.crew, self.folder, self.sinks = setup, crew, folder, sinks
        self.progress, self.warn = progress, warn
        config = setup.config
        self.config = config
        self.sampler = ProblemSampler(
            total=len(setup.task), batch=config.rollout.prompts, seed=config.run.seed, shuffle=config.trainer.shuffle
        )
        self.cache = CounterfactualCache(policy=config.rollout.cache)
        chosen = config.advantage
        self.payroll = Payroll(
            estimator=getattr(setup.rule, "estimator", "grpo") if chosen == "auto" else chosen,
            skip_flat=getattr(setup.rule, "skip_flat", False),
            boxed_reward=config.rollout.boxed_reward,
        )
        self.planner = Planner(setup.team, config.rollout.samples) if setup.branch == "auto" else None
        shared = isinstance(setup.rule, credit_rules.SharedReward)
        self.watch = Watch(Shape.of(describe(setup.team)), "shared" if shared else config.credit.kind)
        self.state: dict[str, Any] = setup.rule.start()
        self.totals = {**dict.fromkeys(KINDS, 0), "seconds": 0.0}
        self.ratings = ratings_of(setup.rule)
        if crew.remotes and folder.remotes.exists():
            crew.remotes.load(read_json(folder.remotes))
        if self.ratings is not None:
            Rater(team=setup.team, voices=crew.voices(), limits=setup.limits, ask=self.ratings).check()
        self.step = 0
        self.ahead = Ahead(crew.policies, crew.beside)
        self.stopping: int | None = None
        self.held: dict[
            str, float
        ] = {}  # the last step's metrics, which go to the loggers with the evaluation that follows

    # --- the whole run -----------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Train to the last step. Returns False where a signal ended it early; the step in hand is finished and saved first.
        The last step's metrics are held back from the loggers until :meth:`examine` or :meth:`tell`.

        Raises EndpointTrouble where an agent behind an endpoint cannot speak any more, with all finished steps saved.
        """
        with stopping(_ask_to_stop(self)), self.ahead:
            stopped = False
            while not self.done and not stopped:
                spent = self.tokens
                with self._saved_on_trouble():
                    metrics = self.train_step()
                done = self.done
                trouble: EndpointTrouble | None = None
                stopped = self.crew.comm.any(self.stopping is not None)
                if self._examines(self.step, spent) and not done:
                    try:
                        metrics |= self.evaluate_now(self.config.eval.during, ablations=False)
                    except EndpointTrouble as error:
                        trouble = error
                self.folder.append(self.folder.metrics, {"step": self.step, **metrics})
                if done:
                    self.held = metrics
                else:
                    self.sinks.write(self.step, metrics)
                self.progress(self.step, metrics)
                if trouble is not None:
                    with self._saved_on_trouble():
                        raise trouble
                if done or stopped or self._saves(self.step):
                    self.save()
        return self.done

    @contextmanager
    def _saved_on_trouble(self) -> Iterator[None]:
        """Save the state of all finished steps when an endpoint gives up, and say how to go on."""
        try:
            yield
        except EndpointTrouble as error:
            self.save()
            way = f"step {self.step} is saved: correct that in {self.folder.recipe} or at the endpoint, then ccpo train --resume"
            told = type(error)(f"{error}. {way} {self.folder.path}")
            told.told = getattr(error, "told", False)  # another rank says it
            raise told from None

    @property
    def tokens(self) -> int:
        """Generated tokens so far: joint, counterfactual and rating turns."""
        return sum(int(self.totals[kind]) for kind in KINDS)

    @property
    def done(self) -> bool:
        """Whether the last step is done, or the budget of tokens is spent."""
        return self._ends(self.step)

    def _ends(self, step: int) -> bool:
        trainer = self.config.trainer
        return step >= trainer.steps or (trainer.tokens is not None and self.tokens >= trainer.tokens)

    @property
    def _spent(self) -> float:
        """The share of the token budget that is gone; 0 where there is none."""
        budget = self.config.trainer.tokens
        return self.tokens / budget if budget else 0.0

    def _saves(self, step: int) -> bool:
        every = self.config.trainer.save_every
        return bool(every) and step % every == 0

    def _examines(self, step: int, spent: int) -> bool:
        """Whether an evaluation is due after step number ``step``, which began with ``spent`` tokens."""
        by_steps, by_tokens = self.config.trainer.eval_every, self.config.eval.every_tokens
        due = bool(by_steps) and step % by_steps == 0
        return due or (by_tokens is not None and self.tokens // by_tokens > spent // by_tokens)

    def train_step(self) -> dict[str, float]:
        """One step; returns its metrics."""
        clock, comm = time.monotonic(), self.crew.comm
        talked = comm.seconds
        active = self.setup.schedule.active(self.step)
        spent, share = self.tokens, self._spent
        played, waited = self._rollouts()
        for kind in KINDS:
            self.totals[kind] += played.tokens.get(kind, 0)
        reused = self.cache.report()
        planned = self._plan_ahead(played)
        inputs = credit_inputs(self.setup.team, active, played)
        started = time.monotonic()
        outputs, self.state = self.setup.rule(inputs, self.state)
        if self.config.process:
            join = getattr(self.setup.rule, "join_process", credit_rules.join_process)
            outputs = join(outputs, inputs, self.config.process)
        credit = self.payroll.credit(outputs, played)
        advantage = {agent: self.payroll.advantage(credit_PN, agent, played) for agent, credit_PN in credit.items()}
        shared = {agent: self.payroll.advantage(played.reward_PN, agent, played) for agent in credit}
        by_turn = {turn: a for agent in credit for turn, a in self.payroll.by_turn(outputs, agent, played).items()}
        rows = training_rows(
            played, outputs, advantage, by_turn, self.payroll.solo(outputs), self.config.optim.minibatches
        )
        credit_seconds = time.monotonic() - started
        refresh_seconds = self._begin_next(spent)
        stats = self.crew.learner.step(rows, step=self.step, failure_folder=self.folder.failure, spent=share)
        refresh_seconds += self._refresh()
        self.step += 1
        paid = lists(credit), lists(advantage)
        started = time.monotonic()
        if self.config.log.episodes and self.folder.writes:
            write_episodes(self.folder.episode_file(self.step), self.step, played.groups, *paid)
        seconds = {"credit": credit_seconds, "update": stats.seconds, "refresh": refresh_seconds}
        seconds["episodes"] = time.monotonic() - started
        metrics = (
            {"reward/team": played.reward_PN.double().mean().item()}
            | _without(played, len(inputs.agents))
            | {f"reward/{agent}_own": s.double().mean().item() for agent, s in played.score.items()}
            | dict(outputs.metrics)
            | credit_rules.telemetry(inputs, outputs, advantage, shared)
            | turn_lengths(played)
            | rating_report(played.groups)
            | planned
            | reused
            | self.crew.remotes.metrics()
            | stats.metrics
        )
        started = time.monotonic()
        metrics |= self._alarms(played, *paid, metrics)
        seconds["alarms"] = time.monotonic() - started
        if comm.size > 1:
            seconds["communication"] = comm.seconds - talked + played.seconds.get("communication", 0.0)
        return metrics | waited | self._costs(played, clock, seconds)

    def _alarms(self, played: Played, credit: Any, advantage: Any, metrics: Mapping[str, float]) -> dict[str, float]:
        """Tell of alarms that have not been told of; 1 for each that holds."""
        alarms = self.watch.see(self.step, played.groups, credit, advantage, metrics)
        for alarm in self.watch.news(alarms):
            self.warn(self.step, alarm)
        return {f"alarm/{alarm.name}": 1.0 for alarm in alarms}

    # --- rollouts ----------------------------------------------------------------------------------------------------------

    def _rollouts(self) -> tuple[Played, dict[str, float]]:
        """This step's rollouts, and where they are played ahead, metrics of that."""
        asynchronous = bool(self.config.trainer.async_depth)
        try:
            if self.ahead.running:
                return self.ahead.take()
            play = self.play(self.step)
            if asynchronous:
                return self.ahead.play(play), {"async/updates_behind": 0.0, "seconds/waiting": 0.0}
            return play(), {}
        finally:
            self._keep_costs()

    def _begin_next(self, spent: int) -> float:
        """Have the next step's rollouts played while this one, which began with ``spent`` tokens, is learned from; or let those who speak
        rest. Nothing is played ahead of an evaluation or a checkpoint: a run that goes on from there begins with fresh rollouts too.
        Returns the seconds that engines took to read the weights of the update before."""
        step = self.step + 1
        if not self.config.trainer.async_depth or self._ends(step) or self._examines(step, spent) or self._saves(step):
            self.crew.rest()
            return 0.0
        seconds = self._refresh()
        self.ahead.begin(self.play(step))
        return seconds

    def _refresh(self) -> float:
        """Hand changed weights to the engines, unless they are speaking; the seconds that it took."""
        started = time.monotonic()
        if not self.ahead.running:
            self.crew.refresh()
        return time.monotonic() - started

    def play(self, step: int) -> Callable[[], Played]:
        """What plays a step's rollouts, with only those counterfactuals that the active agents' credit needs."""
        config = self.config.rollout
        team = self.setup.team
        active = self.setup.schedule.active(step)
        coalitions = credit_rules.needed(
            self.setup.rule, team.agent_names, team.decider, active, self.state, free=self.setup.free_removals
        )
        branch = self.planner.branch(step) if self.planner else self.setup.branch
        trains_solo = getattr(self.setup.rule, "gate", None) == "trajectory" and team.decider in active
        ask = Ask(
            samples=math.prod(branch) if branch else config.samples,
            branch=branch,
            swaps=getattr(self.setup.rule, "swaps", False),
            process=self.config.process > 0,
            coalitions=coalitions,
            draws=config.draws,
            removal=self.setup.removal,
            placeholder=config.placeholder,
            keep_turns=coalitions if trains_solo else frozenset(),
            training=active,
            ratings=self.ratings,
        )
        return partial(
            play_team,
            team,
            self.setup.task,
            self.crew.voices(),
            self.setup.limits,
            [self.setup.task[i] for i in self.sampler.indices(step)],
            ask,
            seed=self.config.run.seed,
            step=step,
            frozen=self.crew.frozen_voices,
            cache=self.cache,
        )

    def _plan_ahead(self, played: Played) -> dict[str, float]:
        """Let the planner see the step; its metrics."""
        if self.planner is None:
            return {}
        branch = self.planner.branch(self.step)
        self.planner.learn(played, branch)
        return self.planner.metrics(branch)

    # --- what is kept ------------------------------------------------------------------------------------------------------

    def _costs(self, played: Played, clock: float, seconds: Mapping[str, float]) -> dict[str, float]:
        total = time.monotonic() - clock
        self.totals["seconds"] += total
        return (
            {f"tokens/{kind}": float(count) for kind, count in {"rating": 0, **played.tokens}.items()}
            | {"tokens/total": float(self.tokens)}
            | {f"seconds/{phase}": value for phase, value in {**played.seconds, **seconds, "step": total}.items()}
        )

    def examine(self) -> None:
        """The evaluation before or after training. Loggers are told its headline together with the last step's metrics, so that no
        step is logged twice; nor are they told of a step that an earlier start has evaluated."""
        section, known = self.config.eval, bool(self.folder.evaluated(self.step))
        figures = self.evaluate_now(section.problems, ablations=section.ablations)
        self.tell({} if known else figures)

    def tell(self, figures: Mapping[str, float] | None = None) -> None:
        """Hand the loggers what was held back for them of the last step, and ``figures`` of it."""
        told, self.held = self.held | dict(figures or {}), {}
        if told:
            self.sinks.write(self.step, told)

    def evaluate_now(self, problems: int, *, ablations: bool) -> dict[str, float]:
        """Evaluate, log the full report to ``evaluations.jsonl``, and return the headline figures as metrics."""
        settings = self.config.eval
        exam = Exam(
            problems=problems,
            samples=settings.samples,
            temperature=settings.temperature,
            top_p=settings.top_p,
            ablations=ablations,
            seed=self.config.run.seed,
        )
        try:
            reports = evaluate(self.setup.team, self.setup.tests, self.crew.voices(), self.setup.limits, exam)
        finally:
            self._keep_costs()
        self.folder.append(self.folder.evaluations, {"step": self.step, "tokens": self.tokens, "reports": reports})
        flat = headline(reports, self.setup.team, "after")
        return {f"eval/{name.removesuffix('_after')}": value for name, value in flat.items()}

    def _keep_costs(self) -> None:
        """Write down what endpoints have cost: a run that is resumed goes on counting, also what came after its checkpoint."""
        if self.crew.remotes:
            self.folder.write(self.folder.remotes, self.crew.remotes.spent())

    def save(self) -> None:
        """Write a checkpoint of the finished steps."""
        self.ahead.drop()
        state = {
            "credit": self.state,
            "cache": self.cache.to_json(),
            "totals": self.totals,
            "layout": self.planner.state if self.planner else {},
            "alarms": self.watch.to_json(),
        }
        crew, keep = self.crew, self.config.trainer.keep_checkpoints
        save_checkpoint(self.folder.path, self.step, crew.policies, crew.learner, state, keep=keep, comm=crew.comm)

    def load(self, checkpoint: Any) -> None:
        """Go on from a checkpoint folder: weights, optimiser, histories, caches, random state."""
        crew = self.crew
        self.step, state = load_checkpoint(checkpoint, crew.policies, crew.learner, crew.comm)
        self.state = state["credit"]
        self.cache.load_json(state["cache"])
        self.totals |= state["totals"]
        if "alarms" in state:  # not there in checkpoints from before there were alarms
            self.watch.load_json(state["alarms"])
        if self.planner:
            self.planner.state = state["layout"]
        self.crew.refresh(everything=True)
        self.folder.rewind(self.step)


def _ask_to_stop(trainer: Trainer) -> Callable[[int, Any], None]:
    """SIGINT and SIGTERM let the step in hand finish; a second one ends at once. A launcher passes on what the terminal has sent already,
    so that what comes within two seconds is the same one."""
    asked = 0.0

    def handler(number: int, frame: Any) -> None:
        nonlocal asked
        if trainer.stopping is None:
            trainer.stopping, asked = number, time.monotonic()
        elif time.monotonic() - asked > ECHO:
            raise KeyboardInterrupt

    return handler


def _without(played: Played, K: int) -> dict[str, float]:
    """Mean reward without each agent and with each alone; a rule that looks at all coalitions would make thousands of metrics."""
    shown = {c: r for c, r in sorted(played.without.items()) if len(c) in (1, K - 1)}
    return {f"reward/without_{'_'.join(c)}": r.double().mean().item() for c, r in shown.items()}
