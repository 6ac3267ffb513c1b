"""A process of its own for work on untrusted text, with a time limit for each item.

What hangs is killed and reported as ``TIMEOUT``; what eats the memory or crashes is ``ERROR``; the next item is
served as if nothing had happened. POSIX only. The process ends when this one does, even when this one is killed.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ccpo.errors import RunFailure
from ccpo.types import VerdictStatus

CHUNK = 64
GRACE = 5.0
START_SECONDS = 120.0
_KEPT_ENVIRONMENT = ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR", "SYSTEMROOT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """``value`` where ``status`` is OK, else ``detail`` says what went wrong."""

    status: VerdictStatus
    value: Any = None
    detail: str = ""


class _SilentError(Exception):
    """The process has closed its output, or has not answered in time."""


class Sandbox:
    """Runs items of one ``kind`` ("math" or "gym") in a subprocess that is started on first use. May be shared by
    threads.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._unread = b""

    def run(self, items: Sequence[Any], seconds: float) -> list[Outcome]:
        """The outcome of every item, in order; ``seconds`` is the time limit of each one."""
        outcomes: list[Outcome] = []
        with self._lock:
            while len(outcomes) < len(items):
                outcomes += self._run_chunk(items[len(outcomes) : len(outcomes) + CHUNK], seconds)
        return outcomes

    @property
    def pid(self) -> int | None:
        """The process's id, where it runs."""
        return self._process.pid if self._process is not None and self._owner == os.getpid() else None

    def close(self) -> None:
        """End the process. It is started again when it is needed."""
        with self._lock:
            self._end()

    def _run_chunk(self, items: Sequence[Any], seconds: float) -> list[Outcome]:
        """Outcomes of at least the first item: those up to the one, if any, at which the process died."""
        outcomes: list[Outcome] = []
        try:
            self._start()
            self._send([seconds, list(items)])
            for _ in items:
                reply = self._receive(seconds + GRACE)
                outcomes.append(_outcome(reply, seconds))
                if "died" in reply:
                    break
        except (_SilentError, OSError) as error:
            self._end()
            outcomes.append(
                Outcome(status=VerdictStatus.TIMEOUT, detail=f"the {self.kind} process fell silent: {error}")
            )
        return outcomes

    def _start(self) -> None:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return
        self._end()
        environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("sandbox_worker.py")), self.kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env={**environment, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
        self._owner, self._unread = os.getpid(), b""
        try:
            self._receive(START_SECONDS)
        except _SilentError:
            self._process.kill()
            said = self._process.stderr.read().decode("utf-8", "replace").strip()
            self._end()
            raise RunFailure(
                f"the process that judges {self.kind} answers did not start: {said.splitlines()[-1:] or 'no message'}"
            ) from None
        self._process.stderr.close()  # its stderr goes nowhere from here on

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()
        if self._owner == os.getpid():
            with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _send(self, message: Any) -> None:
        data = json.dumps(message).encode() + b"\n"
        view, pipe = memoryview(data), self._process.stdin
        while view:
            view = view[pipe.write(view) :]

    def _receive(self, seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise _SilentError(f"no reply in {seconds:.0f} s")
                data = os.read(self._process.stdout.fileno(), 1 << 16)
                if not data:
                    raise _SilentError("its output was closed")
                self._unread += data
        line, self._unread = self._unread.split(b"\n", 1)
        try:
            return json.loads(line)
        except ValueError:
            raise _SilentError("its reply was cut off") from None


def _outcome(reply: dict[str, Any], seconds: float) -> Outcome:
    if "ok" in reply:
        return Outcome(status=VerdictStatus.OK, value=reply["ok"])
    if reply.get("died") == "timeout":
        return Outcome(status=VerdictStatus.TIMEOUT, detail=f"took more than {seconds:g} s")
    if "died" in reply:
        return Outcome(status=VerdictStatus.ERROR, detail="the process crashed")
    return Outcome(status=VerdictStatus.ERROR, detail=f"{reply['error']}: {reply['message']}")


_SHARED: dict[tuple[str, int], Sandbox] = {}
_SHARED_LOCK = threading.Lock()


def shared(kind: str, number: int = 0) -> Sandbox:
    """The ``number``-th sandbox of a kind that all verifiers of this process share; closed at exit."""
    with _SHARED_LOCK:
        if not _SHARED:
            atexit.register(close_all)
        return _SHARED.setdefault((kind, number), Sandbox(kind))


def close_all() -> None:
    for sandbox in list(_SHARED.values()):
        sandbox.close()


def run_shared(kind: str, items: Sequence[Any], seconds: float) -> list[Outcome]:
    """Outcomes in the items' order, from as many sandboxes of a kind as the work is worth."""
    workers = max(1, min(4, (os.cpu_count() or 2) // 2, len(items) // CHUNK))
    if workers == 1:
        return shared(kind).run(items, seconds)
    from concurrent.futures import ThreadPoolExecutor

    size = -(-len(items) // workers)
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    with ThreadPoolExecutor(workers) as pool:
        done = pool.map(lambda numbered: shared(kind, numbered[0]).run(numbered[1], seconds), enumerate(parts))
        return [outcome for part in done for outcome in part]
