"""From a loss per token to one number, with denominators of the whole mini-batch.

Every way of averaging is a weighted sum over tokens. The weights are fixed by counts over the *whole* mini-batch
(:class:`Denominators`), so the sum over any split into micro-batches, and its gradient, is that of the whole.

    ==================== =================================== ====================================================
    name                 weight of a token                   known from
    ==================== =================================== ====================================================
    token-mean           1 / tokens                          DAPO (arXiv 2503.14476)
    seq-mean-token-mean  1 / (rows * tokens of its row)      GRPO (arXiv 2402.03300), GSPO (arXiv 2507.18071)
    seq-mean-token-sum   1 / rows                            the policy-gradient theorem, taken literally
    constant             1 / (rows * constant)               Dr. GRPO (arXiv 2503.20783)
    trajectory-mean      1 / (segments * rows of its segment ReMA (arXiv 2503.09501): mean over an agent's turns
                         * tokens of its row)                in a rollout, then over rollouts
    ==================== =================================== ====================================================

Rows without a trained token count nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Denominators:
    """Counts over a whole mini-batch: ``tokens``, ``rows`` with a token, ``segments`` with one, ``rows_in_segment``
    (rows with a token of each segment id, ``[G]``), and the ``constant`` of the Dr. GRPO mean."""

    tokens: int
    rows: int
    segments: int
    rows_in_segment: Tensor
    constant: float | None = None


def denominators(tokens_B: Tensor, segment_B: Tensor | None = None, constant: float | None = None) -> Denominators:
    """The counts of a mini-batch. ``tokens_B``: trained tokens of each row (``mask_BT.sum(1)``), of *all* its
    micro-batches and ranks; ``segment_B``: small ids >= 0, each row its own segment where absent. Raises ValueError
    for a batch without tokens."""
    if segment_B is None:
        segment_B = torch.arange(tokens_B.numel()).to(tokens_B.device)
    if tokens_B.dim() != 1 or segment_B.shape != tokens_B.shape or segment_B.is_floating_point():
        raise ValueError(
            f"tokens and segments are [B], segments integer; got {tuple(tokens_B.shape)}, {tuple(segment_B.shape)}"
        )
    filled_B = tokens_B > 0
    if not filled_B.any():
        raise ValueError("a mini-batch without a single trained token has no mean")
    rows_in_segment = torch.bincount(segment_B[filled_B])
    return Denominators(
        tokens=int(tokens_B.sum()),
        rows=int(filled_B.sum()),
        segments=int((rows_in_segment > 0).sum()),
        rows_in_segment=rows_in_segment,
        constant=constant,
    )


def token_mean(loss_BT: Tensor, mask_BT: Tensor, counts: Denominators, segment_B: Tensor | None = None) -> Tensor:
    """``sum(loss * mask) / tokens``: each token of the mini-batch weighs the same. Scalar."""
    return _row_sums(loss_BT, mask_BT).sum() / counts.tokens


def seq_mean_token_mean(
    loss_BT: Tensor, mask_BT: Tensor, counts: Denominators, segment_B: Tensor | None = None
) -> Tensor:
    """``mean over rows of the mean over the row's tokens``: each row weighs the same. Scalar."""
    return _row_means(loss_BT, mask_BT).sum() / counts.rows


def seq_mean_token_sum(
    loss_BT: Tensor, mask_BT: Tensor, counts: Denominators, segment_B: Tensor | None = None
) -> Tensor:
    """``mean over rows of the sum over the row's tokens``: a row weighs by its length. Scalar."""
    return _row_sums(loss_BT, mask_BT).sum() / counts.rows


def constant(loss_BT: Tensor, mask_BT: Tensor, counts: Denominators, segment_B: Tensor | None = None) -> Tensor:
    """Mean over rows of the sum over the row's tokens, / constant (Dr. GRPO). Scalar. ValueError without a constant."""
    if counts.constant is None:
        raise ValueError("aggregate 'constant' needs denominators(..., constant=): the longest completion")
    return _row_sums(loss_BT, mask_BT).sum() / (counts.rows * counts.constant)


def trajectory_mean(loss_BT: Tensor, mask_BT: Tensor, counts: Denominators, segment_B: Tensor | None = None) -> Tensor:
    """``mean over segments of the mean over the segment's rows of the mean over the row's tokens`` (ReMA). Scalar.

    Raises ValueError without ``segment_B`` ``[B]``, the ids that ``counts`` was made with.
    """
    if segment_B is None or segment_B.shape != loss_BT.shape[:1]:
        raise ValueError(f"trajectory-mean needs segment_B of shape [{loss_BT.shape[0]}]")
    # a row without tokens has loss 0; its segment may have no other row
    rows_B = counts.rows_in_segment.to(segment_B.device)[segment_B.clamp(max=counts.rows_in_segment.numel() - 1)].clamp(
        min=1
    )
    return (_row_means(loss_BT, mask_BT) / rows_B).sum() / counts.segments


def _row_sums(loss_BT: Tensor, mask_BT: Tensor) -> Tensor:
    if loss_BT.dim() != 2 or mask_BT.shape != loss_BT.shape:
        raise ValueError(f"loss and mask are [B, T]; got {tuple(loss_BT.shape)} and {tuple(mask_BT.shape)}")
    return torch.where(mask_BT.bool(), loss_BT, 0.0).sum(dim=1)


def _row_means(loss_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return _row_sums(loss_BT, mask_BT) / mask_BT.bool().sum(dim=1).clamp(min=1)


AGGREGATES: dict[str, Callable[..., Tensor]] = {
    "token-mean": token_mean,
    "seq-mean-token-mean": seq_mean_token_mean,
    "seq-mean-token-sum": seq_mean_token_sum,
    "constant": constant,
    "trajectory-mean": trajectory_mean,
}
