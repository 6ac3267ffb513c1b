"""Statistics of a comparison: every expected value is derived by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ccpo.compare.stats import (
    Crossing,
    area_under,
    band,
    improvement,
    iqm,
    iqm_estimate,
    lost_after_peak,
    ratio_estimate,
    smoothed,
    tokens_to,
    unstable_share,
)

torch.set_num_threads(1)


def curve(*points: tuple[float, float]) -> list[list[float]]:
    """A curve of (tokens, accuracy)."""
    return [[tokens, step, 0.0, accuracy] for step, (tokens, accuracy) in enumerate(points)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([3.0], 3.0),
        ([1.0, 2.0, 6.0], 3.0),  # floor(3/4) = 0 values are cut
        ([0.0, 1.0, 3.0, 100.0], 2.0),  # one at each end
        ([9.0, 1.0, 2.0, 3.0, -50.0], 2.0),
        ([0, 0, 1, 2, 3, 4, 5, 6, 99, 99], 3.5),  # floor(10/4) = 2 at each end: 1..6
    ],
)
def test_iqm_cuts_a_quarter_at_each_end(values, expected):
    assert iqm(values) == pytest.approx(expected)


def test_iqm_of_a_tensor_is_by_row():
    assert iqm(torch.tensor([[0.0, 1.0, 3.0, 100.0], [4.0, 4.0, 4.0, 4.0]])).tolist() == [2.0, 4.0]


def test_iqm_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no values"):
        iqm([])


def test_equal_values_have_an_interval_of_no_width():
    found = iqm_estimate([[0.5] * 5, [0.5] * 7])
    assert (found.value, found.low, found.high, found.runs) == (0.5, 0.5, 0.5, 12)


def test_the_bootstrap_of_two_values_has_its_three_outcomes():
    """Of 0 and 1, resamples have the means 0, 1/2, 1 with chances 1/4, 1/2, 1/4: the 95% interval is [0, 1]."""
    found = iqm_estimate([[0.0, 1.0]])
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)


def test_strata_are_resampled_apart():
    """Two tasks of different level and no spread: whatever is drawn, each keeps its own number of runs, so there is no width.
    Drawn from the pool, there would be."""
    found = iqm_estimate([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


def test_a_narrow_interval_of_normal_values_has_the_width_of_theory():
    """The IQM of n normal values has a standard error of about 1.09/sqrt(n) sigma (trimmed mean, a quarter each side)."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(1)).tolist()
    found = iqm_estimate([values])
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * 1.09 / 20, rel=0.2)


def test_the_same_values_give_the_same_interval():
    assert iqm_estimate([[0.1, 0.5, 0.9]]) == iqm_estimate([[0.1, 0.5, 0.9]])


def test_ratio_of_iqms():
    found = ratio_estimate([30.0] * 5, [60.0] * 5)
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)
    wide = ratio_estimate([10.0, 20.0], [10.0, 20.0])
    assert (wide.value, wide.low, wide.high) == (1.0, 0.5, 2.0)  # the means are 10, 15 or 20


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([2.0, 3.0], [0.0, 1.0], 1.0),
        ([0.0, 1.0], [2.0, 3.0], 0.0),
        ([1.0, 1.0], [1.0, 1.0], 0.5),
        ([0.0, 2.0], [1.0], 0.5),
        ([1.0, 2.0], [1.0, 0.0], 7 / 8),  # one tie among four pairs: (0.5 + 1 + 1 + 1)/4
    ],
)
def test_probability_of_improvement(first, second, expected):
    assert improvement([first], [second]).value == pytest.approx(expected)


def test_probability_of_improvement_is_the_mean_over_tasks_not_over_pairs():
    """One task of one pair won, one task of nine pairs lost: 1/2, not 1/10."""
    assert improvement([[1.0], [0.0] * 3], [[0.0], [1.0] * 3]).value == 0.5


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_probabilities_of_improvement_of_both_sides_sum_to_one(first, second):
    there, back = improvement([first], [second]), improvement([second], [first])
    assert there.value + back.value == pytest.approx(1)
    assert 0 <= there.low <= there.high <= 1


