"""`nightreel submit`: what it records, what it prints, what it refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clips import make_clip
from contract_server import ContractServer, contract_server
from sqlalchemy import select

from nightreel.cli import run_command
from storage import ledger
from storage.database import connect, reading
from storage.schema import jobs, probes


@pytest.fixture
def server() -> Iterator[ContractServer]:
    """An API of the contract, whose model reads 77 words."""
    with contract_server(longest_text=77) as made:
        yield made


class Farm:
    """The command line with a database, an API and an archive of two files."""

    def __init__(self, url: str, database_url: str, archive: Path, capsys: Any) -> None:
        self.url = url
        self.database_url = database_url
        self.archive = archive
        self._capsys = capsys

    def submit(self, *more: str, api: str | None = None) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        code = run_command(
            [
                *("submit", str(self.archive), "--api", api or self.url),
                *("--db", self.database_url, "--format", "json", "--label", "a", "--label", "b"),
                *more,
            ]
        )
        said = self._capsys.readouterr()
        return code, said.out, said.err

    def row(self, *more: str) -> dict[str, Any]:
        """The one row of a submission that succeeds."""
        code, out, err = self.submit(*more)
        assert code == 0, err
        (row,) = json.loads(out)
        return dict(row)

    def rows(self, table: Any) -> list[Any]:
        """All rows of a table."""
        engine = connect(self.database_url)
        with reading(engine) as connection:
            found = list(connection.execute(select(table).order_by(table.c.id)).all())
        engine.dispose()
        return found


@pytest.fixture
def farm(server: ContractServer, sqlite_url: str, tmp_path: Path, capsys: Any) -> Farm:
    archive = tmp_path / "archive"
    archive.mkdir()
    make_clip(archive / "a.mp4", [("red", 1)])
    make_clip(archive / "b.mp4", [("blue", 1)])
    return Farm(server.url, sqlite_url, archive, capsys)


def test_a_submission_returns_before_anything_is_read(farm: Farm, server: ContractServer) -> None:
    """The job stands in the ledger with a probe for each file; no picture was sent."""
    row = farm.row("--name", "snow", "--tag", "winter", "--priority", "3")
    assert (row["name"], row["tag"], row["priority"], row["files"]) == ("snow", "winter", 3, 2)
    assert row["new"] is True
    (job,) = farm.rows(jobs)
    assert (job.submitted, job.planning_finished, job.state) == (True, False, "running")
    waiting = [(os.fsdecode(probe.path_raw), probe.state) for probe in farm.rows(probes)]
    assert sorted(waiting) == [
        (str(farm.archive / "a.mp4"), "pending"),
        (str(farm.archive / "b.mp4"), "pending"),
    ]
    assert server.pictures() == 0


def test_the_same_command_or_key_is_one_job(farm: Farm) -> None:
    """Without a key the command itself is the key; with one, the key decides, and is no other's."""
    first = farm.row()
    assert farm.row()["job"] == first["job"]
    keyed = farm.row("--idempotency-key", "night 1")
    again = farm.row("--idempotency-key", "night 1")
    assert keyed["job"] != first["job"]
    assert (again["job"], again["new"]) == (keyed["job"], False)
    code, _, err = farm.submit("--idempotency-key", "night 1", "--every", "2s")
    assert (code, f"job {keyed['job']}" in err) == (2, True)
    assert len(farm.rows(jobs)) == 2


def test_the_budget_and_the_address_stand_with_the_job(farm: Farm) -> None:
    """Both are there from the first moment."""
    row = farm.row("--max-calls", "9", "--notify", "https://example.org/hook")
    engine = connect(farm.database_url)
    assert ledger.calls_left(engine, row["job"]) == 9
    assert ledger.get_job(engine, row["job"]).notify_url == "https://example.org/hook"
    engine.dispose()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--notify", "ftp://example.org"), "--notify"),
        (("--priority", "10"), "--priority"),
        (("--label", "x " * 400), "label"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_recorded(
    farm: Farm, more: tuple[str, ...], said: str
) -> None:
    """One line that names it, exit code 2, no job."""
    code, _, err = farm.submit(*more)
    assert (code, said in err) == (2, True), err
    assert farm.rows(jobs) == []


def test_an_api_must_be_named(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    """No job of a farm falls back to an engine at home."""
    monkeypatch.delenv("NIGHTREEL_API_URL", raising=False)
    code = run_command(["submit", str(farm.archive), "--db", farm.database_url])
    assert code == 2
    assert farm.rows(jobs) == []


def test_an_api_that_is_away_ends_with_its_code(farm: Farm) -> None:
    """Nothing is recorded that no worker could do."""
    code, _, err = farm.submit(api="http://127.0.0.1:9")
    assert code == 12
    assert "127.0.0.1:9" in err
    assert farm.rows(jobs) == []


def test_a_database_without_tables_is_told(farm: Farm, tmp_path: Path) -> None:
    """The schema is the migration's affair."""
    farm.database_url = f"sqlite:///{tmp_path / 'empty.db'}"
    code, _, err = farm.submit()
    assert code == 11
    assert "nightreel db upgrade" in err
