"""Policy-gradient losses, one number a token. All share one signature and differ in what they call the ratio.

    ============= ===================================== ==================================================
    name          importance ratio                      paper
    ============= ===================================== ==================================================
    ppo_clip      of each token                         PPO (arXiv 1707.06347); asymmetric: DAPO (2503.14476)
    reinforce++   of each token                         REINFORCE++ (arXiv 2501.03262)
    gspo          of the sequence                       GSPO (arXiv 2507.18071)
    turn          of the turn                           ReMA (arXiv 2503.09501)
    cispo         of each token, as a constant weight   CISPO (arXiv 2506.13585)
    ============= ===================================== ==================================================

Arguments that all share:

- ``logprob_BT`` (gradient flows), ``old_logprob_BT``: log-probabilities of the sampled tokens under the policy now
  and at the start of the step, in nats; ``advantage_B``: of each row; ``mask_BT``: true where a token is trained.
  What stands at masked places never matters, NaN included.
- ``clip_low``, ``clip_high``: the ratio is trusted in ``[1 - clip_low, 1 + clip_high]``.
- ``dual_clip``: for negative advantages the loss is at most ``-A * dual_clip`` (arXiv 1912.09729), so that one very
  unlikely token cannot blow up the step; None: off.
- ``segment_B``: rows with equal ids share one sequence ratio (all the turns of an agent in a rollout); absent: each
  row its own. All rows of a segment must be in the call.
- ``weight_BT``: constant factors of the loss, see :func:`truncated_weights`.

Each returns ``(loss_BT, metrics)``: the loss is to be minimised, 0 at masked places, and not yet averaged
(:mod:`ccpo.losses.aggregate`). Metrics are detached scalars over the call's valid tokens: ``tokens``, ``ratio_mean``,
``ratio_max``, ``approx_kl`` (k1 of old to new), ``clip_frac``, ``dual_clip_frac``. Means over several calls weigh by
``tokens``. Raises ValueError for shapes that do not fit, or a dual clip of at most 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Loss = tuple[Tensor, dict[str, Tensor]]

MAX_LOG_RATIO = 20.0  # of a token: exp(20) is far outside every clip range and still a number
MAX_LOG_SEQUENCE_RATIO = 10.0  # of a sequence: already a geometric mean over its tokens


def ppo_clip(
    logprob_BT: Tensor,
    old_logprob_BT: Tensor,
    advantage_B: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    segment_B: Tensor | None = None,
    weight_BT: Tensor | None = None,
) -> Loss:
    """``max(-A r, -A clip(r, 1 - low, 1 + high))``, ``r = pi / pi_old`` by token (PPO, arXiv 1707.06347, Eq. 7)."""
    valid_BT = _check(logprob_BT, old_logprob_BT, advantage_B, mask_BT)
    log_ratio_BT = _difference(logprob_BT, old_logprob_BT, valid_BT)
    ratio_BT = log_ratio_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return _clipped(ratio_BT, log_ratio_BT, advantage_B, valid_BT, clip_low, clip_high, dual_clip, weight_BT)


def reinforce_pp(
    logprob_BT: Tensor,
    old_logprob_BT: Tensor,
    advantage_B: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    segment_B: Tensor | None = None,
    weight_BT: Tensor | None = None,
) -> Loss:
    """PPO's token clip, as the paper has it (REINFORCE++, arXiv 2501.03262).

    The surrogate is :func:`ppo_clip`; what makes it REINFORCE++ is the advantage, whitened over the global batch (the
    estimator of the same name), with no critic and no group baseline. The paper clips symmetrically and has no dual
    clip.
    """
    return ppo_clip(
        logprob_BT,
        old_logprob_BT,
        advantage_B,
        mask_BT,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        segment_B=segment_B,
        weight_BT=weight_BT,
    )


def gspo(
    logprob_BT: Tensor,
    old_logprob_BT: Tensor,
    advantage_B: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    segment_B: Tensor | None = None,
    weight_BT: Tensor | None = None,
) -> Loss:
    """PPO's clip with ``s = exp(mean over the segment's tokens of log(pi / pi_old))`` (GSPO, arXiv 2507.18071).

    Token form: ``s_t = sg[s] * pi_t / sg[pi_t]`` has the value of ``s`` at each token and the gradient of that token
    alone, so that the mean over the sequence has the gradient of ``s``.
    """
    valid_BT = _check(logprob_BT, old_logprob_BT, advantage_B, mask_BT)
    log_ratio_BT = _difference(logprob_BT, old_logprob_BT, valid_BT)
    log_s_B = _segment_mean(log_ratio_BT.detach(), valid_BT, segment_B)
    own_BT = torch.where(valid_BT, logprob_BT, 0.0)
    log_s_BT = log_s_B[:, None] + (own_BT - own_BT.detach())
    ratio_BT = log_s_BT.clamp(max=MAX_LOG_SEQUENCE_RATIO).exp()
    return _clipped(ratio_BT, log_ratio_BT, advantage_B, valid_BT, clip_low, clip_high, dual_clip, weight_BT)


def turn(
    logprob_BT: Tensor,
    old_logprob_BT: Tensor,
    advantage_B: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    segment_B: Tensor | None = None,
    weight_BT: Tensor | None = None,
) -> Loss:
    """PPO's clip with ``r = exp(mean over the turn's tokens of log(pi / pi_old))`` (ReMA, arXiv 2503.09501).

    The gradient flows through the mean. A turn is a row: so ``segment_B`` plays no part in the ratio; it does in the
    mean that goes with this loss, "trajectory-mean". The turn's loss stands at each of its tokens.
    """
    valid_BT = _check(logprob_BT, old_logprob_BT, advantage_B, mask_BT)
    log_ratio_BT = _difference(logprob_BT, old_logprob_BT, valid_BT)
    log_r_B = _segment_mean(log_ratio_BT, valid_BT, None)
    ratio_BT = log_r_B.clamp(max=MAX_LOG_SEQUENCE_RATIO).exp()[:, None].expand_as(logprob_BT)
    return _clipped(ratio_BT, log_ratio_BT, advantage_B, valid_BT, clip_low, clip_high, dual_clip, weight_BT)


def cispo(
    logprob_BT: Tensor,
    old_logprob_BT: Tensor,
    advantage_B: Tensor,
    mask_BT: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    segment_B: Tensor | None = None,
    weight_BT: Tensor | None = None,
) -> Loss:
    """``-A sg[clip(r, 1 - low, 1 + high)] log pi``: each token keeps its gradient (CISPO, arXiv 2506.13585).

    A dual clip has nothing to bound here: the weight is at most ``1 + clip_high``. Raises ValueError if one is given.
    """
    if dual_clip is not None:
        raise ValueError("cispo clips its weight already: set dual_clip to null")
    valid_BT = _check(logprob_BT, old_logprob_BT, advantage_B, mask_BT)
    log_ratio_BT = _difference(logprob_BT, old_logprob_BT, valid_BT)
    ratio_BT = log_ratio_BT.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    trusted_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    loss_BT = -advantage_B[:, None] * trusted_BT * torch.where(valid_BT, logprob_BT, 0.0)
    clipped_BT = trusted_BT != ratio_BT
    metrics = _metrics(ratio_BT, log_ratio_BT, clipped_BT, torch.zeros_like(clipped_BT), valid_BT)
    return _weigh(loss_BT, weight_BT, valid_BT), metrics


def truncated_weights(logprob_BT: Tensor, engine_logprob_BT: Tensor, mask_BT: Tensor, cap: float) -> Tensor:
    """``min(pi_learner / pi_engine, cap)``: corrects for an engine whose log-probs are not the learner's (TIS).

    Both log-probs are of the policy that sampled. Returns constants ``[B, T]``, 1 at masked places. Raises ValueError
    where the shapes differ or the cap is not positive.
    """
    if not logprob_BT.shape == engine_logprob_BT.shape == mask_BT.shape or cap <= 0:
        raise ValueError(
            f"log-probs and mask of one shape and a positive cap are needed; got {tuple(logprob_BT.shape)}, "
            f"{tuple(engine_logprob_BT.shape)}, {tuple(mask_BT.shape)}, cap {cap}"
        )
    log_ratio_BT = _difference(logprob_BT.detach(), engine_logprob_BT.detach(), mask_BT.bool())
    return log_ratio_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp().clamp(max=cap).masked_fill(~mask_BT.bool(), 1.0)


LOSSES: dict[str, Callable[..., Loss]] = {
    "ppo_clip": ppo_clip,
    "gspo": gspo,
    "turn": turn,
    "cispo": cispo,
    "reinforce++": reinforce_pp,
}


def _check(logprob_BT: Tensor, old_logprob_BT: Tensor, advantage_B: Tensor, mask_BT: Tensor) -> Tensor:
    if logprob_BT.dim() != 2 or not logprob_BT.shape == old_logprob_BT.shape == mask_BT.shape:
        raise ValueError(
            f"log-probs and mask are [B, T]; got {tuple(logprob_BT.shape)}, {tuple(old_logprob_BT.shape)}, "
            f"{tuple(mask_BT.shape)}"
        )
    if advantage_B.shape != logprob_BT.shape[:1]:
        raise ValueError(f"advantage is [B] = [{logprob_BT.shape[0]}]; got {tuple(advantage_B.shape)}")
    return mask_BT.bool()


def _difference(logprob_BT: Tensor, old_logprob_BT: Tensor, valid_BT: Tensor) -> Tensor:
    """log ratio, 0 at masked places. Each side is masked before the subtraction, so that -inf there has no gradient."""
    return torch.where(valid_BT, logprob_BT, 0.0) - torch.where(valid_BT, old_logprob_BT.detach(), 0.0)


def _segment_mean(values_BT: Tensor, valid_BT: Tensor, segment_B: Tensor | None) -> Tensor:
    """Mean over the valid tokens of each row's segment, ``[B]``; 0 for a segment without tokens."""
    sum_B, count_B = values_BT.sum(dim=1), valid_BT.sum(dim=1)
    if segment_B is None:
        return sum_B / count_B.clamp(min=1)
    if segment_B.shape != sum_B.shape:
        raise ValueError(f"segment is [B] = {tuple(sum_B.shape)}; got {tuple(segment_B.shape)}")
    unique_G, index_B = torch.unique(segment_B, return_inverse=True)
    sum_G = sum_B.new_zeros(unique_G.numel()).index_add_(0, index_B, sum_B)
    count_G = count_B.new_zeros(unique_G.numel()).index_add_(0, index_B, count_B)
    return (sum_G / count_G.clamp(min=1))[index_B]


