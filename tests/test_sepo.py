"""SEPO: the credit by hand and its invariants, how good raters must be, and the whole loop with real and scripted ratings."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ccpo
import ccpo.crew
from ccpo.build import prepare
from ccpo.config import load_recipe
from ccpo.credit import ESTIMATORS, RULES, SelfEval, SharedReward
from ccpo.credit.self_eval import deviation, merged_shares, scripted_shares
from ccpo.credit.telemetry import correlation
from ccpo.errors import UserError
from ccpo.rollout import read_episodes
from ccpo.teams import PlayTeam
from ccpo.types import CreditInputs

torch.set_num_threads(1)
TRIO = ("a", "b", "c")


def t(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rated(reward: Any, shares: Mapping[str, Any], valid: Mapping[str, Any] | None = None, **keys: Any) -> CreditInputs:
    agents = tuple(shares)
    return CreditInputs(
        **{"agents": agents, "decider": agents[-1], "active": agents}
        | keys
        | {
            "reward_PN": t(reward),
            "shares": {a: t(s) for a, s in shares.items()},
            "shares_valid": {a: torch.tensor(v) for a, v in (valid or {}).items()},
        }
    )


# ---- by hand


def test_two_agents_by_hand() -> None:
    # s1 = 0.3 * 0.7 + 0.7 * 0.4 = 0.49, s2 = 0.3 * 0.6 + 0.7 * 0.3 = 0.39: w = 49/88; of the second rollout 1/2
    shares = {"thinker": [[[0.7, 0.3], [0.5, 0.5]]], "solver": [[[0.4, 0.6], [0.5, 0.5]]]}
    outputs, _ = SelfEval()(rated([[1, 0]], shares), {})
    half_gap = (49 / 88 - 1 / 2) / 2
    torch.testing.assert_close(outputs.credit["thinker"], t([[1 + 0.2 * half_gap, -1 + 0.2 * half_gap]]))
    torch.testing.assert_close(outputs.credit["solver"], t([[1 - 0.2 * half_gap, -1 - 0.2 * half_gap]]))
    uniform, _ = SelfEval(center="uniform", weight=0.5)(rated([[1, 0]], shares), {})
    torch.testing.assert_close(uniform.credit["thinker"], t([[1 + 0.5 * (49 / 88 - 0.5), -1]]))


def test_three_agents_by_hand() -> None:
    shares = {"a": [[[0.6, 0.2, 0.2]]], "b": [[[0.2, 0.8, 0.0]]], "c": [[[0.4, 0.4, 0.2]]]}
    # s_a = 0.3 * 0.6 + 0.7 * 0.3, s_b = 0.3 * 0.8 + 0.7 * 0.3, s_c = 0.3 * 0.2 + 0.7 * 0.1
    s = t([0.39, 0.45, 0.13])
    weight_PNK = merged_shares(torch.stack([t(v) for v in shares.values()]), 0.3)
    torch.testing.assert_close(weight_PNK[0, 0], s / 0.97)
    wrong, _ = SelfEval(center="uniform")(rated([[0]], shares), {})
    for k, agent in enumerate(TRIO):  # the greater the share of a failure, the less
        assert wrong.credit[agent].item() == pytest.approx(-1 - 0.2 * (s[k].item() / 0.97 - 1 / 3))


def test_self_weight_is_whose_word_counts() -> None:
    shares = {"thinker": [[[0.9, 0.1]]], "solver": [[[0.3, 0.7]]]}
    by_self = merged_shares(torch.stack([t(v) for v in shares.values()]), 1.0)
    by_peer = merged_shares(torch.stack([t(v) for v in shares.values()]), 0.0)
    torch.testing.assert_close(by_self[0, 0], t([0.9 / 1.6, 0.7 / 1.6]))
    torch.testing.assert_close(by_peer[0, 0], t([0.3 / 0.4, 0.1 / 0.4]))


def test_shares_that_sum_to_nothing_are_equal() -> None:
    nobody_takes_any = torch.stack([t([[[0, 0.5, 0.5]]]), t([[[0.5, 0, 0.5]]]), t([[[0.5, 0.5, 0]]])])
    torch.testing.assert_close(merged_shares(nobody_takes_any, 1.0), torch.full((1, 1, 3), 1 / 3, dtype=torch.float64))


def test_partial_credit_is_correct_above_a_half() -> None:
    shares = {"thinker": [[[0.9, 0.1]] * 4], "solver": [[[0.9, 0.1]] * 4]}
    outputs, _ = SelfEval(center="uniform")(rated([[0.25, 0.5, 0.75, 1.0]], shares), {})
    torch.testing.assert_close(outputs.credit["thinker"], t([[-0.58, -0.08, 0.58, 1.08]]))


# ---- invariants

tenths = st.lists(st.integers(0, 10), min_size=2, max_size=2).map(lambda cuts: [0, *sorted(cuts), 10])
triple = tenths.map(lambda c: [(b - a) / 10 for a, b in pairwise(c)])
plays = st.integers(1, 4).flatmap(
    lambda n: st.tuples(
        st.lists(st.lists(triple, min_size=n, max_size=n), min_size=3, max_size=3),
        st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=n, max_size=n),
    )
)


@given(plays, st.sampled_from(["group", "uniform"]))
@settings(max_examples=60, deadline=None)
def test_three_agents(play: tuple[list[Any], list[float]], center: str) -> None:
    shares, reward = play
    inputs = rated([reward], {a: [s] for a, s in zip(TRIO, shares, strict=True)})
    weight_PNK = merged_shares(torch.stack([t([s]) for s in shares]), 0.3)
    torch.testing.assert_close(weight_PNK.sum(-1), torch.ones(1, len(reward), dtype=torch.float64))
    assert (weight_PNK >= 0).all()
    bonus_PNK = deviation(weight_PNK, center)
    torch.testing.assert_close(bonus_PNK.sum(-1), torch.zeros_like(bonus_PNK[..., 0]))
    if center == "group":
        torch.testing.assert_close(bonus_PNK.sum(1), torch.zeros_like(bonus_PNK[:, 0]))
    outputs, _ = SelfEval(center=center)(inputs, {})
    paid = sum(outputs.credit.values())  # what one agent gains the others lose
    torch.testing.assert_close(paid, 3 * (2 * t([reward]) - 1))
    for order in permutations(range(3)):  # the same agents in another order
        names = [TRIO[k] for k in order]
        moved = {TRIO[k]: t([shares[k]])[..., list(order)].tolist() for k in order}
        turned, _ = SelfEval(center=center)(rated([reward], moved, agents=tuple(names)), {})
        for agent in TRIO:
            torch.testing.assert_close(turned.credit[agent], outputs.credit[agent])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("center", ["group", "uniform"])
@pytest.mark.parametrize("K", [2, 3, 7])
def test_ratings_that_are_all_invalid_pay_the_reward_exactly(K: int, center: str, dtype: torch.dtype) -> None:
    agents = tuple(f"agent{k}" for k in range(K))
    reward_PN = torch.tensor([[1, 0, 1], [0, 0, 0]], dtype=dtype)
    inputs = CreditInputs(
        agents=agents,
        decider=None,
        active=agents,
        reward_PN=reward_PN,
        shares={a: torch.full((2, 3, K), 1 / K, dtype=dtype) for a in agents},
        shares_valid={a: torch.zeros(2, 3, dtype=torch.bool) for a in agents},
    )
    outputs, _ = SelfEval(center=center)(inputs, {})
    for credit_PN in outputs.credit.values():
        assert torch.equal(credit_PN, 2 * reward_PN - 1)
        assert credit_PN.dtype == dtype
    assert outputs.metrics["rating/valid"] == 0
    assert "rating/agreement" not in outputs.metrics
    assert not [name for name in outputs.metrics if name.endswith("self_praise")]


def test_only_active_agents_are_paid_but_everybody_is_heard() -> None:
    shares = {"thinker": [[[0.7, 0.3], [0.5, 0.5]]], "solver": [[[0.4, 0.6], [0.5, 0.5]]]}
    both, _ = SelfEval()(rated([[1, 0]], shares), {})
    one, _ = SelfEval()(rated([[1, 0]], shares, active=("thinker",)), {})
    assert set(one.credit) == {"thinker"}
    assert torch.equal(one.credit["thinker"], both.credit["thinker"])
    with pytest.raises(ValueError, match="'solver' gave none"):
        SelfEval()(
            rated([[1, 0]], {"thinker": shares["thinker"]}, agents=("thinker", "solver"), active=("thinker",)), {}
        )


def test_no_counterfactual_is_drawn() -> None:
    rule = RULES["sepo"]()
    assert rule.needs(TRIO, "c", TRIO) == frozenset()
    assert (rule.pairing, rule.rates, rule.estimator) == (None, True, "dr_grpo")


@pytest.mark.parametrize("shares", [[[0.5, 0.5]], [[[0.5, 0.5, 0.0]]], [[[math.nan, 0.5]]], [[[1.5, -0.5]]]], ids=str)
def test_shares_of_a_wrong_form_are_refused(shares: Any) -> None:
    with pytest.raises(ValueError, match=r"shares of 'x' must be finite"):
        SelfEval()(rated([[1]], {"x": shares, "y": [[[0.5, 0.5]]]}), {})


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"weight": -1}, "credit.weight"),
        ({"self_weight": 1.5}, "credit.self_weight is a number from 0 to 1"),
        ({"center": "groop"}, "credit.center.*'group'"),
        ({"max_tokens": 0}, "credit.max_tokens is a whole number"),
        ({"max_tokens": True}, "credit.max_tokens is a whole number"),
        ({"prompt": "  "}, "credit.prompt is a text"),
    ],
)
def test_settings_out_of_range(setting: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        SelfEval(**setting)


# ---- telemetry


def test_telemetry_by_hand() -> None:
    shares = {"thinker": [[[0.7, 0.3], [0.2, 0.8], [0.5, 0.5]]], "solver": [[[0.6, 0.4], [0.1, 0.9], [0.9, 0.1]]]}
    valid = {"thinker": [[True, True, False]], "solver": [[True, True, True]]}
    found = SelfEval()(rated([[1, 0, 1]], shares, valid), {})[0].metrics
    assert found["rating/valid"] == pytest.approx(5 / 6)
    assert found["credit/thinker/rating_valid"] == pytest.approx(2 / 3)
    assert found["credit/solver/rating_valid"] == 1.0
    assert found["rating/agreement"] == pytest.approx(1.0)  # 0.7, 0.2 and 0.6, 0.1; the invalid one has no word in it
    assert found["credit/thinker/self_praise"] == pytest.approx(0.1)
    assert found["credit/solver/self_praise"] == pytest.approx(0.1)
    assert found["credit/thinker/rated_share"] + found["credit/solver/rated_share"] == pytest.approx(1.0)
    same = {"thinker": [[[0.7, 0.3]] * 3], "solver": [[[0.6, 0.4]] * 3]}  # the same in every play: nothing to agree on
    assert "rating/agreement" not in SelfEval()(rated([[1, 0, 1]], same), {})[0].metrics
    turned = {"thinker": shares["thinker"], "solver": [[[0.4, 0.6], [0.9, 0.1], [0.1, 0.9]]]}
    assert SelfEval()(rated([[1, 0, 1]], turned, valid), {})[0].metrics["rating/agreement"] < -0.9


# ---- how good raters must be

RELIABILITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def scripted(named_PN: Tensor, reliability: float, agents: tuple[str, ...], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {a: scripted_shares(named_PN, len(agents), reliability, generator) for a in agents}


def test_a_scripted_rater_is_as_reliable_as_it_says() -> None:
    named_PN = torch.randint(0, 4, (200, 100), generator=torch.Generator().manual_seed(1))
    for reliability in RELIABILITIES:
        share_PNK = scripted_shares(named_PN, 4, reliability, torch.Generator().manual_seed(2))
        torch.testing.assert_close(share_PNK.sum(-1), torch.ones(200, 100, dtype=torch.float64))
        hit = (share_PNK.argmax(-1) == named_PN).double().mean().item()
        assert hit == pytest.approx(reliability, abs=0.015)
        others = torch.bincount((share_PNK.argmax(-1) - named_PN).flatten() % 4, minlength=4)[1:] / named_PN.numel()
        assert others.tolist() == pytest.approx([(1 - reliability) / 3] * 3, abs=0.015)


def test_the_bonus_follows_the_truth_as_far_as_raters_are_reliable() -> None:
    """The reward is the mean of two qualities, so that the marginal contribution of each agent is known; raters name the
    agent to whom the outcome is due: of a success the greater contribution, of a failure the smaller one."""
    quality_PNK = torch.rand(2000, 8, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    reward_PN = quality_PNK.mean(-1)
    gap_PN = (
        quality_PNK[..., 0] - quality_PNK[..., 1]
    ) / 2  # delta_thinker - delta_solver, R_without = the other's half
    due_PN = torch.where((gap_PN > 0) == (2 * reward_PN - 1 > 0), 0, 1)
    followed = []
    for reliability in RELIABILITIES:
        shares = scripted(due_PN, reliability, ("thinker", "solver"))
        inputs = CreditInputs(
            agents=("thinker", "solver"), decider="solver", active=("thinker",), reward_PN=reward_PN, shares=shares
        )
        bonus_PN = SelfEval(center="uniform")(inputs, {})[0].credit["thinker"] - (2 * reward_PN - 1)
        # two raters agree and are right with r², agree and are wrong with (1 - r)², else cancel
        r = reliability
        expected = (2 * r - 1) / math.sqrt(r**2 + (1 - r) ** 2)
        assert correlation(bonus_PN, gap_PN.sign()) == pytest.approx(expected, abs=0.02)
        followed.append(correlation(bonus_PN, gap_PN))
    assert followed[0] == pytest.approx(0, abs=0.02)
    assert all(b > a + 0.05 for a, b in pairwise(followed))
    assert followed[-1] > 0.8


def think_solve_ratio(reliability: float | None) -> float:
    """Signal to noise of the thinker's gradient, group mean removed; None: shared reward. A thought is good with probability
    1/2; an answer is right with 0.75 after a good one, 0.45 after a bad one. A success after a good thought and a failure
    after a bad one are the thinker's, the others the solver's."""
    P, N = 40_000, 8
    u = torch.rand(3, P, N, generator=torch.Generator().manual_seed(7))
    good_PN = u[0] < 0.5
    right_PN = u[1] < 0.45 + 0.3 * good_PN.float()
    agents = ("thinker", "solver")
    shares = {} if reliability is None else scripted((good_PN != right_PN).long(), reliability, agents)
    rule = SharedReward() if reliability is None else SelfEval()
    inputs = CreditInputs(
        agents=agents, decider="solver", active=("thinker",), reward_PN=right_PN.float(), shares=shares
    )
    credit_PN = rule(inputs, {})[0].credit["thinker"]
    group_B = torch.arange(P).repeat_interleave(N)
    advantage_PN = ESTIMATORS["dr_grpo"](credit_PN.flatten(), group_B).view(P, N)
    gradient_P = ((good_PN.float() - 0.5) * advantage_PN).mean(1)
    return float(gradient_P.mean() / gradient_P.std())


def test_the_table_of_reliabilities_is_what_the_rule_gives() -> None:
    page = (Path(__file__).parents[1] / "docs" / "rules.md").read_text(encoding="utf-8")
    lines = page.partition("| raters' reliability |")[2].splitlines()
    columns, numbers = ([cell.strip() for cell in line.strip("| ").split("|")] for line in (lines[0], lines[2]))
    assert numbers[0].startswith("signal to noise, shared reward = 1")
    shared = think_solve_ratio(None)
    found = [think_solve_ratio(float(reliability)) / shared for reliability in columns]
    assert found == pytest.approx([float(n) for n in numbers[1:]], abs=0.01)


# ---- the whole loop

RATING_TOKENS = 37  # no other turn is as long
TINY: dict[str, Any] = {
    "run": {"name": "sepo", "seed": 3, "threads": 1},
    "team": {"kind": "think_solve", "prompts": {"thinker": "T{problem}:", "solver": "S{problem}[[:{thinker}]]="}},
    "task": {"kind": "digit_sum", "digits": [1, 2], "size": 200},
    "bootstrap": {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1, "mlp": 48, "steps": 100, "noisy_steps": 2}
    | {"batch": 32, "lr": 3e-3},
    "rollout": {"prompts": 4, "samples": 4, "max_tokens": 12, "max_prompt_tokens": 400},
    "credit": {"kind": "sepo", "max_tokens": RATING_TOKENS},
    "advantage": "dr_grpo",
    "optim": {"lr": 1e-3},
    "trainer": {"steps": 2, "save_every": 1},
    "eval": {"problems": 8, "during": 4, "temperature": 1.0},
    "log": {"tensorboard": False},
}


def recipe(folder: Path, **sections: Any) -> dict[str, Any]:
    data = json.loads(json.dumps(TINY))
    for name, values in sections.items():
        data[name] = {**data.get(name, {}), **values} if isinstance(values, dict) else values
    data["run"] |= {"dir": str(folder)}
    return data


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("seconds/")} for line in lines]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CCPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_a_real_model_that_never_learnt_to_rate_is_paid_the_reward(tmp_path: Path) -> None:
    result = ccpo.train(recipe(tmp_path / "run"))
    for line in metrics(tmp_path / "run"):
        assert line["rating/valid"] == 0
        assert line["credit/thinker/rating_valid"] == line["credit/solver/rating_valid"] == 0
        assert 0 < line["tokens/rating"] <= 4 * 4 * 2 * RATING_TOKENS
        assert line["tokens/rating"] == line["rating/mean_length"] * line["rating/asked"] * 4 * 4 * 2
        assert line["rating/asked"] == 1
        assert line["rating/clipped_ratio"] > 0
        assert line["credit/thinker/mean"] == pytest.approx(2 * line["reward/team"] - 1)
        assert line["tokens/counterfactual"] == 0
    total = sum(line["tokens/joint"] + line["tokens/rating"] for line in metrics(tmp_path / "run"))
    assert metrics(tmp_path / "run")[-1]["tokens/total"] == total
    assert result.summary["tokens_rating"] == sum(line["tokens/rating"] for line in metrics(tmp_path / "run"))
    for group, record in read_episodes(tmp_path / "run" / "episodes" / "step-000001.jsonl.gz"):
        for rollout, raw in zip(group.rollouts, record["rollouts"], strict=True):
            assert [rating.turn.agent for rating in rollout.ratings.values()] == ["thinker", "solver"]
            assert raw["credit"] == dict.fromkeys(("thinker", "solver"), 2 * rollout.reward - 1)


def test_the_metrics_of_ratings_are_in_the_table(tmp_path: Path) -> None:
    ccpo.train(recipe(tmp_path / "run", trainer={"steps": 1}))
    page = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    for name in metrics(tmp_path / "run")[0]:
        if "rat" in name.partition("/")[2] or name.startswith("rating/"):
            assert f"`{re.sub('/(thinker|solver)/', '/AGENT/', name)}`" in page, name


def test_the_ratings_of_the_episodes_are_in_the_table(tmp_path: Path) -> None:
    ccpo.train(recipe(tmp_path / "run", trainer={"steps": 1}))
    _, record = next(read_episodes(tmp_path / "run" / "episodes" / "step-000001.jsonl.gz"))
    rating = record["rollouts"][0]["ratings"]["solver"]
    page = (Path(__file__).parents[1] / "docs" / "episodes.md").read_text(encoding="utf-8")
    table = page.partition("### Each of `ratings`")[2].partition("###")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.M)) == set(rating)
    assert rating["turn"].keys() == record["rollouts"][0]["turns"][0].keys()


def test_ratings_leave_the_plays_as_they_are_and_a_cut_run_goes_on(tmp_path: Path) -> None:
    ccpo.train(recipe(tmp_path / "rated"))
    ccpo.train(
        recipe(tmp_path / "shared", credit={"kind": "shared"} | dict.fromkeys(())) | {"credit": {"kind": "shared"}}
    )
    rated_line, shared_line = metrics(tmp_path / "rated")[0], metrics(tmp_path / "shared")[0]
    assert rated_line["reward/team"] == shared_line["reward/team"]
    assert rated_line["tokens/joint"] == shared_line["tokens/joint"]
    assert shared_line["tokens/rating"] == 0
    ccpo.train(recipe(tmp_path / "cut", trainer={"steps": 1}))
    ccpo.resume(tmp_path / "cut", steps=2)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "rated")


def test_a_team_that_cannot_be_asked_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be asked for ratings.*max_prompt_tokens"):
        ccpo.train(recipe(tmp_path / "run", rollout={"max_prompt_tokens": 64}))
    assert not (tmp_path / "run" / "evaluations.jsonl").exists()
    with pytest.raises(UserError, match=r"rating prompt shows \{solvr\}.*'solver'"):
        prepare(load_recipe(recipe(tmp_path / "run", credit={"prompt": "{solvr}?"})))
    with pytest.raises(UserError, match=r"only one; use credit\.kind: shared"):
        prepare(load_recipe(recipe(tmp_path / "run") | {"team": {"kind": "voting", "k": 1}}))
    assert prepare(load_recipe(recipe(tmp_path / "run", credit={"strict": True, "center": "uniform"}))).rule.strict


def test_a_play_that_is_a_function_trains_on_its_ratings(tmp_path: Path) -> None:
    async def play(problem: Any, speak: Any) -> str:
        thought = await speak("a-1", "T{problem}:")
        return await speak("solver", "S{problem}[[:{thought}]]=", thought=thought) or ""

    ccpo.train(recipe(tmp_path / "base", trainer={"steps": 0}))
    model = next(Path(os.environ["CCPO_CACHE"]).glob("base-*/config.json")).parent
    team = PlayTeam("by_hand", ("a-1", "solver"), play)
    ccpo.train(recipe(tmp_path / "run", model={"path": str(model)}), team=team)
    line = metrics(tmp_path / "run")[-1]
    assert line["tokens/rating"] > 0
    assert line["credit/a-1/rating_valid"] == 0


# ---- raters who answer


class Rigged:
    """A real engine, but ratings, told by their length, are what ``say`` says."""

    def __init__(self, engine: Any, say: Callable[[int], str]) -> None:
        self.engine, self.say = engine, say

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def generate(self, requests: Any) -> Any:
        found = self.engine.generate(requests)
        texts = [self.say(request.seed) if request.max_tokens == RATING_TOKENS else None for request in requests]
        return [c if text is None else replace(c, text=text) for c, text in zip(found, texts, strict=True)]


@pytest.fixture
def rigged(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], str]], None]:
    """Lets all raters of the runs of a test say what a function of the seed says."""

    def rig(say: Callable[[int], str]) -> None:
        make = ccpo.crew.make_engine
        monkeypatch.setattr(ccpo.crew, "make_engine", lambda *given, **keys: Rigged(make(*given, **keys), say))

    return rig


def test_raters_who_answer_move_the_credit(tmp_path: Path, rigged: Any) -> None:
    def say(seed: int) -> str:
        pair = [(seed % 9 + 1) / 10, (9 - seed % 9) / 10]
        return json.dumps({"outcome": "correct" if seed % 4 == 0 else "wrong", "pair": pair})

    rigged(say)
    ccpo.train(recipe(tmp_path / "run"))
    lines = metrics(tmp_path / "run")
    for group, record in read_episodes(tmp_path / "run" / "episodes" / "step-000001.jsonl.gz"):
        shares = {a: [[r.ratings[a].shares for r in group.rollouts]] for a in ("thinker", "solver")}
        expected, _ = SelfEval()(rated([[r.reward for r in group.rollouts]], shares), {})
        for agent in ("thinker", "solver"):
            credit_PN = t([[r["credit"][agent] for r in record["rollouts"]]])
            torch.testing.assert_close(credit_PN, expected.credit[agent], atol=1e-6, rtol=0)
    for line in lines:
        assert 0.3 < line["rating/valid"] < 1
        assert line["credit/thinker/rated_share"] + line["credit/solver/rated_share"] == pytest.approx(1)
        assert line["credit/thinker/same_as_shared"] == line["credit/solver/same_as_shared"] == 0
    assert lines[0]["credit/thinker/no_signal"] < 1  # ratings tell rollouts apart where the reward does not


def test_whatever_raters_say_the_run_goes_on(tmp_path: Path, rigged: Any) -> None:
    words = ["{" * 5000, '{"outcome":"wrong","pair":[1e999,0]}', "\ud800", '{"outcome":', "", "<eos>" * 50, "\x00"]
    rigged(lambda seed: words[seed % len(words)])
    ccpo.train(recipe(tmp_path / "run"))
    ccpo.train(recipe(tmp_path / "shared") | {"credit": {"kind": "shared"}})
    lines, plain = metrics(tmp_path / "run"), metrics(tmp_path / "shared")
    assert [line["rating/valid"] for line in lines] == [0, 0]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert lines[0]["reward/team"] == plain[0]["reward/team"]
