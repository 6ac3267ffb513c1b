"""Calls that wait for the network, side by side; the first that fails ends them all, and no thread is left."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")
Call = Callable[[threading.Event], T]
"""It is given the event that says that nobody needs it any more; it then raises :class:`Stopped`."""


class Stopped(Exception):
    """Another call has failed: this one is not needed any more."""


def fan_out(calls: Sequence[Call[T]], workers: int, on_failure: Callable[[BaseException], None]) -> list[T]:
    """The results of ``calls`` in their order, at most ``workers`` of them under way. A failure stops those that have not begun, is
    handed to ``on_failure`` (which may cut those under way), and is raised when all have come to their end."""
    stop = threading.Event()
    pool = ThreadPoolExecutor(max_workers=max(1, min(workers, len(calls))), thread_name_prefix="ccpo-remote")
    futures = {pool.submit(_guarded, call, stop): place for place, call in enumerate(calls)}
    found: dict[int, T] = {}
    try:
        for future in as_completed(futures):
            with suppress(Stopped):  # the one that failed is still to come
                found[futures[future]] = future.result()
    except BaseException as error:
        stop.set()
        on_failure(error)
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return [found[place] for place in range(len(calls))]


def _guarded(call: Call[T], stop: threading.Event) -> T:
    if stop.is_set():
        raise Stopped
    try:
        return call(stop)
    except Stopped:
        raise
    except BaseException:
        stop.set()
        raise
