"""A worker process: what it refuses to start with, and what it leaves to others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from contract_server import contract_server
from rows import RANGE, claimed, planned
from sqlalchemy import Engine

from storage import ledger
from storage.records import TaskState
from workers import tasks
from workers.probing import FileUnreadable
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
            assert outcome == (tasks.Outcome.FAULT, "unreadable")
            assert ledger.claim(engine, task_id, "w", 60) is None
    process.engine.dispose()
    process.client.close()
    assert rested == [2.0, 4.0, 8.0]
    assert ledger.status(engine, 1).tasks_by_state[TaskState.PENDING] == 3
