"""Ray: a run on two nodes of a local cluster goes on after a killed worker and a lost node, to the very weights of an undisturbed run."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from ccpo.errors import RunFailure, UserError
from ccpo.launch import ray as launcher
from ccpo.launch.ray import RayLaunch, launch
from ccpo.runs import Reporter
from ccpo.signals import STOPS
from test_ranks import alone, cache, environment, processes_where, recipe, weights  # noqa: F401  (fixtures)


@pytest.mark.parametrize(
    ("address", "match"), [("127.0.0.1:1", "nobody answers"), ("nowhere", "HOST:PORT"), ("host:port", "HOST:PORT")]
)
def test_an_address_that_cannot_be_reached_is_refused(address, match, tmp_path):
    pytest.importorskip("ray")
    started = time.monotonic()
    with pytest.raises(UserError, match=match):
        launch(tmp_path, "demo", [], None, RayLaunch(workers=2, address=address), Reporter())
    assert time.monotonic() - started < 10


def test_more_workers_than_the_cluster_has_room_for_are_refused(cluster, tmp_path):
    with pytest.raises(UserError, match="--workers 4: the Ray cluster has 3 CPUs"):
        launch(tmp_path, "demo", [], None, RayLaunch(workers=4, address=cluster.address), Reporter())


def test_ray_that_is_not_installed_is_named(monkeypatch, tmp_path):
    import builtins

    real = builtins.__import__

    def without(name, *rest, **more):
        if name.partition(".")[0] == "ray":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"ccpo\[ray\]"):
        launch(tmp_path, "demo", [], None, RayLaunch(workers=2), Reporter())


def test_what_a_worker_has_to_tell_comes_back(tmp_path, monkeypatch):
    order = {"run": str(tmp_path), "recipe": "demo", "overrides": ["rollout.prompts=0"], "steps": None}
    launcher.work(order)
    assert "rollout.prompts" in (tmp_path / launcher.TOLD).read_text()


@pytest.fixture
def cluster(monkeypatch):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    for key, value in environment().items():
        monkeypatch.setenv(key, value)
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    found.others = [found.add_node(num_cpus=1) for _ in range(3)]  # two for the workers, one to spare
    yield found
    found.shutdown()


def train_on(cluster, recipe: Path, run: Path, restarts: int = 2, disturb=None) -> None:  # noqa: F811
    disturbed = threading.Thread(target=disturb or (lambda: None), daemon=True)
    disturbed.start()
    handlers = [signal.getsignal(number) for number in STOPS]
    how = RayLaunch(workers=2, address=cluster.address, restarts=restarts)
    result = launch(run, str(recipe), ["trainer.steps=8"], None, how, Reporter())
    disturbed.join()
    assert result.finished
    assert [signal.getsignal(number) for number in STOPS] == handlers  # Ctrl-C is the caller's again


def ray_workers() -> list[int]:
    return processes_where(lambda line: line.startswith(b"ray::RayTrainWorker"))


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def after_step(run: Path, step: int, act) -> None:
    deadline = time.monotonic() + 240
    while not (run / "checkpoints" / f"step-{step:06d}").is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)
    act()


@pytest.mark.slow
def test_a_killed_worker_and_a_lost_node_change_nothing(cluster, cache, recipe, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("CCPO_CACHE", str(cache))
    undisturbed = tmp_path / "undisturbed"
    train_on(cluster, recipe, undisturbed)
    killed = tmp_path / "killed"
    train_on(
        cluster,
        recipe,
        killed,
        disturb=lambda: after_step(killed, 2, lambda: os.kill(ray_workers()[-1], signal.SIGKILL)),
    )
    lost = tmp_path / "lost"

    def lose() -> None:
        parents = {parent_of(worker) for worker in ray_workers()}
        node = next(n for n in cluster.others if n.all_processes["raylet"][0].process.pid in parents)
        cluster.remove_node(node, allow_graceful=False)

    train_on(cluster, recipe, lost, disturb=lambda: after_step(lost, 2, lose))
    for run in (killed, lost):
        for name, tensor in weights(run).items():
            assert torch.equal(tensor, weights(undisturbed)[name])


@pytest.mark.slow
def test_what_is_lost_too_often_is_said(cluster, cache, recipe, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("CCPO_CACHE", str(cache))
    run = tmp_path / "run"
    with pytest.raises(RunFailure, match="lost 1 times"):
        train_on(
            cluster,
            recipe,
            run,
            restarts=0,
            disturb=lambda: after_step(run, 1, lambda: os.kill(ray_workers()[-1], signal.SIGKILL)),
        )
