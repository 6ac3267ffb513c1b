"""Credit rules: hand-derived numbers, what each rule needs, invariants, and the sentences for mistakes."""

from __future__ import annotations

import copy
import doctest
import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ccpo.credit import RULES, CCPOv1, CCPOv2, Ema, OwnCorrectness, RemovalCredit, SharedReward, has_spread, removal
from ccpo.credit.advantage import ESTIMATORS
from ccpo.credit.removal import marginal, paired_or_mean
from ccpo.credit.telemetry import correlation, telemetry
from ccpo.errors import UserError
from ccpo.types import Coalition, CreditInputs, CreditOutputs

torch.set_num_threads(1)
THINKER: Coalition = ("thinker",)
VOTERS = ("a", "b", "c")
bits = st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=3, max_size=3), min_size=2, max_size=4)


def t(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def think_solve(
    reward: Any, solo: Any = None, active: tuple[str, ...] = ("thinker", "solver"), **more: Any
) -> CreditInputs:
    """Solo rewards ``[P, M]`` that belong to the problem."""
    without = {} if solo is None else {THINKER: t(solo)[:, None, :]}
    return CreditInputs(
        agents=("thinker", "solver"), decider="solver", active=active, reward_PN=t(reward), without=without, **more
    )


def vote(reward: Any, without: Mapping[str, Any], active: tuple[str, ...] = VOTERS, **more: Any) -> CreditInputs:
    """Recounts ``[P, N]`` per voter, one for each rollout."""
    recounts = {(agent,): t(values)[:, :, None] for agent, values in without.items()}
    return CreditInputs(agents=VOTERS, decider=None, active=active, reward_PN=t(reward), without=recounts, **more)


def ema(mean: float, var: float, count: int = 100, updates: int = 1) -> dict[str, float]:
    return Ema(mean=mean, var=var, count=count, updates=updates).to_json()


def warm(delta: tuple[float, float], joint: tuple[float, float], solo: tuple[float, float]) -> dict[str, Any]:
    return {
        "thinker/delta": ema(*delta),
        "solver/delta": ema(*delta),
        "solver/joint": ema(*joint),
        "solver/solo": ema(*solo),
    }


# ---- removal


def test_removal_docstring_is_true() -> None:
    results = doctest.testmod(removal)
    assert results.attempted >= 3
    assert results.failed == 0


def test_paired_takes_the_nth_draw_of_the_problem() -> None:
    assert torch.equal(paired_or_mean(t([[[0, 1, 0.5]]]), 3, "paired"), t([[0, 1, 0.5]]))


def test_paired_takes_each_rollouts_own_draw() -> None:
    assert torch.equal(paired_or_mean(t([[[0], [1], [0.5]]]), 3, "paired"), t([[0, 1, 0.5]]))


@pytest.mark.parametrize("pairing", ["mean", "cached"])
def test_mean_over_draws(pairing: str) -> None:
    assert torch.equal(paired_or_mean(t([[[0, 1, 0.5, 0.5]]]), 3, pairing), t([[0.5, 0.5, 0.5]]))
    assert torch.equal(paired_or_mean(t([[[0, 1], [1, 1], [0, 0]]]), 3, pairing), t([[0.5, 1, 0]]))


@pytest.mark.parametrize(
    ("shape", "needed"),
    [((2, 1, 2), "3 counterfactual draw.* a problem"), ((2, 3, 3), "1 counterfactual draw.* a rollout")],
)
def test_paired_without_partners_says_what_to_set(shape: tuple[int, ...], needed: str) -> None:
    with pytest.raises(UserError, match=rf"{needed}.*rollout.draws.*'mean'"):
        paired_or_mean(torch.zeros(shape), 3, "paired")


@pytest.mark.parametrize("shape", [(2, 3), (2, 2, 1), (2, 1, 0)])
def test_draws_of_a_wrong_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="P, 1 or N, M"):
        paired_or_mean(torch.zeros(shape), 3, "mean")


def test_an_unknown_pairing_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"found 'pair'.*'paired'"):
        paired_or_mean(torch.zeros(1, 1, 1), 1, "pair")


def test_marginal_refuses_to_broadcast() -> None:
    with pytest.raises(ValueError, match="marginal"):
        marginal(torch.zeros(2, 3), torch.zeros(2, 1))


