"""The page's second half: agents and their credit, the single agent, sweeps, tuning, and whether the tasks can tell rules apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ccpo.compare.cells import Point, grid_of
from ccpo.compare.markdown import cell_text, estimate, folded, marked, percent, section, table
from ccpo.compare.study import Study
from ccpo.compare.summary import FAIR_RISE, FAIR_STEPS, Summary, label_of, shown_tasks, vote_at


def agents(summary: Summary, figures: Mapping[str, str]) -> str:
    """What removing each trained agent does."""
    rows = []
    for task in shown_tasks(summary):
        for method in summary.study.methods:
            entry = summary.entry(method, task)
            if entry is None or summary.study.methods[method].single:
                continue
            parts = {kind: entry.part(kind) for kind in ("without", "blank", "alone")}
            for agent in parts["without"]:
                shown = [percent(parts[kind][agent]) if agent in parts[kind] else "–" for kind in parts]
                names = [cell_text(summary.study.task_label(task)), label_of(summary, method), cell_text(agent)]
                rows.append([*names, percent(entry.final.value), *shown])
    if not rows:
        return ""
    text = "Accuracy of the trained team, and of what is left when an agent's messages are dropped or blank; and of the agent by itself."
    head = ["task", "method", "agent", "team", "without it", "its messages blank", "it alone"]
    picture = (figures.get("lazy"), "The team with each agent's messages blank")
    return section(
        "Removing agents", text, folded("each team and agent", table(head, rows, "lllrrrr")), picture=picture
    )


def votes(summary: Summary) -> str:
    """The single agent's majority vote at the token budget of a team."""
    study = summary.study
    singles = [m for m, spec in study.methods.items() if spec.single]
    if not singles or study.headline is None:
        return ""
    team = study.headline[0]
    rows = []
    for task in shown_tasks(summary):
        whole = summary.entry(team, task)
        for method in singles:
            entry = summary.entry(method, task)
            if whole is None or entry is None:
                continue
            vote = vote_at(entry, whole.play_tokens)
            note = "" if vote.enough else " (the most that were drawn: fewer tokens than the team's)"
            rows.append(
                [
                    cell_text(study.task_label(task)),
                    f"{estimate(whole.final)} at {whole.play_tokens:.0f}",
                    label_of(summary, method),
                    f"{estimate(entry.final)} at {entry.play_tokens:.0f}",
                    f"{estimate(vote.accuracy)} at {vote.tokens:.0f}, k = {vote.samples}{note}",
                    "yes" if whole.final.value > max(vote.accuracy.value, entry.final.value) else "no",
                ]
            )
    if not rows:
        return ""
    text = "Accuracy and generated tokens a problem. The vote has the fewest samples that cost at least what the team does: it is never given less."
    head = ["task", cell_text(study.method_label(team)), "single agent", "one sample", "majority vote", "team ahead"]
    return section("The team against one agent's majority vote", text, table(head, rows, "lrlrrl"))


def credit(summary: Summary, figures: Mapping[str, str]) -> str:
    """Does the counterfactual still say anything: telemetry by agent."""
    rows = []
    for task in shown_tasks(summary):
        for method in summary.study.methods:
            entry = summary.entry(method, task)
            for agent in () if entry is None else dict.fromkeys(a for run in entry.runs for a in run["credit"]):
                values = [entry.credit(agent, what) for what in ("shared_corr", "no_signal", "helped", "hurt", "share")]
                names = [cell_text(summary.study.task_label(task)), label_of(summary, method), cell_text(agent)]
                rows.append([*names, *("–" if v is None else f"{v:.2f}" for v in values)])
    if not rows:
        return ""
    text = (
        "Means over training. *Likeness*: correlation of the agent's advantages with those under shared reward; 1 means that the "
        "counterfactual has cancelled. *No signal*: share of problems that move nothing. *Helped*, *hurt*: how often the team did better, "
        "or worse, than without the agent."
    )
    head = ["task", "method", "agent", "likeness", "no signal", "helped", "hurt", "share of credit"]
    picture = (figures.get("credit"), "Credit by agent in right and wrong rollouts, early and late")
    return section("Credit", text, folded("each team and agent", table(head, rows, "lllrrrrr")), picture=picture)


def sweeps(summary: Summary, figures: Mapping[str, str]) -> str:
    rows = []
    for name, values in summary.sweeps.items():
        sweep = summary.study.sweeps[name]
        for value, entry in values:
            shown = (
                ["–", "–", "0"]
                if entry is None
                else [estimate(entry.final), marked(entry.to_mark), str(len(entry.runs))]
            )
            names = [label_of(summary, sweep.method), cell_text(summary.study.task_label(sweep.task))]
            rows.append([*names, f"`{cell_text(sweep.key)}`", f"`{cell_text(str(value))}`", *shown])
    if not rows:
        return ""
    head = ["method", "task", "key", "value", "final accuracy", "tokens to mark", "runs"]
    picture = (figures.get("sweeps"), "Final accuracy over the swept values")
    return section(
        "Sweeps", "Everything else as tuned.", folded("each value", table(head, rows, "llllrrr")), picture=picture
    )


def tuned(summary: Summary) -> str:
    """The grid point of every method and task, and how far the others were behind."""
    study = summary.study
    if not summary.tuned or study.tune is None:
        return ""
    rows = []
    for (method, task), scores in summary.tuned.items():
        point = summary.chosen[method, task] or {}
        valid = sorted((t.score for t in scores if t.score is not None), reverse=True)
        shown = [f"{score:.3f}" for score in valid[:2]] + ["–"] * (2 - len(valid[:2]))
        names = [cell_text(study.task_label(task)), label_of(summary, method)]
        taken = ", ".join(f"`{cell_text(key)}={cell_text(str(value))}`" for key, value in point.items())
        rows.append([*names, taken, *shown, f"{len(valid)} of {len(scores)}", edges(study, method, task, point)])
    text = (
        f"Every trained method tries its whole grid on every task with seeds {', '.join(map(str, study.tune.seeds))}, which the results do not "
        "use; the point with the largest mean accuracy over the budget (area under the learning curve) is taken."
    )
    head = ["task", "method", "taken", "its area", "next best", "grid points that ran", "at an end of the grid"]
    return section("Tuned hyperparameters", text, folded("each method and task", table(head, rows, "lllrrrl")))


def edges(study: Study, method: str, task: str, point: Point) -> str:
    """Keys whose value was taken from an end of a grid of three or more: the best may lie beyond it."""
    grid = grid_of(study, method, task)
    ends = [key for key, value in point.items() if len(grid[key]) > 2 and value in (grid[key][0], grid[key][-1])]
    return ", ".join(f"`{cell_text(key)}`" for key in ends) or "–"


def fair(summary: Summary) -> str:
    """Whether each task can tell rules apart."""
    rows: list[Sequence[str]] = []
    for task in shown_tasks(summary):
        found = summary.field_of(task)
        if found is not None:
            steps = ("> " if found.steps.beyond else "") + f"{found.steps.estimate.value:.0f}"
            name = cell_text(summary.study.task_label(task))
            rows.append([name, percent(found.start), percent(found.final), steps, "yes" if found.fair else "no"])
    if not rows:
        return ""
    label = cell_text(summary.study.method_label(summary.study.yardstick or ""))
    text = (
        f"A task can tell rules apart where {label}, as tuned, needs at least {FAIR_STEPS} steps to the mark and starts at least "
        f"{100 * FAIR_RISE:.0f} points below its final accuracy."
    )
    return section(
        "Is the field fair?", text, table(["task", "start", "final", "steps to mark", "fair"], rows, "lrrrl")
    )
