"""Workers killed, stopped and multiplied, with real processes on real servers: the results are
those of a calm run."""

from __future__ import annotations

import datetime
import re
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
import redis
from farm import (
    CONCURRENCY,
    LEASE_S,
    RATE,
    TASKS,
    TRIPLED,
    VIDEOS,
    Farm,
    faked_clock,
    let_pass,
    wait_until,
)

pytestmark = pytest.mark.timeout(400)

HOUR_S = 3600

WRITERS = """
SELECT COUNT(*) FROM pg_stat_activity a WHERE a.pid <> pg_backend_pid()
AND EXISTS (SELECT 1 FROM pg_locks l WHERE l.pid = a.pid AND l.mode = 'RowExclusiveLock')
"""
"""Sessions that hold what they have written, or are about to commit it: what a process sent before
it was stopped is still carried out."""


@pytest.fixture
def farm(tmp_path: Path, postgres_url: str, redis_url: str) -> Iterator[Farm]:
    with Farm(tmp_path, postgres_url, redis_url) as made:
        yield made


@pytest.fixture
def either_farm(tmp_path: Path, database_url: str, redis_url: str) -> Iterator[Farm]:
    with Farm(tmp_path, database_url, redis_url) as made:
        yield made


def test_a_calm_run_sends_every_frame_once(either_farm: Farm) -> None:
    """Where nothing breaks, no attempt is spent in vain, and both databases hold the same."""
    farm = either_farm
    farm.scheduler()
    farm.workers("one")
    farm.workers("two")
    farm.finish()
    farm.check()


def test_killed_processes_of_a_pool_lose_nothing(either_farm: Farm) -> None:
    """A task whose process is killed is done by another; a kill costs one attempt at one task."""
    farm, kills = either_farm, 0
    farm.scheduler()
    farm.workers("one")
    farm.workers("two")
    for share in (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75):
        farm.until_done(share)
        assert farm.kill_one_at_work()
        kills += 1
    farm.finish()
    farm.check(spent=kills, again=kills * RATE)


@pytest.mark.parametrize("whole", [True, False], ids=["machine", "parent"])
def test_killed_workers_lose_nothing(farm: Farm, whole: bool) -> None:
    """A worker killed with its pool, or leaving its pool without a parent, is replaced by another;
    its tasks are done, and nothing of it stays."""
    kills = 0
    farm.scheduler()
    working = [farm.workers("one"), farm.workers("two")]
    for share in (0.1, 0.3, 0.5, 0.7):
        farm.until_done(share)
        victim = working.pop(0)
        farm.until_at_work(victim)
        victim.signal(signal.SIGKILL, group=whole)
        victim.process.wait()
        kills += 1
        working.append(farm.workers(f"again{kills}"))
    farm.finish()
    farm.check(spent=kills * CONCURRENCY, again=kills * CONCURRENCY * RATE)


def test_a_worker_that_stood_still_beyond_its_lease_commits_nothing(either_farm: Farm) -> None:
    """Tasks of a stopped worker are done by another. When it goes on it is turned away, and then
    works like any other."""
    farm = either_farm
    farm.scheduler()
    zombie = farm.workers("zombie")
    held: list[int] = []

    def stopped_at_work() -> bool:
        zombie.signal(signal.SIGSTOP, group=True)
        # In this order: a commit under way may end in between.
        if not _in_a_transaction(farm):
            held.extend(farm.leased_to("zombie"))
        if not held:
            zombie.signal(signal.SIGCONT, group=True)
        return bool(held)

    farm.until_done(0.1)
    wait_until(stopped_at_work, "the worker stopped within a task")
    farm.workers("other")
    query = f"SELECT COUNT(*) FROM tasks WHERE state = 'done' AND id IN ({str(held)[1:-1]})"
    wait_until(lambda: farm.count(query) == len(held), "the stopped worker's tasks done")
    zombie.signal(signal.SIGCONT, group=True)
    wait_until(lambda: "the lease went to another worker" in zombie.said(), "it is turned away")
    farm.finish()
    farm.check(spent=len(held), again=len(held) * RATE)
    by = farm.rows(f"SELECT worker FROM tasks WHERE id IN ({str(held)[1:-1]})")
    assert all(name.startswith("other/") for (name,) in by)


