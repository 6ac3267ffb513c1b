"""Writes what a study has found: results file, figures, page."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ccpo.compare.cells import Cell, main_cells, sweep_cells
from ccpo.compare.figures import draw_all
from ccpo.compare.page import page as render
from ccpo.compare.page import relative
from ccpo.compare.progress import every_cell
from ccpo.compare.runner import Runner
from ccpo.compare.store import Results, Store, write_results, write_text
from ccpo.compare.study import Study
from ccpo.compare.summary import Summary, summarise
from ccpo.compare.tuning import choose
from ccpo.errors import UserError
from ccpo.runs import versions


def write_report(
    study: Study, runner: Runner, store: Store, *, source: str, page: Path | None, say: Callable[[str], None]
) -> Summary:
    """Results file, figures and page, in the study's folder; with ``page`` the page is that file, and the folder of its name beside it has the
    rest. Figures are left out, with a word, where matplotlib is missing."""
    target = page or store.page
    beside = target.with_suffix("") if page is not None else store.folder
    results, pictures = beside / store.results.name, beside if page is not None else store.figures
    summary = collect(study, runner)
    cells = every_cell(runner.state)
    write_results(
        results,
        study.name,
        versions()["ccpo"],
        Results(
            records={cell.fingerprint: found for cell in cells if (found := runner.result(cell)) is not None},
            defaults=store.defaults(),
        ),
        {cell.id: error for cell in cells if (error := _error(runner, cell)) is not None},
    )
    try:
        figures = relative(draw_all(summary, pictures), target.parent)
    except UserError as error:
        say(f"no figures: {error}")
        figures = {}
    command = f"ccpo compare {shlex.quote(source)}" + (
        f" --results {results} --page {page}" if page is not None else ""
    )
    write_text(target, render(summary, figures, command))
    say(f"Results: {results}")
    say(f"Page: {target}")
    return summary


def _error(runner: Runner, cell: Cell) -> str | None:
    """Why a cell has no result, where it failed."""
    failure = runner.store.failure(cell)
    return None if failure is None or runner.result(cell) is not None else failure.error


def collect(study: Study, runner: Runner) -> Summary:
    """Everything that the page shows, of the cells that have a result now."""
    chosen, tuned = choose(study, runner.result, lambda cell: runner.store.failure(cell) is not None)
    runs: dict[tuple[str, str], list[Any]] = {}
    failed: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for cell in main_cells(study, chosen):
        pair = (cell.method, cell.task)
        found, error = runner.result(cell), _error(runner, cell)
        if found is not None:
            runs.setdefault(pair, []).append(found)
        elif error is not None:
            failed.setdefault(pair, []).append((cell.seed, error))
    sweeps = {
        name: [(value, _results(runner, cells)) for value, cells in values]
        for name, values in sweep_cells(study, chosen).items()
    }
    every = _results(runner, {cell.id: cell for cell in every_cell(runner.state)}.values())
    return summarise(study, runs, sweeps=sweeps, every_run=every, failures=failed, chosen=chosen, tuned=tuned)


def _results(runner: Runner, cells: Sequence[Cell]) -> list[Any]:
    return [found for cell in cells if (found := runner.result(cell)) is not None]