def test_has_spread() -> None:
    assert has_spread(t([[0, 0, 0], [0, 0.1, 0], [1, 1, 1]])).tolist() == [False, True, False]


# ---- simple rules


def test_removal_rule_by_hand() -> None:
    inputs = think_solve([[1, 1, 0]], [[0, 1, 0]])
    paired, _ = RemovalCredit(pairing="paired")(inputs, {})
    mean, _ = RemovalCredit()(inputs, {})
    torch.testing.assert_close(paired.credit["thinker"], t([[1, 0, 0]]))
    torch.testing.assert_close(mean.credit["thinker"], t([[2 / 3, 2 / 3, -1 / 3]]))
    torch.testing.assert_close(paired.credit["solver"], t([[1, 1, 0]]))  # without its decider a team scores 0
    assert paired.metrics["credit/thinker/mean"] == pytest.approx(1 / 3)


def test_removal_in_voting_pays_by_the_recount() -> None:
    inputs = vote([[1.0, 0.5]], {"a": [[0.5, 1]], "b": [[1, 0.5]], "c": [[1, 0]]})
    outputs, _ = RemovalCredit(pairing="paired")(inputs, {})
    assert {k: v.tolist() for k, v in outputs.credit.items()} == {
        "a": [[0.5, -0.5]],
        "b": [[0, 0]],
        "c": [[0, 0.5]],
    }


def test_shared_pays_everyone_the_reward() -> None:
    outputs, state = SharedReward()(think_solve([[1, 0.25]]), {})
    assert all(torch.equal(c, t([[1, 0.25]])) for c in outputs.credit.values())
    assert set(outputs.credit) == {"thinker", "solver"}
    assert state == {}


def test_own_pays_the_answer_where_there_is_one() -> None:
    inputs = vote([[1.0, 0.0]], {}, score={"a": t([[0, 0]]), "b": t([[1, 0.5]])})
    outputs, _ = OwnCorrectness()(inputs, {})
    assert {k: v.tolist() for k, v in outputs.credit.items()} == {"a": [[0, 0]], "b": [[1, 0.5]], "c": [[1, 0]]}
    with pytest.raises(ValueError, match="score of 'a'"):
        OwnCorrectness()(vote([[1.0, 0.0]], {}, score={"a": t([[0]])}), {})


# ---- what a rule needs


@pytest.mark.parametrize(
    ("kind", "settings", "active", "expected"),
    [
        ("shared", {}, ("thinker", "solver"), set()),
        ("own", {}, ("thinker", "solver"), set()),
        ("removal", {}, ("thinker", "solver"), {THINKER}),
        ("removal", {}, ("solver",), set()),
        ("ccpo_v2", {}, ("thinker",), {THINKER}),
        ("ccpo_v2", {}, ("solver",), set()),
        ("ccpo_v1", {}, ("thinker",), {THINKER}),
        ("ccpo_v1", {}, ("solver",), {THINKER}),
        ("ccpo_v1", {"gate": 1.0}, ("solver",), set()),
        ("ccpo_v1", {"gate": 0.5}, ("solver",), {THINKER}),
        ("ccpo_v1", {}, (), set()),
    ],
)
def test_needs_in_think_solve(
    kind: str, settings: dict[str, Any], active: tuple[str, ...], expected: set[Coalition]
) -> None:
    assert RULES[kind](**settings).needs(("thinker", "solver"), "solver", active) == expected


@pytest.mark.parametrize("kind", ["ccpo_v1", "ccpo_v2", "removal"])
def test_needs_in_voting_and_larger_teams(kind: str) -> None:
    rule = RULES[kind]()
    assert rule.needs(VOTERS, None, ("a", "c")) == {("a",), ("c",)}
    assert rule.needs(("z", "b", "y"), "b", ("z", "y")) == {("z",), ("y",)}
    alone = {("y", "z")} if kind == "ccpo_v1" else set()
    assert rule.needs(("z", "b", "y"), "b", ("b",)) == alone


RATED = {"y": t([[[0.2, 0.3, 0.5]] * 3] * 2), "z": t([[[0, 0, 1]] * 3] * 2), "b": t([[[0.6, 0.3, 0.1]] * 3] * 2)}


