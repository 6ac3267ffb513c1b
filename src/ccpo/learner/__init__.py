"""The learner: policies and their weights, the update, and checkpoints."""

from __future__ import annotations

from ccpo.learner.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    verify_checkpoint,
)
from ccpo.learner.policies import Policy, PolicySpec, Reference, freeze_copy, load_policies
from ccpo.learner.rows import TrainRow
from ccpo.learner.update import Learner, UpdateStats

__all__ = [
    "Learner",
    "Policy",
    "PolicySpec",
    "Reference",
    "TrainRow",
    "UpdateStats",
    "find_checkpoint",
    "freeze_copy",
    "list_checkpoints",
    "load_checkpoint",
    "load_policies",
    "save_checkpoint",
    "verify_checkpoint",
]
