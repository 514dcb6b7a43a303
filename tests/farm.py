"""A whole deployment of real processes around one job, and what must hold whatever befalls it.

Scheduler and workers are started as an operator starts them and killed as a machine kills them;
the database notes every step of every task by a trigger, so that no commit is counted by what the
code under test says of itself.
"""

from __future__ import annotations

import base64
import ctypes
import glob
import hashlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import cv2
import numpy as np
from clips import COLOURS, make_clip
from conftest import free_port, missing
from contract_server import MODEL, picture_vector, text_vector
from sqlalchemy import Engine, text

from storage import ledger
from storage.coverage import coverage
from storage.database import connect, reading, upgrade, with_retries
from storage.records import (
    ArchiveFile,
    Fit,
    JobSpec,
    Label,
    LabelSet,
    Sampling,
    VideoState,
)

VIDEOS = 12
SECONDS = 8
"""Of each video; a task is one second."""
RATE = 2
"""Samples a second, and so of a task."""
TASKS = VIDEOS * SECONDS
SAMPLES = TASKS * RATE
TOP_N = 2
CONCURRENCY = 2
LEASE_S = 6
"""A machine may stand still for seconds: that alone must not end a lease."""

SPEC = JobSpec(
    "key",
    "colours",
    Sampling(rate=Fraction(RATE)),
    Fit.CROP,
    TOP_N,
    LabelSet(
        "colours",
        (Label("red", ("red",)), Label("green", ("green", "grass")), Label("sky", ("sky",))),
    ),
    MODEL,
    None,
)

PACE = {
    "NIGHTREEL_LEASE_S": str(LEASE_S),
    "NIGHTREEL_QUEUED_TIMEOUT_S": "3",
    "NIGHTREEL_SWEEP_INTERVAL_S": "0.5",
    "NIGHTREEL_FEED_INTERVAL_S": "0.1",
    "NIGHTREEL_WINDOW": "16",
    "NIGHTREEL_LEADER_LEASE_S": "3",
    "NIGHTREEL_API_ATTEMPTS": "2",
    "NIGHTREEL_API_READ_TIMEOUT_S": "10",
}
"""Everything that waits for something lost waits seconds instead of minutes."""

TRIPLED = """
import runpy
import sys

import kombu

publish = kombu.Producer.publish

def thrice(*arguments, **options):
    for _ in range(3):
        sent = publish(*arguments, **options)
        print("sent", flush=True)
    return sent

kombu.Producer.publish = thrice
runpy.run_module("scheduler", run_name="__main__", alter_sys=True)
"""
"""A scheduler each of whose messages is sent three times."""

RESULTS = {
    "samples": "b.bucket, b.t_us, b.start_us, b.end_us, b.reused_from, b.audit_of",
    "predictions": "b.bucket, b.rank, b.label, b.similarity, b.confidence",
    "gaps": "b.start_us, b.end_us, b.kind, b.detail",
    "scenes": "b.start_us, b.end_us, b.label, b.confidence, b.peak, b.samples, b.agreeing",
    "flags": "b.label, b.samples, b.first_us, b.last_us, b.peak",
    "embeddings": "b.bucket_start, b.bucket_end, b.sampling, b.fit, b.model, b.dimension, "
    "b.times, b.vectors, b.duplicates, b.gaps",
    "job_videos": "b.state, b.duration_us, b.analysed_us, b.reason_kind, b.reason",
}
"""What a job leaves, without numbers of rows, moments and names of workers."""

AUDIT = "CREATE TABLE audit (queue TEXT, row_id BIGINT, state TEXT, why TEXT)"


def _triggers(dialect: str, table: str) -> list[str]:
    """What notes each step to a state, also to one that the row has already: nothing may be done
    twice."""
    note = f"INSERT INTO audit VALUES ('{table}', NEW.id, NEW.state, NEW.error_kind)"
    when = f"CREATE TRIGGER note_{table} AFTER UPDATE OF state ON {table}"
    if dialect == "sqlite":
        return [f"{when} BEGIN {note}; END"]
    return [
        f"CREATE FUNCTION note_{table}() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN {note}; RETURN NULL; END $$",
        f"{when} FOR EACH ROW EXECUTE FUNCTION note_{table}()",
    ]


