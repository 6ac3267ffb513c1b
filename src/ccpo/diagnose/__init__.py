"""Probes: what a team's gradients, credits and messages look like on a real model, measured and not assumed."""

from __future__ import annotations

from ccpo.diagnose.contenders import Contender
from ccpo.diagnose.subject import Subject
from ccpo.diagnose.variance import Effort, probe_variance

__all__ = ["Contender", "Effort", "Subject", "probe_variance"]
