"""``ccpo plot``: figures of scripted runs, what is in them, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ccpo.errors import UserError
from ccpo.plot import KINDS, plot
from ccpo.plot.data import RunData, methods_of
from ccpo.runfolder import RunFolder
from scripted import by_agent
from scripted_runs import HEALTHY, HEALTHY_VOTE, PAIR, VOTERS, chance, examine, hinting, scripted_run

pytest.importorskip("matplotlib")
from ccpo.plot import figures


def trained(folder: Path, team: Any, say: Any, *, steps: int = 4, **sections: Any) -> RunFolder:
    sections.setdefault("rollout", {"prompts": 4, "samples": 4})
    run = scripted_run(folder, team, say, steps=steps, **sections)
    for step in (0, steps):
        examine(run, team, say, step=step, problems=40)
    return run


def solver(right: float) -> Any:
    return by_agent(
        {"thinker": hinting, "solver": lambda p, s: "yes" if chance(s, p) < right * (0.4 + 0.6 * ("|" in p)) else "no"}
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunFolder]:
    home = tmp_path_factory.mktemp("runs")
    named = {"name": "pair"}
    return {
        "pair-0": trained(home / "pair-0", PAIR, solver(0.9), run={"dir": str(home / "pair-0"), "seed": 0, **named}),
        "pair-1": trained(home / "pair-1", PAIR, solver(0.8), run={"dir": str(home / "pair-1"), "seed": 1, **named}),
        "vote": trained(home / "vote", VOTERS, HEALTHY_VOTE, run={"dir": str(home / "vote"), "name": "vote"}),
    }


def paths(runs: dict[str, RunFolder], *names: str) -> list[Path]:
    return [runs[name].path for name in names or runs]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", ["pdf", "svg", "png"])
def test_every_figure_in_every_format(tmp_path, runs, kind, suffix):
    out = plot(paths(runs), kind, tmp_path / "deep" / f"figure.{suffix}")
    data = out.read_bytes()
    assert len(data) > 3000
    if suffix == "pdf":
        assert data.startswith(b"%PDF")
        assert b"/Subtype /Image" not in data  # vector all through
        assert b"/FontType 3" not in data and b"/Subtype /Type3" not in data
    if suffix == "svg":
        assert b"<image" not in data
        said = " ".join(re.findall(r"<text[^>]*>([^<]*)", data.decode()))
        for word in {
            "curves": ["pair (2 seeds)", "vote", "held-out accuracy"],
            "credit": ["thinker", "voter3", "right rollouts"],
        }.get(kind, []):
            assert word in said
        for word in {
            "lazy": ["thinker blank", "voter1 blank", "messages dropped"],
            "frontier": ["generated tokens of an answer"],
        }.get(kind, []):
            assert word in said


@pytest.mark.parametrize("suffix", ["pdf", "svg"])
def test_the_same_runs_give_the_same_file(tmp_path, runs, suffix):
    one, two = (plot(paths(runs), "curves", tmp_path / f"{i}.{suffix}").read_bytes() for i in (1, 2))
    assert one == two


# --- what is in them ----------------------------------------------------------------------------------------------------


def methods(runs: dict[str, RunFolder], *names: str) -> Any:
    return methods_of([RunData(path) for path in paths(runs, *names)])


def test_runs_of_one_recipe_are_one_method(runs):
    found = methods(runs)
    assert [(m.label, len(m.runs)) for m in found] == [("pair", 2), ("vote", 1)]


def test_methods_of_one_name_are_told_apart_by_what_differs(tmp_path):
    made = [
        trained(
            tmp_path / kind,
            PAIR,
            HEALTHY,
            steps=1,
            run={"name": "same", "dir": str(tmp_path / kind)},
            credit={"kind": kind},
        )
        for kind in ("shared", "removal")
    ]
    labels = [m.label for m in methods_of([RunData(run.path) for run in made])]
    assert labels == ["same, credit.kind shared", "same, credit.kind removal"]


def test_a_curve_is_the_evaluations_and_a_band_lies_around_it(runs):
    figure = figures.curves(methods(runs))
    left, right = figure.axes
    pair, vote = left.lines
    run = RunData(runs["vote"].path)
    assert list(vote.get_ydata()) == [row[3] for row in run.record["curve"]]
    assert list(vote.get_xdata()) == [row[0] / 1000 for row in run.record["curve"]]
    first = [RunData(runs[name].path).record["curve"][0][3] for name in ("pair-0", "pair-1")]
    assert pair.get_ydata()[0] == pytest.approx(sum(first) / 2)
    assert len(left.collections) == len(right.collections) == 1  # one method has several seeds
    low, high = left.collections[0].get_paths()[0].get_extents().get_points()[:, 1]
    assert min(first) - 1e-9 <= low < high


def test_boxes_are_of_the_credit_that_was_paid(runs):
    from ccpo.rollout import read_episodes

    run = runs["pair-0"]
    boxes = RunData(run.path).boxes
    paid = [
        rollout["credit"]["thinker"]
        for _, record in read_episodes(run.episode_file(4))
        for rollout in record["rollouts"]
        if rollout["reward"] >= 0.5
    ]
    late = boxes["late"]["thinker"]["right"]
    assert late["n"] == len(paid)
    assert late["mean"] == pytest.approx(sum(paid) / len(paid), abs=1e-3)


def test_bars_are_the_teams_and_those_with_an_agent_blank(runs):
    figure = figures.lazy(methods(runs, "pair-0"))
    report = RunData(runs["pair-0"].path).reports[-1][1]
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == [report["team"]["mean"], report["blank"]["thinker"]["mean"]]
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == ["team", "thinker blank"]


@pytest.mark.parametrize("kind", ["lazy", "frontier"])
def test_a_team_that_is_never_right_has_figures_too(tmp_path, kind):
    never = trained(tmp_path / "never", PAIR, solver(0.0), steps=1)
    assert plot([never.path], kind, tmp_path / "a.svg").is_file()


def test_the_frontier_is_what_nobody_beats_at_its_cost():
    assert figures.pareto([(3, 0.9), (1, 0.5), (2, 0.4), (4, 0.9), (1, 0.3)]) == [(1, 0.5), (3, 0.9)]
    assert figures.pareto([(1, 0.5)]) == [(1, 0.5)]


def test_many_methods_differ_in_more_than_colour():
    looks = {(look["color"], look["linestyle"]) for look in map(figures.look, range(20))}
    assert len(looks) == 20


# --- what is refused ----------------------------------------------------------------------------------------------------


def refused(*arguments: Any) -> str:
    with pytest.raises(UserError) as caught:
        plot(*arguments)
    return str(caught.value)


def test_mistakes_are_refused_with_a_sentence(tmp_path, runs):
    run = paths(runs, "vote")
    assert "Did you mean 'curves'" in refused(run, "curve", tmp_path / "a.pdf")
    assert ".pdf, .svg, .png" in refused(run, "curves", tmp_path / "a.jpg")
    assert ".pdf, .svg, .png" in refused(run, "curves", tmp_path / "a")
    assert "at least one run" in refused([], "curves", tmp_path / "a.pdf")
    assert "is 'nowhere' the folder of a run" in refused(["nowhere"], "curves", tmp_path / "a.pdf")
    (tmp_path / "file").write_text("x")
    assert "cannot" in refused(run, "curves", tmp_path / "file" / "a.pdf")
    assert not list(tmp_path.glob("a*"))


def test_runs_without_what_a_figure_shows_are_refused(tmp_path):
    bare = scripted_run(
        tmp_path / "bare",
        PAIR,
        HEALTHY,
        steps=1,
        log={"episodes": False, "tensorboard": False},
        rollout={"prompts": 2, "samples": 2},
    )
    assert "fewer than two evaluations" in refused([bare.path], "curves", tmp_path / "a.pdf")
    assert "log.episodes: true" in refused([bare.path], "credit", tmp_path / "a.pdf")
    assert "no evaluation after training" in refused([bare.path], "frontier", tmp_path / "a.pdf")
    examine(bare, PAIR, HEALTHY, step=1, problems=4, ablations=False)
    assert "eval.ablations: true" in refused([bare.path], "lazy", tmp_path / "a.pdf")
    bare.metrics.unlink()
    assert "no metrics yet" in refused([bare.path], "curves", tmp_path / "a.pdf")
