"""Shapley values: the four properties, known games, hand-derived teams, permutations against all coalitions."""

from __future__ import annotations

import doctest
import itertools
import json
import math
import time
from collections.abc import Callable
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ccpo.credit import Shapley, needed, shapley
from ccpo.credit.shapley import coalitions, draw_orders, passed_through, shapley_exact, shapley_permutations
from ccpo.errors import UserError
from ccpo.types import Coalition, CreditInputs

torch.set_num_threads(1)
ABC = ("a", "b", "c")
seeds = st.integers(0, 2**30)
sizes = st.integers(1, 5)

Game = dict[Coalition, Tensor]
"""The reward ``[P, N]`` without each coalition."""


def subsets(agents: tuple[str, ...]) -> list[Coalition]:
    return [c for size in range(len(agents) + 1) for c in itertools.combinations(sorted(agents), size)]


def game(agents: tuple[str, ...], worth: Callable[[frozenset[str]], float]) -> Game:
    """One rollout; ``worth`` of the agents that are there."""
    return {c: torch.tensor([[worth(frozenset(agents) - set(c))]], dtype=torch.float64) for c in subsets(agents)}


def random_game(agents: tuple[str, ...], seed: int, nobody: float = 0.0) -> Game:
    generator = torch.Generator().manual_seed(seed)
    values = {c: torch.rand(2, 3, generator=generator, dtype=torch.float64) for c in subsets(agents)}
    return values | {tuple(sorted(agents)): torch.full((2, 3), nobody, dtype=torch.float64)}


def names(K: int) -> tuple[str, ...]:
    return tuple("edcbafghij"[:K])  # not in sorted order


def numbers(values: dict[str, Tensor]) -> dict[str, float]:
    return {agent: round(value.item(), 9) for agent, value in values.items()}


def by_definition(value: Game, agents: tuple[str, ...]) -> dict[str, Tensor]:
    """The mean over all K! orders of what each agent's entry changes."""
    total = {agent: torch.zeros_like(value[()]) for agent in agents}
    for order in itertools.permutations(agents):
        for n, agent in enumerate(order):
            before, after = (tuple(sorted(order[m:])) for m in (n, n + 1))
            total[agent] += value[after] - value[before]
    return {agent: value / math.factorial(len(agents)) for agent, value in total.items()}


# ---- the four properties


@settings(deadline=None)
@given(sizes, seeds)
def test_efficiency_what_is_paid_is_what_there_is(K: int, seed: int) -> None:
    value = random_game(names(K), seed, nobody=0.25)
    paid = torch.stack(list(shapley_exact(value, names(K)).values())).sum(0)
    torch.testing.assert_close(paid, value[()] - 0.25)


@settings(deadline=None)
@given(st.integers(2, 5), seeds)
def test_symmetry_equals_are_paid_equally(K: int, seed: int) -> None:
    agents = names(K)
    first, second = agents[:2]
    value = random_game(agents, seed)
    swap = {first: second, second: first}
    alike = {c: (v + value[tuple(sorted(swap.get(a, a) for a in c))]) / 2 for c, v in value.items()}
    phi = shapley_exact(alike, agents)
    torch.testing.assert_close(phi[first], phi[second])
    other = shapley_exact(value, agents)
    assert not torch.allclose(other[first], other[second])  # they were no equals before


@settings(deadline=None)
@given(st.integers(2, 5), seeds)
def test_a_null_player_is_paid_nothing(K: int, seed: int) -> None:
    agents = names(K)
    null, rest = agents[0], agents[1:]
    inner = random_game(rest, seed)
    value = {c: inner[tuple(a for a in c if a != null)] for c in subsets(agents)}
    phi = shapley_exact(value, agents)
    torch.testing.assert_close(phi.pop(null), torch.zeros(2, 3, dtype=torch.float64))
    torch.testing.assert_close(phi, shapley_exact(inner, rest))  # and changes nothing for the others


@settings(deadline=None)
@given(sizes, seeds, seeds, st.floats(-3, 3))
def test_additivity(K: int, one: int, two: int, factor: float) -> None:
    agents = names(K)
    a, b = random_game(agents, one), random_game(agents, two)
    joint = shapley_exact({c: a[c] + factor * b[c] for c in a}, agents)
    apart = [shapley_exact(value, agents) for value in (a, b)]
    torch.testing.assert_close(joint, {k: apart[0][k] + factor * apart[1][k] for k in agents})


# ---- known games


def test_a_majority_of_three_pays_each_a_third() -> None:
    phi = shapley_exact(game(ABC, lambda there: float(len(there) >= 2)), ABC)
    assert numbers(phi) == {"a": 0.333333333, "b": 0.333333333, "c": 0.333333333}


