"""The next step's rollouts, played while this step's are learned from (``trainer.async_depth: 1``)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from threading import Thread
from types import TracebackType

import torch

from ccpo.comm import Comm
from ccpo.learner import Policy
from ccpo.rollout import Played


class Ahead:
    """At most one play, in a thread of its own, by engines that nobody refreshes meanwhile.

    ``policies``: those whose updates are counted, so that it is known by how many the learner is ahead of what was played. ``comm``: the
    ranks as those who play speak to them, not the learner's (:meth:`~ccpo.comm.Comm.beside`).
    """

    def __init__(self, policies: Mapping[str, Policy], comm: Comm | None = None) -> None:
        self._comm = comm or Comm()
        self._policies = {name: policy for name, policy in policies.items() if policy.trainable}
        self._work: Future[Played] | None = None
        self._versions: dict[str, int] = {}

    @property
    def running(self) -> bool:
        """Whether something is played, or was and has not been taken."""
        return self._work is not None

    def begin(self, play: Callable[[], Played]) -> None:
        """Start to play. The thread does not keep a process alive that ends."""
        future: Future[Played] = Future()
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

        def work() -> None:
            try:
                if device is not None:
                    torch.cuda.set_device(device)  # a thread begins with the first GPU, whatever its process has chosen
                future.set_result(self.play(play))
            except BaseException as error:
                future.set_exception(error)  # raised where the play is taken

        self._work, self._versions = future, self._now()
        Thread(target=work, name="rollouts", daemon=True).start()

    def play(self, play: Callable[[], Played]) -> Played:
        """``play()``, with what it has spent on talking to other ranks as its seconds of ``communication``. What goes wrong on one rank goes
        wrong on all, so that none waits for a play, here or in :meth:`drop`, that another has left."""
        if self._comm.size == 1:
            return play()
        before = self._comm.seconds
        played = self._comm.as_one(play)
        return replace(played, seconds={**played.seconds, "communication": self._comm.seconds - before})

    def take(self) -> tuple[Played, dict[str, float]]:
        """Wait for the play; it and metrics: seconds waited, and updates of a policy, on average, since it began. Raises what it raised."""
        assert self._work is not None
        work, self._work = self._work, None
        clock = time.monotonic()
        played = work.result()
        behind = [version - self._versions[name] for name, version in self._now().items()]
        metrics = {"async/updates_behind": sum(behind) / len(behind), "seconds/waiting": time.monotonic() - clock}
        return played, metrics

    def drop(self) -> None:
        """Wait for the play, whatever comes of it, and forget it."""
        if self._work is not None:
            self._work.exception()
            self._work = None

    def _now(self) -> dict[str, int]:
        return {name: policy.version for name, policy in self._policies.items()}

    def __enter__(self) -> Ahead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave no thread behind, unless the user is in a hurry."""
        if kind is not KeyboardInterrupt:
            self.drop()
