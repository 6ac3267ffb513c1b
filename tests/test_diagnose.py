"""The probe of gradients, on policies whose every expectation is a finite sum and on tiny real models."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bandits import LETTERS, Bandit, Bigram, bandits
from ccpo.credit import AutoCredit, CCPOv1, RemovalCredit, ReplayCredit, SharedReward
from ccpo.diagnose import Contender, Effort, probe_variance
from ccpo.diagnose.contenders import coefficients, pay
from ccpo.diagnose.fidelity import fidelity, measure_truth
from ccpo.diagnose.gradients import Scores, Sketch, exact_gradient
from ccpo.diagnose.influence import measure_influence
from ccpo.errors import UserError
from ccpo.learner import Policy, TrainRow
from ccpo.learner.objective import Objective
from ccpo.losses import AGGREGATES, LOSSES
from ccpo.pay import Payroll, credit_inputs
from ccpo.rollout import replay_turn
from ccpo.teams import PlayTeam, Team, TurnSpec, think_solve, voting
from ccpo.teams.decisions import LastTurn
from scripted import TOKENIZER
from test_moments import normal
from test_theory import Game, plurality, score_of
from tiny import tiny_model

torch.set_num_threads(1)

THETA = {"voter1": [0.2, 0.0, -0.3], "voter2": [0.5, 0.1, 0.0], "voter3": [0.0, 0.4, 0.0]}
VOTERS = voting(3, prompts=dict.fromkeys(THETA, "{problem}="))


def voters(**keys):
    return bandits(VOTERS, {name: Bandit(theta) for name, theta in THETA.items()}, **keys)


def game() -> Game:
    """The vote as ``voter1`` sees it: all 27 outcomes."""
    logits = [torch.tensor(theta, dtype=torch.float64) for theta in THETA.values()]
    rows = []
    for votes in itertools.product(range(3), repeat=3):
        prob = torch.stack([t.softmax(0)[v] for t, v in zip(logits, votes, strict=True)]).prod()
        rows.append((prob, plurality(votes), plurality(votes[1:]), score_of(logits[0], votes[0])))
    prob, joint, without, score = zip(*rows, strict=True)
    joint, without = (torch.tensor(x, dtype=torch.float64) for x in (joint, without))
    return Game(prob=torch.stack(prob), joint=joint, without=without, score=torch.stack(score))


def plain(found: Game, credit: Tensor, rollouts: int) -> tuple[float, float]:
    """``|E g|^2`` and the variance of the mean of so many independent rollouts, each paid its credit."""
    return float(found.gradient(credit).square().sum()), found.variance(credit) / rollouts


def leave_one_out(found: Game, problems: int) -> tuple[float, float]:
    """The same for groups of two, each paid its reward minus the other's: a sum over all pairs of outcomes."""
    prob = (found.prob[:, None] * found.prob[None, :]).flatten()
    reward = (found.joint[:, None] - found.joint[None, :]).flatten()
    score = (found.score[:, None, :] - found.score[None, :, :]).flatten(0, 1)
    pairs = Game(prob=prob, joint=reward, without=reward, score=score / 2)
    return plain(pairs, reward, problems)


def rule(name: str, branch: tuple[int, ...] | str = (), **settings) -> Contender:
    kind, estimator = name.split("/")
    made = {"shared": SharedReward, "removal": RemovalCredit, "auto": AutoCredit, "replay": ReplayCredit, "v1": CCPOv1}[
        kind
    ](**settings)
    return Contender(name=name, rule=made, payroll=Payroll(estimator=estimator, boxed_reward={}), branch=branch)


@pytest.fixture(scope="module")
def report() -> dict:
    names = ["shared/none", "removal/none", "shared/rloo", "removal/rloo"]
    effort = Effort(batches=80, warm=0, exact=2, problems=12, truth=30)
    return probe_variance(voters(prompts=6, samples=2), [rule(name) for name in names], effort)


