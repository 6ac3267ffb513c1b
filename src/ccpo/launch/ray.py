"""``--launch ray``: a run on the workers of a Ray cluster, by Ray Train's TorchTrainer, which places and starts them, and starts them again
from the last checkpoint where a worker or a node is lost (Ray Train API v2).

The run's folder must be on a disk that all nodes see.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ccpo.errors import LostContact, RunFailure, UserError
from ccpo.runfolder import RunFolder, read_json, write_json
from ccpo.runs import Reporter, Result
from ccpo.signals import stopping

PATIENCE = 5.0  # seconds within which an address must answer
GLANCE = 1.0  # seconds between two looks at a run's log
TOLD = "launch-error.json"  # in the run's folder: what a worker has to tell


@dataclass(frozen=True, kw_only=True)
class RayLaunch:
    """``workers`` processes, on the cluster at ``address`` ("auto": the one that this machine is a part of; None: a local one for this run);
    at most ``restarts`` times they are started again after a loss."""

    workers: int
    address: str | None = None
    restarts: int = 3
    gpu: bool = False


@stopping()  # Ray leaves handlers behind, one of which calls a controller that is gone
def launch(
    run: Path, recipe: str | None, overrides: Sequence[str], steps: int | None, how: RayLaunch, reporter: Reporter
) -> Result:
    """Train the recipe into the folder ``run``, or go on with what is there where ``recipe`` is None. Raises UserError where Ray is not
    installed or its address does not answer, and what the workers raise."""
    ray = _ray()
    _reach(how.address)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    (run / TOLD).unlink(missing_ok=True)
    order = {"run": str(run.resolve()), "recipe": recipe, "overrides": list(overrides), "steps": steps}
    _connect(ray, how)
    try:
        trainer = TorchTrainer(
            work,
            train_loop_config=order,
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if how.gpu else "gloo"),
            scaling_config=ScalingConfig(num_workers=how.workers, use_gpu=how.gpu),
            run_config=RunConfig(
                name=run.name,
                storage_path=str((run.parent / ".ray").resolve()),
                # a group that cannot be placed, within a minute, counts as the controller's failure
                failure_config=FailureConfig(max_failures=how.restarts, controller_failure_limit=max(2, how.restarts)),
            ),
        )
        with _Follower(RunFolder(run), reporter):
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise RunFailure(
            f"the run was lost {how.restarts + 1} times, and is not started again ({_cause(error)}). Go on from the last checkpoint with "
            f"ccpo train --resume {run} --launch ray"
        ) from None
    finally:
        ray.shutdown()
    if (run / TOLD).is_file():
        told = read_json(run / TOLD)
        raise {"UserError": UserError}.get(told["kind"], RunFailure)(told["message"])
    folder = RunFolder(run)
    finished = folder.summary.is_file()
    return Result(folder=run, finished=finished, summary=read_json(folder.summary) if finished else {})


def work(order: dict[str, Any]) -> None:
    """What each worker does, at first and after each restart."""
    from ccpo import runs

    try:
        runs.begin_or_go_on(order["recipe"], order["overrides"], Path(order["run"]), steps=order["steps"])
    except LostContact:
        raise  # Ray starts all workers again
    except (UserError, RunFailure) as error:  # would come again
        if not getattr(error, "told", False):
            kind = "UserError" if isinstance(error, UserError) else "RunFailure"
            write_json(Path(order["run"]) / TOLD, {"kind": kind, "message": str(error)})


class _Follower:
    """Tells of the steps that the workers log, while they train."""

    def __init__(self, folder: RunFolder, reporter: Reporter) -> None:
        self.folder, self.reporter = folder, reporter
        self.told = len(folder.read_lines(folder.metrics))
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self.reporter.note("asking Ray for workers")
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def _follow(self) -> None:
        while not self.over.wait(GLANCE):
            self._tell()
        self._tell()

    def _tell(self) -> None:
        lines = self.folder.read_lines(self.folder.metrics)
        if len(lines) < self.told:
            self.reporter.note(f"a worker was lost: going on from step {len(lines)}")
            self.told = len(lines)
        if len(lines) > self.told:
            total = read_json(self.folder.recipe)["config"]["trainer"]["steps"]
            for line in lines[self.told :]:
                self.reporter.step(line["step"], max(total, line["step"]), line)
            self.told = len(lines)


def _ray() -> Any:
    try:
        import ray
        import ray.train
    except ImportError:
        raise UserError("--launch ray needs Ray, which is not installed: pip install 'ccpo[ray]'") from None
    return ray


def _connect(ray: Any, how: RayLaunch) -> None:
    quiet = {"include_dashboard": False} if how.address is None else {}
    cpus = {"num_cpus": max(how.workers, os.cpu_count() or 1)} if how.address is None else {}
    try:
        ray.init(address=how.address or "local", log_to_driver=False, logging_level="ERROR", **quiet, **cpus)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"--address {how.address}: Ray cannot be reached there ({_first_line(error)})") from None
    kind = "GPU" if how.gpu else "CPU"
    there = int(ray.cluster_resources().get(kind, 0))
    if there < how.workers:
        ray.shutdown()
        raise UserError(
            f"--workers {how.workers}: the Ray cluster has {there} {kind}s, one is needed for each; ask for fewer or add nodes"
        )


def _reach(address: str | None) -> None:
    """Raises UserError where nobody listens at HOST:PORT."""
    if address is None or address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--address {address!r}: expected auto or HOST:PORT, for example 10.0.0.5:6379")
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()
    except OSError as error:
        raise UserError(
            f"--address {address}: nobody answers there ({error.strerror or error}); start the cluster with ray start --head, or leave "
            "--address out for a local one"
        ) from None


def _cause(error: BaseException) -> str:
    return _first_line(getattr(error, "__cause__", None) or error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
