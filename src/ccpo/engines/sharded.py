"""Engines of several ranks: all ask for the same completions, and all get all of them. Each rank samples a part, or, of what is spoken
outside of the ranks' processes (behind an endpoint, by a server), the first has all of it said.

So the walk through a team's graph, the verdicts, the credit and its histories are the same on every rank, to the last bit, on any number
of ranks: a completion depends on its seed and prompt alone (up to rounding), not on who samples it.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Mapping, Sequence

from ccpo.comm import Comm, deal
from ccpo.engines.base import Engine
from ccpo.types import Completion, FinishReason, Request


class ShardedEngine:
    """``inner`` on every rank, as one; see `ccpo.engines.base.Engine`. Tokens are counted over all ranks."""

    def __init__(self, inner: Engine, comm: Comm) -> None:
        self.inner, self.comm = inner, comm
        self.positions = inner.positions
        self.prefill_tokens = self.decoded_tokens = 0

    def refresh(self) -> None:
        """Reads the model's weights again."""
        self.inner.refresh()

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request, in their order. What is raised on one rank is raised on all."""
        parts = shares(requests, self.comm.size)

        def work() -> bytes:
            before = self.inner.prefill_tokens
            done = self.inner.generate([requests[i] for i in parts[self.comm.rank]])
            return _packed(done, self.inner.prefill_tokens - before)

        found: dict[int, Completion] = {}
        for part, data in zip(parts, self.comm.everywhere(work), strict=True):
            completions, prefilled, _ = _unpacked(data)
            found.update(zip(part, completions, strict=True))
            self.prefill_tokens += prefilled
        self.decoded_tokens += sum(len(c.token_ids) for c in found.values())
        return [found[i] for i in range(len(requests))]


class FirstAlone:
    """``inner``, which the first rank alone asks; see `ccpo.engines.base.Engine`. The others wait, and get the completions. So a limit on
    requests at once, retries and a budget mean what they mean with one process.

    ``tell`` gives, on the first rank, counts that go to the others with the completions, whose ``hear`` takes them.
    """

    def __init__(
        self,
        inner: Engine,
        comm: Comm,
        *,
        tell: Callable[[], Mapping[str, int]] = dict,
        hear: Callable[[Mapping[str, int]], None] = lambda counts: None,
    ) -> None:
        self.inner, self.comm = inner, comm
        self.positions = inner.positions
        self.prefill_tokens = self.decoded_tokens = 0
        self._tell, self._hear = tell, hear

    def refresh(self) -> None:
        """The weights that it speaks with, where they are this run's, have changed."""
        self.inner.refresh()

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request, in their order. What is raised on the first rank is raised on all."""
        if not requests:
            return []

        def ask() -> bytes:
            if not self.comm.first:
                return b""
            before = self.inner.prefill_tokens
            done = self.inner.generate(requests)
            return _packed(done, self.inner.prefill_tokens - before, self._tell())

        done, prefilled, counts = _unpacked(self.comm.everywhere(ask)[0])
        if not self.comm.first:
            self._hear(counts)
        self.prefill_tokens += prefilled
        self.decoded_tokens += sum(c.tokens for c in done)
        return done


def shares(requests: Sequence[Request], ranks: int) -> list[list[int]]:
    """Which requests each rank samples: as much work for each, requests of one prompt together, as it is prefilled once for them.
    The work of a request is its ``max_tokens``, and that of a prompt its length."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, request in enumerate(requests):
        by_prompt.setdefault(request.prompt_ids, []).append(index)
    most = max(1, -(-len(requests) // ranks))  # more of one prompt than this would be more than a rank's share
    pieces = [group[i : i + most] for group in by_prompt.values() for i in range(0, len(group), most)]
    work = [sum(requests[i].max_tokens for i in piece) + len(requests[piece[0]].prompt_ids) for piece in pieces]
    return [sorted(i for number in part for i in pieces[number]) for part in deal(work, ranks)]


def _packed(done: Sequence[Completion], prefilled: int, counts: Mapping[str, int] | None = None) -> bytes:
    """A line of JSON, then all token ids as int32 and all log-probs as float64. Where an endpoint shows neither, there are none."""
    completions = [[len(c.token_ids), c.text, c.finish, c.counted] for c in done]
    head = {"prefilled": prefilled, "counts": dict(counts or {}), "completions": completions}
    ids = array("i", [i for c in done for i in c.token_ids])
    logprobs = array("d", [x for c in done for x in c.logprobs])
    return json.dumps(head).encode() + b"\n" + ids.tobytes() + logprobs.tobytes()


def _unpacked(data: bytes) -> tuple[list[Completion], int, dict[str, int]]:
    """The completions, the prompt tokens that were run for them, and the counts."""
    line, _, numbers = data.partition(b"\n")
    head = json.loads(line)
    total = sum(length for length, *_ in head["completions"])
    ids, logprobs = array("i"), array("d")
    ids.frombytes(numbers[: total * ids.itemsize])
    logprobs.frombytes(numbers[total * ids.itemsize :])
    done, start = [], 0
    for length, text, finish, counted in head["completions"]:
        span = slice(start, start + length)
        kept = {"token_ids": tuple(ids[span]), "logprobs": tuple(logprobs[span])}
        done.append(Completion(**kept, text=text, finish=FinishReason(finish), counted=counted))
        start += length
    return done, head["prefilled"], head["counts"]
