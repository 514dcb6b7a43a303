"""Several processes that read one database: the same answers, and none of them left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sqlalchemy import Connection, Engine, text

from storage import crew as crews
from storage.crew import crew
from storage.database import DatabaseUnavailable, reading

BEGUN = """
import sys
from storage.crew import crew
from storage.database import connect

with crew(connect(sys.argv[1])) as workers:
    print(*(process.pid for process in workers._pool._processes.values()), flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, whatever the machine has."""
    monkeypatch.setattr(crews, "_cores", lambda: 2)


def squared(connection: Connection, number: int) -> tuple[int, int]:
    """By the database, and which process asked it."""
    found = connection.execute(text("SELECT CAST(:n AS INTEGER) * :n"), {"n": number})
    return int(found.scalar_one()), os.getpid()


def refused(_: Connection, number: int) -> int:
    """Fails for one of the numbers."""
    if number == 3:
        raise DatabaseUnavailable("away")
    return number


def killed_elsewhere(_: Connection, asked: tuple[int, int]) -> int:
    """Ends any process but the one that asks."""
    asks, number = asked
    if os.getpid() != asks and number == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_answers_come_in_the_order_of_the_questions(engine: Engine) -> None:
    """Other processes ask a connection of their own; alone it is this one that asks."""
    for alone in (False, True):
        with crew(engine, alone=alone) as workers, reading(engine) as connection:
            found = list(workers.map(squared, connection, range(40)))
        assert [number for number, _ in found] == [n * n for n in range(40)]
        assert ({pid for _, pid in found} == {os.getpid()}) is alone


def test_what_goes_wrong_in_a_process_is_raised_here(engine: Engine) -> None:
    """The error is the one that was raised there, and everything is given back."""
    with (
        pytest.raises(DatabaseUnavailable, match="away"),
        crew(engine) as workers,
        reading(engine) as connection,
    ):
        list(workers.map(refused, connection, range(10)))
    with reading(engine) as connection:
        assert connection.scalar(text("SELECT 1")) == 1


def test_who_is_left_alone_does_the_rest(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    """A process that is killed, as for want of memory, costs time and no answer."""
    with crew(engine) as workers, reading(engine) as connection:
        found = list(
            workers.map(killed_elsewhere, connection, [(os.getpid(), n) for n in range(9)])
        )
    assert found == list(range(9))
    assert "one process alone works on the rest" in caplog.text


def test_where_no_process_can_be_begun_this_one_works(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A limit of processes that is reached with the second one leaves none behind."""
    fork = os.fork
    begun: list[int] = []

    def limited() -> int:
        if begun:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        begun.append(fork())
        return begun[0]

    monkeypatch.setattr(os, "fork", limited)
    with crew(engine) as workers, reading(engine) as connection:
        found = [number for number, _ in workers.map(squared, connection, range(3))]
    assert found == [0, 1, 4]
    assert "one process alone" in caplog.text
    assert len(begun) == 1
    assert not _runs(begun[0])


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_crew_ends_with_who_began_it(tmp_path: Path, end: signal.Signals) -> None:
    """However that ends, no process is left."""
    command = [sys.executable, "-c", BEGUN, f"sqlite:///{tmp_path}/any.db"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    ) as parent:
        assert parent.stdout is not None
        members = [int(pid) for pid in parent.stdout.readline().split()]
        assert members
        parent.send_signal(end)
        parent.wait(30)
    deadline = time.monotonic() + 30
    while any(map(_runs, members)):
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
