"""``--launch torchrun:N``: the same command in N processes of this machine, by torch's own launcher."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ccpo.errors import UserError, nearest

LAUNCHERS = ("torchrun", "ray")


def processes(launch: str) -> int:
    """N of ``torchrun:N``. Raises UserError for anything else."""
    name, _, count = launch.partition(":")
    if name not in LAUNCHERS:
        raise UserError(
            f"--launch {launch!r}: it is torchrun:N (N processes on this machine) or ray.{nearest(name, LAUNCHERS)}"
        )
    if name == "ray" or not count.isdigit() or int(count) < 1:
        raise UserError(f"--launch {launch!r}: say how many processes, for example --launch torchrun:8")
    return int(count)


def command(count: int, arguments: Sequence[str]) -> list[str]:
    """The launcher's command line for ``python -m ccpo ARGUMENTS``; its port is a free one."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return [*launcher, "-m", "ccpo", *arguments]


def become(count: int, arguments: Sequence[str]) -> NoReturn:
    """This process becomes the launcher, so that signals reach it and nothing is left behind."""
    threads = max(1, (os.cpu_count() or 1) // count)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    line = command(count, arguments)
    sys.stdout.flush()
    os.execv(line[0], line)
