"""Estimators of the KL divergence from the policy to a reference, per token (Schulman, "Approximating KL divergence").

With ``d = log pi - log ref`` at the sampled token: ``k1 = d`` (unbiased, may be negative), ``k2 = d^2 / 2`` (biased,
the gradient of the true KL on policy), ``k3 = exp(-d) - 1 + d`` (unbiased, never negative). ``abs = |d|``. ``kl``,
``mse`` and ``low_var_kl`` are other trainers' names for k1, k2 and k3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def k1(logprob_BT: Tensor, ref_BT: Tensor) -> Tensor:
    """``log pi - log ref``, in nats; ``[B, T]``. Raises ValueError where the shapes differ."""
    if logprob_BT.shape != ref_BT.shape:
        raise ValueError(f"log-probs of one shape are needed; got {tuple(logprob_BT.shape)}, {tuple(ref_BT.shape)}")
    return logprob_BT - ref_BT


def k2(logprob_BT: Tensor, ref_BT: Tensor) -> Tensor:
    """``(log pi - log ref)^2 / 2``, in nats squared; ``[B, T]``."""
    return 0.5 * k1(logprob_BT, ref_BT).square()


def k3(logprob_BT: Tensor, ref_BT: Tensor) -> Tensor:
    """``exp(-d) - 1 + d`` with ``d = log pi - log ref``, in nats; ``[B, T]``.

    ``d`` is held within +-20 and the result within +-10, as verl does: one token that the reference finds impossible
    must not outweigh the batch.
    """
    d_BT = k1(logprob_BT, ref_BT).clamp(-20.0, 20.0)
    # expm1: exp(-d) - 1 would lose all digits where the policies agree
    return (torch.expm1(-d_BT) + d_BT).clamp(-10.0, 10.0)


def absolute(logprob_BT: Tensor, ref_BT: Tensor) -> Tensor:
    """``|log pi - log ref|``, in nats; ``[B, T]``."""
    return k1(logprob_BT, ref_BT).abs()


KLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "abs": absolute,
    "kl": k1,
    "mse": k2,
    "low_var_kl": k3,
}
