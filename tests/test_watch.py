"""``ccpo watch``: a real server on this machine, asked by hand."""

from __future__ import annotations

import gc
import gzip
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ccpo.types
from ccpo.errors import UserError
from ccpo.report import write_report
from ccpo.report.document import RunReader, build_document
from ccpo.report.page import to_json
from ccpo.report.watch import Server
from ccpo.runfolder import RunFolder
from run_files import metrics_of, problem_record, write_run, write_steps


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("ccpo.report.watch.PAUSE", 0.0)
    with Server(write_run(tmp_path / "run", steps=3), 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: Server, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, {k.lower(): v for k, v in answer.getheaders()}, body


def test_page_and_data_are_served(server: Server):
    status, headers, body = ask(server, "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert b'data-mode="live"' in body
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    status, headers, body = ask(server, "/data.json")
    assert (status, headers["content-type"]) == (200, "application/json")
    assert json.loads(body)["document"]["runs"][0]["progress"]["step"] == 3
    assert server.server_address[0] == "127.0.0.1"


def test_nothing_else_is_there(server: Server):
    folder = server.source.reader.folder.path
    (folder / "secret.txt").write_text("secret")
    paths = [
        "/secret.txt",
        "/recipe.json",
        "/../run/recipe.json",
        "/..%2f..%2fetc/passwd",
        "//etc/passwd",
        "/data.json?x=1",
    ]
    for path in [*paths, "/data.json/", "/./data.json", "/%64ata.json", f"{folder}/recipe.json", "*", "/episodes/"]:
        status, headers, body = ask(server, path)
        assert (status, body) == (404, b"not here\n"), path
        assert "etag" not in headers


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
def test_nothing_can_be_changed(server: Server, method: str):
    assert ask(server, "/data.json", method)[0] == 501


def test_head_has_no_body(server: Server):
    status, headers, body = ask(server, "/data.json", "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["content-length"]) > 1000


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1", "127.0.0.1:1", ""])
def test_other_names_are_refused(server: Server, host: str):
    assert ask(server, "/data.json", Host=host)[0] == 403


def test_localhost_is_a_name_of_it(server: Server):
    assert ask(server, "/", Host=f"localhost:{server.server_port}")[0] == 200


def test_data_is_sent_again_only_when_a_file_has_changed(server: Server):
    _, headers, first = ask(server, "/data.json")
    assert ask(server, "/data.json", If_None_Match=headers["etag"])[::2] == (304, b"")
    folder = server.source.reader.folder
    folder.append(folder.metrics, metrics_of(4, 4, random.Random(0)))
    status, changed, body = ask(server, "/data.json", If_None_Match=headers["etag"])
    assert (status, changed["etag"] != headers["etag"]) == (200, True)
    assert json.loads(body)["document"]["runs"][0]["progress"]["step"] == 4
    assert body != first


def test_episodes_are_read_once_and_all_again_where_old_ones_have_changed(
    server: Server, monkeypatch: pytest.MonkeyPatch
):
    ask(server, "/data.json")
    read = []
    monkeypatch.setattr("ccpo.report.document.read_groups", lambda path, step, notes: read.append(step) or ())
    folder = server.source.reader.folder
    add_step(folder, 4)
    assert ask(server, "/data.json")[0] == 200
    assert read == [4]
    (folder.path / "summary.json").unlink()
    os.utime(folder.episode_file(2), ns=(1, 1))
    assert ask(server, "/data.json")[0] == 200
    assert read == [4, 1, 2, 3, 4]


# ---- what is kept while a run goes on


def add_step(folder: RunFolder, step: int, *, seed: int = 0, problems: int = 4) -> None:
    """One more step of a run, with its own texts and with texts of very different lengths."""
    rng = random.Random(f"{seed} {step}")
    records = [problem_record(rng, step, 30, place, 4, 12) for place in range(problems)]
    for record in records:
        for rollout in record["rollouts"]:
            rollout["turns"][0]["text"] += f" {rng.random()} " * rng.choice((1, 20, 200))
    folder.append(folder.metrics, metrics_of(step, 30, rng))
    write_steps(folder.episode_file(step), step, records)


def content(reader: RunReader) -> dict[str, Any]:
    """What a page holds, but for when it was made."""
    document, tables = build_document([reader])
    return json.loads(to_json({"document": document | {"generated": None}, "tables": tables}))


@pytest.mark.parametrize(("rollouts", "size"), [(40, 10**6), (10**6, 60_000), (1, 10**6), (10**6, 10**7)])
def test_the_page_that_grew_is_the_page_of_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rollouts: int, size: int
):
    monkeypatch.setattr("ccpo.report.document.MAX_ROLLOUTS", rollouts)
    monkeypatch.setattr("ccpo.report.document.MAX_BYTES", size)
    monkeypatch.setattr("ccpo.report.document.MAX_FILES", 8)
    folder = RunFolder(write_run(tmp_path / "run", steps=1))
    reader = RunReader(folder.path, keep=True)
    for step in range(2, 13):
        add_step(folder, step)
        grown = content(reader)
        assert grown == content(RunReader(folder.path))
    assert grown["tables"][0]["seen"] == 16 * 6  # of twelve steps every second is read
    assert 0 < grown["tables"][0]["shown"] <= max(4, rollouts)


def test_a_run_that_is_resumed_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ccpo.report.document.MAX_ROLLOUTS", 30)
    folder = RunFolder(write_run(tmp_path / "run", steps=6))
    reader = RunReader(folder.path, keep=True)
    before = content(reader)
    folder.rewind(3)
    assert content(reader) == content(RunReader(folder.path)) != before
    for step in (4, 5):
        add_step(folder, step, seed=1)
        assert content(reader) == content(RunReader(folder.path))


def test_what_the_watched_files_serve_is_what_the_report_writes(server: Server):
    folder = server.source.reader.folder
    ask(server, "/data.json")
    add_step(folder, 4)
    served = json.loads(ask(server, "/data.json")[2])
    text = write_report([folder.path]).read_text()
    written = {
        name: json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text, re.S)[1])
        for name in ("document", "rollouts-0")
    }
    assert served["document"]["runs"] == written["document"]["runs"]
    assert served["tables"] == [written["rollouts-0"]]


