"""What an endpoint can do is asked once a job, and anew where it answers otherwise than it did."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from contract_server import ContractServer, answer_with, contract_server

from workers.api import ApiClient, JobStopped, Outage
from workers.footage.picture import encode_jpeg
from workers.settings import WorkerSettings
from workers.shared import Shared

JOB = "7-1"


@pytest.fixture
def server() -> Iterator[ContractServer]:
    with contract_server() as running:
        yield running


class Worker:
    """The client of one worker process, at work for the job."""

    def __init__(self, server: ContractServer, redis_url: str, **settings: Any) -> None:
        self.shared = Shared(redis_url)
        self.api = ApiClient(
            WorkerSettings(api_url=server.url, **settings), self.shared, sleep=lambda _: None
        )
        self.next_task()

    def next_task(self) -> None:
        """Begin another task of the same job."""
        self.api.work_for(JOB)

    @property
    def way(self) -> tuple[bool, int]:
        found = self.api.endpoint()
        return found.embeds, found.batch

    def close(self) -> None:
        self.api.close()
        self.shared.close()


@pytest.fixture
def workers(server: ContractServer, redis_url: str) -> Iterator[list[Worker]]:
    """Four processes' clients that share one Redis."""
    made = [Worker(server, redis_url) for _ in range(4)]
    yield made
    for one in made:
        one.close()


def pictures(n: int) -> list[bytes]:
    random = np.random.default_rng(5)
    return [encode_jpeg(random.integers(0, 255, (64, 64, 3), np.uint8)) for _ in range(n)]


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


def test_an_endpoint_that_begins_to_stack_lists_is_asked_anew(
    server: ContractServer, workers: list[Worker]
) -> None:
    """The task at hand gets each picture's own vector; with the next task one worker asks, all know
    that pictures go one by one, and none sends a list in vain again."""
    assert {worker.way for worker in workers} == {(True, 8)}
    server.stacks_lists = True
    for worker in workers:
        assert len(worker.api.embed_images(pictures(3))) == 3
        assert worker.way == (True, 8)
        worker.next_task()
    before = asked(server)
    assert {worker.way for worker in workers} == {(True, 1)}
    assert asked(server) == before + 1


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
    server: ContractServer, redis_url: str, workers: list[Worker]
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


def test_jobs_of_different_names_are_asked_for_each(
    server: ContractServer, workers: list[Worker]
) -> None:
    """What was found for a job is no other job's word."""
    server.stacks_lists = True
    assert workers[0].way == (True, 1)
    server.stacks_lists = False
    workers[1].api.work_for("7-2")
    assert workers[1].way == (True, 8)
    assert workers[2].way == (True, 1)


@pytest.mark.parametrize("way", ["embed", "compare"])
def test_a_way_that_a_person_chose_is_kept(
    server: ContractServer, redis_url: str, way: str
) -> None:
    """Where the route of a forced way is not there the job stops, and takes no other way."""
    worker = Worker(server, redis_url, api_way=way)
    assert worker.way == ((True, 8) if way == "embed" else (False, 1))
    server.always = answer_with(404, {"detail": "Not Found"})
    (picture,) = pictures(1)
    api = worker.api
    with pytest.raises(JobStopped, match="answers 404"):
        api.embed_images([picture]) if way == "embed" else api.compare(picture, ["a"])
    worker.close()
