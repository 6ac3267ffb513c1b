"""What the paper proves (arXiv 2603.21563), held against the code on games where every expectation is a finite sum.

A game is a list of outcomes with probabilities. Each outcome has the joint reward ``R``, the counterfactual reward
``R_without`` and the score ``g`` of the agent's own sample: the gradient of its log-probability.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ccpo.credit import ESTIMATORS, CCPOv1, CCPOv2, RemovalCredit, ReplayCredit, Shapley, SharedReward
from ccpo.credit.telemetry import correlation
from ccpo.types import CreditInputs, TreePlace

torch.set_num_threads(1)
unit = st.floats(0, 1)
seeds = st.integers(0, 2**30)


@dataclass(frozen=True, slots=True, kw_only=True)
class Game:
    """All outcomes of a game: probability, joint reward, counterfactual reward, score ``[outcome, parameter]``."""

    prob: Tensor
    joint: Tensor
    without: Tensor
    score: Tensor

    def mean(self, values: Tensor) -> Tensor:
        return torch.tensordot(self.prob, values, dims=1)

    def credit(self, rule: object) -> Tensor:
        """What the library's rule pays in each outcome."""
        inputs = CreditInputs(
            agents=("thinker", "solver"),
            decider="solver",
            active=("thinker",),
            reward_PN=self.joint[:, None],
            without={("thinker",): self.without[:, None, None]},
        )
        outputs, _ = rule(inputs, {})  # type: ignore[operator]
        return outputs.credit["thinker"][:, 0]

    def gradient(self, credit: Tensor) -> Tensor:
        return self.mean(self.score * credit[:, None])

    def variance(self, credit: Tensor) -> float:
        squared = self.mean((self.score * credit[:, None]).square().sum(1))
        return float(squared - self.gradient(credit).square().sum())

    def norm2(self) -> Tensor:
        return self.score.square().sum(1)


def score_of(logits: Tensor, action: int) -> Tensor:
    """Gradient of ``log softmax(logits)[action]``."""
    return torch.eye(logits.numel(), dtype=torch.float64)[action] - logits.softmax(0)


def think_solve_game(seed: int, *, echo: bool = False) -> Game:
    """A thought a, an answer b that depends on it, a solo answer s that does not; with ``echo`` the solo answer does
    depend on the thought, as it would if something of the thought were left in the solver's context."""
    generator = torch.Generator().manual_seed(seed)
    thoughts, answers = 3, 2
    logits = torch.randn(thoughts, generator=generator, dtype=torch.float64)
    solve = torch.randn(thoughts, answers, generator=generator, dtype=torch.float64).softmax(1)
    alone = torch.randn(thoughts, answers, generator=generator, dtype=torch.float64).softmax(1)
    reward = torch.rand(thoughts, answers, generator=generator, dtype=torch.float64)
    solo_reward = torch.rand(answers, generator=generator, dtype=torch.float64)
    rows = []
    for a, b, s in itertools.product(range(thoughts), range(answers), range(answers)):
        prob = logits.softmax(0)[a] * solve[a, b] * alone[a if echo else 0, s]
        rows.append((prob, reward[a, b], solo_reward[s], score_of(logits, a)))
    prob, joint, without, score = (torch.stack(column) for column in zip(*rows, strict=True))
    return Game(prob=prob, joint=joint, without=without, score=score)


