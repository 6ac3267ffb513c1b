"""Rating turns: after the verifier has spoken, every agent reads every play and shares out its outcome (SEPO, arXiv
2603.21563v2). They are spoken with the agents' own voices; all that one engine has to say is one batch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ccpo.errors import UserError
from ccpo.rollout.seeds import seed_of
from ccpo.rollout.voices import Limits, Voice
from ccpo.teams import (
    PlayTeam,
    Prompt,
    PromptTooLong,
    Team,
    TurnSpec,
    equal_shares,
    parse_rating,
    rating_turn,
    render_prompt,
    speakers,
)
from ccpo.teams.rating import ANSWER
from ccpo.types import Completion, FinishReason, Group, Problem, Rating, Request, Rollout, Turn

NO_ANSWER = "(none)"


@dataclass(frozen=True, slots=True, kw_only=True)
class AskRatings:
    """How ratings are asked for: the most tokens of one, how strictly it is read, and a prompt in the place of the library's."""

    max_tokens: int = 128
    strict: bool = False
    prompt: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wish:
    """A rating to be decoded: rollout ``n`` of the problem at ``slot``, rated by ``voice.agent``."""

    slot: int
    n: int
    voice: Voice
    spec: TurnSpec
    prompt: Prompt
    request: Request


@dataclass(frozen=True, kw_only=True)
class Rater:
    """Rates plays of ``team``. Agents that are not trained rate too: everybody's word counts for everybody."""

    team: Team | PlayTeam
    voices: Mapping[str, Voice]
    limits: Limits
    ask: AskRatings

    def check(self) -> None:
        """Raises UserError where no rating could ever be asked: the prompt is too long with nothing in it."""
        said = speakers(self.team.turns_in_order) if isinstance(self.team, Team) else ()
        nothing = Rollout(turns=(), answer=None, reward=0.0)
        for agent in self.team.agent_names:
            voice = self.voices[agent]
            try:
                values = {name: "" for name, _ in said}
                self._render(
                    voice, self._spec(agent, said, "correct"), Problem(id="", text="", answer=""), nothing, values
                )
            except PromptTooLong as error:
                raise UserError(
                    f"credit: agent {agent!r} cannot be asked for ratings of {self.ask.max_tokens} tokens: {error}; or give "
                    "credit.prompt a shorter text, or lower credit.max_tokens where the model's context is the bound"
                ) from None

    def rate(self, groups: Sequence[Group], *, seed: int, step: int) -> tuple[tuple[Group, ...], dict[str, int]]:
        """The groups with each rollout's ratings, and tokens: ``rating`` sampled, ``prefill``, ``cut``.

        A rating that cannot be read, or whose prompt is too long, is an invalid one: nothing that a model says here
        raises, and no reward changes.
        """
        wishes = [
            wish
            for slot, group in enumerate(groups)
            for n, rollout in enumerate(group.rollouts)
            for agent in self.team.agent_names
            if (wish := self._wish(slot, n, group.problem, rollout, agent, seed, step)) is not None
        ]
        turns: dict[tuple[int, int, str], Turn] = {}
        tokens: Counter[str] = Counter(rating=0, prefill=0, cut=0)
        for wish, completion in self._spoken(wishes):
            turns[wish.slot, wish.n, wish.voice.agent] = Turn(
                name=wish.spec.name,
                agent=wish.voice.agent,
                policy=wish.voice.policy,
                prompt=wish.prompt.text,
                prompt_ids=wish.prompt.ids,
                completion=completion,
                message=completion.text,
                cut_tokens=wish.prompt.cut_tokens,
                temperature=wish.request.temperature,
            )
            tokens.update(rating=completion.tokens, prefill=len(wish.prompt.ids), cut=wish.prompt.cut_tokens)
        rated = tuple(
            replace(
                group,
                rollouts=tuple(
                    replace(rollout, ratings=self._ratings(rollout, slot, n, turns))
                    for n, rollout in enumerate(group.rollouts)
                ),
            )
            for slot, group in enumerate(groups)
        )
        return rated, dict(tokens)

    def _spec(self, agent: str, said: tuple[tuple[str, str], ...], outcome: str) -> TurnSpec:
        return rating_turn(agent, self.team.agent_names, said, outcome, self.ask.prompt)

    def _wish(
        self, slot: int, n: int, problem: Problem, rollout: Rollout, agent: str, seed: int, step: int
    ) -> _Wish | None:
        voice, said = self.voices[agent], speakers(rollout.turns)
        spec = self._spec(agent, said, outcome_of(rollout.reward))
        values = {name: turn.message for (name, _), turn in zip(said, rollout.turns, strict=True)}
        try:
            prompt = self._render(voice, spec, problem, rollout, values)
        except PromptTooLong:
            return None
        if not prompt.tokens:  # a prompt of characters that the tokenizer does not have
            return None
        request = Request(
            prompt_ids=prompt.ids,
            messages=prompt.messages,
            seed=seed_of(seed, step, problem.id, problem.text, "rating", agent, n),
            max_tokens=self.ask.max_tokens,
            temperature=voice.sampling.temperature,
            top_p=voice.sampling.top_p,
            top_k=voice.sampling.top_k,
        )
        return _Wish(slot=slot, n=n, voice=voice, spec=spec, prompt=prompt, request=request)

    def _render(
        self, voice: Voice, spec: TurnSpec, problem: Problem, rollout: Rollout, values: Mapping[str, str]
    ) -> Prompt:
        answer = NO_ANSWER if rollout.answer is None else rollout.answer
        return render_prompt(
            spec,
            {name: _encodable(text) for name, text in {"problem": problem.text, **values, ANSWER: answer}.items()},
            voice.tokenizer,
            system=self.team.agent(voice.agent).system,
            budget=self._budget(voice),
            max_message_tokens=self.limits.max_message_tokens,
        )

    def _budget(self, voice: Voice) -> int:
        """The most tokens of a rating prompt: the run's limit, and what the model's context leaves beside the rating."""
        if voice.engine.positions is None:
            return self.limits.max_prompt_tokens
        return min(self.limits.max_prompt_tokens, voice.engine.positions - self.ask.max_tokens)

    def _spoken(self, wishes: Sequence[_Wish]) -> list[tuple[_Wish, Completion]]:
        batches: dict[int, list[_Wish]] = defaultdict(list)
        for wish in wishes:
            batches[id(wish.voice.engine)].append(wish)
        return [
            pair
            for batch in batches.values()
            for pair in zip(batch, batch[0].voice.engine.generate([w.request for w in batch]), strict=True)
        ]

    def _ratings(
        self, rollout: Rollout, slot: int, n: int, turns: Mapping[tuple[int, int, str], Turn]
    ) -> dict[str, Rating]:
        agents = self.team.agent_names
        found = {}
        for agent in agents:
            turn = turns.get((slot, n, agent))
            shares, valid = equal_shares(len(agents)), False
            if turn is not None:
                text, outcome = turn.completion.text, outcome_of(rollout.reward)
                shares, valid = parse_rating(text, outcome, agents, strict=self.ask.strict)
            found[agent] = Rating(shares=shares, valid=valid, turn=turn)
        return found


