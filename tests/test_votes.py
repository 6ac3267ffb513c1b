"""Counting votes: hand constants, a loop to compare with, and invariants."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ccpo.teams import Ballot, Decided, Majority, Sampled, Weighted
from ccpo.teams.votes import CELLS, majority_BK, recount_without, tally, with_and_without

torch.set_num_threads(1)
KINDS = ("majority", "weighted", "sampled")


def reward(answers, scores, weights=None, kind="majority") -> float:
    w = None if weights is None else torch.tensor([weights], dtype=torch.float64)
    return majority_BK(torch.tensor([answers]), torch.tensor([scores], dtype=torch.float64), w, kind).item()


def loop(answers, scores, weights, kind) -> float:
    """The same rule written out for one row: classes, their support, the mean score of each."""
    support, found = defaultdict(float), defaultdict(list)
    for a, s, w in zip(answers, scores, weights, strict=True):
        if a >= 0:
            support[a] += 1.0 if kind == "majority" else w
            found[a].append(s)
    if not support:
        return 0.0
    if kind == "sampled":
        return sum(support[a] * sum(s) / len(s) for a, s in found.items()) / sum(support.values())
    best = max(support.values())
    tied = [a for a in support if support[a] > best - 1e-9]
    return sum(sum(found[a]) / len(found[a]) for a in tied) / len(tied)


@pytest.mark.parametrize(
    ("answers", "scores", "expected"),
    [
        ([0, 0, 1], [1.0, 1.0, 0.0], 1.0),
        ([0, 1, 1], [1.0, 0.0, 0.0], 0.0),
        ([0, 1, 2], [1.0, 0.0, 0.0], 1 / 3),  # three answers tie
        ([0, 0, 1, 1], [1.0, 1.0, 0.0, 0.0], 1 / 2),
        ([0, 0, 1, 1, 2], [0.0, 0.0, 1.0, 1.0, 1.0], 1 / 2),  # the fifth has lost
        ([0, -1, -1], [1.0, 0.0, 0.0], 1.0),  # abstentions are no votes
        ([-1, -1, -1], [1.0, 1.0, 1.0], 0.0),  # nobody has voted
        ([0, 1], [0.25, 0.75], 0.5),  # rewards are real numbers
    ],
)
def test_majority_by_hand(answers, scores, expected):
    assert reward(answers, scores) == pytest.approx(expected, abs=1e-9)


def test_weights_decide_and_shares_pay_by_hand():
    assert reward([0, 1, 1], [1.0, 0.0, 0.0], [0.9, 0.4, 0.4], "weighted") == 1.0  # 0.9 against 0.8
    assert reward([0, 1, 1], [1.0, 0.0, 0.0], [0.8, 0.4, 0.4], "weighted") == pytest.approx(0.5)  # a tie
    assert reward([0, 1, 1], [1.0, 0.0, 0.0], None, "sampled") == pytest.approx(1 / 3)
    assert reward([0, 1, 1], [1.0, 0.0, 0.0], [2.0, 1.0, 1.0], "sampled") == pytest.approx(1 / 2)
    assert reward([-1, 1], [1.0, 1.0], [5.0, 0.0], "sampled") == 0.0  # no weight is left


def test_the_winning_votes_are_named():
    winner_BK = tally(torch.tensor([[0, 0, 1], [0, 1, -1], [-1, -1, -1]]), torch.zeros(3, 3)).winner_BK
    assert winner_BK.tolist() == [[True, True, False], [True, True, False], [False, False, False]]


def test_recount_by_hand():
    """Two right votes against one wrong: without a right voter there is a tie, without the wrong one no change."""
    rewards = recount_without(torch.tensor([[0, 0, 1], [0, -1, -1]]), torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    torch.testing.assert_close(rewards, torch.tensor([[0.5, 0.0], [0.5, 1.0], [1.0, 1.0]]))


rows = st.lists(
    st.tuples(st.integers(-1, 3), st.floats(0, 1), st.sampled_from([0.1, 0.25, 0.5, 1.0])), min_size=1, max_size=7
)


@settings(max_examples=150, deadline=None)
@given(rows, st.sampled_from(KINDS), st.randoms(use_true_random=False))
def test_equal_to_the_loop_and_blind_to_the_order_of_voters(row, kind, random):
    answers, scores, weights = (list(column) for column in zip(*row, strict=True))
    given_weights = None if kind == "majority" else weights
    expected = loop(answers, scores, weights, kind)
    assert reward(answers, scores, given_weights, kind) == pytest.approx(expected, abs=1e-6)
    random.shuffle(row)
    answers, scores, weights = (list(column) for column in zip(*row, strict=True))
    assert reward(answers, scores, None if kind == "majority" else weights, kind) == pytest.approx(expected, abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(rows, st.sampled_from(KINDS))
def test_a_recount_is_the_vote_of_the_others(row, kind):
    answers, scores, weights = (list(column) for column in zip(*row, strict=True))
    recounts = recount_without(
        torch.tensor([answers]),
        torch.tensor([scores], dtype=torch.float64),
        None if kind == "majority" else torch.tensor([weights], dtype=torch.float64),
        kind,
    )
    for k in range(len(row)):
        left = [v for i, v in enumerate(row) if i != k]
        expected = loop(*zip(*left, strict=True), kind) if left else 0.0
        assert recounts[k, 0].item() == pytest.approx(expected, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1)), min_size=1, max_size=6), st.sampled_from(KINDS))
def test_an_abstention_changes_nothing_and_rewards_stay_in_range(row, kind):
    answers, scores = (list(column) for column in zip(*row, strict=True))
    before = reward(answers, scores, None if kind == "majority" else [1.0] * len(row), kind)
    assert reward(
        [*answers, -1], [*scores, 1.0], None if kind == "majority" else [1.0] * (len(row) + 1), kind
    ) == pytest.approx(before, abs=1e-6)
    assert -1e-9 <= before <= 1 + 1e-9


def test_rows_do_not_mix():
    torch.manual_seed(0)
    answers, scores = torch.randint(-1, 3, (200, 5)), torch.rand(200, 5)
    together = majority_BK(answers, scores)
    alone = torch.cat([majority_BK(answers[i : i + 1], scores[i : i + 1]) for i in range(200)])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(
    ("answers", "scores", "weights", "kind", "words"),
    [
        ([0, 1], [1.0, 0.0], None, "majority", "B, K"),
        ([[0, 1]], [[1.0]], None, "majority", "B, K"),
        ([[]], [[]], None, "majority", "at least one voter"),
        ([[0, 1]], [[1.0, 0.0]], None, "majorty", "majority, weighted, sampled"),
        ([[0.0, 1.0]], [[1.0, 0.0]], None, "majority", "integers"),
        ([[0, 1]], [[1, 0]], None, "majority", "floats"),
        ([[0, 1]], [[1.0, 0.0]], [[1.0, 1.0]], "majority", "takes no weights"),
        ([[0, 1]], [[1.0, 0.0]], None, "weighted", "needs weight_BK"),
        ([[0, 1]], [[1.0, 0.0]], [[1.0]], "weighted", "shape of the answers"),
        ([[0, 1]], [[1.0, 0.0]], [[1.0, -1.0]], "weighted", "not negative"),
        ([[0, 1]], [[1.0, 0.0]], [[1.0, float("nan")]], "sampled", "finite"),
    ],
)
def test_votes_that_cannot_be_counted(answers, scores, weights, kind, words):
    answers = torch.tensor(answers, dtype=torch.long) if answers == [[]] else torch.tensor(answers)
    weights = None if weights is None else torch.tensor(weights)
    for count in (majority_BK, recount_without):
        with pytest.raises(ValueError, match=words):
            count(answers, torch.tensor(scores), weights, kind)


def test_many_rows_are_counted_in_pieces_like_one():
    """More rows than one piece holds; the recount too."""
    torch.manual_seed(1)
    answers, scores = torch.randint(-1, 4, (40_000, 3)), torch.rand(40_000, 3)
    edge = CELLS // 3
    picked = torch.tensor([0, edge - 1, edge, 39_999])
    torch.testing.assert_close(majority_BK(answers, scores)[picked], majority_BK(answers[picked], scores[picked]))
    torch.testing.assert_close(
        recount_without(answers, scores)[:, picked], recount_without(answers[picked], scores[picked])
    )


def test_answers_are_told_apart_however_they_are_numbered():
    """Numbers that float32 would round to one, and options that are more than the voters."""
    answers, scores = torch.randint(-1, 3, (300, 4)), torch.rand(300, 4)
    for first, apart in ((5, 1), (2**24, 1), (2**60, 1), (0, 2**40)):
        renamed = torch.where(answers < 0, -7, first + apart * answers)
        for count in (majority_BK, recount_without):
            torch.testing.assert_close(count(renamed, scores), count(answers, scores))


@pytest.mark.parametrize("kind", ["majority", "weighted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_voter_who_changes_nothing_is_paid_exactly_nothing(kind, dtype):
    """Rounding would be a spread within a group, and an estimator would divide by it."""
    torch.manual_seed(2)
    answers = torch.randint(-1, 3, (500, 9))
    weights = torch.ones(500, 9) if kind == "weighted" else None
    reward_B, without_KB = with_and_without(answers, (answers == 0).to(dtype), weights, kind)
    credit_KB = reward_B - without_KB
    assert (credit_KB == 0).any()
    assert not ((credit_KB != 0) & (credit_KB.abs() < 1e-3)).any()


def test_decisions_count_with_the_same_rule():
    def ballot(turn, answer, score, weight=1.0):
        return Ballot(turn=turn, answer=answer, score=score, weight=weight)

    right, wrong, none = ballot("a", "5", 1.0, 0.9), ballot("b", "7", 0.0, 0.4), ballot("c", None, 0.0)
    vote = Majority(("a", "b", "c"))
    assert vote.decide([right, ballot("c", "5", 1.0), wrong]) == Decided(reward=1.0, answer="5")
    assert vote.decide([right, wrong, none]).reward == pytest.approx(0.5)
    assert vote.decide([none]) == Decided(reward=0.0, answer=None)
    assert vote.decide([]) == Decided(reward=0.0, answer=None)
    assert vote.decide([right, wrong, none]).answer == "5"  # of tied answers the first in alphabetical order
    assert vote.decide([wrong, right]) == vote.decide([right, wrong])
    many = vote.decide_many([[right], [], [wrong, none, right]])
    assert many == [vote.decide([right]), vote.decide([]), vote.decide([wrong, none, right])]
    weighted = Weighted(("a", "b", "c"))
    assert weighted.decide([right, wrong, ballot("c", "7", 0.0, 0.4)]) == Decided(reward=1.0, answer="5")
    assert Sampled(("a", "b")).decide([right, wrong]).reward == pytest.approx(0.5)  # by votes, not by confidence
    assert vote.without({"a"}) == Majority(("b", "c"))
    assert vote.without({"a", "b", "c"}) is None
