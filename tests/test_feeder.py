"""The scheduler's loop, whatever goes wrong around it."""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import redis
from pydantic import SecretStr, ValidationError
from rows import RANGE, add_video, claimed, file, found, let_leases_expire, planned, spec
from sqlalchemy import Engine, event, update

from scheduler import feeder
from scheduler.feeder import (
    Feeder,
    QueueUnavailable,
    broker_address,
    check_broker,
    publisher,
)
from scheduler.metrics import Health
from scheduler.settings import SchedulerSettings
from storage import ledger, results
from storage.database import DatabaseUnavailable, connect, writing
from storage.exits import ExitCode
from storage.ledger import IncompatiblePlan
from storage.ledger.progress import BY_HAND
from storage.records import TaskState
from storage.schema import jobs
from storage.settings import complaint
from workers.app import CLASSIFY_RANGE, make_app
from workers.settings import QueueSettings
from workers.shared import Shared, redis_url


def test_a_redis_that_hangs_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes the connection and never answers stops feeding for seconds, not for the half
    minute that a worker waits for messages."""
    monkeypatch.setattr(feeder, "PUBLISH_TIMEOUT_S", 0.2)
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        address = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        app = make_app(QueueSettings(broker_url=SecretStr(address)))
        assert app.conf.broker_transport_options["socket_timeout"] == 30
        publish = publisher(app)
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(publish, CLASSIFY_RANGE, [1])
            assert isinstance(sending.exception(15), QueueUnavailable)


@pytest.mark.parametrize(
    ("address", "host", "database"),
    [
        ("redis://h", "h", 0),
        ("redis://u:p@h:6380/3", "h", 3),
        ("redis://[::1]:6379/1", "::1", 1),
        ("rediss://h/2?ssl_cert_reqs=none", "h", 2),
        ("redis+socket:///run/redis.sock?virtual_host=2", None, 2),
    ],
)
def test_an_address_of_a_redis_is_taken(address: str, host: str | None, database: int) -> None:
    """With user, password, database and options, with TLS or by its socket: Celery takes it for a
    Redis, and so do the shared limits."""
    settings = QueueSettings(broker_url=SecretStr(address))
    assert make_app(settings).connection_for_write().transport_cls in ("redis", "rediss")
    with redis.Redis.from_url(redis_url(settings.address())) as client:
        known = client.connection_pool.connection_kwargs
    assert (known.get("host"), known.get("db", 0)) == (host, database)


NO_REDIS = [
    "", "foo", "REDIS://h", "127.0.0.1:6379", "redis:/h", "redis://", "redis://h:x", "redis://[::1",
    "redis://h/zero", "redis://h:6379/0;redis://i:6379/0", "sentinel://h:26379", "http://h:6379",
    "amqp://pw-secret@h",
]  # fmt: skip


@pytest.mark.parametrize("address", NO_REDIS)
def test_an_address_of_something_else_is_refused(address: str) -> None:
    """With the shape of a right one, and without what was given: it may hold a password."""
    with pytest.raises(ValidationError) as refused:
        QueueSettings(broker_url=SecretStr(address))
    assert "NIGHTREEL_BROKER_URL: this is no address of a Redis: write redis://" in complaint(
        refused.value
    )
    assert "pw-secret" not in str(refused.value)


@pytest.mark.parametrize(
    "service", [["-m", "scheduler"], ["-m", "celery", "-A", "workers.app", "worker"]]
)
def test_a_service_with_a_wrong_address_does_not_start(
    sqlite_url: str, tmp_path: Path, service: list[str]
) -> None:
    """It ends with the code of a wrong setting and one line that names it: a word is no host of
    another kind of queue, to be asked for ever."""
    connect(sqlite_url).dispose()
    environment = {"NIGHTREEL_BROKER_URL": "foo", "NIGHTREEL_DATABASE_URL": sqlite_url}
    ended = subprocess.run(
        [sys.executable, "-P", *service],
        env=os.environ | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == ExitCode.USAGE, ended.stderr
    assert "NIGHTREEL_BROKER_URL: this is no address of a Redis" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


@pytest.fixture
def guarded(redis_url: str) -> Iterator[str]:
    """The address of a Redis that wants `pass:w/rd`."""
    with redis.Redis.from_url(redis_url) as client:
        client.config_set("requirepass", "pass:w/rd")
        yield redis_url
        client.config_set("requirepass", "")


def test_the_queue_s_password_comes_from_a_file(guarded: str, tmp_path: Path) -> None:
    """Celery and the shared limits use it; no message shows it; without it the queue is refused."""
    file = tmp_path / "password"
    file.write_text("pass:w/rd\n")
    settings = QueueSettings(broker_url=SecretStr(guarded), broker_password_file=file)
    app = make_app(settings)
    check_broker(app)
    publisher(app)(CLASSIFY_RANGE, [1])
    with closing(Shared(settings.address(), settings.queue)) as shared:
        assert shared.waiting() == 1
    assert "w/rd" not in broker_address(app)
    assert "w%2Frd" not in broker_address(app)
    with pytest.raises(QueueUnavailable):
        check_broker(make_app(QueueSettings(broker_url=SecretStr(guarded))))


def test_a_scheduler_that_stands_by_says_so(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Once as it begins to wait, and once as it takes over."""
    engine = connect(sqlite_url)
    planned(engine, 4)
    caplog.set_level("INFO")
    first, second = (
        Feeder(engine, lambda *_: None, SchedulerSettings(), name=name) for name in ("one", "two")
    )
    for one in (first, second, first, second):
        one.step()
    said = [record.getMessage() for record in caplog.records]
    assert said == ["this scheduler leads", "another scheduler leads; waiting"]
    engine.dispose()


