"""Walks a team's graph through the engines: joint rollouts and the counterfactuals that were asked for, in one pass.

Turn by turn along the graph's levels, everything that this turn needs (the joint rollouts' turns and the counterfactual ones)
is decoded in one batch per engine, so that a solver's joint and solo answers share a decode. Only turns downstream of a removed agent
are decoded again; where none is (voting), the counterfactual is a re-count of texts that exist already.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ccpo.errors import UserError
from ccpo.rollout.cache import CounterfactualCache
from ccpo.rollout.lanes import Lane
from ccpo.rollout.ratings import AskRatings
from ccpo.rollout.score import score_lanes, score_turns
from ccpo.rollout.seeds import seed_of
from ccpo.rollout.swap import swapped
from ccpo.rollout.tree import Branch, Tree, places, plant
from ccpo.rollout.voices import Limits, Voice
from ccpo.tasks.base import Task
from ccpo.teams import Fate, Function, Plan, Prompt, Team, TurnSpec, render_prompt, strip_boxed
from ccpo.types import Coalition, Counterfactual, Group, Problem, Removal, Request, Rollout, TreePlace, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What is to be sampled: N joint rollouts a problem, and for each coalition ``draws`` counterfactuals (None: N a problem, or one a
    rollout). ``keep_turns``: coalitions whose turns are training data, so that the cache must not stand in for them.
    ``training``: agents that are being trained, whose counterfactual rewards will not last. ``branch``: the joint rollouts' tree
    (empty: they share nothing); ``swaps``: ballots put into other rollouts, too. ``ratings``: how every agent is
    to rate every joint rollout after its verdict; None: not at all."""

    samples: int
    branch: Branch = ()
    swaps: bool = False
    process: bool = False
    coalitions: frozenset[Coalition] = frozenset()
    draws: int | None = None
    removal: Removal = Removal.DROP
    placeholder: str = ""
    keep_turns: frozenset[Coalition] = frozenset()
    training: tuple[str, ...] = ()
    ratings: AskRatings | None = None


@dataclass(frozen=True, kw_only=True)
class Played:
    """What was sampled. ``without[coalition]`` is ``[P, N, M]``, or ``[P, 1, M]`` where draws belong to the problem;
    ``score[agent]`` is ``[P, N]``, each agent's own correctness where the decision reads it. ``turns``, ``tree``, ``swap``, ``silent``,
    ``shares`` and ``shares_valid``: see :class:`~ccpo.types.CreditInputs`. Counts are tokens: what rollouts of a tree share is counted once."""

    groups: tuple[Group, ...]
    reward_PN: Tensor
    without: Mapping[Coalition, Tensor]
    score: Mapping[str, Tensor]
    tokens: Mapping[str, int]
    seconds: Mapping[str, float]
    turns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tree: Mapping[str, TreePlace] = field(default_factory=dict)
    swap: Mapping[str, Tensor] = field(default_factory=dict)
    silent: Mapping[str, Tensor] = field(default_factory=dict)
    process: Mapping[str, Tensor] = field(default_factory=dict)
    shares: Mapping[str, Tensor] = field(default_factory=dict)
    shares_valid: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(kw_only=True)
