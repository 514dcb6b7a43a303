"""Who may only read a database: answered where SQLite can, else told which right is missing."""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from embedded import asked, directions, done
from rows import planned

from storage import database
from storage.database import DatabaseUnavailable, reading


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can look into, and only its owner can write."""
    made = Path(tempfile.mkdtemp(prefix="nightreel-readers-"))
    made.chmod(0o755)
    yield made
    made.chmod(0o755)
    shutil.rmtree(made)


@contextmanager
def reader(folder: Path) -> Iterator[None]:
    """As a user who may read all of the folder and write nothing of it."""
    root = os.geteuid() == 0
    folder.chmod(0o555)
    if root:
        os.seteuid(pwd.getpwnam("nobody").pw_uid)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o755)


def test_a_reader_is_answered_or_told_what_is_missing(sqlite_url: str, folder: Path) -> None:
    """While somebody has the database open, whoever may read it is answered; else one line names
    the folder and the right. Nothing is written either way."""
    file = folder / "nightreel.db"
    shutil.copyfile(sqlite_url.removeprefix("sqlite:///"), file)
    file.chmod(0o644)
    url = f"sqlite:///{file}"
    engine = database.connect(url)
    done(engine, planned(engine, 4).job_id, directions(3, 2))
    expected = asked(url, "summary")
    assert expected[0] == 0
    with reading(engine), reader(folder):
        assert asked(url, "summary") == expected
    engine.dispose()
    assert os.listdir(folder) == ["nightreel.db"]
    with reader(folder), pytest.raises(DatabaseUnavailable) as caught:
        asked(url, "summary")
    assert f"this user may not in {folder}" in str(caught.value)
    assert os.listdir(folder) == ["nightreel.db"]
