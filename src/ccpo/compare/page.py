"""The Markdown page of a study: every number with its interval and its cost, and what is missing with its reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ccpo.compare.making import failures, how_made, machine_line
from ccpo.compare.markdown import cell_text, estimate, marked, number, percent, ratio, section, table
from ccpo.compare.page_agents import agents, credit, fair, sweeps, tuned, votes
from ccpo.compare.summary import Summary, label_of, missing, shown_tasks

FEWEST_SEEDS, HEADLINE_SEEDS = 5, 10


def page(summary: Summary, figures: Mapping[str, str], command: str) -> str:
    """The page. ``figures``: links by name; ``command``: what makes the page again."""
    study = summary.study
    parts = [
        f"# {cell_text(study.title or study.name)}",
        f"Made by `{command}`; edits would be lost. {machine_line(summary)}",
        _warnings(summary),
        (study.notes or "").strip(),
        _headline(summary),
        _final(summary, figures),
        _curves(figures),
        _tokens(summary, figures),
        _costs(summary),
        _stability(summary),
        agents(summary, figures),
        votes(summary),
        credit(summary, figures),
        sweeps(summary, figures),
        tuned(summary),
        fair(summary),
        failures(summary),
        how_made(summary, command),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _warnings(summary: Summary) -> str:
    """What the reader must know before any number."""
    study = summary.study
    few = min((len(e.runs) for (m, _), e in summary.entries.items() if study.methods[m].train), default=FEWEST_SEEDS)
    pair = min(
        (len(e.runs) for (m, _), e in summary.entries.items() if m in (study.headline or ())), default=HEADLINE_SEEDS
    )
    absent = [p for p in study.applies() if p not in summary.entries and not summary.failures.get(p)]
    lines = []
    if few < FEWEST_SEEDS:
        lines.append(
            f"> Some entries have only {few} runs; with fewer than {FEWEST_SEEDS} seeds the intervals say little."
        )
    if pair < HEADLINE_SEEDS:
        lines.append(f"> The headline pair has {pair} runs on some task; {HEADLINE_SEEDS} are the least for a claim.")
    if absent:
        lines.append(f"> The study is not finished: {len(absent)} of its entries have no result yet.")
    return "\n>\n".join(lines)


def _headline(summary: Summary) -> str:
    if summary.study.headline is None:
        return ""
    first, second = summary.study.headline
    a, b = (cell_text(summary.study.method_label(m)) for m in (first, second))
    rows = []
    for task in shown_tasks(summary):
        x, y, contest = summary.entry(first, task), summary.entry(second, task), summary.contest(first, second, task)
        if x is None or y is None or contest is None:
            continue
        finals = [estimate(x.final), estimate(y.final), estimate(contest.wins, "{:.2f}")]
        apart = {True: "apart", False: "overlap", None: "–"}[contest.apart]
        name = cell_text(summary.study.task_label(task))
        rows.append([name, *finals, marked(x.to_mark), marked(y.to_mark), ratio(contest), apart])
    overall = summary.beats(first, second)
    if not rows or overall is None:
        return ""
    text = (
        f"At equal generated tokens. Over {overall[1]} task(s), the probability that a run of {a} ends above one of {b} is "
        f"{estimate(overall[0], '{:.2f}')}."
    )
    head = [
        "task",
        f"{a}: final",
        f"{b}: final",
        "P(wins)",
        f"{a}: tokens to mark",
        f"{b}: tokens to mark",
        "ratio",
        "token intervals",
    ]
    return section(f"{a} against {b}", text, table(head, rows, "lrrrrrrl"))


def _final(summary: Summary, figures: Mapping[str, str]) -> str:
    """Final accuracy of everything, in distribution and out of it."""
    parts = [_final_table(summary, "heldout")]
    if any(e.ood for e in summary.entries.values()):
        parts.append(_final_table(summary, "ood"))
    return section(
        "Final accuracy", *parts, picture=(figures.get("final"), "Final accuracy of each method on each task")
    )


def _final_table(summary: Summary, data: str) -> str:
    study, tasks = summary.study, shown_tasks(summary)
    rows = []
    for method in study.methods:
        row = [label_of(summary, method)]
        for task in tasks:
            entry = summary.entry(method, task)
            found = None if entry is None else entry.final if data == "heldout" else entry.ood
            row.append(missing(summary, method, task) if entry is None else "–" if found is None else estimate(found))
        rows.append(row + (_over_tasks(summary, method) if data == "heldout" else []))
    head = ["method", *(cell_text(study.task_label(t)) for t in tasks)]
    if data == "heldout":
        head += [
            "all tasks",
            f"P(better than {cell_text(study.method_label(study.yardstick))})" if study.yardstick else "P(better)",
        ]
    title = "Held-out problems" if data == "heldout" else "Out of distribution"
    return f"### {title}\n\n" + table(head, rows, "l" + "r" * (len(head) - 1))


def _over_tasks(summary: Summary, method: str) -> list[str]:
    """IQM over all tasks, and the probability of improvement over the yardstick with the number of tasks where it is not all."""
    overall, yardstick = summary.overall(method), summary.study.yardstick
    beats = summary.beats(method, yardstick) if yardstick and method != yardstick else None
    better = "–"
    if beats is not None:
        some = f" ({beats[1]} tasks)" if beats[1] < len(summary.study.tasks) else ""
        better = estimate(beats[0], "{:.2f}") + some
    return [estimate(overall) if overall else "–", better]


def _curves(figures: Mapping[str, str]) -> str:
    text = "Held-out accuracy over generated tokens, interquartile mean with 95% bands"
    return section("Learning curves", picture=(figures["curves"], text)) if "curves" in figures else ""


def _tokens(summary: Summary, figures: Mapping[str, str]) -> str:
    study, yardstick = summary.study, summary.study.yardstick
    tasks = [t for t in shown_tasks(summary) if t in summary.marks]
    if not tasks or yardstick is None:
        return ""
    rows = []
    for method in (m for m, spec in study.methods.items() if spec.train):
        row = [label_of(summary, method)]
        for task in tasks:
            entry = summary.entry(method, task)
            if entry is None:
                row += [missing(summary, method, task), "–", "–"]
                continue
            against = "1" if method == yardstick else ratio(summary.contest(method, yardstick, task))
            row += [marked(entry.to_mark), against, marked(entry.to_own)]
        rows.append(row)
    head = ["method"]
    for task in tasks:
        head += [
            f"{cell_text(study.task_label(task))}: to {percent(summary.marks[task])}",
            "ratio",
            "to 90% of its own",
        ]
    text = (
        f"The mark is 90% of the final accuracy of {cell_text(study.method_label(yardstick))} on the task; *ratio* is to its tokens. `>` marks a "
        "lower bound: more than a quarter of the runs never reach the mark and count with the whole budget. In brackets how many do not."
    )
    picture = (figures.get("tokens"), "Generated tokens to the mark")
    return section("Tokens to the mark", text, table(head, rows, "l" + "r" * (len(head) - 1)), picture=picture)


def _costs(summary: Summary) -> str:
    rows: list[Sequence[str]] = []
    for task in shown_tasks(summary):
        for method in summary.study.methods:
            entry = summary.entry(method, task)
            if entry is None or not summary.study.methods[method].train:
                continue
            kinds = [entry.tokens.get(k, 0.0) for k in ("joint", "counterfactual", "rating")]
            total = entry.tokens["total"]
            seconds = [entry.seconds.get(k, 0.0) for k in ("decode", "credit", "update", "step")]
            rows.append(
                [
                    cell_text(summary.study.task_label(task)),
                    label_of(summary, method),
                    *map(number, (*kinds, total)),
                    percent(sum(kinds[1:]) / kinds[0]) if kinds[0] else "–",
                    f"{entry.updates:.0f}",
                    *(f"{s:.1f}" for s in seconds),
                    f"{1000 * seconds[-1] / total:.2f}" if total else "–",
                ]
            )
    head = ["task", "method", "joint", "counterfactual", "rating", "all tokens", "on top", "updates"]
    head += ["decode s", "credit s", "update s", "training s", "ms a token"]
    return (
        section("What it cost", "Means over runs, evaluations not counted.", table(head, rows, "ll" + "r" * 11))
        if rows
        else ""
    )


def _stability(summary: Summary) -> str:
    tasks = shown_tasks(summary)
    rows = []
    for method in (m for m, spec in summary.study.methods.items() if spec.train):
        row = [label_of(summary, method)]
        for task in tasks:
            entry = summary.entry(method, task)
            if entry is None or entry.unstable is None:
                row.append(missing(summary, method, task))
            else:
                row.append(f"{round(entry.unstable * len(entry.runs))} of {len(entry.runs)}")
        rows.append(row)
    head = ["method", *(cell_text(summary.study.task_label(t)) for t in tasks)]
    text = "Runs that lose 10 points or more after their peak (smoothed curve)."
    return section("Stability", text, table(head, rows, "l" + "r" * len(tasks))) if rows else ""


def relative(figures: Mapping[str, Path], folder: Path) -> dict[str, str]:
    """Links from a page in ``folder`` to its figures, which lie in or under it."""
    return {name: path.relative_to(folder).as_posix() for name, path in figures.items()}