@pytest.mark.parametrize("kind", list(RULES))
def test_every_rule_pays_from_what_it_asked_for_and_is_pure(kind: str) -> None:
    rule, agents = RULES[kind](), ("y", "z", "b")
    for decider in (None, "b"):
        for active in (("y",), ("b",), agents):
            needed = rule.needs(agents, decider, active)
            inputs = CreditInputs(
                agents=agents,
                decider=decider,
                active=active,
                reward_PN=t([[1, 0, 1], [0, 0, 1]]),
                without={c: t([[[0, 1, 1]], [[0, 1, 0]]]) for c in needed},
                shares=RATED if getattr(rule, "rates", False) else {},
            )
            state = rule.start()
            for _ in range(3):
                kept = copy.deepcopy((inputs, state))
                outputs, after = rule(inputs, state)
                again, _ = rule(inputs, state)
                assert set(outputs.credit) == set(active)
                assert all(c.shape == (2, 3) and torch.isfinite(c).all() for c in outputs.credit.values())
                assert all(torch.equal(outputs.credit[a], again.credit[a]) for a in active)
                assert state == kept[1]
                assert torch.equal(inputs.reward_PN, kept[0].reward_PN)
                assert all(math.isfinite(m) and isinstance(m, float) for m in outputs.metrics.values())
                state = json.loads(json.dumps(after))
                assert state == after
            if needed:
                with pytest.raises(ValueError, match="needs the rewards without"):
                    rule(CreditInputs(agents=agents, decider=decider, active=active, reward_PN=inputs.reward_PN), {})


@pytest.mark.parametrize("kind", list(RULES))
@pytest.mark.parametrize("reward", [torch.zeros(3), torch.zeros(2, 2, dtype=torch.long), t([[math.nan, 1]])])
def test_bad_rewards_are_refused(kind: str, reward: Tensor) -> None:
    with pytest.raises(ValueError, match="reward_PN"):
        RULES[kind]()(CreditInputs(agents=("a",), decider="a", active=("a",), reward_PN=reward), {})


def test_counterfactuals_of_other_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="with P = 1"):
        RemovalCredit()(think_solve([[1, 0]], [[1, 0], [1, 0]]), {})


# ---- v1


def test_v1_first_batch_passes_through_and_is_folded() -> None:
    rule = CCPOv1(min_samples=0)
    outputs, state = rule(think_solve([[1, 0], [1, 1]], [[0, 0], [1, 0]]), rule.start())
    assert torch.equal(outputs.credit["thinker"], t([[1, 0], [0, 1]]))
    assert torch.equal(outputs.credit["solver"], t([[1, 0], [1, 1]]))
    assert state["thinker/delta"] == ema(0.5, 0.25, 4, 1)
    assert state["solver/joint"] == ema(0.75, 0.1875, 4, 1)
    assert state["solver/solo"] == ema(0.25, 0.1875, 4, 1)
    assert outputs.metrics["credit/solver/gate"] == 0.5


def test_v1_by_hand() -> None:
    rule = CCPOv1(alpha=2.0, eta=3.0, eps=1e-12)
    state = warm(delta=(0.25, 0.25), joint=(0.5, 0.25), solo=(0.25, 0.0625))
    outputs, _ = rule(think_solve([[1, 0]], [[0, 1]]), state)
    torch.testing.assert_close(
        outputs.credit["thinker"], t([[math.tanh(2 * (1 - 0.25) / 0.5), math.tanh(2 * (-1 - 0.25) / 0.5)]])
    )
    gate = 1 / (1 + math.exp(-3 * 0.25 / 0.5))
    torch.testing.assert_close(
        outputs.credit["solver"], t([[gate * 1 + (1 - gate) * -1, gate * -1 + (1 - gate) * 3]]), atol=1e-9, rtol=0
    )
    assert outputs.metrics["credit/solver/gate"] == pytest.approx(gate)
    assert outputs.metrics["credit/thinker/mu_delta"] == 0.25
    assert outputs.metrics["credit/thinker/sigma_delta"] == 0.5
    assert outputs.weight == {}


def test_v1_before_min_samples_logs_the_gate_but_pays_the_joint_reward() -> None:
    state = {name: data | {"count": 9} for name, data in warm((0.5, 0.25), (0.5, 0.25), (0.5, 0.25)).items()}
    outputs, _ = CCPOv1()(think_solve([[1, 0]], [[0, 0]]), state)
    assert torch.equal(outputs.credit["solver"], t([[1, 0]]))
    assert torch.equal(outputs.credit["thinker"], t([[1, 0]]))
    assert outputs.metrics["credit/solver/gate"] == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-5)


