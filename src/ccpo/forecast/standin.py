"""Stand-ins for what costs time in a step: engines that say texts of given lengths, a verifier that tosses coins, a learner that takes notes.

With them the library's own trainer plays a step, so that what is counted is what training does: which coalitions are removed, which
turns are spoken again, what is drawn how often, which rows are trained on.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, total_ordering
from itertools import islice
from typing import Any

from ccpo.comm import Comm
from ccpo.engines.base import check_requests
from ccpo.learner import TrainRow
from ccpo.learner.update import UpdateStats
from ccpo.rollout import Voice
from ccpo.tasks import Task
from ccpo.teams import ChatReader
from ccpo.teams.messages import Prompt
from ccpo.types import Completion, FinishReason, Problem, Request, Verdict

WORDS = (
    " the",
    " of",
    " and",
    " to",
    " in",
    " is",
    " that",
    " for",
    " it",
    " as",
    " was",
    " with",
    " be",
    " by",
    " on",
    " not",
)

VARIED = 64  # tokens of a text that are drawn
NOISE = 1 << 16  # numbers that texts are taken from; no text is longer


@total_ordering
class Tokens(Sequence[int]):
    """``size`` tokens that nobody reads: equal where ``key`` and size are."""

    __slots__ = ("key", "size")

    def __init__(self, size: int, key: Any) -> None:
        self.size, self.key = size, key

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]

    def __iter__(self) -> Iterator[int]:
        start = hash(self.key) % NOISE
        return islice(_noise()[0], start, start + self.size)

    def __hash__(self) -> int:
        return hash((self.size, self.key))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokens) and (self.size, self.key) == (other.size, other.key)

    def __lt__(self, other: Tokens) -> bool:
        return (self.size, self.key) < (other.size, other.key)


class Logprobs(Sequence[float]):
    """``size`` log-probs."""

    __slots__ = ("key", "size")

    def __init__(self, size: int, key: int) -> None:
        self.size, self.key = size, key

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]

    def __iter__(self) -> Iterator[float]:
        start = hash(self.key * 7_919) % NOISE
        return islice(_noise()[1], start, start + self.size)


@cache
def _noise() -> tuple[list[int], list[float]]:
    """Numbers as tokens and log-probs are: what they take to be written down hangs on that."""
    rng = random.Random(0)
    return [rng.randrange(64) for _ in range(2 * NOISE)], [-rng.expovariate(1.0) for _ in range(2 * NOISE)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How long texts are, in tokens with the end token. ``share``: the mean, as a share of what the turn may have at most; ``spread``:
    deviation over mean, log-normal, cut at the most. ``seen``: by agent the lengths that a run has had, from which they are drawn instead."""

    share: float = 0.5
    spread: float = 0.5
    seen: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def draw(self, agent: str, most: int, rng: random.Random) -> int:
        if self.seen.get(agent):
            return max(1, min(most, rng.choice(self.seen[agent])))
        mean = self.share * most
        if self.spread:
            variance = math.log1p(self.spread**2)
            mean = rng.lognormvariate(math.log(mean) - variance / 2, math.sqrt(variance))
        return max(1, min(most, round(mean)))


