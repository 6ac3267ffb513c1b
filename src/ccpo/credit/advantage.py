"""From credit to advantage: what the policy loss multiplies a row's log-probabilities with.

Each estimator is a pure function ``(credit_B, group_B, tokens_B) -> advantage_B`` over flat rows. ``credit_B`` is
what each row was paid; rows with equal ``group_B`` (any integers) are siblings: the same agent on the same problem.
``tokens_B`` is the number of trained tokens of each row, needed by ``reinforce++`` alone. All are vectorised, O(B)
for ids in [0, B), computed in 64 bits and returned in the credit's dtype. Those that compare siblings are a formula over
:class:`Siblings`, which :func:`_by_group` applies to some groups at a time, as many as the processor's cache holds.

A group that does not tell its members apart says nothing: its advantages are exactly 0. A singleton is such a group;
``raw_singletons=True`` keeps its credit as it is, which is what verl does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ccpo.kernels.compiled import library

COMPILED = ("grpo", "dr_grpo", "rloo", "maxrl")  # formulas in the order of kernels/groups.c
ROWS = 1 << 15  # rows worked on at a time: what is made of them stays in the processor's cache


def grpo(credit_B: Tensor, group_B: Tensor, tokens_B: Tensor | None = None, *, raw_singletons: bool = False) -> Tensor:
    """``A = (c - mean_g) / (std_g + 1e-6)``, the unbiased deviation (GRPO, arXiv 2402.03300). No unit.

    Raises ValueError for shapes that are not ``[B]``, or credit that is not floating point.
    """

    def formula(groups: Siblings) -> Tensor:
        var = groups.sum(groups.centred.square()) / groups.others
        return groups.centred / (var.sqrt() + 1e-6)

    return _by_group("grpo", formula, credit_B, group_B, raw_singletons)


def dr_grpo(
    credit_B: Tensor, group_B: Tensor, tokens_B: Tensor | None = None, *, raw_singletons: bool = False
) -> Tensor:
    """``A = c - mean_g`` (Dr. GRPO, arXiv 2503.20783). In units of credit."""
    return _by_group("dr_grpo", lambda groups: groups.centred, credit_B, group_B, raw_singletons)


def rloo(credit_B: Tensor, group_B: Tensor, tokens_B: Tensor | None = None, *, raw_singletons: bool = False) -> Tensor:
    """``A = c - mean of the siblings = (c - mean_g) n/(n-1)`` (RLOO, arXiv 2402.14740). In units of credit."""
    return _by_group(
        "rloo", lambda groups: groups.centred * (groups.count / groups.others), credit_B, group_B, raw_singletons
    )


def maxrl(credit_B: Tensor, group_B: Tensor, tokens_B: Tensor | None = None, *, raw_singletons: bool = False) -> Tensor:
    """``A = (c - mean_g) / mean_g``: of the likelihood of success in the place of its probability, so that a problem weighs the
    more the less often it is solved (MaxRL, arXiv 2602.02710). No unit.

    Raises ValueError for negative credit, whose mean is no success rate.
    """
    _check(credit_B, group_B)
    if credit_B.numel() and credit_B.amin() < 0:
        raise ValueError(
            "maxrl divides by the group's mean, which must be a success rate: its credit cannot be negative"
        )
    return _by_group(
        "maxrl", lambda groups: groups.centred / groups.mean.clamp(min=1e-9), credit_B, group_B, raw_singletons
    )


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


class Siblings(ABC):
    """Groups, their credit in 64 bits, and what a formula needs of them. ``centred``: each member's distance from its group's mean;
    it is taken from the group's first member before anything is averaged, so that it is exactly 0 in a group without spread: rounding
    of the mean would else be divided by 1e-6. ``count``, ``others`` (``count - 1``, at least 1) and ``mean`` are the group's."""

    def __init__(self, credit: Tensor, first: Tensor, count: Tensor) -> None:
        self.count = count
        self.others = (count - 1).clamp(min=1)
        from_first = credit - first
        shift = self.sum(from_first) / count
        self.mean = first + shift
        self.centred = from_first.sub_(shift)

    @abstractmethod
    def sum(self, values: Tensor) -> Tensor:
        """The sum over each group, in a shape that meets ``centred``."""