@pytest.mark.parametrize(("gate", "expected"), [(0.0, [-1.0, 3.0]), (0.5, [0.0, 1.0]), (1.0, [1.0, -1.0])])
def test_v1_fixed_gate(gate: float, expected: list[float]) -> None:
    rule = CCPOv1(gate=gate, eps=1e-12)
    state = warm(delta=(9.0, 0.25), joint=(0.5, 0.25), solo=(0.25, 0.0625))
    outputs, _ = rule(think_solve([[1, 0]], [[0, 1]]), state)
    torch.testing.assert_close(outputs.credit["solver"], t([expected]), atol=1e-9, rtol=0)
    assert outputs.metrics["credit/solver/gate"] == gate


def test_v1_gate_one_learns_its_history_without_a_solo() -> None:
    rule = CCPOv1(gate=1.0, min_samples=2, eps=1e-12)
    inputs = think_solve([[1, 0]], active=("solver",))
    _, state = rule(inputs, rule.start())
    outputs, _ = rule(inputs, state)
    torch.testing.assert_close(outputs.credit["solver"], t([[1, -1]]))


def test_v1_trajectory_gate_pays_each_answer_its_own_z() -> None:
    rule = CCPOv1(gate="trajectory", pairing="mean", eta=1.0, eps=1e-12)
    state = warm(delta=(0.5, 0.25), joint=(0.5, 0.25), solo=(0.25, 0.0625))
    outputs, after = rule(think_solve([[1, 0]], [[0, 1, 0]]), state)
    gate = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(outputs.credit["solver"], t([[1, -1]]), atol=1e-9, rtol=0)
    torch.testing.assert_close(outputs.solo_credit["solver"], t([[[-1, 3, -1]]]), atol=1e-9, rtol=0)
    assert outputs.weight == pytest.approx({"solver": gate})
    assert outputs.solo_weight == pytest.approx({"solver": 1 - gate})
    assert outputs.solo_coalition == {"solver": THINKER}
    assert after["solver/solo"]["count"] == 103  # every draw counts, as every draw is trained on


def test_v1_trajectory_gate_before_min_samples_trains_on_joint_answers_alone() -> None:
    rule = CCPOv1(gate="trajectory")
    outputs, _ = rule(think_solve([[1, 0]], [[0, 1]]), rule.start())
    assert torch.equal(outputs.credit["solver"], t([[1, 0]]))
    assert not outputs.solo_credit
    assert not outputs.weight


def test_v1_without_history_squashes_the_raw_delta() -> None:
    outputs, state = CCPOv1(history=False, gate=0.25)(think_solve([[1, 0]], [[0, 1]]), {})
    torch.testing.assert_close(outputs.credit["thinker"], t([[math.tanh(1), math.tanh(-1)]]))
    torch.testing.assert_close(outputs.credit["solver"], t([[0.25, 0.75]]))
    assert state["thinker/delta"]["updates"] == 1


def test_v1_in_voting_pays_all_by_tanh_and_shows_no_gate() -> None:
    rule = CCPOv1(eps=1e-12)
    inputs = vote([[1.0, 0.5]], {"a": [[0.5, 1]], "b": [[1, 0.5]]}, active=("a",))
    outputs, state = rule(inputs, {"a/delta": ema(0.0, 0.25)})
    torch.testing.assert_close(outputs.credit["a"], t([[math.tanh(1), math.tanh(-1)]]))
    assert set(outputs.credit) == {"a"}
    assert set(state) == {"a/delta", "b/delta"}  # an agent at rest keeps its history fresh where the recount is free
    assert not [name for name in outputs.metrics if "gate" in name]


def test_v1_with_three_agents_takes_all_others_away_from_the_decider() -> None:
    rule = CCPOv1(history=False, gate=0.0)
    inputs = CreditInputs(
        agents=("z", "boss", "y"),
        decider="boss",
        active=("boss", "z"),
        reward_PN=t([[1, 0]]),
        without={("y", "z"): t([[[0.25, 0.75]]]), ("z",): t([[[1], [1]]])},
    )
    outputs, state = rule(inputs, {})
    assert torch.equal(outputs.credit["boss"], t([[0.25, 0.75]]))
    torch.testing.assert_close(outputs.credit["z"], t([[0, math.tanh(-1)]]))
    assert state["boss/delta"]["mean"] == 0.0
    assert state["z/delta"]["mean"] == -0.5