def test_the_glove_game_pays_the_scarce_glove() -> None:
    """A pair is worth 1; a has the one left glove, b and c a right glove each."""
    phi = shapley_exact(game(ABC, lambda there: float("a" in there and len(there) > 1)), ABC)
    assert numbers(phi) == {"a": 0.666666667, "b": 0.166666667, "c": 0.166666667}


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 5))
def test_unanimity_pays_its_members_alike_and_others_nothing(K: int, members: int) -> None:
    agents = names(K)
    club = frozenset(agents[:members])
    phi = numbers(shapley_exact(game(agents, lambda there: float(club <= there)), agents))
    assert phi == {a: round(1 / len(club), 9) if a in club else 0.0 for a in agents}


def test_one_agent_is_paid_the_reward() -> None:
    assert numbers(shapley_exact({(): torch.tensor([[0.7]])}, ("a",))) == {"a": pytest.approx(0.7)}


def test_the_empty_team_is_worth_what_is_given_and_else_nothing() -> None:
    value = {(): torch.tensor([[1.0]]), ("a",): torch.tensor([[1.0]]), ("b",): torch.tensor([[1.0]])}
    assert numbers(shapley_exact(value, ("a", "b"))) == {"a": 0.5, "b": 0.5}
    value[("a", "b")] = torch.tensor([[1.0]])
    assert numbers(shapley_exact(value, ("a", "b"))) == {"a": 0.0, "b": 0.0}


def test_docstring_is_true() -> None:
    results = doctest.testmod(shapley)
    assert results.attempted >= 3
    assert results.failed == 0


# ---- by permutations


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), seeds)
def test_all_coalitions_are_all_permutations(K: int, seed: int) -> None:
    agents = names(K)
    value = random_game(agents, seed, nobody=0.25)
    exact = shapley_exact(value, agents)
    torch.testing.assert_close(exact, by_definition(value, agents))
    if K > 1:
        orders = list(itertools.permutations(agents))
        torch.testing.assert_close(shapley_permutations(value, agents, orders)[0], exact)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_samples_come_as_close_as_their_standard_error_says(seed: int, antithetic: bool) -> None:
    agents = names(6)
    value = random_game(agents, seed)
    exact = shapley_exact(value, agents)
    orders = draw_orders(agents, 400, str(seed), antithetic=antithetic)
    found, error = shapley_permutations(value, agents, orders, antithetic=antithetic)
    for agent in agents:
        z_PN = (found[agent] - exact[agent]) / error[agent]
        assert float(z_PN.abs().max()) < 4
        assert float(error[agent].max()) < 0.05
        assert float(exact[agent].abs().max()) > 0.02  # a sign flip would be many errors away for someone
    flipped = torch.stack([(found[a] + exact[a]) / error[a] for a in agents])
    assert float(flipped.abs().max()) > 4


@pytest.mark.parametrize("antithetic", [False, True])
def test_the_standard_error_is_that_of_the_estimates(antithetic: bool) -> None:
    """Over many draws of 12 orders the estimates spread as much as they say."""
    agents = names(5)
    value = random_game(agents, 3)
    runs = [
        shapley_permutations(
            value, agents, draw_orders(agents, 12, f"run {i}", antithetic=antithetic), antithetic=antithetic
        )
        for i in range(300)
    ]
    spread = torch.stack([phi["a"] for phi, _ in runs]).var(0)
    said = torch.stack([error["a"] for _, error in runs]).square().mean(0)
    torch.testing.assert_close(said, spread, rtol=0.35, atol=0)


@pytest.mark.parametrize(("enough", "less"), [(1, True), (3, False)])
def test_reversed_orders_take_noise_away_or_add_it(enough: int, less: bool) -> None:
    """Of five, so many are enough. One: who comes first in one order comes last in the other. Three: the same one tips both."""
    agents = names(5)
    value = game(agents, lambda there: float(len(there) >= enough))

    def error(i: int, antithetic: bool) -> float:
        orders = draw_orders(agents, 40, str(i), antithetic=antithetic)
        return float(shapley_permutations(value, agents, orders, antithetic=antithetic)[1]["a"])

    plain, reversed_ = (fmean(error(i, antithetic) for i in range(40)) for antithetic in (False, True))
    assert (reversed_ < 0.95 * plain) if less else (reversed_ > 1.2 * plain)


@settings(deadline=None)
@given(st.integers(2, 5), seeds, st.integers(2, 6))
def test_samples_sum_to_the_reward_too_whatever_the_orders(K: int, seed: int, count: int) -> None:
    agents = names(K)
    value = random_game(agents, seed, nobody=0.25)
    orders = draw_orders(agents, count, str(seed))
    found, error = shapley_permutations({c: value[c] for c in passed_through(agents, orders)}, agents, orders)
    torch.testing.assert_close(torch.stack(list(found.values())).sum(0), value[()] - 0.25)
    assert all(bool((e >= 0).all()) for e in error.values())