class Told(Health):
    """Keeps what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def troubled(self, why: str) -> None:
        super().troubled(why)
        self.told.append(why)


@pytest.mark.expects_error_log("a step of the scheduler failed")
def test_a_fault_nobody_foresaw_stops_no_job(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged with its trace and told to whoever asks for the health, and the loop goes on."""
    engine = connect(sqlite_url)
    planned(engine, 4)
    published, stop = list[int](), threading.Event()
    health = Told()

    def publish(name: str, ids: Sequence[int]) -> None:
        if not faults:
            published.extend(ids)
            stop.set()
            return
        raise faults.pop()

    faults = [KeyError("unforeseen")]
    settings = SchedulerSettings(feed_interval_s=0.01, queued_timeout_s=1, sweep_interval_s=0.01)
    Feeder(engine, publish, settings, waiting=lambda: 0).run(stop, health)
    assert published
    assert "KeyError" in caplog.text
    assert health.told == ["KeyError: 'unforeseen'"]
    assert health.complaint is None
    engine.dispose()


def test_a_job_of_another_release_holds_up_no_other(engine: Engine) -> None:
    """It is fed as any job is, since a worker of its release may be there; those at hand leave its
    tasks to rest, and all of ours are done and closed meanwhile, sweeps and all."""
    theirs = planned(engine, 40 * RANGE, key="theirs")
    ours = planned(engine, 10 * RANGE, RANGE, key="ours")
    with writing(engine) as connection:
        mine = jobs.c.id == theirs.job_id
        connection.execute(update(jobs).where(mine).values(sampling="bursts@2", version="9.0"))
    refused: list[str] = []

    def publish(name: str, ids: Sequence[int]) -> None:
        for task_id in ids:
            try:
                claim = claimed(engine, task_id)
            except IncompatiblePlan as error:
                refused.append(str(error))
            else:
                assert results.commit(engine, task_id, claim.fence, found(claim))

    settings = SchedulerSettings(window=4, queued_timeout_s=1, sweep_interval_s=0.001)
    one = Feeder(engine, publish, settings, clock=itertools.count().__next__)
    for _ in range(8):
        one.step()
    assert ledger.status(engine, ours.job_id).complete
    assert len(refused) == pytest.approx(16, abs=6)
    assert all("nightreel 9.0" in said for said in refused)
    left = ledger.status(engine, theirs.job_id)
    assert left.tasks_by_state[TaskState.PENDING] == 40
    assert left.waiting == {ledger.INCOMPATIBLE: len(refused)}


