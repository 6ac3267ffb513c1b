"""What each of several processes does for tests/test_ranks.py: ``python -m torch.distributed.run … tests/ranks_worker.py PART OUT``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import ccpo.comm
from ccpo.bench.update import learner_of, make_rows
from ccpo.comm import Comm, connect
from ccpo.errors import RunFailure, UserError
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
    """The gradient of one update of rows that all ranks are given, and what is measured."""
    rows = make_rows(3, 4, 9, 12, ragged=True)
    if comm.rank == 0:
        rows = list(rows)
    learner = learner_of(tiny_model(vocab=101), torch.float32)
    learner.comm = comm
    optimizer, found = learner.optimizers["a"], []
    optimizer.max_grad_norm = float("inf")
    step = optimizer.step
    optimizer.step = lambda factor: (  # type: ignore[method-assign]
        found.append(torch.cat([p.grad.flatten() for p in optimizer.parameters.values()])),
        step(factor),
    )[1]
    stats = learner.step([rows], step=0, failure_folder=Path("failure"))
    shared = {k: v for k, v in stats.metrics.items() if not k.endswith("seconds")}
    return {"gradient": found[0].tolist(), "metrics": shared}


def broken(comm: Comm) -> dict:
    """A batch that only one rank runs and that is not finite."""
    rows = make_rows(2, 2, 5, 6)
    bad = [
        r if i else type(r)(**{f: getattr(r, f) for f in r.__slots__} | {"advantage": float("nan")})
        for i, r in enumerate(rows)
    ]
    model = tiny_model(vocab=101)
    learner = learner_of(model, torch.float32)
    learner.comm = comm
    before = [p.clone() for p in learner.policies["a"].model.parameters()]
    try:
        learner.step([bad], step=3, failure_folder=Path(sys.argv[2]) / "failure")
        message = ""
    except RunFailure as error:
        message = str(error)
    same = all(torch.equal(a, b) for a, b in zip(before, learner.policies["a"].model.parameters(), strict=True))
    return {"message": message, "unchanged": same}


if __name__ == "__main__":
    part, folder = sys.argv[1:3]
    with connect(cuda=False) as ranks:
        said = {"talk": talk, "gradient": gradient, "broken": broken}[part](ranks)
        (Path(folder) / f"{ranks.rank}.json").write_text(json.dumps(said))
