"""``--launch torchrun:N``: the same command in N processes of this machine, by torch's own launcher."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence

from ccpo.errors import RunFailure, UserError, nearest

LAUNCHERS = ("torchrun", "ray")


def processes(launch: str) -> int | None:
    """N of ``torchrun:N``; None for ``ray``. Raises UserError for anything else."""
    name, _, count = launch.partition(":")
    if name not in LAUNCHERS:
        raise UserError(
            f"--launch {launch!r}: it is torchrun:N (N processes on this machine) or ray.{nearest(name, LAUNCHERS)}"
        )
    if launch == "ray":
        return None
    if name == "ray":
        raise UserError(f"--launch {launch!r}: with Ray say --launch ray --workers {count or 'N'}")
    if not count.isdigit() or int(count) < 1:
        raise UserError(f"--launch {launch!r}: say how many processes, for example --launch torchrun:8")
    return int(count)


def launch(count: int, arguments: Sequence[str]) -> int:
    """``python -m ccpo ARGUMENTS`` in ``count`` processes, at a free port; the exit code. What goes wrong in a process it says itself,
    unless it was killed."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run.run(run.parse_args(["--standalone", "--nproc-per-node", str(count), "-m", "ccpo", *arguments]))
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        if code < 0:
            name = signal.Signals(-code).name
            hint = " (out of memory?)" if -code == signal.SIGKILL else ""
            raise RunFailure(
                f"a process of the run was ended by {name}{hint}, and the others with it; go on from the last checkpoint with ccpo train "
                "--resume RUN"
            ) from None
        return code
    return 0
