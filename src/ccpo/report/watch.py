"""``ccpo watch``: the page of a run while it is trained, on this machine alone.

The server knows two addresses, the page and its data, and reads nothing else: no address is ever made into a path. It is
bound to 127.0.0.1 and answers only requests that name it so, which keeps web pages of other origins out.
"""

from __future__ import annotations

import hashlib
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ccpo.errors import UserError
from ccpo.report.document import RunReader, build_document
from ccpo.report.page import page, policy, to_json

HOST = "127.0.0.1"
PAUSE = 1.0  # seconds between two looks at the files


class Source:
    """The data of a run as bytes, and their tag; made again when the files have changed, one request at a time."""

    def __init__(self, run: str | Path) -> None:
        self.reader = RunReader(run, keep=True)
        self.lock = threading.Lock()
        self.stamp: Any = None
        self.looked = -PAUSE
        self.data, self.tag = b"", ""

    def current(self) -> tuple[bytes, str]:
        with self.lock:
            if time.monotonic() - self.looked >= PAUSE:
                self._look()
                self.looked = time.monotonic()
            return self.data, self.tag

    def _look(self) -> None:
        stamp = self.reader.stamp()
        if stamp == self.stamp:
            return
        document, tables = build_document([self.reader])
        self.data = to_json({"document": document, "tables": tables}).encode()
        self.tag = f'"{hashlib.sha256(repr(stamp).encode()).hexdigest()[:32]}"'
        self.stamp = stamp


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, run: str | Path, port: int) -> None:
        self.source = Source(run)
        self.page = page(None, live=True).encode()
        self.page_tag = f'"{hashlib.sha256(self.page).hexdigest()[:32]}"'
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise UserError(
                f"port {port} cannot be used ({error.strerror}); choose another with --port, or --port 0 for any that is free"
            ) from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that hangs up is no error; anything else is shown as usual."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    """GET and HEAD of ``/`` and ``/data.json``; everything else is refused."""

    server: Server
    server_version, sys_version = "ccpo", ""
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        if self.headers.get("Host") not in (
            f"{HOST}:{self.server.server_port}",
            f"localhost:{self.server.server_port}",
        ):
            self._refuse(403, "this server answers to 127.0.0.1 alone")
        elif self.path == "/":
            self._answer("text/html; charset=utf-8", self.server.page, self.server.page_tag)
        elif self.path == "/data.json":
            data, tag = self.server.source.current()
            self._answer("application/json", data, tag)
        else:
            self._refuse(404, "not here")

    do_HEAD = do_GET

    def _answer(self, kind: str, body: bytes, tag: str) -> None:
        if self.headers.get("If-None-Match") == tag:
            self._send(304, kind, b"", tag)
        else:
            self._send(200, kind, body, tag)

    def _refuse(self, status: int, why: str) -> None:
        self._send(status, "text/plain; charset=utf-8", f"{why}\n".encode())

    def _send(self, status: int, kind: str, body: bytes, tag: str | None = None) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": policy(live=True) + "; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-cache",
        }
        for name, value in {**headers, **({"ETag": tag} if tag else {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Requests are not logged: the page asks every few seconds."""
