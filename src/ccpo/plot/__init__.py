"""Figures of runs for papers: ``ccpo plot``."""

from __future__ import annotations

from ccpo.plot.command import KINDS, plot

__all__ = ["KINDS", "plot"]