class Walker:
    """Plays ``team`` on problems of ``task``. ``voices`` by agent; ``frozen`` are the earlier policies of removal by ``frozen``."""

    team: Team
    task: Task
    voices: Mapping[str, Voice]
    frozen: Mapping[str, Voice] = field(default_factory=dict)
    limits: Limits = Limits()
    cache: CounterfactualCache = field(default_factory=lambda: CounterfactualCache(policy="off"))

    def play(self, problems: Sequence[Problem], ask: Ask, *, seed: int, step: int) -> Played:
        """Sample and score. The result depends on the seed, the step, the problems and the policies alone."""
        clock = time.monotonic()
        tree = plant(self.team, ask.branch, ask.samples)
        joint = [
            Lane(slot=slot, problem=problem, rollout=n)
            for slot, problem in enumerate(problems)
            for n in range(ask.samples)
        ]
        plans = {c: self.team.plan(c, ask.removal, ask.placeholder) for c in sorted(ask.coalitions)}
        cached: dict[tuple[Coalition, int], list[float]] = {}
        lanes: dict[Coalition, list[Lane]] = {}
        for coalition, plan in plans.items():
            known = self._from_cache(problems, plan, ask, step)
            cached.update(known)
            lanes[coalition] = [
                lane
                for lane in _counterfactual_lanes(joint, problems, plan, ask)
                if (coalition, lane.slot) not in known
            ]
        every = [*joint, *(lane for group in lanes.values() for lane in group)]
        self._decode(every, joint, tree, seed, step)
        seconds = {"decode": time.monotonic() - clock}
        clock = time.monotonic()
        score_lanes(self.team, self.task, every, self.limits)
        swap, silent = swapped(self.team, joint, tree, len(problems)) if ask.swaps else ({}, {})
        process = score_turns(self.team, self.task, joint, len(problems)) if ask.process else {}
        seconds["verify"] = time.monotonic() - clock
        for coalition, plan in plans.items():
            self._to_cache(lanes[coalition], plan, ask)
        played = _gather(self.team, problems, ask, joint, lanes, cached, plans, seconds)
        turns = {a: tuple(t.name for t in self.team.turns_of(a)) for a in self.team.agent_names}
        return replace(played, turns=turns, tree=places(self.team, tree), swap=swap, silent=silent, process=process)

    def finish(self, lanes: Sequence[Lane], *, seed: int, step: int) -> None:
        """Speak what the plans of ``lanes`` leave to be spoken, and score them."""
        self._decode(lanes, [], plant(self.team, (), 1), seed, step)
        score_lanes(self.team, self.task, lanes, self.limits)

    def _decode(self, lanes: Sequence[Lane], joint: Sequence[Lane], tree: Tree, seed: int, step: int) -> None:
        for depth, level in enumerate(self.team.levels):
            batches: dict[int, list[tuple[Lane, TurnSpec, Voice]]] = defaultdict(list)
            for spec in level:
                for lane in lanes:
                    shared = lane.plan is None and tree.owner(lane.rollout, depth) != lane.rollout
                    if lane.decodes(spec) and not shared:
                        voice = self._voice(lane, spec)
                        batches[id(voice.engine)].append((lane, spec, voice))
            for batch in batches.values():
                self._speak(batch, seed, step)
            for number, lane in enumerate(joint):
                owner = joint[number - lane.rollout + tree.owner(lane.rollout, depth)]
                lane.spoken |= {spec.name: owner.spoken[spec.name] for spec in level}

    def _voice(self, lane: Lane, spec: TurnSpec) -> Voice:
        if lane.fate(spec.name) is Fate.FROZEN:
            if spec.agent not in self.frozen:
                raise UserError(
                    f"removal 'frozen' needs an earlier policy of agent {spec.agent!r}, and there is none in this run"
                )
            return self.frozen[spec.agent]
        return self.voices[spec.agent]

    def _speak(self, batch: Sequence[tuple[Lane, TurnSpec, Voice]], seed: int, step: int) -> None:
        prompts = [self._prompt(lane, spec, voice) for lane, spec, voice in batch]
        requests = [
            Request(
                prompt_ids=prompt.ids,
                messages=prompt.messages,
                seed=seed_of(
                    seed, step, lane.problem.id, lane.problem.text, spec.name, *lane.removed, lane.rollout, lane.draw
                ),
                max_tokens=min(spec.max_tokens or voice.sampling.max_tokens, voice.sampling.max_tokens),
                temperature=voice.sampling.temperature,
                top_p=voice.sampling.top_p,
                top_k=voice.sampling.top_k,
                stop=voice.sampling.stop,
            )
            for (lane, spec, voice), prompt in zip(batch, prompts, strict=True)
        ]
        completions = batch[0][2].engine.generate(requests)
        for (lane, spec, voice), prompt, request, completion in zip(batch, prompts, requests, completions, strict=True):
            lane.spoken[spec.name] = Turn(
                name=spec.name,
                agent=spec.agent,
                policy=voice.policy,
                prompt=prompt.text,
                prompt_ids=request.prompt_ids,
                completion=completion,
                message=strip_boxed(completion.text) if spec.strip_boxed else completion.text,
                cut_tokens=prompt.cut_tokens,
                temperature=request.temperature,
            )

    def _prompt(self, lane: Lane, spec: TurnSpec, voice: Voice) -> Prompt:
        return render_prompt(
            spec,
            {"problem": lane.problem.text, **{name: lane.message(name) for name in spec.reads}},
            voice.tokenizer,
            system=self.team.agent(spec.agent).system,
            budget=self.limits.max_prompt_tokens,
            max_message_tokens=self.limits.max_message_tokens,
        )

    def _from_cache(
        self, problems: Sequence[Problem], plan: Plan, ask: Ask, step: int
    ) -> dict[tuple[Coalition, int], list[float]]:
        if not plan.per_problem or plan.free or plan.removed in ask.keep_turns:
            return {}
        signature = self._signature(plan)
        found = {}
        for slot, problem in enumerate(problems):
            rewards = self.cache.find(problem.id, plan.removed, signature, ask.draws or ask.samples, step)
            if rewards is not None:
                found[(plan.removed, slot)] = rewards
        return found

    def _to_cache(self, lanes: Iterable[Lane], plan: Plan, ask: Ask) -> None:
        if not plan.per_problem or plan.free:
            return
        signature = self._signature(plan)
        lasting = not any(spec.agent in ask.training for spec in plan.redo)
        rewards: dict[str, list[float]] = defaultdict(list)
        for lane in lanes:
            rewards[lane.problem.id].append(lane.reward)
        for problem, values in rewards.items():
            self.cache.store(problem, plan.removed, signature, values, lasting=lasting)

    def _signature(self, plan: Plan) -> str:
        speakers = {spec.agent: self.voices[spec.agent].signature for spec in plan.redo}
        return f"{plan.how}|" + "|".join(f"{agent}={signature}" for agent, signature in sorted(speakers.items()))