def faked_clock(offset_s: int) -> dict[str, str]:
    """Settings of a process whose clock is so many seconds ahead; its timers run as ever."""
    found = glob.glob("/usr/lib/*/faketime/libfaketime.so.1")
    if not found:
        missing("libfaketime")
    faked = {"LD_PRELOAD": found[0], "FAKETIME": f"{offset_s:+d}"}
    able_to_sleep = {"PYTHONPATH": str(Path(__file__).with_name("faked_clock"))}
    timers = {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "FAKETIME_NO_CACHE": "1"}
    return faked | timers | able_to_sleep


def wait_until(condition: Callable[[], object], what: str, seconds: float = 120.0) -> None:
    """Return once `condition` holds; AssertionError after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not in {seconds:g} s: {what}"
        time.sleep(0.02)


def let_pass(seconds: float) -> None:
    """Let an outage last so long."""
    over = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= over, "time passes", seconds + 5)


@cache
def archive(folder: Path) -> list[ArchiveFile]:
    """Small H.264 files, no two alike, made in this folder once a process."""
    folder.mkdir()
    found = []
    for number, colours in zip(range(VIDEOS), itertools.permutations(COLOURS, 3), strict=False):
        scenes = list(zip(colours, (2, 3, SECONDS - 5), strict=True))
        stat = make_clip(folder / f"{number:02}.mp4", scenes).stat()
        found.append(ArchiveFile(str(folder / f"{number:02}.mp4"), stat.st_size, stat.st_mtime_ns))
    return found


@cache
def calm_digests(folder: Path, redis_url: str) -> dict[str, str]:
    """What the job leaves where nothing befalls it: run below this folder once a process."""
    folder = Path(tempfile.mkdtemp(prefix="calm-", dir=folder))
    url = f"sqlite:///{folder / 'nightreel.db'}"
    engine = connect(url)
    upgrade(engine)
    engine.dispose()
    with Farm(folder, url, redis_url) as farm:
        farm.scheduler()
        farm.workers("calm")
        farm.finish()
        farm.check_counts()
        return farm.digests()


class Api:
    """The CLIP contract on one port, whose answers depend on nothing but the question.

    `delay_s` and `refusal` are asked for each call: how long to wait, and the status and headers
    to answer with instead of working.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.frames = 0
        """Pictures of footage that were embedded; those that ask what the endpoint can do are
        plain grey."""
        self.refused = 0
        self.delay_s: Callable[[], float] = lambda: 0.03
        self.refusal: Callable[[], tuple[int, dict[str, str]] | None] = lambda: None
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._http: ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Listen."""
        api = self

        class Routes(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                with api._lock:
                    api._open.add(self.connection)

            def finish(self) -> None:
                with api._lock:
                    api._open.discard(self.connection)
                with suppress(OSError):
                    super().finish()

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._answer(200, {"model": MODEL, "input_size": 64})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                time.sleep(api.delay_s())
                refusal = api.refusal()
                if refusal is None:
                    self._answer(200, {"embeddings": api._vectors(body)})
                else:
                    with api._lock:
                        api.refused += 1
                    self._answer(refusal[0], {"message": "not now"}, refusal[1])

            def _answer(
                self, status: int, said: Any, headers: Mapping[str, str] | None = None
            ) -> None:
                content = json.dumps(said).encode()
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                """A client that was killed is what this is about."""

        self._http = Quiet(("127.0.0.1", self.port), Routes)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))
        self._thread.start()

    def stop(self) -> None:
        """Be gone: no port listens, and connections that were kept open are cut."""
        if self._http is None or self._thread is None:
            return
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self._http = self._thread = None

    def _vectors(self, body: Mapping[str, Any]) -> list[list[float]]:
        if "text" in body:
            asked = body["text"]
            return [text_vector(one) for one in (asked if isinstance(asked, list) else [asked])]
        images = body["image"] if isinstance(body["image"], list) else [body["image"]]
        jpegs = [base64.b64decode(one["value"]) for one in images]
        frames = sum(not _is_flat(jpeg) for jpeg in jpegs)
        with self._lock:
            self.frames += frames
        return [picture_vector(jpeg) for jpeg in jpegs]


def _is_flat(jpeg: bytes) -> bool:
    picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    return picture is not None and int(np.ptp(picture)) < 8


_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def _end_with_the_test() -> None:
    """A test run that is killed leaves nothing behind either."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass
