"""Everything that can break breaks at once, as a seed decides."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
import redis
from conftest import Service
from farm import CONCURRENCY, LEASE_S, RATE, TASKS, TRIPLED, Farm, Part, faked_clock, let_pass

pytestmark = pytest.mark.timeout(600)

FAULTS = 14


@pytest.fixture
def seed() -> int:
    """The run's seed: NIGHTREEL_TEST_SEED, or one by chance."""
    return int(os.environ.get("NIGHTREEL_TEST_SEED") or random.SystemRandom().randrange(10**6))


@pytest.fixture
def farm(tmp_path: Path, postgres_url: str, redis_url: str) -> Iterator[Farm]:
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        name = connection.info.dbname
        connection.execute(f"ALTER DATABASE {name} SET synchronous_commit = on")  # type: ignore[arg-type]
    with Farm(tmp_path, postgres_url, redis_url) as made:
        yield made


class Havoc:
    """Faults of every kind on one farm, and what each may cost."""

    def __init__(
        self, farm: Farm, redis_service: Service, postgres_service: Service, chance: random.Random
    ) -> None:
        self.farm, self.chance = farm, chance
        self._redis, self._postgres = redis_service, postgres_service
        # Every message of one comes three times. Its clock is half an hour ahead; workers with such
        # clocks have a test of their own.
        self.schedulers = [
            farm.scheduler("-c", TRIPLED, name="first", **faked_clock(1800)),
            farm.scheduler(name="second"),
        ]
        self.workers = [farm.workers("one"), farm.workers("two")]
        self._other_chance = random.Random(chance.random())
        """Of servers' faults, which happen beside the others: each draws in an order of its own."""
        self.attempts = 0
        """That may have been spent in vain."""
        self.story: list[str] = []
        self._named = 0

    def any_fault(self) -> None:
        """A fault of a process, one of a server, or both at the same time, by chance."""
        of_process: Callable[[], None] = self.chance.choice(
            [
                *(self.kill_a_process, self.kill_a_worker, self.stop_a_worker, self.end_a_worker),
                self.kill_a_scheduler,
            ]
        )
        of_server: Callable[[], None] = self.chance.choice(
            [
                *(self.wipe_redis, self.restart_redis, self.restart_postgresql),
                *(self.api_away, self.api_refuses, self.api_slow),
            ]
        )
        which = self.chance.choice(["process", "server", "both"])
        at_once = [of_server] * (which != "process") + [of_process] * (which != "server")
        self.story.append(" with ".join(fault.__name__ for fault in at_once))
        with ThreadPoolExecutor(1) as pool:
            beside = pool.submit(of_server) if which != "process" else None
            if which != "server":
                # Here, since what a thread starts ends with that thread.
                of_process()
            if beside is not None:
                beside.result()

    def kill_a_process(self) -> None:
        self.attempts += self.farm.kill_one_at_work()

    def kill_a_worker(self) -> None:
        self.attempts += CONCURRENCY
        victim = self._leaving(self.workers)
        victim.signal(signal.SIGKILL, group=self.chance.random() < 0.5)
        victim.process.wait()
        self.workers.append(self.farm.workers(self._name()))

    def stop_a_worker(self) -> None:
        self.attempts += CONCURRENCY
        stopped = self.chance.choice(self.workers)
        stopped.signal(signal.SIGSTOP, group=True)
        let_pass(LEASE_S + 1)
        stopped.signal(signal.SIGCONT, group=True)

    def end_a_worker(self) -> None:
        leaving = self._leaving(self.workers)
        leaving.signal(signal.SIGTERM)
        self.workers.append(self.farm.workers(self._name()))

    def kill_a_scheduler(self) -> None:
        victim = self._leaving(self.schedulers)
        victim.signal(signal.SIGKILL)
        victim.process.wait()
        self.schedulers.append(self.farm.scheduler(name=self._name()))

    def wipe_redis(self) -> None:
        with redis.Redis.from_url(self.farm.redis_url) as client:
            client.flushall()

    def restart_redis(self) -> None:
        self._redis.stop(kill=self._other_chance.random() < 0.5)
        let_pass(self._other_chance.choice([0, 1]))
        self._redis.start()

    def restart_postgresql(self) -> None:
        self._postgres.stop(kill=self._other_chance.random() < 0.5)
        let_pass(self._other_chance.choice([0, 1]))
        self._postgres.start()

    def api_away(self) -> None:
        self.farm.api.stop()
        let_pass(1)
        self.farm.api.start()

    def api_refuses(self) -> None:
        answer = self._other_chance.choice(
            [(429, {"Retry-After": "1"}), (429, {}), (503, {}), (500, {})]
        )
        self.farm.api.refusal = lambda: answer
        let_pass(0.5)
        self.farm.api.refusal = lambda: None

    def api_slow(self) -> None:
        usual, self.farm.api.delay_s = self.farm.api.delay_s, lambda: 1.0
        let_pass(2)
        self.farm.api.delay_s = usual

    def _leaving(self, parts: list[Part]) -> Part:
        return parts.pop(self.chance.randrange(len(parts)))

    def _name(self) -> str:
        self._named += 1
        return f"next{self._named}"


def test_all_faults_together_change_nothing(
    farm: Farm,
    redis_service: Service,
    postgres_service: Service,
    seed: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever breaks, in whatever order, while messages come three times and clocks differ:
    nothing lost, nothing done twice, the same results."""
    with capsys.disabled():
        print(f"NIGHTREEL_TEST_SEED={seed}")  # noqa: T201
    havoc = Havoc(farm, redis_service, postgres_service, random.Random(seed))
    try:
        for number in range(1, FAULTS + 1):
            farm.until_done(number * 0.8 * TASKS / FAULTS)
            havoc.any_fault()
        farm.finish(seconds=240)
        farm.check(spent=havoc.attempts, again=havoc.attempts * RATE)
    except BaseException as error:
        error.add_note(f"NIGHTREEL_TEST_SEED={seed}: {', '.join(havoc.story)}")
        raise
