"""What each of several processes does for tests/test_ranks.py: ``python -m torch.distributed.run … tests/ranks_worker.py PART OUT``."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ccpo
import ccpo.comm
from ccpo.bench.update import learner_of, make_rows
from ccpo.comm import Comm, connect
from ccpo.config import load_recipe
from ccpo.engines.native import NativeEngine
from ccpo.errors import RunFailure, UserError
from ccpo.learner import Learner
from ccpo.tasks.procedural import DigitSum
from ccpo.trainer import ECHO
from tiny import tiny_model

torch.set_num_threads(1)
ccpo.comm.BUCKET = 4  # so that there are several


def talk(comm: Comm) -> dict:
    """Every way in which ranks talk."""
    numbers = [torch.full((3,), float(comm.rank)), torch.ones(2, 2, dtype=torch.float64), torch.ones(5), torch.ones(1)]
    comm.add(numbers)
    copied = [torch.full((2,), float(comm.rank + 7))]
    comm.copy(copied)
    order: list[str] = []
    comm.in_order(lambda: order.append("worked"))
    errors = []
    for kind in (UserError, RunFailure):

        def fail(kind: type = kind) -> None:
            if comm.rank == comm.size - 1:
                raise kind("of the last")

        try:
            comm.together(fail)
        except (UserError, RunFailure) as error:
            errors.append([type(error).__name__, str(error), getattr(error, "told", False)])
    return {
        "gathered": [d.decode() for d in comm.gather(b"x" * comm.rank * 3)],
        "plain": comm.gather_plain({"rank": comm.rank, "third": 1 / 3}),
        "sums": [n.sum().item() for n in numbers],
        "copied": copied[0].tolist(),
        "any": [comm.any(False), comm.any(comm.rank == comm.size - 1)],
        "order": order,
        "errors": errors,
    }


def gradient(comm: Comm) -> dict:
    """The gradients of the updates of two policies, two mini-batches twice, of rows that all ranks are given, and what is measured; with all
    gradients held at once, and policy by policy."""
    return {"at once": updated(comm, at_once=True), "one by one": updated(comm, at_once=False)}


def updated(comm: Comm, *, at_once: bool) -> dict:
    # of the second agent so few that some rank has none
    rows = [*make_rows(3, 4, 9, 12, ragged=True), *(replace(r, policy="b", agent="b") for r in make_rows(1, 2, 5, 7))]
    models = {name: tiny_model(vocab=101, seed=seed) for seed, name in enumerate("ab")}
    policies = {n: learner_of(model, torch.float32).policies["a"] for n, model in models.items()}
    policies["b"].name = "b"
    learner = Learner(policies, total_steps=10, compute=torch.float32, comm=comm, max_grad_norm=float("inf"), epochs=2)
    learner._at_once = at_once
    found: dict[str, list[list[float]]] = {}
    for name, optimizer in learner.optimizers.items():

        def watched(factor: float, name: str = name, optimizer: Any = optimizer, step: Any = optimizer.step) -> float:
            grads = [p.grad.flatten() for p in optimizer.parameters.values()]
            found.setdefault(name, []).append(torch.cat(grads).tolist())
            return step(factor)

        optimizer.step = watched  # type: ignore[method-assign]
    stats = learner.step([rows, rows[4:]], step=0, failure_folder=Path("failure"))
    shared = {k: v for k, v in stats.metrics.items() if not k.endswith("seconds")}
    return {"gradient": found, "metrics": shared}


def broken(comm: Comm) -> dict:
    """A batch of two policies of which only the last rank runs what is not finite."""
    rows = [*make_rows(2, 2, 5, 6), *(replace(r, policy="b", agent="b") for r in make_rows(2, 2, 5, 6))]
    rows[-1] = replace(rows[-1], advantage=float("nan"))
    policies = {n: learner_of(tiny_model(vocab=101), torch.float32).policies["a"] for n in "ab"}
    policies["b"].name = "b"
    learner = Learner(policies, total_steps=10, compute=torch.float32, comm=comm)
    before = [p.clone() for p in policies["b"].model.parameters()]
    try:
        learner.step([rows], step=3, failure_folder=Path(sys.argv[2]) / "failure")
        message = ""
    except RunFailure as error:
        message = str(error)
    same = all(torch.equal(a, b) for a, b in zip(before, policies["b"].model.parameters(), strict=True))
    left = any(p.grad is not None for policy in policies.values() for p in policy.model.parameters())
    return {"message": message, "unchanged": same, "left": left}


def beside(comm: Comm) -> dict:
    """Two threads, each with lines of its own, which talk at different times on different ranks."""
    other, heard = comm.beside(), []

    def talk() -> None:
        for i in range(200):
            if (i + comm.rank) % 5 == 0:
                time.sleep(0.001)
            heard.append([d.decode() for d in other.gather(f"thread {i}".encode())])

    thread = threading.Thread(target=talk)
    thread.start()
    before = comm.seconds
    main = []
    for i in range(200):
        if (i + comm.rank) % 7 == 0:
            time.sleep(0.001)
        main.append([d.decode() for d in comm.gather(f"main {i}".encode())])
    thread.join()
    right = [main == [[f"main {i}"] * comm.size for i in range(200)]]
    right += [heard == [[f"thread {i}"] * comm.size for i in range(200)]]
    return {"right": right, "seconds": [comm.seconds - before, other.seconds]}


def as_one(comm: Comm) -> dict:
    """Errors of one rank within what all do as one: in what is shared out, beside it, and when the others are done."""

    def at(place: str, error: Exception | None) -> Callable[[], str]:
        def work() -> str:
            def fail(here: str) -> bytes:
                if here == place and error is not None and comm.rank == comm.size - 1:
                    raise error
                return b""

            comm.everywhere(lambda: fail("shared"))
            fail("between")
            comm.everywhere(lambda: b"")
            fail("last")
            return "done"

        return work

    found = []
    for place in ("shared", "between", "last"):
        for error in (UserError("mine"), ValueError("mine"), None):
            try:
                found.append(comm.as_one(at(place, error)))
            except Exception as raised:
                found.append([type(raised).__name__, str(raised)])
    return {"found": found, "after": comm.gather_plain(comm.rank)}


class Failing(DigitSum):
    """Judges the first steps' answers, and then, where ``judge`` says so, no more. Takes ``pause`` seconds in the thread that plays ahead."""

    calls, error, judge, pause = 0, ValueError("the judge has gone home"), True, 0.0
    asleep = threading.Event()

    def verify(self, pairs: Any) -> Any:
        type(self).calls += 1
        if self.judge and type(self).calls > 4:
            raise self.error
        if threading.current_thread().name == "rollouts":
            Failing.asleep.set()
            time.sleep(self.pause)
        return super().verify(pairs)