def outcome_of(reward: float) -> str:
    """What raters are told: "correct" where ``2R - 1 > 0``, else "wrong"."""
    return "correct" if 2 * reward - 1 > 0 else "wrong"


def shares_of(groups: Sequence[Group], agents: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By rater: the shares ``[P, N, K]``, agents in their order, and which ratings were valid ``[P, N]``."""
    shares = {a: torch.tensor([[r.ratings[a].shares for r in g.rollouts] for g in groups]) for a in agents}
    valid = {a: torch.tensor([[r.ratings[a].valid for r in g.rollouts] for g in groups]) for a in agents}
    return shares, valid


def rating_report(groups: Sequence[Group]) -> dict[str, float]:
    """What the ratings of a step were like, as metrics; empty where there are none.

    ``rating/asked``: share whose prompt was not too long; of these ``rating/mean_length`` in tokens and ``rating/clipped_ratio``,
    the share cut at the most tokens of a rating.
    """
    ratings = [rating for group in groups for rollout in group.rollouts for rating in rollout.ratings.values()]
    if not ratings:
        return {}
    said = [rating.turn.completion for rating in ratings if rating.turn is not None]
    found = {"rating/asked": len(said) / len(ratings)}
    if said:
        found["rating/mean_length"] = sum(c.tokens for c in said) / len(said)
        found["rating/clipped_ratio"] = sum(c.finish is FinishReason.LENGTH for c in said) / len(said)
    return found


def _encodable(text: str) -> str:
    """``text`` without lone surrogates, which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")
