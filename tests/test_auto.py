"""Auto and replay credit: what they pay, that they bend nothing, and that they are less noisy."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from torch import Tensor

from ccpo.credit import ESTIMATORS, AutoCredit, RemovalCredit, ReplayCredit, SharedReward
from ccpo.errors import UserError
from ccpo.rollout.swap import mixtures
from ccpo.teams import majority_BK, recount_without
from ccpo.types import CreditInputs, TreePlace

torch.set_num_threads(1)

TREE = {
    "thinker": TreePlace(contexts=1, siblings=2, plays=2),
    "solver": TreePlace(contexts=2, siblings=2, plays=1),
}


def pair(reward_PN: Tensor, **keys: object) -> CreditInputs:
    agents = ("thinker", "solver")
    turns = {agent: (agent,) for agent in agents}
    return CreditInputs(
        agents=agents, decider="solver", active=agents, reward_PN=reward_PN, turns=turns, tree=TREE, **keys
    )


def test_replay_pays_a_text_against_its_siblings():
    outputs, _ = ReplayCredit()(pair(torch.tensor([[1.0, 1.0, 1.0, 0.0]])), {})
    assert outputs.turn_credit["thinker"].tolist() == [[0.5, 0.5, -0.5, -0.5]]
    assert outputs.turn_credit["solver"].tolist() == [[0.0, 0.0, 1.0, -1.0]]


def test_replay_refuses_a_text_without_siblings():
    inputs = CreditInputs(
        agents=("thinker", "solver"),
        decider="solver",
        active=("solver",),
        reward_PN=torch.ones(1, 4),
        turns={"solver": ("solver",)},
        tree={"solver": TreePlace(contexts=4, siblings=1, plays=1)},
    )
    with pytest.raises(UserError, match=r"rollout\.branch"):
        ReplayCredit()(inputs, {})


def test_auto_mixes_siblings_and_group_by_hand():
    """Nothing seen yet: within = between = 1, so the siblings err by 1, the group by 2 + 1/2, and the siblings weigh 5/7."""
    outputs, state = AutoCredit(scale="none")(pair(torch.tensor([[1.0, 1.0, 1.0, 0.0]])), {})
    group = [0.5, 0.5, 1.0, 1.0]
    siblings = [1.0, 1.0, 0.0, 1.0]
    reward = [1.0, 1.0, 1.0, 0.0]
    expected = [r - 5 / 7 * s - 2 / 7 * g for r, s, g in zip(reward, siblings, group, strict=True)]
    assert outputs.turn_credit["solver"][0].tolist() == pytest.approx(expected)
    assert outputs.turn_credit["thinker"][0].tolist() == [0.5, 0.5, -0.5, -0.5]
    assert state["solver"] == pytest.approx({"within": 0.25, "between": 0.0})
    assert json.loads(json.dumps(state)) == state


def test_plays_without_the_agent_are_one_more_baseline():
    """Nothing seen yet: the siblings err by 1, the plays without the agent by 1, and there is no other context."""
    reward_PN = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    inputs = pair(reward_PN, without={("thinker",): torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])})
    outputs, state = AutoCredit(scale="none", pairing="mean")(inputs, {})
    assert outputs.turn_credit["thinker"][0].tolist() == [1 - (0.5 + 0.25) / 2] * 2 + [0.5 - (1 + 0.25) / 2] * 2
    assert state["thinker"] == pytest.approx({"within": 0.125, "without": (0.75 - 0.25) ** 2 - 0.125 / 2})
    assert outputs.metrics["credit/thinker/thinker_without_weight"] == pytest.approx(0.5)
    assert torch.equal(outputs.turn_credit["solver"], AutoCredit(scale="none")(inputs, {})[0].turn_credit["solver"])


def test_auto_asks_for_plays_without_an_agent_only_where_it_is_told_to():
    agents = ("thinker", "solver")
    assert AutoCredit().needs(agents, "solver", agents) == frozenset()
    assert AutoCredit(pairing="cached").needs(agents, "solver", agents) == frozenset({("thinker",)})
    with pytest.raises(UserError, match=r"credit\.pairing"):
        AutoCredit(pairing="paired")


def test_auto_on_plain_rollouts_is_leave_one_out():
    reward_PN = torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    plain = CreditInputs(agents=("a",), decider="a", active=("a",), reward_PN=reward_PN)
    outputs, _ = AutoCredit(scale="none")(plain, {})
    loo_B = ESTIMATORS["rloo"](reward_PN.flatten(), torch.arange(3).repeat_interleave(5))
    assert torch.allclose(outputs.credit["a"].flatten(), loo_B, atol=1e-6)


def test_auto_in_units_of_the_problems_deviation():
    reward_PN = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    plain = CreditInputs(agents=("a",), decider="a", active=("a",), reward_PN=reward_PN)
    outputs, _ = AutoCredit(scale="deviation")(plain, {})
    unit = math.sqrt(0.25 * 0.75)
    assert outputs.credit["a"][0].tolist() == pytest.approx([1 / unit, -1 / 3 / unit, -1 / 3 / unit, -1 / 3 / unit])
    assert outputs.credit["a"][1].tolist() == [0, 0, 0, 0]
    for scale in ("mean", "auto"):  # a text that is no ballot
        outputs, _ = AutoCredit(scale=scale)(plain, {})
        assert outputs.credit["a"][0].tolist() == pytest.approx([4.0, -4 / 3, -4 / 3, -4 / 3])


def test_a_ballot_is_paid_in_deviations_of_all_the_votes_it_could_have_met():
    """Worths 0.5, 1, 0, 0.5 over two mixtures: their mean is 0.5, and so is the deviation."""
    swap_PNS = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]]])
    inputs = CreditInputs(
        agents=("v",),
        decider=None,
        active=("v",),
        reward_PN=torch.tensor([[1.0, 1.0, 1.0, 0.0]]),
        swap={"v": swap_PNS},
        silent={"v": torch.full((1, 4, 2), 0.5)},
    )
    plain, _ = AutoCredit(scale="none")(inputs, {})
    scaled, _ = AutoCredit()(inputs, {})
    assert plain.credit["v"][0, 1] > 0 > plain.credit["v"][0, 2]
    assert scaled.credit["v"][0].tolist() == pytest.approx((plain.credit["v"][0] / 0.5).tolist())


def test_a_single_rollout_has_nothing_to_be_held_against():
    with pytest.raises(UserError, match=r"rollout\.samples"):
        AutoCredit()(CreditInputs(agents=("a",), decider="a", active=("a",), reward_PN=torch.ones(2, 1)), {})


def test_a_place_that_does_not_hold_the_rollouts_is_refused():
    with pytest.raises(ValueError, match="not N = 6"):
        AutoCredit()(pair(torch.ones(1, 6)), {})


# --- no bias, on games where every expectation is a finite sum ------------------------------------------------------


def score(logits: Tensor, action: int) -> Tensor:
    return torch.eye(logits.numel(), dtype=torch.float64)[action] - logits.softmax(0)


def vote_game() -> tuple[Tensor, Tensor]:
    """Two voters, two rollouts: expected gradients of the first voter under auto with swaps and under shared reward."""
    logits_KA = torch.tensor([[0.3, -0.4], [0.1, 0.7]], dtype=torch.float64)
    prob_KA = logits_KA.softmax(1)
    worth = torch.tensor([[1.0, 0.5], [0.5, 0.0]], dtype=torch.float64)  # answer 0 is right, a tie pays half
    gradients = {"auto": torch.zeros(2, dtype=torch.float64), "shared": torch.zeros(2, dtype=torch.float64)}
    for a0, b0, a1, b1 in itertools.product(range(2), repeat=4):
        prob = prob_KA[0, a0] * prob_KA[1, b0] * prob_KA[0, a1] * prob_KA[1, b1]
        own, other = (a0, a1), (b0, b1)
        swap_PNS = torch.stack([worth[a, list(other)] for a in own])[None]
        inputs = CreditInputs(
            agents=("x", "y"),
            decider=None,
            active=("x",),
            reward_PN=torch.tensor([[worth[a0, b0], worth[a1, b1]]]),
            turns={"x": ("x",)},
            swap={"x": swap_PNS},
            silent={"x": torch.stack([worth[0 if b == 0 else 1, b] for b in other]).expand(1, 2, 2)},
        )
        for name, rule in (("auto", AutoCredit(scale="none")), ("shared", SharedReward())):
            credit_N = rule(inputs, {})[0].credit["x"][0]
            gradients[name] += prob * sum(c * score(logits_KA[0], a) for c, a in zip(credit_N, own, strict=True))
    return gradients["auto"], gradients["shared"]


def test_swapped_ballots_do_not_bend_the_gradient():
    auto, shared = vote_game()
    assert torch.allclose(auto, shared, atol=1e-12)
    assert shared.abs().max() > 0.01


def tree_game(rule: object, *, state: dict) -> dict[str, Tensor]:
    """Thinker (2 thoughts) → Solver (2 answers), a 2 x 2 tree: the expected gradient of each agent's logits over all trees."""
    think_A = torch.tensor([0.2, -0.5], dtype=torch.float64)
    solve_AB = torch.tensor([[0.4, 0.0], [-0.3, 0.9]], dtype=torch.float64)
    worth = torch.tensor([[1.0, 0.2], [0.6, 0.0]], dtype=torch.float64)
    total = {
        "thinker": torch.zeros(2, dtype=torch.float64),
        "solver": torch.zeros(2, 2, dtype=torch.float64),
    }
    for a0, a1, b0, b1, c0, c1 in itertools.product(range(2), repeat=6):
        thoughts, answers = (a0, a1), ((b0, b1), (c0, c1))
        prob = math.prod(float(think_A.softmax(0)[a]) for a in thoughts)
        prob *= math.prod(
            float(solve_AB.softmax(1)[a, b]) for a, both in zip(thoughts, answers, strict=True) for b in both
        )
        reward_PN = torch.tensor(
            [[worth[a, b].item() for a, both in zip(thoughts, answers, strict=True) for b in both]],
            dtype=torch.float64,
        )
        outputs, _ = rule(pair(reward_PN, without=WITHOUT), state)  # type: ignore[operator]
        think_N = outputs.turn_credit.get("thinker", outputs.credit["thinker"])[0]
        solve_N = outputs.turn_credit.get("solver", outputs.credit["solver"])[0]
        for i, a in enumerate(thoughts):
            total["thinker"] += prob * think_N[2 * i : 2 * i + 2].mean() * score(think_A, a) / 2
            for j, b in enumerate(answers[i]):
                total["solver"][a] += prob * solve_N[2 * i + j] * score(solve_AB[a], b) / 4
    return total


