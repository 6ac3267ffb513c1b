"""How the texts of a micro-batch lie in one run of tokens: nothing twice, and no padding.

The N samples of a problem share their prompt, and short answers are often the same: three voters with four choices say
few different things in eight tries. So every distinct prompt stands once, then every distinct text once:

    ids_M:  prompt 0 | prompt 1 | ... | text 0 without its last token | text 1 ... | ...

A text's first token is scored where its prompt ends. Attention alone needs rectangles; `Rectangle` says where the run's tokens
stand in them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from ccpo.learner.rows import TrainRow, whole_numbers
from ccpo.rectangle import Rectangle

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """``ids_M``, ``position_M``: the run's tokens and their places in their texts. ``prompt_size_G``, ``read_size_R``: how many each distinct
    prompt and text has there. ``owner_R``: each text's prompt.
    ``before_11PP``, ``before_R1TC``: 0 where a token attends, else -inf: within a prompt, and over its prompt's columns and its own text's.
    The scored tokens, N in all: ``at_N`` is where in the run the hidden state stands that each is drawn from, ``target_N`` its id,
    ``temperature_N`` its temperature (None where all are 1). ``scored_BT``: which of them a row's tokens are (0 beyond its end)."""

    ids_M: Tensor
    position_M: Tensor
    prompt_size_G: Tensor
    read_size_R: Tensor
    prompts: Rectangle
    texts: Rectangle
    owner_R: Tensor
    before_11PP: Tensor
    before_R1TC: Tensor
    at_N: Tensor
    target_N: Tensor
    temperature_N: Tensor | None
    scored_BT: Tensor

    @classmethod
    def of(cls, rows: Sequence[TrainRow], device: torch.device) -> Layout:
        """The layout of these rows, each with at least one token."""
        prompts = _numbered((row.prompt_ids, row.temperature) for row in rows)
        texts = _numbered((row.prompt_ids, row.temperature, row.token_ids) for row in rows)
        prompt_size_G = torch.tensor([len(ids) for ids, _ in prompts])
        size_R = torch.tensor([len(ids) for _, _, ids in texts])
        temperature_R = torch.tensor([t or 1.0 for _, t, _ in texts])
        owner_R = torch.tensor([prompts[ids, temperature] for ids, temperature, _ in texts])
        column_P, column_T = torch.arange(int(prompt_size_G.max())), torch.arange(int(size_R.max()))
        real_GP = column_P < prompt_size_G[:, None]
        real_RT = column_T < size_R[:, None]
        read_RT = real_RT[:, 1:]  # a text's last token is read by nobody
        before_R = prompt_size_G[owner_R]
        # a token is drawn from the one before it, and the first from its prompt's last
        first_R = prompt_size_G.sum() + (size_R - 1).cumsum(0) - (size_R - 1)
        at_RT = torch.where(
            column_T == 0, (prompt_size_G.cumsum(0) - 1)[owner_R, None], first_R[:, None] + column_T - 1
        )
        scored_RT = (real_RT.flatten().cumsum(0) - 1).view_as(real_RT) * real_RT
        causal_TT = column_T[:-1] <= column_T[:-1, None]
        seen_RTC = torch.cat(
            (real_GP[owner_R, None].expand(-1, len(causal_TT), -1), causal_TT.expand(len(texts), -1, -1)), -1
        )
        made = cls(
            ids_M=whole_numbers([i for ids, _ in prompts for i in ids] + [i for *_, ids in texts for i in ids[:-1]]),
            position_M=torch.cat((column_P.expand_as(real_GP)[real_GP], (before_R[:, None] + column_T[:-1])[read_RT])),
            prompt_size_G=prompt_size_G,
            read_size_R=size_R - 1,
            prompts=Rectangle.of(real_GP),
            texts=Rectangle.of(read_RT),
            owner_R=owner_R,
            before_11PP=_bias(column_P <= column_P[:, None])[None, None],
            before_R1TC=_bias(seen_RTC)[:, None],
            at_N=at_RT[real_RT],
            target_N=whole_numbers(i for *_, ids in texts for i in ids),
            temperature_N=temperature_R.repeat_interleave(size_R) if (temperature_R != 1).any() else None,
            scored_BT=scored_RT[torch.tensor([texts[r.prompt_ids, r.temperature, r.token_ids] for r in rows])],
        )
        return made.to(device)

    def biased(self, dtype: torch.dtype) -> Layout:
        """The same with what is added to the attention's scores in their dtype."""
        return replace(self, before_11PP=self.before_11PP.to(dtype), before_R1TC=self.before_R1TC.to(dtype))

    def to(self, device: torch.device) -> Layout:
        """The same on another device."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Layout(**{name: None if value is None else value.to(device) for name, value in values.items()})


def _bias(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))


def _numbered(keys: Iterable[Key]) -> dict[Key, int]:
    """The distinct keys, numbered in the order of their first appearance."""
    return {key: number for number, key in enumerate(dict.fromkeys(keys))}