def test_v1_team_of_one_is_paid_its_normalised_reward() -> None:
    rule = CCPOv1(eps=1e-12)
    state = {f"solo/{s}": ema(*v) for s, v in {"joint": (0.5, 0.25), "solo": (0.5, 0.25), "delta": (0, 0)}.items()}
    inputs = CreditInputs(agents=("solo",), decider="solo", active=("solo",), reward_PN=t([[1, 0]]))
    assert rule.needs(("solo",), "solo", ("solo",)) == frozenset()
    for gate in ("reward", "trajectory"):
        outputs, _ = CCPOv1(eps=1e-12, gate=gate)(inputs, state)
        torch.testing.assert_close(outputs.credit["solo"], t([[1, -1]]))


def test_v1_guard_sigma_floor() -> None:
    state = warm(delta=(0.0, 0.01), joint=(0.5, 0.25), solo=(0.25, 0.0625))
    free, _ = CCPOv1(eps=1e-12)(think_solve([[1, 0]], [[0, 0]]), state)
    held, _ = CCPOv1(eps=1e-12, sigma_floor=0.5)(think_solve([[1, 0]], [[0, 0]]), state)
    assert float(free.credit["thinker"][0, 0]) == pytest.approx(math.tanh(10))
    assert float(held.credit["thinker"][0, 0]) == pytest.approx(math.tanh(2))


def test_v1_guard_center_pays_no_right_answer_for_a_lagging_mean() -> None:
    state = warm(delta=(0.8, 0.25), joint=(0.5, 0.25), solo=(0.25, 0.0625))
    inputs = think_solve([[1, 0]], [[0, 0]])
    lagging, _ = CCPOv1(eps=1e-12)(inputs, state | {"thinker/delta": ema(1.5, 0.25)})
    centred, _ = CCPOv1(eps=1e-12, center=True)(inputs, state | {"thinker/delta": ema(1.5, 0.25)})
    assert float(lagging.credit["thinker"][0, 0]) < 0  # the fault that the guard is for
    torch.testing.assert_close(centred.credit["thinker"], t([[math.tanh(1), math.tanh(-1)]]))


@pytest.mark.parametrize("estimator", ["none", "grpo", "dr_grpo", "rloo"])
def test_v1_guard_skip_flat_leaves_no_gradient(estimator: str) -> None:
    inputs = think_solve([[1, 1], [1, 0]], [[0, 1], [0, 1]])
    state = warm(delta=(0.1, 0.25), joint=(0.5, 0.25), solo=(0.25, 0.0625))
    plain, _ = CCPOv1()(inputs, state)
    guarded, _ = CCPOv1(skip_flat=True)(inputs, state)
    groups = torch.tensor([0, 0, 1, 1])
    for agent in ("thinker", "solver"):
        before = ESTIMATORS[estimator](plain.credit[agent].flatten(), groups)
        after = ESTIMATORS[estimator](guarded.credit[agent].flatten(), groups)
        assert (before[:2] != 0).any()  # paired draws are noise where the team is always right
        assert (after[:2] == 0).all()
        assert torch.equal(after[2:], before[2:])
        assert (after[2:] != 0).any()


def test_v1_guard_skip_flat_judges_solo_answers_by_their_own_spread() -> None:
    state = warm(delta=(0.5, 0.25), joint=(0.5, 0.25), solo=(0.25, 0.0625))
    rule = CCPOv1(gate="trajectory", skip_flat=True, eps=1e-12)
    outputs, _ = rule(think_solve([[1, 1], [1, 0]], [[0, 1], [1, 1]]), state)
    torch.testing.assert_close(outputs.credit["solver"], t([[0, 0], [1, -1]]))
    torch.testing.assert_close(outputs.solo_credit["solver"], t([[[-1, 3]], [[0, 0]]]))


def test_v1_folds_joint_and_solo_from_the_same_batch_or_not_at_all() -> None:
    rule = CCPOv1()
    inputs = CreditInputs(
        agents=("y", "z", "b"), decider="b", active=("y",), reward_PN=t([[1, 0]]), without={("y",): t([[[0, 1]]])}
    )
    _, state = rule(inputs, {})
    assert set(state) == {"y/delta"}


