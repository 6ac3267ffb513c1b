"""A scripted engine for tests: strict in what it accepts, it records it and answers by prompt and seed alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ccpo.rollout import Sampling, Voice
from ccpo.tasks import ListTask, exact_verdict
from ccpo.types import Completion, FinishReason, Problem, Request
from tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id

Say = Callable[[str, int], str]
"""What is said to a prompt under a seed."""


def encode(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False)["input_ids"])


@dataclass
class ScriptedEngine:
    """``say(prompt, seed)`` is the text; every character is a token of log-probability ``logprob(text)``."""

    say: Say
    logprob: Callable[[str], float] = lambda text: -0.5
    calls: list[list[tuple[str, Request]]] = field(default_factory=list)
    prefill_tokens: int = 0
    decoded_tokens: int = 0
    positions: int | None = None

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        assert requests, "an engine is not called for nothing"
        batch, completions = [], []
        for request in requests:
            assert isinstance(request, Request)
            assert request.prompt_ids
            assert request.max_tokens >= 1
            assert 0 <= request.seed < 2**63
            prompt = TOKENIZER.decode(request.prompt_ids)
            batch.append((prompt, request))
            completions.append(self._complete(prompt, request))
        self.calls.append(batch)
        self.prefill_tokens += sum(len(r.prompt_ids) for r in requests)
        self.decoded_tokens += sum(len(c.token_ids) for c in completions)
        return completions

    def _complete(self, prompt: str, request: Request) -> Completion:
        text = self.say(prompt, request.seed)
        ids = (*encode(text), EOS)
        finish = FinishReason.EOS
        if len(ids) > request.max_tokens:
            ids, finish = ids[: request.max_tokens], FinishReason.LENGTH
            text = TOKENIZER.decode(ids)
        return Completion(token_ids=ids, logprobs=(self.logprob(text),) * len(ids), text=text, finish=finish)

    def refresh(self) -> None:
        raise AssertionError("a rollout refreshes nothing")

    @property
    def prompts(self) -> list[str]:
        return [prompt for batch in self.calls for prompt, _ in batch]


def voice(
    agent: str, engine: Any, *, max_tokens: int = 64, version: int = 0, policy: str | None = None, **sampling: Any
) -> Voice:
    return Voice(
        agent=agent,
        policy=policy or agent,
        engine=engine,
        tokenizer=TOKENIZER,
        sampling=Sampling(max_tokens=max_tokens, **sampling),
        version=version,
    )


def voices(agents: Sequence[str], engine: Any, **keys: Any) -> dict[str, Voice]:
    return {agent: voice(agent, engine, **keys) for agent in agents}


def problem(text: str, answer: str = "yes", **keys: Any) -> Problem:
    return Problem(id=f"id-{text}", text=text, answer=answer, **keys)


@dataclass
class CountingTask:
    """An exact task that records what it is asked to judge, call by call."""

    problems: Sequence[Problem]
    name: str = "counting"
    judged: list[list[tuple[str, str]]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, index: int) -> Problem:
        return self.problems[index]

    def verify(self, pairs):
        self.judged.append([(p.text, text) for p, text in pairs])
        return [exact_verdict(p, text) for p, text in pairs]


def exact_task(*problems: Problem) -> ListTask:
    return ListTask(name="scripted", problems=problems, verifier=exact_verdict)


def pick(seed: int, *options: str) -> str:
    """One of the options, by the seed."""
    return options[seed % len(options)]


def by_agent(said: Mapping[str, Say]) -> Say:
    """Speaks as the agent whose name the prompt begins with (``thinker: …``)."""

    def say(prompt: str, seed: int) -> str:
        return said[prompt.partition(":")[0]](prompt, seed)

    return say
