"""Whether a counterfactual hears the agent: the estimate, its error bar, false alarms and power; a game and a tiny run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from ccpo.credit.dependence import Dependence, dependence, student_p
from ccpo.engines import make_engine
from ccpo.rollout import Ask, Limits, Played, Sampling, Voice, play_team
from ccpo.teams import Agent, PlayTeam
from ccpo.types import Problem, Verdict
from test_theory import Game, think_solve_game
from tiny import tiny_model, tiny_tokenizer

torch.set_num_threads(1)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- by hand


def test_by_hand() -> None:
    """Covariances of the problems 1 and 3 (N - 1 below), mean 2, deviation sqrt(2), error sqrt(2) / sqrt(2) = 1, t = 2 with one
    degree of freedom: p = 2 (1/2 - atan(2) / pi)."""
    score = torch.tensor([[[1.0], [-1.0]], [[3.0], [-3.0]]])
    without = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    found = dependence(score, without)
    assert found.covariance_J.tolist() == [2.0]
    assert found.error_J.tolist() == [pytest.approx(1.0)]
    assert found.p_value == pytest.approx(1 - 2 / math.pi * math.atan(2))
    assert not found.alarm
    assert dependence(score, without, level=0.3).alarm
    assert dependence(-score, without).covariance_J.tolist() == [-2.0]


def test_problems_that_cannot_tell_are_left_out_of_the_test_and_count_as_no_covariance() -> None:
    score = torch.cat([torch.tensor([[[1.0], [-1.0]], [[3.0], [-3.0]]]), normal(2, 2, 1, seed=0).float()])
    without = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5], [1.0, 1.0]])
    found, told = dependence(score, without), dependence(score[:2], without[:2])
    assert found.problems == 2
    assert found.p_value == told.p_value
    torch.testing.assert_close(found.covariance_J, told.covariance_J / 2)
    torch.testing.assert_close(found.error_J, told.error_J / 2)


def test_what_nobody_can_tell_raises_nothing() -> None:
    for without in (torch.ones(3, 4), torch.ones(3, 1), torch.tensor([[0.0, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]])):
        found = dependence(normal(3, 4, 2, seed=1), without)
        assert (found.p_value, found.alarm) == (1.0, False)
        assert found.covariance_J.tolist() == [0.0, 0.0]


def test_a_reward_of_the_problem_is_compared_with_other_problems() -> None:
    """Means of the scores 2 and -1; rewards 1 and 0, less the other's: 2 * 1 and -1 * -1; their mean is 1.5."""
    score = torch.tensor([[[1.0], [3.0]], [[-2.0], [0.0]]])
    assert dependence(score, torch.tensor([[1.0], [0.0]])).covariance_J.tolist() == [1.5]


@pytest.mark.parametrize(
    ("t", "dof", "p"),
    [
        (1, 1, 0.5),
        (12.706, 1, 0.05),
        (4.3027, 2, 0.05),
        (3.1824, 3, 0.05),
        (2.2281, 10, 0.05),
        (2.0639, 24, 0.05),
        (2.6778, 50, 0.01),
        (1.96, 10**5, 0.05),
        (0, 7, 1.0),
        (math.inf, 7, 0.0),
    ],
)
def test_students_t(t: float, dof: int, p: float) -> None:
    assert student_p(t, dof) == pytest.approx(p, rel=1e-3, abs=1e-12)
    assert student_p(-t, dof) == student_p(t, dof)


@pytest.mark.parametrize(
    ("score", "without"),
    [((2, 3), (2, 3)), ((2, 3, 1), (2, 2)), ((2, 3, 1), (3, 3)), ((2, 3, 0), (2, 3)), ((2, 3, 1), (2, 3, 1))],
)
def test_shapes_that_do_not_fit(score: tuple[int, ...], without: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"dependence needs|same rollouts"):
        dependence(torch.zeros(score), torch.zeros(without))


def test_bad_values() -> None:
    with pytest.raises(ValueError, match="finite"):
        dependence(torch.full((2, 2, 1), math.nan), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="level"):
        dependence(torch.zeros(2, 2, 1), torch.zeros(2, 2), level=5)


# ---- false alarms and power

RUNS = 600


def alarms(make, seeds: Sequence[int]) -> float:
    return sum(dependence(*make(seed)).alarm for seed in seeds) / len(seeds)