class Part:
    """A process of the deployment, in a group of its own."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    def said(self) -> str:
        """All that it has logged."""
        return self.log.read_text(errors="replace")

    def heeds_sigterm(self) -> bool:
        """Whether it has come so far as to end in an orderly way when it is asked to."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
        return bool(caught >> (signal.SIGTERM - 1) & 1)

    def signal(self, number: signal.Signals, *, group: bool = False) -> None:
        """Send a signal to the process, or to all of its group."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number) if group else os.kill(self.pid, number)


@dataclass
class Farm:
    """One job's deployment. A context manager: leaving it ends every process."""

    folder: Path
    database_url: str
    redis_url: str
    api: Api = field(default_factory=Api)
    parts: list[Part] = field(default_factory=list)
    job_id: int = 0

    def __enter__(self) -> Self:
        self.engine: Engine = connect(self.database_url)
        with self.engine.begin() as connection:
            connection.exec_driver_sql(AUDIT)
            for table in ("probes", "tasks"):
                for statement in _triggers(self.engine.dialect.name, table):
                    connection.exec_driver_sql(statement)
        files = archive(self.folder.parent / "archive")
        job = ledger.open_job(self.engine, SPEC, task_us=1_000_000, files=files)
        self.job_id = job.id
        self.api.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for part in self.parts:
            part.process.wait()
            if kind is not None:
                print(f"--- {part.name}\n{part.said()[-3000:]}")  # noqa: T201
        self.api.stop()
        self.engine.dispose()

    # -- its processes

    def scheduler(self, *command: str, name: str = "scheduler", **settings: str) -> Part:
        """Start a scheduler; `command` in place of `-m scheduler`."""
        return self._start(name, [*(command or ("-m", "scheduler"))], settings)

    def workers(self, name: str, *, concurrency: int = CONCURRENCY, **settings: str) -> Part:
        """Start a worker of so many processes, that stand in the ledger under `name`."""
        celery = ["-m", "celery", "-A", "workers.app", "worker", "--loglevel", "INFO"]
        how = ["--concurrency", str(concurrency), "--without-gossip", "--without-mingle"]
        named = {"NIGHTREEL_WORKER_NAME": name}
        return self._start(name, [*celery, *how, "--hostname", f"{name}@%h"], named | settings)

    def _start(self, name: str, words: list[str], settings: Mapping[str, str]) -> Part:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("NIGHTREEL_")}
        services = {
            "NIGHTREEL_DATABASE_URL": self.database_url,
            "NIGHTREEL_BROKER_URL": self.redis_url,
            "NIGHTREEL_API_URL": self.api.url,
        }
        mark = {"OF_THE_TEST_IN": str(self.folder), "PYTHONUNBUFFERED": "1"}
        log = self.folder / f"{name}.log"
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=self.folder,
                env=kept | PACE | services | mark | settings,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=_end_with_the_test,  # noqa: PLW1509 - one system call
            )
        part = Part(name, process, log)
        self.parts.append(part)
        return part

    def processes(self) -> list[int]:
        """Every living process of the deployment, whoever its parent is by now."""
        wanted = b"OF_THE_TEST_IN=" + os.fsencode(self.folder) + b"\0"
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and wanted in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found

    # -- what its database says

    def rows(self, query: str, **values: Any) -> list[Any]:
        """Rows of a query, waiting for a database that is away."""

        def ask() -> list[Any]:
            with reading(self.engine) as connection:
                return list(connection.execute(text(query), values).all())

        return with_retries(ask, longest_s=0.2)

    def count(self, query: str, **values: Any) -> int:
        """The number that a query gives."""
        return int(self.rows(query, **values)[0][0] or 0)

    def done(self) -> int:
        """Tasks that are done."""
        return self.count("SELECT COUNT(*) FROM tasks WHERE state = 'done'")

    def until_done(self, tasks: float) -> None:
        """Wait until so many tasks are done, or that share of all where it is below 1."""
        wanted = tasks * TASKS if tasks < 1 else tasks
        wait_until(lambda: self.done() >= wanted, f"{wanted:g} tasks done")

    def leased_to(self, name: str) -> list[int]:
        """Tasks under a lease of the worker of this name."""
        found = self.rows(
            "SELECT id FROM tasks WHERE state = 'leased' AND worker LIKE :who ORDER BY id",
            who=f"{name}/%",
        )
        return [row[0] for row in found]

    def until_at_work(self, *parts: Part) -> None:
        """Wait until each of these workers holds a lease. The API is slow meanwhile, so that the
        others do not finish the job before."""
        usual, self.api.delay_s = self.api.delay_s, lambda: 1.0
        wait_until(
            lambda: all(self.leased_to(part.name) for part in parts),
            f"{', '.join(part.name for part in parts)} at work",
        )
        self.api.delay_s = usual

    def kill_one_at_work(self) -> bool:
        """SIGKILL a process of a pool that holds a lease on a task's first attempt; False where all
        tasks were done before."""
        killed: list[int] = []

        def kill() -> bool:
            for (worker,) in self.rows(
                "SELECT worker FROM tasks WHERE state = 'leased' AND attempts = 1 ORDER BY id"
            ):
                with suppress(ProcessLookupError):
                    os.kill(int(worker.rpartition("/")[2]), signal.SIGKILL)
                    killed.append(1)
                    return True
            return self.done() == TASKS

        wait_until(kill, "a process at work to kill")
        return bool(killed)

    # -- its end

    def finish(self, *, seconds: float = 150.0) -> None:
        """Wait until the job is closed, and see every process end by itself when it is asked to."""
        closed = "SELECT COUNT(*) FROM jobs WHERE state = 'closed'"
        try:
            wait_until(lambda: self.count(closed) == 1, "the job is closed", seconds)
        except AssertionError as error:
            error.add_note(self.standing())
            raise
        running = [part for part in self.parts if part.process.poll() is None]
        for part in running:
            wait_until(part.heeds_sigterm, f"{part.name} has started")
            part.signal(signal.SIGTERM)
        for part in running:
            assert part.process.wait(60) == 0, f"{part.name} ended with {part.process.returncode}"
        wait_until(lambda: not self.processes(), "every process has ended", 60)

    def standing(self, queue: str = "tasks") -> str:
        """How many of its rows stand how."""
        found = self.rows(f"SELECT state, COUNT(*) FROM {queue} GROUP BY state ORDER BY state")
        return ", ".join(f"{count} {state}" for state, count in found)

    def check(self, *, spent: int = 0, again: int = 0) -> None:
        """Assert that the job is what a calm run makes of it: nothing lost, nothing done twice.

        At most `spent` attempts were in vain, and `again` frames were sent more than once.
        """
        self.check_counts(spent=spent, again=again)
        assert self.digests() == calm_digests(self.folder.parent, self.redis_url)

    def check_counts(self, *, spent: int = 0, again: int = 0) -> None:
        """The same without comparing what was found."""
        for queue, rows in (("probes", VIDEOS), ("tasks", TASKS)):
            steps = self.rows("SELECT row_id, state, why FROM audit WHERE queue = :q", q=queue)
            commits = Counter(step.row_id for step in steps if step.state == "done")
            assert self.standing(queue) == f"{rows} done"
            assert len(commits) == rows
            assert set(commits.values()) == {1}, f"of {queue}, one was committed more than once"
            assert not [step for step in steps if step.state == "failed"]
            assert {step.why for step in steps} <= {None, "worker-lost", "api-outage"}
        vain = sum(
            self.count(f"SELECT SUM(attempts - 1) FROM {queue}") for queue in ("probes", "tasks")
        )
        assert vain <= spent, f"{vain} attempts were spent in vain"
        assert self.api.frames - SAMPLES <= again, f"{self.api.frames - SAMPLES} frames sent again"
        for one in coverage(self.engine, self.job_id):
            assert (one.state, one.analysed_us) == (VideoState.COMPLETE, one.duration_us)
        assert self.count("SELECT COUNT(*) FROM samples") == SAMPLES
        assert self.count("SELECT COUNT(*) FROM predictions") == SAMPLES * TOP_N

    def digests(self) -> dict[str, str]:
        """A hash of each table of results, by content."""
        found = {}
        for table, columns in RESULTS.items():
            rows = self.rows(
                f"SELECT v.content_id, {columns} FROM {table} b "
                "JOIN videos v ON v.id = b.video_id ORDER BY 1, 2, 3"
            )
            plain = [[bytes(v) if isinstance(v, memoryview) else v for v in row] for row in rows]
            found[table] = hashlib.sha256(repr(plain).encode()).hexdigest()
        return found
