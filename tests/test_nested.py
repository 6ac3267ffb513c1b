"""Trees of rollouts: node values, baselines, components of variance, the choice of a layout."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ccpo.credit.allocation import best_branch, efficiency, precision, probe_branch, tree_cost
from ccpo.credit.nested import (
    baseline_errors,
    components,
    group_mean,
    inverse_weights,
    node_values,
    node_variances,
    sibling_mean,
    spread_out,
)
from ccpo.types import TreePlace

torch.set_num_threads(1)

THOUGHT = TreePlace(contexts=1, siblings=2, plays=3)
ANSWER = TreePlace(contexts=2, siblings=3, plays=1)
REWARD_PN = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0, 1.0]])  # two thoughts, three answers each


def test_a_thought_is_worth_the_mean_of_its_answers():
    assert node_values(REWARD_PN, THOUGHT)[0, 0].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert node_values(REWARD_PN, ANSWER)[0].tolist() == [[1, 0, 1], [0, 0, 1]]


def test_a_value_is_given_to_every_play_of_its_text():
    value_PCS = torch.tensor([[[5.0, 7.0]]])
    assert spread_out(value_PCS, THOUGHT).tolist() == [[5, 5, 5, 7, 7, 7]]
    assert spread_out(node_values(REWARD_PN, ANSWER), ANSWER).tolist() == REWARD_PN.tolist()


def test_baselines_leave_out_what_they_judge():
    answers_PCS = node_values(REWARD_PN, ANSWER)
    assert sibling_mean(answers_PCS)[0].tolist() == [[0.5, 1.0, 0.5], [0.5, 0.5, 0.0]]
    assert group_mean(answers_PCS)[0, :, 0].tolist() == pytest.approx([1 / 3, 2 / 3])
    with pytest.raises(ValueError, match="without siblings"):
        sibling_mean(torch.zeros(1, 3, 1))
    with pytest.raises(ValueError, match="single context"):
        group_mean(torch.zeros(1, 1, 3))


def sibling_weight(place: TreePlace, within: float, between: float) -> float:
    return inverse_weights(baseline_errors(place, within, between)).get("siblings", 0.0)


@pytest.mark.parametrize(("within", "between", "expected"), [(1.0, 0.0, 1 / 3), (0.0, 1.0, 1.0), (0.0, 0.0, 0.5)])
def test_the_weight_of_siblings(within: float, between: float, expected: float):
    """C = 2, S = 2. All in the texts: the siblings err by 1, the group by 1/2, so 1/3. All in the contexts: siblings only."""
    place = TreePlace(contexts=2, siblings=2, plays=1)
    assert sibling_weight(place, within, between) == pytest.approx(expected, abs=1e-6)


def test_what_a_layout_lacks_has_no_weight():
    assert sibling_weight(TreePlace(contexts=1, siblings=4, plays=1), 1.0, 1.0) == 1.0
    assert sibling_weight(TreePlace(contexts=4, siblings=1, plays=1), 1.0, 1.0) == 0.0


@given(st.floats(0.01, 2), st.floats(0.01, 2), st.integers(2, 4), st.integers(2, 4))
def test_the_weight_makes_the_least_error(within: float, between: float, C: int, S: int):
    def error(w: float) -> float:
        group = between * C / (C - 1) + within / (S * (C - 1))
        return w**2 * within / (S - 1) + (1 - w) ** 2 * group

    best = sibling_weight(TreePlace(contexts=C, siblings=S, plays=1), within, between)
    assert 0 <= best <= 1
    assert all(error(best) <= error(best + d) + 1e-12 for d in (-0.01, 0.01))


# --- variances ------------------------------------------------------------------------------------------------------


def nested_rewards(variances: tuple[float, ...], branch: tuple[int, ...], problems: int) -> torch.Tensor:
    """Sums of independent normal effects, one a text of each level."""
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros(problems, math.prod(branch), dtype=torch.float64)
    for depth, variance in enumerate(variances):
        texts = math.prod(branch[: depth + 1])
        effect = torch.randn(problems, texts, generator=generator, dtype=torch.float64) * math.sqrt(variance)
        total += effect.repeat_interleave(total.shape[1] // texts, dim=1)
    return total


@pytest.mark.parametrize("variances", [(0.5, 2.0), (1.0, 0.0), (0.3, 1.0, 0.6)])
def test_components_find_the_variances_that_made_the_rewards(variances: tuple[float, ...]):
    branch = (3, 2, 4)[: len(variances)]
    found = components(nested_rewards(variances, branch, 20_000), branch)
    assert found == pytest.approx(variances, abs=0.05)


def test_components_by_hand():
    """Thoughts worth 0.5 and 1.0 of answers (0, 1) and (1, 1): answers vary by 0.5 and 0, so 0.25; thoughts by 0.125, of which
    0.25 / 2 is their answers'."""
    assert components(torch.tensor([[0.0, 1.0, 1.0, 1.0]]), (2, 2)) == pytest.approx((0.0, 0.25))
    assert components(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), (2, 2)) == pytest.approx((0.5, 0.0))


