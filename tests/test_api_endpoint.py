"""What an endpoint can do is asked once a job, and anew where it answers otherwise than it did."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import redis
from conftest import Service
from contract_server import ContractServer, answer_with, contract_server
from rows import planned
from sqlalchemy import Engine, select

from storage import ledger
from storage.database import connect, reading
from storage.endpoints import known_endpoint, store_endpoint
from storage.purge import purge_job
from storage.schema import job_endpoints
from workers.api import ApiClient, JobStopped, Outage
from workers.footage.picture import encode_jpeg
from workers.once import KeptAnswers
from workers.settings import WorkerSettings
from workers.shared import Shared


@pytest.fixture
def server() -> Iterator[ContractServer]:
    with contract_server() as running:
        yield running


class Worker:
    """The client of one worker process, at work for a job."""

    def __init__(
        self,
        server: ContractServer,
        redis_url: str | None,
        engine: Engine,
        job_id: int,
        **settings: Any,
    ) -> None:
        self.shared = Shared(redis_url)
        self.kept = KeptAnswers(engine, self.shared)
        self.api = ApiClient(
            WorkerSettings(api_url=server.url, **settings), self.shared, sleep=lambda _: None
        )
        self.begin(job_id)

    def begin(self, job_id: int) -> None:
        """Begin a task of that job."""
        self.job_id = job_id
        self.next_task()

    def next_task(self) -> None:
        """Begin another task of the same job."""
        self.api.work_for(self.job_id, functools.partial(self.kept.of_endpoint, self.job_id))

    @property
    def way(self) -> tuple[bool, int]:
        found = self.api.endpoint()
        return found.embeds, found.batch

    def close(self) -> None:
        self.api.close()
        self.shared.close()


@pytest.fixture
def job_id(engine: Engine) -> int:
    return planned(engine, 4).job_id


@pytest.fixture
def workers(
    server: ContractServer, redis_url: str, engine: Engine, job_id: int
) -> Iterator[list[Worker]]:
    """Four processes' clients that share one Redis and one database."""
    made = [Worker(server, redis_url, engine, job_id) for _ in range(4)]
    yield made
    for one in made:
        one.close()


def pictures(n: int) -> list[bytes]:
    random = np.random.default_rng(5)
    return [encode_jpeg(random.integers(0, 255, (64, 64, 3), np.uint8)) for _ in range(n)]


def kept(engine: Engine) -> list[tuple[int, bool, int]]:
    """What the database holds: job, whether the endpoint embeds, pictures a call."""
    wanted = job_endpoints.c["job_id", "embeds", "batch"]
    with reading(engine) as connection:
        return [tuple(row) for row in connection.execute(select(*wanted).order_by(*wanted))]


def asked(server: ContractServer) -> int:
    """How often the endpoint was asked whether it takes lists: by two plain pictures."""
    lists = [body.get("image") for path, body, _ in server.requests if path == "/clip/embed_image"]
    return sum(isinstance(one, list) and len(one) == 2 for one in lists)


def test_workers_at_once_ask_once_a_job(server: ContractServer, workers: list[Worker]) -> None:
    """Four workers that begin together, and again with their next tasks, cost one question."""
    start = threading.Barrier(len(workers))

    def begin(worker: Worker) -> tuple[bool, int]:
        start.wait()
        return worker.way

    for _ in range(2):
        with ThreadPoolExecutor(len(workers)) as pool:
            assert list(pool.map(begin, workers)) == [(True, 8)] * 4
        for worker in workers:
            worker.next_task()
    assert asked(server) == len(server.requests) == 1


def test_what_redis_forgets_is_not_asked_again(
    server: ContractServer, redis_url: str, redis_service: Service, workers: list[Worker]
) -> None:
    """A worker that comes to the job later finds what the first one was told, also in a Redis that
    was wiped, and in none."""
    first, second, third, _ = workers
    assert first.way == (True, 8)
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    assert second.way == (True, 8)
    redis_service.stop()
    assert third.way == (True, 8)
    assert asked(server) == len(server.requests) == 1


def test_an_answer_outlasts_a_database_that_is_away(
    postgres_url: str, postgres_service: Service
) -> None:
    """It was paid for: it is kept once the database is back, and not asked for again."""
    engine = connect(postgres_url)
    job_id = planned(engine, 4).job_id
    answers = KeptAnswers(engine, Shared())
    back = threading.Thread(target=postgres_service.start)

    def ask() -> tuple[bool, int]:
        postgres_service.stop()
        back.start()
        return True, 8

    assert answers.of_endpoint(job_id, "endpoint", ask, None) == (True, 8)
    back.join()
    assert known_endpoint(engine, job_id, "endpoint") == (True, 8)
    engine.dispose()


def test_workers_that_ask_at_once_without_redis_go_by_one_answer(
    server: ContractServer, engine: Engine, job_id: int
) -> None:
    """Where nothing keeps them from asking twice, the answer that was kept first holds for both."""
    ways: list[tuple[bool, int]] = []
    workers = [Worker(server, None, engine, job_id) for _ in range(2)]

    def overtaken(handler: Any, body: dict[str, Any]) -> None:
        server.stacks_lists = True
        ways.append(workers[1].way)
        answer_with(200, {"embeddings": [[1.0, 2.0], [2.0, 1.0]]})(handler, body)

    server.script = [overtaken]
    ways.append(workers[0].way)
    assert ways == [(True, 1)] * 2
    assert asked(server) == 2
    assert kept(engine) == [(job_id, True, 1)]
    for worker in workers:
        worker.close()


