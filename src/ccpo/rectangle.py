"""Tokens of several texts, which lie in one run, as the rectangle that attention needs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Rectangle:
    """A rectangle of ``rows`` x ``columns`` tokens. ``place_S``: where each token of the run stands in the flattened rectangle; None where
    they fill it."""

    rows: int
    columns: int
    place_S: Tensor | None

    @classmethod
    def of(cls, real_RC: Tensor) -> Rectangle:
        """The rectangle whose tokens, row by row, stand where it is true."""
        rows, columns = real_RC.shape
        return cls(rows=rows, columns=columns, place_S=None if real_RC.all() else real_RC.flatten().nonzero()[:, 0])

    def to(self, device: torch.device) -> Rectangle:
        return self if self.place_S is None else replace(self, place_S=self.place_S.to(device))

    @property
    def size(self) -> int:
        """Tokens that are no padding."""
        return self.rows * self.columns if self.place_S is None else len(self.place_S)

    def spread(self, x_SHD: Tensor) -> Tensor:
        """From the run to the rectangle, heads first: ``[rows, H, columns, D]``; padding is 0."""
        if self.place_S is not None:
            room = x_SHD.new_zeros(self.rows * self.columns, *x_SHD.shape[1:])
            x_SHD = room.index_copy_(0, self.place_S, x_SHD)
        return x_SHD.unflatten(0, (self.rows, self.columns)).transpose(1, 2)

    def gather(self, x_RHCD: Tensor) -> Tensor:
        """Back from the rectangle to the run, ``[S, H, D]``."""
        x_SHD = x_RHCD.transpose(1, 2).flatten(0, 1)
        return x_SHD if self.place_S is None else x_SHD[self.place_S]
