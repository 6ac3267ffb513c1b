"""Draws tokens from logits. The noise is a function of (seed, position) alone: what is batched together cannot matter.

Every row is sampled by inverting its cumulative distribution in vocabulary order, whatever is cut from it; a row
without top-k or top-p thus gets the same token beside rows that have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import CDLL
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ccpo.kernels.compiled import address, library
from ccpo.types import Request

_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15, the odd integer nearest to 2^64 / golden ratio
_MIX = ((30, -4658895280553007687), (27, -7723592293110705685))  # splitmix64: shift, then multiply
_BLOCK = 512  # tokens of a block of the vocabulary
_HEAD = 512  # most probable tokens that are looked at before the whole vocabulary is sorted


def signed64(seed: int) -> int:
    """The seed modulo 2^64 as a signed 64-bit integer: what an int64 tensor holds."""
    return (seed + 2**63) % 2**64 - 2**63


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """The logical shift; torch's own copies the sign bit."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mix(bits: Tensor) -> Tensor:
    for shift, factor in _MIX:
        bits = (bits ^ _shift_right(bits, shift)) * factor
    return bits ^ _shift_right(bits, 31)


def uniform(seed_B: Tensor, position: Tensor | int) -> Tensor:
    """Uniform noise in (0, 1), float64, one number for each seed and position (they broadcast).

    ``u = (top 48 bits of mix(mix(seed + gamma) + gamma * (position + 1)) + 1/2) / 2^48``, with ``mix`` and ``gamma`` of
    splitmix64 (Steele, Lea & Flood 2014), modulo 2^64. 48 bits, so that ``u * total < total`` for any float64 total.
    Raises ValueError if the seeds are not int64.
    """
    if seed_B.dtype != torch.int64:
        raise ValueError(f"seeds must be int64, not {seed_B.dtype}")
    bits = _mix(_mix(seed_B + _GAMMA) + _GAMMA * (torch.as_tensor(position, device=seed_B.device) + 1))
    return (_shift_right(bits, 16).double() + 0.5) * 2.0**-48


def inverse_cdf(prob_BV: Tensor, u_B: Tensor) -> Tensor:
    """The first token whose cumulative weight exceeds ``u * total``: ``[B]`` indices. Rows need not sum to 1; a token
    of weight 0 is never drawn. A row with a NaN gets the last token, whose probability tells.

    A large vocabulary is first looked at in blocks, so that only one block a row is cumulated in float64.
    """
    V = prob_BV.shape[-1]
    if V <= 4 * _BLOCK:
        cumulative_BV = prob_BV.cumsum(-1, dtype=torch.float64)
        target_B1 = u_B.double()[:, None] * cumulative_BV[:, -1:]
        return torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0].clamp(max=V - 1)
    whole = V // _BLOCK * _BLOCK
    mass_BN = prob_BV[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1)
    if whole < V:
        mass_BN = torch.cat((mass_BN, prob_BV[:, whole:].sum(-1, keepdim=True)), 1)
    cumulative_BN = mass_BN.cumsum(-1, dtype=torch.float64)
    target_B1 = u_B.double()[:, None] * cumulative_BN[:, -1:]
    block_B1 = torch.searchsorted(cumulative_BN, target_B1, right=True).clamp(max=mass_BN.shape[1] - 1)
    place_BS = block_B1 * _BLOCK + torch.arange(_BLOCK, device=prob_BV.device)
    inside_BS = (prob_BV.gather(1, place_BS.clamp(max=V - 1)) * (place_BS < V)).cumsum(-1, dtype=torch.float64)
    before_B1 = pad(cumulative_BN[:, :-1], (1, 0)).gather(1, block_B1)
    # a block's sum in float32 and in float64 differ by rounding: what is sought stays within it
    rest_B1 = (target_B1 - before_B1).clamp(min=0).minimum(inside_BS[:, -1:] * (1 - 2.0**-52))
    offset_B = torch.searchsorted(inside_BS, rest_B1, right=True)[:, 0]
    return (block_B1[:, 0] * _BLOCK + offset_B).clamp(max=V - 1)


def cut(prob_BV: Tensor, top_k_B: Tensor, top_p_B: Tensor) -> Tensor:
    """Sets to 0 what top-k and then top-p (of the mass that top-k left) cut; the rest keeps its value.

    Top-k keeps the k most probable tokens (0: all). Top-p keeps the smallest set of most probable tokens whose mass
    reaches ``top_p`` (Holtzman et al. 2020), at least one. Tokens as probable as the last one kept are kept with it.
    """
    head = min(prob_BV.shape[-1], max(_HEAD, int(top_k_B.max()) + 1))
    edge_B1, decided = _edges(prob_BV, prob_BV.topk(head).values, top_k_B, top_p_B)
    if not decided:
        edge_B1, _ = _edges(prob_BV, prob_BV.sort(descending=True).values, top_k_B, top_p_B)
    return prob_BV * (prob_BV >= edge_B1)


