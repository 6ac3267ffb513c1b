"""The statistics of the probes, against constants made by hand and against what they must equal."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ccpo.diagnose import moments
from ccpo.diagnose.baseline import baseline, weighted_sums
from ccpo.diagnose.lemma import Evidence, covariance, fractions, paired_draws, sign_flips
from ccpo.diagnose.moments import Estimate, Products, jackknife

torch.set_num_threads(1)
seeds = st.integers(0, 2**30)

G = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 0.0]], dtype=torch.float64)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_three_batches_by_hand():
    """Pairs of 1, 3, 5 multiply to 3, 5 and 15; squares are 1, 9 and 25."""
    p = Products.of(G, G)
    assert moments.signal2(p) == pytest.approx(23 / 3)
    assert moments.variance(p) == pytest.approx(35 / 3 - 23 / 3)
    assert moments.snr2(p) == pytest.approx(23 / 12)
    assert moments.cosine(p) == pytest.approx(1.0)
    assert moments.bias2(p) == pytest.approx(0.0)
    assert moments.cosine(Products.of(G, -2 * G)) == pytest.approx(-1.0)
    assert moments.ratio2(Products.of(G, G)) == pytest.approx(1.0)


def test_the_bias_is_the_sine_of_the_angle():
    turned = torch.tensor([[3.0, 4.0]], dtype=torch.float64) * G[:, :1]
    p = Products.of(turned, G)
    assert moments.cosine(p) == pytest.approx(0.6)
    assert math.sqrt(moments.bias2(p)) == pytest.approx(0.8)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(3, 9), st.integers(1, 5))
def test_the_variance_is_the_unbiased_sample_variance_and_the_rest_is_signal(seed: int, B: int, J: int):
    g_BJ = normal(seed, B, J) + 1
    p = Products.of(g_BJ, g_BJ)
    assert moments.variance(p) == pytest.approx(float(g_BJ.var(0).sum()))
    assert moments.signal2(p) == pytest.approx(float(g_BJ.mean(0).square().sum() - g_BJ.var(0).sum() / B))


@settings(max_examples=30, deadline=None)
@given(seeds, st.floats(0.1, 10))
def test_scale_changes_neither_ratio_nor_angle(seed: int, scale: float):
    g_BJ, r_BJ = normal(seed, 6, 3) + 2, normal(seed + 1, 6, 3) + 2
    for statistic in (moments.snr2, moments.cosine, moments.bias2, moments.ratio2):
        assert statistic(Products.of(scale * g_BJ, r_BJ)) == pytest.approx(statistic(Products.of(g_BJ, r_BJ)))


def test_the_jackknife_of_a_mean_is_its_standard_error():
    """The mean of pairs' products is linear in one batch: for a statistic that is a mean it gives s / sqrt(n)."""
    x_B = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    found = jackknife(lambda p: float(p.gr.diagonal().mean()), Products.of(x_B[:, None], torch.ones(4, 1).double()))
    assert found.value == pytest.approx(4.0)
    assert found.error == pytest.approx(float(x_B.std()) / 2)


def test_errors_cover_the_truth():
    """Of 60 experiments with a known signal of 4 and noise of 3 all but a few lie within two errors."""
    hits = 0
    for seed in range(60):
        g_BJ = normal(seed, 24, 3) + torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64)
        found = jackknife(moments.snr2, Products.of(g_BJ, g_BJ))
        hits += abs(found.value - 4 / 3) < 2 * found.error
    assert 50 <= hits < 60


def test_the_root_of_an_estimate():
    assert Estimate(value=4.0, error=1.0).root() == Estimate(value=2.0, error=0.25)
    assert Estimate(value=-3.0, error=4.0).root() == Estimate(value=0.0, error=1.0)
    assert Estimate(value=0.0, error=0.0).root() == Estimate(value=0.0, error=0.0)
    assert Estimate(value=None, error=None).root().value is None


