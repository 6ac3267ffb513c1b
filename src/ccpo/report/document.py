"""From run folders to the one document that the page shows."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ccpo.errors import UserError
from ccpo.report.episodes import read_groups
from ccpo.report.free_riding import FILE as FREE_RIDING
from ccpo.report.free_riding import read_free_riding
from ccpo.report.graph import agents_of, team_graph
from ccpo.report.reading import (
    Notes,
    integer,
    items,
    mapping,
    number,
    read_object,
    read_records,
    regular_file,
    short,
    text,
)
from ccpo.report.rollouts import MAX_BYTES, MAX_ROLLOUTS, Sample
from ccpo.report.series import columns, evaluations, totals
from ccpo.report.tally import Tally, credit_summary
from ccpo.report.warnings import find_warnings
from ccpo.runfolder import RunFolder

MAX_FILES = 2000  # episode files that are read of one run
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What is kept of one episode file, and of which state of it; ``tally`` is None where it could not be read."""

    stamp: tuple[int, int]
    tally: Tally | None
    notes: list[str]


class RunReader:
    """Reads a run's folder as often as asked. When ``keep``, episode files that were read before are not read again while there are
    only new ones behind them, and what is held of them are counts and the sample that the page shows, however many they are.

    Raises :class:`UserError` where the folder is none of a run.
    """

    def __init__(self, path: str | Path, *, keep: bool = False) -> None:
        self.folder, self.keep = RunFolder(path), keep
        self._forget(Sample())
        check_run(self.folder)

    def _forget(self, sample: Sample) -> None:
        self.steps: dict[Path, _Step] = {}
        self.sample, self.prompted = sample, set[str]()

    def stamp(self) -> tuple[Any, ...]:
        """Changes when a file changes that the document is made of."""
        f = self.folder
        files = [f.recipe, f.metrics, f.evaluations, f.summary, f.episodes, f.failure, f.path / FREE_RIDING]
        return tuple(_stamp(path) for path in files)

    def read(self, *, rollouts: int = MAX_ROLLOUTS, size: int = MAX_BYTES) -> tuple[dict[str, Any], dict[str, Any]]:
        """The run's document and its table of rollouts, of at most so many rollouts and bytes."""
        notes, folder = Notes(), self.folder
        recipe = read_object(folder.path, folder.recipe, notes)
        records = read_records(folder.path, folder.metrics, notes)
        exams = read_records(folder.path, folder.evaluations, notes)
        summary = read_object(folder.path, folder.summary, notes)
        tallies, sample = self._episodes(notes, (rollouts, size))
        agents = agents_of(recipe, tallies)
        table = sample.table(agents)
        if table["shown"] < table["seen"]:
            notes.add(
                f"The page holds {table['shown']:,} of the run's {table['seen']:,} rollouts: all those of problems chosen at random. "
                "Credit, tokens and curves are of all."
            )
        for name in _absent(folder):
            notes.add(f"{name} is not there (yet); what it would tell is left out.")
        document = {
            "name": text(mapping(mapping(recipe.get("config")).get("run")).get("name")) or folder.path.name or "run",
            "folder": str(folder.path),
            "agents": agents,
            "made": _made(recipe, summary),
            "progress": _progress(recipe, records, summary, folder),
            "spent": _spent(records, summary),
            "metrics": columns(records, notes),
            "evaluations": evaluations(exams),
            "credit": credit_summary(tallies, agents) if tallies else [],
            "graph": team_graph(recipe, tallies),
            "rollouts": {"seen": table["seen"], "shown": table["shown"]},
            "free_riding": read_free_riding(folder, notes),
            "warnings": find_warnings(folder, notes),
        }
        return document | {"notes": notes.sentences()}, table

    def _episodes(self, notes: Notes, limits: tuple[int, int]) -> tuple[list[Tally], Sample]:
        files = self._files(notes)
        if not self.keep or self.sample.limits != limits or self._changed(files):
            self._forget(Sample(*limits))
        for path in files[len(self.steps) :]:
            self.steps[path] = self._step(path)
        for step in self.steps.values():
            for note in step.notes:
                notes.add(note)
        return [step.tally for step in self.steps.values() if step.tally is not None], self.sample

    def _changed(self, files: Sequence[Path]) -> bool:
        """Whether files that were read are others now, or gone, or others came between them: a resumed run writes its last steps again."""
        known = list(self.steps)
        return files[: len(known)] != known or any(_stamp(path) != step.stamp for path, step in self.steps.items())

    def _files(self, notes: Notes) -> list[Path]:
        found = {}
        for path in self.folder.episodes.glob("step-*.jsonl.gz"):
            if match := re.fullmatch(r"step-(\d{1,12})\.jsonl\.gz", path.name):
                found[int(match[1])] = path
        files = [found[step] for step in sorted(found)]
        return _thinned(files, notes)

    def _step(self, path: Path) -> _Step:
        """Count a file's groups and add them to the sample."""
        stamp, own, step = _stamp(path), Notes(), int(path.name[5:].split(".")[0])
        if not regular_file(self.folder.path, path, own):
            return _Step(stamp=stamp, tally=None, notes=own.sentences())
        tally = Tally(step=step)
        for group in read_groups(path, step, own):
            tally.add(group)
            self.sample.add([group])
        tally.prompts = {turn: prompt for turn, prompt in tally.prompts.items() if turn not in self.prompted}
        self.prompted |= tally.prompts.keys()
        return _Step(stamp=stamp, tally=tally, notes=own.sentences())