def test_a_worker_that_stands_still_within_a_transaction_holds_nobody_up(farm: Farm) -> None:
    """What it has locked is passed over; all the rest is done meanwhile."""
    farm.scheduler()
    zombie = farm.workers("zombie")
    farm.until_done(0.1)

    def stopped_within() -> bool:
        zombie.signal(signal.SIGSTOP, group=True)
        if _in_a_transaction(farm):
            let_pass(0.2)  # the scheduler's own transactions are over by then
            if _in_a_transaction(farm):
                return True
        zombie.signal(signal.SIGCONT, group=True)
        return False

    wait_until(stopped_within, "the worker stopped within a transaction")
    farm.workers("other")
    farm.until_done(TASKS - CONCURRENCY)
    zombie.signal(signal.SIGCONT, group=True)
    farm.finish()
    farm.check(spent=CONCURRENCY, again=CONCURRENCY * RATE)


def _in_a_transaction(farm: Farm) -> bool:
    """Whether a process, which may be stopped, is writing to the database."""
    if farm.engine.dialect.name == "sqlite":
        import sqlite3

        with closing(sqlite3.connect(str(farm.engine.url.database), timeout=0)) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return True
            return False
    with psycopg.connect(farm.database_url) as connection:
        found = connection.execute(WRITERS).fetchone()
    return bool(found and found[0])


def test_a_worker_asked_to_end_finishes_what_it_holds(farm: Farm) -> None:
    """SIGTERM in the middle of work costs no attempt and no call, and the worker ends with 0."""
    farm.scheduler()
    leaving = [farm.workers("one"), farm.workers("two")]
    farm.workers("stays")
    farm.until_at_work(*leaving)
    for one in leaving:
        one.signal(signal.SIGTERM)
    for one in leaving:
        assert one.process.wait(60) == 0
    farm.finish()
    farm.check()


def test_workers_come_and_go(farm: Farm) -> None:
    """From one worker to four and back to two: the same results, and nothing done twice."""
    farm.scheduler()
    farm.workers("one")
    farm.until_done(0.1)
    more = [farm.workers(name) for name in ("two", "three", "four")]
    farm.until_at_work(*more)
    for one in more[:2]:
        one.signal(signal.SIGTERM)
        assert one.process.wait(60) == 0
    farm.finish()
    farm.check()


def test_every_message_may_come_three_times(farm: Farm) -> None:
    """Two of three copies find their task taken or done, and are dropped."""
    scheduler = farm.scheduler("-c", TRIPLED)
    farm.workers("one")
    farm.workers("two")
    farm.until_done(TASKS)
    with redis.Redis.from_url(farm.redis_url) as client:
        wait_until(lambda: client.llen("nightreel") == 0, "every message is taken")
    farm.finish()
    farm.check()
    assert scheduler.said().count("sent") >= 3 * (VIDEOS + TASKS)


def test_clocks_of_machines_may_differ(farm: Farm) -> None:
    """A worker an hour ahead, one an hour behind and a scheduler half an hour ahead: leases and
    delays are held to the database's clock, and the queue's own timeouts do no harm."""
    farm.scheduler(**faked_clock(HOUR_S // 2))
    # Whoever is asked for the time by a library takes longer over everything, heartbeats as well.
    patient = {"NIGHTREEL_LEASE_S": str(2 * LEASE_S)}
    ahead = farm.workers("ahead", **faked_clock(HOUR_S), **patient)
    behind = farm.workers("behind", **faked_clock(-HOUR_S), **patient)
    farm.until_at_work(ahead, behind)
    for share in (0.2, 0.6):
        farm.until_done(share)
        assert farm.kill_one_at_work()
    farm.finish()
    farm.check(spent=2, again=2 * RATE)
    first, second = (_first_moment(one.said()) for one in (ahead, behind))
    assert abs((first - second).total_seconds() - 2 * HOUR_S) < 60
    by = farm.rows("SELECT DISTINCT worker FROM tasks")
    assert {name.partition("/")[0] for (name,) in by} == {"ahead", "behind"}


def _first_moment(said: str) -> datetime.datetime:
    found = re.search(r"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", said, re.MULTILINE)
    assert found is not None
    return datetime.datetime.fromisoformat(found.group(1))


def test_two_schedulers_and_the_death_of_one(farm: Farm) -> None:
    """Two schedulers at once do nothing twice; when one is killed the other goes on."""
    running = [farm.scheduler(name="first"), farm.scheduler(name="second")]
    farm.workers("one")
    farm.workers("two")
    for number, share in enumerate((0.2, 0.4, 0.6)):
        farm.until_done(share)
        victim = running.pop(0)
        victim.signal(signal.SIGKILL)
        victim.process.wait()
        running.append(farm.scheduler(name=f"again{number}"))
    farm.finish()
    farm.check()