def test_without_signal_there_is_no_angle():
    g_BJ = torch.tensor([[1.0], [-1.0], [0.0]], dtype=torch.float64)
    assert moments.signal2(Products.of(g_BJ, g_BJ)) < 0
    assert moments.cosine(Products.of(g_BJ, G[:, :1])) is None
    assert jackknife(moments.cosine, Products.of(g_BJ, G[:, :1])) == Estimate(value=None, error=None)
    lone = torch.tensor(
        [[0.0], [0.0], [1.0], [1.1]], dtype=torch.float64
    )  # an angle, until one of two batches is left out
    assert moments.cosine(Products.of(lone, lone)) == pytest.approx(1)
    assert jackknife(moments.cosine, Products.of(lone, lone)) == Estimate(value=None, error=None)
    silent = torch.zeros(3, 1, dtype=torch.float64)
    assert moments.snr2(Products.of(silent, silent)) is None
    with pytest.raises(ValueError, match="B >= 3"):
        Products.of(G[:2], G[:2])


def test_rank_correlation_with_ties():
    """Ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4: covariance 4.5, variances 4.5 and 5."""
    x, y = torch.tensor([1.0, 2.0, 2.0, 9.0]), torch.tensor([0.1, 0.3, 0.2, 0.4])
    assert moments.rank_correlation(x, y) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert moments.rank_correlation(x, -y) == pytest.approx(-4.5 / math.sqrt(4.5 * 5))
    assert moments.rank_correlation(x, torch.ones(4)) is None


def test_the_bootstrap_of_a_mean():
    x = normal(0, 100)
    error = moments.bootstrap_error(lambda units: float(x[units].mean()), 100, rounds=400)
    assert error == pytest.approx(float(x.std()) / 10, rel=0.15)
    assert moments.bootstrap_error(lambda units: None, 5) is None


# ---- Lemma A.1


def test_covariance_by_hand():
    """Scores 1 and -1, values 3 and 1: both lie 1 from their means, on the same side."""
    score_PNJ = torch.tensor([[[1.0], [-1.0]]])
    assert covariance(score_PNJ, torch.tensor([[3.0, 1.0]])).tolist() == [[2.0]]
    assert covariance(score_PNJ, torch.tensor([[1.0, 3.0]])).tolist() == [[-2.0]]
    with pytest.raises(ValueError, match="N >= 2"):
        covariance(score_PNJ[:, :1], torch.ones(1, 1))


