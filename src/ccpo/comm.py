"""What ranks say to one another. Every rank runs the same program over the same problems; decoding, verdicts and gradients are shared out.

`Comm` is one process by itself: everything is the identity. `Ranks` are the processes that torchrun or Ray started. What travels is
bytes and tensors, never pickles.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from ccpo.errors import EndpointFailure, EndpointRefusal, LostContact, RunFailure, UserError

Result = TypeVar("Result")
BUCKET = 1 << 25  # numbers that are summed over ranks at a time
BESIDE = 2048  # bytes that travel beside their number
GLANCE = 0.0005  # seconds between looks at whether the others have spoken
PATIENCE = timedelta(minutes=60)  # how long ranks wait for one that makes a base model or writes a checkpoint
COURTESY = 5.0  # seconds that ranks wait for the one that tells of an error


class Comm:
    """One process."""

    rank = 0
    size = 1
    seconds = 0.0
    """What has been spent on what follows, waiting for the slowest rank among it."""

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes and speaks."""
        return self.rank == 0

    def gather(self, data: bytes) -> list[bytes]:
        """Every rank's bytes, by rank."""
        return [data]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes its sum over ranks, in place. All ranks give tensors of the same shapes, in the same order."""

    def copy(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes rank 0's, in place."""

    def beside(self) -> Comm:
        """The same ranks over lines of their own, for a second thread: what two threads say over the same lines would meet in one order on
        one rank and in another on the next. It carries what lies in main memory. All ranks must ask together."""
        return Comm()

    def close(self) -> None:
        """Say goodbye."""

    def __enter__(self) -> Comm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- made of these -----------------------------------------------------------------------------------------------------

    def any(self, flag: bool) -> bool:
        """Whether it holds on any rank."""
        return any(data == b"1" for data in self.gather(b"1" if flag else b"0"))

    def everywhere(self, work: Callable[[], bytes]) -> list[bytes]:
        """Every rank's ``work()``, by rank. A UserError or RunFailure of one is raised on all of them."""
        data, error = b"", None
        try:
            data = work()
        except LostContact:
            raise
        except (UserError, RunFailure) as raised:
            if self.size == 1:
                raise
            error = raised
        said = self.gather(b"+" + data if error is None else b"-" + _packed(error))
        for rank, answer in enumerate(said):
            if answer[:1] == b"-":
                refusal = error if error is not None and rank == self.rank else _unpacked(answer[1:])
                refusal.shared = True  # type: ignore[union-attr]
                raise refusal from None
        return [answer[1:] for answer in said]

    def gather_plain(self, value: Any) -> list[Any]:
        """Every rank's JSON value, by rank; floats to the last bit, tuples as lists where they have travelled."""
        if self.size == 1:
            return [value]
        return [json.loads(data) for data in self.gather(json.dumps(value).encode())]

    def together(self, work: Callable[[], Result]) -> Result:
        """This rank's ``work()``, once all have done theirs; errors as in :meth:`everywhere`."""
        kept: list[Result] = []

        def run() -> bytes:
            kept.append(work())
            return b""

        self.everywhere(run)
        return kept[0]

    def as_one(self, work: Callable[[], Result]) -> Result:
        """This rank's ``work()``, in which ranks talk by :meth:`everywhere` and what is made of it alone, once all have done theirs. An error
        of any kind, raised anywhere in it on one rank, is raised on the others where they talk next: a RunFailure unless it is a UserError."""
        if self.size == 1:
            return work()
        try:
            done = work()
        except LostContact:
            raise
        except BaseException as error:
            if not getattr(error, "shared", False):
                with suppress(LostContact):
                    self.gather(b"-" + _packed(error))
            raise
        self.together(lambda: None)
        return done

    def in_order(self, work: Callable[[], Result]) -> Result:
        """``work()`` on rank 0, and when it is done on the others: what the first leaves on disk, they find."""
        if self.size == 1:
            return work()
        first = [self.together(work if self.first else lambda: None)]
        return self.together((lambda: first[0]) if self.first else work)  # type: ignore[return-value]

    def first_alone(self, work: Callable[[], Any]) -> None:
        """``work()`` on rank 0; the others wait until it is done."""
        self.together(work if self.first else lambda: None)


def deal(work: Sequence[float], ranks: int) -> list[list[int]]:
    """Which pieces of ``work`` each rank takes: the largest first, each to the rank that has least. The same on every rank."""
    found: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for piece in sorted(range(len(work)), key=lambda i: (-work[i], i)):
        rank = loads.index(min(loads))
        found[rank].append(piece)
        loads[rank] += work[piece]
    return [sorted(part) for part in found]


def stretches(work: Sequence[float], ranks: int) -> list[list[int]]:
    """Which neighbouring pieces of ``work`` each rank takes: a piece is the rank's in whose part of all the work its middle lies. No rank
    has more than its part and a piece. The same on every rank."""
    found: list[list[int]] = [[] for _ in range(ranks)]
    total, done = math.fsum(work), 0.0
    for number, size in enumerate(work):
        middle = (done + size / 2) / total if total else 0.0
        found[min(int(middle * ranks), ranks - 1)].append(number)
        done += size
    return found


ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind for kind in (UserError, RunFailure, EndpointFailure, EndpointRefusal)
}


