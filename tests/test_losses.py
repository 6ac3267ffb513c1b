"""Policy losses, KL estimators and means: hand-derived numbers, gradients, and what must not change anything."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ccpo.losses import AGGREGATES, KLS, LOSSES, Denominators, denominators, truncated_weights

torch.set_num_threads(1)
CLIP = {"clip_low": 0.2, "clip_high": 0.3}
OPEN = {"clip_low": 0.999, "clip_high": 1e6}


def t(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def logs(*ratios: float) -> Tensor:
    """One row whose token ratios against log-probs of 0 are these."""
    return torch.tensor([ratios], dtype=torch.float64).log()


def run(name: str, logprob_BT: Tensor, advantage: Any, mask: Any = None, **more: Any) -> tuple[Tensor, Tensor, dict]:
    """Loss per token, gradient of its sum, metrics; old log-probs are 0."""
    leaf = logprob_BT.clone().requires_grad_()
    mask_BT = torch.ones_like(leaf) if mask is None else t(mask)
    loss_BT, metrics = LOSSES[name](leaf, torch.zeros_like(leaf), t(advantage), mask_BT, **{**CLIP, **more})
    loss_BT.sum().backward()
    assert leaf.grad is not None
    return loss_BT.detach(), leaf.grad, metrics


def batch(seed: int, rows: int = 6, width: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    return {
        "new": torch.randn(rows, width, generator=generator, dtype=torch.float64) * 0.3 - 1,
        "old": torch.randn(rows, width, generator=generator, dtype=torch.float64) * 0.3 - 1,
        "advantage": torch.randn(rows, generator=generator, dtype=torch.float64),
        "mask": (torch.arange(width)[None] < lengths[:, None]).double(),
        "segment": torch.tensor([0, 0, 2, 5, 5, 5])[:rows],
    }


# ---- losses


@pytest.mark.parametrize("name", ["ppo_clip", "reinforce++"])
def test_token_clip_by_hand(name: str) -> None:
    loss, grad, metrics = run(name, logs(0.5, 0.9, 1.2, 2.0), [2.0])
    torch.testing.assert_close(loss, t([[-1.0, -1.8, -2.4, -2.6]]))  # only a ratio that is too good is held
    torch.testing.assert_close(grad, t([[-1.0, -1.8, -2.4, 0.0]]))
    loss, grad, _ = run(name, logs(0.5, 0.9, 1.2, 2.0), [-2.0])
    torch.testing.assert_close(loss, t([[1.6, 1.8, 2.4, 4.0]]))
    torch.testing.assert_close(grad, t([[0.0, 1.8, 2.4, 4.0]]))
    assert float(metrics["clip_frac"]) == 0.25
    assert float(metrics["ratio_max"]) == pytest.approx(2.0)
    assert float(metrics["ratio_mean"]) == pytest.approx(4.6 / 4)
    assert float(metrics["approx_kl"]) == pytest.approx(-math.log(0.5 * 0.9 * 1.2 * 2.0) / 4)
    assert int(metrics["tokens"]) == 4


def test_dual_clip_bounds_negative_advantages_alone() -> None:
    loss, grad, metrics = run("ppo_clip", logs(2.0, 5.0), [-1.0], dual_clip=3.0)
    torch.testing.assert_close(loss, t([[2.0, 3.0]]))
    torch.testing.assert_close(grad, t([[2.0, 0.0]]))
    assert float(metrics["dual_clip_frac"]) == 0.5
    loss, _, metrics = run("ppo_clip", logs(0.5, 0.1), [1.0], dual_clip=3.0)
    torch.testing.assert_close(loss, t([[-0.5, -0.1]]))
    assert float(metrics["dual_clip_frac"]) == 0.0


def test_gspo_by_hand() -> None:
    # geometric mean of 0.5 and 2.42 is 1.1: the whole sequence counts as 1.1
    loss, grad, _ = run("gspo", logs(0.5, 2.42), [2.0])
    torch.testing.assert_close(loss, t([[-2.2, -2.2]]))
    torch.testing.assert_close(grad, t([[-2.2, -2.2]]))
    loss, grad, metrics = run("gspo", logs(2.0, 2.0), [2.0])
    torch.testing.assert_close(loss, t([[-2.6, -2.6]]))
    torch.testing.assert_close(grad, t([[0.0, 0.0]]))
    assert float(metrics["clip_frac"]) == 1.0


def test_gspo_segments_share_one_ratio() -> None:
    logprob = torch.cat([logs(0.5, 8.0), logs(0.25, 1.0), logs(1.1, 1.1)])
    mask = [[1, 1], [1, 0], [1, 1]]
    # rows 0 and 1 are one agent's turns: three tokens, product 1, so ratio 1; row 2 stands alone
    loss, _, metrics = run("gspo", logprob, [1.0, 1.0, 1.0], mask, segment_B=torch.tensor([7, 7, 3]))
    torch.testing.assert_close(loss, t([[-1.0, -1.0], [-1.0, 0.0], [-1.1, -1.1]]))
    assert int(metrics["tokens"]) == 5
    alone, _, _ = run("gspo", logprob, [1.0, 1.0, 1.0], mask)
    torch.testing.assert_close(alone, t([[-1.3, -1.3], [-0.25, 0.0], [-1.1, -1.1]]))


def test_gspo_segment_gradient_is_that_of_the_shared_ratio() -> None:
    """The token form, averaged over the segment's tokens, has the gradient of ``-A exp(mean log ratio)``."""
    data = batch(1, rows=2)
    data["mask"][:] = 1
    for segment in (torch.tensor([0, 0]), torch.tensor([0, 1])):
        leaf, direct = (data["new"].clone().requires_grad_() for _ in range(2))
        loss_BT, _ = LOSSES["gspo"](leaf, data["old"], t([0.7, 0.7]), data["mask"], segment_B=segment, **OPEN)
        loss_BT.mean().backward()
        log_ratio = direct - data["old"]
        ratio = log_ratio.mean().exp() if segment[1] == 0 else log_ratio.mean(1).exp().mean()
        (-0.7 * ratio).backward()
        torch.testing.assert_close(leaf.grad, direct.grad)


