"""A cache of rows that share their prompts: a prompt's keys and values lie there once, beside what each row has said since.

All rows of a prompt look at it in one matrix product, and attention over the two parts is put together from each part's softmax (as in
Hydragen, arXiv 2402.05099). It takes a few operations more, and less memory and traffic the more samples there are and the longer prompts
are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ccpo.engines.cache import Cache
from ccpo.engines.weights import Weights
from ccpo.rectangle import Rectangle

SAVED = 2**13  # columns that must be spared before it is faster
EMPTY = 0.75  # prompts without rows leave when at most this share of them has any


def worth_sharing(prompts: Cache, owner_B: Tensor) -> bool:
    """Whether rows of these prompts (``owner_B``: each row's) decode faster from a shared cache."""
    together = bool((owner_B.diff() >= 0).all())
    return together and (len(owner_B) - len(prompts.position_B)) * prompts.filled >= SAVED


@dataclass(slots=True, kw_only=True)
class SharedCache:
    """Stands in for a `Cache`. ``prompts``: a row each; ``said``: a row for each row of the batch, those of a prompt side by side;
    ``owner_B``: their prompts; ``groups``: rows by prompt, as a rectangle."""

    prompts: Cache
    said: Cache
    owner_B: Tensor
    groups: Rectangle

    @classmethod
    def of(cls, w: Weights, prompts: Cache, owner_B: Tensor, steps: int) -> SharedCache:
        """Rows of these prompts, with room for ``steps`` tokens each."""
        said = Cache.empty(w, [0] * len(owner_B), steps)
        said.position_B = prompts.position_B[owner_B]
        return cls(prompts=prompts, said=said, owner_B=owner_B, groups=_grouped(owner_B, len(prompts.position_B)))

    @property
    def columns(self) -> int:
        """How many a row has, its prompt's and its own, used and unused."""
        return self.prompts.columns + self.said.columns

    @property
    def position_B(self) -> Tensor:
        return self.said.position_B

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As `Cache.attend`."""
        self.said.put(layer, key, value)
        by_prompt = self.groups.spread(query)  # [prompts, heads, rows of a prompt, head_dim]
        of_prompt = [
            self.groups.gather(part.view(*by_prompt.shape[:3], -1))
            for part in _look(self.prompts, layer, by_prompt, self.prompts.filled)
        ]
        own = [
            part.view(*query.shape[:2], -1) for part in _look(self.said, layer, query[:, :, None], self.said.filled + 1)
        ]
        (there, top, share), (here, own_top, own_share) = of_prompt, own
        # exp(top) / share is each part's sum of exponentials
        weight = torch.sigmoid(top.float() - own_top.float() + (own_share.float() / share.float()).log())
        return torch.lerp(here, there, weight.to(here.dtype)).flatten(1)

    def move_on(self) -> None:
        """As `Cache.move_on`."""
        self.said.move_on()

    def select(self, rows: Tensor) -> SharedCache:
        """As `Cache.select`; ``rows`` in ascending order."""
        self.said.select(rows)
        self.owner_B = self.owner_B[rows]
        kept, place_B = self.owner_B.unique(return_inverse=True)
        if len(kept) <= EMPTY * len(self.prompts.position_B):
            self.prompts.select(kept)
            self.owner_B = place_B
        self.groups = _grouped(self.owner_B, len(self.prompts.position_B))
        return self


def _look(cache: Cache, layer: int, query: Tensor, used: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `Cache.look`, with each query's largest score and weight in the place of all."""
    found, scores, weights = cache.look(layer, query, used)
    return found, scores.amax(-1, keepdim=True), weights.amax(-1, keepdim=True)


def _grouped(owner_B: Tensor, prompts: int) -> Rectangle:
    count_P = owner_B.bincount(minlength=prompts)
    return Rectangle.of(torch.arange(int(count_P.max()), device=owner_B.device) < count_P[:, None])