def _packed(error: BaseException) -> bytes:
    """As the nearest of its kinds that all know (what an endpoint's end asks of a run is done by all ranks), else as a failure of the run."""
    kind = next((kind.__name__ for kind in type(error).__mro__ if kind.__name__ in ERRORS), None)
    return json.dumps([kind, str(error)] if kind else ["RunFailure", f"{type(error).__name__}: {error}"]).encode()


def _unpacked(data: bytes) -> Exception:
    """The error of another rank, which tells it."""
    kind, message = json.loads(data)
    error = ERRORS[kind](message)
    error.told = True  # type: ignore[attr-defined]
    return error


class Ranks(Comm):
    """The processes of a torch.distributed group, which this makes: gloo between CPUs, NCCL between GPUs."""

    def __init__(self, *, cuda: bool) -> None:
        from torch import distributed

        self.dist, self.owner = distributed, not distributed.is_initialized()
        if self.owner:
            distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.group: Any = None  # that of all

    def beside(self) -> Comm:
        other = copy(self)
        other.owner, other.seconds = False, 0.0
        other.group = self.dist.new_group(backend="gloo", timeout=PATIENCE)
        return other

    def gather(self, data: bytes) -> list[bytes]:
        with self._clock():
            return self._gather(data)

    def _gather(self, data: bytes) -> list[bytes]:
        """Each rank's length and what fits beside it, in one round; what did not fit in a second."""
        first = self._round(len(data).to_bytes(8, "little") + data[:BESIDE], 8 + BESIDE)
        sizes = [int.from_bytes(row[:8], "little") for row in first]
        rest = max(sizes) - BESIDE
        second = self._round(data[BESIDE:], rest) if rest > 0 else [b""] * self.size
        return [(row[8:] + more)[:size] for row, more, size in zip(first, second, sizes, strict=True)]

    def _round(self, data: bytes, length: int) -> list[bytes]:
        """Every rank's bytes, filled up to ``length``."""
        rows = [torch.empty(length, dtype=torch.uint8) for _ in range(self.size)]
        self._all_gather(rows, torch.frombuffer(bytearray(data.ljust(length, b"\0")), dtype=torch.uint8))
        return [row.numpy().tobytes() for row in rows]

    def _all_gather(self, rows: list[Tensor], mine: Tensor) -> None:
        """A second thread looks now and then, for one that waits within torch cannot be left behind when its process ends: that aborts."""
        with self._in_contact():
            said = self.dist.all_gather(rows, mine, group=self.group, async_op=self.group is not None)
            while said is not None and not said.is_completed():
                time.sleep(GLANCE)
            if said is not None:
                said.wait()

    def add(self, tensors: Sequence[Tensor]) -> None:
        with self._clock():
            for bucket in _buckets(tensors):
                flat = torch.cat([t.flatten() for t in bucket])
                with self._in_contact():
                    self.dist.all_reduce(flat, group=self.group)
                for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                    tensor.copy_(part.view_as(tensor))

    def copy(self, tensors: Sequence[Tensor]) -> None:
        with self._clock():
            for tensor in tensors:
                with self._in_contact():
                    self.dist.broadcast(tensor, 0, group=self.group)

    def __exit__(self, kind: object = None, error: object = None, trace: object = None) -> None:
        if self.owner and getattr(error, "told", False):
            time.sleep(COURTESY)  # a launcher ends all ranks when the first has ended, and one has still to tell why
        self.close()

    def close(self) -> None:
        if self.owner:
            self.dist.destroy_process_group()

    @contextmanager
    def _clock(self) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds += time.monotonic() - started

    @contextmanager
    def _in_contact(self) -> Iterator[None]:
        """A rank that has ended is a LostContact of those that wait for it."""
        try:
            yield
        except RuntimeError as error:
            raise LostContact(
                f"process {self.rank} of {self.size} has lost the others ({str(error).splitlines()[0][:120]}): one of them has ended. "
                "Go on from the last checkpoint with ccpo train --resume RUN"
            ) from None


def connect(*, cuda: bool) -> Comm:
    """The ranks that a launcher has started (it sets ``WORLD_SIZE``), or one process."""
    started = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not started and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Comm()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return Ranks(cuda=cuda)


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Neighbours of one dtype and device, up to ``BUCKET`` numbers together."""
    found: list[list[Tensor]] = []
    filled = 0
    for tensor in tensors:
        last = found[-1][-1] if found else None
        alike = last is not None and (last.dtype, last.device) == (tensor.dtype, tensor.device)
        if not alike or filled + tensor.numel() > BUCKET:
            found.append([])
            filled = 0
        found[-1].append(tensor)
        filled += tensor.numel()
    return found