def test_turn_by_hand_and_its_gradient_goes_through_the_mean() -> None:
    loss, grad, _ = run("turn", logs(0.5, 2.42), [2.0])
    torch.testing.assert_close(loss, t([[-2.2, -2.2]]))
    torch.testing.assert_close(grad, t([[-2.2, -2.2]]))  # 2 tokens, each half of the gradient, at 2 places
    loss, grad, _ = run("turn", logs(0.5, 2.42, 9.0), [2.0], [[1, 1, 0]])
    torch.testing.assert_close(loss, t([[-2.2, -2.2, 0.0]]))
    torch.testing.assert_close(grad, t([[-2.2, -2.2, 0.0]]))
    _, grad, _ = run("turn", logs(2.0, 2.0), [2.0])
    torch.testing.assert_close(grad, t([[0.0, 0.0]]))


def test_turn_ratio_is_per_row_whatever_the_segments() -> None:
    logprob = torch.cat([logs(0.9, 0.9), logs(1.2, 1.2)])
    loss, _, _ = run("turn", logprob, [1.0, 1.0], segment_B=torch.tensor([0, 0]))
    torch.testing.assert_close(loss, t([[-0.9, -0.9], [-1.2, -1.2]]))


def test_cispo_by_hand() -> None:
    loss, grad, metrics = run("cispo", logs(0.5, 1.2, 2.0), [2.0])
    weights = t([[0.8, 1.2, 1.3]])
    torch.testing.assert_close(grad, -2 * weights)  # clipped tokens keep a gradient
    torch.testing.assert_close(loss, -2 * weights * logs(0.5, 1.2, 2.0))
    assert float(metrics["clip_frac"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", list(LOSSES))
def test_on_policy_all_losses_have_the_policy_gradient(name: str) -> None:
    data = batch(2)
    leaf = data["old"].clone().requires_grad_()
    loss_BT, metrics = LOSSES[name](leaf, data["old"], data["advantage"], data["mask"], **CLIP)
    loss_BT.sum().backward()
    torch.testing.assert_close(leaf.grad, -data["advantage"][:, None] * data["mask"])
    assert float(metrics["clip_frac"]) == 0.0
    assert float(metrics["ratio_mean"]) == pytest.approx(1.0)


@pytest.mark.parametrize("name", list(LOSSES))
def test_padding_never_matters(name: str) -> None:
    data = batch(3)
    wide = {k: torch.cat([data[k], torch.zeros(6, 3, dtype=torch.float64)], 1) for k in ("new", "old", "mask")}
    holes = wide["mask"] == 0
    found = []
    for fill in (0.0, math.nan, -math.inf):
        new, old = (wide[k].masked_fill(holes, fill).requires_grad_(k == "new") for k in ("new", "old"))
        loss_BT, metrics = LOSSES[name](new, old, data["advantage"], wide["mask"], segment_B=data["segment"], **CLIP)
        loss_BT.sum().backward()
        found.append((loss_BT.detach(), new.grad, *(m.double() for m in metrics.values())))
        assert (loss_BT[holes] == 0).all()
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    narrow, _ = LOSSES[name](
        data["new"], data["old"], data["advantage"], data["mask"], segment_B=data["segment"], **CLIP
    )
    torch.testing.assert_close(found[0][0][:, :5], narrow)


@pytest.mark.parametrize("name", list(LOSSES))
def test_gradients_agree_with_finite_differences(name: str) -> None:
    data = batch(4)
    mask = torch.ones_like(data["mask"])

    def total(logprob_BT: Tensor) -> Tensor:
        loss_BT, _ = LOSSES[name](logprob_BT, data["old"], data["advantage"], mask, **OPEN)
        return loss_BT.sum()

    analytic = torch.autograd.functional.jacobian(total, data["new"])
    if name in ("gspo", "cispo"):  # both stop the gradient on purpose: their value is not their gradient's integral
        ratio = (data["new"] - data["old"]).exp()
        if name == "gspo":
            ratio = (data["new"] - data["old"]).mean(1, keepdim=True).exp().expand_as(ratio)
        torch.testing.assert_close(analytic, -data["advantage"][:, None] * ratio)
        return
    step = 1e-6
    numeric = torch.zeros_like(analytic)
    for i in range(numeric.numel()):
        shift = torch.zeros_like(numeric).flatten()
        shift[i] = step
        up, down = (total(data["new"] + sign * shift.view_as(numeric)) for sign in (1, -1))
        numeric.view(-1)[i] = (up - down) / (2 * step)
    torch.testing.assert_close(analytic, numeric, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", list(LOSSES))
def test_raising_a_good_rows_probability_lowers_the_loss(name: str) -> None:
    data = batch(5)
    leaf = data["old"].clone().requires_grad_()
    loss_BT, _ = LOSSES[name](leaf, data["old"], data["advantage"].abs() + 0.1, data["mask"], **CLIP)
    loss_BT.sum().backward()
    assert (leaf.grad[data["mask"].bool()] < 0).all()


@pytest.mark.parametrize("name", list(LOSSES))
def test_weights_multiply_the_loss_and_carry_no_gradient(name: str) -> None:
    data = batch(6)
    weight = torch.rand(6, 5, dtype=torch.float64).requires_grad_()
    plain, _ = LOSSES[name](data["new"], data["old"], data["advantage"], data["mask"], **CLIP)
    weighed, _ = LOSSES[name](data["new"], data["old"], data["advantage"], data["mask"], weight_BT=weight, **CLIP)
    torch.testing.assert_close(weighed, plain * weight)
    assert not weighed.requires_grad


@pytest.mark.parametrize("name", list(LOSSES))
@pytest.mark.parametrize("gap", [-1e4, 1e4])
def test_extreme_ratios_stay_finite(name: str, gap: float) -> None:
    for advantage in (-1.0, 1.0):
        loss, grad, metrics = run(name, torch.full((1, 3), gap, dtype=torch.float64), [advantage])
        assert torch.isfinite(loss).all()
        assert torch.isfinite(grad).all()
        assert all(torch.isfinite(m).all() for m in metrics.values())


@pytest.mark.parametrize("name", list(LOSSES))
def test_a_row_without_tokens_and_an_empty_batch(name: str) -> None:
    loss, grad, _ = run(name, logs(0.5, 2.0), [1.0], [[0, 0]])
    assert (loss == 0).all()
    assert (grad == 0).all()
    empty = torch.zeros(0, 4, dtype=torch.float64)
    loss_BT, metrics = LOSSES[name](empty, empty, t([]), empty, **CLIP)
    assert loss_BT.shape == (0, 4)
    assert int(metrics["tokens"]) == 0


@pytest.mark.parametrize("name", list(LOSSES))
def test_wrong_shapes_are_refused(name: str) -> None:
    ok, row = torch.zeros(2, 3), torch.zeros(2)
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        LOSSES[name](ok, ok[:, :2], row, ok, **CLIP)
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        LOSSES[name](row, row, row, row, **CLIP)
    with pytest.raises(ValueError, match="advantage"):
        LOSSES[name](ok, ok, ok, ok, **CLIP)
    with pytest.raises(ValueError, match="weight"):
        LOSSES[name](ok, ok, row, ok, weight_BT=row, **CLIP)


def test_other_mistakes_are_refused() -> None:
    ok, row = torch.zeros(2, 3), torch.zeros(2)
    with pytest.raises(ValueError, match="segment"):
        LOSSES["gspo"](ok, ok, row, ok, segment_B=torch.zeros(3, dtype=torch.long), **CLIP)
    with pytest.raises(ValueError, match="over 1"):
        LOSSES["ppo_clip"](ok, ok, row, ok, dual_clip=0.5, **CLIP)
    with pytest.raises(ValueError, match="cispo"):
        LOSSES["cispo"](ok, ok, row, ok, dual_clip=3.0, **CLIP)


def test_truncated_weights_by_hand() -> None:
    learner = logs(0.5, 2.0, 8.0, 1.0).requires_grad_()
    found = truncated_weights(learner, torch.zeros(1, 4, dtype=torch.float64), t([[1, 1, 1, 0]]), cap=4.0)
    torch.testing.assert_close(found, t([[0.5, 2.0, 4.0, 1.0]]))
    assert not found.requires_grad
    masked = truncated_weights(torch.full((1, 1), math.nan), torch.zeros(1, 1), torch.zeros(1, 1), cap=2.0)
    assert masked.item() == 1.0


def test_truncated_weights_refuse_bad_input() -> None:
    ok = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="cap"):
        truncated_weights(ok, ok, ok, cap=0.0)
    with pytest.raises(ValueError, match="shape"):
        truncated_weights(ok, ok[:, :1], ok, cap=1.0)


# ---- KL


def test_kl_by_hand() -> None:
    logprob, ref = t([[math.log(0.5)]]), t([[math.log(0.25)]])
    d = math.log(2)
    expected = {"k1": d, "abs": d, "k2": d * d / 2, "k3": 0.5 - 1 + d, "kl": d, "mse": d * d / 2, "low_var_kl": d - 0.5}
    assert {name: kl(logprob, ref).item() for name, kl in KLS.items()} == pytest.approx(expected)
    assert KLS["k1"](ref, logprob).item() == pytest.approx(-d)
    assert KLS["k3"](ref, logprob).item() == pytest.approx(2 - 1 - d)


def test_kl_expectations_over_a_whole_vocabulary() -> None:
    """k1 and k3 are unbiased, and the gradient of k2 under the policy's own samples is the gradient of the KL."""
    logits = t([0.3, -0.7, 1.1, 0.0]).requires_grad_()
    policy, ref = logits.log_softmax(0), t([0.1, 0.2, -0.4, 0.9]).log_softmax(0)
    true = (policy.exp() * (policy - ref)).sum()
    for name in ("k1", "k3"):
        estimate = (policy.exp() * KLS[name](policy[None], ref[None])[0]).sum()
        assert estimate.item() == pytest.approx(true.item(), abs=1e-12)
    exact = torch.autograd.grad(true, logits, retain_graph=True)[0]
    by_k2 = torch.autograd.grad((policy.exp().detach() * KLS["k2"](policy[None], ref[None])[0]).sum(), logits)[0]
    torch.testing.assert_close(by_k2, exact)


@given(st.floats(-30, 0), st.floats(-30, 0))
def test_k3_is_not_negative_and_bounded(logprob: float, ref: float) -> None:
    assert -1e-12 <= KLS["k3"](t([[logprob]]), t([[ref]])).item() <= 10


@pytest.mark.parametrize("name", list(KLS))
def test_kl_refuses_to_broadcast(name: str) -> None:
    with pytest.raises(ValueError, match="one shape"):
        KLS[name](torch.zeros(2, 3), torch.zeros(2, 1))


# ---- means


LOSS = [[1.0, 2.0, 9.0], [4.0, 9.0, 9.0], [3.0, 3.0, 6.0], [9.0, 9.0, 9.0]]
MASK = [[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token-mean", 19 / 6),
        ("seq-mean-token-mean", (1.5 + 4 + 4) / 3),
        ("seq-mean-token-sum", (3 + 4 + 12) / 3),
        ("constant", (3 + 4 + 12) / (3 * 10)),
        ("trajectory-mean", ((1.5 + 4) / 2 + 4) / 2),
    ],
)
def test_means_by_hand(name: str, expected: float) -> None:
    segment = torch.tensor([2, 2, 0, 5])  # the last row has no token: its segment counts nowhere
    counts = denominators(t(MASK).sum(1), segment, constant=10.0)
    assert (counts.tokens, counts.rows, counts.segments) == (6, 3, 2)
    assert AGGREGATES[name](t(LOSS), t(MASK), counts, segment).item() == pytest.approx(expected)


@pytest.mark.parametrize("name", list(AGGREGATES))
def test_the_mean_of_ones_is_one(name: str) -> None:
    data = batch(7)
    counts = denominators(data["mask"].sum(1), data["segment"], constant=1.0)
    expected = 1.0 if name not in ("seq-mean-token-sum", "constant") else float(data["mask"].sum() / 6)
    found = AGGREGATES[name](torch.ones_like(data["new"]), data["mask"], counts, data["segment"])
    assert found.item() == pytest.approx(expected)


def gradient(loss: str, mean: str, data: dict[str, Tensor], pieces: list[Tensor], counts: Denominators) -> Tensor:
    leaf = data["new"].clone().requires_grad_()
    for rows in pieces:
        segment = data["segment"][rows]
        loss_BT, _ = LOSSES[loss](
            leaf[rows], data["old"][rows], data["advantage"][rows], data["mask"][rows], segment_B=segment, **CLIP
        )
        AGGREGATES[mean](loss_BT, data["mask"][rows], counts, segment).backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("mean", list(AGGREGATES))
@pytest.mark.parametrize("loss", list(LOSSES))
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_micro_batches_do_not_change_a_gradient(loss: str, mean: str, seed: int) -> None:
    data = batch(seed)
    counts = denominators(data["mask"].sum(1), data["segment"], constant=7.0)
    whole = gradient(loss, mean, data, [torch.arange(6)], counts)
    # rows of a segment together, in any order; where no ratio is shared even a segment may be split
    splits = [[torch.tensor([5, 3, 4]), torch.tensor([2]), torch.tensor([1, 0])]]
    if loss != "gspo":
        splits.append([torch.tensor([i]) for i in range(6)])
    for pieces in splits:
        parts = gradient(loss, mean, data, pieces, counts)
        torch.testing.assert_close(parts, whole, rtol=0, atol=1e-15)
    assert (whole != 0).any()


@pytest.mark.parametrize("mean", list(AGGREGATES))
def test_padding_does_not_change_a_mean(mean: str) -> None:
    data = batch(8)
    counts = denominators(data["mask"].sum(1), data["segment"], constant=7.0)
    wide = torch.cat([data["new"], torch.full((6, 2), math.nan)], 1)
    mask = torch.cat([data["mask"], torch.zeros(6, 2)], 1)
    a = AGGREGATES[mean](data["new"], data["mask"], counts, data["segment"])
    torch.testing.assert_close(AGGREGATES[mean](wide, mask, counts, data["segment"]), a)


def test_without_segments_each_row_is_its_own() -> None:
    data = batch(9)
    counts = denominators(data["mask"].sum(1))
    by_row = AGGREGATES["trajectory-mean"](data["new"], data["mask"], counts, torch.arange(6))
    torch.testing.assert_close(by_row, AGGREGATES["seq-mean-token-mean"](data["new"], data["mask"], counts))


def test_mistakes_with_denominators() -> None:
    ones = torch.ones(2, 3)
    with pytest.raises(ValueError, match="single trained token"):
        denominators(torch.zeros(2))
    with pytest.raises(ValueError, match=r"\[B\]"):
        denominators(torch.ones(2), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\[B\]"):
        denominators(torch.ones(2), torch.zeros(2))
    counts = denominators(torch.ones(2))
    with pytest.raises(ValueError, match="constant"):
        AGGREGATES["constant"](ones, ones, counts)
    with pytest.raises(ValueError, match="segment_B"):
        AGGREGATES["trajectory-mean"](ones, ones, counts)
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        AGGREGATES["token-mean"](ones, ones[:, :2], counts)
