"""How fast an endpoint is asked: by one process, by all together, and not while it is away."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from conftest import Service
from contract_server import ContractServer, Handler, answer_with, contract_server
from rows import planned

from scheduler.feeder import Feeder
from scheduler.settings import SchedulerSettings
from storage.database import connect
from workers.api import ApiClient, Outage
from workers.footage.picture import encode_jpeg
from workers.limits import Breaker, Concurrency, EndpointRests, RateLimit, is_resting
from workers.settings import WorkerSettings
from workers.shared import PREFIX, TURN_S, Shared

ENDPOINT = "http://api.test"


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server() -> Iterator[ContractServer]:
    with contract_server() as running:
        yield running


def jpeg() -> bytes:
    return encode_jpeg(np.full((64, 64, 3), 90, np.uint8))


# -- concurrency


def answered(
    concurrency: Concurrency, clock: Clock, seconds: float, *, refused: bool = False
) -> None:
    """As many requests as are allowed, together, each answered after `seconds`."""
    began = [concurrency.begin() for _ in range(concurrency.limit)]
    clock.sleep(seconds)
    for one in began:
        concurrency.end(one, refused=refused)


def test_concurrency_grows_by_one_a_round_up_to_its_maximum(clock: Clock) -> None:
    """From 1, one more for each round of answers, and never more than allowed."""
    concurrency = Concurrency(5, clock=clock)
    seen = []
    for _ in range(8):
        seen.append(concurrency.limit)
        answered(concurrency, clock, 0.1)
    assert seen == [1, 2, 3, 4, 5, 5, 5, 5]


def test_a_round_of_refusals_halves_concurrency_once(clock: Clock) -> None:
    """Eight refusals of requests that were under way together are one piece of news."""
    concurrency = Concurrency(8, clock=clock)
    for _ in range(8):
        answered(concurrency, clock, 0.1)
    assert concurrency.limit == 8
    answered(concurrency, clock, 0.1, refused=True)
    assert concurrency.limit == 4
    answered(concurrency, clock, 0.1, refused=True)
    answered(concurrency, clock, 0.1, refused=True)
    answered(concurrency, clock, 0.1, refused=True)
    assert concurrency.limit == 1


def test_rising_latency_halves_concurrency_and_a_lasting_one_becomes_normal(clock: Clock) -> None:
    """Answers that take three times as long halve it; once they have taken so long for a while, it
    grows again."""
    concurrency = Concurrency(8, clock=clock)
    for _ in range(12):
        answered(concurrency, clock, 0.1)
    lowest = 8
    for _ in range(20):
        answered(concurrency, clock, 0.3)
        lowest = min(lowest, concurrency.limit)
    assert lowest <= 4
    for _ in range(20):
        answered(concurrency, clock, 0.3)
    assert concurrency.limit == 8


def test_no_more_requests_begin_than_are_allowed() -> None:
    """A thread that may not begin waits until another has ended."""
    concurrency = Concurrency(3)
    running, most, lock = [0], [0], threading.Lock()

    def request(_: int) -> None:
        began = concurrency.begin()
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.002)
        with lock:
            running[0] -= 1
        concurrency.end(began, refused=False)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(request, range(60)))
    assert most[0] == 3


def test_requests_begin_in_the_order_in_which_they_came() -> None:
    """Nobody overtakes a request that waits for its turn, or its range would wait for it."""
    concurrency = Concurrency(1)
    running = concurrency.begin()
    order: list[int] = []

    def request(n: int) -> None:
        began = concurrency.begin()
        order.append(n)
        concurrency.end(began, refused=False)

    with ThreadPoolExecutor(20) as pool:
        for n in range(20):
            pool.submit(request, n)
            while len(concurrency._waiting) <= n:
                time.sleep(0.0005)
        concurrency.end(running, refused=False)
    assert order == list(range(20))


def test_a_request_that_gives_up_waiting_leaves_its_turn_to_the_next() -> None:
    """A signal that ends a wait, such as that of a task's time limit, costs no later request its
    turn."""

    class GaveUp(BaseException):
        pass

    def give_up(*_: object) -> None:
        raise GaveUp

    concurrency = Concurrency(1)
    running = concurrency.begin()

    def begin_for_a_moment() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        concurrency.begin()

    before = signal.signal(signal.SIGALRM, give_up)
    try:
        with pytest.raises(GaveUp):
            begin_for_a_moment()
    finally:
        signal.signal(signal.SIGALRM, before)
    concurrency.end(running, refused=False)
    concurrency.end(concurrency.begin(), refused=False)


@pytest.mark.parametrize("status", [429, 503])
def test_the_client_asks_a_server_that_refuses_less(server: ContractServer, status: int) -> None:
    """A refusal for want of capacity halves what is under way, and answers raise it again."""
    client = ApiClient(WorkerSettings(api_url=server.url, api_in_flight=4), sleep=lambda _: None)
    client.endpoint()
    for _ in range(8):
        client.embed_images([jpeg()])
    assert client.wire._concurrency.limit >= 3
    server.script = [answer_with(status, {})] * 2
    client.embed_images([jpeg()])
    assert client.wire._concurrency.limit <= 2


# -- the rate that all keep together


def test_all_workers_together_keep_to_the_rate(redis_url: str, clock: Clock) -> None:
    """Four workers that ask at once are told to come one after the other, at the rate of one."""
    limits = [RateLimit(Shared(redis_url), ENDPOINT, 5, clock=clock) for _ in range(4)]
    waits = [limit.wait_s() for _ in range(5) for limit in limits]
    assert waits == pytest.approx([0.2 * n for n in range(20)], abs=1e-3)
    clock.sleep(100)
    assert limits[0].wait_s() == 0


def test_an_idle_time_is_made_up_for_by_a_moment(redis_url: str, clock: Clock) -> None:
    """However long nothing was asked, a tenth of a second's requests go at once, and no more."""
    limit = RateLimit(Shared(redis_url), ENDPOINT, 50, clock=clock)
    limit.wait_s()
    clock.sleep(100)
    waits = [limit.wait_s() for _ in range(8)]
    assert waits == pytest.approx([0, 0, 0, 0, 0, 0.02, 0.04, 0.06], abs=1e-3)


