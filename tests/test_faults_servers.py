"""Redis, the database and the API taken away in the middle of a run: an outage costs time, and
neither an attempt nor a result."""

from __future__ import annotations

import itertools
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
import redis
from conftest import Service, missing
from farm import LEASE_S, RATE, Farm, let_pass, wait_until

pytestmark = pytest.mark.timeout(400)

Refusal = tuple[int, dict[str, str]]


@pytest.fixture
def farm(tmp_path: Path, postgres_url: str, redis_url: str) -> Iterator[Farm]:
    with Farm(tmp_path, postgres_url, redis_url) as made:
        made.scheduler()
        made.workers("one")
        made.workers("two")
        yield made


@pytest.fixture
def durable(postgres_url: str) -> None:
    """A database that keeps what it said it had committed when its server is killed."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        name = connection.info.dbname
        connection.execute(f"ALTER DATABASE {name} SET synchronous_commit = on")  # type: ignore[arg-type]


def test_a_wiped_redis_loses_nothing(farm: Farm) -> None:
    """FLUSHALL takes messages and hints; the ledger sends again what nobody answers."""
    with redis.Redis.from_url(farm.redis_url) as client:
        for share in (0.1, 0.3, 0.5, 0.7):
            farm.until_done(share)
            client.flushall()
    farm.finish()
    farm.check()


@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
def test_a_redis_that_goes_and_comes_loses_nothing(
    farm: Farm, redis_service: Service, kill: bool
) -> None:
    """Workers and scheduler wait for the queue, and go on with it."""
    for share in (0.2, 0.5):
        farm.until_done(share)
        redis_service.stop(kill=kill)
        # What was at work ends without a queue.
        wait_until(lambda: not farm.count(LEASED), "no task under a lease")
        redis_service.start()
    farm.finish()
    farm.check()


LEASED = "SELECT COUNT(*) FROM tasks WHERE state = 'leased'"


@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
@pytest.mark.parametrize("away_s", [0, LEASE_S + 2], ids=["restarted", "away"])
def test_a_postgresql_that_goes_and_comes_loses_nothing(
    durable: None, farm: Farm, postgres_service: Service, kill: bool, away_s: int
) -> None:
    """Work under way is committed once the database is back, though its leases ran out while
    nobody could extend them."""
    for share in (0.2, 0.5):
        farm.until_done(share)
        postgres_service.stop(kill=kill)
        let_pass(away_s)
        postgres_service.start()
    farm.finish()
    farm.check()


@pytest.mark.parametrize(
    "answer",
    [(429, {"Retry-After": "1"}), (429, {}), (503, {}), (500, {})],
    ids=["429-retry-after", "429", "503", "500"],
)
def test_an_api_that_refuses_in_bursts_costs_no_attempt(farm: Farm, answer: Refusal) -> None:
    """Refused calls are made again, soon or when the task's turn comes again."""
    for share in (0.1, 0.3, 0.5):
        farm.until_done(share)
        before = farm.api.refused
        farm.api.refusal = lambda: answer
        wait_until(lambda at=before: farm.api.refused > at + 3, "some calls are refused")
        farm.api.refusal = lambda: None
    farm.finish()
    farm.check()


def test_an_api_that_is_away_costs_no_attempt(farm: Farm) -> None:
    """A port where nothing listens for longer than a lease delays the run."""
    farm.until_done(0.3)
    farm.api.stop()
    let_pass(LEASE_S + 1)
    farm.api.start()
    farm.finish()
    farm.check()


def test_a_slow_api_costs_no_attempt(tmp_path: Path, postgres_url: str, redis_url: str) -> None:
    """Answers that come late, and some that come after anybody waits for them."""
    patience_s = 3
    late = itertools.count(1)
    given_up: list[int] = []

    def delay_s() -> float:
        call = next(late)
        if call % 40 == 0:
            given_up.append(call)
            return patience_s + 0.5
        return 0.3 if call % 80 > 60 else 0.03

    with Farm(tmp_path, postgres_url, redis_url) as farm:
        farm.api.delay_s = delay_s
        farm.scheduler()
        for name in ("one", "two"):
            farm.workers(name, NIGHTREEL_API_READ_TIMEOUT_S=str(patience_s))
        farm.finish()
        assert given_up
        farm.check(again=len(given_up) * RATE)


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Within, the folder is a file system of its own of a few megabytes."""
    as_root = [] if os.getuid() == 0 else ["sudo", "-n"]
    options = f"size=16m,uid={os.getuid()},gid={os.getgid()},mode=700"
    mount = [*as_root, "mount", "-t", "tmpfs", "-o", options, "nightreel-test", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        missing("the right to mount a file system")
    try:
        yield
    finally:
        subprocess.run([*as_root, "umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_loses_nothing(tmp_path: Path, sqlite_url: str, redis_url: str) -> None:
    """While SQLite can write nothing everything waits; with room again it goes on by itself."""
    disk = tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk):
        (disk / "nightreel.db").write_bytes((tmp_path / "nightreel.db").read_bytes())
        with Farm(tmp_path, f"sqlite:///{disk / 'nightreel.db'}", redis_url) as farm:
            farm.scheduler()
            farm.workers("one")
            farm.workers("two")
            for share in (0.2, 0.5):
                farm.until_done(share)
                fill(disk / "ballast")
                until_nothing_is_done(farm, LEASE_S + 1)
                (disk / "ballast").unlink()
            farm.finish()
            farm.check()


def fill(file: Path) -> None:
    """Write until the disk is full."""
    with file.open("wb", buffering=0) as ballast:
        for size in (1 << 20, 1 << 12):
            try:
                while ballast.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def until_nothing_is_done(farm: Farm, seconds: float) -> None:
    """Wait until no task was done for so long."""
    seen, since = farm.done(), time.monotonic()

    def still() -> bool:
        nonlocal seen, since
        now = farm.done()
        if now != seen:
            seen, since = now, time.monotonic()
        return time.monotonic() - since > seconds

    wait_until(still, "nothing more is done")