@given(bits, bits)
def test_v1_credit_is_bounded_and_rises_with_the_joint_reward(
    joint: list[list[float]], solo: list[list[float]]
) -> None:
    size = min(len(joint), len(solo))
    rule, inputs = CCPOv1(min_samples=1), think_solve(joint[:size], solo[:size])
    _, state = rule(inputs, rule.start())
    low, _ = rule(think_solve(torch.zeros(size, 3).tolist(), solo[:size]), state)
    high, _ = rule(think_solve(torch.ones(size, 3).tolist(), solo[:size]), state)
    for agent in ("thinker", "solver"):
        assert (high.credit[agent] > low.credit[agent]).all()
    assert (high.credit["thinker"].abs() <= 1).all()


def test_the_order_of_problems_does_not_matter() -> None:
    joint, solo = [[1, 0, 1], [0, 0, 1], [1, 1, 1]], [[0, 1, 0], [1, 0, 0], [1, 1, 0]]
    rule = CCPOv1(min_samples=1)
    _, state = rule(think_solve(joint, solo), rule.start())
    straight, after = rule(think_solve(joint, solo), state)
    turned, after_turned = rule(think_solve(joint[::-1], solo[::-1]), state)
    for agent in ("thinker", "solver"):
        torch.testing.assert_close(straight.credit[agent], turned.credit[agent].flip(0))
    assert after["thinker/delta"]["mean"] == pytest.approx(after_turned["thinker/delta"]["mean"], abs=1e-15)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"pairing": "mena"}, "credit.pairing.*'mean'"),
        ({"gate": "rewards"}, "credit.gate.*'reward'"),
        ({"gate": 1.5}, "credit.gate.*from 0 to 1.*1.5"),
        ({"gate": True}, "credit.gate"),
        ({"decay": -0.1}, "credit.decay"),
        ({"decay": math.nan}, "credit.decay"),
        ({"alpha": "x"}, "credit.alpha"),
        ({"min_samples": -1}, "credit.min_samples"),
        ({"gate": "trajectory", "pairing": "cached"}, "cache keeps only their rewards"),
    ],
)
def test_v1_settings_out_of_range(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        CCPOv1(**settings)


def test_v1_refuses_a_damaged_state() -> None:
    with pytest.raises(UserError, match="checkpoint"):
        CCPOv1()(think_solve([[1, 0]], [[0, 0]]), {"thinker/delta": {"mean": 0}})


# ---- v2


def test_v2_event_bonus_by_hand() -> None:
    # solo mean 1/4: right is saved; solo mean 3/4: wrong is spoiled; solo mean 1/2: no event
    inputs = think_solve([[1, 0]] * 3, [[0, 0, 0, 1], [1, 1, 1, 0], [1, 1, 0, 0]])
    outputs, _ = CCPOv2()(inputs, {})
    torch.testing.assert_close(outputs.credit["thinker"], t([[1.2, -1], [1, -1.2], [1, -1]]))
    torch.testing.assert_close(outputs.credit["solver"], t([[1, -1]] * 3))
    assert outputs.metrics["credit/thinker/bonus"] == pytest.approx(0.0, abs=1e-12)


def test_v2_difference_bonus_by_hand() -> None:
    outputs, _ = CCPOv2(bonus="difference", weight=0.4)(think_solve([[1, 0]], [[0, 0, 0, 1]]), {})
    torch.testing.assert_close(outputs.credit["thinker"], t([[1 + 0.4 * 0.75, -1 - 0.4 * 0.25]]))


def test_v2_paired_meets_draw_by_draw() -> None:
    outputs, _ = CCPOv2(solo="paired")(think_solve([[1, 1, 0, 0]], [[0, 1, 0, 1]]), {})
    torch.testing.assert_close(outputs.credit["thinker"], t([[1.2, 1, -1, -1.2]]))


def test_v2_auto_takes_the_difference_once_partial_credit_was_seen() -> None:
    rule, binary = CCPOv2(), think_solve([[1, 0]], [[0, 0, 0, 1]])
    first, state = rule(binary, rule.start())
    assert float(first.credit["thinker"][0, 0]) == pytest.approx(1.2)
    partial, state = rule(think_solve([[0.75, 0]], [[0, 0, 0, 1]]), state)
    assert float(partial.credit["thinker"][0, 0]) == pytest.approx(0.5 + 0.2 * 0.5)
    after, _ = rule(binary, state)
    assert float(after.credit["thinker"][0, 0]) == pytest.approx(1 + 0.2 * 0.75)


def test_v2_voters_all_get_the_bonus() -> None:
    outputs, _ = CCPOv2(bonus="event")(vote([[1.0]], {"a": [[0.0]], "b": [[1.0]], "c": [[0.5]]}), {})
    assert {k: round(v.item(), 9) for k, v in outputs.credit.items()} == {"a": 1.2, "b": 1.0, "c": 1.0}


@pytest.mark.parametrize("settings", [{"solo": "median"}, {"bonus": "events"}, {"weight": -1}])
def test_v2_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="credit"):
        CCPOv2(**settings)


