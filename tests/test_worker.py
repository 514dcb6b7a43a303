"""A worker process: what it refuses to start with, and what it leaves to others."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from clips import make_clip
from contract_server import MODEL, ContractServer, contract_server
from rows import RANGE, claimed, planned, spec
from sqlalchemy import Engine, event, select, update

from scheduler.submit import job_spec
from storage import ledger, schema
from storage.database import DatabaseUnavailable, reading, writing
from storage.dialect import Now
from storage.ledger import ProbeClaim
from storage.records import ArchiveFile, Fit, Label, LabelSet, Sampling, TaskState
from workers import tasks
from workers.metrics import Outcome
from workers.probing import Asked, FileUnreadable, plan_file, probe_and_plan
from workers.process import Process


@pytest.mark.parametrize(
    ("database_url", "said"),
    [
        ("mysql://me@nowhere/nightreel", "not supported"),
        ("sqlite:///{folder}/empty.db", "nightreel db upgrade"),
    ],
)
def test_a_worker_that_could_run_nothing_does_not_start(
    redis_url: str, tmp_path: Path, database_url: str, said: str
) -> None:
    """Otherwise it would take one message after another and drop them all."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "celery", "-A", "workers.app", "worker", "--concurrency", "1"],
        env={
            **os.environ,
            "NIGHTREEL_BROKER_URL": redis_url,
            "NIGHTREEL_DATABASE_URL": database_url.format(folder=tmp_path),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 11, done.stderr
    assert said in done.stderr


def test_a_deleted_file_makes_nobody_rest(tmp_path: Path) -> None:
    """Where its folder is there the archive is, and other files can be had."""
    assert not FileUnreadable("gone", str(tmp_path / "gone.mp4")).folder_missing
    assert FileUnreadable("gone", str(tmp_path / "away" / "gone.mp4")).folder_missing


def test_a_host_without_the_archive_takes_its_time(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    """A file that is not there spends an attempt, waits for another host, and makes this one rest
    longer and longer, so that it does not take the messages of all."""
    monkeypatch.setenv("NIGHTREEL_DATABASE_URL", database_url)
    rested: list[float] = []
    planned(engine, 3 * RANGE)
    with contract_server(info={"model": "clip/1", "input_size": 64}) as server:
        monkeypatch.setenv("NIGHTREEL_API_URL", server.url)
        process = Process()
        monkeypatch.setattr(tasks.time, "sleep", rested.append)
        for task_id in ledger.feed(engine, 3):
            outcome = tasks._run(process, claimed(engine, task_id))
            assert outcome == (Outcome.FAULT, "unreadable")
            assert ledger.claim(engine, task_id, "w", 60) is None
    process.engine.dispose()
    process.client.close()
    assert rested == [2.0, 4.0, 8.0]
    assert ledger.status(engine, 1).tasks_by_state[TaskState.PENDING] == 3


def test_a_task_rests_for_ten_minutes_at_most(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, database_url: str
) -> None:
    """However many tries it is given and has spent."""
    monkeypatch.setenv("NIGHTREEL_DATABASE_URL", database_url)
    monkeypatch.setenv("NIGHTREEL_MAX_ATTEMPTS", "100")
    monkeypatch.setattr(tasks.time, "sleep", lambda _: None)
    planned(engine, RANGE)
    with writing(engine) as connection:
        connection.execute(update(schema.tasks).values(attempts=40))
    process = Process()
    (task_id,) = ledger.feed(engine, 1)
    assert tasks._run(process, claimed(engine, task_id)) == (Outcome.FAULT, "unreadable")
    process.engine.dispose()
    process.client.close()
    with reading(engine) as connection:
        (rest_ms,) = connection.scalars(select(schema.tasks.c.not_before_ms - Now()))
    assert 500_000 < rest_ms <= 600_000


def test_a_file_whose_reading_outlasts_its_lease_is_planned_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, database_url: str, tmp_path: Path
) -> None:
    """Its worker extends the lease meanwhile, so that no sweep gives it to another."""
    monkeypatch.setenv("NIGHTREEL_DATABASE_URL", database_url)
    monkeypatch.setenv("NIGHTREEL_LEASE_S", "9")
    clip = make_clip(tmp_path / "clip.mp4", [("red", 1)])
    stat = clip.stat()
    listed = ArchiveFile(str(clip), stat.st_size, stat.st_mtime_ns)
    job = ledger.open_job(engine, spec(), files=[listed])
    process, expired = Process(), list[int]()

    def slowly(of: Engine, claim: ProbeClaim) -> bool:
        with writing(engine) as connection:
            connection.execute(update(schema.probes).values(lease_until_ms=Now()))
        spoken = threading.Event()
        event.listen(process.engine, "commit", lambda _: spoken.set())
        assert spoken.wait(60)
        expired.append(ledger.sweep(engine, 60).expired)
        return plan_file(of, claim)

    monkeypatch.setattr(tasks, "current", lambda: process)
    monkeypatch.setattr(tasks, "plan_file", slowly)
    tasks.probe(*ledger.feed_probes(engine, 1))
    process.engine.dispose()
    process.client.close()
    assert expired == [0]
    stands = ledger.status(engine, job.id)
    assert (stands.open_probes, stands.videos) == (0, 1)


def job_on_a_clip(engine: Engine, clip: Path, *labels: str) -> int:
    """The id of a job of the tests' model, its ranges of two samples planned."""
    spec = job_spec(
        names=[str(clip)],
        sampling=Sampling(),
        fit=Fit.CROP,
        top_n=1,
        labels=LabelSet("own", tuple(Label(one, (one,)) for one in labels)),
        model=MODEL,
        notice=None,
    )
    job = ledger.open_job(engine, spec)
    stat = clip.stat()
    file = ArchiveFile(str(clip), stat.st_size, stat.st_mtime_ns)
    probed = probe_and_plan(Asked(file, None), Sampling(), 2_000_000)
    assert probed.info is not None
    assert probed.content_id is not None
    video = ledger.register_file(engine, probed.file, probed.content_id)
    ledger.plan_video(engine, job.id, video, probed.info, probed.ranges)
    ledger.finish_planning(engine, job.id)
    return job.id


@dataclass(frozen=True)
class Worker:
    """A worker process run by hand, with two jobs of two ranges each and the API of both."""

    engine: Engine
    process: Process
    server: ContractServer
    first: int
    later: int

    def run(self, job_id: int) -> object:
        """How the next task of the job ends."""
        (task_id,) = ledger.feed(self.engine, 1, job_id)
        return tasks._run(self.process, claimed(self.engine, task_id))


@pytest.fixture
def worker(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, database_url: str, tmp_path: Path
) -> Iterator[Worker]:
    clip = make_clip(tmp_path / "clip.mp4", [("red", 4)])
    jobs = [job_on_a_clip(engine, clip, *labels) for labels in (("a", "b"), ("c", "d"))]
    with contract_server() as server:
        monkeypatch.setenv("NIGHTREEL_DATABASE_URL", database_url)
        monkeypatch.setenv("NIGHTREEL_API_URL", server.url)
        process = Process()
        yield Worker(engine, process, server, *jobs)
        process.engine.dispose()
        process.client.close()


def test_a_worker_that_could_not_extend_its_lease_tries_again_soon(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not a third of the lease later, which may be minutes: once the database is back, the sweep
    waits for a while only. It says once that it fails."""
    monkeypatch.setattr(tasks, "BEAT_AGAIN_S", 0.01)
    process = worker.process
    process.settings = process.settings.model_copy(update={"lease_s": 1})
    (task_id,) = ledger.feed(worker.engine, 1, worker.first)
    claim = claimed(worker.engine, task_id)
    outage, spoken = iter(range(300)), threading.Event()

    def refuse(*_: object) -> None:
        if next(outage, None) is not None:
            raise DatabaseUnavailable("away")

    event.listen(process.engine, "before_cursor_execute", refuse)
    event.listen(process.engine, "commit", lambda _: spoken.set())
    with tasks._heartbeat(process, task_id, claim.fence) as lost:
        assert spoken.wait(60)
    assert not lost.is_set()
    assert [record.message for record in caplog.records] == [
        "a heartbeat failed: DatabaseUnavailable"
    ]


DONE = Outcome.DONE, None
STOPPED = Outcome.PAUSED, "api-refused"


@pytest.mark.expects_error_log("^api-refused: .* another@2")
def test_an_api_with_another_model_stops_the_job_and_nothing_of_it_is_stored(
    worker: Worker,
) -> None:
    """Started anew with another model, the API gives a worker nothing that it stores for the job at
    hand. With the job's model back, the same worker goes on."""
    assert worker.run(worker.first) == DONE
    worker.server.info = {"model": "another@2", "input_size": 64}
    for _ in range(2):
        assert worker.run(worker.first) == STOPPED
        status = ledger.status(worker.engine, worker.first)
        assert "another@2" in (status.held or "")
        assert status.tasks_by_state[TaskState.DONE] == 1
        ledger.resume_job(worker.engine, worker.first)
    worker.server.info = {"model": MODEL, "input_size": 64}
    assert worker.run(worker.first) == DONE


@pytest.mark.expects_error_log("^api-refused: .* another@2")
def test_a_worker_asks_for_each_job_which_model_is_served(worker: Worker) -> None:
    """Where answers do not say which model they are of, what was learned for the job before does
    not count for the next."""
    worker.server.answers_name_model = False
    assert worker.run(worker.first) == DONE
    worker.server.info = {"model": "another@2", "input_size": 64}
    assert worker.run(worker.later) == STOPPED
    worker.server.info = {"model": MODEL, "input_size": 64}
    ledger.resume_job(worker.engine, worker.later)
    assert worker.run(worker.later) == DONE