def _thinned(files: list[Path], notes: Notes) -> list[Path]:
    """Every second, fourth, eighth … of too many files, from the first: those that are chosen stay so when a few more come."""
    every = 1
    while len(files) > MAX_FILES * every:
        every *= 2
    if every > 1:
        notes.add(f"Of {len(files):,} steps the episodes of every {every}{'nd' if every == 2 else 'th'} are read.")
    return files[::every]


def check_run(folder: RunFolder) -> None:
    """Raise UserError where ``folder`` is no folder of a run."""
    if not folder.path.exists():
        raise UserError(f"{folder.path} does not exist; name the folder of a run, e.g. runs/demo")
    if not folder.path.is_dir():
        raise UserError(f"{folder.path} is a file; name the folder of a run, e.g. runs/demo")
    if not any(path.exists() for path in (folder.recipe, folder.metrics, folder.evaluations, folder.episodes)):
        raise UserError(
            f"{folder.path} holds no run: no recipe.json, metrics.jsonl, evaluations.jsonl or episodes/; name the folder of a run, e.g. runs/demo"
        )


def build_document(readers: Sequence[RunReader]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The document of several runs, and for each its table of rollouts. The limits of a page are shared between the runs."""
    each = {"rollouts": MAX_ROLLOUTS // len(readers), "size": MAX_BYTES // len(readers)}
    runs, tables = zip(*(reader.read(**each) for reader in readers), strict=True)
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"version": VERSION, "generated": now, "runs": list(runs)}, list(tables)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_mtime_ns, found.st_size)


def _absent(folder: RunFolder) -> list[str]:
    files = (folder.recipe, folder.metrics, folder.evaluations)
    return [path.name for path in files if not path.exists()] + ["episodes/"] * (not folder.episodes.is_dir())


def _made(recipe: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, Any]:
    """How the run was made: command, commit, versions, and the recipe as pairs of key and value."""
    words = [word for word in items(recipe.get("command")) if isinstance(word, str)]
    versions = mapping(recipe.get("made_with")) or mapping(summary.get("made_with"))
    config = mapping(recipe.get("config"))
    return {
        "command": _command(words),
        "commit": text(recipe.get("commit")),
        "versions": {str(k)[:40]: text(v) for k, v in list(versions.items())[:20] if isinstance(v, str)},
        "objects": {str(k)[:40]: text(v) for k, v in list(mapping(recipe.get("objects")).items())[:20]},
        "config": _flat(config)[:400],
        "kinds": {part: _kind(config.get(part)) for part in ("team", "task", "credit", "loss", "model")}
        | {"advantage": text(config.get("advantage"))},
    }


def _command(words: Sequence[str]) -> str | None:
    """The command as it is typed: the program by its name, not by where it lay."""
    if words and re.search(r"(^|[/\\])(ccpo|__main__\.py)(\.exe)?$", words[0]):
        words = ["ccpo", *words[1:]]
    return shlex.join(words)[:2000] or None


def _kind(part: Any) -> str | None:
    part = mapping(part)
    return text(part.get("kind")) or text(part.get("path"))


def _flat(config: Any, prefix: str = "", depth: int = 0) -> list[list[str]]:
    """Pairs of dotted key and value; what lies deeper than six levels is left out."""
    pairs = []
    for key, value in list(mapping(config).items())[:200]:
        name = f"{prefix}{key}"[:120]
        if isinstance(value, dict) and value:
            pairs += _flat(value, f"{name}.", depth + 1) if depth < 6 else []
        else:
            pairs.append([name, _shown(value)])
    return pairs


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value[:500]
    if isinstance(value, list):
        return ", ".join(_shown(v) if not isinstance(v, list | dict) else "…" for v in value[:50])
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.10g}"
    return "none" if value is None or isinstance(value, dict) else f"{value}"


def _progress(
    recipe: Mapping[str, Any], records: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], folder: RunFolder
) -> dict[str, Any]:
    trainer = mapping(mapping(recipe.get("config")).get("trainer"))
    written = [_stamp(path)[0] for path in (folder.metrics, folder.evaluations, folder.summary)]
    return {
        "step": max((record["step"] for record in records), default=integer(summary.get("steps")) or 0),
        "steps": integer(trainer.get("steps")),
        "budget": integer(trainer.get("tokens")),
        "finished": bool(summary),
        "failed": folder.failure.exists(),
        "written": _day(max(written)),
    }


def _day(nanoseconds: int) -> str | None:
    return datetime.fromtimestamp(nanoseconds / 1e9, UTC).strftime("%Y-%m-%d %H:%M UTC") if nanoseconds else None


def _spent(records: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> dict[str, float | int | None]:
    """Tokens by kind and seconds; the summary's where the run is finished, else the sums over the steps."""
    spent = totals(records)
    told = {key: number(summary.get(f"tokens_{key}")) for key in ("joint", "counterfactual", "rating")}
    told |= {"seconds": number(summary.get("seconds_training"))}
    whole = {key: number(summary.get(f"seconds_{key}")) for key in ("total", "bootstrap")}
    return {key: short(told[key] if told[key] is not None else spent[key], 9) for key in told} | whole
