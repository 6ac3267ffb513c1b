"""Records that travel through the library, and the legend of the shape letters.

Shape letters (a tensor's name ends in them, ``reward_PN``):

====== ==========================================================================================
``P``  problems (prompts) in a batch
``N``  joint rollouts of one problem: the group
``K``  agents of the team
``M``  counterfactual draws of a problem, or of a rollout
``B``  rows of a training batch: one row is one turn that an agent has spoken
``T``  tokens of a completion, right-padded
``L``  tokens of prompt and completion together
``V``  vocabulary
``G``  segments: rows that share one importance ratio or one mean (the turns of an agent in a rollout)
====== ==========================================================================================

Rewards are real numbers in [0, 1] unless a name says otherwise. Nothing here may assume that they are 0 or 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from torch import Tensor

Coalition = tuple[str, ...]
"""Names of the agents that are removed together, sorted; ``("thinker",)`` is the team without its thinker."""

Message = tuple[str, str]
"""A message of a chat: its role ("system", "user") and its text."""


class FinishReason(StrEnum):
    """How a completion came to its end."""

    EOS = "eos"  # the model ended its turn; the end token is the last of `token_ids`
    STOP = "stop"  # a stop string appeared; the text ends before it
    LENGTH = "length"  # cut at max_tokens: a truncated completion


class VerdictStatus(StrEnum):
    OK = "ok"
    NO_ANSWER = "no_answer"  # nothing in the text can be read as an answer: an abstention
    TIMEOUT = "timeout"
    ERROR = "error"


class Removal(StrEnum):
    """What stands in the place of a removed agent's message (METHODS 1)."""

    DROP = "drop"  # the template is rendered without the message
    BLANK = "blank"  # the message is there and empty: the lazy-agent test
    PLACEHOLDER = "placeholder"  # a fixed text
    FROZEN = "frozen"  # the message of an earlier, frozen policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One question. ``answer`` is the reference that the verifier compares with; ``meta`` is whatever a task's own
    scorer needs (options of a choice, a reasoning-gym entry) and must be JSON-serialisable."""

    id: str
    text: str
    answer: str
    source: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a verifier says of a text: ``score`` in [0, 1] and the ``answer`` it read, normalised so that two equal
    answers are equal strings (it is the key under which votes are counted); None is an abstention."""

    score: float
    answer: str | None
    status: VerdictStatus = VerdictStatus.OK


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One completion to sample. The sample depends on ``seed`` and the prompt alone, not on what is batched with it
    (up to rounding). ``temperature=0`` is greedy; ``top_k=0`` and ``top_p=1`` cut nothing. An agent behind an endpoint is
    asked in ``messages``, and has no ``prompt_ids``; every other one the other way round."""

    prompt_ids: tuple[int, ...]
    seed: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What an engine sampled. ``logprobs[i]`` is the log-probability of ``token_ids[i]`` under the softmax of
    logits/temperature *before* top-p and top-k cut it (at temperature 0: under the plain softmax). The end token, when
    there is one, is the last id; ``text`` has neither it nor the stop string. An endpoint shows no tokens: then both are
    empty, and ``counted`` is how many it says that there were."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish: FinishReason
    counted: int | None = None

    @property
    def tokens(self) -> int:
        """How many tokens were generated."""
        return len(self.token_ids) if self.counted is None else self.counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A turn that was spoken: ``name`` in the team's graph, by which agent with which policy, the exact prompt, what was
    sampled, and ``message``: what readers see of it (stripped; ``completion.text`` is the raw text).
    ``cut_tokens`` counts the reader's tokens that were cut from over-long messages to make this prompt."""

    name: str
    agent: str
    policy: str
    prompt: str
    prompt_ids: tuple[int, ...]
    completion: Completion
    message: str
    cut_tokens: int = 0
    temperature: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rating:
    """What an agent said of a finished play: ``shares`` of its outcome by agent, in the team's order, summing to 1. Equal shares
    stand for a rating that is not ``valid``. ``turn`` is the turn in which it was said; None where it could not be asked."""

    shares: tuple[float, ...]
    valid: bool
    turn: Turn | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One joint play of the team: its turns in topological order, the team's answer and its reward. ``scores`` has
    the verdict's score of each turn that the decision read (each voter's own correctness), ``answers`` what the verdict read
    in it (None: nothing); ``ratings`` what each agent said of the play after the verdict, where a credit rule asked for it."""

    turns: tuple[Turn, ...]
    answer: str | None
    reward: float
    scores: Mapping[str, float] = field(default_factory=dict)
    answers: Mapping[str, str | None] = field(default_factory=dict)
    ratings: Mapping[str, Rating] = field(default_factory=dict)

    def turn(self, name: str) -> Turn:
        return next(t for t in self.turns if t.name == name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counterfactual:
    """The play that is left when ``removed`` are gone. ``turns`` are only those that were decoded again; ``rollout`` is
    the joint rollout whose other turns were kept, or None where the play does not depend on one; ``draw`` counts draws.
    ``cached`` marks a reward that was reused and whose turns are not kept."""

    removed: Coalition
    rollout: int | None
    draw: int
    turns: tuple[Turn, ...]
    answer: str | None
    reward: float
    cached: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All that was sampled for one problem: N joint rollouts and the counterfactuals."""

    problem: Problem
    rollouts: tuple[Rollout, ...]
    counterfactuals: tuple[Counterfactual, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TreePlace:
    """Where a turn stands in a tree of rollouts: the N rollouts of a problem are, in order, ``contexts`` x ``siblings`` x
    ``plays``. Rollouts of one context share everything that was spoken at earlier levels; the siblings are the texts sampled
    for this turn in one context; each text is played on ``plays`` times. The product is N."""

    contexts: int
    siblings: int
    plays: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CreditInputs:
    """What a credit rule is given.

    ``reward_PN``: the team's rewards. ``without``: for each coalition that the rule asked for, the rewards with it
    removed, ``[P, N, M]`` where each rollout has draws of its own and ``[P, 1, M]`` where the draws belong to the problem.
    ``decider``: the one agent whose last turn is the team's answer, or None (voting). ``active``: the agents that are
    trained in this step. ``score``: per agent its own correctness ``[P, N]`` where it has an answer.

    By turn, each optional: ``turns`` are the names of an agent's turns in topological order; ``tree`` is where a turn
    stands when rollouts share turns (absent: every rollout has its own); ``swap`` the rewards ``[P, N, S]`` of rollout
    n's ballot in the s-th mixture of the others' ballots, and ``silent`` those without it, for rules with ``swaps``;
    ``process`` what the task gave the turn itself ``[P, N]``. By rater: ``shares`` ``[P, N, K]`` and whether each rating
    was valid, for rules with ``rates``.
    """

    agents: tuple[str, ...]
    decider: str | None
    active: tuple[str, ...]
    reward_PN: Tensor
    without: Mapping[Coalition, Tensor] = field(default_factory=dict)
    score: Mapping[str, Tensor] = field(default_factory=dict)
    turns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tree: Mapping[str, TreePlace] = field(default_factory=dict)
    swap: Mapping[str, Tensor] = field(default_factory=dict)
    silent: Mapping[str, Tensor] = field(default_factory=dict)
    process: Mapping[str, Tensor] = field(default_factory=dict)
    shares: Mapping[str, Tensor] = field(default_factory=dict)
    shares_valid: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CreditOutputs:
    """What a credit rule pays.

    ``credit``: per active agent ``[P, N]``. ``weight``: per agent the factor of its joint rows in the loss (absent: 1).
    ``solo_credit`` / ``solo_weight``: per agent, where the rule trains it on counterfactual answers too, the credit
    ``[P, N or 1, M]`` of those of coalition ``solo_coalition[agent]`` and their factor. ``turn_credit``: by turn
    ``[P, N]``, in the place of its agent's credit for that turn's rows. ``metrics``: plain floats.
    """

    credit: Mapping[str, Tensor]
    weight: Mapping[str, float] = field(default_factory=dict)
    solo_credit: Mapping[str, Tensor] = field(default_factory=dict)
    solo_weight: Mapping[str, float] = field(default_factory=dict)
    solo_coalition: Mapping[str, Coalition] = field(default_factory=dict)
    turn_credit: Mapping[str, Tensor] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
