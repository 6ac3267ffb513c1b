"""Runs the cells that have no result, each in a process of its own, until none is left, the time is up, or it is told to stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ccpo.compare.cells import Cell, main_cells, sweep_cells, tune_cells
from ccpo.compare.store import Store, write_small
from ccpo.compare.study import Study
from ccpo.compare.tuning import choose
from ccpo.signals import stopping

PHASES = ("tune", "main", "sweep")
POLL = 0.2
REPLAN = 5.0
GRACE = 60.0
LOG_LINES = 12


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a study is run. ``minutes``: after that many no new cell is started; ``cell_minutes``: a cell that takes longer has failed."""

    jobs: int = 1
    minutes: float | None = None
    cell_minutes: float | None = None
    phases: Sequence[str] = PHASES
    only: Callable[[Cell], bool] = lambda cell: True
    retry_failed: bool = False
    keep_runs: bool = False
    worker: Sequence[str] = ("-m", "ccpo.compare.worker")


@dataclass(kw_only=True)
class Running:
    cell: Cell
    process: subprocess.Popen
    started: float


@dataclass(kw_only=True)
class State:
    """What there is to do: cells by phase, and those of this process that run now. ``waiting``: (method, task) not tuned yet."""

    cells: dict[str, list[Cell]] = field(default_factory=dict)
    waiting: list[tuple[str, str]] = field(default_factory=list)
    running: list[Running] = field(default_factory=list)


