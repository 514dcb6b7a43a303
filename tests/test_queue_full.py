"""A Redis that is there and takes nothing, since it is full or cannot persist: workers and
scheduler wait as for one that is away, go on by themselves, and those who watch are told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import redis
from celery.worker import state
from conftest import Service, free_port
from farm import Farm, wait_until
from prometheus_client import CollectorRegistry

from scheduler.metrics import LedgerCollector
from storage import database
from storage.exits import ExitCode
from workers.limits import is_resting
from workers.shared import REST_S, Shared
from workers.watchdog import Stall

QUEUE = "nightreel"


class Refusing:
    """A Redis of a test's own that can be made to refuse, and what it says then."""

    def __init__(self, url: str, folder: Path, why: str) -> None:
        self.url = url
        self.says = {"full": "used memory > 'maxmemory'", "unable": "MISCONF"}[why]
        self.client = redis.Redis.from_url(url)
        self._why = why
        # A file cannot be moved to where a folder is, not by root either.
        self._in_the_way = folder / "dump.rdb"

    def refuse(self) -> None:
        """Answer whoever writes with an error from now on."""
        if self._why == "full":
            self.client.config_set("maxmemory", 1)
            return
        self._in_the_way.unlink(missing_ok=True)
        self._in_the_way.mkdir()
        self.client.bgsave()
        wait_until(self._has_failed, "Redis fails to write its file")

    def _has_failed(self) -> bool:
        return self.client.info("persistence")["rdb_last_bgsave_status"] == "err"

    def relent(self) -> None:
        """Take what is written again."""
        if self._why == "full":
            self.client.config_set("maxmemory", 0)
            return
        self._in_the_way.rmdir()
        self.client.save()


@pytest.fixture(params=["full", "unable"])
def refusing(
    request: pytest.FixtureRequest, _redis_binary: str, tmp_path: Path
) -> Iterator[Refusing]:
    """A Redis that does not refuse yet, once of each kind of refusal."""
    folder = tmp_path / "redis"
    folder.mkdir()
    port = free_port()
    made = Refusing(f"redis://127.0.0.1:{port}/0", folder, request.param)

    def answers() -> bool:
        try:
            return bool(made.client.ping())
        except redis.ConnectionError:
            return False

    command = [_redis_binary, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    # It saves when it is told to; were saving off, its failure would count for nothing.
    options = ["--save", "3600 1000000", "--appendonly", "no", "--maxmemory-policy", "noeviction"]
    service = Service([*command, *options], folder / "log", answers)
    service.start()
    yield made
    made.client.close()
    service.stop(kill=True)  # one that cannot save would refuse to end


@pytest.mark.timeout(400)
def test_a_redis_that_refuses_is_waited_for(
    refusing: Refusing, tmp_path: Path, sqlite_url: str, redis_url: str
) -> None:
    """Workers at work, an idle one and one that starts meanwhile stay, say what Redis says, and
    finish the job once it takes messages again: nothing is lost, no attempt spent."""
    with Farm(tmp_path, sqlite_url, refusing.url) as farm:
        idle = farm.workers("idle", NIGHTREEL_QUEUE="another")
        wait_until(lambda: "ready" in idle.said(), "the idle worker is there")
        scheduler = farm.scheduler()
        busy = farm.workers("busy")
        farm.until_done(0.2)
        refusing.refuse()
        late = farm.workers("late")
        waiting = [busy, late] if refusing.says != "MISCONF" else [busy, late, idle]
        for worker in waiting:
            wait_until(
                lambda of=worker: (
                    "Cannot connect to redis" in of.said()  # type: ignore[misc]
                    and refusing.says in of.said()
                ),
                f"{worker.name} waits for Redis",
            )
        leased = "SELECT COUNT(*) FROM tasks WHERE state = 'leased'"
        wait_until(lambda: not farm.count(leased), "what was at work has ended")
        wait_until(lambda: "messages wait in the ledger" in scheduler.said(), "it is said")
        assert [part.process.poll() for part in farm.parts] == [None] * 4
        refusing.relent()
        farm.finish()
        farm.redis_url = redis_url  # of the calm run, which all tests share
        farm.check()
        assert all("Unrecoverable" not in part.said() for part in farm.parts)


class Clock:
    """A clock that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def samples(collector: LedgerCollector) -> Callable[..., float | None]:
    """What it shows, by name and labels."""
    registry = CollectorRegistry()
    registry.register(collector)
    return registry.get_sample_value


def test_a_queue_that_refuses_is_not_up(refusing: Refusing, sqlite_url: str) -> None:
    """Though it would still tell its length: no message could be sent."""
    clock = Clock()
    engine = database.connect(sqlite_url)
    refusing.client.lpush(QUEUE, "message")
    with closing(Shared(refusing.url, QUEUE, clock=clock)) as shared:
        value = samples(LedgerCollector(engine, shared.waiting, lambda: True))
        seen = []
        for step in (lambda: None, refusing.refuse, refusing.relent):
            step()
            clock.now += REST_S + 1
            up = value("nightreel_up", {"service": "queue"})
            seen.append((up, value("nightreel_queue_length")))
            clock.now += REST_S + 1
    assert seen == [(1, 1), (0, None), (1, 1)]
    engine.dispose()


def test_a_redis_that_refuses_is_told_of_once(
    refusing: Refusing, caplog: pytest.LogCaptureFixture
) -> None:
    """In its own words; that it still answers whoever reads does not make it back."""
    caplog.set_level("INFO")
    clock = Clock()
    with closing(Shared(refusing.url, QUEUE, clock=clock)) as shared:
        refusing.refuse()
        for _ in range(3):
            assert shared.waiting() is None
            clock.now += REST_S + 1
            assert not is_resting(shared)
            clock.now += REST_S + 1
        refusing.relent()
        assert shared.waiting() == 0
    away, back = (record.getMessage() for record in caplog.records)
    assert away.startswith("Redis is away (")
    assert refusing.says in away
    assert back == "Redis is back: limits are shared again"


def test_a_redis_that_refuses_is_no_stall(refusing: Refusing) -> None:
    """A worker takes nothing then, and ending it would help nobody; once Redis takes messages
    again, the time begins anew."""
    clock = Clock()
    refusing.client.lpush(QUEUE, "message")
    state.reset_state()
    with closing(Shared(refusing.url, QUEUE, clock=clock)) as shared:
        stall = Stall(shared, 10, clock=clock)

        def stalled_after(seconds: int) -> bool:
            found = False
            for _ in range(seconds):
                clock.now += 1
                found = stall.look()
            return found

        assert not stalled_after(10)
        refusing.refuse()
        assert not stalled_after(60)
        refusing.relent()
        assert not stalled_after(10)
        assert stalled_after(6)


@pytest.mark.parametrize("command", ["doctor", "scheduler"])
def test_who_asks_is_told_that_the_queue_refuses(
    refusing: Refusing, command: str, sqlite_url: str, tmp_path: Path
) -> None:
    """The doctor, and a scheduler that starts, end with the code of the queue and its words."""
    refusing.refuse()
    ended = subprocess.run(
        [Path(sys.executable).with_name("nightreel"), command],
        env={
            "PATH": "/usr/bin:/bin",
            "NIGHTREEL_BROKER_URL": refusing.url,
            "NIGHTREEL_DATABASE_URL": sqlite_url,
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == ExitCode.QUEUE, ended
    (line,) = [one for one in (ended.stdout + ended.stderr).splitlines() if "queue" in one]
    assert "the queue takes no messages, Redis refuses: " in line
    assert refusing.says in line
    assert "start Redis" not in line
