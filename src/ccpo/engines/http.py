"""HTTP for endpoints that are not trusted: a limit on time and size of every exchange, keys that show nowhere, no redirects, no proxies."""

from __future__ import annotations

import io
import os
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from ccpo.errors import UserError

CONNECT_SECONDS = 10.0
MAX_BODY = 8 * 2**20  # bytes of a reply
CHUNK = 64 * 2**10


class Trouble(Exception):
    """An exchange that gave nothing usable: what happened, in words."""


class Secret:
    """A key from the environment, which no representation, log or error shows."""

    __slots__ = ("_value", "name")

    def __init__(self, name: str, value: str) -> None:
        self.name, self._value = name, value

    @classmethod
    def of_environment(cls, name: str, where: str) -> Secret:
        """The key in the environment variable ``name``. Raises UserError where it is not set, or cannot stand in a header."""
        value = os.environ.get(name, "").strip()
        if not value:
            raise UserError(
                f"{where}: the environment variable {name} is not set; put the endpoint's key there (export {name}=…), or "
                "remove the setting where the endpoint wants none"
            )
        if not (value.isascii() and value.isprintable()) or " " in value:
            raise UserError(f"{where}: the value of {name} has characters that no key has; set it again")
        return cls(name, value)

    def header(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._value}"}

    def scrub(self, text: str) -> str:
        """``text`` without the key, should the other side have sent it back."""
        return text.replace(self._value, "***")

    def __repr__(self) -> str:
        return f"<key of {self.name}>"

    def __reduce__(self) -> Any:
        raise TypeError("a key is not copied or written")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """``headers`` have lower-case names."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class HttpClient:
    """Keeps connections to one address, for several threads. ``close`` drops the idle ones; ``abort`` cuts those in use too.

    An exchange ends within its ``timeout``, however slowly bytes drip in, but for the name's look-up, which the system bounds.
    Raises OSError, HTTPException or :class:`Trouble`.
    """

    def __init__(self, url: str, secret: Secret | None = None) -> None:
        parts = urlsplit(url)
        self._https, self._host, self._port = parts.scheme == "https", parts.hostname or "", parts.port
        self._path, self._secret = parts.path.rstrip("/"), secret
        self._idle: list[HTTPConnection] = []
        self._busy: dict[HTTPConnection, socket.socket | None] = {}
        self._lock = threading.Lock()

    def exchange(self, method: str, path: str, body: bytes | None = None, *, timeout: float) -> Reply:
        until = time.monotonic() + timeout
        with self._lock:
            connection = self._idle.pop() if self._idle else self._fresh()
            self._busy[connection] = connection.sock
        try:
            reply = self._exchange(connection, method, self._path + path, body, until)
        except BaseException:
            connection.close()
            with self._lock:
                del self._busy[connection]
            raise
        with self._lock:
            del self._busy[connection]
            if connection.sock is not None:
                self._idle.append(connection)
        return reply

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def abort(self) -> None:
        """Cut every exchange under way: its thread gets an OSError at once."""
        with self._lock:
            busy = [sock for sock in self._busy.values() if sock is not None]
        for sock in busy:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:  # it has just ended by itself
                continue
        self.close()

    def _fresh(self) -> HTTPConnection:
        if self._https:
            return HTTPSConnection(self._host, self._port, context=ssl.create_default_context())
        return HTTPConnection(self._host, self._port)

    def _exchange(self, connection: HTTPConnection, method: str, path: str, body: bytes | None, until: float) -> Reply:
        if connection.sock is None:
            connection.timeout = min(CONNECT_SECONDS, _left(until))
            connection.connect()
            with self._lock:
                self._busy[connection] = connection.sock
        connection.sock.settimeout(_left(until))
        connection.response_class = lambda sock, **keys: HTTPResponse(_Timed(sock, until), **keys)  # type: ignore[assignment]
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "ccpo"}
        headers |= {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, body, headers | (self._secret.header() if self._secret else {}))
        response = connection.getresponse()
        parts, size = [], 0
        while part := response.read(CHUNK):
            parts.append(part)
            size += len(part)
            if size > MAX_BODY:
                raise Trouble(f"a reply of more than {MAX_BODY // 2**20} MiB")
        if response.length:
            raise Trouble("a reply that was cut off")
        headers = {name.lower(): value for name, value in response.getheaders()}
        return Reply(status=response.status, headers=headers, body=b"".join(parts))


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


class _Timed:
    """A socket whose reader has a deadline for everything together, where a socket's own time-out is for each piece."""

    def __init__(self, sock: socket.socket, until: float) -> None:
        self.sock, self.until = sock, until

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self.sock, self.sock.makefile(mode, buffering=0), self.until))


class _TimedReader(io.RawIOBase):
    def __init__(self, sock: socket.socket, raw: Any, until: float) -> None:
        self.sock, self.raw, self.until = sock, raw, until

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self.sock.settimeout(_left(self.until))
        return self.raw.readinto(buffer)

    def close(self) -> None:
        self.raw.close()
        super().close()


def quoted(body: bytes, secret: Secret | None, limit: int = 200) -> str:
    """The beginning of what the other side says, in one printable line, without the key."""
    text = body[: 8 * limit].decode("utf-8", "replace")
    text = secret.scrub(text) if secret else text
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