@pytest.mark.parametrize("name", ["shared/none", "removal/none", "shared/rloo"])
def test_signal_and_noise_are_those_of_the_enumerated_game(report: dict, name: str):
    found = game()
    kind, estimator = name.split("/")
    credit = found.joint - (found.without if kind == "removal" else 0.0)
    signal, noise = plain(found, credit, 12) if estimator == "none" else leave_one_out(found, 6)
    seen = report["rules"][name]["agents"]["voter1"]
    for key, truth in (("mean", signal**0.5), ("deviation", noise**0.5), ("snr_batch", (signal / noise) ** 0.5)):
        assert abs(seen[key]["value"] - truth) < 4 * seen[key]["error"], key
        assert seen[key]["error"] < 0.25 * truth, key  # close enough to have been wrong
    assert seen["snr_rollout"]["value"] == pytest.approx(seen["snr_batch"]["value"] / 12**0.5)
    tokens = report["rules"][name]["tokens"]
    assert tokens == 36  # a token a vote; re-counts decode nothing
    assert seen["snr_1000_tokens"]["value"] == pytest.approx(seen["snr_batch"]["value"] * (1000 / 36) ** 0.5)


def test_removal_has_more_signal_than_shared_reward_and_the_same_direction(report: dict):
    rules = {name: rule["agents"]["voter1"] for name, rule in report["rules"].items()}
    found = game()
    exact = [plain(found, credit, 12) for credit in (found.joint, found.joint - found.without)]
    truth = (exact[1][0] / exact[1][1] / (exact[0][0] / exact[0][1])) ** 0.5
    ratio = rules["removal/none"]["ratio_to_shared"]
    assert truth > 1.3
    assert abs(ratio["value"] - truth) < 4 * ratio["error"]
    assert ratio["value"] > 1 + 2 * ratio["error"]
    assert rules["removal/rloo"]["snr_batch"]["value"] > rules["shared/rloo"]["snr_batch"]["value"]
    for name in ("shared/none", "removal/none"):
        assert rules[name]["bias"]["value"] < 3 * rules[name]["bias"]["error"]
        assert rules[name]["cosine"]["value"] == pytest.approx(1, abs=0.1)
    assert rules["shared/none"]["shared_corr"] == pytest.approx(1)
    assert rules["removal/none"]["shared_corr"] < 0.9


def test_a_projection_on_more_numbers_than_weights_is_exact(report: dict):
    for found in report["rules"]["removal/rloo"]["agents"].values():
        assert found["norm_sketch"] == pytest.approx(found["norm_exact"], rel=1e-5)
        assert found["sum_error"] < 1e-5


def test_credit_that_leaves_out_the_others_luck_is_more_faithful(report: dict):
    shared, removal = (report["rules"][n]["agents"]["voter1"]["fidelity"] for n in ("shared/rloo", "removal/none"))
    assert removal["value"] > shared["value"] > 0


def test_a_vote_is_no_alarm(report: dict):
    for found in report["lemma"].values():
        assert not found["alarm"]
        assert abs(found["along"]["value"]) < 4 * found["along"]["error"]
        assert found["problems"] == 480


def test_the_best_baseline_is_that_of_the_game(report: dict):
    found, seen = game(), report["baseline"]["voter1"]
    best = float(found.mean(found.norm2() * found.joint) / found.mean(found.norm2()))
    change = found.mean(found.norm2() * found.without * (found.without - 2 * found.joint))
    change = float(change / found.mean(found.norm2() * found.joint.square()))
    assert abs(seen["best"]["value"] - best) < 4 * seen["best"]["error"] < 0.1
    assert abs(seen["change"]["value"] - change) < 4 * seen["change"]["error"] < 0.2
    assert abs(seen["mean"] - float(found.mean(found.joint))) < 0.05


def test_what_cannot_be_probed_is_refused():
    one = rule("shared/none")
    with pytest.raises(UserError, match="named twice"):
        probe_variance(voters(), [one, one], Effort(batches=3))
    with pytest.raises(UserError, match="no rule"):
        probe_variance(voters(), [], Effort(batches=3))
    with pytest.raises(UserError, match="frozen"):
        probe_variance(bandits(VOTERS, {}), [one], Effort(batches=3))
    with pytest.raises(UserError, match="batches is 2"):
        Effort(batches=2)


# ---- Lemma A.1 on plays that leak


