"""The figures of a study. Needs matplotlib (``pip install 'ccpo[plots]'``); the same results give the same files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ccpo.compare.canvas import (
    COLUMNS,
    draw,
    empty_rows,
    error_bars,
    legend_of,
    look,
    marker_legend,
    method_rows,
    panels,
    shown_methods,
)
from ccpo.compare.figures_agents import credit_boxes, lazy_agents, sweep_lines
from ccpo.compare.stats import band
from ccpo.compare.summary import Summary, shown_tasks

GRID_POINTS = 41


def draw_all(summary: Summary, folder: Path) -> dict[str, Path]:
    """Draw every figure that the results allow, by name. Raises UserError where matplotlib is missing."""
    makers: dict[str, Callable[[Summary], Any]] = {
        "curves": learning_curves,
        "final": final_accuracy,
        "tokens": tokens_to_mark,
        "credit": credit_boxes,
        "lazy": lazy_agents,
        "sweeps": sweep_lines,
    }
    return draw({name: partial(make, summary) for name, make in makers.items()}, folder)


def learning_curves(summary: Summary) -> Any:
    """IQM of held-out accuracy over generated tokens, with 95% bands; untrained teams as a level."""
    tasks = shown_tasks(summary)
    if not tasks:
        return None
    figure, axes = panels(len(tasks), 2.7)
    for axis, task in zip(axes, tasks, strict=True):
        budget = summary.study.tasks[task].tokens
        unit, word = (1e6, "M") if budget >= 2e6 else (1e3, "k")
        for method, entry in shown_methods(summary, task):
            style, label = look(summary, method), summary.study.method_label(method)
            if not summary.study.methods[method].train:
                axis.axhline(entry.final.value, color="#888888", linestyle=":", linewidth=1.2, label=label)
                continue
            grid = [budget * i / (GRID_POINTS - 1) for i in range(GRID_POINTS)]
            points = band([run["curve"] for run in entry.runs], grid)
            x = [tokens / unit for tokens in grid]
            axis.plot(x, [p.value for p in points], label=label, **style)
            strong = method in (summary.study.headline or ())
            axis.fill_between(
                x,
                [p.low for p in points],
                [p.high for p in points],
                color=style["color"],
                alpha=0.22 if strong else 0.08,
                linewidth=0,
            )
        axis.set(
            title=summary.study.task_label(task),
            xlabel=f"generated tokens ({word})",
            ylabel="held-out accuracy",
            xlim=(0, budget / unit),
        )
        axis.set_ylim(0, 1.0)
        axis.grid(alpha=0.25)
    legend_of(figure, axes)
    return figure


def final_accuracy(summary: Summary) -> Any:
    """Final accuracy: a bar for the held-out set, a diamond for the out-of-distribution set, both with 95% intervals."""
    tasks = shown_tasks(summary)
    if not tasks:
        return None
    methods = [m for m in summary.study.methods if any(pair[0] == m for pair in summary.entries)]
    figure, axes = panels(len(tasks), 0.9 + 0.24 * len(methods))
    for place, (axis, task) in enumerate(zip(axes, tasks, strict=True)):
        known = [(row, m, e) for row, m in enumerate(methods) if (e := summary.entry(m, task)) is not None]
        finals = [e.final for _, _, e in known]
        axis.barh(
            [row for row, _, _ in known],
            [f.value for f in finals],
            height=0.62,
            color=[look(summary, m)["color"] for _, m, _ in known],
            alpha=0.75,
            xerr=error_bars(finals),
            error_kw={"elinewidth": 1.2, "capsize": 2},
            label="held-out",
        )
        far = [(row, e.ood) for row, _, e in known if e.ood is not None]
        if far:
            axis.errorbar(
                [o.value for _, o in far],
                [row for row, _ in far],
                xerr=error_bars([o for _, o in far]),
                fmt="D",
                markersize=4,
                color="white",
                markeredgecolor="black",
                ecolor="#555555",
                elinewidth=0.9,
                label="out of distribution",
            )
        empty_rows(axis, methods, [row for row, _, _ in known])
        axis.set(title=summary.study.task_label(task), xlim=(0, 1.0), xlabel="final accuracy")
        method_rows(axis, summary, methods, labels=place % COLUMNS == 0)
    marker_legend(figure, [("s", "#777777", "bar: held-out problems"), ("D", "white", "diamond: out of distribution")])
    return figure


def tokens_to_mark(summary: Summary) -> Any:
    """Tokens to 90% of the yardstick's final accuracy, 95% intervals; runs that never reach it count with the budget."""
    tasks = [t for t in shown_tasks(summary) if any(e.to_mark is not None for _, e in shown_methods(summary, t))]
    if not tasks:
        return None
    methods = [
        m for m in summary.study.methods if any(e.to_mark is not None for p, e in summary.entries.items() if p[0] == m)
    ]
    figure, axes = panels(len(tasks), 0.9 + 0.24 * len(methods))
    for place, (axis, task) in enumerate(zip(axes, tasks, strict=True)):
        budget = summary.study.tasks[task].tokens
        unit, word = (1e6, "M") if budget >= 2e6 else (1e3, "k")
        known = [
            (row, m, e.to_mark)
            for row, m in enumerate(methods)
            if (e := summary.entry(m, task)) and e.to_mark is not None
        ]
        for row, method, marked in known:
            low, high = marked.estimate.low / unit, marked.estimate.high / unit
            value, colour = marked.estimate.value / unit, look(summary, method)["color"]
            axis.plot([low, high], [row, row], color=colour, linewidth=2, solid_capstyle="butt")
            axis.plot(value, row, marker=">" if marked.beyond else "o", color=colour, markersize=6)
        axis.axvline(budget / unit, color="#888888", linestyle=":", linewidth=1)
        empty_rows(axis, methods, [row for row, _, _ in known])
        axis.set(
            title=summary.study.task_label(task),
            xlim=(0, budget / unit * 1.04),
            xlabel=f"generated tokens ({word}) to the mark",
        )
        method_rows(axis, summary, methods, labels=place % COLUMNS == 0)
    marker_legend(
        figure,
        [
            ("o", "#777777", "IQM, 95% interval"),
            (">", "#777777", "most runs do not reach the mark in the budget (dotted)"),
        ],
    )
    return figure
