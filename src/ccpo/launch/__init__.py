"""How a run is started on several processes: ``--launch torchrun:8``, ``--launch ray``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def start(
    launch: str,
    recipe: str | None,
    overrides: Sequence[str],
    resume: Path | None,
    steps: int | None,
    *,
    workers: int = 1,
    address: str | None = None,
    restarts: int = 3,
) -> int:
    """Check what can be checked, then train; the exit code. Raises UserError before any process is started where that can be known."""
    from ccpo.launch import torchrun
    from ccpo.runs import check_launch

    count = torchrun.processes(launch)
    source = recipe if resume is None else resume
    config = check_launch(source, overrides, workers if count is None else count, here=count is not None)
    if count is None:
        from ccpo.display import TerminalReporter, tell_result
        from ccpo.launch import ray

        how = ray.RayLaunch(workers=workers, address=address, restarts=restarts, gpu=config.run.device == "cuda")
        with TerminalReporter() as reporter:
            result = ray.launch(Path(config.run.folder), recipe, overrides, steps, how, reporter)
        tell_result(result)
        return 0
    arguments = ["train", *([recipe] if recipe else ["--resume", str(resume)])]
    arguments += [word for value in overrides for word in ("--set", value)]
    return torchrun.launch(count, arguments + ([] if steps is None else ["--steps", str(steps)]))