def test_the_queue_never_holds_more_than_the_window(engine: Engine, redis_url: str) -> None:
    """Nor when a job is paused and resumed time and again while nobody takes its messages, each of
    which stays; what is taken makes room."""
    job = ledger.open_job(engine, spec(), files=[file(f"f{at}") for at in range(40)])
    add_video(engine, job.id, "v", 40 * RANGE)
    queue = QueueSettings(broker_url=SecretStr(redis_url))
    settings = SchedulerSettings(window=16)
    with closing(Shared(queue.address(), queue.queue)) as shared:
        one = Feeder(engine, publisher(make_app(queue)), settings, waiting=shared.waiting)

        def again() -> int | None:
            ledger.pause_job(engine, job.id, BY_HAND, "lunch")
            ledger.resume_job(engine, job.id)
            one.step()
            return shared.waiting()

        one.step()
        assert shared.waiting() == 18
        assert [again() for _ in range(5)] == [18] * 5
        with redis.Redis.from_url(redis_url) as client:
            client.ltrim(queue.queue, 0, 9)
        assert [again(), again()] == [18, 18]


def test_a_queue_that_is_away_is_told_once(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And once more for another reason, and when it is back; the work waits meanwhile."""
    engine = connect(sqlite_url)
    planned(engine, 4 * RANGE)
    caplog.set_level("INFO", "scheduler.feeder")
    answers = iter(["it is away"] * 9 + ["it is full"] * 9)

    def publish(name: str, ids: Sequence[int]) -> None:
        if (answer := next(answers, None)) is not None:
            raise QueueUnavailable(answer)

    one = Feeder(engine, publish, SchedulerSettings(), clock=itertools.count(0, 3).__next__)
    while one.step() != 4:
        pass
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "this scheduler leads",
        "it is away; 4 messages wait in the ledger",
        "it is full; 4 messages wait in the ledger",
        "the queue takes messages again",
    ]
    engine.dispose()


class Outage(Health):
    """The database is away until the scheduler has noticed; then it goes round once more."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.stop = threading.Event()
        self._away = True
        event.listen(engine, "before_cursor_execute", self._refuse)

    def _refuse(self, *_: object) -> None:
        if self._away:
            raise DatabaseUnavailable("away")

    def troubled(self, why: str) -> None:
        super().troubled(why)
        self._away = False

    def stepped(self) -> None:
        super().stepped()
        self.stop.set()


def test_nothing_is_swept_before_workers_had_time_to_speak(engine: Engine) -> None:
    """While the database was away they could extend no lease: after an outage, and at its start,
    when it cannot know, the scheduler waits before it takes those that ran out."""
    job = planned(engine, RANGE)
    now = 0.0
    settings = SchedulerSettings(queued_timeout_s=60, sweep_interval_s=1, feed_interval_s=0.001)
    one = Feeder(engine, lambda *_: None, settings, clock=lambda: now)

    def swept_at(seconds: float) -> bool:
        nonlocal now
        now = seconds
        one.step()
        return ledger.status(engine, job.job_id).tasks_by_state[TaskState.LEASED] == 0

    (fed,) = ledger.feed(engine, 1)
    claimed(engine, fed)
    let_leases_expire(engine)
    assert [swept_at(seconds) for seconds in (0, 59, 61)] == [False, False, True]
    claimed(engine, fed)
    let_leases_expire(engine)
    now = 100
    outage = Outage(engine)
    one.run(outage.stop, outage)
    assert [swept_at(seconds) for seconds in (100, 159, 161)] == [False, False, True]
