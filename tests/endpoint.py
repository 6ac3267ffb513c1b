"""A real HTTP server on localhost that speaks chat completions, well or badly, as a test tells it to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]
Act = Callable[["Handler", Body], None]
"""What the server does with one request."""


def completion(text: str | None, *, finish: str | None = "stop", usage: Any = "count", **more: Any) -> Body:
    """The body of a good reply; a word is a token."""
    counted = {"prompt_tokens": 10, "completion_tokens": len((text or "").split()), "total_tokens": 0}
    body = {
        "id": "x",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish, **more}],
    }
    return body if usage is None else {**body, "usage": counted if usage == "count" else usage}


@dataclass
class Server:
    """``say`` answers where ``acts``, which are used up one a request, do not say otherwise. What came is in ``bodies`` and ``headers``."""

    say: Callable[[Body], str] = lambda body: "ok"
    acts: list[Act] = field(default_factory=list)
    choose: Callable[[Body], Act | None] = lambda body: None
    models: Any = None
    bodies: list[Body] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    busy: int = 0
    most_busy: int = 0
    delay: float = 0.0
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        world: Server = self.server.world
        world.headers.append({k.lower(): v for k, v in self.headers.items()})
        if callable(world.models):
            world.models(self, {})
        elif world.models is None:
            self.reply(404, b"{}")
        else:
            self.reply(200, json.dumps({"object": "list", "data": [{"id": m} for m in world.models]}).encode())

    def do_POST(self) -> None:
        world: Server = self.server.world
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with world.lock:
            world.bodies.append(body)
            world.headers.append({k.lower(): v for k, v in self.headers.items()} | {":path": self.path})
            world.busy += 1
            world.most_busy = max(world.most_busy, world.busy)
            act = world.acts.pop(0) if world.acts else world.choose(body)
        try:
            if world.delay:
                time.sleep(world.delay)
            if act is not None:
                act(self, body)
            else:
                self.say(body)
        except OSError:  # the other side has gone
            self.close_connection = True
        finally:
            with world.lock:
                world.busy -= 1

    def say(self, body: Body) -> None:
        """Answer well."""
        self.reply(200, json.dumps(completion(self.server.world.say(body))).encode())

    def reply(self, status: int, body: bytes, *, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(**keys: Any) -> Iterator[Server]:
    """A server at ``.url``, until the block ends."""
    world = Server(**keys)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.world = world  # type: ignore[attr-defined]
    world.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield world
    finally:
        world.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


# --- what a server can do wrong


def status(code: int, body: bytes = b'{"error": {"message": "no"}}', **headers: str) -> Act:
    return lambda handler, _: handler.reply(code, body, **headers)


def raw(body: bytes | Body, **headers: str) -> Act:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return lambda handler, _: handler.reply(200, data, **headers)


def hang(handler: Handler, _: Body) -> None:
    """No byte at all."""
    handler.server.world.closing.wait(30)
    handler.close_connection = True


def drip(handler: Handler, _: Body) -> None:
    """A byte now and then: each comes in time, the whole never does."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    while not handler.server.world.closing.wait(0.05):
        handler.wfile.write(b" ")
        handler.wfile.flush()
    handler.close_connection = True


def cut(handler: Handler, _: Body) -> None:
    """Half a reply, then the connection is gone."""
    body = json.dumps(completion("whole")).encode()
    handler.reply(200, body[: len(body) // 2], length=len(body))
    handler.close_connection = True


def slam(handler: Handler, _: Body) -> None:
    """The connection is gone before a byte."""
    handler.close_connection = True


def flood(handler: Handler, _: Body) -> None:
    """A reply without an end."""
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    for _i in range(64):
        handler.wfile.write(b"[" * 2**20)
    handler.close_connection = True


def chats(bodies: Sequence[Body]) -> list[str]:
    """The last message of each request."""
    return [body["messages"][-1]["content"] for body in bodies]
