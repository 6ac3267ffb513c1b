"""The benchmarks: that sides take turns, that wrong results fail, and what is written down."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from ccpo.bench import (
    choices,
    counterfactuals,
    decode,
    figures,
    kernels,
    memory,
    peers,
    report,
    scaling,
    shapes,
    step,
    update,
)
from ccpo.bench.command import bench
from ccpo.bench.ours import OurStep
from ccpo.bench.timing import Comparison, in_turns
from ccpo.cli import app
from ccpo.engines import make_engine
from ccpo.engines.products import Product
from ccpo.errors import RunFailure, UserError
from ccpo.learner import forward

torch.set_num_threads(1)
SHAPE = {"prompts": 2, "samples": 2, "tokens": 5}


def comparison(**more) -> Comparison:
    return Comparison(
        **{
            "part": "step",
            "name": "a step",
            "shape": {"prompts": 8},
            "seconds": {"ccpo": [1.0, 2.0, 4.0], "other": [3.0, 4.0, 20.0]},
            "work": 100,
            "unit": "tokens",
            "ours": "ccpo",
            "base": "other",
            **more,
        }
    )


def test_sides_take_turns_and_the_order_turns_round():
    said: list[str] = []
    seconds = in_turns({"a": lambda: said.append("a"), "b": lambda: said.append("b")}, repeats=3, warmup=1)
    assert "".join(said) == "ab" + "ab" + "ba" + "ab"
    assert {side: len(values) for side, values in seconds.items()} == {"a": 3, "b": 3}


def test_ratios_are_of_neighbours():
    found = comparison()
    assert found.medians == {"ccpo": 2.0, "other": 4.0}
    assert found.ratios == (3.0, 2.0, 5.0)  # 3/1, 4/2, 20/4
    assert comparison(base=None).ratios is None


def test_a_power_law_has_its_exponent():
    assert scaling.exponent([1, 2, 4], [5, 20, 80]) == pytest.approx(2.0)


def test_random_models_never_end_a_turn():
    model = shapes.make_model("1M")
    logits = model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0]
    words = shapes.tokenizer()
    for token in (words.eos_token_id, words.pad_token_id):
        assert logits.softmax(-1)[:, token].max() < 1e-4


def unturned(self, length: int) -> torch.Tensor:
    return torch.ones(length, len(self.inv_freq), dtype=torch.complex64)


@pytest.mark.parametrize("fault", [None, "activation", "no places"])
def test_a_decoder_that_is_wrong_is_found(fault, monkeypatch):
    if fault is None:
        assert decode.check("1M", "cpu") < decode.TOLERANCE
        return
    if fault == "activation":
        monkeypatch.setattr("ccpo.engines.products.silu", torch.sigmoid)
    else:
        monkeypatch.setattr("ccpo.engines.weights.Weights.rotations", unturned)
    with pytest.raises(RunFailure, match="differs from transformers'"):
        decode.check("1M", "cpu")


@pytest.mark.parametrize("fault", [None, "activation", "no places"])
def test_an_update_that_is_wrong_is_found(fault, monkeypatch):
    if fault is None:
        assert update.check("1M", "cpu") < update.TOLERANCE
        return
    if fault == "activation":
        monkeypatch.setattr(forward, "silu", torch.sigmoid)
    else:
        ones = lambda rotary, at: torch.ones(len(at), 1, len(rotary.inv_freq), dtype=torch.complex64)  # noqa: E731
        monkeypatch.setattr(forward, "_rotation", ones)
    with pytest.raises(RunFailure, match="gradient"):
        update.check("1M", "cpu")


@pytest.mark.parametrize("K", [1, 2, 5])
def test_the_loops_are_the_same_credit(K):
    inputs = kernels.inputs_of(160, K)
    reward, without = inputs.reward_PN.tolist(), [w[..., 0].tolist() for w in inputs.without.values()]
    ours = kernels.ours(inputs, torch.arange(20).repeat_interleave(8))
    assert torch.allclose(
        torch.stack([*ours.values()]), torch.tensor(kernels.loop(reward, without)).flatten(1), atol=1e-4
    )
    answers, scores = kernels.ballots_of(200, K)
    assert torch.allclose(kernels.vote_credit(answers, scores).T, torch.tensor(kernels.vote_loop(answers.tolist())))


@pytest.mark.parametrize("apart", [0.5, float("nan")])
def test_credit_that_is_wrong_is_found(apart):
    with pytest.raises(RunFailure, match="from the loop's"):
        kernels._compared("votes", 10, 2, {"ccpo": int, "loop": int}, apart, 1)


def test_every_rule_has_a_folder_of_its_own(monkeypatch):
    seen = []

    def fake(team, name, settings, base, folder, repeats, device):
        seen.append((team, folder))
        return comparison(part="counterfactuals", extra={"tokens": 1.0})

    monkeypatch.setattr(counterfactuals, "_compare", fake)
    monkeypatch.setattr(counterfactuals, "save", lambda size, folder: folder)
    found = list(counterfactuals.run("full", repeats=1, device="cpu"))
    assert len(found) == len(set(seen)) == sum(map(len, counterfactuals.RULES.values()))


def test_a_step_of_ours_makes_the_tokens_it_was_asked_for(tmp_path):
    base = shapes.save("1M", tmp_path / "base")
    ours = OurStep(base, tmp_path / "run", "pair", {"rollout": {"prompts": 2, "samples": 2, "max_tokens": 5}})
    ours()
    assert ours.tokens == 2 * 2 * 2 * 5


@pytest.mark.parametrize("k", scaling.VOTERS)
def test_a_step_of_any_number_of_voters(k, tmp_path):
    step = OurStep(shapes.save("1M", tmp_path / "base"), tmp_path / "run", "pair", scaling.of_voters(k))
    assert len(step.trainer.setup.team.agent_names) == k


def test_a_side_that_made_other_tokens_is_found(tmp_path):
    class Short:
        tokens = 3

        def __call__(self) -> None:
            pass

    with pytest.raises(RunFailure, match="tokens were to be made"):
        step._compared("a step", "other", Short(), Short(), SHAPE, 1, 0, "cpu", agents=1)


def test_a_peer_that_is_not_installed_is_told(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    notes: list[str] = []
    assert list(step.run("quick", repeats=1, device="cpu", note=notes.append)) == []
    assert [("trl==1.16.0" in n, "comlrl==1.4.3" in n) for n in notes] == [(True, False), (False, True)]


@pytest.mark.parametrize(
    ("parts", "device", "match"),
    [(["decod"], "cpu", "Did you mean"), ([], "tpu", "cpu or cuda"), (["credit"], "cuda", "cuda")],
)
def test_what_cannot_be_measured_is_refused(parts, device, match, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    with pytest.raises(UserError, match=match):
        bench(parts, device=device)


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        bench(["decode"], device="cuda")


def test_the_page_keeps_what_a_person_wrote(tmp_path):
    page = tmp_path / "benchmarks.md"
    results = {"machine": report.machine("cpu"), "command": " --quick", "minutes": 1.0, "memory": [], "notes": ["trl"]}
    report.write_page(page, results, [comparison()])
    assert "| a step | 2.00 s | 4.00 s (other) | 3.00 [2.00, 5.00] |" in page.read_text()
    page.write_text(page.read_text() + "\n## By hand\n")
    report.write_page(page, results, [comparison(name="another step")])
    assert "another step" in page.read_text() and page.read_text().endswith("\n## By hand\n")


def test_a_page_that_is_not_ours_is_left_alone(tmp_path):
    page = tmp_path / "mine.md"
    page.write_text("# Mine\n")
    with pytest.raises(UserError, match="not written by ccpo bench"):
        bench(["credit"], quick=True, page=page)
    assert page.read_text() == "# Mine\n"


def test_every_part_has_rows_of_its_columns():
    extra = {"of_limit": 0.5, "tokens": 1.1, "exponent": 1.0, "predicted": 1.5}
    for part in report.PARTS:
        if part != "memory":
            assert len(report.row(comparison(part=part, extra=extra))) == len(report.columns(part))


def test_a_choice_is_measured_with_it_and_without_it(monkeypatch):
    """What is switched off is off on that side, and nowhere else."""
    own, real = [], forward.hidden_states
    monkeypatch.setattr(forward, "hidden_states", lambda *given: own.append(1) or real(*given))
    found = {c.name.split(", ")[1]: c for c in choices.run("quick", repeats=1)}
    assert all(c.seconds["with"] and c.seconds["without"] for c in found.values())
    assert found["prompts run once"].extra["predicted"] == pytest.approx(
        (32 * (64 + 32)) / (4 * 64 + 32 * 32), rel=0.05
    )
    del own[:]
    bench = choices._Bench(1)
    bench.no_padding("1M")
    assert len(own) == 3, "two turns of warming up and one that counts; the other side goes through transformers"
    with choices.in_torch():
        plain = make_engine(shapes.make_model("1M"), shapes.tokenizer(), dtype=torch.bfloat16)
    assert type(plain.weights.layers[0].qkv) is Product


def test_every_part_with_ratios_has_its_figure_and_the_page_shows_it(tmp_path):
    found = [comparison(part=part, extra={"predicted": 2.0}) for part in figures.PARTS]
    sides = {"4": [1.0, 1.2], "8": [1.9, 2.1], "16": [4.0, 4.4]}
    scaled = comparison(
        part="scaling",
        name="step time by prompts",
        seconds=sides,
        shape={"values": [4, 8, 16]},
        base=None,
        extra={"exponent": 1.0},
    )
    first, second = (figures.draw_all([*found, scaled], tmp_path / name) for name in "ab")
    assert set(first) == {*(f"ratios_{part}" for part in figures.PARTS), "scaling"}
    for name, path in first.items():
        assert path.read_bytes() == second[name].read_bytes()
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5_000
    assert set(figures.draw_all(found[:1], tmp_path / "a")) == {f"ratios_{found[0].part}"}
    assert len(list((tmp_path / "a").iterdir())) == 1, "figures of other results are gone"


def test_the_command_writes_its_results(tmp_path):
    out = tmp_path / "results.json"
    done = CliRunner().invoke(app, ["bench", "credit", "--quick", "--repeats", "1", "--out", str(out)])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert [c["part"] for c in found["comparisons"]] == ["credit", "credit"]
    assert all(c["medians"]["ccpo"] > 0 for c in found["comparisons"])


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own():
    found = memory.peak("ccpo, one agent", "1M")
    assert found["peak"] > found["before"] > 0
