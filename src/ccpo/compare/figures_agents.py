"""Figures of what agents are paid and what they are worth, and of sweeps."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ccpo.compare.canvas import COLOURS, STRONG, WIDTH, error_bars, marker_legend, method_rows, panels, shown_methods
from ccpo.compare.record import QUANTILES
from ccpo.compare.summary import Summary, shown_tasks


def _box(quantiles: Sequence[float], mean: float) -> dict[str, Any]:
    low, q1, middle, q3, high = quantiles
    return {"whislo": low, "q1": q1, "med": middle, "q3": q3, "whishi": high, "mean": mean, "fliers": []}


def pooled_box(
    runs: Sequence[Mapping[str, Any]], when: str, agent: str, side: str
) -> tuple[list[float], float, int] | None:
    """Quantiles and mean of credit, averaged over runs, and the number of rollouts; None where no run has any."""
    found = [b for run in runs if (b := run["boxes"].get(when, {}).get(agent, {}).get(side))]
    if not found:
        return None
    quantiles = [sum(b["q"][i] for b in found) / len(found) for i in range(len(QUANTILES))]
    return quantiles, sum(b["mean"] for b in found) / len(found), sum(b["n"] for b in found)


def boxed_methods(summary: Summary) -> list[str]:
    """Whose credit is drawn: those the study names, else the headline pair and the next two teams that are trained."""
    study = summary.study
    if study.boxes is not None:
        return study.boxes
    teams = [m for m, spec in study.methods.items() if spec.train and not spec.single]
    return list(dict.fromkeys([*(study.headline or []), *teams]))[:4]


def credit_boxes(summary: Summary) -> Any:
    """Credit of each agent in right and wrong rollouts, early and late in training (as in arXiv 2603.21563, Figure 4): tasks down, methods across."""
    import matplotlib.pyplot as plt

    methods = boxed_methods(summary)
    found = {
        pair: e for pair, e in summary.entries.items() if pair[0] in methods and any(run["boxes"] for run in e.runs)
    }
    tasks = [t for t in shown_tasks(summary) if any(pair[1] == t for pair in found)]
    if not tasks:
        return None
    figure, axes = plt.subplots(
        len(tasks), len(methods), figsize=(WIDTH, 1.9 * len(tasks) + 0.4), layout="constrained", squeeze=False
    )
    for row, task in zip(axes, tasks, strict=True):
        for axis, method in zip(row, methods, strict=True):
            names = (summary.study.task_label(task), summary.study.method_label(method))
            axis.set_title("\n".join(textwrap.fill(name, 30) for name in names), fontsize=8)
            entry = found.get((method, task))
            if entry is None:
                axis.text(0.5, 0.5, "no result", ha="center", color="#999999", transform=axis.transAxes)
                axis.set(xticks=[], yticks=[])
                continue
            agents = list(dict.fromkeys(a for run in entry.runs for when in run["boxes"].values() for a in when))
            credit_panel(axis, entry.runs, agents)
    marker_legend(
        figure,
        [("s", "#009E73", "right rollouts"), ("s", "#CC79A7", "wrong rollouts")],
        "of each agent: first tenth of training, last tenth",
    )
    return figure


def credit_panel(axis: Any, runs: Sequence[Mapping[str, Any]], agents: Sequence[str]) -> None:
    """Boxes of each agent's credit in right and wrong rollouts, early and late, averaged over ``runs`` with ``boxes``."""
    colours = {"right": "#009E73", "wrong": "#CC79A7"}
    for place, agent in enumerate(agents):
        for offset, (when, side) in zip(
            (-0.3, -0.14, 0.14, 0.3), [(w, s) for w in ("early", "late") for s in ("right", "wrong")], strict=True
        ):
            found = pooled_box(runs, when, agent, side)
            if found is None:
                continue
            axis.bxp(
                [_box(found[0], found[1])],
                positions=[place + offset],
                widths=0.13,
                showfliers=False,
                patch_artist=True,
                boxprops={"facecolor": colours[side], "alpha": 0.7, "linewidth": 0.7},
                medianprops={"color": "black", "linewidth": 1.3},
                whiskerprops={"linewidth": 0.7},
                capprops={"linewidth": 0.7},
                manage_ticks=False,
            )
    axis.axhline(0, color="#888888", linewidth=0.7)
    axis.set_xticks(range(len(agents)), agents, fontsize=7 if len(agents) <= 3 else 5.5)
    axis.set_xlim(-0.55, len(agents) - 0.45)
    axis.tick_params(axis="y", labelsize=7)


def lazy_agents(summary: Summary) -> Any:
    """Accuracy of the trained team, and with each agent's messages blank (the lazy-agent test of arXiv 2603.21563, Table 3). An agent
    without which every team has 0, as one that decides alone, is left out."""
    from matplotlib.transforms import ScaledTranslation

    rows = []
    for task in shown_tasks(summary):
        found = [
            (m, e) for m, e in shown_methods(summary, task) if not summary.study.methods[m].single and e.part("blank")
        ]
        if found:
            rows.append((task, found))
    if not rows:
        return None
    blank = {task: {m: e.part("blank") for m, e in found} for task, found in rows}
    needed = {
        task: [a for a in next(iter(b.values())) if any(v.get(a, 0) > 0 for v in b.values())]
        for task, b in blank.items()
    }
    most = max(len(found) * (1 + len(needed[task])) for task, found in rows)
    figure, axes = panels(len(rows), 1.0 + 0.13 * most)
    for axis, (task, found) in zip(axes, rows, strict=True):
        agents = needed[task]
        height = 0.8 / (1 + len(agents))
        for bar, what in enumerate([None, *agents]):
            values = [e.final.value if what is None else blank[task][m].get(what, 0.0) for m, e in found]
            places = [row - 0.4 + height * (bar + 0.5) for row in range(len(found))]
            colour = "#444444" if what is None else COLOURS[(bar - 1) % len(COLOURS)]
            axis.barh(
                places, values, height=height * 0.92, color=colour, label="team" if what is None else f"{what} blank"
            )
        axis.set(title=summary.study.task_label(task), xlim=(0, 1.0), xlabel="accuracy")
        method_rows(axis, summary, [m for m, _ in found], labels=True)
        below = axis.transAxes + ScaledTranslation(
            0, -0.42, figure.dpi_scale_trans
        )  # under the label, however high the panel is
        axis.legend(
            fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, ncols=3
        )
    return figure


def sweep_lines(summary: Summary) -> Any:
    """Final accuracy over each swept value, 95% intervals."""
    rows = [(name, [(v, e) for v, e in values if e is not None]) for name, values in summary.sweeps.items()]
    rows = [(name, values) for name, values in rows if values]
    if not rows:
        return None
    figure, axes = panels(len(rows), 2.2, columns=3)
    for axis, (name, values) in zip(axes, rows, strict=True):
        sweep = summary.study.sweeps[name]
        finals = [entry.final for _, entry in values]
        axis.errorbar(
            range(len(values)),
            [f.value for f in finals],
            yerr=error_bars(finals),
            fmt="o-",
            color=STRONG[0],
            capsize=2,
            linewidth=1.2,
        )
        axis.set_xticks(range(len(values)), [str(v) for v, _ in values], fontsize=7)
        axis.set(xlabel=sweep.key, ylabel="final accuracy", ylim=(0, 1.0))
        axis.set_title(
            sweep.label or f"{summary.study.method_label(sweep.method)}, {summary.study.task_label(sweep.task)}",
            fontsize=8,
        )
        axis.grid(alpha=0.25)
    return figure
