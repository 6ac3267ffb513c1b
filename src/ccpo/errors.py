"""The ways in which the library refuses to go on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The user's mistake. The sentence says what is wrong, where, and what to do. The CLI exits with 2."""


class RunFailure(RuntimeError):
    """A run that had started cannot go on (a non-finite loss, a full disk). The CLI exits with 1."""


class LostContact(RunFailure):
    """Another process of the run has ended, so that this one cannot go on; a new start from the last checkpoint can."""


class EndpointTrouble(Exception):
    """An agent behind an endpoint cannot speak. Nothing of the step in hand has been learned, so what was there before can be saved."""


class EndpointFailure(RunFailure, EndpointTrouble):
    """The endpoint gave no usable reply for good, or its budget of tokens is spent."""


class EndpointRefusal(UserError, EndpointTrouble):
    """The endpoint refuses what it is sent: a wrong address, model, key or setting."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the known name closest to ``word``, or an empty string."""
    found = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""
