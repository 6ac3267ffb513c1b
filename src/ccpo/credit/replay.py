"""Replay credit: keep the context in which an agent spoke, let it speak several times, and play the rest for each.

Why it exists: it is the rival of removal (C3, arXiv 2603.06859). Removal asks what the team would have got without the agent, which is a
situation that never occurs; replay asks what it would have got had the agent said something else, in the situation that did occur.
Each text is paid the mean reward of its plays minus that of its siblings, leaving itself out::

    credit[text] = mean of R over the plays of the text  -  mean over its siblings of the same

It needs rollouts that share what was said before: ``rollout.branch``, N x M for Thinker → Solver. The credit is its own baseline, so
the estimator is ``none``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ccpo.credit.base import Memoryless, State, check_rewards, mean_credit, turn_places
from ccpo.credit.nested import node_values, sibling_mean, spread_out
from ccpo.errors import UserError
from ccpo.types import CreditInputs, CreditOutputs


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayCredit(Memoryless):
    """``Q[text] - mean of Q over its siblings`` with ``Q`` the mean reward of a text's plays; ``[P, N]``, in units of reward.

    Raises UserError where a trained agent's turn has no siblings in the tree.
    """

    pairing: ClassVar[str | None] = None
    estimator: ClassVar[str] = "none"

    def __call__(self, inputs: CreditInputs, state: Mapping[str, Any]) -> tuple[CreditOutputs, State]:
        check_rewards(inputs)
        credit, turn_credit = {}, {}
        for agent in inputs.active:
            for turn, place in turn_places(inputs, agent).items():
                if place.siblings < 2:
                    raise UserError(
                        f"credit 'replay' compares texts of one context, and turn {turn!r} has one text a context; set "
                        "rollout.branch to at least two at each level of the graph, such as [4, 2] with rollout.samples: 8"
                    )
                value_PCS = node_values(inputs.reward_PN, place)
                turn_credit[turn] = spread_out(value_PCS - sibling_mean(value_PCS), place)
            own = [turn_credit[turn] for turn in turn_places(inputs, agent)]
            credit[agent] = sum(own) / len(own)
        return CreditOutputs(credit=credit, turn_credit=turn_credit, metrics=mean_credit(credit)), dict(state)