@dataclass(kw_only=True)
class CountingReader(ChatReader):
    """Reads prompts where there is no tokenizer: four characters are a token, and a prompt is its text's key."""

    def prompt(self, user: str, system: str | None) -> Prompt:
        text = f"{system}\n\n{user}" if system else user
        size = self.length(text)
        return Prompt(text=text, tokens=size, ids=Tokens(size, text))  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A completion that was asked for, as `ccpo.engines.base.batches` reads it, and how long it became."""

    prompt_ids: Tokens
    max_tokens: int
    length: int


@dataclass(kw_only=True)
class StandInEngine:
    """Says texts of the lengths that ``lengths`` draws; what the native engine refuses it refuses too. ``calls``: what each call of `generate`
    asked for; ``seconds``: spent in here. An agent is told apart by a stop string of its own."""

    policy: str
    lengths: Lengths
    reader: Any
    calls: list[list[Asked]] = field(default_factory=list)
    seconds: float = 0.0
    prefill_tokens: int = 0
    decoded_tokens: int = 0
    positions: int | None = None

    def __post_init__(self) -> None:
        self.units = spoken_units(self.reader)
        self.keys: dict[Any, int] = {}
        self.said = 0

    def refresh(self) -> None:
        """Nothing."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        started = time.perf_counter()
        check_requests(requests, vocab=NOISE, positions=self.positions)
        done, asked = [], []
        for request in requests:
            rng = random.Random(request.seed)
            length = self.lengths.draw(request.stop[-1] if request.stop else "", request.max_tokens, rng)
            self.said += 1
            done.append(
                Completion(
                    token_ids=Tokens(length, self.said),  # type: ignore[arg-type]
                    logprobs=Logprobs(length, self.said),  # type: ignore[arg-type]
                    # one of the most tokens was cut off, and has no end token; it counts as ended, so that it can be paid
                    text=self._text(length - (length < request.max_tokens), rng),
                    finish=FinishReason.EOS,
                )
            )
            key = self.keys.setdefault(request.prompt_ids, len(self.keys))
            prompt = Tokens(len(request.prompt_ids), (0, key))
            asked.append(Asked(prompt_ids=prompt, max_tokens=request.max_tokens, length=length))
        self.calls.append(asked)
        self.seconds += time.perf_counter() - started
        return done

    def _text(self, tokens: int, rng: random.Random) -> str:
        """So many tokens: some at random, so that no two texts are the same, over and over."""
        some = "".join(rng.choices(self.units, k=min(tokens, VARIED)))
        whole, rest = divmod(tokens, VARIED)
        return some * max(1, whole) + self.units[0] * (rest if whole else 0)


def spoken_units(reader: Any) -> tuple[str, ...]:
    """Texts of one token each, by this reader, that stay so side by side."""
    if isinstance(reader, CountingReader):
        return tuple(word[:4].ljust(4, "~") for word in WORDS)
    digits = tuple(d for d in "0123456789" if reader.length(d) == 1)
    if reader.length("".join(WORDS)) == len(WORDS):
        return WORDS
    return digits if digits and reader.length("".join(digits)) == len(digits) else WORDS


@dataclass(kw_only=True)
class CoinTask:
    """The problems of ``problems``; every text is right with probability one half, whatever it says."""

    problems: Sequence[Problem] | Task
    name: str = "coins"

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, index: int) -> Problem:
        return self.problems[index]

    def verify(self, pairs: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        right = [random.Random(f"{problem.id}/{text}").random() < 0.5 for problem, text in pairs]
        return [Verdict(score=float(r), answer="right" if r else "wrong") for r in right]

    def process(self, triples: Sequence[tuple[Problem, str, str]]) -> list[float]:
        return [0.5] * len(triples)


class NotingLearner:
    """Keeps the rows of the last step."""

    def __init__(self) -> None:
        self.rows: list[TrainRow] = []

    def step(self, minibatches: Sequence[Sequence[TrainRow]], **_: Any) -> UpdateStats:
        self.rows = [row for rows in minibatches for row in rows]
        return UpdateStats(metrics={}, seconds=0.0)


class NoRemotes:
    """No endpoint is asked."""

    engines: Mapping[str, Any] = {}

    def __bool__(self) -> bool:
        return False

    def metrics(self) -> dict[str, float]:
        return {}


class StandInCrew:
    """A `ccpo.crew.Crew` of stand-ins. ``voices`` by agent; ``frozen`` those of removal by ``frozen``."""

    def __init__(self, voices: Mapping[str, Voice], frozen: Mapping[str, Voice]) -> None:
        self._voices, self.frozen_voices = dict(voices), dict(frozen)
        self.comm, self.remotes, self.learner = Comm(), NoRemotes(), NotingLearner()
        self.beside = self.comm
        self.policies: dict[str, Any] = {}

    def voices(self) -> dict[str, Voice]:
        return self._voices

    def rest(self) -> None:
        """Nothing."""

    def refresh(self, *, everything: bool = False) -> None:
        """Nothing."""