def _clipped(
    ratio_BT: Tensor,
    log_ratio_BT: Tensor,
    advantage_B: Tensor,
    valid_BT: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    weight_BT: Tensor | None,
) -> Loss:
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip bounds the ratio from above and must be over 1; got {dual_clip}")
    advantage_B1 = advantage_B.detach().to(ratio_BT.dtype)[:, None]
    free_BT = -advantage_B1 * ratio_BT
    trusted_BT = -advantage_B1 * ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    loss_BT = torch.maximum(free_BT, trusted_BT)
    clipped_BT = trusted_BT > free_BT
    bounded_BT = torch.zeros_like(clipped_BT)
    if dual_clip is not None:
        bound_B1 = -advantage_B1 * dual_clip
        bounded_BT = (advantage_B1 < 0) & (loss_BT > bound_B1)
        loss_BT = torch.where(advantage_B1 < 0, torch.minimum(loss_BT, bound_B1), loss_BT)
    metrics = _metrics(ratio_BT, log_ratio_BT, clipped_BT, bounded_BT, valid_BT)
    return _weigh(loss_BT, weight_BT, valid_BT), metrics


def _weigh(loss_BT: Tensor, weight_BT: Tensor | None, valid_BT: Tensor) -> Tensor:
    if weight_BT is not None:
        if weight_BT.shape != loss_BT.shape:
            raise ValueError(f"weight is [B, T] = {tuple(loss_BT.shape)}; got {tuple(weight_BT.shape)}")
        loss_BT = loss_BT * weight_BT.detach()
    return torch.where(valid_BT, loss_BT, 0.0)


def _metrics(
    ratio_BT: Tensor, log_ratio_BT: Tensor, clipped_BT: Tensor, bounded_BT: Tensor, valid_BT: Tensor
) -> dict[str, Tensor]:
    with torch.no_grad():
        tokens = valid_BT.sum()
        mean = {
            "ratio_mean": ratio_BT,
            "approx_kl": -log_ratio_BT,
            "clip_frac": clipped_BT.to(ratio_BT.dtype),
            "dual_clip_frac": bounded_BT.to(ratio_BT.dtype),
        }
        found = {k: torch.where(valid_BT, v, 0.0).sum() / tokens.clamp(min=1) for k, v in mean.items()}
        highest = torch.where(valid_BT, ratio_BT, 0.0).amax() if ratio_BT.numel() else ratio_BT.new_zeros(())
        return {"tokens": tokens, "ratio_max": highest, **found}
