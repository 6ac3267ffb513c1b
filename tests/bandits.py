"""Policies of a few weights that speak one letter: every expectation of a team of them is a finite sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ccpo.diagnose import Subject
from ccpo.learner import Policy
from ccpo.learner.objective import Objective
from ccpo.rollout import Limits
from ccpo.types import Completion, FinishReason, Request
from scripted import TOKENIZER, encode, exact_task, problem, voice

LETTERS = "abc"
IDS = [encode(letter)[0] for letter in LETTERS]


class Bandit(nn.Module):
    """``P(letter) = softmax(theta)``, whatever the prompt."""

    def __init__(self, theta: Sequence[float]) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float32))

    def logits(self, ids_BL: Tensor) -> Tensor:
        """``[B, L, 3]``"""
        return self.theta.expand(*ids_BL.shape, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Any:
        chosen = self.logits(input_ids)
        full = chosen.new_full((*input_ids.shape, len(TOKENIZER)), -1e4)
        return SimpleNamespace(logits=full.index_copy(2, torch.tensor(IDS), chosen))


class Bigram(Bandit):
    """The letter depends on the last token of the prompt: ``theta`` and, after each letter, ``after[letter]`` on top."""

    def __init__(self, theta: Sequence[float], after: Mapping[str, Sequence[float]]) -> None:
        super().__init__(theta)
        self.after = {encode(letter)[0]: torch.tensor(shift) for letter, shift in after.items()}

    def logits(self, ids_BL: Tensor) -> Tensor:
        found = super().logits(ids_BL)
        for token, shift in self.after.items():
            found = found + (ids_BL == token)[..., None] * shift
        return found


class BanditEngine:
    """Draws the letters, each by its request's seed alone."""

    def __init__(self, model: Bandit) -> None:
        self.model = model

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return [self._one(request) for request in requests]

    @torch.no_grad()
    def _one(self, request: Request) -> Completion:
        logp = self.model.logits(torch.tensor([request.prompt_ids]))[0, -1].log_softmax(0)
        drawn = int(torch.multinomial(logp.exp(), 1, generator=torch.Generator().manual_seed(request.seed)))
        return Completion(
            token_ids=(IDS[drawn],), logprobs=(float(logp[drawn]),), text=LETTERS[drawn], finish=FinishReason.STOP
        )


def bandits(team: Any, models: Mapping[str, Bandit], *, answer: str = "a", **keys: Any) -> Subject:
    """A team of bandits on problems that all have one answer."""
    settings = {"prompts": 4, "samples": 4, "seed": 1} | keys
    return Subject(
        name="bandits",
        team=team,
        task=exact_task(*(problem(f"x{i}", answer) for i in range(40))),
        voices={agent: voice(agent, BanditEngine(model), max_tokens=1) for agent, model in models.items()},
        policies={
            agent: Policy(name=agent, agents=(agent,), model=model, tokenizer=TOKENIZER)
            for agent, model in models.items()
        },
        objective=Objective(),
        active=tuple(models),
        limits=Limits(),
        **settings,
    )