def test_an_endpoint_that_begins_to_stack_lists_is_asked_anew(
    server: ContractServer, workers: list[Worker], engine: Engine, job_id: int
) -> None:
    """The task at hand gets each picture's own vector; with the next task one worker asks, all know
    that pictures go one by one, none sends a list in vain again, and what was wrong is no longer
    kept."""
    assert {worker.way for worker in workers} == {(True, 8)}
    server.stacks_lists = True
    for worker in workers:
        assert len(worker.api.embed_images(pictures(3))) == 3
        assert worker.way == (True, 8)
        worker.next_task()
    before = asked(server)
    assert {worker.way for worker in workers} == {(True, 1)}
    assert asked(server) == before + 1
    assert kept(engine) == [(job_id, True, 1)]


def test_what_proves_wrong_and_is_found_again_is_kept(
    server: ContractServer, workers: list[Worker], engine: Engine, job_id: int
) -> None:
    """An endpoint that stacked a list, and takes lists again when it is asked, is sent lists."""
    first, second, *_ = workers
    assert first.way == (True, 8)
    server.script = [answer_with(200, {"embeddings": [[1.0, 2.0]]})] * 2
    assert len(first.api.embed_images(pictures(3))) == 3
    for worker in (first, second):
        worker.next_task()
        assert worker.way == (True, 8)
    assert asked(server) == 2
    assert kept(engine) == [(job_id, True, 8)]


def test_a_route_that_goes_away_gives_way_to_the_other(
    server: ContractServer, workers: list[Worker]
) -> None:
    """Where /clip/embed_image is there no more, every worker's task goes back once and the next one
    compares; the first of them has asked for all."""
    assert {worker.way for worker in workers} == {(True, 8)}
    server.embeds = False
    for worker in workers:
        with pytest.raises(Outage, match="/clip/embed_image is gone, and another way is taken"):
            worker.api.embed_images(pictures(1))
        worker.next_task()
        assert worker.way == (False, 1)
        assert np.shape(worker.api.compare(pictures(1)[0], ["a", "b"])) == (2,)
    assert asked(server) == 2


def test_a_404_for_everything_stops_the_job_and_teaches_nothing(
    server: ContractServer, workers: list[Worker]
) -> None:
    """A gateway that knows no route at all is a wrong address, not an endpoint that only compares:
    once it is mended the same job goes its old way."""
    first, second, third, _ = workers
    server.always = answer_with(404, {"detail": "Not Found"})
    with pytest.raises(JobStopped, match="answers 404"):
        first.api.endpoint()
    server.always = None
    assert first.way == second.way == (True, 8)
    server.always = answer_with(404, {"detail": "Not Found"})
    for worker in (first, second):
        with pytest.raises(JobStopped, match="answers 404"):
            worker.api.embed_images(pictures(1))
    server.always = None
    for worker in (first, second, third):
        worker.next_task()
        assert worker.way == (True, 8)
        assert len(worker.api.embed_images(pictures(3))) == 3


def test_another_release_of_the_server_is_asked_anew(
    server: ContractServer, workers: list[Worker], engine: Engine, job_id: int
) -> None:
    """What was found of a server holds for the job's later workers while it says that it runs the
    same, whatever instance answers, and not for the release that replaces it."""
    server.info |= {"name": "inference", "version": "1.5.0", "uuid": "one"}
    server.stacks_lists = True
    assert workers[0].way == (True, 1)
    server.info["uuid"] = "another"
    assert workers[1].way == (True, 1)
    assert asked(server) == 1
    server.info["version"] = "1.9.0"
    server.stacks_lists = False
    assert workers[2].way == workers[3].way == (True, 8)
    assert asked(server) == 2
    assert kept(engine) == [(job_id, True, 1), (job_id, True, 8)]


def test_another_address_is_asked_anew(
    server: ContractServer, redis_url: str, engine: Engine, job_id: int, workers: list[Worker]
) -> None:
    """What was found of one endpoint says nothing of another that says that it runs the same."""
    assert workers[0].way == (True, 8)
    with contract_server(stacks_lists=True) as other:
        moved = Worker(other, redis_url, engine, job_id)
        assert moved.way == (True, 1)
        assert asked(other) == 1
        moved.close()
    assert workers[1].way == (True, 8)
    assert asked(server) == 1


def test_each_job_asks_for_itself_and_takes_its_answer_along(
    server: ContractServer, workers: list[Worker], engine: Engine, job_id: int
) -> None:
    """What was found for a job is no other job's word; once the job is purged it is nowhere."""
    other = planned(engine, 4, key="other").job_id
    server.stacks_lists = True
    assert workers[0].way == (True, 1)
    server.stacks_lists = False
    workers[1].begin(other)
    assert workers[1].way == (True, 8)
    assert workers[2].way == (True, 1)
    assert kept(engine) == [(job_id, True, 1), (other, True, 8)]
    ledger.cancel_job(engine, job_id)
    ledger.close_finished(engine)
    assert purge_job(engine, job_id)["job_endpoints"] == 1
    store_endpoint(engine, job_id, "late", (True, 8))
    assert known_endpoint(engine, job_id, "late") is None
    assert kept(engine) == [(other, True, 8)]


@pytest.mark.parametrize("way", ["embed", "compare"])
def test_a_way_that_a_person_chose_is_kept(
    server: ContractServer, redis_url: str, engine: Engine, job_id: int, way: str
) -> None:
    """Where the route of a forced way is not there the job stops, and takes no other way."""
    worker = Worker(server, redis_url, engine, job_id, api_way=way)
    assert worker.way == ((True, 8) if way == "embed" else (False, 1))
    server.always = answer_with(404, {"detail": "Not Found"})
    (picture,) = pictures(1)
    api = worker.api
    with pytest.raises(JobStopped, match="answers 404"):
        api.embed_images([picture]) if way == "embed" else api.compare(picture, ["a"])
    worker.close()
