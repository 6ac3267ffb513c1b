"""Alarms: what is going wrong in a run, in words, with what to try. Computed from windows of steps, so that noise raises none."""

from __future__ import annotations

from ccpo.alarms.base import Alarm, Moments, Shape, View
from ccpo.alarms.find import find_alarms
from ccpo.alarms.findings import ALARMS
from ccpo.alarms.watch import Watch

__all__ = ["ALARMS", "Alarm", "Moments", "Shape", "View", "Watch", "find_alarms"]