def independent(seed: int, P: int = 24, N: int = 6, J: int = 8) -> tuple[Tensor, Tensor]:
    """Correlated directions, rewards of 0 and 1 with a rate of the problem's own."""
    mix, u = normal(J, J, seed=seed), normal(P, N + 1, seed=seed + 10**6)
    return normal(P, N, J, seed=seed + 2 * 10**6) @ mix, (u[:, 1:] > u[:, :1]).double()


def upstream(seed: int, P: int = 24, N: int = 6, J: int = 4) -> tuple[Tensor, Tensor]:
    """Both follow what a third agent said: the reward, and how large the agent's score is, but not its sign."""
    told = normal(P, N, seed=seed)
    score = normal(P, N, J, seed=seed + 10**6) * told.exp()[:, :, None]
    return score, (told > 0).double()


def of_the_problem(seed: int) -> tuple[Tensor, Tensor]:
    score, without = independent(seed)
    return score, without.mean(1, keepdim=True)


@pytest.mark.parametrize("make", [independent, upstream, of_the_problem])
def test_false_alarms_are_at_most_one_in_twenty(make) -> None:
    rate = alarms(make, range(RUNS))
    assert rate <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / RUNS)
    assert rate > 0  # a test that never raises anything would pass, too


@pytest.mark.parametrize("P", [2, 3, 5])
def test_few_problems_raise_few_false_alarms(P: int) -> None:
    assert alarms(lambda seed: independent(seed, P=P), range(RUNS)) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / RUNS)


@pytest.mark.parametrize("strength", [0.3, -0.3])
def test_dependence_is_found_and_its_size_is_right(strength: float) -> None:
    """``R_without = noise + strength * g_0``: the covariance with g_0, of variance 1, is the strength."""

    def make(seed: int) -> tuple[Tensor, Tensor]:
        score = normal(48, 8, 8, seed=seed)
        return score, normal(48, 8, seed=seed + 10**6) + strength * score[:, :, 0]

    assert alarms(make, range(100)) > 0.95
    found = [dependence(*make(seed)) for seed in range(100)]
    z = torch.stack([(f.covariance_J - torch.tensor([strength] + [0.0] * 7)) / f.error_J for f in found])
    assert float(z.mean(0).abs().max()) < 0.4  # no bias: a hundred draws of about 1 have a mean of about 0.1
    assert 0.8 < float(z.std()) < 1.2  # and the error bar is the error


def test_dependence_of_a_problems_reward_is_found() -> None:
    def make(seed: int) -> tuple[Tensor, Tensor]:
        score = normal(96, 4, 4, seed=seed)
        return score, normal(96, 1, seed=seed + 10**6) + 3 * score[:, -1:, 0]  # it heard the last rollout

    assert alarms(make, range(50)) > 0.9


# ---- a game in which Lemma A.1 does not hold


def sampled(game: Game, P: int, N: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.multinomial(game.prob, P * N, replacement=True, generator=generator).view(P, N)
    return game.score[rows], game.without[rows]


@pytest.mark.parametrize("echo", [False, True])
def test_the_alarm_tells_a_game_whose_solo_answer_hears_the_thought(echo: bool) -> None:
    game = think_solve_game(0, echo=echo)
    found = dependence(*sampled(game, 300, 8))
    truth_J = game.gradient(game.without)  # E[g R_without]: 0 where the lemma holds
    assert float(((found.covariance_J - truth_J) / found.error_J).abs().max()) < 4
    assert found.alarm is echo


# ---- a tiny run in which it does not hold: a play that remembers

P, N = 48, 6
PROBLEMS = tuple(Problem(id=str(i), text=f"{i}", answer="") for i in range(P))


class OddLetters:
    """A text is paid the share of odd characters: every token of thought and answer counts a little."""

    name = "odd letters"

    def __len__(self) -> int:
        return P

    def __getitem__(self, index: int) -> Problem:
        return PROBLEMS[index]

    def verify(self, pairs):
        return [Verdict(score=sum(ord(c) % 2 for c in text) / max(len(text), 1), answer=text) for _, text in pairs]


def team(remembers: bool) -> PlayTeam:
    """Joint plays come first, then the plays without the thinker, in the same order. A play with a memory puts the thought back."""
    calls, memory = itertools.count(), {}

    async def play(problem, speak):
        number = next(calls) % (P * N)
        thought = await speak("thinker", "T{problem}:")
        answer = await speak("solver", "S{problem}[[|{thought}]]:", thought=thought)
        if thought is not None:
            memory[number] = thought
        elif remembers:
            thought = memory[number]
        return (thought or "") + answer

    return PlayTeam("pair", (Agent("thinker"), Agent("solver")), play)


def flat(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values])


