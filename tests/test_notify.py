"""Webhooks against a real receiver that accepts, fails, hangs, drips, redirects and dies."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import redis
import rows
from conftest import missing
from sqlalchemy import Engine, insert, select, update

from scheduler import notify
from scheduler.notify import ATTEMPTS, BACKOFF_BASE_S, BACKOFF_CAP_S, Notifier, check_url, signature
from storage.database import connect, reading, writing
from storage.dialect import Now
from storage.ledger.events import EventState, delivered, job_closed, put_off, take_events
from storage.records import TaskState, VideoState
from storage.schema import events, job_videos, jobs, probes, tasks
from workers.logs import JsonFormatter

DOCUMENT = (Path(__file__).parents[1] / "docs" / "monitoring.md").read_text(encoding="utf-8")
SECRET = "a secret of the receiver's"


class Receiver:
    """An HTTP server that notes what it gets and answers as it is told."""

    def __init__(self) -> None:
        self.got: list[tuple[str, dict[str, str], bytes]] = []
        self.status = 200
        self.headers: dict[str, str] = {}
        self.before_answering: Callable[[BaseHTTPRequestHandler], None] = lambda _: None
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.got.append((self.path, dict(self.headers), body))
                receiver.before_answering(self)
                if self.close_connection and receiver.status == 0:
                    return
                self.send_response(receiver.status)
                for name, value in receiver.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(b"an answer that nobody reads")

            do_GET = do_POST  # noqa: N815 - the name it must have

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook/token?secret=s"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def speak_tls(self, certificate: Path, key: Path) -> None:
        """From now on: with this certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.url = self.url.replace("http:", "https:")

    def close(self) -> None:
        """Stop answering: the port is closed."""
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A receiver that accepts all."""
    made = Receiver()
    yield made
    made.close()


def close(engine: Engine, job_id: int) -> None:
    """Close the job as the ledger does: the event in the same transaction."""
    with writing(engine) as connection:
        connection.execute(
            update(jobs).where(jobs.c.id == job_id).values(state="closed", closed_ms=Now())
        )
        job_closed(connection, job_id)


def with_event(engine: Engine, url: str, job_id: int = 1) -> str:
    """An event of its own; returns its id."""
    event_id = f"event-{job_id}"
    with writing(engine) as connection:
        connection.execute(
            insert(events).values(
                id=event_id,
                job_id=job_id,
                kind="job.closed",
                url=url,
                body=json.dumps({"event_id": event_id, "name": "größe"}),
                state=EventState.PENDING,
                attempts=0,
                not_before_ms=0,
                created_ms=Now(),
            )
        )
    return event_id


def stored(engine: Engine) -> list[Any]:
    """All events."""
    with reading(engine) as connection:
        return list(connection.execute(select(events).order_by(events.c.created_ms)).all())


def let_delays_pass(engine: Engine) -> None:
    """As if every event were due."""
    with writing(engine) as connection:
        connection.execute(update(events).values(not_before_ms=0))


def notified(engine: Engine, url: str | None, **changes: object) -> int:
    """A job of two videos, all done, that is to be told of; returns its id."""
    made = rows.planned(engine, 8, 4, **changes)
    with writing(engine) as connection:
        connection.execute(
            update(jobs).where(jobs.c.id == made.job_id).values(notify_url=url, tag="nightly")
        )
    rows.work(engine, made.job_id)
    with writing(engine) as connection:
        connection.execute(
            update(job_videos)
            .where(job_videos.c.job_id == made.job_id)
            .values(state=VideoState.COMPLETE, analysed_us=job_videos.c.duration_us)
        )
    return made.job_id


def test_the_end_of_a_job_is_told(engine: Engine, receiver: Receiver) -> None:
    """One POST with the documented body and headers; then the event is delivered."""
    job_id = notified(engine, receiver.url)
    close(engine, job_id)
    notifier = Notifier(engine, SECRET)
    assert notifier.step()
    assert not notifier.step()
    ((path, headers, content),) = receiver.got
    (event,) = stored(engine)
    assert path == "/hook/token?secret=s"
    assert headers["Content-Type"] == "application/json"
    assert headers["Nightreel-Event-Id"] == event.id
    body = json.loads(content)
    closed_at = datetime.fromisoformat(body.pop("closed_at"))
    assert abs(datetime.now(UTC) - closed_at) < timedelta(minutes=1)
    assert body == {
        "event_id": event.id,
        "kind": "job.closed",
        "job": job_id,
        "name": "seasons",
        "tag": "nightly",
        "state": "complete",
        "files": {},
        "videos": {"complete": 2},
        "tasks": {"done": 3},
        "samples": 12,
        "duration_s": 12.0,
        "analysed_s": 12.0,
    }
    assert (event.state, event.attempts) == (EventState.DELIVERED, 1)
    assert event.delivered_ms >= event.created_ms


def test_the_documented_example_names_the_fields_there_are(
    engine: Engine, receiver: Receiver
) -> None:
    """The body in the documentation has the fields of a real one, in their order and types."""
    close(engine, notified(engine, receiver.url))
    shown = re.search(r"^    (\{\"event_id\".*?\})$", DOCUMENT, re.DOTALL | re.MULTILINE)
    assert shown is not None
    (event,) = stored(engine)
    documented, real = json.loads(shown[1]), json.loads(event.body)
    assert list(documented) == list(real)
    assert [type(v) for v in documented.values()] == [type(v) for v in real.values()]


def test_a_job_without_an_address_is_told_to_nobody(engine: Engine) -> None:
    """No address, no event."""
    close(engine, notified(engine, None))
    assert stored(engine) == []


@pytest.mark.parametrize(
    ("table", "state", "told"),
    [
        (tasks, TaskState.CANCELLED, "cancelled"),
        (probes, TaskState.CANCELLED, "cancelled"),
        (probes, TaskState.FAILED, "incomplete"),
        (job_videos, VideoState.PARTIAL, "incomplete"),
        (job_videos, VideoState.REJECTED, "incomplete"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_job_is_complete_only_if_all_of_it_is(
    sqlite_url: str, table: Any, state: str, told: str
) -> None:
    """A file that was not planned, a video that is not all analysed, something given up by hand."""
    engine = connect(sqlite_url)
    job_id = notified(engine, "http://receiver.example")
    with writing(engine) as connection:
        connection.execute(
            insert(probes).values(
                job_id=job_id,
                path_sha256=b"a",
                path_raw=b"/a",
                size_bytes=1,
                mtime_ns=1,
                state=TaskState.DONE,
                attempts=1,
                fence=1,
                not_before_ms=0,
            )
        )
        first = select(table.c[table.primary_key.columns.keys()[-1]]).limit(1).scalar_subquery()
        connection.execute(
            update(table)
            .where(table.c[table.primary_key.columns.keys()[-1]] == first)
            .values(state=state)
        )
    close(engine, job_id)
    body = json.loads(stored(engine)[0].body)
    assert body["state"] == told
    assert body[{"probes": "files", "job_videos": "videos"}.get(table.name, table.name)][state] == 1
    engine.dispose()


def test_a_job_that_closes_twice_is_told_of_twice(engine: Engine, receiver: Receiver) -> None:
    """Each closing is an event of its own; a closing that is rolled back is none."""
    job_id = notified(engine, receiver.url)
    close(engine, job_id)
    close(engine, job_id)

    def fail() -> None:
        with writing(engine) as connection:
            job_closed(connection, job_id)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert len({event.id for event in stored(engine)}) == 2


def test_a_receiver_proves_the_sender_by_the_documented_code(
    engine: Engine, receiver: Receiver
) -> None:
    """The example of the documentation accepts what was sent, and nothing that was altered, is old
    or is signed with another secret."""
    code = re.search(r"<!-- verify -->\n```python\n(.*?)```\n<!-- /verify -->", DOCUMENT, re.DOTALL)
    assert code is not None
    example: dict[str, Any] = {}
    exec(code[1], example)
    is_genuine = example["is_genuine"]
    with_event(engine, receiver.url)
    Notifier(engine, SECRET).step()
    ((_, headers, body),) = receiver.got
    header = headers["Nightreel-Signature"]
    assert is_genuine(SECRET, header, body)
    assert not is_genuine(SECRET + "x", header, body)
    assert not is_genuine(SECRET, header, body + b" ")
    assert not is_genuine(SECRET, signature(SECRET, int(time.time()) - 301, body), body)
    assert not is_genuine(SECRET, "", body)
    assert not is_genuine(SECRET, "t=1,v1=é", body)
    # As anybody would compute it by hand.
    moment = header.removeprefix("t=").split(",")[0]
    by_hand = hmac.new(SECRET.encode(), moment.encode() + b"." + body, hashlib.sha256).hexdigest()
    assert header == f"t={moment},v1={by_hand}"


def test_without_a_secret_nothing_is_signed(engine: Engine, receiver: Receiver) -> None:
    """A signature that proves nothing is not sent."""
    with_event(engine, receiver.url)
    Notifier(engine, None).step()
    assert "Nightreel-Signature" not in receiver.got[0][1]


@pytest.mark.parametrize("status", [301, 302, 307, 308, 400, 401, 404, 408, 425, 429, 500, 503])
def test_what_is_not_accepted_is_tried_again_with_the_same_id(
    sqlite_url: str, receiver: Receiver, status: int
) -> None:
    """Anything but 2xx comes back after a delay; where a redirect leads, nobody goes."""
    engine = connect(sqlite_url)
    with_event(engine, receiver.url)
    receiver.status = status
    receiver.headers = {"Location": receiver.url + "&elsewhere"}
    delays: list[tuple[float, float]] = []

    def longest(low: float, high: float) -> float:
        delays.append((low, high))
        return high

    notifier = Notifier(engine, None, uniform=longest)
    assert notifier.step()
    assert not notifier.step(), "it is not due yet"
    (event,) = stored(engine)
    assert (event.state, event.error) == (EventState.PENDING, f"it answers {status}")
    assert delays == [(0, 10)]
    let_delays_pass(engine)
    receiver.status = 204
    assert notifier.step()
    assert stored(engine)[0].state == EventState.DELIVERED
    assert [headers["Nightreel-Event-Id"] for _, headers, _ in receiver.got] == [event.id] * 2
    assert [path for path, _, _ in receiver.got] == ["/hook/token?secret=s"] * 2
    assert receiver.got[0][2] == receiver.got[1][2]
    engine.dispose()


@pytest.mark.expects_error_log("given up")
def test_gone_is_never_asked_again(
    engine: Engine, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    """410 gives up at once, with one error that shows scheme and host alone, and is of the job."""
    with_event(engine, receiver.url, 7)
    receiver.status = 410
    caplog.handler.setFormatter(JsonFormatter())
    Notifier(engine, None).step()
    assert [json.loads(line)["job"] for line in caplog.text.splitlines()] == [7]
    (event,) = stored(engine)
    assert (event.state, event.error) == (EventState.GIVEN_UP, "it answers 410")
    let_delays_pass(engine)
    assert not Notifier(engine, None).step()
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert record.getMessage() == (
        f"{receiver.url.split('/hook')[0]} is not told of its end, "
        "given up after 1 attempts: it answers 410"
    )


@pytest.mark.expects_error_log("given up after 34 attempts")
def test_a_receiver_that_stays_away_is_given_up_after_a_day(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Delays double up to two hours, and on average all of them take about a day."""
    engine = connect(sqlite_url)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with_event(engine, f"http://127.0.0.1:{unused.getsockname()[1]}/token")
        delays: list[float] = []

        def longest(low: float, high: float) -> float:
            assert low == 0
            delays.append(high)
            return high

        notifier = Notifier(engine, None, uniform=longest)
        for _ in range(ATTEMPTS):
            assert notifier.step()
            let_delays_pass(engine)
        assert not notifier.step()
    assert stored(engine)[0].state == EventState.GIVEN_UP
    assert stored(engine)[0].error == "connection refused, reset or name unknown"
    assert delays == [min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2**n) for n in range(1, ATTEMPTS)]
    assert 20 < sum(delays) / 2 / 3600 < 28
    assert not any("token" in record.getMessage() for record in caplog.records)
    engine.dispose()


