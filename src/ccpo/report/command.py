"""``ccpo report`` and ``ccpo watch``: from the words of the command line to a file or a server."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ccpo.errors import UserError
from ccpo.report.document import RunReader, build_document
from ccpo.report.page import page
from ccpo.report.watch import Server

NAME = "report.html"


def write_report(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the page of one or several runs; returns where. Default: ``report.html`` in the run's folder, of several runs in
    the current one. Raises UserError where a run is none or the file cannot be written."""
    if not runs:
        raise UserError("name the folder of at least one run, e.g. runs/demo")
    readers = [RunReader(run) for run in runs]
    path = Path(out) if out is not None else Path(runs[0]) / NAME if len(runs) == 1 else Path(NAME)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file, e.g. --out {path / NAME}")
    document, tables = build_document(readers)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page(document, tables), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another place with --out") from None
    return path


def serve(run: str | Path, port: int, say: Callable[[str], None]) -> None:
    """Serve the page of a run until Ctrl-C."""
    with Server(run, port) as server:
        try:
            say(f"{server.address} shows {run} and follows it; Ctrl-C ends this.")
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            say("Ended.")