@pytest.mark.parametrize(("kind", "pairing"), [("ccpo_v1", "paired"), ("ccpo_v2", "mean"), ("removal", "mean")])
def test_rules_say_how_they_pair(kind: str, pairing: str) -> None:
    assert RULES[kind]().pairing == pairing
    assert RULES["shared"]().pairing is None
    assert RULES["own"]().pairing is None


# ---- telemetry


def test_telemetry_by_hand() -> None:
    inputs = think_solve([[1, 0], [1, 1]], [[0, 0], [1, 1]])
    outputs = CreditOutputs(credit={"thinker": t([[1, 0], [0, 0]]), "solver": t([[-2, 0], [-1, 0]])})
    found = telemetry(inputs, outputs)
    assert found["credit/thinker/mean"] == 0.25
    assert found["credit/thinker/share"] == 0.25
    assert found["credit/solver/share"] == 0.75
    rates = [found[f"credit/thinker/{k}"] for k in ("helped", "hurt", "no_effect")]
    assert rates == [0.25, 0.0, 0.75]
    assert [found[f"credit/solver/{k}"] for k in ("helped", "hurt", "no_effect")] == [0.75, 0.0, 0.25]
    assert found["credit/thinker/no_signal"] == 0.5
    assert found["credit/solver/no_signal"] == 0.0
    assert "credit/thinker/shared_corr" not in found


def test_telemetry_sees_that_a_counterfactual_was_cancelled() -> None:
    inputs = think_solve([[1, 0, 0], [1, 1, 0]], [[0, 0, 1], [1, 1, 0]])
    groups = torch.arange(2).repeat_interleave(3)
    shared = {a: ESTIMATORS["grpo"](inputs.reward_PN.flatten(), groups).view(2, 3) for a in ("thinker", "solver")}
    for solo, same in (("mean", 1.0), ("paired", 0.0)):
        outputs, _ = CCPOv2(solo=solo)(inputs, {})
        paid = {a: ESTIMATORS["grpo"](c.flatten(), groups).view(2, 3) for a, c in outputs.credit.items()}
        found = telemetry(inputs, outputs, paid, shared)
        assert found["credit/thinker/same_as_shared"] == same
        assert found["credit/solver/same_as_shared"] == 1.0
        assert 0.5 < found["credit/thinker/shared_corr"] <= 1.0


def test_telemetry_leaves_out_what_it_cannot_tell() -> None:
    flat = t([[1.0, 1.0]])
    outputs = CreditOutputs(credit={"thinker": flat * 0})
    found = telemetry(think_solve([[1, 1]]), outputs, {"thinker": flat * 0}, {"thinker": flat})
    assert found == {"credit/thinker/mean": 0.0, "credit/thinker/share": 0.0, "credit/thinker/no_signal": 1.0}


def test_correlation() -> None:
    assert correlation(t([0, 1, 2]), t([5, 3, 1])) == pytest.approx(-1)
    assert correlation(t([1, 0, 0, 1]), t([1, 0, 1, 0])) == pytest.approx(0)
    assert correlation(t([0, 1e-200]), t([0, 1e200])) == pytest.approx(1)
    assert correlation(t([1, 1]), t([0, 1])) is None
    assert correlation(t([]), t([])) is None
    with pytest.raises(ValueError, match="one shape"):
        correlation(t([0, 1]), t([0, 1, 2]))
