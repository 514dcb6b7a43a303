"""Engines, transactions, migrations, and what is said when a database cannot be used."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, bindparam, select, text

from storage import database
from storage.database import (
    BadDatabaseUrl,
    DatabaseUnavailable,
    SchemaOutdated,
    SchemaTooNew,
    reading,
    with_retries,
    writing,
)
from storage.dialect import Now, StorableText, one_line
from storage.schema import label_sets, metadata
from storage.settings import StorageSettings

CATALOGUE = {
    "sqlite": "SELECT type, name, sql FROM sqlite_master WHERE tbl_name != 'alembic_version'"
    " AND name NOT LIKE 'sqlite_%' AND type = 'index' ORDER BY name",
    "postgresql": "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'"
    " AND tablename != 'alembic_version' ORDER BY indexname",
}
TABLES = {
    "sqlite": "SELECT name, wr FROM pragma_table_list WHERE type = 'table'"
    " AND name != 'alembic_version' AND name NOT LIKE 'sqlite_%' ORDER BY name",
    "postgresql": "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid)"
    " FROM pg_constraint WHERE connamespace = 'public'::regnamespace"
    " AND conrelid::regclass::text != 'alembic_version' ORDER BY 1, 2",
}


@pytest.fixture
def empty_engine(empty_database_url: str) -> Iterator[Engine]:
    made = database.connect(empty_database_url)
    yield made
    made.dispose()


def catalogue(engine: Engine) -> list[tuple[Any, ...]]:
    name = engine.dialect.name
    with reading(engine) as connection:
        rows = [*connection.execute(text(CATALOGUE[name]))]
        rows += [*connection.execute(text(TABLES[name]))]
    return [tuple(row) for row in rows]


def test_the_migrations_give_exactly_the_described_schema(engine: Engine) -> None:
    """Alembic finds no difference between the migrated tables and the description."""
    with reading(engine) as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_the_migrations_give_the_indexes_and_constraints_of_the_schema(
    engine: Engine, empty_engine: Engine
) -> None:
    """Partial indexes, constraints and rowid-less tables are those that the description makes,
    which Alembic's own comparison does not look at."""
    with writing(empty_engine) as connection:
        metadata.create_all(connection)
    assert catalogue(engine) == catalogue(empty_engine)
    assert len(catalogue(engine)) > 20


def test_upgrade_applies_each_revision_once(empty_engine: Engine) -> None:
    """An empty database is outdated, upgraded it is current, and upgrading again does nothing."""
    with pytest.raises(SchemaOutdated, match="nightreel db upgrade"):
        database.check(empty_engine)
    assert database.upgrade(empty_engine) == ["0001"]
    database.check(empty_engine)
    assert database.upgrade(empty_engine) == []


def test_files_of_migrations_are_named_by_their_revisions_in_order() -> None:
    """So that the revisions are known without loading what applies them."""
    scripts = ScriptDirectory.from_config(database._alembic())
    revisions = [script.revision for script in scripts.walk_revisions()][::-1]
    files = sorted(Path(scripts.versions).glob("*.py"))
    assert [file.name.partition("_")[0] for file in files] == revisions
    assert scripts.get_current_head() == revisions[-1]


def test_checking_a_database_loads_nothing_that_upgrades_it(engine: Engine) -> None:
    """Every worker checks, and what its parent has loaded counts in each process of the pool."""
    program = (
        "import os, sys; from storage import database; "
        "database.check(database.connect(os.environ['URL'])); print('alembic' in sys.modules)"
    )
    url = engine.url.render_as_string(hide_password=False)
    said = subprocess.check_output(
        [sys.executable, "-c", program], env=os.environ | {"URL": url}, text=True
    )
    assert said == "False\n"


def test_downgrade_leaves_nothing_behind(engine: Engine) -> None:
    """Going back before the first revision drops every table of ours."""
    config = database._alembic()
    with writing(engine) as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "base")
    assert catalogue(engine) == []
    assert database.upgrade(engine) == ["0001"]