def sockets() -> set[str]:
    """Sockets that this process holds open."""
    held = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            held.add(os.readlink(descriptor))
    return {target for target in held if target.startswith("socket:")}


DRIPS = {
    "drips a status": ("http", b"", b"H"),
    "drips headers": ("http", b"HTTP/1.1 100 Continue\r\n", b"X"),
    "drips interim answers": ("http", b"", b"HTTP/1.1 103 Early Hints\r\n\r\n"),
    "drips TLS": ("https", b"\x16\x03\x03\x40\x00", b"\x00"),
    "hangs": ("http", b"", b""),
    "hangs in TLS": ("https", b"", b""),
}
ENDS = {
    "dies": ("http", b"", "connection refused, reset or name unknown"),
    "is not HTTP": ("http", b"\x00\xff nonsense\r\n\r\n", "the request failed (ValueError)"),
    "is a line without end": ("http", b"H" * 100_000, "the request failed (ValueError)"),
    "speaks no TLS": ("https", b"HTTP/1.1 200 OK\r\n\r\n", "TLS failed"),
}


@pytest.mark.parametrize("how", [*DRIPS, *ENDS])
def test_a_hostile_receiver_is_left_in_time(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Silence, an answer byte by byte, a cut connection and nonsense all end by the deadline, leave
    neither a thread nor a socket behind, and are tried again."""
    engine, gone = connect(sqlite_url), threading.Event()
    if how in DRIPS:
        monkeypatch.setattr(notify, "DEADLINE_S", 0.5)
        (scheme, first, then), error = DRIPS[how], "no answer within 0.5 s"
    else:
        (scheme, first, error), then = ENDS[how], None
    with socket.create_server(("127.0.0.1", 0)) as server:

        def receive() -> None:
            client, _ = server.accept()
            with client, suppress(ConnectionError):
                client.recv(65536)
                client.sendall(first)
                while then is not None and not gone.wait(0.02):
                    client.sendall(then)

        with_event(engine, f"{scheme}://127.0.0.1:{server.getsockname()[1]}/")
        threads, held = set(threading.enumerate()), sockets()
        receiving = threading.Thread(target=receive)
        receiving.start()
        began = time.monotonic()
        Notifier(engine, None).step()
        assert time.monotonic() - began < 10
        assert set(threading.enumerate()) - threads <= {receiving}
        gone.set()
        receiving.join()
        assert sockets() <= held
    (event,) = stored(engine)
    assert (event.state, event.attempts, event.error) == (EventState.PENDING, 1, error)
    engine.dispose()


def test_a_receiver_that_is_away_holds_up_no_other(
    engine: Engine, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many of its events are due, one of them is tried at a time, and the others' are told
    meanwhile."""
    monkeypatch.setattr(notify, "DEADLINE_S", 4.0)
    with socket.create_server(("127.0.0.1", 0)) as away:
        for number in range(1, 101):
            with_event(engine, f"http://127.0.0.1:{away.getsockname()[1]}/{number}", number)
        with_event(engine, receiver.url, 101)
        assert Notifier(engine, None).step()
    assert [headers["Nightreel-Event-Id"] for _, headers, _ in receiver.got] == ["event-101"]
    assert sum(event.attempts for event in stored(engine)) == 2


def test_one_event_that_cannot_be_sent_holds_up_no_other(
    sqlite_url: str, receiver: Receiver
) -> None:
    """An address that is none, however it came into the outbox, counts as tried in vain."""
    engine = connect(sqlite_url)
    with_event(engine, "http://[::1/token", 1)
    with_event(engine, receiver.url, 2)
    assert Notifier(engine, None).step()
    first, second = stored(engine)
    assert (first.state, first.error) == (EventState.PENDING, "the request failed (ValueError)")
    assert second.state == EventState.DELIVERED
    engine.dispose()


@pytest.mark.expects_error_log("not foreseen")
def test_a_notifier_outlives_whatever_goes_wrong(
    sqlite_url: str,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What nobody foresaw is logged once however often it comes back, and deliveries go on."""
    monkeypatch.setattr(notify, "LOOK_S", 0.01)
    engine, stop, told = connect(sqlite_url), threading.Event(), threading.Event()
    with_event(engine, receiver.url)
    receiver.before_answering = lambda _: told.set()
    failures = iter([RuntimeError("can't start new thread")] * 3)

    class Failing(Notifier):
        def step(self) -> bool:
            for failure in failures:
                raise failure
            return super().step()

    running = threading.Thread(target=Failing(engine, None).run, args=(stop,))
    running.start()
    assert told.wait(30)
    stop.set()
    running.join(30)
    assert not running.is_alive()
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert record.exc_info is not None
    assert stored(engine)[0].state == EventState.DELIVERED
    engine.dispose()


def test_a_request_says_what_is_documented_and_nothing_else(
    sqlite_url: str, receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No credentials of a .netrc, no way by a proxy; a host of two addresses is told at the one
    that listens."""
    engine = connect(sqlite_url)
    (tmp_path / ".netrc").write_text("default login me password mine\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with_event(engine, receiver.url.replace("127.0.0.1", "localhost"))
    Notifier(engine, SECRET).step()
    ((path, headers, body),) = receiver.got
    assert path == "/hook/token?secret=s"
    assert headers.pop("Host").startswith("localhost:")
    assert headers.pop("Nightreel-Signature")
    assert headers == {
        "User-Agent": "nightreel",
        "Connection": "close",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Nightreel-Event-Id": "event-1",
    }
    engine.dispose()


def test_a_receiver_with_tls_must_be_the_one_that_was_named(
    sqlite_url: str, receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its certificate must be of an authority that the system knows; then the event is accepted."""
    openssl = shutil.which("openssl") or missing("openssl")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "2", "-subj", "/CN=receiver"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-out", str(certificate), "-keyout", str(key)]
    subprocess.run(command, check=True, capture_output=True)
    receiver.speak_tls(certificate, key)
    engine = connect(sqlite_url)
    with_event(engine, receiver.url)
    Notifier(engine, None).step()
    assert stored(engine)[0].error == "TLS failed"
    assert receiver.got == []
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    let_delays_pass(engine)
    Notifier(engine, None).step()
    assert stored(engine)[0].state == EventState.DELIVERED
    engine.dispose()


def test_an_endless_answer_is_not_read(sqlite_url: str, receiver: Receiver) -> None:
    """The status is all that counts; the rest is left unread and the connection closed."""
    engine, sent = connect(sqlite_url), threading.Event()

    def flood(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b"x" * 65536)
        except OSError:
            sent.set()
        handler.close_connection = True
        receiver.status = 0

    receiver.before_answering = flood
    with_event(engine, receiver.url)
    Notifier(engine, None).step()
    assert stored(engine)[0].state == EventState.DELIVERED
    assert sent.wait(30), "the connection is closed"
    engine.dispose()


def test_an_event_is_one_notifiers_at_a_time(engine: Engine, receiver: Receiver) -> None:
    """While one delivers, no other is given the event; all of many events go out once."""
    for number in range(1, 9):
        with_event(engine, receiver.url, number)
    others: list[bool] = []

    def second(_: BaseHTTPRequestHandler) -> None:
        if len(receiver.got) == 8:
            others.append(Notifier(engine, None).step())

    receiver.before_answering = second
    ready = threading.Barrier(3)

    def deliver() -> None:
        notifier = Notifier(engine, None)
        ready.wait()
        while notifier.step():
            pass

    threads = [threading.Thread(target=deliver) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert others
    assert not any(others)
    ids = [headers["Nightreel-Event-Id"] for _, headers, _ in receiver.got]
    assert sorted(ids) == [f"event-{number}" for number in range(1, 9)]
    assert {event.state for event in stored(engine)} == {EventState.DELIVERED}


def test_the_last_word_on_a_delivered_event_is_delivered(engine: Engine) -> None:
    """Whoever held the event for too long changes nothing about it any more."""
    event_id = with_event(engine, "http://receiver.example")
    for hold_s in (0, 60):
        assert [event.id for event in take_events(engine, hold_s, 1)] == [event_id]
    delivered(engine, event_id)
    put_off(engine, event_id, 0, "late")
    assert take_events(engine, 60, 1) == []
    (event,) = stored(engine)
    assert (event.state, event.attempts, event.error) == (EventState.DELIVERED, 2, None)


def test_a_scheduler_killed_between_sending_and_marking_sends_again(
    database_url: str, receiver: Receiver
) -> None:
    """The receiver gets the event twice, with one id and one body."""
    engine = connect(database_url)
    job_id = notified(engine, receiver.url)
    close(engine, job_id)
    (event,) = stored(engine)
    program = (
        "import sys, threading; from scheduler.notify import Notifier; "
        "from storage.database import connect; "
        "Notifier(connect(sys.argv[1]), None).run(threading.Event())"
    )
    killed = threading.Event()

    def kill(_: BaseHTTPRequestHandler) -> None:
        process.kill()
        process.wait()
        killed.set()

    receiver.before_answering = kill
    process = subprocess.Popen([sys.executable, "-c", program, database_url])
    assert killed.wait(60)
    assert process.returncode == -signal.SIGKILL
    (held,) = stored(engine)
    assert (held.state, held.attempts) == (EventState.PENDING, 1)
    assert not Notifier(engine, None).step(), "it is held for a while"
    let_delays_pass(engine)
    receiver.before_answering = lambda _: None
    assert Notifier(engine, None).step()
    assert [headers["Nightreel-Event-Id"] for _, headers, _ in receiver.got] == [event.id] * 2
    assert receiver.got[0][2] == receiver.got[1][2]
    assert stored(engine)[0].state == EventState.DELIVERED
    engine.dispose()


def test_the_scheduler_service_tells(
    tmp_path: Path, sqlite_url: str, redis_url: str, receiver: Receiver
) -> None:
    """The real service closes a finished job and tells of it, signed with the secret of its file;
    a receiver that hangs holds it up in nothing."""
    engine, told, hung = connect(sqlite_url), threading.Event(), threading.Event()
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    first = notified(engine, receiver.url)
    # What was done is not yet closed.
    with writing(engine) as connection:
        connection.execute(update(job_videos).values(state=VideoState.RUNNING))
        connection.execute(update(jobs).values(state="running", planning_finished=True))

    def hang(_: BaseHTTPRequestHandler) -> None:
        told.set()
        hung.wait(30)

    receiver.before_answering = hang
    service = subprocess.Popen(
        [sys.executable, "-m", "scheduler"],
        cwd=tmp_path,
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith("NIGHTREEL_")},
            "NIGHTREEL_DATABASE_URL": sqlite_url,
            "NIGHTREEL_BROKER_URL": redis_url,
            "NIGHTREEL_NOTIFY_SECRET_FILE": str(tmp_path / "secret"),
        },
        stderr=subprocess.DEVNULL,
    )
    try:
        assert told.wait(60)
        second = rows.planned(engine, 4, key="another")
        deadline = time.monotonic() + 30
        with redis.Redis.from_url(redis_url) as client:
            while not client.llen("nightreel"):
                assert time.monotonic() < deadline, "it feeds while the receiver hangs"
                time.sleep(0.02)
        assert second.job_id != first
        hung.set()
    finally:
        service.terminate()
        assert service.wait(30) == 0
    ((_, headers, content),) = receiver.got
    assert json.loads(content)["job"] == first
    moment = int(headers["Nightreel-Signature"].split(",")[0].removeprefix("t="))
    assert headers["Nightreel-Signature"] == signature(SECRET, moment, content)
    engine.dispose()


def test_a_notifier_waits_for_a_database_that_is_away(
    sqlite_url: str, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread outlives the outage, then delivers, and ends when told to."""
    monkeypatch.setattr(notify, "LOOK_S", 0.05)
    file = Path(sqlite_url.removeprefix("sqlite:///"))
    engine, stop, told = connect(sqlite_url), threading.Event(), threading.Event()
    with_event(engine, receiver.url)
    engine.dispose()
    receiver.before_answering = lambda _: told.set()
    away = file.with_name("away")
    os.rename(file.parent, away := file.parent.with_name(f"{file.parent.name}-away"))
    thread = threading.Thread(target=Notifier(engine, None).run, args=(stop,))
    thread.start()
    assert not told.wait(0.3)
    os.rename(away, file.parent)
    assert told.wait(30)
    stop.set()
    thread.join(30)
    assert not thread.is_alive()
    engine.dispose()


@pytest.mark.parametrize(
    "url",
    [
        "http://receiver.example",
        "https://receiver.example:8443/hook?token=s",
        "http://127.0.0.1:9/",
        "http://[::1]:9/",
    ],
)
def test_addresses_that_can_be_told(url: str) -> None:
    """Web addresses of any host and port."""
    check_url(url)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "not an http:// or https:// URL"),
        ("receiver.example/hook", "not an http:// or https:// URL"),
        ("ftp://receiver.example", "not an http:// or https:// URL"),
        ("file:///etc/passwd", "not an http:// or https:// URL"),
        ("http://", "not an http:// or https:// URL"),
        ("http://:80/", "not an http:// or https:// URL"),
        ("http://receiver.example:99999/", "not an http:// or https:// URL"),
        ("http://receiver.example:port/", "not an http:// or https:// URL"),
        ("http://[::1/", "not an http:// or https:// URL"),
        ("http://user:password@receiver.example/", "no user name"),
        ("http://receiver.example/#part", "no fragment"),
        ("http://receiver.example/a b", "percent-encode"),
        ("http://receiver.example/\r\nHost: other", "percent-encode"),
        ("http://größe.example/", "percent-encode"),
        ("http://receiver.example/" + "a" * 2000, "longer than 2000"),
    ],
)
def test_addresses_that_cannot(url: str, why: str) -> None:
    """The reason is one line, and shows no password."""
    with pytest.raises(ValueError, match=why) as error:
        check_url(url)
    assert "password" not in str(error.value)
    assert "\n" not in str(error.value)
