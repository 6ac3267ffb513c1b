"""What SIGINT and SIGTERM do while something runs, and what they did before, afterwards."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STOPS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stopping(handler: Callable[[int, Any], None] | None = None) -> Iterator[None]:
    """SIGINT and SIGTERM call ``handler`` within the block (None: as they are); whatever it or a library has set there, the handlers of
    before are back after it. Does nothing outside the main thread, where signals are someone else's."""
    here = threading.current_thread() is threading.main_thread()
    before = {n: signal.getsignal(n) for n in STOPS if signal.getsignal(n) is not None} if here else {}
    for number in before if handler else ():
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)