def test_which_draws_belong_to_rollouts():
    own = torch.arange(12.0).reshape(2, 3, 2)
    assert paired_draws(own, 3).tolist() == [[0.5, 2.5, 4.5], [6.5, 8.5, 10.5]]
    shared = torch.arange(6.0).reshape(2, 1, 3)
    assert paired_draws(shared, 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert paired_draws(shared, 4) is None
    assert paired_draws(torch.zeros(2, 1, 1), 1) is None


def test_a_counterfactual_that_follows_the_agent_is_found():
    shared_QJ = normal(0, 50, 4) + torch.tensor([2.0, 0, 0, 0], dtype=torch.float64)
    along, size = fractions(-0.5 * shared_QJ, shared_QJ)
    assert along.value == pytest.approx(-0.5)
    assert along.error < 1e-9
    assert size.value == pytest.approx(0.5)
    assert sign_flips(-0.5 * shared_QJ) == pytest.approx(1 / 5000)
    with pytest.raises(ValueError, match="Q >= 3"):
        fractions(shared_QJ[:2], shared_QJ[:2])
    noise_QJ = normal(1, 50, 4)
    noise_QJ = noise_QJ - noise_QJ.mean(0)
    assert fractions(shared_QJ, noise_QJ)[0] == Estimate(value=None, error=None)  # a fraction of no signal


def test_a_dependence_across_the_gradient_is_found_too():
    shared_QJ = normal(0, 60, 4) + torch.tensor([2.0, 0, 0, 0], dtype=torch.float64)
    across_QJ = normal(1, 60, 4) + torch.tensor([0, 1.5, 0, 0], dtype=torch.float64)
    along, size = fractions(across_QJ, shared_QJ)
    assert abs(along.value) < 4 * along.error
    assert size.value == pytest.approx(0.75, abs=4 * size.error)
    assert size.error < 0.2
    assert sign_flips(across_QJ) < 0.001


def test_false_alarms_are_rare_and_nothing_is_no_alarm():
    found = [sign_flips(normal(seed, 30, 3), flips=999) for seed in range(100)]
    assert sum(p < 0.01 for p in found) <= 4
    assert 30 < sum(p < 0.5 for p in found) < 70
    assert sign_flips(torch.zeros(30, 3).double()) == 1.0


def made_up(*, follows: float, per_problem: bool = False, batches: int = 6) -> Evidence:
    """Scores of two numbers; the reward goes with the first, the reward without the agent too, as far as it ``follows``."""
    evidence = Evidence()
    for seed in range(batches):
        score_PNJ = normal(seed, 20, 4, 2)
        reward_PN = score_PNJ[..., 0] + normal(seed + 100, 20, 4)
        without_PN = follows * score_PNJ[..., 0] + 0.5 * normal(seed + 200, 20, 4)
        evidence.add(score_PNJ, reward_PN, without_PN.mean(1)[:, None, None] if per_problem else without_PN[..., None])
    return evidence


@pytest.mark.parametrize("per_problem", [False, True])
def test_evidence_of_many_batches(per_problem: bool):
    guilty, innocent = (made_up(follows=f, per_problem=per_problem).weigh() for f in (0.7, 0.0))
    assert guilty.alarm
    assert not innocent.alarm
    assert guilty.p_along < 1e-4
    assert guilty.problems == 120
    if per_problem:
        assert guilty.p_anywhere is None
        assert guilty.along.value is None
    else:
        assert guilty.p_anywhere < 0.001
        assert abs(guilty.along.value - 0.7) < 4 * guilty.along.error < 0.5
        assert abs(innocent.along.value) < 4 * innocent.along.error
    strict = made_up(follows=0.25, per_problem=per_problem, batches=3)
    once = strict.weigh()
    assert once.alarm or once.p_along > 0.005
    assert not strict.weigh(tests=10**9).alarm  # more tests ask for smaller p-values


# ---- baselines


def test_the_best_baseline_weighs_rewards_by_the_squared_score():
    """Scores 1 and 3: b* = (1 * 1 + 9 * 0)/10, far from the mean reward of 1/2. Removal pays 1 - 0.5 and 0 - 0.5: the second moment
    of the gradient goes from 1 to (0.25 + 9 * 0.25)."""
    score_PNJ = torch.tensor([[[1.0, 0.0], [0.0, 3.0]]])
    reward_PN, without_PN = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])
    sums = weighted_sums(score_PNJ, reward_PN, without_PN)
    found = baseline([sums, sums, sums], 0.5, removed=True)
    assert found.best.value == pytest.approx(0.1)
    assert found.best.error == pytest.approx(0.0)
    assert found.change.value == pytest.approx(2.5 - 1)
    assert baseline([sums] * 3, 0.5, removed=False).change is None


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_the_change_is_that_of_the_second_moment(seed: int):
    score_PNJ, reward_PN, without_PN = normal(seed, 3, 4, 2), normal(seed + 1, 3, 4), normal(seed + 2, 3, 4)
    weight_PN = score_PNJ.square().sum(2)
    before, after = (float((weight_PN * x.square()).mean()) for x in (reward_PN, reward_PN - without_PN))
    found = baseline([weighted_sums(score_PNJ, reward_PN, without_PN)] * 3, 0.0, removed=True)
    assert found.change.value == pytest.approx(after / before - 1)