def test_orders_are_drawn_alike_and_every_second_one_is_reversed() -> None:
    orders = draw_orders(names(4), 8, "1", antithetic=True)
    assert orders == draw_orders(names(4), 8, "1", antithetic=True)
    assert orders != draw_orders(names(4), 8, "2", antithetic=True)
    assert all(b == a[::-1] for a, b in zip(orders[::2], orders[1::2], strict=True))
    first = [draw_orders(ABC, 1, str(i))[0] for i in range(600)]
    counts = [first.count(order) for order in itertools.permutations(ABC)]
    assert min(counts) > 60  # each of six with probability 1/6


def test_what_is_missing_or_wrong_is_named() -> None:
    value = random_game(ABC, 0)
    orders = draw_orders(ABC, 4, "0")
    del value[("b",)]
    with pytest.raises(ValueError, match=r"missing: \[\('b',\)\]"):
        shapley_exact(value, ABC)
    with pytest.raises(ValueError, match="missing"):
        shapley_permutations(value, ABC, [*itertools.permutations(ABC)])
    with pytest.raises(ValueError, match="whole team"):
        shapley_exact({}, ABC)
    with pytest.raises(ValueError, match="two samples of 2"):
        shapley_permutations(random_game(ABC, 0), ABC, orders[:2], antithetic=True)
    with pytest.raises(ValueError, match="names every agent once"):
        shapley_permutations(random_game(ABC, 0), ABC, [("a", "b"), ("a", "b")])


# ---- the rule: what it asks for


def test_a_vote_is_asked_for_every_coalition_and_a_decider_stays() -> None:
    every = {("a",), ("b",), ("c",), ("a", "b"), ("a", "c"), ("b", "c")}
    assert Shapley().needs(ABC, None, ("a",)) == every
    assert Shapley().needs(ABC, "c", ("a",)) == {("a",), ("b",), ("a", "b")}
    assert Shapley().needs(("thinker", "solver"), "solver", ("solver",)) == {("thinker",)}  # it is paid for it too
    assert Shapley().needs(ABC, None, ()) == frozenset()
    assert Shapley().needs(("a",), "a", ("a",)) == frozenset()


@pytest.mark.parametrize(
    ("K", "decider", "free", "exact"),
    [
        (4, None, False, True),
        (4, "c", False, True),
        (5, None, False, False),
        (5, None, True, True),
        (10, None, True, True),
    ],
)
def test_auto_counts_all_where_they_are_few_or_free(K: int, decider: str | None, free: bool, exact: bool) -> None:
    rule, agents = Shapley(), names(K)
    asked = needed(rule, agents, decider, agents, rule.start(), free=free)
    every = coalitions(agents, decider)
    assert len(every) == (2**K - 2 if decider is None else 2 ** (K - 1) - 1)
    assert (asked == every) is exact
    assert asked <= every


def test_more_than_ten_voters_are_sampled() -> None:
    agents = tuple(f"v{i}" for i in range(11))
    assert len(needed(Shapley(), agents, None, agents, {"step": 0}, free=True)) <= 8 * 10
    with pytest.raises(UserError, match=r"13 agents, which make 8190 coalitions.*credit.method: sampled"):
        Shapley(method="exact").needs(tuple(f"v{i}" for i in range(13)), None, ("v1",))


def test_samples_are_drawn_anew_in_every_batch_and_again_after_a_resume() -> None:
    rule, agents = Shapley(method="sampled"), names(6)
    value = random_game(agents, 0)
    state, asked, paid = rule.start(), [], []
    for _ in range(3):
        state = json.loads(json.dumps(state))
        wanted = needed(rule, agents, None, agents, state, free=False)
        assert wanted == needed(rule, agents, None, agents, state, free=True)
        assert 0 < len(wanted) <= 8 * 5
        assert wanted < coalitions(agents, None)
        inputs = six_agents(value, {c: value[c] for c in wanted})
        outputs, after = rule(inputs, state)
        again, _ = rule(inputs, json.loads(json.dumps(state)))
        torch.testing.assert_close(dict(outputs.credit), dict(again.credit), rtol=0, atol=0)
        asked.append(wanted)
        paid.append(outputs)
        state = after
    assert state == {"step": 3}
    assert len(set(asked)) == 3
    other = Shapley(method="sampled", seed=1)
    assert needed(other, agents, None, agents, {"step": 0}, free=False) != asked[0]
    for outputs in paid:
        torch.testing.assert_close(torch.stack(list(outputs.credit.values())).sum(0), value[()])
        assert set(outputs.metrics) == {f"credit/{a}/{key}" for a in agents for key in ("mean", "shapley_error")}
        assert all(outputs.metrics[f"credit/{a}/shapley_error"] > 0 for a in agents)