def test_the_rate_is_kept_by_the_clock_of_redis(redis_url: str) -> None:
    """Threads that really wait make no more calls than the rate allows, and hardly fewer."""

    def took_s(endpoint: str) -> float:
        limits = [RateLimit(Shared(redis_url), endpoint, 200) for _ in range(4)]
        start = time.monotonic()

        def call(n: int) -> float:
            time.sleep(limits[n % 4].wait_s())
            return time.monotonic() - start

        with ThreadPoolExecutor(4) as pool:
            last = max(pool.map(call, range(200)))
        assert last >= (200 - 20) / 200
        return last

    # A machine may stand still once.
    assert any(took_s(f"{ENDPOINT}/{again}") < 2.5 for again in range(3))


def test_keys_are_named_and_do_not_stay(redis_url: str) -> None:
    """Whatever is kept in Redis bears the project's name and an end."""
    shared = Shared(redis_url, "queue")
    RateLimit(shared, ENDPOINT, 5).wait_s()
    for _ in range(10):
        Breaker(shared, ENDPOINT, probe_s=1).failed("away")
    with shared.turn("question"), redis.Redis.from_url(redis_url) as client:
        keys = client.keys()
        assert len(keys) >= 4
        for key in keys:
            assert key.decode().startswith(PREFIX)
            assert 0 < client.ttl(key) <= 3600