def _counterfactual_lanes(joint: Sequence[Lane], problems: Sequence[Problem], plan: Plan, ask: Ask) -> list[Lane]:
    if not plan.answerable:
        return []  # reward 0, whatever the draw
    if plan.per_problem:
        return [
            Lane(slot=slot, problem=problem, rollout=None, draw=m, plan=plan)
            for slot, problem in enumerate(problems)
            for m in range(1 if plan.free else ask.draws or ask.samples)
        ]
    return [
        Lane(slot=lane.slot, problem=lane.problem, rollout=lane.rollout, draw=m, plan=plan, source=lane)
        for lane in joint
        for m in range(1 if plan.free else ask.draws or 1)
    ]


def _gather(
    team: Team,
    problems: Sequence[Problem],
    ask: Ask,
    joint: Sequence[Lane],
    lanes: Mapping[Coalition, Sequence[Lane]],
    cached: Mapping[tuple[Coalition, int], Sequence[float]],
    plans: Mapping[Coalition, Plan],
    seconds: Mapping[str, float],
) -> Played:
    P, N = len(problems), ask.samples
    without: dict[Coalition, Tensor] = {}
    counterfactuals: list[list[Counterfactual]] = [[] for _ in problems]
    for coalition, plan in plans.items():
        if not plan.answerable:
            without[coalition] = torch.zeros(P, 1, 1)
            continue
        rewards: list[list[float]] = [[] for _ in problems]
        for lane in lanes[coalition]:
            rewards[lane.slot].append(lane.reward)
            counterfactuals[lane.slot].append(
                Counterfactual(
                    removed=coalition,
                    rollout=lane.rollout,
                    draw=lane.draw,
                    turns=tuple(lane.spoken.values()),
                    answer=lane.answer,
                    reward=lane.reward,
                )
            )
        for (removed, slot), values in cached.items():
            if removed == coalition:
                rewards[slot] = list(values)
                counterfactuals[slot] += [
                    Counterfactual(
                        removed=coalition, rollout=None, draw=m, turns=(), answer=None, reward=value, cached=True
                    )
                    for m, value in enumerate(values)
                ]
        without[coalition] = torch.tensor(rewards).reshape(P, 1 if plan.per_problem else N, -1)
    groups = tuple(
        Group(
            problem=problem,
            rollouts=tuple(
                Rollout(
                    turns=tuple(lane.all_turns(team)),
                    answer=lane.answer,
                    reward=lane.reward,
                    scores=dict(lane.scores),
                    answers=dict(lane.answers),
                )
                for lane in joint[slot * N : (slot + 1) * N]
            ),
            counterfactuals=tuple(counterfactuals[slot]),
        )
        for slot, problem in enumerate(problems)
    )
    reward_PN = torch.tensor([lane.reward for lane in joint]).reshape(P, N)
    score = {
        agent: torch.tensor([lane.scores[turn] for lane in joint]).reshape(P, N)
        for agent, turn in _scored_turns(team).items()
    }
    return Played(
        groups=groups,
        reward_PN=reward_PN,
        without=without,
        score=score,
        tokens=_count_tokens(joint, [lane for group in lanes.values() for lane in group]),
        seconds=seconds,
    )


def _scored_turns(team: Team) -> dict[str, str]:
    """The last turn of each agent that the decision reads and the verifier judged; a function's turns have no verdicts."""
    if isinstance(team.decision, Function):
        return {}
    return {spec.agent: spec.name for spec in team.turns_in_order if spec.name in team.decision.reads}


def _count_tokens(joint: Sequence[Lane], counterfactual: Sequence[Lane]) -> dict[str, int]:
    counts: Counter[str] = Counter(joint=0, counterfactual=0, prefill=0, cut=0)
    for kind, lanes in (("joint", joint), ("counterfactual", counterfactual)):
        for turn in {id(turn): turn for lane in lanes for turn in lane.spoken.values()}.values():
            counts[kind] += turn.completion.tokens
            counts["prefill"] += len(turn.prompt_ids)
            counts["cut"] += turn.cut_tokens
    return dict(counts)
