"""Losses: from advantages to one number to minimise. Pure functions of tensors.

``LOSSES[kind]`` gives a loss per token, ``AGGREGATES[kind]`` averages it with the :class:`Denominators` of the whole
mini-batch, and ``KLS[kind]`` estimates the divergence from a reference per token.
"""

from __future__ import annotations

from ccpo.losses.aggregate import AGGREGATES, Denominators, denominators
from ccpo.losses.kl import KLS
from ccpo.losses.policy import LOSSES, truncated_weights

__all__ = ["AGGREGATES", "KLS", "LOSSES", "Denominators", "denominators", "truncated_weights"]