def talk(leaks: bool) -> PlayTeam:
    """A talker's letter is the answer; without it the answer is ``b``, or, where it leaks, what the talker had said in that very
    rollout: plays run in the order of their rollouts, joint ones first."""
    said: dict[str, list[str]] = defaultdict(list)

    async def play(problem, speak):
        letter = await speak("talker", "{problem}=")
        if letter is not None:
            said[problem.id].append(letter)
            return letter
        return said[problem.id].pop(0) if leaks else "a"

    return PlayTeam("talk", ("talker",), play)


@pytest.mark.parametrize("leaks", [False, True])
def test_the_alarm_rings_where_the_counterfactual_hears_the_agent(leaks: bool):
    subject = bandits(talk(leaks), {"talker": Bandit([0.3, 0.0, 0.1])}, prompts=5)
    report = probe_variance(subject, [rule("shared/none"), rule("removal/none")], Effort(batches=12, warm=0, exact=0))
    found = report["lemma"]["talker"]
    assert found["alarm"] is leaks
    assert report["truth"] is None  # a function has no turns to replay
    if leaks:  # removal credit is 0 in every rollout: all of the signal is lost
        assert found["along"]["value"] == pytest.approx(1)
        assert max(found["p_along"], found["p_anywhere"]) < 0.001
        assert report["rules"]["removal/none"]["agents"]["talker"]["snr_batch"]["value"] is None
    else:
        assert found["size"]["value"] == 0  # the answer without it is always the same


def test_a_thinker_and_a_solver_are_no_alarm_and_the_decider_is_not_tested():
    solver = Bigram([0.2, 0.0, 0.0], {"a": [2.0, 0, 0], "b": [0, 2.0, 0]})
    report = probe_variance(
        bandits(TEAM, {"thinker": Bandit([0.1, 0.0, 0.2]), "solver": solver}, prompts=5),
        [rule("shared/rloo"), rule("v1/grpo", gate="trajectory")],
        Effort(batches=16, warm=1, exact=2, problems=6, truth=20),
    )
    assert not report["lemma"]["thinker"]["alarm"]
    assert min(report["lemma"]["thinker"][p] for p in ("p_along", "p_anywhere")) > 0.005
    assert "nobody answers" in report["lemma"]["solver"]["untested"]
    assert report["rules"]["v1/grpo"]["tokens"] == 60  # 20 thoughts, 20 answers, 20 solo answers
    assert report["rules"]["shared/rloo"]["tokens"] == 40
    solver = report["rules"]["v1/grpo"]["agents"]["solver"]
    assert solver["sum_error"] < 1e-5  # solo answers are trained on, and weighed as the learner weighs them
    assert report["influence"][0]["speaker"] == "thinker"


# ---- other layouts


def test_rules_that_want_a_tree_have_batches_of_their_own():
    """Four thoughts with two answers each: replay pays a thought the mean of its two answers, against the other thoughts."""
    report = probe_variance(
        pair(prompts=6, samples=8),
        [
            rule("shared/rloo"),
            rule("replay/none", (4, 2)),
            rule("auto/none", "auto", scale="none"),
            rule("removal/rloo"),
        ],
        Effort(batches=30, warm=2, exact=2, problems=2, truth=5),
    )
    rules = report["rules"]
    assert rules["shared/rloo"]["branch"] == rules["removal/rloo"]["branch"] == []
    assert rules["replay/none"]["branch"] == [4, 2]
    assert len(rules["auto/none"]["branch"]) == 2
    assert rules["shared/rloo"]["tokens"] == 6 * 16
    assert rules["replay/none"]["tokens"] == 6 * (4 + 8)
    assert rules["removal/rloo"]["tokens"] == 6 * 24
    assert not report["lemma"]["thinker"]["alarm"]
    for name in ("replay/none", "auto/none"):
        for agent in ("thinker", "solver"):
            found = rules[name]["agents"][agent]
            assert found["sum_error"] < 1e-5
            assert found["bias"]["value"] < 4 * found["bias"]["error"]
            assert found["cosine"]["value"] > 0.8
    # a mean over fewer texts estimates the same gradient
    for agent in ("thinker", "solver"):
        one, other = (rules[name]["agents"][agent]["mean"] for name in ("shared/rloo", "replay/none"))
        assert abs(one["value"] - other["value"]) < 4 * (one["error"] + other["error"]) < 2 * one["value"]