class Table(Siblings):
    """Groups of one size, each a row of ``[G, N]``; what is the group's is ``[G, 1]``."""

    def __init__(self, credit_GN: Tensor) -> None:
        self._ones_N1 = credit_GN.new_ones(credit_GN.shape[1], 1)
        super().__init__(credit_GN, credit_GN[:, :1], self._ones_N1.sum())

    def sum(self, values: Tensor) -> Tensor:
        return values @ self._ones_N1  # three times as fast as a sum over a short row


class Listed(Siblings):
    """Groups of any size in any order, found by ``index_B`` in [0, n_groups); what is the group's stands at each of its rows."""

    def __init__(self, credit_B: Tensor, index_B: Tensor, n_groups: int) -> None:
        self._index_B, self._n_groups = index_B, n_groups
        first_G = credit_B.new_zeros(n_groups)
        first_G[index_B] = credit_B  # any one member of each group
        super().__init__(credit_B, first_G[index_B], self.sum(torch.ones_like(credit_B)))

    def sum(self, values: Tensor) -> Tensor:
        return values.new_zeros(self._n_groups).index_add_(0, self._index_B, values)[self._index_B]


def _by_group(
    name: str, formula: Callable[[Siblings], Tensor], credit_B: Tensor, group_B: Tensor, raw_singletons: bool
) -> Tensor:
    """The advantages by a formula over groups. Groups of one size that stand one after the other, as a step has them, are a table's
    rows; all others are found by their ids."""
    _check(credit_B, group_B)
    credit_B = credit_B.detach()
    N = _row_length(group_B)
    if N == 1 and raw_singletons:
        return credit_B.clone()
    if N and _compiled(credit_B):
        credit_B, advantage_B = credit_B.contiguous(), torch.empty_like(credit_B, memory_format=torch.contiguous_format)
        library().ccpo_advantages(
            len(credit_B) // N, N, credit_B.data_ptr(), COMPILED.index(name), advantage_B.data_ptr()
        )
        return advantage_B
    if N:
        pieces = credit_B.view(-1, N).split(max(ROWS // N, 1))
        return torch.cat([formula(Table(piece.double())).to(credit_B.dtype) for piece in pieces]).flatten()
    groups = Listed(credit_B.double(), *_dense(group_B))
    advantage_B = formula(groups).to(credit_B.dtype)
    return torch.where(groups.count == 1, credit_B, advantage_B) if raw_singletons else advantage_B


def _compiled(credit_B: Tensor) -> bool:
    """Whether the formulas are there in C (``kernels/groups.c``) for such credit."""
    return credit_B.device.type == "cpu" and credit_B.dtype == torch.float32 and library() is not None


def _row_length(group_B: Tensor) -> int:
    """N where the ids are N times one, then N times another, and so on, each group's rows together; else 0."""
    if group_B.numel() == 0:
        return 0
    if group_B.device.type == "cpu" and group_B.dtype == torch.int64 and library() is not None:
        group_B = group_B.contiguous()
        N = library().ccpo_group_length(len(group_B), group_B.data_ptr())
        return abs(N) if N >= 0 or len(group_B[::-N].unique()) == len(group_B) // -N else 0
    neighbours = zip(group_B[1:].split(ROWS), group_B[:-1].split(ROWS), strict=True)
    G = 1 + sum(int(torch.ne(a, b, out=torch.empty_like(a)).sum()) for a, b in neighbours)
    if group_B.numel() % G:
        return 0
    N = group_B.numel() // G
    first_G, last_G = group_B[::N], group_B[N - 1 :: N]
    if bool((first_G[1:] == last_G[:-1]).any()):  # then one of the G - 1 changes is within a row
        return 0
    return N if bool((first_G[1:] > first_G[:-1]).all()) or len(first_G.unique()) == G else 0


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