def voting_game(seed: int, options: int = 3, voters: int = 3) -> Game:
    """Option 0 is right; the first voter is the agent; a tie pays the share of the right answer."""
    logits = torch.randn(voters, options, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = []
    for votes in itertools.product(range(options), repeat=voters):
        prob = torch.stack([logits[i].softmax(0)[v] for i, v in enumerate(votes)]).prod()
        rows.append((prob, plurality(votes), plurality(votes[1:]), score_of(logits[0], votes[0])))
    prob, joint, without, score = zip(*rows, strict=True)
    return Game(
        prob=torch.stack(prob),
        joint=torch.tensor(joint, dtype=torch.float64),
        without=torch.tensor(without, dtype=torch.float64),
        score=torch.stack(score),
    )


def plurality(votes: tuple[int, ...]) -> float:
    top = max(votes.count(v) for v in votes)
    tied = {v for v in votes if votes.count(v) == top}
    return (0 in tied) / len(tied)


GAMES = {"think_solve": think_solve_game, "voting": voting_game}


# ---- Lemma A.1


@pytest.mark.parametrize("game", list(GAMES))
@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_lemma_a1_the_counterfactual_does_not_bend_the_gradient(game: str, seed: int) -> None:
    found = GAMES[game](seed)
    assert float(found.prob.sum()) == pytest.approx(1.0)
    plain = found.gradient(found.credit(SharedReward()))
    removal = found.gradient(found.credit(RemovalCredit()))
    torch.testing.assert_close(removal, plain, atol=1e-12, rtol=0)
    assert float(plain.abs().max()) > 1e-6  # there is a gradient to bend


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_a_counterfactual_that_hears_the_agent_is_biased_by_exactly_its_own_gradient(seed: int) -> None:
    game = think_solve_game(seed, echo=True)
    bias = game.gradient(game.credit(RemovalCredit())) - game.gradient(game.joint)
    torch.testing.assert_close(bias, -game.gradient(game.without), atol=1e-12, rtol=0)


def test_the_bias_of_a_counterfactual_that_hears_the_agent_is_not_small() -> None:
    game = think_solve_game(0, echo=True)
    bias = game.gradient(game.credit(RemovalCredit())) - game.gradient(game.joint)
    assert float(bias.norm()) > 0.1 * float(game.gradient(game.joint).norm())


class TinyModel(nn.Module):
    """A recurrent language model over three tokens; it speaks two."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 6)
        self.cell = nn.GRUCell(6, 6)
        self.head = nn.Linear(6, 3)

    def logprob(self, text: tuple[int, int]) -> Tensor:
        hidden, total, last = torch.zeros(1, 6), torch.zeros(()), 3
        for token in text:
            hidden = self.cell(self.embed(torch.tensor([last])), hidden)
            total = total + self.head(hidden).log_softmax(-1)[0, token]
            last = token
        return total


def tiny_model_game(solo: float | None = None) -> Game:
    """All texts of the tiny model; the solo reward is 1 with probability 0.6 and else 0, or always ``solo``."""
    torch.manual_seed(0)
    model = TinyModel()
    reward = torch.rand(3, 3)
    rows = []
    for text in itertools.product(range(3), repeat=2):
        logprob = model.logprob((text[0], text[1]))
        gradient = torch.autograd.grad(logprob, list(model.parameters()))
        score = torch.cat([g.flatten() for g in gradient])
        for alone, chance in ((0.0, 0.4), (1.0, 0.6)) if solo is None else ((solo, 1.0),):
            rows.append((logprob.detach().exp() * chance, reward[text], torch.tensor(alone), score))
    prob, joint, without, score = (torch.stack(column).double() for column in zip(*rows, strict=True))
    return Game(prob=prob / prob.sum(), joint=joint, without=without, score=score)


def test_lemma_a1_on_a_real_model_every_parameter() -> None:
    game = tiny_model_game()
    plain, removal = game.gradient(game.joint), game.gradient(game.credit(RemovalCredit()))
    assert plain.numel() > 200
    torch.testing.assert_close(removal, plain, atol=1e-7, rtol=0)  # the model is float32
    assert float(plain.norm()) > 1e-3


def test_lemma_a1_on_a_real_model_by_sampling() -> None:
    game = tiny_model_game()
    rows = torch.multinomial(game.prob, 20_000, replacement=True, generator=torch.Generator().manual_seed(1))
    credit = game.credit(RemovalCredit())
    direction = game.gradient(game.joint) / game.gradient(game.joint).norm()
    sampled = (game.score @ direction * credit)[rows]
    error = float(sampled.std() / math.sqrt(rows.numel()))
    truth = float(game.gradient(game.joint).norm())
    assert abs(float(sampled.mean()) - truth) < 5 * error
    assert truth > 5 * error  # the other sign would have been noticed


# ---- Theorem 5.3


def closeness(game: Game) -> tuple[float, float, float]:
    """``|g|^2``-weighted mean squares of ``R_without - b*`` and of ``0 - b*``, and ``E[|g|^2 (R - b*) R_without]``."""
    weight = game.norm2()
    best = game.mean(weight * game.joint) / game.mean(weight)
    near = game.mean(weight * (game.without - best).square())
    far = game.mean(weight) * best.square()
    return float(near), float(far), float(game.mean(weight * (game.joint - best) * game.without))


def exact_condition(game: Game) -> float:
    return float(game.mean(game.norm2() * game.without * (game.without - 2 * game.joint)))


@pytest.mark.parametrize("game", list(GAMES))
@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_the_exact_condition_is_the_change_of_variance(game: str, seed: int) -> None:
    found = GAMES[game](seed)
    change = found.variance(found.credit(RemovalCredit())) - found.variance(found.joint)
    assert change == pytest.approx(exact_condition(found), abs=1e-10)


@pytest.mark.parametrize("game", list(GAMES))
@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_theorem_5_3(game: str, seed: int) -> None:
    found = GAMES[game](seed)
    near, far, cross = closeness(found)
    if near < far and cross >= -1e-12:
        assert found.variance(found.credit(RemovalCredit())) <= found.variance(found.joint) + 1e-12


@settings(max_examples=40, deadline=None)
@given(seed=seeds)
def test_independent_solo_draws_meet_the_second_condition_with_equality(seed: int) -> None:
    assert closeness(think_solve_game(seed))[2] == pytest.approx(0.0, abs=1e-12)


def test_theorem_5_3_on_a_real_model_exactly_and_by_sampling() -> None:
    """Every parameter of the model: the total variance of the gradient, and what 20,000 samples say of it."""
    game = tiny_model_game(solo=0.5)
    near, far, cross = closeness(game)
    assert near < far
    assert cross == pytest.approx(0, abs=1e-9)  # what the agent says does not change it
    removal, shared = (game.variance(game.credit(rule)) for rule in (RemovalCredit(pairing="mean"), SharedReward()))
    assert removal < shared
    assert removal - shared == pytest.approx(exact_condition(game), abs=1e-6)  # the model is float32
    rows = torch.multinomial(game.prob, 20_000, replacement=True, generator=torch.Generator().manual_seed(2))
    squares = [(game.norm2() * game.credit(rule).square())[rows] for rule in (RemovalCredit(), SharedReward())]
    saved = squares[1] - squares[0]  # the mean gradients are the same (Lemma A.1)
    error = float(saved.std() / math.sqrt(rows.numel()))
    assert abs(float(saved.mean()) - (shared - removal)) < 5 * error
    assert shared - removal > 5 * error  # the other sign would have been noticed


def test_theorem_5_3_is_not_empty() -> None:
    """Among the games both outcomes occur: removal that helps and removal that does not."""
    for build in GAMES.values():
        games = [build(seed) for seed in range(40)]
        assert any(exact_condition(game) < -1e-3 for game in games)
    assert any(exact_condition(think_solve_game(seed)) > 1e-3 for seed in range(200))


def test_the_counterexample_to_closeness_alone() -> None:
    """``R = 1 - u``, ``R_without = 0.9 u``, u a fair coin, g = +-1: closer to b* than 0 is, and yet more variance."""
    u = torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    game = Game(
        prob=torch.full((4,), 0.25, dtype=torch.float64),
        joint=1 - u,
        without=0.9 * u,
        score=torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64),
    )
    near, far, cross = closeness(game)
    assert (near, far) == (pytest.approx(0.205), pytest.approx(0.25))
    assert game.variance(game.credit(RemovalCredit())) == pytest.approx(0.905)
    assert game.variance(game.joint) == pytest.approx(0.5)
    assert cross < 0  # the condition that the theorem's wording leaves out
    assert exact_condition(game) == pytest.approx(0.405)


# ---- what group normalisation does to a counterfactual


def one_problem(joint: list[float], solo: list[float]) -> CreditInputs:
    return CreditInputs(
        agents=("thinker", "solver"),
        decider="solver",
        active=("thinker", "solver"),
        reward_PN=torch.tensor([joint], dtype=torch.float64),
        without={("thinker",): torch.tensor([[solo]], dtype=torch.float64)},
    )


def paid(rule: object, inputs: CreditInputs, estimator: str, agent: str = "thinker") -> Tensor:
    outputs, _ = rule(inputs, {})  # type: ignore[operator]
    credit_B = outputs.credit[agent].flatten()
    return ESTIMATORS[estimator](credit_B, torch.zeros(credit_B.numel(), dtype=torch.long))


binary = st.lists(st.sampled_from([0.0, 1.0]), min_size=8, max_size=8)


@given(binary, binary)
def test_v2_thinker_under_grpo_is_shared_reward(joint: list[float], solo: list[float]) -> None:
    inputs = one_problem(joint, solo)
    shared = paid(CCPOv2(), inputs, "grpo", "solver")  # the solver is paid the reward itself, mapped to +-1
    torch.testing.assert_close(paid(CCPOv2(), inputs, "grpo"), shared, atol=1e-6, rtol=0)


@given(binary, binary)
def test_v2_thinker_under_dr_grpo_is_shared_reward_times_a_constant(joint: list[float], solo: list[float]) -> None:
    inputs = one_problem(joint, solo)
    factor = 1.0 if sum(solo) == 4 else 1.1
    shared = paid(CCPOv2(), inputs, "dr_grpo", "solver")
    torch.testing.assert_close(paid(CCPOv2(), inputs, "dr_grpo"), factor * shared)


@given(st.lists(unit, min_size=4, max_size=4), st.lists(unit, min_size=6, max_size=6))
@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
def test_a_mean_solo_cancels_whatever_the_rewards(estimator: str, joint: list[float], solo: list[float]) -> None:
    joint = [round(x, 3) for x in joint]  # spreads of the size of rounding have no deviation to speak of
    inputs = one_problem(joint, solo)
    shared = paid(SharedReward(), inputs, estimator)
    torch.testing.assert_close(paid(RemovalCredit(pairing="mean"), inputs, estimator), shared, atol=1e-6, rtol=0)


@given(binary, binary)
def test_an_increasing_shaping_of_two_values_cancels_too(joint: list[float], solo: list[float]) -> None:
    inputs = one_problem(joint, solo)
    shaped = paid(CCPOv1(pairing="mean", history=False), inputs, "grpo")
    torch.testing.assert_close(shaped, paid(SharedReward(), inputs, "grpo"), atol=1e-5, rtol=0)


def test_what_does_not_cancel() -> None:
    graded = one_problem([0.0, 0.5, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0])
    right = one_problem([0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0])

    def likeness(rule: object, inputs: CreditInputs, estimator: str) -> float:
        corr = correlation(paid(rule, inputs, estimator), paid(SharedReward(), inputs, estimator))
        assert corr is not None
        return corr

    assert likeness(RemovalCredit(pairing="paired"), right, "grpo") < 0.99
    assert likeness(CCPOv1(pairing="mean", history=False), graded, "grpo") < 0.99999
    assert likeness(CCPOv2(), right, "grpo") > 1 - 1e-9
    raw = paid(RemovalCredit(pairing="mean"), right, "none")
    assert float(raw.mean()) == pytest.approx(0.5)  # without a group baseline the counterfactual stays


# ---- how much noise it takes away (signal-to-noise of one agent's gradient, 40,000 problems, N = 8)

PROBLEMS, SAMPLES = 40_000, 8


def signal_to_noise(score_PN: Tensor, credit_PN: Tensor, *, centred: bool) -> float:
    if centred:
        credit_PN = credit_PN - credit_PN.mean(1, keepdim=True)
    gradient_P = (score_PN * credit_PN).mean(1)
    return float(gradient_P.mean() / gradient_P.std())


def plurality_PN(vote_PNK: Tensor, options: int) -> Tensor:
    count_PNV = torch.stack([(vote_PNK == v).sum(-1) for v in range(options)], -1)
    tied_PNV = count_PNV == count_PNV.amax(-1, keepdim=True)
    return tied_PNV[..., 0].float() / tied_PNV.sum(-1)


@pytest.mark.parametrize(
    ("p", "shared", "removal", "removal_centred", "own"),
    [(0.3, 1.31, 2.11, 2.03, 2.76), (0.5, 1.54, 2.90, 2.63, 5.34), (0.7, 1.06, 2.37, 1.70, 2.75)],
)
def test_voting_table(p: float, shared: float, removal: float, removal_centred: float, own: float) -> None:
    """Three voters, five options; a voter is right with probability p and else picks one of the wrong options."""
    generator = torch.Generator().manual_seed(0)
    right = torch.rand(PROBLEMS, SAMPLES, 3, generator=generator) < p
    wrong = torch.randint(1, 5, right.shape, generator=generator)
    vote = torch.where(right, torch.zeros_like(wrong), wrong)
    inputs = CreditInputs(
        agents=("a", "b", "c"),
        decider=None,
        active=("a",),
        reward_PN=plurality_PN(vote, 5),
        without={("a",): plurality_PN(vote[:, :, 1:], 5)[:, :, None]},
    )
    credit = {rule: rule(inputs, {})[0].credit["a"] for rule in (SharedReward(), RemovalCredit(pairing="paired"))}
    joint, delta = credit.values()
    own_PN = right[:, :, 0].float()
    score = own_PN - p
    found = [
        signal_to_noise(score, joint, centred=True),
        signal_to_noise(score, delta, centred=False),
        signal_to_noise(score, delta, centred=True),
        signal_to_noise(score, own_PN, centred=True),
    ]
    assert found == pytest.approx([shared, removal, removal_centred, own], rel=0.04)
    assert 2.5 < (found[1] / found[0]) ** 2 < 5.2  # how many times fewer rollouts for the same precision


@pytest.mark.parametrize(("p", "raw", "centred"), [(0.3, 2.21, 2.65), (0.5, 4.12, 4.47), (0.7, 8.85, 2.65)])
def test_voting_table_of_the_shapley_value(p: float, raw: float, centred: float) -> None:
    generator = torch.Generator().manual_seed(0)
    right = torch.rand(PROBLEMS, SAMPLES, 3, generator=generator) < p
    vote = torch.where(right, 0, torch.randint(1, 5, right.shape, generator=generator))
    inputs = CreditInputs(
        agents=("a", "b", "c"),
        decider=None,
        active=("a",),
        reward_PN=plurality_PN(vote, 5),
        without={
            tuple("abc"[k] for k in (0, 1, 2) if k not in left): plurality_PN(vote[:, :, left], 5)[:, :, None]
            for left in ([0], [1], [2], [0, 1], [0, 2], [1, 2])
        },
    )
    paid, score = Shapley()(inputs, {})[0].credit["a"], right[:, :, 0].float() - p
    assert [signal_to_noise(score, paid, centred=c) for c in (False, True)] == pytest.approx([raw, centred], rel=0.04)
    # another objective: the mean over the teams of one, two and three in which the voter could be
    pair, team = ((score * plurality_PN(vote[:, :, :k], 5)).mean() for k in (2, 3))
    assert float((score * paid).mean()) == pytest.approx(float((p * (1 - p) + pair + team) / 3), rel=0.02)


THINK_SOLVE_TABLE = {
    "shared reward, no baseline": 0.56,
    "shared reward, group mean removed": 0.78,
    "removal, paired solo, no baseline": 0.59,
    "nested, N/2 thoughts x 2 answers, group mean removed": 0.70,
    "v1 paired, history alone": 0.60,
    "removal, paired solo, group mean removed": 0.56,
    "removal, mean solo, no baseline": 0.77,
    "v1 paired, then group normalisation": 0.56,
    "v1 mean solo, history alone": 0.80,
}


def test_think_solve_table() -> None:
    """A game that gives these numbers within 3%: a thought is good with probability 1/2; an answer is right with 0.66 after a
    good one, 0.375 after a bad one, and 0.38 alone."""
    P = 4 * PROBLEMS
    u = torch.rand(5, P, SAMPLES, generator=torch.Generator().manual_seed(0))
    good, nested = (u[0] < 0.5).float(), (u[3, :, : SAMPLES // 2] < 0.5).float().repeat_interleave(2, dim=1)
    inputs = CreditInputs(
        agents=("thinker", "solver"),
        decider="solver",
        active=("thinker",),
        reward_PN=(u[1] < 0.375 + 0.285 * good).float(),
        without={("thinker",): (u[2] < 0.38).float()[:, None, :]},
    )
    group = torch.arange(P).repeat_interleave(SAMPLES)

    def credit(rule: object) -> Tensor:
        state = rule(inputs, {})[1]  # type: ignore[operator]  # a history that has seen one batch
        return rule(inputs, state)[0].credit["thinker"]  # type: ignore[operator]

    def ratio(rule: object, *, centred: bool = False) -> float:
        return signal_to_noise(good - 0.5, credit(rule), centred=centred)

    normalised = ESTIMATORS["grpo"](credit(CCPOv1(pairing="paired")).flatten(), group).view(P, SAMPLES)
    paired, mean = RemovalCredit(pairing="paired"), RemovalCredit(pairing="mean")
    found = [
        ratio(SharedReward()),
        ratio(SharedReward(), centred=True),
        ratio(paired),
        signal_to_noise(nested - 0.5, (u[4] < 0.375 + 0.285 * nested).float(), centred=True),
        ratio(CCPOv1(pairing="paired")),
        ratio(paired, centred=True),
        ratio(mean),
        signal_to_noise(good - 0.5, normalised, centred=False),
        ratio(CCPOv1(pairing="mean")),
    ]
    assert found == pytest.approx(list(THINK_SOLVE_TABLE.values()), rel=0.03)


def test_think_solve_ranking() -> None:
    """A thought is good with probability 1/2; an answer is right with 0.75 after a good one, 0.45 after a bad one,
    and 0.35 alone."""
    u = torch.rand(3, PROBLEMS, SAMPLES, generator=torch.Generator().manual_seed(0))
    good = (u[0] < 0.5).float()
    inputs = CreditInputs(
        agents=("thinker", "solver"),
        decider="solver",
        active=("thinker",),
        reward_PN=(u[1] < 0.45 + 0.3 * good).float(),
        without={("thinker",): (u[2] < 0.35).float()[:, None, :]},
    )
    score = good - 0.5

    def ratio(rule: object, *, centred: bool) -> float:
        outputs, _ = rule(inputs, {})  # type: ignore[operator]
        return signal_to_noise(score, outputs.credit["thinker"], centred=centred)

    shared, shared_centred = (ratio(SharedReward(), centred=c) for c in (False, True))
    paired, paired_centred = (ratio(RemovalCredit(pairing="paired"), centred=c) for c in (False, True))
    mean, mean_centred = (ratio(RemovalCredit(pairing="mean"), centred=c) for c in (False, True))
    # by hand, g = +-1/2: E[gR] = 0.25 * 0.3 = 0.075; E[R^2] = 0.6; E[(R - solo)^2] = 0.6 + 0.35 - 2 * 0.6 * 0.35 = 0.53
    signal = 0.25 * 0.3
    assert shared == pytest.approx(math.sqrt(8) * signal / math.sqrt(0.25 * 0.6 - signal**2), rel=0.04)
    assert paired == pytest.approx(math.sqrt(8) * signal / math.sqrt(0.25 * 0.53 - signal**2), rel=0.04)
    assert mean_centred == pytest.approx(shared_centred, rel=1e-4)  # cancelled
    assert mean > 1.2 * paired  # the same counterfactual with less noise
    assert mean > 0.85 * shared_centred  # nearly as good as a group baseline, where there is none
    assert paired_centred < 0.8 * shared_centred  # on top of a group baseline a paired draw only adds noise


# ---- replay: a text's worth in the situation that did occur (C3, arXiv 2603.06859)

TREE = (2, 2, 2)
TEXTS = 2


def chain_game(seed: int) -> tuple[list[Tensor], Tensor]:
    """Three agents in a chain, two texts each: logits of a text given all before it, and the reward of the three texts."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [[TEXTS] * (level + 1) for level in range(3)]
    logits = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return logits, torch.rand([TEXTS] * 3, generator=generator, dtype=torch.float64)


def every_tree(logits: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """All trees of 2 x 2 x 2 rollouts: the probability of each, and each rollout's text at the three levels, ``[tree, rollout]``."""
    nodes = [math.prod(TREE[: level + 1]) for level in range(3)]
    picks = torch.cartesian_prod(*[torch.arange(TEXTS)] * sum(nodes))
    texts = [part.repeat_interleave(8 // n, dim=1) for part, n in zip(picks.split(nodes, dim=1), nodes, strict=True)]
    prob = torch.ones(len(picks), dtype=torch.float64)
    for level, count in enumerate(nodes):
        chosen = logits[level].softmax(-1)[tuple(texts[: level + 1])]
        prob = prob * chosen[:, :: 8 // count].prod(1)  # a shared text is drawn once
    return prob, texts


@pytest.mark.parametrize("seed", range(3))
def test_replay_is_the_exact_conditional_value(seed: int) -> None:
    """``E[credit | what was said] = E[R | said before, and the text] - E[R | said before]``, for every agent and text, over all trees;
    so its gradient is that of the expected reward."""
    agents = ("a", "b", "c")
    logits, reward = chain_game(seed)
    prob, texts = every_tree(logits)
    assert float(prob.sum()) == pytest.approx(1)
    inputs = CreditInputs(
        agents=agents,
        decider="c",
        active=agents,
        reward_PN=reward[tuple(texts)],
        turns={agent: (agent,) for agent in agents},
        tree={
            agent: TreePlace(contexts=contexts, siblings=2, plays=plays)
            for agent, contexts, plays in zip(agents, (1, 2, 4), (4, 2, 1), strict=True)
        },
    )
    outputs, _ = ReplayCredit()(inputs, {})
    worth = reward  # E[R | the texts up to a level]
    for level in (2, 1, 0):
        before = (worth * logits[level].softmax(-1)).sum(-1)  # E[R | the texts before it]
        paid = outputs.turn_credit[agents[level]]
        sizes = []
        for said in itertools.product(range(TEXTS), repeat=level + 1):
            happened = torch.stack([texts[depth] == text for depth, text in enumerate(said)]).all(0)
            weight = prob[:, None] * happened
            expected = float(worth[said] - before[said[:-1]])
            assert float((weight * paid).sum() / weight.sum()) == pytest.approx(expected, abs=1e-12)
            sizes.append(abs(expected))
        assert max(sizes) > 0.01  # the sign could be told
        worth = before
    leaf = [x.clone().requires_grad_() for x in logits]
    value = reward
    for level in (2, 1, 0):
        value = (value * leaf[level].softmax(-1)).sum(-1)
    truth = torch.autograd.grad(value, leaf)
    for level, agent in enumerate(agents):
        place = tuple(texts[: level + 1])
        logprob = leaf[level].log_softmax(-1)[place]
        loss = (prob[:, None] * outputs.turn_credit[agent] * logprob).sum() / 8
        torch.testing.assert_close(torch.autograd.grad(loss, leaf[level])[0], truth[level], atol=1e-12, rtol=0)