def _edges(prob_BV: Tensor, sorted_BH: Tensor, top_k_B: Tensor, top_p_B: Tensor) -> tuple[Tensor, bool]:
    """Each row's smallest kept probability, and whether the sorted head was long enough to tell."""
    head = sorted_BH.shape[-1]
    last_B1 = top_k_B.clamp(1, head)[:, None] - 1
    least_B1 = torch.where(top_k_B[:, None] > 0, sorted_BH.gather(1, last_B1), 0)  # what top-k alone keeps
    total_B1 = (prob_BV * (prob_BV >= least_B1)).sum(-1, keepdim=True, dtype=torch.float64)
    kept_BH = sorted_BH.double() * (sorted_BH >= least_B1)
    # The mass before a token decides, so the first token is always in and the one that reaches top_p is the last in.
    before_BH = kept_BH.cumsum(-1) - kept_BH
    count_B1 = ((before_BH < top_p_B[:, None].double() * total_B1) & (kept_BH > 0)).sum(-1, keepdim=True)
    whole_B1 = top_p_B[:, None] >= 1
    edge_B1 = torch.where(whole_B1, least_B1, sorted_BH.gather(1, (count_B1 - 1).clamp(min=0)))
    return edge_B1, head == prob_BV.shape[-1] or bool((whole_B1 | (count_B1 < head)).all())


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """The sampling parameters of a batch's rows, as tensors, and their noise. None stands for "no row has it". ``cut_alone``: the sampler of
    ``cut_rows``, where they are some of the rows."""

    noise_BT: Tensor
    temperature_B1: Tensor | None
    greedy_B: Tensor | None
    all_greedy: bool
    cut_rows: Tensor | None
    top_k_B: Tensor
    top_p_B: Tensor
    cut_alone: Sampler | None = None

    @classmethod
    def of(cls, requests: Sequence[Request], device: torch.device) -> Sampler:
        seed_B1 = torch.tensor([[signed64(r.seed)] for r in requests], device=device)
        steps = torch.arange(max(r.max_tokens for r in requests), device=device)
        greedy_B = torch.tensor([r.temperature == 0 for r in requests], device=device)
        temperature = [r.temperature or 1.0 for r in requests]
        sampler = cls(
            noise_BT=uniform(seed_B1, steps),
            temperature_B1=torch.tensor(temperature, dtype=torch.float32, device=device)[:, None]
            if set(temperature) != {1.0}
            else None,
            greedy_B=greedy_B,
            all_greedy=False,
            cut_rows=None,
            top_k_B=torch.tensor([r.top_k for r in requests], device=device),
            top_p_B=torch.tensor([r.top_p for r in requests], device=device, dtype=torch.float64),
        )
        return sampler._settle(greedy_B)

    def select(self, rows: Tensor) -> Sampler:
        """The sampler of these rows alone."""
        greedy_B = torch.zeros_like(self.top_k_B, dtype=torch.bool) if self.greedy_B is None else self.greedy_B
        chosen = replace(
            self,
            noise_BT=self.noise_BT[rows],
            temperature_B1=None if self.temperature_B1 is None else self.temperature_B1[rows],
            top_k_B=self.top_k_B[rows],
            top_p_B=self.top_p_B[rows],
        )
        return chosen._settle(greedy_B[rows])

    def _settle(self, greedy_B: Tensor) -> Sampler:
        """Finds out once which of the costlier steps this batch needs, so that a step asks the device nothing."""
        cut_rows = (((self.top_k_B > 0) | (self.top_p_B < 1)) & ~greedy_B).nonzero()[:, 0]
        settled = replace(
            self,
            greedy_B=greedy_B if bool(greedy_B.any()) else None,
            all_greedy=bool(greedy_B.all()),
            cut_rows=cut_rows if len(cut_rows) else None,
            cut_alone=None,
        )
        return replace(settled, cut_alone=settled.select(cut_rows)) if 0 < len(cut_rows) < len(greedy_B) else settled

    def draw(self, logits_BV: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """One token a row and its probability under softmax(logits / temperature) before anything is cut."""
        code = library() if logits_BV.device.type == "cpu" and logits_BV.dtype == torch.float32 else None
        if code is None or (self.cut_rows is not None and self.cut_alone is None):
            return self._draw(logits_BV, step)
        token_B, prob_B = self._draw_compiled(code, logits_BV, step)
        if self.cut_alone is not None:
            token_B[self.cut_rows], prob_B[self.cut_rows] = self.cut_alone._draw(logits_BV[self.cut_rows], step)
        return token_B, prob_B

    def _draw_compiled(self, code: CDLL, logits_BV: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """All rows in one call, as if nothing were cut from any."""
        rows, vocab = logits_BV.shape
        logits_BV = logits_BV if logits_BV.stride(1) == 1 else logits_BV.contiguous()
        token_B, prob_B = (
            torch.empty(rows, dtype=torch.int64, device="cpu"),
            torch.empty(rows, dtype=torch.float32, device="cpu"),
        )
        code.ccpo_sample(
            rows,
            vocab,
            logits_BV.data_ptr(),
            logits_BV.stride(0),
            self.noise_BT.data_ptr() + 8 * step,
            self.noise_BT.stride(0),
            address(self.temperature_B1),
            address(self.greedy_B),
            token_B.data_ptr(),
            prob_B.data_ptr(),
            torch.get_num_threads(),
        )
        return token_B, prob_B

    def _draw(self, logits_BV: Tensor, step: int) -> tuple[Tensor, Tensor]:
        if self.temperature_B1 is not None:
            logits_BV = logits_BV.float() / self.temperature_B1
        prob_BV = torch.softmax(logits_BV, -1, dtype=torch.float32)
        token_B = prob_BV.argmax(-1) if self.all_greedy else inverse_cdf(self._cut(prob_BV), self.noise_BT[:, step])
        if self.greedy_B is not None and not self.all_greedy:
            token_B = torch.where(self.greedy_B, prob_BV.argmax(-1), token_B)
        return token_B, prob_BV.gather(1, token_B[:, None])[:, 0]

    def _cut(self, prob_BV: Tensor) -> Tensor:
        if self.cut_rows is None:
            return prob_BV
        if len(self.cut_rows) == len(prob_BV):
            return cut(prob_BV, self.top_k_B, self.top_p_B)
        rows = self.cut_rows
        return prob_BV.index_copy(0, rows, cut(prob_BV[rows], self.top_k_B[rows], self.top_p_B[rows]))
