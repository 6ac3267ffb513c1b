"""Metrics of a step, gathered on the device and read once at its end."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ccpo.comm import Comm


class Meters:
    """Per agent: sums, maxima, and means weighted by tokens, under ``actor/AGENT/NAME``."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._means: dict[str, list[tuple[Tensor, float]]] = {}
        self._maxima: dict[str, list[Tensor]] = {}

    def add(self, agent: str, name: str, value: float) -> None:
        """Add to a sum."""
        key = f"actor/{agent}/{name}"
        self._sums[key] = self._sums.get(key, 0.0) + value

    def mean(self, agent: str, name: str, value: Tensor | float, weight: float = 1.0) -> None:
        """Give a mean one more value."""
        scalar = value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        self._means.setdefault(f"actor/{agent}/{name}", []).append((scalar, weight))

    def tokens(self, agent: str, metrics: Mapping[str, Tensor], tokens: int) -> None:
        """Means over ``tokens`` tokens, or maxima where the name ends in ``_max``."""
        for name, value in metrics.items():
            if name.endswith("_max"):
                self._maxima.setdefault(f"actor/{agent}/{name}", []).append(value.detach())
            else:
                self.mean(agent, name, value, tokens)

    def read(self, comm: Comm | None = None) -> dict[str, float]:
        """All of them as plain numbers. Means and maxima are over all ranks; sums are those of all ranks already."""
        means = [(key, value, weight) for key, entries in self._means.items() for value, weight in entries]
        numbers = _numbers([value for _, value, _ in means])
        sums: dict[str, float] = {}
        weights: dict[str, float] = {}
        for (key, _, weight), number in zip(means, numbers, strict=True):
            sums[key] = sums.get(key, 0.0) + number * weight
            weights[key] = weights.get(key, 0.0) + weight
        highest = dict(
            zip(self._maxima, _numbers([torch.stack(values).max() for values in self._maxima.values()]), strict=True)
        )
        every = [(sums, weights, highest)] if comm is None else comm.gather_plain((sums, weights, highest))
        total = {key: sum(s.get(key, 0.0) for s, _, _ in every) for s, _, _ in every for key in s}
        weight = {key: sum(w.get(key, 0.0) for _, w, _ in every) for key in total}
        most = {key: max(h[key] for _, _, h in every if key in h) for _, _, h in every for key in h}
        return dict(sorted((self._sums | {key: v / weight[key] for key, v in total.items()} | most).items()))


def _numbers(values: list[Tensor]) -> list[float]:
    """Values of scalars in one look, since a look makes the host wait for the device."""
    device = next((v.device for v in values if v.device.type != "cpu"), torch.device("cpu"))
    return torch.stack([v.to(device, torch.float64) for v in values]).tolist() if values else []
