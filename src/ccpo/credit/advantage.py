"""From credit to advantage: what the policy loss multiplies a row's log-probabilities with.

Each estimator is a pure function ``(credit_B, group_B, tokens_B) -> advantage_B`` over flat rows. ``credit_B`` is
what each row was paid; rows with equal ``group_B`` (any integers) are siblings: the same agent on the same problem.
``tokens_B`` is the number of trained tokens of each row, needed by ``reinforce++`` alone. All are vectorised, O(B)
for ids in [0, B), computed in 64 bits and returned in the credit's dtype.

A group that does not tell its members apart says nothing: its advantages are exactly 0. A singleton is such a group;
``raw_singletons=True`` keeps its credit as it is, which is what verl does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def grpo(credit_B: Tensor, group_B: Tensor, tokens_B: Tensor | None = None, *, raw_singletons: bool = False) -> Tensor:
    """``A = (c - mean_g) / (std_g + 1e-6)``, the unbiased deviation (GRPO, arXiv 2402.03300). No unit.

    Raises ValueError for shapes that are not ``[B]``, or credit that is not floating point.
    """
    groups = _Groups(credit_B, group_B)
    centred_B = groups.credit_B - groups.mean_B
    var_G = groups.sum(centred_B.square()) / (groups.count_G - 1).clamp(min=1)
    return groups.finish(centred_B / (groups.rows(var_G.sqrt()) + 1e-6), raw_singletons)


def dr_grpo(
    credit_B: Tensor, group_B: Tensor, tokens_B: Tensor | None = None, *, raw_singletons: bool = False
) -> Tensor:
    """``A = c - mean_g`` (Dr. GRPO, arXiv 2503.20783). In units of credit."""
    groups = _Groups(credit_B, group_B)
    return groups.finish(groups.credit_B - groups.mean_B, raw_singletons)


def rloo(credit_B: Tensor, group_B: Tensor, tokens_B: Tensor | None = None, *, raw_singletons: bool = False) -> Tensor:
    """``A = c - mean of the siblings = (c - mean_g) n/(n-1)`` (RLOO, arXiv 2402.14740). In units of credit."""
    groups = _Groups(credit_B, group_B)
    siblings_G = (groups.count_G - 1).clamp(min=1)
    factor_B = groups.rows(groups.count_G.double() / siblings_G)
    return groups.finish((groups.credit_B - groups.mean_B) * factor_B, raw_singletons)


def maxrl(credit_B: Tensor, group_B: Tensor, tokens_B: Tensor | None = None, *, raw_singletons: bool = False) -> Tensor:
    """``A = (c - mean_g) / mean_g``: of the likelihood of success in the place of its probability, so that a problem weighs the
    more the less often it is solved (MaxRL, arXiv 2602.02710). No unit.

    Raises ValueError for negative credit, whose mean is no success rate.
    """
    groups = _Groups(credit_B, group_B)
    if groups.credit_B.numel() and groups.credit_B.amin() < 0:
        raise ValueError(
            "maxrl divides by the group's mean, which must be a success rate: its credit cannot be negative"
        )
    return groups.finish((groups.credit_B - groups.mean_B) / groups.mean_B.clamp(min=1e-9), raw_singletons)


def reinforce_pp(
    credit_B: Tensor, group_B: Tensor, tokens_B: Tensor | None = None, *, raw_singletons: bool = False
) -> Tensor:
    """``A = (c - mu) / sqrt(var + 1e-8)`` over all tokens of the batch (REINFORCE++, arXiv 2501.03262). No unit.

    Each row weighs by its tokens, as the credit is the return at each of them; ``var`` is unbiased. Groups play no
    part. A batch whose rows are all paid alike gives 0. Raises ValueError without ``tokens_B``.
    """
    _check(credit_B, group_B)
    if tokens_B is None or tokens_B.shape != credit_B.shape:
        raise ValueError(f"reinforce++ whitens over tokens: tokens_B must be {tuple(credit_B.shape)}")
    weight_B = tokens_B.double()
    total = weight_B.sum()
    credit64_B = credit_B.detach().double()
    counted_B = credit64_B[weight_B > 0]
    if counted_B.numel() == 0 or counted_B.amax() == counted_B.amin():
        return torch.zeros_like(credit_B)
    centred_B = credit64_B - (weight_B * credit64_B).sum() / total
    var = (weight_B * centred_B.square()).sum() / (total - 1)
    return (centred_B * torch.rsqrt(var + 1e-8)).to(credit_B.dtype)


def none(credit_B: Tensor, group_B: Tensor, tokens_B: Tensor | None = None, *, raw_singletons: bool = False) -> Tensor:
    """``A = c``: the credit is calibrated already (global history, or a removal credit that is its own baseline)."""
    _check(credit_B, group_B)
    return credit_B.detach().clone()


Estimator = Callable[..., Tensor]

ESTIMATORS: dict[str, Estimator] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "rloo": rloo,
    "maxrl": maxrl,
    "reinforce++": reinforce_pp,
    "none": none,
}


class _Groups:
    """Sums by group, of credit in 64 bits. Groups of one size that stand one after the other, as a step has them, are a table's rows; all
    others are found by their ids."""

    def __init__(self, credit_B: Tensor, group_B: Tensor) -> None:
        _check(credit_B, group_B)
        self.dtype = credit_B.dtype
        self.credit_B = credit_B.detach().double()
        self.size = _row_length(group_B)
        if self.size:
            self.count_G = torch.full((len(group_B) // self.size,), self.size, device=group_B.device)
        else:
            self._index_B, n_groups = _dense(group_B)
            self.count_G = torch.bincount(self._index_B, minlength=n_groups)
        self.mean_B = self.rows(self.sum(self.credit_B) / self.count_G.clamp(min=1))

    def sum(self, values_B: Tensor) -> Tensor:
        if self.size:
            return values_B.view(-1, self.size).sum(1)
        return values_B.new_zeros(len(self.count_G)).index_add_(0, self._index_B, values_B)

    def rows(self, values_G: Tensor) -> Tensor:
        """Each group's value at its rows, ``[B]``."""
        return values_G.repeat_interleave(self.size) if self.size else values_G[self._index_B]

    def finish(self, advantage_B: Tensor, raw_singletons: bool) -> Tensor:
        """Exact zeros for groups without spread: rounding of the mean would else be divided by 1e-6."""
        if self.size:
            first_G = self.credit_B[:: self.size]
        else:
            first_G = self.credit_B.new_zeros(len(self.count_G))
            first_G[self._index_B] = self.credit_B  # any one member of each group
        differs_G = self.sum((self.credit_B != self.rows(first_G)).double())
        advantage_B = torch.where(self.rows(differs_G > 0), advantage_B, 0.0)
        if raw_singletons:
            advantage_B = torch.where(self.rows(self.count_G == 1), self.credit_B, advantage_B)
        return advantage_B.to(self.dtype)