# ---- replays

TEAM = think_solve(prompts={"thinker": "T{problem}", "solver": "S{problem}[[{thinker}]]"})


def pair(**keys):
    solver = Bigram([0.2, 0.0, 0.0], {"a": [2.0, 0, 0], "b": [0, 2.0, 0]})
    return bandits(TEAM, {"thinker": Bandit([0.1, 0.0, 0.2]), "solver": solver}, **keys)


def test_a_replay_keeps_what_was_said_and_draws_the_rest_anew():
    """Given its thought the solver is right with a probability that is known; the thought's place is worth the mean over thoughts."""
    subject = pair(prompts=3, samples=4)
    groups = subject.play(0, frozenset()).groups
    plays = [(g.problem, r) for g in groups for r in g.rollouts]
    model = subject.policies["solver"].model
    theta = model.theta.detach()
    right = {letter: float((theta + model.after.get(encode_one(letter), 0)).softmax(0)[0]) for letter in LETTERS}
    said_BM = replay_turn(subject.walker(), plays, "thinker", 400, seed=3)
    expected = torch.tensor([right[r.turn("thinker").message] for _, r in plays])
    assert said_BM.shape == (12, 400)
    torch.testing.assert_close(said_BM.mean(1), expected, atol=0.11, rtol=0)
    assert float(said_BM.var(1).min()) > 0  # draws differ
    heard_BM = replay_turn(subject.walker(), plays, "thinker", 400, seed=3, again=True)
    prior = subject.policies["thinker"].model.theta.detach().softmax(0)
    place = sum(float(p) * right[letter] for p, letter in zip(prior, LETTERS, strict=True))
    torch.testing.assert_close(heard_BM.mean(1), torch.full((12,), place), atol=0.11, rtol=0)
    # the last turn has nothing after it
    last_BM = replay_turn(subject.walker(), plays, "solver", 5, seed=3)
    assert last_BM.tolist() == [[r.reward] * 5 for _, r in plays]
    with pytest.raises(UserError, match="at least one draw"):
        replay_turn(subject.walker(), plays, "solver", 0, seed=3)


def encode_one(letter: str) -> int:
    return TOKENIZER(letter, add_special_tokens=False)["input_ids"][0]


def test_fidelity_is_one_for_the_truth_and_turns_with_its_sign():
    subject = pair(prompts=6, samples=4)
    truth = measure_truth(subject.walker(), subject.play(0, frozenset()).groups, 60, seed=0)
    assert fidelity(truth.worth, truth, ["thinker"]).value == pytest.approx(1)
    turned = {name: -worth for name, worth in truth.worth.items()}
    assert fidelity(turned, truth, ["thinker"]).value == pytest.approx(-1)
    assert 0.5 < truth.reliability(["thinker"]) < 1
    few = measure_truth(subject.walker(), subject.play(0, frozenset()).groups, 2, seed=0)
    assert few.reliability(["thinker"]) < truth.reliability(["thinker"])


# ---- influence


def test_influence_is_the_distance_between_the_readers_distributions():
    subject = pair(prompts=4, samples=6)
    groups = subject.play(0, frozenset()).groups
    (edge,) = measure_influence(subject, groups)
    model = subject.policies["solver"].model.requires_grad_(False)
    alone = model.theta.softmax(0)  # without the message the prompt ends with a digit
    heard = [
        (model.theta + model.after.get(encode_one(r.turn("thinker").message), 0)).softmax(0)
        for g in groups
        for r in g.rollouts
    ]
    distance = torch.stack([0.5 * (p - alone).abs().sum() for p in heard]).mean()
    kl = torch.stack([(p * (p / alone).log()).sum() for p in heard]).mean()
    assert edge.distance.value == pytest.approx(distance.item(), rel=1e-5)
    assert edge.kl.value == pytest.approx(kl.item(), rel=1e-5)
    assert edge.shift.value > 0
    deaf = bandits(TEAM, {"thinker": Bandit([0, 0, 0]), "solver": Bandit([0.3, 0, 0])})
    (edge,) = measure_influence(deaf, deaf.play(0, frozenset()).groups)
    assert (edge.distance.value, edge.kl.value, edge.shift.value) == (0, 0, 0)


