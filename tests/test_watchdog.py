"""A worker that takes nothing while messages wait is ended; one that works or waits is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from celery.worker import state
from conftest import Service

from workers.limits import Breaker
from workers.settings import QueueSettings
from workers.shared import Shared
from workers.watchdog import Stall

QUEUE = "watched"

WORKER = """
import time
from celery.signals import worker_ready
from workers import watchdog
from workers.app import make_app
from workers.settings import QueueSettings, ServiceSettings
from workers.shared import Shared

app = make_app()
app.conf.include = []

@worker_ready.connect
def watch(**_):
    queue = QueueSettings()
    shared = Shared(queue.broker_url.get_secret_value(), queue.queue)
    watchdog.start(shared, ServiceSettings().stall_s)

@app.task(name="hold")
def hold(seconds):
    time.sleep(seconds)
"""

FREEZES = """
watchdog.LAST_RESORT_S = 0.5

@worker_ready.connect
def freeze(**_):
    while True:
        time.sleep(60)
"""


class Worker:
    """A real worker whose watchdog watches `QUEUE`."""

    def __init__(
        self,
        folder: Path,
        redis_url: str,
        stall_s: float,
        queue: str = QUEUE,
        app: str = "holding",
        more: str = "",
        database_url: str = "",
    ) -> None:
        (folder / "holding.py").write_text(WORKER + more)
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "celery", "-A", app, "worker"),
                    *("--concurrency", "1", "--without-gossip", "--without-mingle"),
                    *("--loglevel", "INFO", "--queues", queue),
                ],
                cwd=folder,
                env={
                    **{k: v for k, v in os.environ.items() if not k.startswith("NIGHTREEL_")},
                    "NIGHTREEL_BROKER_URL": redis_url,
                    "NIGHTREEL_QUEUE": QUEUE,
                    "NIGHTREEL_STALL_S": str(stall_s),
                    "NIGHTREEL_DATABASE_URL": database_url,
                    "PYTHONWARNINGS": "ignore",
                },
                stdout=log,
                stderr=log,
            )

    def until(self, word: str) -> None:
        """Wait until the log holds the word."""
        deadline = time.monotonic() + 60
        while word not in (said := self.log.read_text()):
            assert time.monotonic() < deadline, f"no {word!r}: {said}"
            assert self.process.poll() is None, said
            time.sleep(0.02)

    def end(self) -> int:
        """End it politely; return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@pytest.fixture
def start(tmp_path: Path, redis_url: str) -> Iterator[Callable[..., Worker]]:
    """Starts workers that end with the test."""
    started: list[Worker] = []

    def begin(stall_s: float, **others: str) -> Worker:
        started.append(Worker(tmp_path, redis_url, stall_s, **others))
        return started[-1]

    yield begin
    for worker in started:
        worker.end()


def send(redis_url: str, *seconds: float) -> None:
    """Send tasks that take so long."""
    from workers.app import make_app

    app = make_app(QueueSettings(broker_url=redis_url, queue=QUEUE))  # type: ignore[arg-type]
    for each in seconds:
        app.send_task("hold", args=[each])
    app.close()


def test_a_deaf_worker_is_ended(
    start: Callable[..., Worker], redis_url: str, sqlite_url: str
) -> None:
    """While messages wait that it never takes, it says so in one line and ends with 1."""
    worker = start(1.5, queue="another", app="workers.app", database_url=sqlite_url)
    worker.until("ready")
    send(redis_url, 0)
    assert worker.process.wait(60) == 1
    assert worker.log.read_text().count("messages wait and this worker took none for 1.5 s") == 1


def test_a_frozen_worker_is_ended_all_the_same(
    start: Callable[..., Worker], redis_url: str
) -> None:
    """One whose own loop no longer hears that it should stop is ended by force."""
    worker = start(1.0, more=FREEZES)
    worker.until("Connected")
    send(redis_url, 0)
    assert worker.process.wait(60) == 1


