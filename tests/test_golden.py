"""Numbers of the paper authors' implementation and of verl, reproduced to 1e-5.

The files are not part of the project. ``CCPO_GOLDEN_CREDIT`` and ``CCPO_GOLDEN_LOSSES`` name others of the same form.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ccpo.credit import ESTIMATORS, CCPOv1, CCPOv2, SelfEval
from ccpo.credit.history import Ema, sigma, trust
from ccpo.losses import AGGREGATES, KLS, LOSSES, denominators
from ccpo.teams import parse_rating
from ccpo.types import CreditInputs

torch.set_num_threads(1)
DATA = Path(__file__).parents[2] / "shared" / "data"
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
LOSS_NAMES = {"vanilla": "ppo_clip"} | {name: name for name in LOSSES}


def load(variable: str, name: str) -> dict[str, Any]:
    named = os.environ.get(variable)
    path = Path(named or DATA / name)
    if named or path.is_file():  # a file that was named must be there
        return json.loads(path.read_text(encoding="utf-8"))
    return {}


CREDIT = load("CCPO_GOLDEN_CREDIT", "golden_credit.json")
LOSS = load("CCPO_GOLDEN_LOSSES", "golden_losses.json")


def cases(data: dict[str, Any], key: str, *labels: str) -> list[Any]:
    found = data.get(key, [])
    if not found:
        return [pytest.param(None, marks=pytest.mark.skip(reason=f"no golden file with {key!r} at hand"))]
    return [
        pytest.param(case, id="-".join([key, str(i), *(str(case[label]) for label in labels if label in case)]))
        for i, case in enumerate(found)
    ]


def f64(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def assert_equal(actual: torch.Tensor, expected: Any) -> None:
    torch.testing.assert_close(actual.double(), f64(expected), **TOLERANCE)


def think_solve(reward_PN: torch.Tensor, solo_PN: torch.Tensor) -> CreditInputs:
    return CreditInputs(
        agents=("thinker", "solver"),
        decider="solver",
        active=("thinker", "solver"),
        reward_PN=reward_PN,
        without={("thinker",): solo_PN[:, None, :]},
    )


@pytest.mark.parametrize("case", cases(CREDIT, "v1", "config"))
def test_v1(case: dict[str, Any]) -> None:
    names = {"ema_decay": "decay"}
    rule = CCPOv1(**{names.get(key, key): value for key, value in case["config"].items()})
    state = rule.start()
    for step in case["steps"]:
        outputs, state = rule(think_solve(f64(step["joint"]), f64(step["solo"])), state)
        state = json.loads(json.dumps(state))  # as a checkpoint would
        assert_equal(outputs.credit["thinker"], step["thinker"])
        assert_equal(outputs.credit["solver"], step["solver"])
        assert outputs.metrics["credit/solver/gate"] == pytest.approx(step["gate_before"], abs=1e-5)
        assert statistics(rule, state) == pytest.approx(step["after"], abs=1e-5)


def statistics(rule: CCPOv1, state: dict[str, Any]) -> dict[str, float]:
    emas = {name: Ema.from_json(state[name]) for name in ("thinker/delta", "solver/joint", "solver/solo")}
    found = {"n_updates": float(emas["solver/joint"].updates)}
    for name, ema in emas.items():
        key = name.replace("thinker", "agent1").replace("solver", "agent2")
        found |= {f"{key}_mean": ema.mean, f"{key}_std": sigma(ema, rule.eps)}
    return found | {"agent2/gate_coef": trust(emas["thinker/delta"], eta=rule.eta, eps=rule.eps)}


@pytest.mark.parametrize("case", cases(CREDIT, "v2", "solo", "bonus"))
def test_v2(case: dict[str, Any]) -> None:
    rule = CCPOv2(solo=case["solo"], bonus=case["bonus"])
    group_B = torch.tensor(case["group"])
    for group in group_B.unique():  # one problem at a time: groups may differ in size
        rows = group_B == group
        joint, solo = f64(case["joint"])[rows], f64(case["solo_reward"])[rows]
        outputs, _ = rule(think_solve((joint[None] + 1) / 2, (solo[None] + 1) / 2), rule.start())
        assert_equal(outputs.credit["thinker"][0], f64(case["thinker"])[rows].tolist())
        assert_equal(outputs.credit["solver"][0], f64(case["solver"])[rows].tolist())


@pytest.mark.parametrize("case", cases(CREDIT, "sepo", "center_by_group"))
def test_sepo(case: dict[str, Any]) -> None:
    rule = SelfEval(center="group" if case["center_by_group"] else "uniform")
    P = len(set(case["group"]))
    reward_PN = (f64(case["outcome"]).view(P, -1) + 1) / 2
    shares = {agent: f64(case[f"by_{agent}"]).view(*reward_PN.shape, 2) for agent in ("thinker", "solver")}
    inputs = replace(think_solve(reward_PN, torch.zeros(P, 1)), without={}, shares=shares)
    outputs, _ = rule(inputs, rule.start())
    for agent in ("thinker", "solver"):
        assert_equal(outputs.credit[agent].flatten(), case[agent])


@pytest.mark.parametrize("case", cases(CREDIT, "sepo_parse", "expected_outcome"))
def test_sepo_parse(case: dict[str, Any]) -> None:
    shares, valid = parse_rating(case["text"], case["expected_outcome"], ("thinker", "solver"))
    assert (list(shares), valid) == (case["pair"], case["valid"])


@pytest.mark.parametrize("case", cases(LOSS, "advantage", "name"))
def test_advantage(case: dict[str, Any]) -> None:
    mask_BT = f64(case["mask"])
    tokens_B = mask_BT.sum(1)
    estimator = ESTIMATORS[case["name"]]
    advantage_B = estimator(f64(case["reward"]), torch.tensor(case["group"]), tokens_B, raw_singletons=True)
    if "advantage" in case:
        assert_equal(advantage_B, case["advantage"])
    else:
        assert_equal(advantage_B[:, None] * mask_BT, case["advantage_per_token"])


@pytest.mark.parametrize("case", cases(LOSS, "loss", "name", "aggregate"))
def test_loss_and_gradient(case: dict[str, Any]) -> None:
    if case["name"] not in LOSS_NAMES:
        pytest.skip(f"loss {case['name']!r} is not one of the library's")
    config = case["config"]
    mask_BT = f64(case["mask"])
    new_BT = f64(case["new"]).requires_grad_()
    symmetric = config.get("clip_ratio", 0.2)
    low, high = (config.get(key) for key in ("clip_ratio_low", "clip_ratio_high"))
    loss_BT, _ = LOSSES[LOSS_NAMES[case["name"]]](
        new_BT,
        f64(case["old"]),
        f64(case["advantage"]),
        mask_BT,
        clip_low=symmetric if low is None else low,
        clip_high=symmetric if high is None else high,
        # verl's token-ratio loss has a dual clip, 3 unless told otherwise; its other losses have none
        dual_clip=config.get("clip_ratio_c", 3.0) if case["name"] == "vanilla" else None,
    )
    aggregate, constant = case["aggregate"], None
    if aggregate == "seq-mean-token-sum-norm":
        aggregate, constant = "constant", config.get("loss_scale_factor") or mask_BT.shape[1]
    loss = AGGREGATES[aggregate](loss_BT, mask_BT, denominators(mask_BT.sum(1), constant=constant))
    loss.backward()
    assert_equal(loss.detach(), case["loss"])
    assert new_BT.grad is not None
    assert_equal(new_BT.grad, case["grad"])


@pytest.mark.parametrize("case", cases(LOSS, "kl", "name"))
def test_kl(case: dict[str, Any]) -> None:
    assert_equal(KLS[case["name"]](f64(case["logprob"]), f64(case["ref"])), case["kl"])