def test_tables_of_a_later_release_are_left_alone(engine: Engine) -> None:
    """A revision that this release does not know is refused by check and by upgrade."""
    with writing(engine) as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    for call in (database.check, database.upgrade):
        with pytest.raises(SchemaTooNew, match="later release"):
            call(engine)


def test_check_makes_no_file(tmp_path: Path) -> None:
    """Asking whether a database is there does not create it: the file that is missing is named, and
    no upgrade is advised to somebody who only stands in another folder."""
    engine = database.connect(f"sqlite:///{tmp_path}/none.db")
    with pytest.raises(SchemaOutdated, match=f"there is no file {tmp_path}/none.db: name .* --db"):
        database.check(engine)
    assert not (tmp_path / "none.db").exists()
    (tmp_path / "none.db").touch()
    with pytest.raises(SchemaOutdated, match="lacks the tables of this release: run"):
        database.check(engine)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://user:secret@host/name", "'mysql' are not supported"),
        ("postgresql+psycopg2://user:secret@host/name", "not supported"),
        ("not a url, secret", "cannot be read"),
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
    ],
)
def test_a_url_that_names_no_database_is_told_in_one_line(url: str, said: str) -> None:
    """A bad URL gives cause and remedy, and does not repeat what may be a password."""
    with pytest.raises(BadDatabaseUrl) as caught:
        database.connect(url)
    message = str(caught.value)
    assert said in message
    assert "NIGHTREEL_DATABASE_URL" in message
    assert "secret" not in message
    assert "\n" not in message


@pytest.mark.parametrize("scheme", ["postgres", "postgresql"])
@pytest.mark.parametrize("where", ["u:pw-secret@127.0.0.1:1/x", "127.0.0.1:1/x?password=pw-secret"])
def test_a_server_that_is_away_is_told_without_the_password(scheme: str, where: str) -> None:
    """An unreachable PostgreSQL is DatabaseUnavailable: one line, no user, no password."""
    engine = database.connect(f"{scheme}://{where}")
    with pytest.raises(DatabaseUnavailable) as caught:
        database.check(engine)
    assert "postgresql://127.0.0.1:1/x" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_away_is_unavailable(tmp_path: Path) -> None:
    """A SQLite file in a folder that does not exist cannot be opened, and that is said."""
    engine = database.connect(f"sqlite:///{tmp_path}/gone/x.db")
    with pytest.raises(DatabaseUnavailable, match="unable to open"):
        database.upgrade(engine)


def test_another_kind_of_file_is_not_written(tmp_path: Path) -> None:
    """A video named as the database by mistake is refused and stays as it is."""
    file = tmp_path / "clip.mp4"
    file.write_bytes(b"\x00\x00\x00\x20ftypisom" * 400)
    before = file.read_bytes()
    with pytest.raises(BadDatabaseUrl, match="another kind of file"):
        database.check(database.connect(f"sqlite:///{file}"))
    assert file.read_bytes() == before


def test_settings_do_not_show_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings read their variable, and their repr hides the URL."""
    assert StorageSettings().database_url == "sqlite:///nightreel.db"
    monkeypatch.setenv("NIGHTREEL_DATABASE_URL", "postgresql://me:pw-secret@host/x")
    settings = StorageSettings()
    assert settings.database_url == "postgresql://me:pw-secret@host/x"
    assert "secret" not in repr(settings)


class Clock:
    """Time that passes by sleeping in it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sleeps: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds


def test_blips_are_retried_with_growing_pauses() -> None:
    """Pauses double up to the longest, and what is returned in the end is returned."""
    clock = Clock()
    failures = iter(range(7))

    def flaky() -> str:
        if next(failures, None) is not None:
            raise DatabaseUnavailable("away")
        return "back"

    got = with_retries(flaky, clock=clock, sleep=clock.sleep, jitter=lambda: 1.0)
    assert got == "back"
    assert clock.sleeps == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0]


