"""The figures of ``ccpo plot``. Each takes methods and returns a figure, or raises UserError where the runs lack what it shows."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ccpo.compare.canvas import COLOURS, STRONG, STYLES, legend_of, marker_legend, panels
from ccpo.compare.figures_agents import credit_panel
from ccpo.compare.stats import Estimate, band, iqm_estimate
from ccpo.errors import UserError
from ccpo.plot.data import Method, RunData

PALETTE = (*STRONG, *COLOURS)
MARKERS = "osD^vP*X"
GRID_POINTS = 61
DARK = "#444444"
TOP = 1.03
"""Upper end of an axis of accuracy, so that a mark at 1 is seen whole."""


def look(place: int) -> dict[str, Any]:
    """Colour and line style of the method at a place; where colours come again the line differs."""
    style = STYLES[place // len(PALETTE) % len(STYLES)]
    return {"color": PALETTE[place % len(PALETTE)], "linestyle": style, "linewidth": 1.6}


# --- learning curves ----------------------------------------------------------------------------------------------------


def curves(methods: Sequence[Method]) -> Any:
    """Held-out accuracy and training reward over generated tokens; bands over seeds."""
    bare = next((run for m in methods for run in m.runs if len(run.record["curve"]) < 2), None)
    if bare is not None:
        raise UserError(f"{bare.name} has fewer than two evaluations; set trainer.eval_every, or let it finish")
    most = max(run.record["tokens"]["total"] for m in methods for run in m.runs)
    unit, word = _unit(most)
    figure, axes = panels(2, 2.9)
    for axis, kind in zip(axes, ("curve", "train"), strict=True):
        for place, method in enumerate(methods):
            tables = [_points(run, kind) for run in method.runs]
            _line(axis, tables, method.label, look(place), unit)
        axis.set(xlabel=f"generated tokens{word}", ylim=(0, TOP), xlim=(0, most / unit))
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("held-out accuracy")
    axes[1].set_ylabel("training reward")
    legend_of(figure, axes)
    return figure


def _points(run: RunData, kind: str) -> list[list[float]]:
    """Rows whose first entry is tokens and whose fourth is the value, as :func:`~ccpo.compare.stats.band` takes them."""
    if kind == "curve":
        return run.record["curve"]
    return [[tokens, 0, 0, reward] for tokens, reward in run.record["train"]]


def _line(
    axis: Any, tables: Sequence[Sequence[Sequence[float]]], label: str, style: Mapping[str, Any], unit: float
) -> None:
    if len(tables) == 1:
        axis.plot([row[0] / unit for row in tables[0]], [row[3] for row in tables[0]], label=label, **style)
        return
    end = min(table[-1][0] for table in tables)
    start = max(table[0][0] for table in tables)
    grid = [start + (end - start) * i / (GRID_POINTS - 1) for i in range(GRID_POINTS)]
    points = band(tables, grid)
    x = [tokens / unit for tokens in grid]
    axis.plot(x, [p.value for p in points], label=f"{label} ({len(tables)} seeds)", **style)
    low, high = [p.low for p in points], [p.high for p in points]
    axis.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)


# --- credit -------------------------------------------------------------------------------------------------------------


def credit(methods: Sequence[Method]) -> Any:
    """What each agent was paid in right and in wrong rollouts, in the first and the last tenth of training (as arXiv 2603.21563, Figure 4)."""
    bare = next((run for m in methods for run in m.runs if not run.boxes), None)
    if bare is not None:
        raise UserError(f"{bare.name} has no episodes, from which credit is read; train it with log.episodes: true")
    figure, axes = panels(len(methods), 2.4)
    for axis, method in zip(axes, methods, strict=True):
        boxes = [run.boxes for run in method.runs]
        agents = list(dict.fromkeys(agent for found in boxes for when in found.values() for agent in when))
        credit_panel(axis, [{"boxes": found} for found in boxes], agents)
        axis.set_title(textwrap.fill(method.label, 44), fontsize=9)
        axis.set_ylabel("credit")
    marker_legend(
        figure,
        [("s", "#009E73", "right rollouts"), ("s", "#CC79A7", "wrong rollouts")],
        "of each agent: first tenth of training, last tenth; boxes 25–75%, whiskers 5–95%",
    )
    return figure


# --- lazy agents --------------------------------------------------------------------------------------------------------


def lazy(methods: Sequence[Method]) -> Any:
    """Accuracy of the trained team, and with each agent's messages blank and dropped (the lazy-agent test of arXiv 2603.21563, Table 3)."""
    for run in (run for m in methods for run in m.runs):
        if "blank" not in dict(run.last_with):
            raise UserError(f"{run.name} has no evaluation with blank messages; train it with eval.ablations: true")
    agents = _helpers(methods)
    if not agents:
        raise UserError(
            "these teams have one agent that decides and nobody else; there is nobody whose messages could be blank"
        )
    rows = [(method, agent) for method in methods for agent in (None, *agents) if _ablated(method, "blank", agent)]
    figure, axes = panels(1, 0.9 + 0.21 * (len(rows) + len(methods)))
    axis = axes[0]
    place, ticks, names = 0.0, [], []
    for number, (method, agent) in enumerate(rows):
        if agent is None:
            axis.text(0.005, place + 0.1, method.label, fontweight="bold", va="center")
            place += 1.0
        _bar(axis, place, method, agent)
        ticks.append(place)
        names.append("team" if agent is None else f"{agent} blank")
        last = number + 1 == len(rows) or rows[number + 1][1] is None
        place += 1.5 if last else 1.0
    axis.set_yticks(ticks, names)
    axis.set_ylim(place - 0.7, -0.7)
    axis.tick_params(axis="y", length=0)
    axis.set(xlim=(0, TOP), xlabel="held-out accuracy after training")
    axis.grid(axis="x", alpha=0.25)
    kinds = [("s", DARK, "team"), ("s", PALETTE[0], "messages blank"), ("D", "white", "messages dropped")]
    marker_legend(figure, kinds)
    return figure


