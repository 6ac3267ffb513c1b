"""Plays a :class:`~ccpo.teams.PlayTeam`: every rollout is a coroutine; what all of them ask to be spoken is decoded together."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from ccpo.errors import UserError, nearest
from ccpo.rollout.seeds import seed_of
from ccpo.rollout.voices import Limits, Voice
from ccpo.rollout.walk import Ask, Played
from ccpo.tasks.base import Task
from ccpo.teams import PlayTeam, TurnSpec, render_prompt
from ccpo.types import Coalition, Counterfactual, FinishReason, Group, Problem, Removal, Request, Rollout, Turn

Call = tuple[str, str, tuple[tuple[str, str | None], ...], int]
"""Agent, template, messages, and how often it has been asked just that in this play."""


@dataclass(slots=True, kw_only=True)
class Stage:
    """One play in progress. ``kept`` are the joint play's turns by call: an unchanged question keeps its answer."""

    slot: int
    problem: Problem
    rollout: int
    draw: int = 0
    removed: Coalition = ()
    kept: Mapping[Call, Turn] = field(default_factory=dict)
    calls: dict[Call, Turn] = field(default_factory=dict)
    fresh: list[Turn] = field(default_factory=list)
    spoken: int = 0
    text: str = ""
    reward: float = 0.0
    answer: str | None = None


@dataclass(slots=True)
class _Wish:
    stage: Stage
    call: Call
    number: int
    future: asyncio.Future[Turn]


