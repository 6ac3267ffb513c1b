"""What the terminal shows: progress, tables, conversations. Fits 80 columns."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ccpo.alarms import Alarm, find_alarms
from ccpo.errors import UserError
from ccpo.runs import Reporter, Result
from ccpo.types import Rollout


class TerminalReporter(Reporter):
    """A bar with the time left on a terminal; a line now and then where the output is a file."""

    def __init__(self) -> None:
        self.console = Console()
        self.bar: Progress | None = None
        self.task: Any = None
        self.last = 0.0

    def __enter__(self) -> TerminalReporter:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def note(self, text: str) -> None:
        if "to fall below" in text and not self._due():
            return
        self.console.print(f"[dim]{escape(text)}[/dim]", highlight=False)

    def step(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        reward = metrics["reward/team"]
        tested = f" test {metrics['eval/team']:.2f}" if "eval/team" in metrics else ""
        if not self.console.is_terminal:
            if self._due() or step == total:
                self.console.print(
                    f"step {step}/{total} reward {reward:.3f}{tested} {metrics['seconds/step']:.2f}s", highlight=False
                )
            return
        if self.bar is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(24),
                TextColumn("{task.completed}/{task.total}"),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=self.console)
            self.bar.start()
            self.task = self.bar.add_task("training", total=total)
        self.bar.update(self.task, completed=step, description=f"reward {reward:.2f}{tested}")
        if step == total:
            self.bar.stop()

    def alarm(self, step: int, alarm: Alarm) -> None:
        show_alarm(self.console, alarm.to_json(), f"step {step}: ")

    def _due(self, every: float = 5.0) -> bool:
        now = time.monotonic()
        if now - self.last < every:
            return False
        self.last = now
        return True


@contextmanager
def progress_note(text: str) -> Iterator[Callable[[str], None]]:
    """A spinner on a terminal, nothing elsewhere. It is given a function that says what is being done now."""
    console = Console(file=sys.stderr)
    if console.is_terminal:
        with console.status(escape(text)) as status:
            yield lambda now: status.update(escape(now))
    else:
        yield lambda now: None


def tell_result(result: Result) -> None:
    """What a run came to, or how to go on with it."""
    if result.finished:
        before_after(result)
        _tell_alarms(result)
    else:
        Console().print(
            f"Stopped and saved. Go on with: ccpo train --resume {result.folder}", soft_wrap=True, highlight=False
        )


def before_after(result: Result) -> None:
    """The table that ends a training."""
    console, summary = Console(), result.summary
    table = Table(title=f"{summary['name']}: {summary['steps']} steps in {summary['seconds_total']:.0f} s", box=None)
    table.add_column("accuracy")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    shown = [key for key in summary if key.endswith("_after")]
    if any(key.startswith("alone_") and summary[key] == summary.get("solo_after") for key in shown):
        shown.remove("solo_after")  # the decider by itself, who has a row already
    for key in shown:
        stem = key.removesuffix("_after")
        before = summary.get(f"{stem}_before")
        table.add_row(_words(stem), "" if before is None else f"{before:.3f}", f"{summary[key]:.3f}")
    console.print(table)
    joint, extra = summary["tokens_joint"], summary["tokens_counterfactual"]
    rated = f", {summary['tokens_rating']:,} of ratings" if summary["tokens_rating"] else ""
    on_top = (extra + summary["tokens_rating"]) / max(1, joint)
    console.print(f"tokens: {joint:,} joint, {extra:,} counterfactual{rated} ({on_top:.0%} on top)", highlight=False)
    console.print(f"run: {escape(str(result.folder))}", highlight=False)
    console.print(f"who earned what: ccpo report {escape(str(result.folder))}", highlight=False)


def _tell_alarms(result: Result) -> None:
    """The alarms of a run that has ended well, whatever its logs look like."""
    left_out: list[str] = []
    try:
        alarms = find_alarms(result.folder, left_out.append)
    except UserError as error:
        Console().print(escape(f"alarms: not computed, {error}"), soft_wrap=True, highlight=False)
    else:
        alarm_lines(alarms, left_out)


def alarm_lines(
    alarms: Sequence[Mapping[str, Any]], left_out: Sequence[str] = (), console: Console | None = None
) -> None:
    """The alarms of a run, each with what to try; one line where there are none. First, what could not be read or judged."""
    console = console or Console()
    for sentence in left_out:
        console.print(escape(f"Left out: {sentence}"), style="yellow", soft_wrap=True, highlight=False)
    if not alarms:
        console.print(f"alarms: none{' in what is left' if left_out else ''}", highlight=False)
    for alarm in alarms:
        show_alarm(console, alarm)


def show_alarm(console: Console, alarm: Mapping[str, Any], when: str = "") -> None:
    style = "yellow" if alarm["level"] == "warn" else "cyan"
    word = "Warning" if alarm["level"] == "warn" else "Note"
    console.print(escape(f"{when}{word}: {alarm['title']} ({alarm['name']})"), style=style, highlight=False)
    console.print(escape(f"  {alarm['what']}"), highlight=False)
    console.print(escape(f"  Try: {alarm['try']}"), style="dim", highlight=False)


def _words(stem: str) -> str:
    kind, _, agent = stem.partition("_")
    return {"team": "team", "solo": "one agent alone (mean)"}.get(stem, f"{kind} {agent}")


def evaluation_tables(reports: Mapping[str, Mapping[str, Any]], checkpoint: Path) -> None:
    """A table for each data set."""
    console = Console()
    for name, report in reports.items():
        table = Table(
            title=f"{name}: {report['problems']} problems × {report['samples']} ({checkpoint.name})", box=None
        )
        for column in ("", "mean", "95% interval"):
            table.add_column(column, justify="left" if not column else "right")
        _row(table, "team", report["team"])
        for kind in ("pass@k", "majority@k"):
            for k, value in report[kind].items():
                if k != "1":
                    table.add_row(kind.replace("@k", f"@{k}"), f"{value:.3f}", "")
        for kind in ("alone", "without", "blank"):
            for agent, value in report.get(kind, {}).items():
                _row(table, f"{agent} alone" if kind == "alone" else f"{kind} {agent}", value)
        console.print(table)


def _row(table: Table, label: str, value: Mapping[str, float]) -> None:
    table.add_row(escape(label), f"{value['mean']:.3f}", f"{value['low']:.3f} – {value['high']:.3f}")


def conversation(rollout: Rollout) -> None:
    """What every agent said, in order. Model text is shown as it is, never as markup or terminal codes."""
    console = Console()
    for turn in rollout.turns:
        console.rule(escape(turn.name if turn.name == turn.agent else f"{turn.agent} ({turn.name})"), align="left")
        console.print(printable(turn.completion.text), markup=False, highlight=False)
    console.rule("answer", align="left")
    console.print(printable(rollout.answer or "(none)"), markup=False, highlight=False)


def printable(text: str) -> str:
    """Text without control characters, which could move the cursor or recolour the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
