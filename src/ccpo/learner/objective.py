"""What an update minimises: the policy loss, the divergence from a reference and the entropy, under one mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ccpo.errors import UserError, nearest
from ccpo.learner.rows import MicroBatch
from ccpo.losses import AGGREGATES, KLS, LOSSES, Denominators, truncated_weights

OLD_LOGPROBS = ("auto", "engine", "learner")
RATIO_OVER = ("agent", "turn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """``mean(policy loss + kl_coef * KL - entropy_coef * H)`` by ``aggregate``; the parts are in :mod:`ccpo.losses`.

    ``ratio_over``: a sequence ratio spans all turns of an agent in a rollout ("agent") or each alone ("turn").
    ``importance_cap``: the policy loss is weighted by ``min(pi_learner / pi_engine, cap)``. ``old_logprobs``: whose
    log-probs are the ratio's denominator. Raises UserError for unknown names and settings that contradict each other.
    """

    loss: str = "ppo_clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    aggregate: str = "token-mean"
    constant: float | None = None
    ratio_over: str = "agent"
    kl: str = "none"
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    importance_cap: float | None = None
    old_logprobs: str = "auto"

    def __post_init__(self) -> None:
        for key, value, known in (
            ("kind", self.loss, LOSSES),
            ("aggregate", self.aggregate, AGGREGATES),
            ("kl", self.kl, ("none", *KLS)),
            ("old_logprobs", self.old_logprobs, OLD_LOGPROBS),
            ("ratio_over", self.ratio_over, RATIO_OVER),
        ):
            if value not in known:
                raise UserError(f"loss.{key} is {value!r}; it is one of {', '.join(known)}.{nearest(value, known)}")
        if self.aggregate == "constant" and self.constant is None:
            raise UserError("loss.aggregate is 'constant', which needs loss.constant, the divisor.")
        if self.kl == "none" and self.kl_coef:
            raise UserError("loss.kl_coef is set, but loss.kl is 'none'; set loss.kl to k1, k2 or k3.")
        if self.loss == "cispo" and self.dual_clip is not None:
            raise UserError("loss.dual_clip has nothing to bound under loss.kind 'cispo'; remove it.")
        if self.old_logprobs == "engine" and self.importance_cap is not None:
            raise UserError(
                "loss.importance_cap corrects for the engine's log-probs, and with loss.old_logprobs: engine the "
                "ratio does so "
                "already; remove one of them."
            )

    @property
    def needs_reference(self) -> bool:
        return self.kl != "none" and self.kl_coef != 0

    @property
    def needs_all_rows(self) -> bool:
        """Whether a row without advantage has a gradient too."""
        return self.needs_reference or self.entropy_coef != 0

    def __call__(
        self, logprob_BT: Tensor, entropy_BT: Tensor, batch: MicroBatch, counts: Denominators
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's part of the loss, a scalar, and metrics: means over its tokens, and maxima (``*_max``).

        The old log-probs are ``batch.old_BT``, or where absent those of now, so that the ratio is 1.
        """
        old_BT = logprob_BT.detach() if batch.old_BT is None else batch.old_BT
        weight_BT = None
        if self.importance_cap is not None:
            weight_BT = truncated_weights(old_BT, batch.engine_BT, batch.mask_BT, self.importance_cap)
        loss_BT, metrics = LOSSES[self.loss](
            logprob_BT,
            old_BT,
            batch.advantage_B,
            batch.mask_BT,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            dual_clip=self.dual_clip,
            segment_B=batch.segment_B if self.ratio_over == "agent" else None,
            weight_BT=weight_BT,
        )
        metrics |= {"entropy": _mean(entropy_BT, batch.mask_BT)}
        if weight_BT is not None:
            metrics |= {"importance_weight": _mean(weight_BT, batch.mask_BT)}
        if batch.ref_BT is not None:
            kl_BT = KLS[self.kl](logprob_BT, batch.ref_BT)
            metrics |= {"kl": _mean(kl_BT, batch.mask_BT)}
            loss_BT = loss_BT + self.kl_coef * kl_BT
        if self.entropy_coef:
            loss_BT = loss_BT - self.entropy_coef * entropy_BT
        loss = AGGREGATES[self.aggregate](loss_BT, batch.mask_BT, counts, batch.segment_B)
        return loss, metrics


def mismatch(learner_BT: Tensor, engine_BT: Tensor, mask_BT: Tensor) -> dict[str, Tensor]:
    """How far the engine's log-probs are from the learner's for the same weights and tokens.

    With ``d = log pi_learner - log pi_engine``: mean and maximum of ``|d|``, mean of the ratio ``exp(d)``, and
    ``k3 = mean(exp(d) - 1 - d)``, an estimate of ``KL(engine || learner)`` that is never negative.
    """
    d_BT = torch.where(mask_BT, learner_BT.detach() - engine_BT, 0.0)
    excess_BT = torch.expm1(d_BT.clamp(max=20.0))
    return {
        "mismatch_mean": _mean(d_BT.abs(), mask_BT),
        "mismatch_max": d_BT.abs().max(),
        "mismatch_ratio": _mean(excess_BT, mask_BT) + 1.0,
        "mismatch_k3": _mean(excess_BT - d_BT, mask_BT),
    }


def _mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return torch.where(mask_BT, values_BT.detach(), 0.0).sum() / mask_BT.sum().clamp(min=1)
