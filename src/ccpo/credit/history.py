"""Global history: a signal is measured against what it was in earlier batches, not against its own group.

Counterfactual credit, arXiv 2603.21563, Eq. 2-4. Per agent and signal, over optimiser batches b with decay ``lambda``::

    mu  <- lambda * mu  + (1 - lambda) * mean_b          z = (x - mu) / (sigma + eps)
    var <- lambda * var + (1 - lambda) * var_b           sigma = sqrt(var), 1 where var <= eps

``var_b`` is the population variance within the batch. The first batch initialises both. A batch is normalised with
the statistics from *before* it and folded in afterwards; until ``min_samples`` values have been seen it passes
through. Statistics are 64-bit Python numbers, carry no gradient, and belong to the global batch where there are
several processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ccpo.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Ema:
    """The history of one signal: moving ``mean`` and ``var`` in the signal's unit (squared), the ``count`` of values
    seen and the number of batches (``updates``). A new one has mean 0 and, by the rule for a vanishing variance,
    sigma 1."""

    mean: float = 0.0
    var: float = 0.0
    count: int = 0
    updates: int = 0

    def to_json(self) -> dict[str, float]:
        """A plain dict; a JSON round trip gives the same numbers bit for bit."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Ema:
        """The inverse of :meth:`to_json`. Raises UserError for anything else: a checkpoint is not trusted."""
        if not isinstance(data, Mapping) or set(data) != {"mean", "var", "count", "updates"}:
            raise UserError(f"a history has mean, var, count and updates; found {data!r}. The checkpoint is damaged")
        numbers = [data["mean"], data["var"], data["count"], data["updates"]]
        if any(isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x) for x in numbers):
            raise UserError(f"a history holds finite numbers; found {data!r}. The checkpoint is damaged")
        if data["var"] < 0 or any(n < 0 or n != int(n) for n in numbers[2:]):
            raise UserError(f"a history's var, count and updates are not negative, counts whole; found {data!r}")
        return cls(
            mean=float(data["mean"]), var=float(data["var"]), count=int(data["count"]), updates=int(data["updates"])
        )


def fold(ema: Ema, values: Tensor, decay: float) -> Ema:
    """The history after one more batch (arXiv 2603.21563, Eq. 2-3). ``values``: any shape, of the global batch.

    Raises ValueError for an empty or non-finite batch: one such value would stay in the history for good.
    """
    values64 = values.detach().double()
    if values64.numel() == 0:
        raise ValueError("a history cannot fold an empty batch")
    batch_mean = values64.mean().item()
    batch_var = values64.var(correction=0).item()
    if not (math.isfinite(batch_mean) and math.isfinite(batch_var)):
        raise ValueError(f"a history cannot fold non-finite values (mean {batch_mean}, var {batch_var})")
    keep = decay if ema.updates else 0.0
    return Ema(
        mean=keep * ema.mean + (1 - keep) * batch_mean,
        var=keep * ema.var + (1 - keep) * batch_var,
        count=ema.count + values64.numel(),
        updates=ema.updates + 1,
    )


def sigma(ema: Ema, eps: float, floor: float = 0.0) -> float:
    """The deviation to divide by: ``sqrt(var)``, 1 where ``var <= eps``, and never below ``floor``."""
    return max(math.sqrt(ema.var) if ema.var > eps else 1.0, floor)


def is_warm(ema: Ema, min_samples: int) -> bool:
    """Whether the history has seen enough values to normalise with (and at least one batch)."""
    return ema.updates > 0 and ema.count >= min_samples


def normalise(
    values: Tensor, ema: Ema, *, eps: float, min_samples: int, floor: float = 0.0, center: bool = False
) -> Tensor:
    """``z = (x - mu) / (sigma + eps)`` with the statistics from before the batch (arXiv 2603.21563, Eq. 4).

    Returns ``values`` unchanged until the history is warm. ``center`` subtracts the batch's own mean in the place of
    ``mu``, which lags behind a team that learns fast. Any shape; z has no unit.
    """
    if not is_warm(ema, min_samples):
        return values
    mu = values.detach().double().mean().item() if center else ema.mean
    return (values - mu) / (sigma(ema, eps, floor) + eps)


def trust(ema: Ema, *, eta: float, eps: float, floor: float = 0.0) -> float:
    """The gate ``g = sigmoid(eta * mu / (sigma + eps))`` in (0, 1): 1/2 where the others' help is nil on average."""
    # sigmoid written with tanh: exp would overflow where mu is many sigmas below 0
    return 0.5 + 0.5 * math.tanh(0.5 * eta * ema.mean / (sigma(ema, eps, floor) + eps))