@dataclass(kw_only=True)
class PlayWalker:
    """The counterpart of :class:`ccpo.rollout.walk.Walker` for plays. Counterfactual draws are one a rollout unless asked otherwise."""

    team: PlayTeam
    task: Task
    voices: Mapping[str, Voice]
    limits: Limits = Limits()

    def play(self, problems: Sequence[Problem], ask: Ask, *, seed: int, step: int) -> Played:
        """Sample and score, as ``Walker.play``. Raises UserError where ``play`` names an unknown agent or returns no text."""
        if ask.removal is Removal.FROZEN:
            raise UserError(
                "rollout.removal 'frozen' is not available for a team that is a Python function; use drop or blank"
            )
        if ask.branch:
            raise UserError(
                "rollout.branch is for teams that are a graph; a team that is a Python function has no levels: set it to null"
            )
        clock = time.monotonic()
        joint = [Stage(slot=s, problem=p, rollout=n) for s, p in enumerate(problems) for n in range(ask.samples)]
        self._perform(joint, ask, seed, step)
        lanes = {
            coalition: [
                Stage(slot=j.slot, problem=j.problem, rollout=j.rollout, draw=m, removed=coalition, kept=j.calls)
                for j in joint
                for m in range(ask.draws or 1)
            ]
            for coalition in sorted(ask.coalitions)
        }
        others = [stage for group in lanes.values() for stage in group]
        self._perform(others, ask, seed, step)
        seconds = {"decode": time.monotonic() - clock}
        clock = time.monotonic()
        self._score([*joint, *others])
        seconds["verify"] = time.monotonic() - clock
        return self._gather(problems, ask, joint, lanes, seconds)

    def _perform(self, stages: Sequence[Stage], ask: Ask, seed: int, step: int) -> None:
        if stages:
            _run(self._all(stages, ask, seed, step))

    async def _all(self, stages: Sequence[Stage], ask: Ask, seed: int, step: int) -> None:
        wishes: list[_Wish] = []
        tasks = [asyncio.ensure_future(self._one(stage, ask, wishes)) for stage in stages]
        try:
            while any(not task.done() for task in tasks):
                for _ in range(3):  # let every coroutine run up to its next question
                    await asyncio.sleep(0)
                batch, wishes[:] = [w for w in wishes if not w.future.done()], []  # done: the play gave it up
                if batch:
                    self._answer(batch, seed, step)
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(outcome, BaseException):
                    raise outcome
        finally:
            for task in tasks:
                task.cancel()

    async def _one(self, stage: Stage, ask: Ask, wishes: list[_Wish]) -> None:
        asked: dict[tuple[object, ...], int] = defaultdict(int)

        async def speak(agent: str, template: str, /, **messages: str | None) -> str | None:
            if agent not in self.team.agent_names:
                raise UserError(
                    f"play asked for agent {agent!r}; the team has {', '.join(self.team.agent_names)}."
                    + nearest(agent, self.team.agent_names)
                )
            if agent in stage.removed:
                return {Removal.DROP: None, Removal.BLANK: "", Removal.PLACEHOLDER: ask.placeholder}[ask.removal]
            _check_texts(agent, template, messages)
            question = (agent, template, tuple(sorted(messages.items())))
            call = (*question, asked[question])
            asked[question] += 1
            stage.spoken += 1
            number = stage.spoken  # now: others may speak before the answer is there
            turn = stage.kept.get(call)
            if turn is None:
                future: asyncio.Future[Turn] = asyncio.get_running_loop().create_future()
                wishes.append(_Wish(stage, call, number, future))
                turn = await future
                stage.fresh.append(turn)
            stage.calls[call] = turn
            return turn.message

        try:
            text = await self.team.play(stage.problem, speak)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"play of team {self.team.name!r} raised {type(error).__name__} on problem {stage.problem.id!r}: {error}"
            ) from error
        if not isinstance(text, str):
            raise UserError(
                f"play of team {self.team.name!r} returned {type(text).__name__}; it must return the answer's text"
            )
        stage.text = text

    def _answer(self, wishes: Sequence[_Wish], seed: int, step: int) -> None:
        batches: dict[int, list[_Wish]] = defaultdict(list)
        for wish in wishes:
            batches[id(self.voices[wish.call[0]].engine)].append(wish)
        for batch in batches.values():
            prompts, requests = [], []
            for wish in batch:
                agent, template, messages, count = wish.call
                voice = self.voices[agent]
                prompt = render_prompt(
                    TurnSpec(name="turn", agent=agent, template=template, reads=tuple(name for name, _ in messages)),
                    {"problem": wish.stage.problem.text, **dict(messages)},
                    voice.tokenizer,
                    system=self.team.agent(agent).system,
                    budget=self.limits.max_prompt_tokens,
                    max_message_tokens=self.limits.max_message_tokens,
                )
                stage, sampling = wish.stage, voice.sampling
                prompts.append(prompt)
                requests.append(
                    Request(
                        prompt_ids=prompt.ids,
                        messages=prompt.messages,
                        seed=seed_of(
                            seed,
                            step,
                            stage.problem.id,
                            stage.problem.text,
                            agent,
                            template,
                            messages,
                            count,
                            *stage.removed,
                            stage.rollout,
                            stage.draw,
                        ),
                        max_tokens=sampling.max_tokens,
                        temperature=sampling.temperature,
                        top_p=sampling.top_p,
                        top_k=sampling.top_k,
                        stop=sampling.stop,
                    )
                )
            completions = self.voices[batch[0].call[0]].engine.generate(requests)
            for wish, prompt, request, completion in zip(batch, prompts, requests, completions, strict=True):
                agent = wish.call[0]
                wish.future.set_result(
                    Turn(
                        name=f"{agent}_{wish.number}",
                        agent=agent,
                        policy=self.voices[agent].policy,
                        prompt=prompt.text,
                        prompt_ids=prompt.ids,
                        completion=completion,
                        message=completion.text,
                        cut_tokens=prompt.cut_tokens,
                        temperature=request.temperature,
                    )
                )

    def _score(self, stages: Sequence[Stage]) -> None:
        verdicts = self.task.verify([(stage.problem, stage.text) for stage in stages])
        for stage, verdict in zip(stages, verdicts, strict=True):
            cut = any(t.completion.finish is FinishReason.LENGTH for t in stage.calls.values())
            stage.answer = verdict.answer
            stage.reward = 0.0 if cut and self.limits.truncated_is_zero else verdict.score

    def _gather(
        self,
        problems: Sequence[Problem],
        ask: Ask,
        joint: Sequence[Stage],
        lanes: Mapping[Coalition, Sequence[Stage]],
        seconds: Mapping[str, float],
    ) -> Played:
        P, N = len(problems), ask.samples
        every = [*joint, *(stage for group in lanes.values() for stage in group)]
        groups = tuple(
            Group(
                problem=problem,
                rollouts=tuple(
                    Rollout(turns=tuple(s.calls.values()), answer=s.answer, reward=s.reward)
                    for s in joint[slot * N : (slot + 1) * N]
                ),
                counterfactuals=tuple(
                    Counterfactual(
                        removed=s.removed,
                        rollout=s.rollout,
                        draw=s.draw,
                        turns=tuple(s.fresh),
                        answer=s.answer,
                        reward=s.reward,
                    )
                    for group in lanes.values()
                    for s in group
                    if s.slot == slot
                ),
            )
            for slot, problem in enumerate(problems)
        )
        spoken = {"joint": joint, "counterfactual": every[len(joint) :]}
        tokens = {kind: sum(t.completion.tokens for s in stages for t in s.fresh) for kind, stages in spoken.items()}
        return Played(
            groups=groups,
            reward_PN=torch.tensor([s.reward for s in joint]).reshape(P, N),
            without={c: torch.tensor([s.reward for s in group]).reshape(P, N, -1) for c, group in lanes.items()},
            score={},
            turns={agent: (agent,) for agent in self.team.agent_names},
            tokens=tokens
            | {
                "prefill": sum(len(t.prompt_ids) for s in every for t in s.fresh),
                "cut": sum(t.cut_tokens for s in every for t in s.fresh),
            },
            seconds=seconds,
        )


def _check_texts(agent: object, template: object, messages: Mapping[str, object]) -> None:
    if not isinstance(template, str):
        raise UserError(f"play asked {agent!r} with the template {template!r}; it must be a text")
    for name, value in messages.items():
        if value is not None and not isinstance(value, str):
            raise UserError(f"play asked {agent!r} with the message {name} = {value!r}; it must be a text or None")


def _run(coroutine: Coroutine[object, object, None]) -> None:
    """Run to the end, in a thread of its own where a loop is running already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(coroutine)
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        pool.submit(asyncio.run, coroutine).result()