def test_probability_of_improvement_needs_the_same_tasks():
    with pytest.raises(ValueError, match="same strata"):
        improvement([[1.0]], [[1.0], [2.0]])


# --- curves ------------------------------------------------------------------------------------------------------------------


def test_smoothing_takes_neighbours_and_what_is_there_at_the_ends():
    found = smoothed(curve((0, 0.0), (10, 0.3), (20, 0.9), (30, 0.6)))
    assert [x for x, _ in found] == [0, 10, 20, 30]
    assert [y for _, y in found] == pytest.approx([0.15, 0.4, 0.6, 0.75])


def test_tokens_to_a_mark_are_interpolated_on_the_smoothed_curve():
    """The smoothed curve is 0.15, 0.4, 0.6, 0.75; 0.5 lies half-way between 10 and 20."""
    found = tokens_to(curve((0, 0.0), (10, 0.3), (20, 0.9), (30, 0.6)), 0.5, budget=40)
    assert found.tokens == pytest.approx(15)
    assert not found.censored


def test_a_single_lucky_evaluation_is_no_crossing():
    lucky = curve((0, 0.1), (10, 0.1), (20, 0.9), (30, 0.1), (40, 0.1))
    assert tokens_to(lucky, 0.8, budget=40) == Crossing(tokens=40, censored=True)


def test_a_mark_that_is_never_reached_counts_with_the_budget():
    assert tokens_to(curve((0, 0.1), (90, 0.2)), 0.5, budget=100) == Crossing(tokens=100, censored=True)


def test_a_mark_that_holds_from_the_start():
    assert tokens_to(curve((0, 0.6), (10, 0.6)), 0.5, budget=100) == Crossing(tokens=0, censored=False)


def test_the_area_under_a_curve_is_a_mean_accuracy():
    assert area_under(curve((0, 0.0), (100, 1.0)), 100) == pytest.approx(0.5)
    assert area_under(curve((0, 0.4), (100, 0.4)), 100) == pytest.approx(0.4)
    assert area_under(curve((0, 0.0), (50, 1.0)), 100) == pytest.approx(0.75)  # the last is held
    assert area_under(curve((0, 0.0), (200, 1.0)), 100) == pytest.approx(0.25)  # half of it lies beyond
    assert area_under(
        curve(
            (50, 1.0),
        ),
        100,
    ) == pytest.approx(1.0)
    assert area_under(curve((0, 0.0), (60, 0.6), (100, 0.2)), 100) == pytest.approx((60 * 0.3 + 40 * 0.4) / 100)


def test_the_area_of_no_curve_is_refused():
    with pytest.raises(ValueError, match="without points"):
        area_under([], 100)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(1, 300))
def test_an_area_lies_between_the_extremes(values, budget):
    found = area_under(curve(*[(10 * i, v) for i, v in enumerate(values)]), budget)
    assert min(values) - 1e-9 <= found <= max(values) + 1e-9


def test_stability_is_the_largest_fall_after_a_peak():
    rising = curve(*[(i, 0.1 * i) for i in range(8)])
    assert lost_after_peak(rising) == pytest.approx(0.0)
    falling = curve(*[(i, v) for i, v in enumerate([0.2, 0.8, 0.8, 0.8, 0.5, 0.5, 0.5, 0.9])])
    assert lost_after_peak(falling) == pytest.approx(0.3)  # smoothed: 0.8 falls to 0.5
    dip = curve(*[(i, v) for i, v in enumerate([0.8, 0.8, 0.8, 0.5, 0.8, 0.8])])
    assert lost_after_peak(dip) == pytest.approx(0.1)  # one bad evaluation of three
    assert unstable_share([rising, falling, dip, rising]) == pytest.approx(0.5)


def test_a_band_is_interpolated_and_held():
    found = band([curve((0, 0.0), (10, 1.0)), curve((0, 0.0), (10, 1.0))], [0, 2.5, 10, 30])
    assert [point.value for point in found] == pytest.approx([0.0, 0.25, 1.0, 1.0])
    assert all(math.isclose(point.low, point.high) for point in found)