WITHOUT = {("thinker",): torch.tensor([[[0.25, 0.5]]], dtype=torch.float64)}


@pytest.mark.parametrize(
    "rule",
    [ReplayCredit(), AutoCredit(scale="none"), AutoCredit(scale="none", pairing="mean")],
    ids=["replay", "auto", "auto with plays without the agent"],
)
def test_trees_do_not_bend_the_gradient(rule: object):
    state = {} if isinstance(rule, ReplayCredit) else {"solver": {"within": 0.2, "between": 0.1}}
    found, shared = tree_game(rule, state=state), tree_game(SharedReward(), state={})
    for agent in ("thinker", "solver"):
        assert torch.allclose(found[agent], shared[agent], atol=1e-12), agent
        assert shared[agent].abs().max() > 0.01


# --- less noise, by sampling ----------------------------------------------------------------------------------------


def voting_snr(p: float, problems: int = 5_000, N: int = 8) -> dict[str, float]:
    """Signal to noise of one voter's gradient per problem: three voters, right with probability p, else one of four wrong."""
    generator = torch.Generator().manual_seed(3)
    right_PNK = torch.rand(problems, N, 3, generator=generator) < p
    answer_PNK = torch.where(right_PNK, 0, torch.randint(1, 5, right_PNK.shape, generator=generator))

    def vote(answer_BK: Tensor) -> Tensor:
        return majority_BK(answer_BK, (answer_BK == 0).double()).float()

    reward_PN = vote(answer_PNK.flatten(0, 1)).reshape(problems, N)
    without = recount_without(answer_PNK.flatten(0, 1), (answer_PNK.flatten(0, 1) == 0).double())[0].float()
    mixture_SC = mixtures(N, 2)
    others_PSC = torch.stack([answer_PNK[:, mixture_SC[:, c], c + 1] for c in range(2)], dim=2)
    own_PNS1 = answer_PNK[:, :, None, :1].expand(-1, -1, len(mixture_SC), -1)
    ballots = torch.cat([own_PNS1, others_PSC[:, None].expand(-1, N, -1, -1)], dim=3)
    swap_PNS = vote(ballots.flatten(0, 2)).reshape(problems, N, -1)
    ballots[..., 0] = -1
    silent_PNS = vote(ballots.flatten(0, 2)).reshape(problems, N, -1)
    inputs = CreditInputs(
        agents=("x", "y", "z"),
        decider=None,
        active=("x",),
        reward_PN=reward_PN,
        without={("x",): without.reshape(problems, N, 1)},
        turns={"x": ("x",)},
        swap={"x": swap_PNS},
        silent={"x": silent_PNS},
    )
    _, known = AutoCredit(scale="none")(inputs, {})
    score_PN = (right_PNK[..., 0].float() - p) / (p * (1 - p))
    group_B = torch.arange(problems).repeat_interleave(N)
    found = {}
    for name, rule, estimator in (
        ("shared", SharedReward(), "grpo"),
        ("removal", RemovalCredit(), "none"),
        ("auto", AutoCredit(scale="none"), "none"),
    ):
        credit_PN = rule(inputs, known if name == "auto" else {})[0].credit["x"]
        advantage_PN = ESTIMATORS[estimator](credit_PN.flatten(), group_B, None).reshape(problems, N)
        gradient_P = (advantage_PN * score_PN).mean(1)
        found[name] = (gradient_P.mean() / gradient_P.std()).item()
    return found


@pytest.mark.parametrize("p", [0.3, 0.5, 0.7])
def test_in_voting_auto_has_the_cleanest_gradient(p: float):
    snr = voting_snr(p)
    assert snr["removal"] > 1.4 * snr["shared"]
    assert snr["auto"] > 1.7 * snr["shared"]
    assert snr["auto"] > snr["removal"]