def _bar(axis: Any, place: float, method: Method, agent: str | None) -> None:
    estimate = _ablated(method, "blank", agent)
    axis.barh(place, estimate.value, height=0.78, color=DARK if agent is None else PALETTE[0], alpha=0.85)
    axis.errorbar(estimate.value, place, xerr=_reach(estimate), fmt="none", ecolor="black", elinewidth=0.9, capsize=2)
    dropped = _ablated(method, "without", agent) if agent else None
    if dropped is not None:
        axis.plot(dropped.value, place, marker="D", color="white", markeredgecolor="black", markersize=4)


def _helpers(methods: Sequence[Method]) -> list[str]:
    """All agents but those that decide alone, without whom there is no answer."""
    found: dict[str, None] = {}
    for run in (run for m in methods for run in m.runs):
        decider = run.team["decider"] if run.team else None
        found |= dict.fromkeys(agent for agent in dict(run.last_with)["blank"]["blank"] if agent != decider)
    return list(found)


def _ablated(method: Method, kind: str, agent: str | None) -> Estimate | None:
    found = [dict(run.last_with)[kind] for run in method.runs if kind in dict(run.last_with)]
    parts = [report["team"] if agent is None else report[kind].get(agent) for report in found]
    return _estimate([part for part in parts if part is not None])


# --- frontier -----------------------------------------------------------------------------------------------------------


def frontier(methods: Sequence[Method]) -> Any:
    """Accuracy against what it cost: generated tokens of training, and of one answer of the team. The staircase joins the methods
    that no other beats at their cost."""
    for run in (run for m in methods for run in m.runs):
        if not run.reports or run.reports[-1][0] == 0:
            raise UserError(f"{run.name} has no evaluation after training; let it finish")
    figure, axes = panels(2, 3.0)
    costs = {
        "generated tokens of training": lambda run: run.record["tokens"]["total"],
        "generated tokens of an answer": lambda run: run.reports[-1][1]["tokens"],
    }
    for axis, (title, cost) in zip(axes, costs.items(), strict=True):
        _frontier(axis, methods, title, cost)
    axes[0].set_ylabel("held-out accuracy")
    legend_of(figure, axes)
    return figure


def _frontier(axis: Any, methods: Sequence[Method], title: str, cost: Any) -> None:
    points = []
    for place, method in enumerate(methods):
        finals = [run.reports[-1][1]["team"] for run in method.runs]
        estimate = _estimate(finals)
        x = math.fsum(cost(run) for run in method.runs) / len(method.runs)
        points.append((x, estimate.value))
        axis.errorbar(
            x,
            estimate.value,
            yerr=_reach(estimate),
            marker=MARKERS[place % len(MARKERS)],
            markersize=6,
            color=look(place)["color"],
            linestyle="none",
            capsize=2,
            label=method.label if len(method.runs) == 1 else f"{method.label} ({len(method.runs)} seeds)",
        )
        if len(method.runs) > 1:
            x_all = [cost(run) for run in method.runs]
            axis.scatter(x_all, [f["mean"] for f in finals], s=9, color=look(place)["color"], alpha=0.4, linewidths=0)
    best = pareto(points)
    axis.step([x for x, _ in best], [y for _, y in best], where="post", color="#888888", linewidth=1, zorder=0)
    highest, lowest = max(x for x, _ in points), min(x for x, _ in points)
    if highest > 30 * lowest > 0:
        axis.set_xscale("log")
    else:
        axis.set_xlim(0, highest * 1.08)
    axis.set(xlabel=title, ylim=(max(0.0, min(y for _, y in points) - 0.15), TOP))
    axis.xaxis.set_major_formatter(_short)
    axis.grid(alpha=0.25)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points (cost, accuracy) those that no cheaper or equally cheap one matches, by cost."""
    kept: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1])):
        if not kept or y > kept[-1][1]:
            kept.append((x, y))
    return kept


# --- shared -------------------------------------------------------------------------------------------------------------


def _estimate(intervals: Sequence[Mapping[str, float]]) -> Estimate | None:
    """Of one run its interval over problems; of several the interquartile mean over seeds with its bootstrap interval."""
    if not intervals:
        return None
    if len(intervals) == 1:
        (one,) = intervals
        return Estimate(value=one["mean"], low=one["low"], high=one["high"], runs=1)
    return iqm_estimate([[i["mean"] for i in intervals]])


def _reach(estimate: Estimate) -> list[list[float]]:
    """Lengths of an error bar to both sides; an interval that ends at its mean may miss it by rounding."""
    return [[max(0.0, estimate.value - estimate.low)], [max(0.0, estimate.high - estimate.value)]]


def _unit(tokens: float) -> tuple[float, str]:
    if tokens >= 2e6:
        return 1e6, " (M)"
    return (1e3, " (k)") if tokens >= 2e3 else (1.0, "")


def _short(value: float, position: int | None = None) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


FIGURES = {"curves": curves, "credit": credit, "lazy": lazy, "frontier": frontier}