def test_retries_end_at_the_deadline() -> None:
    """After the deadline the error itself is raised; no pause reaches beyond it."""
    clock = Clock()

    def away() -> None:
        raise DatabaseUnavailable("away")

    with pytest.raises(DatabaseUnavailable, match="away"):
        with_retries(away, deadline_s=10, clock=clock, sleep=clock.sleep, jitter=lambda: 1.0)
    assert clock.now == pytest.approx(10)


def test_other_errors_are_not_retried() -> None:
    """Only DatabaseUnavailable is worth another try."""
    calls = []

    def broken() -> None:
        calls.append(1)
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        with_retries(broken, sleep=lambda _: None)
    assert len(calls) == 1


def test_a_mistake_in_sql_is_not_a_blip(engine: Engine) -> None:
    """A missing table is a fault, not an outage that passes."""
    with pytest.raises(Exception, match="nowhere") as caught, reading(engine) as connection:
        connection.execute(text("SELECT * FROM nowhere"))
    assert not isinstance(caught.value, DatabaseUnavailable)


def test_a_locked_database_is_a_blip(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that waits in vain for its turn gets DatabaseUnavailable; readers do not wait."""
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.05)
    engine = database.connect(sqlite_url)
    other = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        with pytest.raises(DatabaseUnavailable, match="locked"), writing(engine):
            pass
        with reading(engine) as connection:
            assert connection.scalar(select(label_sets.c.id)) is None
    finally:
        other.close()
        engine.dispose()


def test_a_restarted_server_is_survived(postgres_url: str, postgres_service: Any) -> None:
    """A transaction after a restart fails as a blip on the dead connection, and retries mend it."""
    engine = database.connect(postgres_url)
    with writing(engine) as connection:
        connection.execute(label_sets.insert().values(digest="d", name="before"))
    postgres_service.stop()
    with pytest.raises(DatabaseUnavailable), reading(engine) as connection:
        connection.execute(select(label_sets))
    postgres_service.start()

    def read() -> list[str]:
        with reading(engine) as connection:
            return list(connection.scalars(select(label_sets.c.name)))

    assert with_retries(read, deadline_s=30) == ["before"]
    engine.dispose()


def test_a_failed_transaction_leaves_nothing(engine: Engine) -> None:
    """Any exception rolls the transaction back."""

    def fail() -> None:
        with writing(engine) as connection:
            connection.execute(label_sets.insert().values(digest="d", name="n"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with reading(engine) as connection:
        assert connection.scalar(select(label_sets.c.id)) is None


def test_a_reader_sees_one_moment(engine: Engine) -> None:
    """What is committed during a reading transaction is not seen by it."""
    with reading(engine) as connection:
        assert connection.scalar(select(label_sets.c.id)) is None
        with writing(engine) as other:
            other.execute(label_sets.insert().values(digest="d", name="n"))
        assert connection.scalar(select(label_sets.c.id)) is None


def test_the_clock_is_in_milliseconds(engine: Engine) -> None:
    """The database's clock is an integer that agrees with this machine's within seconds."""
    with reading(engine) as connection:
        now = connection.scalar(select(Now()))
    assert isinstance(now, int)
    assert abs(now - time.time() * 1000) < 5000


@pytest.mark.parametrize("hostile", ["nul\0inside", "lone \udcff surrogate", os.fsdecode(b"\xff")])
def test_text_of_any_kind_can_be_stored(engine: Engine, hostile: str) -> None:
    """NUL and lone surrogates arrive as escapes, and never as an error."""
    with reading(engine) as connection:
        got = connection.scalar(select(bindparam("x", hostile, StorableText())))
    assert got is not None
    assert "\\x" in got or "\\udc" in got


def test_messages_are_one_bounded_line() -> None:
    """A message of unknown origin cannot fill the database nor break a table."""
    assert one_line("a\n\tb  c") == "a b c"
    assert len(one_line("x" * 10_000_000)) <= 20_000