def _row_length(group_B: Tensor) -> int:
    """N where the ids are N times one, then N times another, and so on, each group's rows together; else 0."""
    if group_B.numel() == 0:
        return 0
    N = int((group_B == group_B[0]).sum())
    if group_B.numel() % N:
        return 0
    table_GN = group_B.view(-1, N)
    alike = bool((table_GN == table_GN[:, :1]).all())
    first_G = table_GN[:, 0]
    return N if alike and (bool((first_G[1:] > first_G[:-1]).all()) or len(first_G.unique()) == len(first_G)) else 0


def _dense(group_B: Tensor) -> tuple[Tensor, int]:
    """Ids in [0, n): as they are where they fit in [0, B), else renumbered by a sort."""
    if group_B.numel() == 0:
        return group_B.long(), 0
    if group_B.amin() >= 0 and group_B.amax() < group_B.numel():
        return group_B.long(), int(group_B.amax()) + 1
    unique_G, index_B = torch.unique(group_B, return_inverse=True)
    return index_B, unique_G.numel()


def _check(credit_B: Tensor, group_B: Tensor) -> None:
    if credit_B.dim() != 1 or group_B.shape != credit_B.shape:
        raise ValueError(
            f"credit and group are flat and of one length; got {tuple(credit_B.shape)}, {tuple(group_B.shape)}"
        )
    if not credit_B.is_floating_point() or group_B.is_floating_point():
        raise ValueError(f"credit is floating point and group integer; got {credit_B.dtype}, {group_B.dtype}")
