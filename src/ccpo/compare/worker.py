"""One cell in a process of its own: ``python -m ccpo.compare.worker STUDY_FOLDER JOB.json``.

The job has the cell; the result goes to ``cells/``. The process holds the cell's claim by an inherited file and ends itself at its
time limit, so that it needs nobody once it runs.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ccpo.compare.cells import Cell, setup_of
from ccpo.compare.store import Store
from ccpo.errors import RunFailure, UserError

ERROR_LINES = 12


def main(folder: str, job: str) -> int:
    """Run the cell of the file ``job``. Returns 0 where it has a result, 1 where it failed and says why, 3 where it was told to stop."""
    clock = time.monotonic()
    order = json.loads(Path(job).read_text(encoding="utf-8"))
    store, cell = Store(Path(folder)), Cell(**order["cell"])
    _alarm(order["seconds"])
    try:
        store.write(cell, run_cell(cell, store.work / cell.id / "run", clock))
        return 0
    except _Stopped:
        return 3
    except (UserError, RunFailure, _OutOfTime) as error:
        store.fail(cell, f"{type(error).__name__.strip('_')}: {error}", time.monotonic() - clock)
    except Exception:
        last = traceback.format_exc().strip().splitlines()[-ERROR_LINES:]
        store.fail(cell, "\n".join(last), time.monotonic() - clock)
    return 1


def run_cell(cell: Cell, run: Path, clock: float) -> dict[str, Any]:
    """Train, examine, and sum up. Raises what training raises."""
    import torch

    from ccpo import train
    from ccpo.compare.extract import exam_record, made_by, training_record
    from ccpo.compare.merge import laid_over
    from ccpo.compare.record import Recorder
    from ccpo.config import load_recipe
    from ccpo.evaluate import Exam, evaluate
    from ccpo.runfolder import RunFolder
    from ccpo.runs import Reporter, model_paths

    torch.set_num_threads(1)
    shutil.rmtree(run, ignore_errors=True)  # what a worker that was killed had begun
    config = load_recipe(laid_over(cell.recipe, {"run": {"dir": str(run), "name": cell.id}}))
    setup = replace(setup_of(cell), config=config)
    with _base_lock(cell.recipe):
        paths, base_seconds = model_paths(setup, Reporter())
    heldout = dict([next(iter(setup.tests.items()))])
    recorder = Recorder(setup.rule)
    result = train(config, tests=heldout, credit=recorder)
    if not result.finished:
        raise _Stopped
    record = training_record(RunFolder(run))
    if record["steps"] == 1 and record["tokens"]["total"] > (config.trainer.tokens or 0):
        raise UserError(
            f"the budget of {config.trainer.tokens} tokens is too small for one step, which took {record['tokens']['total']}; "
            f"raise tasks.{cell.task}.tokens"
        )
    started = time.monotonic()
    crew = _crew(setup, run, paths)
    exam = Exam(**cell.exam | {"ablations": False}, seed=config.run.seed)
    reports = evaluate(setup.team, setup.tests, crew.voices(), setup.limits, exam)
    if cell.exam["ablations"]:  # many samples are for votes; agents are removed from one sample a problem
        removed = evaluate(
            setup.team, setup.tests, crew.voices(), setup.limits, replace(exam, samples=1, ablations=True)
        )
        reports = {name: removed[name] | report for name, report in reports.items()}
    final = exam_record(reports)
    seconds = record["seconds"] | {"exam": round(time.monotonic() - started, 2), "base": round(base_seconds, 2)}
    return {
        **{key: getattr(cell, key) for key in ("task", "method", "seed", "point")},
        **record,
        "updates": record["steps"] * config.optim.epochs * config.optim.minibatches,
        "boxes": recorder.boxes() if recorder.steps else {},
        "final": final,
        "seconds": seconds | {"wall": round(time.monotonic() - clock, 2)},
        "budget": config.trainer.tokens,
        **made_by(),
    }


def _crew(setup: Any, run: Path, paths: Mapping[str, str]) -> Any:
    """Those who speak: with the weights of the last checkpoint, or, where nothing was trained, as they were."""
    from ccpo.crew import Crew
    from ccpo.learner import find_checkpoint
    from ccpo.runs import checkpoint_paths

    checkpoint = find_checkpoint(run) if (run / "checkpoints").is_dir() else None
    return Crew(setup, paths if checkpoint is None else checkpoint_paths(setup, checkpoint), train=False)


@contextmanager
def _base_lock(recipe: Mapping[str, Any]) -> Iterator[None]:
    """One worker at a time makes the tiny base model of a team and task; the others then find it in the cache."""
    from ccpo.bootstrap import cache_folder

    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    what = json.dumps([recipe.get(k) for k in ("team", "task", "bootstrap", "model")], sort_keys=True, default=str)
    with (folder / f"making-{hashlib.sha256(what.encode()).hexdigest()[:16]}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _OutOfTime(Exception):
    pass


class _Stopped(Exception):
    pass


def _alarm(seconds: float | None) -> None:
    """End at the time limit, and at SIGTERM: the cell in hand is given up, and is run again another time."""

    def out_of_time(number: int, frame: Any) -> None:
        raise _OutOfTime(f"the cell took longer than its limit of {seconds:g} s (--cell-minutes)")

    if seconds is not None:
        signal.signal(signal.SIGALRM, out_of_time)
        signal.setitimer(signal.ITIMER_REAL, seconds)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main(*sys.argv[1:]))
