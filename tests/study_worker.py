"""A worker for tests: makes a result up where the real one would train. Run as ``python study_worker.py STUDY_FOLDER JOB.json``.

What it does hangs on the cell's learning rate: 0.5 raises a user's error, 0.25 dies without a word, 0.125 sleeps until it is told to go on
by a file named ``go`` in the study's folder.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from ccpo.compare import worker
from ccpo.compare.cells import Cell
from ccpo.compare.store import Store
from ccpo.errors import UserError
from study_cells import made_up


def run_cell(cell: Cell, run: Path, clock: float) -> dict:
    folder = run.parents[2]
    with (folder / "ran.txt").open("a") as file:
        file.write(f"{cell.id} {os.getpid()}\n")
    rate = cell.recipe["optim"]["lr"]
    if rate == 0.5:
        raise UserError("this cell cannot be run")
    if rate == 0.25:
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    while rate == 0.125 and not (folder / "go").exists():
        time.sleep(0.02)
    return made_up(cell.task, cell.method, cell.seed, 5000, point=cell.point)


if __name__ == "__main__":
    worker.run_cell = run_cell
    assert json.loads(Path(sys.argv[2]).read_text())["cell"]
    assert Store(Path(sys.argv[1])).cells.is_dir()
    sys.exit(worker.main(*sys.argv[1:]))
