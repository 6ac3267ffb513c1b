"""What the terminal shows of a study: cells done, failed and running by method × task, and the time that is left."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ccpo.compare.cells import Cell
from ccpo.compare.runner import Runner, State

LINE_EVERY = 30.0


class Watcher:
    """A table that is kept up to date on a terminal; elsewhere a line now and then."""

    def __init__(self, jobs: int) -> None:
        self.console = Console()
        self.jobs = jobs
        self.runner: Runner | None = None
        self.live: Live | None = None
        self.last = 0.0
        self.told = -1

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()

    def __call__(self, state: State) -> None:
        if self.runner is None:
            return
        now = time.monotonic()
        if self.console.is_terminal:
            if now - self.last < 1.0:
                return
            if self.live is None:
                self.live = Live(console=self.console, auto_refresh=False)
                self.live.start()
            self.live.update(progress_table(self.runner, self.jobs), refresh=True)
            self.last = now
            return
        done = len(self.runner.results)
        if done != self.told and now - self.last >= LINE_EVERY:
            self.console.print(progress_line(self.runner, self.jobs), highlight=False)
            self.told, self.last = done, now


def progress_line(runner: Runner, jobs: int) -> str:
    total, done, failed = _counts(runner, every_cell(runner.state))
    left = seconds_left(runner, jobs)
    return f"{done}/{total} cells done, {failed} failed, {len(runner.state.running)} running here; {_eta(left)}"


def progress_table(runner: Runner, jobs: int) -> Group:
    """The line of the whole, and a table with methods down and tasks across: done/all, failed, running."""
    study, cells = runner.study, every_cell(runner.state)
    table = Table(box=None)
    table.add_column("method")
    for task in study.tasks:
        table.add_column(task, justify="right")
    for method in study.methods:
        row = []
        for task in study.tasks:
            if study.empty_reason(method, task) is not None:
                row.append("[dim]empty[/dim]")
                continue
            row.append(_entry(runner, [c for c in cells if (c.method, c.task) == (method, task)], (method, task)))
        table.add_row(method, *row)
    return Group(Text(f"{study.name}: {progress_line(runner, jobs)}"), table)


def _entry(runner: Runner, cells: Sequence[Cell], pair: tuple[str, str]) -> str:
    total, done, failed = _counts(runner, cells)
    running = sum((r.cell.method, r.cell.task) == pair for r in runner.state.running)
    text = f"{done}/{total}"
    if pair in runner.state.waiting:
        text += "+"  # more cells follow once tuning has decided
    if failed:
        text += f" [red]{failed} failed[/red]"
    return text + (f" [green]{running}▸[/green]" if running else "")


def every_cell(state: State) -> list[Cell]:
    return [cell for cells in state.cells.values() for cell in cells]


def _counts(runner: Runner, cells: Iterable[Cell]) -> tuple[int, int, int]:
    kinds = Counter("done" if runner.result(c) is not None else "failed" if runner.failed(c) else "open" for c in cells)
    return sum(kinds.values()), kinds["done"], kinds["failed"]


def seconds_left(runner: Runner, jobs: int) -> float | None:
    """Expected wall time of the cells that are still open: each as long as the finished ones of its method and task, or of its task,
    or of all. None where nothing has finished."""
    times = _times(runner.results.values())
    if not times:
        return None
    total = 0.0
    for cell in runner.open_cells():
        known = times.get((cell.task, cell.method)) or times.get((cell.task,)) or times[()]
        total += sum(known) / len(known)
    for job in runner.state.running:
        known = times.get((job.cell.task, job.cell.method)) or times.get((job.cell.task,)) or times[()]
        total += max(0.0, sum(known) / len(known) - (time.monotonic() - job.started))
    return total / max(1, jobs)


def _times(results: Iterable[Mapping[str, Any]]) -> dict[tuple[str, ...], list[float]]:
    times: dict[tuple[str, ...], list[float]] = {}
    for result in results:
        for key in ((), (result["task"],), (result["task"], result["method"])):
            times.setdefault(key, []).append(result["seconds"]["wall"])
    return times


def _eta(seconds: float | None) -> str:
    if seconds is None:
        return "time left not known yet"
    return f"about {seconds / 3600:.1f} h left" if seconds >= 5400 else f"about {seconds / 60:.0f} min left"


def plan_table(runner: Runner) -> Table:
    """What a study would run: cells, tokens, and the time where finished cells tell it."""
    study = runner.study
    table = Table(title=f"{study.name}: cells that are not done", box=None)
    for column in ("phase", "task", "method", "cells", "open", "tokens", "hours"):
        table.add_column(column, justify="left" if column in ("phase", "task", "method") else "right")
    times, open_ids = _times(runner.results.values()), {c.id for c in runner.open_cells()}
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for phase, cells in runner.state.cells.items():
        for cell in cells:
            groups.setdefault((phase, cell.task, cell.method), []).append(cell)
    total = [0, 0, 0]
    for (phase, task, method), cells in groups.items():
        left = sum(c.id in open_ids for c in cells)
        tokens = left * study.tasks[task].tokens * study.methods[method].train
        known = times.get((task, method)) or times.get((task,)) or times.get(())
        hours = f"{left * sum(known) / len(known) / 3600:.2f}" if known else "?"
        table.add_row(phase, task, method, str(len(cells)), str(left), f"{tokens:,}", hours)
        total = [t + x for t, x in zip(total, (len(cells), left, tokens), strict=True)]
    for method, task in runner.state.waiting:
        table.add_row("main", task, method, str(len(study.seeds_of(method))), "after tuning", "", "")
    table.add_row("", "", "all", str(total[0]), str(total[1]), f"{total[2]:,}", "")
    return table
