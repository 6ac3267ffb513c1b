"""Process rewards: what a task says of a turn itself, beside what the team's answer earned.

A task that can judge a step (a scratchpad, a tool call, a plan) may score any turn. By default the score joins the turn's credit,
less the mean score of the problem's other texts for that turn, so that it bends no baseline and suits every estimator::

    credit[turn] + weight * (process[turn] - mean of process over the other texts)

A rule that knows better has a method ``join_process(outputs, inputs, weight) -> CreditOutputs`` of its own.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ccpo.credit.base import turn_places
from ccpo.credit.nested import node_values, spread_out
from ccpo.types import CreditInputs, CreditOutputs, TreePlace


def join_process(outputs: CreditOutputs, inputs: CreditInputs, weight: float) -> CreditOutputs:
    """Outputs with ``weight`` times the centred process rewards added to the credit of the turns that have them.

    Raises ValueError where a process reward is not ``[P, N]``.
    """
    turn_credit = dict(outputs.turn_credit)
    for agent, credit_PN in outputs.credit.items():
        for turn, place in turn_places(inputs, agent).items():
            process_PN = inputs.process.get(turn)
            if process_PN is None:
                continue
            if process_PN.shape != credit_PN.shape:
                raise ValueError(
                    f"process rewards of turn {turn!r} are [P, N] = {tuple(credit_PN.shape)}; got {tuple(process_PN.shape)}"
                )
            base_PN = turn_credit.get(turn, credit_PN)
            turn_credit[turn] = base_PN + weight * centred(process_PN.to(base_PN), place)
    means = {
        f"credit/{agent}/process": inputs.process[turn].double().mean().item()
        for agent in outputs.credit
        for turn in turn_places(inputs, agent)
        if turn in inputs.process
    }
    return replace(outputs, turn_credit=turn_credit, metrics={**outputs.metrics, **means})


def centred(process_PN: Tensor, place: TreePlace) -> Tensor:
    """Each text's process reward less the mean over the problem's other texts of the turn, ``[P, N]``; 0 for an only text."""
    value_PCS = node_values(process_PN, place)
    texts = place.contexts * place.siblings
    if texts < 2:
        return process_PN * 0
    total_P11 = value_PCS.sum((1, 2), keepdim=True)
    return spread_out(value_PCS - (total_P11 - value_PCS) / (texts - 1), place)
