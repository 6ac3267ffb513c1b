"""Handlers of SIGINT and SIGTERM last as long as the block that sets them."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from ccpo.signals import STOPS, stopping


def handlers():
    return [signal.getsignal(number) for number in STOPS]


@pytest.mark.parametrize("number", STOPS)
def test_the_handler_is_called_within_the_block_and_not_after(number):
    before, heard = handlers(), []
    with stopping(lambda n, frame: heard.append(n)):
        os.kill(os.getpid(), number)
        assert heard == [number]
    assert handlers() == before


def test_what_a_library_leaves_behind_goes():
    before = handlers()
    with stopping():
        assert handlers() == before
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert handlers() == before


def test_another_thread_touches_nothing():
    before, seen = handlers(), []

    def elsewhere():
        with stopping(lambda n, frame: None):
            seen.append(handlers())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [before]
    assert handlers() == before


def test_a_block_within_a_block_gives_back_to_the_outer_one():
    heard = []
    with stopping(lambda n, frame: heard.append("outer")):
        with stopping(lambda n, frame: heard.append("inner")):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert heard == ["inner", "outer"]