class Runner:
    """Runs a study in its folder; several may work on the same folder at once."""

    def __init__(
        self, study: Study, store: Store, settings: Settings, watch: Callable[[State], None] = lambda state: None
    ) -> None:
        self.study, self.store, self.settings, self.watch = study, store, settings, watch
        self.results: dict[str, dict[str, Any]] = {}
        self.retried: set[str] = set()
        self.state = State()
        self.stops = 0
        self.plan()

    # --- what there is to do -----------------------------------------------------------------------------------------------

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """A cell's result, read once."""
        if cell.id not in self.results:
            found = self.store.read(cell)
            if found is None:
                return None
            self.results[cell.id] = found
        return self.results[cell.id]

    def failed(self, cell: Cell) -> bool:
        """Whether the cell failed, and is not to be tried again."""
        again = self.settings.retry_failed and cell.id not in self.retried
        return self.store.failure(cell) is not None and not again

    def plan(self) -> None:
        """Cells by phase, as far as tuning has decided; a cell that is in two phases counts in the first."""
        chosen, _ = choose(self.study, self.result, self.failed)
        tune = [cell for grid in tune_cells(self.study).values() for _, cells in grid for cell in cells]
        sweep = [cell for values in sweep_cells(self.study, chosen).values() for _, cells in values for cell in cells]
        seen: set[str] = set()
        self.state.cells = {}
        for phase, cells in zip(PHASES, (tune, main_cells(self.study, chosen), sweep), strict=True):
            self.state.cells[phase] = [c for c in cells if not (c.id in seen or seen.add(c.id))]
        self.state.waiting = [pair for pair, point in chosen.items() if point is None]

    def open_cells(self) -> list[Cell]:
        """Cells that are wanted and have neither a result nor a failure that stands: the headline pair's tuning and results first, then those
        of the rest, then sweeps."""
        headline = self.study.headline or ()
        mine = {r.cell.id for r in self.state.running}
        wanted = [
            (phase == "sweep", cell.method not in headline, cell)
            for phase in self.settings.phases
            for cell in self.state.cells[phase]
            if self.settings.only(cell) and cell.id not in mine and self.result(cell) is None and not self.failed(cell)
        ]
        return [cell for *_, cell in sorted(wanted, key=lambda found: found[:2])]

    # --- the run -----------------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Returns False where it was stopped or the time was up with cells left. It waits for cells that other processes run."""
        started = planned = time.monotonic()
        with stopping(self._stop):
            try:
                while True:
                    if self._reap() or (self.state.waiting and time.monotonic() - planned > REPLAN):
                        self.plan()  # tuning may have decided, by a cell of ours or of another process
                        planned = time.monotonic()
                    late = (
                        self.settings.minutes is not None and time.monotonic() - started >= self.settings.minutes * 60
                    )
                    free = len(self.state.running) < self.settings.jobs
                    open_cells = self.open_cells() if free else []
                    if free and not (self.stops or late):
                        self._start(open_cells)
                    self.watch(self.state)
                    if not self.state.running and (self.stops or late or not open_cells):
                        more = self._more_after_tuning()
                        if not more or self.stops or late:
                            return not more
                    time.sleep(POLL)
            finally:
                self._end_all()

    def _more_after_tuning(self) -> bool:
        """Whether tuning cells that another process has finished meanwhile lead to further cells."""
        if self.state.waiting:
            self.plan()
        return bool(self.open_cells())

    def _start(self, open_cells: Sequence[Cell]) -> None:
        for cell in open_cells:
            if len(self.state.running) >= self.settings.jobs:
                return
            handle = self.store.claim(cell)
            if handle is None:
                continue
            try:
                if self.result(cell) is None and not self.failed(cell):  # another process may have finished it just now
                    self._spawn(cell, handle)
            finally:
                os.close(handle)

    def _spawn(self, cell: Cell, handle: int) -> None:
        """Start a worker, which inherits the claim."""
        self.retried.add(cell.id)
        self.store.error_file(cell).unlink(missing_ok=True)
        work = self.store.work / cell.id
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        limit = self.settings.cell_minutes
        write_small(work / "job.json", {"cell": asdict(cell), "seconds": None if limit is None else limit * 60})
        with (work / "log.txt").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *self.settings.worker, str(self.store.folder), str(work / "job.json")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
                pass_fds=(handle,),
                start_new_session=True,  # a Ctrl-C is for us; workers finish the cell in hand
            )
        self.state.running.append(Running(cell=cell, process=process, started=time.monotonic()))

    def _reap(self) -> bool:
        """Take in what workers have finished; whether there was any."""
        before = len(self.state.running)
        limit = self.settings.cell_minutes
        for job in list(self.state.running):
            seconds = time.monotonic() - job.started
            if limit is not None and seconds > limit * 60 + GRACE:
                job.process.kill()  # its own limit did not end it: it hangs outside Python
                job.process.wait()
            code = job.process.poll()
            if code is None:
                continue
            self.state.running.remove(job)
            work = self.store.work / job.cell.id
            if self.store.read(job.cell) is None and self.store.failure(job.cell) is None and not self.stops:
                self.store.fail(job.cell, _last_words(code, work / "log.txt"), seconds)
            if not self.settings.keep_runs:
                shutil.rmtree(work, ignore_errors=True)
        return len(self.state.running) < before

    def _stop(self, number: int, frame: Any) -> None:
        """The first SIGINT lets the cells in hand finish; a second one, or SIGTERM, ends them too."""
        self.stops += 1
        if self.stops > 1 or number == signal.SIGTERM:
            raise KeyboardInterrupt
        count = len(self.state.running)
        print(f"Stopping: {count} cell(s) in hand are finished first; Ctrl-C again ends them now.", file=sys.stderr)

    def _end_all(self) -> None:
        """At a second Ctrl-C, or an error of ours: end the workers; their cells are run again another time."""
        for job in self.state.running:
            job.process.kill()
        for job in self.state.running:
            job.process.wait()
        self.state.running.clear()


def _last_words(code: int, log: Path) -> str:
    """What is known of a worker that ended without a result: its exit, and the end of its output."""
    ended = f"the worker was ended by signal {-code}" if code < 0 else f"the worker ended with code {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-LOG_LINES:]
    except OSError as error:
        lines = [f"no output ({error.strerror})"]
    return "\n".join([ended + hint, *lines])


def describe(cell: Cell) -> str:
    at = f" at {json.dumps(cell.point)}" if cell.point else ""
    return f"{cell.method} on {cell.task}, seed {cell.seed}{at}"
