"""The loop: problems → rollouts and the counterfactuals they need → credit → advantage → update → what is kept on disk."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ccpo import credit as credit_rules
from ccpo.build import Setup
from ccpo.crew import Crew
from ccpo.evaluate import Exam, evaluate, headline
from ccpo.learner import TrainRow, load_checkpoint, save_checkpoint
from ccpo.loggers import Sinks
from ccpo.rollout import Ask, CounterfactualCache, Played, play_team, write_episodes
from ccpo.runfolder import RunFolder
from ccpo.schedule import ProblemSampler
from ccpo.types import CreditInputs, CreditOutputs

Progress = Callable[[int, Mapping[str, float]], None]


class Trainer:
    """Trains the crew of a :class:`~ccpo.build.Setup` and writes everything to its run folder."""

    def __init__(
        self, setup: Setup, crew: Crew, folder: RunFolder, sinks: Sinks, progress: Progress = lambda step, metrics: None
    ) -> None:
        self.setup, self.crew, self.folder, self.sinks, self.progress = setup, crew, folder, sinks, progress
        config = setup.config
        self.config = config
        self.sampler = ProblemSampler(
            total=len(setup.task), batch=config.rollout.prompts, seed=config.run.seed, shuffle=config.trainer.shuffle
        )
        self.cache = CounterfactualCache(policy=config.rollout.cache)
        self.estimator_name = (
            config.advantage if config.advantage != "auto" else getattr(setup.rule, "estimator", "grpo")
        )
        self.estimator = credit_rules.ESTIMATORS[self.estimator_name]
        self.state: dict[str, Any] = setup.rule.start()
        self.totals = {"joint": 0, "counterfactual": 0, "seconds": 0.0}
        self.step = 0
        self.stopping: int | None = None

    # --- the whole run -----------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Train to the last step. Returns False where a signal ended it early; the step in hand is finished and saved first."""
        trainer = self.config.trainer
        with _Signals(self):
            while self.step < trainer.steps and self.stopping is None:
                metrics = self.train_step()
                done = self.step == trainer.steps
                if trainer.eval_every and self.step % trainer.eval_every == 0 and not done:
                    metrics |= self.evaluate_now(self.config.eval.during, ablations=False)
                self.folder.append(self.folder.metrics, {"step": self.step, **metrics})
                self.sinks.write(self.step, metrics)
                self.progress(self.step, metrics)
                if done or self.stopping is not None or (trainer.save_every and self.step % trainer.save_every == 0):
                    self.save()
        return self.step >= trainer.steps

    def train_step(self) -> dict[str, float]:
        """One step; returns its metrics."""
        clock = time.monotonic()
        active = self.setup.schedule.active(self.step)
        problems = [self.setup.task[i] for i in self.sampler.indices(self.step)]
        played = self.play(problems, active)
        inputs = CreditInputs(
            agents=self.setup.team.agent_names,
            decider=self.setup.team.decider,
            active=active,
            reward_PN=played.reward_PN,
            without=played.without,
            score=played.score,
        )
        started = time.monotonic()
        outputs, self.state = self.setup.rule(inputs, self.state)
        credit = {agent: credit_PN + self._boxed(agent, played) for agent, credit_PN in outputs.credit.items()}
        advantage = {agent: self._advantage(credit_PN, agent, played) for agent, credit_PN in credit.items()}
        shared = {agent: self._advantage(played.reward_PN, agent, played) for agent in credit}
        credit_seconds = time.monotonic() - started
        stats = self.crew.learner.step(
            self._minibatches(played, outputs, advantage), step=self.step, failure_folder=self.folder.failure
        )
        started = time.monotonic()
        self.crew.refresh()
        refresh_seconds = time.monotonic() - started
        self.step += 1
        if self.config.log.episodes:
            write_episodes(
                self.folder.episode_file(self.step), self.step, played.groups, _lists(credit), _lists(advantage)
            )
        return (
            {"reward/team": played.reward_PN.double().mean().item()}
            | {f"reward/without_{'_'.join(c)}": r.double().mean().item() for c, r in sorted(played.without.items())}
            | {f"reward/{agent}_own": s.double().mean().item() for agent, s in played.score.items()}
            | dict(outputs.metrics)
            | credit_rules.telemetry(inputs, outputs, advantage, shared)
            | _lengths(played)
            | self.cache.report()
            | stats.metrics
            | self._costs(
                played, clock, {"credit": credit_seconds, "update": stats.seconds, "refresh": refresh_seconds}
            )
        )

    def play(self, problems: Sequence[Any], active: tuple[str, ...]) -> Played:
        """The rollouts of one step, with only those counterfactuals that the active agents' credit needs."""
        config = self.config.rollout
        team = self.setup.team
        coalitions = self.setup.rule.needs(team.agent_names, team.decider, active)
        trains_solo = getattr(self.setup.rule, "gate", None) == "trajectory" and team.decider in active
        ask = Ask(
            samples=config.samples,
            coalitions=coalitions,
            draws=config.draws,
            removal=self.setup.removal,
            placeholder=config.placeholder,
            keep_turns=coalitions if trains_solo else frozenset(),
            training=active,
        )
        return play_team(
            team,
            self.setup.task,
            self.crew.voices(),
            self.setup.limits,
            problems,
            ask,
            seed=self.config.run.seed,
            step=self.step,
            frozen=self.crew.frozen_voices,
            cache=self.cache,
        )

    # --- from credit to rows -----------------------------------------------------------------------------------------------

    def _advantage(self, credit_PN: Tensor, agent: str, played: Played) -> Tensor:
        P, N = credit_PN.shape
        tokens_PN = torch.tensor(
            [
                [sum(len(t.completion.token_ids) for t in r.turns if t.agent == agent) for r in g.rollouts]
                for g in played.groups
            ]
        )
        if self.estimator_name == "reinforce++" and getattr(self.setup.rule, "skip_flat", False):
            # whitening would move the zero credit of groups that the rule leaves out
            tokens_PN = tokens_PN * credit_rules.has_spread(played.reward_PN)[:, None]
        group_B = torch.arange(P).repeat_interleave(N)
        advantage_PN = self.estimator(credit_PN.flatten(), group_B, tokens_PN.flatten()).reshape(P, N)
        return advantage_PN * (tokens_PN > 0)

    def _boxed(self, agent: str, played: Played) -> Tensor | float:
        """The optional format reward: what an agent is paid for writing ``\\boxed``."""
        bonus = self.config.rollout.boxed_reward.get(agent, 0.0)
        if not bonus:
            return 0.0
        wrote = [
            [any("\\boxed" in t.completion.text for t in r.turns if t.agent == agent) for r in g.rollouts]
            for g in played.groups
        ]
        return bonus * torch.tensor(wrote).float()

    def _minibatches(
        self, played: Played, outputs: CreditOutputs, advantage: Mapping[str, Tensor]
    ) -> list[list[TrainRow]]:
        """Rows of every turn an active agent spoke, and of the solo answers that the rule trains on; problems split among mini-batches."""
        solo_advantage = {
            agent: self.estimator(
                credit.flatten(),
                torch.arange(credit.shape[0]).repeat_interleave(credit.flatten(1).shape[1]),
                torch.ones(credit.numel(), dtype=torch.long),
            ).reshape(credit.shape[0], -1)
            for agent, credit in outputs.solo_credit.items()
        }
        rows: list[list[TrainRow]] = [[] for _ in range(self.config.optim.minibatches)]
        segment = 0
        for p, group in enumerate(played.groups):
            target = rows[p * len(rows) // len(played.groups)]
            for agent, advantage_PN in advantage.items():
                weight = outputs.weight.get(agent, 1.0)
                for n, rollout in enumerate(group.rollouts):
                    segment += 1
                    value = float(advantage_PN[p, n]) * weight
                    target += [self._row(turn, value, segment) for turn in rollout.turns if turn.agent == agent]
            for agent, advantage_PD in solo_advantage.items():
                solos = [c for c in group.counterfactuals if c.removed == outputs.solo_coalition[agent]]
                for d, solo in enumerate(solos):
                    segment += 1
                    value = float(advantage_PD[p, d]) * outputs.solo_weight[agent]
                    target += [self._row(turn, value, segment) for turn in solo.turns if turn.agent == agent]
        return rows

    def _row(self, turn: Any, advantage: float, segment: int) -> TrainRow:
        return TrainRow(
            policy=turn.policy,
            agent=turn.agent,
            prompt_ids=turn.prompt_ids,
            token_ids=turn.completion.token_ids,
            engine_logprobs=turn.completion.logprobs,
            advantage=advantage,
            segment=segment,
            temperature=turn.temperature,
        )

    # --- what is kept ------------------------------------------------------------------------------------------------------

    def _costs(self, played: Played, clock: float, seconds: Mapping[str, float]) -> dict[str, float]:
        total = time.monotonic() - clock
        for kind in ("joint", "counterfactual"):
            self.totals[kind] += played.tokens[kind]
        self.totals["seconds"] += total
        return (
            {f"tokens/{kind}": float(count) for kind, count in played.tokens.items()}
            | {"tokens/total": float(self.totals["joint"] + self.totals["counterfactual"])}
            | {f"seconds/{phase}": value for phase, value in {**played.seconds, **seconds, "step": total}.items()}
        )

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
        reports = evaluate(self.setup.team, self.setup.tests, self.crew.voices(), self.setup.limits, exam)
        self.folder.append(self.folder.evaluations, {"step": self.step, "reports": reports})
        flat = headline(reports, self.setup.team, "after")
        return {f"eval/{name.removesuffix('_after')}": value for name, value in flat.items()}

    def save(self) -> None:
        state = {
            "credit": self.state,
            "cache": self.cache.to_json(),
            "totals": self.totals,
        }
        save_checkpoint(
            self.folder.path,
            self.step,
            self.crew.policies,
            self.crew.learner,
            state,
            keep=self.config.trainer.keep_checkpoints,
        )

    def load(self, checkpoint: Any) -> None:
        """Go on from a checkpoint folder: weights, optimiser, histories, caches, random state."""
        self.step, state = load_checkpoint(checkpoint, self.crew.policies, self.crew.learner)
        self.state = state["credit"]
        self.cache.load_json(state["cache"])
        self.totals = dict(state["totals"])
        self.crew.refresh(everything=True)
        self.folder.rewind(self.step)


class _Signals:
    """SIGINT and SIGTERM let the step in hand finish; a second one ends at once."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.before: dict[int, Any] = {}

    def __enter__(self) -> None:
        def ask_to_stop(number: int, frame: Any) -> None:
            if self.trainer.stopping is not None:
                raise KeyboardInterrupt
            self.trainer.stopping = number

        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.before[number] = signal.signal(number, ask_to_stop)
            except ValueError:  # not the main thread: signals are someone else's
                return

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def _lists(values: Mapping[str, Tensor]) -> dict[str, list[list[float]]]:
    return {agent: value_PN.tolist() for agent, value_PN in values.items()}


def _lengths(played: Played) -> dict[str, float]:
    """Mean length and truncation rate of each agent's turns."""
    lengths: dict[str, list[int]] = {}
    cut: dict[str, list[bool]] = {}
    for group in played.groups:
        for rollout in group.rollouts:
            for turn in rollout.turns:
                lengths.setdefault(turn.agent, []).append(len(turn.completion.token_ids))
                cut.setdefault(turn.agent, []).append(turn.completion.finish == "length")
    return {f"completions/{a}/mean_length": sum(v) / len(v) for a, v in lengths.items()} | {
        f"completions/{a}/clipped_ratio": sum(v) / len(v) for a, v in cut.items()
    }
