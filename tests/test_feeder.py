"""The scheduler's loop, whatever goes wrong around it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import redis
from pydantic import SecretStr
from rows import planned

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
from storage.database import connect
from workers.app import CLASSIFY_RANGE, make_app
from workers.settings import QueueSettings
from workers.shared import Shared


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
