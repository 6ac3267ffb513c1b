"""The process in which answers are judged that may hang, eat memory or crash the interpreter. Run as a script by
:mod:`ccpo.tasks.sandbox`.

A parent process that has imported what is needed forks a child, which serves; when the child dies, the parent says
so in its place and forks another in milliseconds. Requests are JSON lines ``[seconds, [item, ...]]``, replies one
JSON line per item, in order. Each item runs under an alarm that kills the child whatever it is doing. Both
processes end when their input is closed, however that came about.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import types
from pathlib import Path

MEMORY = 4 << 30
LONGEST_REPLY = 1_000_000


def main() -> None:
    kind = sys.argv[1]
    _make_importable()
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer = _load(kind)
    os.dup2(quiet, 2)  # from here on nobody reads what is written there
    replies.write(b'"ready"\n')
    while True:
        child = os.fork()
        if child == 0:
            _limit()
            _serve(answer, replies)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            return  # the input was closed
        died_of_alarm = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
        replies.write(b'{"died": "timeout"}\n' if died_of_alarm else b'{"died": "error"}\n')


def _make_importable() -> None:
    """Let ``ccpo.tasks.x`` be imported without running the packages' own ``__init__``, which load torch."""
    tasks = Path(__file__).resolve().parent
    for name, folder in (("ccpo", tasks.parent), ("ccpo.tasks", tasks)):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package


def _load(kind: str):
    if kind == "math":
        from ccpo.tasks.math_answers import judge_math

        judge_math("x+1", "2+y")  # builds the grammar's tables, and all that simplify() imports, before the first fork
        return lambda item: judge_math(item["reference"], item["answer"])
    if kind == "gym":
        from ccpo.tasks.gym_scores import answer

        return answer
    raise SystemExit(f"unknown kind {kind!r}")


def _limit() -> None:
    """Limits that the texts of a model meet: memory, no files, no programs, no network."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.dont_write_bytecode = True
    sys.addaudithook(_refuse)


_FORBIDDEN = (
    "os.",
    "subprocess.",
    "socket.",
    "shutil.",
    "ctypes.",
    "pty.",
    "winreg.",
    "webbrowser.",
    "ftplib.",
    "smtplib.",
    "urllib.",
    "http.",
)
_HARMLESS = ("os.listdir", "os.scandir", "os.putenv", "os.unsetenv")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _refuse(event: str, args: tuple) -> None:
    if event == "open":
        mode, flags = args[1], args[2]
        if (isinstance(flags, int) and flags & _WRITING) or (isinstance(mode, str) and set(mode) & set("wax+")):
            raise PermissionError("no file is written while an answer is judged")
    elif event.startswith(_FORBIDDEN) and event not in _HARMLESS:
        raise PermissionError(f"{event} is not allowed while an answer is judged")


def _serve(answer, replies) -> None:
    for line in sys.stdin.buffer:
        seconds, items = json.loads(line)
        for item in items:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            reply = _reply(answer, item)
            signal.setitimer(signal.ITIMER_REAL, 0)
            replies.write(reply)


def _reply(answer, item) -> bytes:
    try:
        text = json.dumps({"ok": answer(item)}, allow_nan=False)
        if len(text) > LONGEST_REPLY:
            raise ValueError("the reply is too long")
    except (
        BaseException
    ) as error:  # SystemExit and RecursionError included: whatever a text brings about is its verdict
        text = json.dumps({"error": type(error).__name__, "message": str(error)[:500]})
    return text.encode() + b"\n"


if __name__ == "__main__":
    main()