def press_twice() -> None:
    """Control-C, and again when nothing has come of it."""
    Failing.asleep.wait(120)
    for _ in range(2):
        time.sleep(ECHO + 0.5)
        os.kill(os.getpid(), signal.SIGINT)


def run_that_fails(comm: Comm, kind: str) -> dict:
    """A run whose rollouts fail on the last rank, in the thread that plays ahead."""
    last = comm.rank == comm.size - 1
    Failing.judge = last and kind != "engine"
    if kind == "user":
        Failing.error = UserError("the judge has gone home")
    if kind == "hurry":
        Failing.judge, Failing.pause = False, 60.0 if last else 0.0
        threading.Thread(target=press_twice, daemon=True).start()
    if kind == "engine" and last:
        generate = NativeEngine.generate

        def fail(self: Any, requests: Any) -> Any:
            if threading.current_thread().name == "rollouts":
                raise MemoryError("no room for this cache")
            return generate(self, requests)

        NativeEngine.generate = fail  # type: ignore[method-assign]
    folder = Path(sys.argv[2])
    settings = [f"run.dir={folder / 'run'}", "trainer.async_depth=1", "trainer.steps=50", "trainer.save_every=0"]
    config = load_recipe(str(Path(__file__).parent.parent / "benchmarks" / "tiny.yaml"), settings)
    try:
        ccpo.train(
            config, task=Failing(digits=(2, 4), size=200), tests={"test": DigitSum(digits=(2, 4), size=50, seed=1)}
        )
        said = ["nothing", ""]
    except (Exception, KeyboardInterrupt) as error:
        said = [type(error).__name__, str(error)]
    threads = [t.name for t in threading.enumerate() if t.name == "rollouts"]
    return {"said": said, "threads": threads}


PARTS = {"talk": talk, "gradient": gradient, "broken": broken, "beside": beside, "as_one": as_one}
PARTS |= {f"fail_{kind}": partial(run_that_fails, kind=kind) for kind in ("user", "other", "engine")}
PARTS["hurry"] = partial(run_that_fails, kind="hurry")

if __name__ == "__main__":
    part, folder = sys.argv[1:3]
    with connect(cuda=False) as ranks:
        said = PARTS[part](ranks)
        (Path(folder) / f"{ranks.rank}.json").write_text(json.dumps(said))
