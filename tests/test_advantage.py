"""Advantage estimators: hand-derived numbers, the loop against the vectorised form, and exact zeros."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ccpo.credit.advantage import ESTIMATORS, ROWS

torch.set_num_threads(1)
GROUPED = ["grpo", "dr_grpo", "rloo"]
rows = st.lists(st.tuples(st.floats(-2, 2), st.integers(-3, 3), st.integers(1, 9)), min_size=1, max_size=24)


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def unpack(found: list[tuple[float, int, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    credit, group, tokens = zip(*found, strict=True)
    return t(*credit), ids(*group), ids(*tokens)


def test_grpo_by_hand() -> None:
    # group 0: mean 1, unbiased deviation sqrt(2); group 1: mean 2, deviation 1
    found = ESTIMATORS["grpo"](t(0, 2, 1, 2, 3), ids(0, 0, 1, 1, 1))
    half = 1 / (math.sqrt(2) + 1e-6)
    one = 1 / (1 + 1e-6)
    torch.testing.assert_close(found, t(-half, half, -one, 0, one))


def test_dr_grpo_by_hand() -> None:
    found = ESTIMATORS["dr_grpo"](t(0, 2, 1, 2, 6), ids(0, 0, 1, 1, 1))
    torch.testing.assert_close(found, t(-1, 1, -2, -1, 3))


def test_rloo_by_hand() -> None:
    # leave one out: 0 - 2, 2 - 0; 1 - (2+6)/2, 2 - (1+6)/2, 6 - (1+2)/2
    found = ESTIMATORS["rloo"](t(0, 2, 1, 2, 6), ids(0, 0, 1, 1, 1))
    torch.testing.assert_close(found, t(-2, 2, -3, -1.5, 4.5))


def test_reinforce_pp_by_hand() -> None:
    # tokens 1 and 3: mean 0.75; unbiased variance (0.75^2 + 3 * 0.25^2) / 3 = 0.25
    found = ESTIMATORS["reinforce++"](t(0, 1), ids(0, 0), ids(1, 3))
    torch.testing.assert_close(found, t(-1.5, 0.5), rtol=0, atol=1e-6)


def test_maxrl_by_hand() -> None:
    # group 0: mean 1/4, one success weighs (1 - 1/4) / (1/4) = 3; group 1 is never solved
    found = ESTIMATORS["maxrl"](t(1, 0, 0, 0, 0, 0), ids(0, 0, 0, 0, 1, 1))
    torch.testing.assert_close(found, t(3, -1, -1, -1, 0, 0))
    with pytest.raises(ValueError, match="cannot be negative"):
        ESTIMATORS["maxrl"](t(1, -0.1), ids(0, 0))


def test_none_is_the_credit() -> None:
    credit = t(0.3, -0.2)
    found = ESTIMATORS["none"](credit, ids(0, 0))
    assert torch.equal(found, credit)
    assert found.data_ptr() != credit.data_ptr()


@given(rows)
def test_vectorised_equals_the_loop(found: list[tuple[float, int, int]]) -> None:
    credit_B, group_B, _ = unpack(found)
    for i in range(credit_B.numel()):
        siblings = credit_B[(group_B == group_B[i]) & (torch.arange(credit_B.numel()) != i)]
        members = credit_B[group_B == group_B[i]]
        centred = credit_B[i] - members.mean()
        spread = bool((members != members[0]).any())
        expected = {
            "grpo": centred / (members.std() + 1e-6) if spread else 0.0,
            "dr_grpo": centred if spread else 0.0,
            "rloo": credit_B[i] - siblings.mean() if spread else 0.0,
        }
        for name in GROUPED:
            assert float(ESTIMATORS[name](credit_B, group_B)[i]) == pytest.approx(float(expected[name]), abs=1e-7)


@given(rows)
def test_reinforce_pp_equals_whitening_each_token(found: list[tuple[float, int, int]]) -> None:
    credit_B, group_B, tokens_B = unpack(found)
    each = credit_B.repeat_interleave(tokens_B)
    expected = torch.zeros_like(credit_B)
    if bool((each != each[0]).any()):
        expected = (credit_B - each.mean()) * torch.rsqrt(each.var() + 1e-8)
    torch.testing.assert_close(ESTIMATORS["reinforce++"](credit_B, group_B, tokens_B), expected)


@given(rows, st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(found: list[tuple[float, int, int]], random: object) -> None:
    credit_B, group_B, tokens_B = unpack(found)
    order = torch.randperm(credit_B.numel(), generator=torch.Generator().manual_seed(random.getrandbits(30)))  # type: ignore[attr-defined]
    for name, estimator in ESTIMATORS.items():
        paid_B = credit_B.abs() if name == "maxrl" else credit_B
        straight = estimator(paid_B, group_B, tokens_B)[order]
        shuffled = estimator(paid_B[order], group_B[order], tokens_B[order])
        torch.testing.assert_close(straight, shuffled, msg=name)


@given(rows)
def test_groups_sum_to_zero(found: list[tuple[float, int, int]]) -> None:
    credit_B, group_B, _ = unpack(found)
    for name in GROUPED:
        advantage_B = ESTIMATORS[name](credit_B, group_B)
        for group in group_B.unique():
            assert abs(float(advantage_B[group_B == group].sum())) < 1e-6


@pytest.mark.parametrize("name", GROUPED)
def test_renaming_groups_changes_nothing(name: str) -> None:
    credit_B, group_B = t(0, 1, 1, 0, 0.5), ids(0, 0, 1, 1, 1)
    renamed = ESTIMATORS[name](credit_B, group_B * 10**12 - 7)
    torch.testing.assert_close(ESTIMATORS[name](credit_B, group_B), renamed)


@pytest.mark.parametrize("name", [*GROUPED, "maxrl"])
@pytest.mark.parametrize("N", [1, 3, 8])
def test_many_groups_are_worked_on_in_pieces_like_one_by_one(name: str, N: int) -> None:
    """Groups at both sides of a piece's edge; the same rows in another order, found by their ids; and ids that look like a table
    by their number of changes alone."""
    P = 2 * ROWS // N + 3
    credit_B = torch.rand(P * N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    group_B = torch.arange(P).repeat_interleave(N)
    together = ESTIMATORS[name](credit_B, group_B, raw_singletons=True).view(P, N)
    edge = ROWS // N
    for group in (0, edge - 1, edge, P - 1):
        alone = ESTIMATORS[name](credit_B.view(P, N)[group], torch.zeros(N, dtype=torch.long), raw_singletons=True)
        torch.testing.assert_close(together[group], alone)
    order = torch.randperm(P * N, generator=torch.Generator().manual_seed(1))
    shuffled = ESTIMATORS[name](credit_B[order], group_B[order], raw_singletons=True)
    torch.testing.assert_close(shuffled, together.flatten()[order])


def test_uneven_groups_are_no_table() -> None:
    for uneven in (ids(0, 1, 1, 1, 2, 2), ids(0, 0, 0, 1, 2, 2), ids(0, 0, 1, 1, 0, 0), ids(0, 0, 0, 0, 1, 2, 2, 2)):
        credit_B = torch.arange(len(uneven), dtype=torch.float64)
        found = ESTIMATORS["dr_grpo"](credit_B, uneven)
        for group in uneven.unique():
            members = credit_B[uneven == group]
            torch.testing.assert_close(found[uneven == group], members - members.mean())


@pytest.mark.parametrize("name", [*GROUPED, "reinforce++"])
@pytest.mark.parametrize("value", [0.1, 1.0, -1 / 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_spread_is_exactly_zero(name: str, value: float, dtype: torch.dtype) -> None:
    # the mean of seven times 0.1 is not 0.1: without care its rounding would be divided by 1e-6
    credit_B = torch.full((7,), value, dtype=dtype)
    found = ESTIMATORS[name](credit_B, torch.zeros(7, dtype=torch.long), torch.ones(7))
    assert torch.equal(found, torch.zeros(7, dtype=dtype))


@pytest.mark.parametrize("name", GROUPED)
def test_singletons(name: str) -> None:
    credit_B, group_B = t(0.7, 1, 0), ids(0, 1, 1)
    assert float(ESTIMATORS[name](credit_B, group_B)[0]) == 0.0
    raw = ESTIMATORS[name](credit_B, group_B, raw_singletons=True)
    assert float(raw[0]) == 0.7
    torch.testing.assert_close(raw[1:], ESTIMATORS[name](credit_B, group_B)[1:])


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_empty_and_dtype(name: str) -> None:
    empty = torch.zeros(0)
    assert ESTIMATORS[name](empty, torch.zeros(0, dtype=torch.long), empty).shape == (0,)
    found = ESTIMATORS[name](torch.tensor([0.0, 1.0]), ids(5, 5), ids(1, 1))
    assert found.dtype == torch.float32
    assert float(found[1]) > float(found[0])


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_advantages_carry_no_gradient(name: str) -> None:
    credit_B = t(0.0, 1.0).requires_grad_()
    assert not ESTIMATORS[name](credit_B, ids(0, 0), ids(1, 1)).requires_grad


def test_rows_without_tokens_do_not_weigh() -> None:
    with_empty = ESTIMATORS["reinforce++"](t(0, 1, 9), ids(0, 0, 0), ids(1, 3, 0))
    torch.testing.assert_close(with_empty[:2], t(-1.5, 0.5), rtol=0, atol=1e-6)
    assert torch.equal(ESTIMATORS["reinforce++"](t(0, 1), ids(0, 0), ids(0, 0)), t(0, 0))


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_wrong_shapes_are_refused(name: str) -> None:
    estimator = ESTIMATORS[name]
    with pytest.raises(ValueError, match="flat"):
        estimator(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 2))
    with pytest.raises(ValueError, match="flat"):
        estimator(torch.zeros(2), torch.zeros(3, dtype=torch.long), torch.ones(2))
    with pytest.raises(ValueError, match="integer"):
        estimator(torch.zeros(2), torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match="integer"):
        estimator(ids(0, 1), ids(0, 0), torch.ones(2))


def test_reinforce_pp_needs_tokens() -> None:
    with pytest.raises(ValueError, match="tokens"):
        ESTIMATORS["reinforce++"](t(0, 1), ids(0, 0))
