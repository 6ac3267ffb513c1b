"""Credit: who in the team earned the reward. Pure functions of tensors; start with :mod:`ccpo.credit.removal`.

``RULES`` maps a recipe's ``credit.kind`` to a rule, ``ESTIMATORS`` its ``advantage`` to a function.
"""

from __future__ import annotations

from ccpo.credit.advantage import ESTIMATORS
from ccpo.credit.auto import AutoCredit
from ccpo.credit.base import CreditRule, State, needed
from ccpo.credit.ccpo_v1 import CCPOv1
from ccpo.credit.ccpo_v2 import CCPOv2
from ccpo.credit.history import Ema
from ccpo.credit.own import OwnCorrectness
from ccpo.credit.process import join_process
from ccpo.credit.removal import Pairing, has_spread, marginal, paired_or_mean
from ccpo.credit.removal_rule import RemovalCredit
from ccpo.credit.replay import ReplayCredit
from ccpo.credit.self_eval import SelfEval
from ccpo.credit.shapley import Shapley
from ccpo.credit.shared import SharedReward
from ccpo.credit.telemetry import telemetry

RULES: dict[str, type] = {
    "auto": AutoCredit,
    "ccpo_v1": CCPOv1,
    "ccpo_v2": CCPOv2,
    "shared": SharedReward,
    "removal": RemovalCredit,
    "own": OwnCorrectness,
    "replay": ReplayCredit,
    "shapley": Shapley,
    "sepo": SelfEval,
}

__all__ = [
    "ESTIMATORS",
    "RULES",
    "AutoCredit",
    "CCPOv1",
    "CCPOv2",
    "CreditRule",
    "Ema",
    "OwnCorrectness",
    "Pairing",
    "RemovalCredit",
    "ReplayCredit",
    "SelfEval",
    "Shapley",
    "SharedReward",
    "State",
    "has_spread",
    "join_process",
    "marginal",
    "needed",
    "paired_or_mean",
    "telemetry",
]