def test_a_working_worker_is_left_alone(start: Callable[..., Worker], redis_url: str) -> None:
    """All its processes busy for longer than a stall, with messages waiting, then many short tasks,
    then none: it goes on through all of that."""
    worker = start(2.0)
    worker.until("ready")
    send(redis_url, 4, 0, *[0.01] * 200)
    with redis.Redis.from_url(redis_url) as client:
        deadline = time.monotonic() + 60
        while client.llen(QUEUE) or client.zcard("unacked_index"):
            assert worker.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    with pytest.raises(subprocess.TimeoutExpired):
        worker.process.wait(3)
    assert worker.end() == 0
    assert "it ends" not in worker.log.read_text()


def test_without_a_stall_time_nothing_is_watched(
    start: Callable[..., Worker], redis_url: str
) -> None:
    """0 turns it off."""
    worker = start(0, queue="another")
    worker.until("ready")
    send(redis_url, 0)
    with pytest.raises(subprocess.TimeoutExpired):
        worker.process.wait(2)
    assert worker.end() == 0


class Clock:
    """A clock that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Request:
    """Stands where Celery keeps a request."""


@pytest.fixture
def clock() -> Clock:
    """At 0."""
    return Clock()


@pytest.fixture
def shared(redis_url: str, clock: Clock) -> Iterator[Shared]:
    """A queue with one message that waits."""
    with redis.Redis.from_url(redis_url) as client:
        client.rpush(QUEUE, "message")
    made = Shared(redis_url, QUEUE, clock=clock)
    yield made
    made.close()
    state.reset_state()


def stalled_after(stall: Stall, clock: Clock, seconds: int) -> bool:
    """Look each second; whether the last look finds a stall."""
    found = False
    for _ in range(seconds):
        clock.now += 1
        found = stall.look()
    return found


def test_a_stall_is_complete_after_its_time(shared: Shared, clock: Clock) -> None:
    """Not before, and from the first look that finds it."""
    stall = Stall(shared, 10, clock=clock)
    assert not stalled_after(stall, clock, 10)
    assert stalled_after(stall, clock, 1)


def test_work_under_way_is_no_stall(shared: Shared, clock: Clock) -> None:
    """A request that is reserved or runs, however long; the time begins anew after it."""
    stall = Stall(shared, 10, clock=clock)
    assert not stalled_after(stall, clock, 9)
    request = Request()
    state.reserved_requests.add(request)
    assert not stalled_after(stall, clock, 100)
    state.reserved_requests.discard(request)
    assert not stalled_after(stall, clock, 10)
    assert stalled_after(stall, clock, 1)


def test_work_between_looks_is_no_stall(shared: Shared, clock: Clock) -> None:
    """Tasks so short that no look meets one are counted."""
    stall = Stall(shared, 10, clock=clock)
    for _ in range(100):
        state.all_total_count[0] += 1
        assert not stalled_after(stall, clock, 1)


def test_an_empty_queue_is_no_stall(shared: Shared, clock: Clock, redis_url: str) -> None:
    """A worker may wait for work for ever."""
    stall = Stall(shared, 10, clock=clock)
    assert not stalled_after(stall, clock, 9)
    with redis.Redis.from_url(redis_url) as client:
        client.delete(QUEUE)
    assert not stalled_after(stall, clock, 100)


def test_redis_away_is_no_stall(shared: Shared, clock: Clock, redis_service: Service) -> None:
    """Nothing is known while Redis is away; once it is back, with what its file kept, the time
    begins anew."""
    stall = Stall(shared, 10, clock=clock)
    assert not stalled_after(stall, clock, 9)
    redis_service.stop()
    assert not stalled_after(stall, clock, 100)
    redis_service.start()
    assert not stalled_after(stall, clock, 10)
    assert stalled_after(stall, clock, 1)


def test_a_resting_api_is_no_stall(shared: Shared, clock: Clock) -> None:
    """While the breaker of this queue's workers is open, tasks are meant to wait."""
    later = Clock()
    breaker = Breaker(
        shared, "http://api.example", probe_s=1, clock=lambda: time.time() + later.now
    )
    for _ in range(Breaker.FAILURES):
        breaker.failed("away", 60)
    later.now = 2 * Breaker.PATIENCE_S
    breaker.failed("away", 60)
    stall = Stall(shared, 10, clock=clock)
    assert not stalled_after(stall, clock, 100)
    later.now = 100
    with breaker.admitted():
        breaker.succeeded()
    assert not stalled_after(stall, clock, 10)
    assert stalled_after(stall, clock, 1)