# ---- sketches


def policy(seed: int = 0, name: str = "tiny") -> Policy:
    return Policy(name=name, agents=(name,), model=tiny_model(seed=seed), tokenizer=TOKENIZER)


def test_a_sketch_keeps_inner_products():
    one = policy()
    shapes = [p.shape for p in one.parameters().values()]
    x, y = ([normal(seed + i, *shape).float() for i, shape in enumerate(shapes)] for seed in (0, 1000))
    y = [0.7 * a + 0.3 * b for a, b in zip(x, y, strict=True)]
    flat_x, flat_y = (torch.cat([p.flatten() for p in v]).double() for v in (x, y))
    products = [float(Sketch(one, buckets=211, seed=s)(x) @ Sketch(one, buckets=211, seed=s)(y)) for s in range(40)]
    truth, scale = float(flat_x @ flat_y), float(flat_x.norm() * flat_y.norm())
    mean, spread = torch.tensor(products).mean(), torch.tensor(products).std()
    assert abs(mean - truth) < 4 * spread / 40**0.5
    assert spread < 2 * scale / 211**0.5
    assert Sketch(one).size == flat_x.numel()
    sketch = Sketch(one, buckets=211)
    torch.testing.assert_close(sketch([2 * p for p in x]), 2 * sketch(x))
    assert sketch([None] * len(x)).abs().sum() == 0


def debate_played(samples: int = 3):
    """A team in which one agent speaks twice, on tiny real models."""
    turns = (
        TurnSpec("draft", "writer", "W{problem}"),
        TurnSpec("review", "critic", "C{draft}"),
        TurnSpec("final", "writer", "F{review}"),
    )
    team = Team("edit", ("writer", "critic"), turns, LastTurn("final"))
    subject = bandits(team, {"writer": Bandit([0, 0, 0]), "critic": Bandit([0.5, 0, 0])}, samples=samples)
    return subject, subject.play(0, frozenset())


@pytest.mark.parametrize("aggregate", list(AGGREGATES))
@pytest.mark.parametrize("loss", list(LOSSES))
def test_weighted_scores_are_the_learners_gradient(loss: str, aggregate: str):
    """Turns of several tokens and lengths, two turns of an agent in a rollout, advantages of both signs."""
    objective = Objective(loss=loss, aggregate=aggregate, constant=7.0)
    model = policy(name="writer")
    subject, played = debate_played()
    outputs, _ = SharedReward()(credit_inputs(subject.team, subject.active, played), {})
    paid = pay(rule("shared/rloo").payroll, played, outputs)
    rows = [longer(row, 1 + i % 4) for i, row in enumerate(paid.rows["writer"])]
    assert len({row.segment for row in rows}) == 12 < len(rows)
    scores = Scores({"writer": Sketch(model, buckets=997)}, torch.float32)
    scores.learn(rows)
    summed_J = coefficients(objective, rows) @ scores.of(rows)
    exact_J = Sketch(model, buckets=997)(exact_gradient(model, objective, rows, torch.float32))
    assert float(exact_J.norm()) > 1e-4
    torch.testing.assert_close(summed_J, exact_J, atol=1e-5 * float(exact_J.norm()), rtol=1e-3)


def longer(row: TrainRow, count: int) -> TrainRow:
    """The row with its letter said so many times."""
    return replace(row, token_ids=row.token_ids * count, engine_logprobs=row.engine_logprobs * count)


# ---- the same problems again


def test_repeated_batches_have_the_same_problems_and_other_samples():
    team = voters(prompts=3, samples=2)
    again = replace(team, repeat=True)

    def asked(subject, number):
        return [group.problem.id for group in subject.play(number, frozenset()).groups]

    assert asked(again, 0) == asked(again, 5) == asked(team, 0) != asked(team, 5)
    texts = [
        [turn.completion.text for g in again.play(n, frozenset()).groups for r in g.rollouts for turn in r.turns]
        for n in range(2)
    ]
    assert texts[0] != texts[1]
    found = probe_variance(team, [rule("shared/none")], Effort(batches=3, problems=0, repeat=True))
    assert found["repeat"] is True
