"""Tasks from files: parquet, JSON lines, JSON, CSV, LogiQA text."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from ccpo.errors import UserError
from ccpo.tasks.base import ListTask, Verifier
from ccpo.tasks.columns import BadRowError, Kind, Layout, problem_of, recognise
from ccpo.tasks.extract import bare_latex, number
from ccpo.tasks.rows import Row, read_rows
from ccpo.tasks.verifiers import make_verifier
from ccpo.types import Problem

OnBadRow = Literal["error", "skip"]
_LOOKED_AT = 100  # rows whose columns are pooled to recognise the layout


def load_file(
    path: Path,
    *,
    question: str | None = None,
    answer: str | None = None,
    choices: str | None = None,
    id: str | None = None,
    verifier: Verifier | str = "auto",
    seconds: float = 5.0,
    on_bad_row: OnBadRow = "error",
    split: str | None = None,
    offset: int = 0,
    limit: int | None = None,
    name: str | None = None,
) -> ListTask:
    """The problems of a data file.

    The columns are recognised (see :mod:`ccpo.tasks.columns`) unless they are named; ``reward_model.ground_truth``
    leads into nested values. ``verifier``: ``exact``, ``choice``, ``math``, a function of your own, or ``auto``:
    choice where there are options, math where the answers are numbers or LaTeX, else exact. ``seconds``: the time
    limit of one verdict. ``split`` keeps the rows whose ``split`` (or ``extra_info.split``) says so. ``offset`` and
    ``limit`` then take a part, to hold some problems out of one file.

    A row that is no problem raises UserError with the path, the row's number and what was found in it; with
    ``on_bad_row="skip"`` such rows are left out and counted in ``skipped_rows``.
    """
    path = Path(path).expanduser()
    return task_of_rows(
        read_rows(path),
        where=str(path),
        name=name or path.stem,
        columns={"question": question, "answer": answer, "choices": choices, "id": id},
        verifier=verifier,
        seconds=seconds,
        on_bad_row=on_bad_row,
        split=split,
        offset=offset,
        limit=limit,
    )


def task_of_rows(
    rows: Iterable[Row],
    *,
    where: str,
    name: str,
    columns: dict[str, str | None],
    verifier: Verifier | str,
    seconds: float,
    on_bad_row: OnBadRow,
    split: str | None,
    offset: int,
    limit: int | None,
) -> ListTask:
    """The task in some rows; ``where`` names their origin in messages. Raises UserError."""
    if offset < 0 or (limit is not None and limit < 1):
        raise UserError(f"{where}: offset is {offset} and limit {limit}; offset is at least 0 and limit at least 1")
    if seconds <= 0:
        raise UserError(f"{where}: seconds is {seconds}; the time limit of a verdict is more than 0")
    if on_bad_row not in ("error", "skip"):
        raise UserError(f"{where}: on_bad_row is {on_bad_row!r}; it is error or skip")
    if isinstance(verifier, str) and verifier != "auto":
        make_verifier(verifier)  # a wrong name is told before a large file is read
    iterator = iter(rows)
    head = list(itertools.islice(iterator, _LOOKED_AT))
    layout = _layout(head, columns, where)
    problems, broken = _collect(itertools.chain(head, iterator), layout, name, where, split, offset, limit)
    if broken and on_bad_row == "error":
        raise UserError(_complaint(where, broken))
    if not problems:
        more = (
            f"; every one of {len(broken)} rows is broken, the first at {broken[0][0]}: {broken[0][1]}"
            if broken
            else ""
        )
        raise UserError(f"{where} has no problems" + (f" after the first {offset}" if offset else "") + more)
    if isinstance(verifier, str):
        verifier = make_verifier(_verifier_for(layout, problems) if verifier == "auto" else verifier, seconds)
    return ListTask(name=name, problems=tuple(problems), verifier=verifier, skipped_rows=len(broken))


def _layout(head: Sequence[Row], columns: dict[str, str | None], where: str) -> Layout:
    readable = [row.fields for row in head if row.fields is not None]
    if not readable:
        raise UserError(
            _complaint(where, [(row.where, row.trouble) for row in head]) if head else f"{where} has no rows"
        )
    names = dict.fromkeys(name for fields in readable for name in fields if isinstance(name, str))
    try:
        return recognise(names, **columns)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _collect(
    rows: Iterable[Row], layout: Layout, name: str, where: str, split: str | None, offset: int, limit: int | None
) -> tuple[list[Problem], list[tuple[str, str]]]:
    problems: list[Problem] = []
    broken: list[tuple[str, str]] = []
    used: dict[str, int] = {}
    passed, other_splits = 0, set()
    for row in rows:
        if split is not None and row.fields is not None and (found := _split_of(row)) != split:
            other_splits.add(str(found))
            continue
        try:
            if row.fields is None:
                raise BadRowError(row.trouble)
            problem = problem_of(row.fields, layout, identity=f"{name}-{row.number}", source=name)
        except BadRowError as error:
            broken.append((row.where, str(error)))
            continue
        passed += 1
        if passed <= offset:
            continue
        problems.append(_unique(problem, used))
        if limit is not None and len(problems) == limit:
            break
    if not passed and not broken and other_splits:
        raise UserError(f"{where}: no row is of the split {split!r}; there are {', '.join(sorted(other_splits))}")
    return problems, broken


def _split_of(row: Row) -> object:
    nested = row.fields.get("extra_info")
    return row.fields.get("split") or (nested.get("split") if isinstance(nested, dict) else None)


def _unique(problem: Problem, used: dict[str, int]) -> Problem:
    """The problem, under an id of its own: results are cached by id."""
    count = used[problem.id] = used.get(problem.id, 0) + 1
    if count == 1:
        return problem
    identity = f"{problem.id}#{count}"
    used[identity] = used.get(identity, 0) + 1
    return Problem(id=identity, text=problem.text, answer=problem.answer, source=problem.source, meta=problem.meta)


def _complaint(where: str, broken: Sequence[tuple[str, str]]) -> str:
    place, trouble = broken[0]
    others = f" {len(broken)} rows are broken: {_listed(broken)}." if len(broken) > 1 else ""
    return f"{where}, {place}: {trouble}.{others} Mend the file, or leave such rows out with on_bad_row: skip"


def _listed(broken: Sequence[tuple[str, str]]) -> str:
    return ", ".join(place for place, _ in broken[:5]) + (", …" if len(broken) > 5 else "")


def _verifier_for(layout: Layout, problems: Sequence[Problem]) -> str:
    if layout.kind is Kind.CHOICE:
        return "choice"
    if layout.kind in (Kind.GRADED, Kind.SOLUTION):
        return "math"
    numbers = all(number(bare_latex(problem.answer)) for problem in problems)
    latex = any("\\" in problem.answer or "$" in problem.answer for problem in problems)
    return "math" if numbers or latex else "exact"


def rows_of(values: Iterable[dict]) -> Iterator[Row]:
    """Rows that are in memory already, numbered from 1."""
    for number_, fields in enumerate(values, start=1):
        yield Row(where=f"row {number_}", number=number_, fields=fields)