def tiny_run(remembers: bool) -> tuple[Tensor, Played]:
    """What was played by a real model, and the thinker's scores ``[P, N, J]``, over all its parameters, along four directions:
    that in which it begins with odd characters more often, and three random ones."""
    model, tokenizer = tiny_model("qwen2", seed=0), tiny_tokenizer()
    engine = make_engine(model, tokenizer)
    said = {
        agent: Voice(
            agent=agent, policy=agent, engine=engine, tokenizer=tokenizer, sampling=Sampling(max_tokens=tokens)
        )
        for agent, tokens in (("thinker", 3), ("solver", 2))
    }
    ask = Ask(samples=N, coalitions=frozenset({("thinker",)}))
    limits = Limits(truncated_is_zero=False)
    played = play_team(team(remembers), OddLetters(), said, limits, PROBLEMS, ask, seed=1, step=0)
    turns = [rollout.turns[0] for group in played.groups for rollout in group.rollouts]
    assert {turn.agent for turn in turns} == {"thinker"}
    parameters = list(model.parameters())
    odd_V = torch.tensor([len(c := tokenizer.decode([i])) == 1 and ord(c) % 2 == 1 for i in range(101)])
    odd = sum(model(torch.tensor([turn.prompt_ids])).logits[0, -1].softmax(-1)[odd_V].sum() for turn in turns[::N])
    uphill_D = flat(torch.autograd.grad(odd, parameters))
    random_JD = torch.randn(3, uphill_D.numel(), generator=torch.Generator().manual_seed(0))
    direction_JD = torch.nn.functional.normalize(torch.cat([uphill_D[None], random_JD]), dim=1)
    scores = []
    for turn in turns:
        ids, spoken = torch.tensor([turn.prompt_ids + turn.completion.token_ids]), turn.completion.token_ids
        logprob_TV = model(ids).logits[0, len(turn.prompt_ids) - 1 : -1].log_softmax(-1)
        logprob = logprob_TV.gather(1, torch.tensor(spoken)[:, None]).sum()
        scores.append(direction_JD @ flat(torch.autograd.grad(logprob, parameters)))
    return torch.stack(scores).view(P, N, -1), played


@dataclass(frozen=True)
class Measured:
    """Covariances of the scores with the joint reward, with the counterfactual one, and with the removal credit."""

    shared: Dependence
    without: Dependence
    removal: Dependence


@pytest.fixture(scope="module")
def runs() -> dict[bool, Measured]:
    found = {}
    for remembers in (False, True):
        score_PNJ, played = tiny_run(remembers)
        joint_PN, without_PN = played.reward_PN, played.without[("thinker",)].mean(2)
        found[remembers] = Measured(
            *(dependence(score_PNJ, reward_PN) for reward_PN in (joint_PN, without_PN, joint_PN - without_PN))
        )
    return found


def test_a_run_whose_play_remembers_raises_the_alarm_and_another_does_not(runs: dict[bool, Measured]) -> None:
    assert runs[True].without.alarm
    assert not runs[False].without.alarm
    assert torch.equal(runs[True].shared.covariance_J, runs[False].shared.covariance_J)  # the joint plays are the same


def test_the_bias_of_that_run_is_the_covariance_and_takes_the_gradient_away(runs: dict[bool, Measured]) -> None:
    """What the thought adds is put back into the counterfactual: the removal gradient has nothing left to say."""
    for remembers, found in runs.items():
        bias_J = found.removal.covariance_J - found.shared.covariance_J
        torch.testing.assert_close(bias_J, -found.without.covariance_J, atol=1e-6, rtol=0)
        shared, bias, error = float(found.shared.covariance_J[0]), float(bias_J[0]), float(found.without.error_J[0])
        assert shared > 4 * float(found.shared.error_J[0])  # the joint reward hears the thought: there is a gradient
        assert bias < -max(4 * error, 0.6 * shared) if remembers else abs(bias) < 3 * error
