"""A study's folder: one small file a cell, written whole or not at all, and the one results file made of them.

``cells/ID.json`` a result · ``cells/ID.error.json`` why a cell failed · ``claims/ID.lock`` held by the process that runs the cell ·
``work/ID/`` its run, deleted when its result is kept · ``defaults.json`` · ``results.jsonl`` · ``figures/`` · ``report.md``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ccpo.compare.cells import EPOCH, Cell
from ccpo.compare.drift import Defaults, present_defaults
from ccpo.errors import UserError
from ccpo.runfolder import read_json, write_json

FORMAT = "ccpo.study/1"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a cell has no result."""

    error: str
    seconds: float


class Store:
    """The files of a study's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cells = folder / "cells"
        self.claims = folder / "claims"
        self.work = folder / "work"
        self.results = folder / "results.jsonl"
        self.figures = folder / "figures"
        self.page = folder / "report.md"
        self.damaged: list[str] = []

    def create(self) -> None:
        """Make the folder. Raises UserError where that cannot be."""
        try:
            for path in (self.cells, self.claims, self.work):
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make the study's folder {self.folder}: {error.strerror}; choose another with --folder"
            ) from None

    def defaults(self, known: Defaults | None = None) -> Defaults:
        """The defaults of the study's beginning. Where none are kept yet, ``known`` (those of a results file that is taken over) or the
        present ones begin it. Raises UserError for a damaged file."""
        path = self.folder / "defaults.json"
        if not path.is_file():
            write_json(path, known or present_defaults())
        found = read_json(path)
        if not isinstance(found, dict):
            raise UserError(
                f"{path} is damaged; the study's cells cannot be told from others any more: choose another --folder"
            )
        return found

    # --- results -----------------------------------------------------------------------------------------------------------

    def result_file(self, cell: Cell) -> Path:
        return self.cells / f"{cell.id}.json"

    def error_file(self, cell: Cell) -> Path:
        return self.cells / f"{cell.id}.error.json"

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """The result of a cell; None where there is none. A damaged file counts as none, and is named in ``damaged``."""
        path = self.result_file(cell)
        if not path.is_file():
            return None
        try:
            return unsealed(json.loads(path.read_text(encoding="utf-8")), cell.fingerprint)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if path.name not in self.damaged:
                self.damaged.append(f"{path.name} ({error})")
            return None

    def write(self, cell: Cell, result: Mapping[str, Any]) -> None:
        """Keep a result, atomically; an earlier failure is forgotten."""
        write_small(self.result_file(cell), sealed(result, cell.fingerprint))
        self.error_file(cell).unlink(missing_ok=True)

    def failure(self, cell: Cell) -> Failure | None:
        path = self.error_file(cell)
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return Failure(error=str(found["error"]), seconds=float(found["seconds"]))
        except (ValueError, KeyError, TypeError) as error:
            return Failure(error=f"unreadable record of a failure ({error})", seconds=0.0)

    def fail(self, cell: Cell, error: str, seconds: float) -> None:
        write_json(self.error_file(cell), {"cell": cell.id, "error": error, "seconds": round(seconds, 1)})

    def strangers(self, cells: Iterable[Cell]) -> list[str]:
        """Result files that belong to no cell of the study as it is now: other recipes, other versions. They are left out."""
        known = {self.result_file(cell).name for cell in cells} | {self.error_file(cell).name for cell in cells}
        return sorted(p.name for p in self.cells.glob("*.json") if p.name not in known)

    # --- claims ------------------------------------------------------------------------------------------------------------

    def claim(self, cell: Cell) -> int | None:
        """An open file whose lock says that the cell is ours; None where another process has it.

        The lock belongs to the open file: a worker that inherits it holds it, and the system drops it when the worker ends, however
        it ends. So nothing is left behind by a kill, and no claim can be stale. (On a local disk: network file systems differ.)
        """
        handle = os.open(self.claims / f"{cell.id}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        return handle

    def claimed(self, cell: Cell) -> bool:
        """Whether some process holds the cell now."""
        if not (self.claims / f"{cell.id}.lock").exists():
            return False
        handle = self.claim(cell)
        if handle is None:
            return True
        os.close(handle)
        return False


# --- seals -------------------------------------------------------------------------------------------------------------------


def sealed(result: Mapping[str, Any], fingerprint: str) -> dict[str, Any]:
    return {"format": FORMAT, "fingerprint": fingerprint, "sha256": checksum(result), "result": dict(result)}


def unsealed(record: Mapping[str, Any], fingerprint: str | None = None) -> dict[str, Any]:
    """The result inside a record. Raises ValueError for another format or recipe, and for one that was changed or cut off."""
    if record["format"] != FORMAT:
        raise ValueError(f"format {record['format']!r}, this version reads {FORMAT!r}")
    if fingerprint is not None and record["fingerprint"] != fingerprint:
        raise ValueError("made by another recipe")
    if record["sha256"] != checksum(record["result"]):
        raise ValueError("its checksum does not match")
    return record["result"]


def checksum(result: Any) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def write_small(path: Path, data: Any) -> None:
    """Compact JSON, written atomically."""
    write_text(path, json.dumps(data, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


# --- the results file --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Results:
    """A results file: results by fingerprint, and the defaults of the study's beginning, against which fingerprints are made."""

    records: dict[str, dict[str, Any]]
    defaults: Defaults


def write_results(path: Path, study: str, version: str, results: Results, failures: Mapping[str, str]) -> None:
    """One line of header, then a line a cell; failed cells by id in the header."""
    records = results.records
    header = {
        "format": FORMAT,
        "study": study,
        "epoch": EPOCH,
        "ccpo": version,
        "cells": len(records),
        "failed": dict(failures),
        "defaults": results.defaults,
    }
    lines = [header, *(sealed(result, fingerprint) for fingerprint, result in records.items())]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def read_results(path: Path, study: str) -> Results:
    """What :func:`write_results` wrote. Raises UserError for a file that is no results file, is of another format, epoch or study, or is damaged."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        header = json.loads(lines[0])
        found_format, found_study, found_epoch, count = (header[k] for k in ("format", "study", "epoch", "cells"))
        defaults = dict(header["defaults"])
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the results file of a study") from None
    except (OSError, ValueError, IndexError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a results file of ccpo compare ({type(error).__name__}: {error})") from None
    if found_format != FORMAT:
        raise UserError(
            f"{path} has format {found_format!r}; this version reads {FORMAT!r}. Run the study again, or use the version that wrote it"
        )
    if found_study != study:
        raise UserError(f"{path} holds results of the study {found_study!r}, not of {study!r}; they are not mixed")
    if found_epoch != EPOCH:
        raise UserError(
            f"{path} was made when the training code gave other results (epoch {found_epoch}, now {EPOCH}); they are not mixed. "
            f"Run the study again, or use the version that made it ({header.get('ccpo')})"
        )
    found = {}
    for number, line in enumerate(lines[1:], start=2):
        try:
            record = json.loads(line)
            found[str(record["fingerprint"])] = unsealed(record)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number}: damaged ({error}); take a whole copy of the file") from None
    if len(found) != count:
        raise UserError(f"{path}: {count} cells were written, {len(found)} are there; it was cut off")
    return Results(records=found, defaults=defaults)
