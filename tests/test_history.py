"""Global-history statistics: hand-derived numbers, exact round trips, and what must never happen."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ccpo.credit.history import Ema, fold, is_warm, normalise, sigma, trust
from ccpo.errors import UserError

torch.set_num_threads(1)
finite = st.floats(-1e6, 1e6)
batches = st.lists(st.lists(st.floats(-1, 1), min_size=1, max_size=8), min_size=1, max_size=6)


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_first_batch_initialises_with_the_population_variance() -> None:
    ema = fold(Ema(), t(0, 1, 1, 2), decay=0.99)
    assert ema == Ema(mean=1.0, var=0.5, count=4, updates=1)


def test_second_batch_is_averaged_in() -> None:
    # mean 0.9 * 1 + 0.1 * 4; var 0.9 * 0.5 + 0.1 * 1: the variance *within* the batch, not around the moving mean
    ema = fold(fold(Ema(), t(0, 1, 1, 2), 0.9), t(3, 5), 0.9)
    assert ema.mean == pytest.approx(1.3, abs=1e-12)
    assert ema.var == pytest.approx(0.55, abs=1e-12)
    assert (ema.count, ema.updates) == (6, 2)


def test_normalise_uses_the_statistics_from_before() -> None:
    ema = Ema(mean=0.5, var=0.25, count=100, updates=1)
    z = normalise(t(1.0, 0.0), ema, eps=1e-6, min_samples=10)
    torch.testing.assert_close(z, t(0.5 / 0.500001, -0.5 / 0.500001))


def test_passes_through_until_min_samples_were_seen() -> None:
    values = t(0.25, 1.0)
    cold, warm = Ema(mean=1.0, var=4.0, count=9, updates=3), Ema(mean=1.0, var=4.0, count=10, updates=3)
    assert normalise(values, cold, eps=1e-6, min_samples=10) is values
    assert not torch.equal(normalise(values, warm, eps=1e-6, min_samples=10), values)


def test_the_first_batch_passes_through_even_without_min_samples() -> None:
    assert not is_warm(Ema(), 0)
    assert is_warm(Ema(count=1, updates=1), 0)


@pytest.mark.parametrize(("var", "expected"), [(0.0, 1.0), (1e-6, 1.0), (1.1e-6, math.sqrt(1.1e-6)), (0.25, 0.5)])
def test_a_vanishing_variance_gives_sigma_one(var: float, expected: float) -> None:
    assert sigma(Ema(var=var), eps=1e-6) == expected


def test_floor_bounds_sigma_from_below() -> None:
    assert sigma(Ema(var=0.01), eps=1e-6, floor=0.3) == 0.3
    assert sigma(Ema(var=0.25), eps=1e-6, floor=0.3) == 0.5


def test_center_takes_the_batch_mean_in_the_place_of_the_lagging_one() -> None:
    ema = Ema(mean=-5.0, var=4.0, count=100, updates=1)
    z = normalise(t(1.0, 3.0), ema, eps=0.0, min_samples=1, center=True)
    torch.testing.assert_close(z, t(-0.5, 0.5))


def test_trust_by_hand() -> None:
    ema = Ema(mean=0.5, var=0.25, count=1, updates=1)
    assert trust(ema, eta=2.0, eps=0.0) == pytest.approx(1 / (1 + math.exp(-2.0)), abs=1e-12)
    assert trust(Ema(mean=-0.5, var=0.25), eta=2.0, eps=0.0) == pytest.approx(1 / (1 + math.exp(2.0)), abs=1e-12)
    assert trust(Ema(), eta=1.0, eps=1e-6) == 0.5


@pytest.mark.parametrize("mean", [-1e9, 1e9])
def test_trust_does_not_overflow(mean: float) -> None:
    assert trust(Ema(mean=mean, var=1e-5), eta=100.0, eps=1e-6) == (0.0 if mean < 0 else 1.0)


@given(mean=finite, var=st.floats(0, 1e6), count=st.integers(0, 2**53), updates=st.integers(0, 2**31))
def test_json_round_trip_is_exact(mean: float, var: float, count: int, updates: int) -> None:
    ema = Ema(mean=mean, var=var, count=count, updates=updates)
    assert Ema.from_json(json.loads(json.dumps(ema.to_json()))) == ema


@given(batches)
def test_stopping_and_resuming_changes_nothing(values: list[list[float]]) -> None:
    through, resumed = Ema(), Ema()
    for batch in values:
        through = fold(through, t(*batch), 0.9)
        resumed = fold(Ema.from_json(json.loads(json.dumps(resumed.to_json()))), t(*batch), 0.9)
    assert through == resumed


@given(batches)
def test_statistics_stay_inside_what_was_seen(values: list[list[float]]) -> None:
    ema = Ema()
    for batch in values:
        ema = fold(ema, t(*batch), 0.7)
    seen = [x for batch in values for x in batch]
    assert min(seen) - 1e-12 <= ema.mean <= max(seen) + 1e-12
    assert 0 <= ema.var <= 1
    assert ema.count == len(seen)


def test_float32_rewards_lose_nothing_in_the_statistics() -> None:
    values = torch.full((3, 1001), 0.1, dtype=torch.float32)
    assert fold(Ema(), values, 0.9).mean == pytest.approx(float(values[0, 0]), abs=1e-15)


def test_statistics_carry_no_gradient() -> None:
    values = t(1.0, 3.0).requires_grad_()
    assert isinstance(fold(Ema(), values, 0.9).mean, float)


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.inf]])
def test_a_batch_that_would_poison_the_history_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="fold"):
        fold(Ema(), torch.tensor(values), 0.9)


@pytest.mark.parametrize(
    "data",
    [
        {},
        [],
        {"mean": 0.0, "var": 1.0, "count": 1},
        {"mean": math.nan, "var": 1.0, "count": 1, "updates": 1},
        {"mean": 0.0, "var": -1.0, "count": 1, "updates": 1},
        {"mean": 0.0, "var": 1.0, "count": 1.5, "updates": 1},
        {"mean": "0", "var": 1.0, "count": 1, "updates": 1},
        {"mean": True, "var": 1.0, "count": 1, "updates": 1},
    ],
)
def test_a_damaged_history_is_refused(data: object) -> None:
    with pytest.raises(UserError, match="history"):
        Ema.from_json(data)  # type: ignore[arg-type]
