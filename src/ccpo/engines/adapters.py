"""Adapters of one base that speak through one decoder, one after another.

A decoder of its own for each adapter would hold the base K times over. Here whoever speaks is first merged into the one copy; that happens
once for each change of voice, and reads and writes the base once.
"""

from __future__ import annotations

from collections.abc import Sequence

from ccpo.engines.native import NativeEngine
from ccpo.types import Completion, Request


class SharedDecoder:
    """A decoder, and the adapter that is ``merged`` into it; None where it must be read again before anybody speaks."""

    def __init__(self, body: NativeEngine) -> None:
        self.body = body
        self.merged = body.weights.adapter

    def speak_as(self, adapter: str) -> NativeEngine:
        """The decoder, with the adapter's present weights."""
        if self.merged != adapter:
            self.body.weights.adapter = self.merged = adapter
            self.body.refresh()
        return self.body


class AdapterEngine:
    """One adapter's voice; see `ccpo.engines.base.Engine`."""

    def __init__(self, shared: SharedDecoder, adapter: str) -> None:
        self.shared, self.adapter = shared, adapter
        self.positions = shared.body.positions
        self.prefill_tokens = self.decoded_tokens = 0

    def refresh(self) -> None:
        """Lets the adapter's weights be read again before it speaks next."""
        if self.shared.merged == self.adapter:
            self.shared.merged = None

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request, in their order."""
        body = self.shared.speak_as(self.adapter)
        before = body.prefill_tokens, body.decoded_tokens
        done = body.generate(requests)
        self.prefill_tokens += body.prefill_tokens - before[0]
        self.decoded_tokens += body.decoded_tokens - before[1]
        return done
