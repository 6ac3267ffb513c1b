"""``ccpo.compare.command.compare``: check a study, run what is missing, and write its results, figures and page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from ccpo.compare.cells import Cell, check
from ccpo.compare.drift import drifted, present_defaults
from ccpo.compare.progress import Watcher, every_cell, plan_table, progress_table
from ccpo.compare.runner import PHASES, Runner, Settings, describe
from ccpo.compare.store import Results, Store, read_results
from ccpo.compare.study import Study, load_study
from ccpo.errors import UserError, nearest


@dataclass(frozen=True, kw_only=True)
class Options:
    """``results``: a results file whose cells are taken over where their recipe is the study's; ``page``: where the page goes in place
    of the study's folder, with its figures and results beside it."""

    folder: Path | None = None
    results: Path | None = None
    page: Path | None = None
    report: bool = False
    listing: bool = False
    only: Sequence[str] = ()


def compare(source: str | Path, options: Options, settings: Settings) -> bool:
    """Returns whether every cell has a result. Raises UserError for a study that cannot be run, before anything runs."""
    console = Console()
    study = load_study(source)
    check(study)
    settings = replace(settings, only=filtered(study, options.only), phases=_phases(settings.phases))
    store = Store(options.folder or Path("runs") / f"study-{study.name}")
    store.create()
    taken = read_results(options.results, study.name) if options.results is not None else None
    study = _since_begun(study, store, taken, options)
    with Watcher(settings.jobs) as watcher:
        runner = Runner(study, store, settings, watcher)
        watcher.runner = runner
        if taken is not None:
            _take_over(runner, taken, console)
        if options.listing:
            console.print(plan_table(runner))
            return not runner.open_cells()
        complete = True if options.report else runner.run()
    runner.plan()
    console.print(progress_table(runner, settings.jobs))
    _tell_what_is_left_out(runner, console)
    from ccpo.compare.report import write_report

    write_report(
        study,
        runner,
        store,
        source=str(source),
        page=options.page,
        say=lambda text: console.print(escape(text), highlight=False),
    )
    return complete and not runner.state.waiting and all(runner.result(c) is not None for c in every_cell(runner.state))


def _phases(wanted: Sequence[str]) -> Sequence[str]:
    for phase in wanted:
        if phase not in PHASES:
            raise UserError(f"--phase {phase!r}: it is one of {', '.join(PHASES)}.{nearest(phase, PHASES)}")
    return [phase for phase in PHASES if phase in wanted] or PHASES


def filtered(study: Study, words: Sequence[str]) -> Callable[[Cell], bool]:
    """``method=a``, ``task=t``, ``seed=3``: of one key any may match, of different keys all must. Raises UserError for unknown ones."""
    wanted: dict[str, set[str]] = {}
    known = {"method": list(study.methods), "task": list(study.tasks), "seed": None}
    for word in (part.strip() for text in words for part in text.split(",") if part.strip()):
        key, equals, value = word.partition("=")
        if not equals or key not in known:
            raise UserError(f"--only {word!r}: expected method=NAME, task=NAME or seed=NUMBER")
        names = known[key]
        if names is not None and value not in names:
            raise UserError(
                f"--only {word!r}: the study has no such {key}; it has {', '.join(names)}.{nearest(value, names)}"
            )
        wanted.setdefault(key, set()).add(value)
    return lambda cell: all(str(getattr(cell, key)) in values for key, values in wanted.items())


def _since_begun(study: Study, store: Store, taken: Results | None, options: Options) -> Study:
    """The study against the defaults of its folder's beginning. Raises UserError where a results file began with others."""
    then = store.defaults(taken.defaults if taken else None)
    if taken is not None and (other := drifted(then, taken.defaults)):
        key = next(iter(other))
        raise UserError(
            f"{options.results} and {store.folder} began with other defaults ({key}: {other[key]!r} and {then[key]!r}); take the file over "
            "into a new folder (--folder)"
        )
    return study.since(drifted(then, present_defaults()))


def _take_over(runner: Runner, results: Results, console: Console) -> None:
    """Put the cells of a results file into the study's folder where the study has the same recipe; say how many it has not."""
    found = results.records
    taken: set[str] = set()
    before = -1
    while before != len(taken):  # tuning cells that come in decide which further cells the study has
        before = len(taken)
        for cell in every_cell(runner.state):
            if cell.fingerprint in found and cell.fingerprint not in taken:
                taken.add(cell.fingerprint)
                if runner.result(cell) is None:
                    runner.store.write(cell, found[cell.fingerprint])
        runner.plan()
    stale = [r for fingerprint, r in found.items() if fingerprint not in taken]
    console.print(f"{len(taken)} cells taken over", highlight=False)
    for result in stale[:10]:
        console.print(
            f"  not taken, made by another recipe: {result['method']} on {result['task']}, seed {result['seed']}",
            highlight=False,
        )
    if len(stale) > 10:
        console.print(f"  … and {len(stale) - 10} more", highlight=False)


def _tell_what_is_left_out(runner: Runner, console: Console) -> None:
    cells = every_cell(runner.state)
    for cell in cells:
        failure = runner.store.failure(cell)
        if failure is not None and runner.result(cell) is None:
            last = failure.error.strip().splitlines()[-1:] or ["(no message)"]
            console.print(f"[red]failed[/red]: {escape(describe(cell))}: {escape(last[0])}", highlight=False)
    for name in runner.store.damaged:
        console.print(f"damaged, so it counts as not run: {escape(name)}", highlight=False)
    strangers = runner.store.strangers(cells)
    if strangers and not runner.state.waiting:
        console.print(
            f"left out: {len(strangers)} files in {runner.store.cells} are of other recipes (for example {strangers[0]})",
            highlight=False,
        )