def test_confounded_levels_are_refused():
    with pytest.raises(ValueError, match="two texts a context"):
        components(torch.zeros(1, 4), (4, 1))


def test_node_variances_are_unbiased_and_silent_where_the_layout_cannot_tell():
    reward_PN = nested_rewards((0.5, 2.0), (3, 2), 20_000)
    within, between = node_variances(node_values(reward_PN, TreePlace(contexts=3, siblings=2, plays=1)))
    assert (within, between) == pytest.approx((2.0, 0.5), abs=0.06)
    assert node_variances(torch.zeros(1, 3, 1)) == (None, None)
    assert node_variances(torch.zeros(1, 1, 3)) == (0.0, None)


# --- layouts --------------------------------------------------------------------------------------------------------


def test_the_cost_of_a_tree_by_hand():
    assert tree_cost((4, 2), (20, 3)) == 4 * 20 + 8 * 3
    assert tree_cost((2, 3, 2), (1, 10, 100)) == 2 + 60 + 1200


def test_cheap_noisy_answers_are_repeated_and_dear_sure_ones_are_not():
    assert best_branch((0.1, 0.1), (20, 2), 8) == (4, 2)
    assert best_branch((0.01, 0.1), (20, 2), 8) == (2, 4)
    assert best_branch((0.01, 0.1), (1, 20), 8) == (8, 1)


def test_sure_answers_have_siblings_all_the_same_as_a_baseline():
    assert best_branch((1.0, 0.01), (1, 20), 8) == (4, 2)


def test_a_last_text_that_decides_most_is_played_twice_and_its_messages_are_shared():
    assert best_branch((0.01, 0.01, 0.1), (4, 4, 4), 8) == (4, 1, 2)


def test_efficiency_is_precision_for_a_token():
    plain, tree = (8, 1), (4, 2)
    gained = efficiency(tree, (0.1, 0.05), (10, 2)) - efficiency(plain, (0.1, 0.05), (10, 2))
    told = (precision(tree, (0.1, 0.05)) - precision(plain, (0.1, 0.05))) / 2
    assert gained == pytest.approx(told + math.log((8 * 12) / (4 * 10 + 8 * 2)))


@settings(max_examples=60)
@given(
    st.lists(st.floats(0.001, 1), min_size=1, max_size=3),
    st.data(),
    st.integers(2, 12),
)
def test_the_best_layout_has_no_more_plays_and_none_is_better(variances: list[float], data: st.DataObject, plays: int):
    costs = data.draw(st.lists(st.floats(1, 50), min_size=len(variances), max_size=len(variances)))
    best = best_branch(variances, costs, plays)
    assert best[0] >= 2
    assert math.prod(best) <= plays
    for lower in itertools.product(range(1, 5), repeat=len(costs) - 1):
        first = plays // math.prod(lower)
        if first >= 2:
            assert efficiency((first, *lower), variances, costs) <= efficiency(best, variances, costs) + 1e-9


def test_fewer_than_two_plays_and_unequal_levels_are_refused():
    with pytest.raises(ValueError, match="at least two plays"):
        best_branch((1.0, 1.0), (5, 5), 1)
    with pytest.raises(ValueError, match="one cost a level"):
        best_branch((1.0,), (5, 5), 8)


def test_a_probe_tells_every_level_apart():
    assert probe_branch(2, 8) == (4, 2)
    assert probe_branch(3, 4) == (2, 2, 2)