def six_agents(value: Game, without: Game) -> CreditInputs:
    return CreditInputs(
        agents=names(6),
        decider=None,
        active=names(6),
        reward_PN=value[()],
        without={c: v[:, :, None] for c, v in without.items()},
    )


def test_a_sampled_batch_that_lacks_a_coalition_is_refused() -> None:
    rule, value = Shapley(method="sampled"), random_game(names(6), 0)
    wanted = sorted(rule.needs(names(6), None, names(6)))
    with pytest.raises(ValueError, match="needs the rewards without"):
        rule(six_agents(value, {c: value[c] for c in wanted[1:]}), rule.start())


def test_the_mean_over_batches_is_the_value() -> None:
    rule, value = Shapley(method="sampled", permutations=4), random_game(names(6), 1)
    inputs, state, total = six_agents(value, {c: value[c] for c in coalitions(names(6), None)}), rule.start(), 0.0
    errors = []
    for _ in range(200):
        outputs, state = rule(inputs, state)
        total = total + outputs.credit["b"] / 200
        errors.append(outputs.metrics["credit/b/shapley_error"])
    exact = Shapley(method="exact")(inputs, {})[0].credit["b"]
    assert float((total - exact).abs().max()) < 5 * fmean(errors) / math.sqrt(200)
    auto, _ = Shapley()(inputs, {})  # every coalition is there: nothing need be sampled
    torch.testing.assert_close(auto.credit["b"], exact, rtol=0, atol=0)
    assert "credit/b/shapley_error" not in auto.metrics


# ---- the rule: what it pays


def test_think_solve_by_hand() -> None:
    """Alone the thinker is worth 0 and the solver s: the thinker is paid (R - s) / 2, the solver (R + s) / 2."""
    inputs = CreditInputs(
        agents=("thinker", "solver"),
        decider="solver",
        active=("thinker", "solver"),
        reward_PN=torch.tensor([[1.0, 0.0], [0.0, 0.5]], dtype=torch.float64),
        without={("thinker",): torch.tensor([[[0.0, 1.0, 0.0, 0.0]], [[1.0, 1.0, 1.0, 1.0]]], dtype=torch.float64)},
    )
    outputs, state = Shapley()(inputs, {})
    assert outputs.credit["thinker"].tolist() == [[0.375, -0.125], [-0.5, -0.25]]
    assert outputs.credit["solver"].tolist() == [[0.625, 0.125], [0.5, 0.75]]
    assert outputs.metrics == {"credit/thinker/mean": -0.125, "credit/solver/mean": 0.5}
    assert state == {"step": 1}


def test_a_chain_of_three_by_hand() -> None:
    """Only the last one answers, 0.2 alone, 0.5 with either of the others, 1 with both: like the glove game.

    c = (0.2 + 2 * 0.5 / 2 + 1) / 3; a = b = ((0.5 - 0.2) / 2 + (1 - 0.5)) / 3."""
    without = {("a",): 0.5, ("b",): 0.5, ("a", "b"): 0.2}
    inputs = CreditInputs(
        agents=ABC,
        decider="c",
        active=("c", "a"),
        reward_PN=torch.ones(1, 2, dtype=torch.float64),
        without={c: torch.full((1, 1, 3), r, dtype=torch.float64) for c, r in without.items()},
    )
    credit = Shapley()(inputs, {})[0].credit
    assert set(credit) == {"a", "c"}
    torch.testing.assert_close(credit["c"], torch.full((1, 2), 1.7 / 3, dtype=torch.float64))
    torch.testing.assert_close(credit["a"], torch.full((1, 2), 0.65 / 3, dtype=torch.float64))


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "all"},
        {"permutations": 1},
        {"permutations": 8.0},
        {"permutations": 2, "antithetic": True},
        {"permutations": 5, "antithetic": True},
    ],
)
def test_settings_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match="credit"):
        Shapley(**wrong)


def test_two_orders_are_enough_where_they_are_no_pair() -> None:
    assert Shapley(permutations=2).permutations == 2
    assert Shapley(permutations=4, antithetic=True).permutations == 4


def test_ten_voters_are_quick() -> None:
    agents = names(10)
    every = coalitions(agents, None)
    reward = torch.rand(16, 8)
    inputs = CreditInputs(
        agents=agents,
        decider=None,
        active=agents,
        reward_PN=reward,
        without={c: torch.rand(16, 8, 1) for c in every},
    )
    started = time.perf_counter()
    outputs, _ = Shapley()(inputs, {})
    assert time.perf_counter() - started < 2
    torch.testing.assert_close(torch.stack(list(outputs.credit.values())).sum(0), reward, atol=1e-5, rtol=0)