def test_memory_does_not_grow_with_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ccpo.report.document.find_warnings", lambda folder, notes: [])
    folder = RunFolder(write_run(tmp_path / "run", steps=1))
    reader = RunReader(folder.path, keep=True)

    def held(until: int) -> tuple[int, int]:
        """Bytes held once that many steps are there, and the size of their texts."""
        for step in range(len(list(folder.episodes.iterdir())) + 1, until + 1):
            add_step(folder, step, problems=8)
        reader.read(rollouts=60, size=10**6)
        gc.collect()
        texts = sum(len(gzip.decompress(file.read_bytes())) for file in folder.episodes.iterdir())
        return tracemalloc.get_traced_memory()[0], texts

    tracemalloc.start()
    try:
        early, fewer = held(10)
        late, more = held(40)
    finally:
        tracemalloc.stop()
    assert more - fewer > 1_500_000
    assert late - early < (more - fewer) / 15


def test_a_port_in_use_is_the_users_to_change(tmp_path: Path):
    run = write_run(tmp_path / "run", steps=1)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="--port"):
        Server(run, taken.getsockname()[1])


def test_the_command_says_where_it_is_and_ends_with_ctrl_c(tmp_path: Path):
    run = write_run(tmp_path / "run", steps=1)
    environment = os.environ | {"PYTHONPATH": str(Path(ccpo.types.__file__).parents[1])}
    command = [sys.executable, "-u", "-m", "ccpo", "watch", str(run), "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        line = process.stdout.readline()
        assert re.fullmatch(
            rf"http://127\.0\.0\.1:\d+/ shows {re.escape(str(run))} and follows it; Ctrl-C ends this\.\n", line
        )
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
        assert (process.stdout.read(), process.stderr.read()) == ("Ended.\n", "")