def test_without_redis_a_worker_keeps_to_its_share(
    redis_url: str, redis_service: Service, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """When Redis goes away, two workers at 10 a second make 5 each; it is said once, and asking
    costs nothing; when it is back, they share again."""
    caplog.set_level(logging.INFO)
    shared = [Shared(redis_url, clock=clock) for _ in range(2)]
    first, second = (RateLimit(one, ENDPOINT, 10, clock=clock) for one in shared)
    second._me += "-2"
    first.wait_s()
    second.wait_s()
    first.wait_s()
    redis_service.stop()
    clock.sleep(10)
    assert [first.wait_s() for _ in range(3)] == pytest.approx([0.0, 0.2, 0.4])
    assert sum("Redis is away" in r.message for r in caplog.records) == 1
    redis_service.start()
    clock.sleep(10)
    assert first.wait_s() == 0
    assert sum("Redis is back" in r.message for r in caplog.records) == 1


def test_a_socket_serves_as_well_as_a_port(_redis_binary: str, tmp_path: Path) -> None:  # noqa: PT019
    """The queue of one-machine mode listens on a socket, in the words of Celery's addresses."""
    socket = tmp_path / "queue.sock"
    url = f"redis+socket://{socket}"
    with redis.Redis.from_url(f"unix://{socket}?db=1") as client:

        def answers() -> bool:
            try:
                return bool(client.ping())
            except redis.ConnectionError:
                return False

        command = [_redis_binary, "--port", "0", "--unixsocket", str(socket), "--save", ""]
        service = Service([*command, "--dir", str(tmp_path)], tmp_path / "log", answers)
        service.start()
        try:
            shared = Shared(f"{url}?virtual_host=1")
            limit = RateLimit(shared, ENDPOINT, 1)
            assert limit.wait_s() == 0
            assert limit.wait_s() > 0.9
            assert client.dbsize() == 2
        finally:
            service.stop()


def test_a_queue_that_is_no_single_redis_limits_each_worker_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An address that redis-py does not know is said once and stops nothing."""
    shared = Shared("sentinel://host:26379")
    limit = RateLimit(shared, ENDPOINT, 1000)
    assert limit.wait_s() == 0
    assert limit.wait_s() > 0
    assert not is_resting(shared)
    with shared.turn("question"):
        pass
    assert sum("not shared" in r.message for r in caplog.records) == 1


# -- the circuit breaker


def breaker(redis_url: str, clock: Clock, queue: str = "q") -> Breaker:
    return Breaker(Shared(redis_url, queue), ENDPOINT, probe_s=30, clock=clock)


def refused_for(one: Breaker) -> float:
    """Seconds that a call is turned away for; 0 where it would go."""
    try:
        with one.admitted():
            return 0.0
    except EndpointRests as error:
        return error.wait_s


def open_up(one: Breaker, clock: Clock) -> None:
    for _ in range(5):
        with one.admitted():
            one.failed("no connection")
        clock.sleep(1)


def test_a_breaker_opens_for_all_and_closes_for_all(
    redis_url: str, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """Failures that one worker meets keep the others from calling; one call decides, and its
    success lets all go again. Two lines are logged, whoever saw it."""
    one, other = breaker(redis_url, clock), breaker(redis_url, clock)
    open_up(one, clock)
    assert refused_for(other) == pytest.approx(4, abs=0.1)
    assert is_resting(Shared(redis_url, "q"), clock=clock)
    clock.sleep(4.1)
    with other.admitted():
        assert refused_for(one) == pytest.approx(1, abs=0.1)
        assert is_resting(Shared(redis_url, "q"), clock=clock)
        other.succeeded()
    assert refused_for(one) == 0
    assert not is_resting(Shared(redis_url, "q"), clock=clock)
    said = [r.message for r in caplog.records if r.name == "workers.limits"]
    assert said == [
        f"the API at {ENDPOINT} is given a rest: no connection",
        f"the API at {ENDPOINT} answers again",
    ]


def test_a_probe_that_fails_doubles_the_rest(redis_url: str, clock: Clock) -> None:
    """5, 10, 20, 40 and then 60 seconds."""
    one = breaker(redis_url, clock)
    open_up(one, clock)
    rests = []
    for _ in range(5):
        clock.sleep(100)
        with one.admitted():
            one.failed("no connection")
        rests.append(refused_for(one))
    assert rests == pytest.approx([10, 20, 40, 60, 60], abs=0.1)


def test_retry_after_lengthens_the_rest(redis_url: str, clock: Clock) -> None:
    """An endpoint that says when it will be back is not asked before."""
    one = breaker(redis_url, clock)
    for _ in range(5):
        one.failed("maintenance", retry_after_s=45)
        clock.sleep(1)
    assert refused_for(one) == pytest.approx(44, abs=0.1)


def test_a_burst_of_refusals_or_one_answer_among_them_opens_nothing(
    redis_url: str, clock: Clock
) -> None:
    """Many failures within a moment, or failures between answers, are no outage."""
    one = breaker(redis_url, clock)
    for _ in range(20):
        one.failed("full")
    assert refused_for(one) == 0
    one.succeeded()
    for _ in range(10):
        clock.sleep(1)
        with one.admitted():
            one.failed("full")
        with one.admitted():
            one.succeeded()
    assert refused_for(one) == 0


def test_a_probe_that_vanishes_is_followed_by_another(redis_url: str, clock: Clock) -> None:
    """A worker killed while its call decides holds the others up for the time of a call only."""
    dying, other = breaker(redis_url, clock), breaker(redis_url, clock)
    open_up(dying, clock)
    clock.sleep(10)
    with dying.admitted():
        assert refused_for(other) > 0
    clock.sleep(31)
    assert refused_for(other) == 0


def test_a_call_that_is_not_made_decides_nothing(
    redis_url: str, clock: Clock, server: ContractServer
) -> None:
    """Where the budget is spent just as an endpoint is to be asked again, the next call decides,
    of whichever process, and at once."""

    class NoneLeft(Exception):
        pass

    class Empty:
        def take(self) -> None:
            raise NoneLeft

        def refund(self) -> None:
            raise AssertionError("nothing was taken")

    shared = Shared(redis_url, "q")
    client = ApiClient(WorkerSettings(api_url=server.url), shared, clock=clock)
    other = Breaker(Shared(redis_url, "q"), client.base, probe_s=30, clock=clock)
    open_up(other, clock)
    clock.sleep(10)
    client.wire.purse = Empty()
    with pytest.raises(NoneLeft):
        client.embed_texts(["a"])
    assert not is_resting(shared, clock=clock)
    with other.admitted():
        other.failed("no connection")
    assert refused_for(other) == pytest.approx(10, abs=0.1)
    assert is_resting(shared, clock=clock)
    client.close()
    shared.close()


def test_calls_of_one_process_wait_for_the_one_that_decides(redis_url: str, clock: Clock) -> None:
    """The other threads of a process whose call decides go on once it has succeeded, so that their
    task is not given up."""
    one = breaker(redis_url, clock)
    open_up(one, clock)
    clock.sleep(10)
    with ThreadPoolExecutor(3) as pool:
        with one.admitted():
            others = [pool.submit(refused_for, one) for _ in range(3)]
            one.succeeded()
        assert [other.result() for other in others] == [0, 0, 0]


def test_without_redis_a_breaker_lets_calls_go(clock: Clock) -> None:
    """There is nothing to share with, and retries are bounded all the same."""
    one = Breaker(Shared(), ENDPOINT, probe_s=1, clock=clock)
    for _ in range(20):
        one.failed("away")
        clock.sleep(1)
    assert refused_for(one) == 0


@pytest.mark.parametrize("address", ["q", "other"])
def test_the_feeder_keeps_tasks_while_the_api_rests(
    redis_url: str, clock: Clock, sqlite_url: str, address: str
) -> None:
    """Tasks are not published to workers that would only give them back; the queue of other
    workers is fed."""
    engine = connect(sqlite_url)
    planned(engine, 8)
    published: list[int] = []
    shared = Shared(redis_url, address)
    feeder = Feeder(
        engine,
        lambda _, ids: published.extend(ids),
        SchedulerSettings(),
        resting=lambda: is_resting(shared, clock=clock),
        clock=clock,
    )
    open_up(breaker(redis_url, clock, "q"), clock)
    feeder.step()
    assert bool(published) == (address == "other")
    clock.sleep(10)
    feeder.step()
    assert len(published) == 2
    engine.dispose()


def test_ten_minutes_of_outage(
    redis_url: str, server: ContractServer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """The API is away for ten minutes of a fast clock. Four workers with work to do ask it a few
    times a minute, log two lines in all, and go on within a minute of its return."""
    clients = [
        ApiClient(
            WorkerSettings(api_url=server.url, api_attempts=4),
            Shared(redis_url, "q"),
            sleep=clock.sleep,
            uniform=lambda _, high: high,
            clock=clock,
        )
        for _ in range(4)
    ]
    for client in clients:
        client.endpoint()
    asked_before, began = len(server.requests), clock()
    back_at = began + 600

    def away_for_a_while(handler: Handler, body: dict[str, Any]) -> None:
        status = 503 if clock() < back_at else 200
        answer_with(status, {"embeddings": [[1.0, 2.0]]})(handler, body)

    server.always = away_for_a_while
    done: list[float] = []
    due = [clock()] * len(clients)
    while len(done) < len(clients):
        # As the ledger does: a task that met an outage is due again after its delay.
        at = due.index(min(due))
        clock.now = max(clock.now, due[at])
        try:
            clients[at].embed_images([jpeg()])
        except Outage as error:
            due[at] = clock() + (error.retry_after_s or 15.0)
        else:
            done.append(clock() - began)
            due[at] = float("inf")
    assert len(server.requests) - asked_before - len(done) < 40
    assert 600 <= min(done) <= max(done) < 600 + 65
    lines = [r.message for r in caplog.records if r.name == "workers.limits"]
    assert [("rest" in line, "again" in line) for line in lines] == [(True, False), (False, True)]


def test_a_turn_of_a_dead_process_is_short(redis_url: str, tmp_path: Path) -> None:
    """A killed holder holds up the others for seconds only; a live one keeps its turn."""
    holder = f"""
import os, sys, time
from workers.shared import Shared
with Shared({redis_url!r}, "q").turn("labels"):
    print("held", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", holder], stdout=subprocess.PIPE, cwd=tmp_path
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        process.kill()
    with redis.Redis.from_url(redis_url) as client:
        (name,) = client.keys("nightreel:turn:*")
        dead = client.get(name)
        # By the clock of Redis, whatever this machine is busy with.
        assert 0 < client.pttl(name) <= TURN_S * 1000
        with Shared(redis_url, "q").turn("labels"):
            assert client.get(name) not in (None, dead)
        assert client.keys("nightreel:turn:*") == []


def test_a_turn_lasts_while_its_holder_lives(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked for anew before it runs out."""
    turn_s = 4.5
    monkeypatch.setattr("workers.shared.TURN_S", turn_s)
    with Shared(redis_url, "q").turn("labels"), redis.Redis.from_url(redis_url) as client:
        (name,) = client.keys("nightreel:turn:*")
        token = client.get(name)
        deadline = time.monotonic() + 1.2 * turn_s
        while time.monotonic() < deadline:
            assert client.get(name) == token
            time.sleep(0.05)
