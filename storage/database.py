"""Engines, transactions, migrations, and what can go wrong with a database.

DatabaseError                 one line: cause and remedy; no password in it
|-- BadDatabaseUrl            the URL names no database that can be used
|-- DatabaseUnavailable       the database cannot be reached or written now: worth another try
|-- SchemaOutdated            the tables are missing or older than this release
`-- SchemaTooNew              the tables are of a later release
"""

from __future__ import annotations

import os
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError

from storage.dialect import lock_ledger, one_line
from storage.settings import SecretUnreadable, StorageSettings

if TYPE_CHECKING:
    from alembic.config import Config

T = TypeVar("T")

_MIGRATIONS = Path(__file__).with_name("migrations")

BUSY_TIMEOUT_S = 30
"""How long a writer waits for its turn, and how long one may keep it without a word."""

_WRITES = "nightreel_writes"

_PASSING = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_READONLY,
    }
)
"""SQLite's primary result codes that may be another tomorrow."""


class DatabaseError(Exception):
    """The database cannot do what was asked."""


class BadDatabaseUrl(DatabaseError):
    """The URL names no database that can be used."""


class DatabaseUnavailable(DatabaseError):
    """The database cannot be reached or written now: worth another try."""


class SchemaOutdated(DatabaseError):
    """The tables are missing or older than this release."""


class SchemaTooNew(DatabaseError):
    """The tables are of a later release."""


def connect(url: str) -> Engine:
    """An engine for `sqlite:///FILE` or `postgresql://...`; nothing is opened yet.

    Make one in each process, after any fork. Raises BadDatabaseUrl.
    """
    try:
        parsed = make_url(url.strip())
    except (ArgumentError, ValueError):
        raise BadDatabaseUrl(
            "the database URL cannot be read: "
            "set NIGHTREEL_DATABASE_URL to sqlite:///FILE or postgresql://USER@HOST/NAME"
        ) from None
    match parsed.drivername:
        case "sqlite" | "sqlite+pysqlite":
            return _connect_sqlite(parsed)
        case "postgres" | "postgresql" | "postgresql+psycopg":
            return _connect_postgresql(_with_password(parsed))
    raise BadDatabaseUrl(
        f"databases of kind {parsed.drivername!r} are not supported: "
        "set NIGHTREEL_DATABASE_URL to sqlite:///FILE or postgresql://USER@HOST/NAME"
    )


def _connect_sqlite(url: URL) -> Engine:
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise BadDatabaseUrl(
            "SQLite needs a file that all processes share: "
            "set NIGHTREEL_DATABASE_URL to sqlite:///FILE"
        )
    engine = create_engine(
        url.set(drivername="sqlite+pysqlite"),
        connect_args={"timeout": BUSY_TIMEOUT_S},
        hide_parameters=True,  # file names and pictures are no part of a message
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _record: object) -> None:
        # The driver's own transactions begin late and deferred; ours begin in `begin` below.
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode = WAL")
        # In WAL mode a power cut may undo the latest commits, never half of one: the ledger then
        # gives those tasks out again.
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A writer that began as a reader fails at once where another has written in between.
        writes = connection.get_execution_options().get(_WRITES, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN DEFERRED")

    return engine


def _with_password(url: URL) -> URL:
    """The address with the password of the secret file, if there is one and it names none."""
    if url.password is not None:
        return url
    try:
        return url.set(password=StorageSettings().database_password())
    except SecretUnreadable as error:
        raise BadDatabaseUrl(str(error)) from None


def _connect_postgresql(url: URL) -> Engine:
    timeouts = {
        # A dead server must not hold a worker for the kernel's quarter of an hour,
        "connect_timeout": "5",
        "tcp_user_timeout": "30000",
        # and a dead worker must not hold its locks for the server's two hours.
        "options": "-c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 "
        "-c tcp_keepalives_count=3",
        "application_name": "nightreel",
    }
    engine = create_engine(
        url.set(drivername="postgresql+psycopg").update_query_dict(
            {name: value for name, value in timeouts.items() if name not in url.query}
        ),
        hide_parameters=True,
    )

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A writer that is stopped in the middle (a paused machine) would hold up every other one.
        if connection.get_execution_options().get(_WRITES, False):
            connection.exec_driver_sql(
                f"SET LOCAL idle_in_transaction_session_timeout = {BUSY_TIMEOUT_S * 1000}"
            )

    return engine


def shown_url(engine: Engine) -> str:
    """The database as messages name it: without user, password and options."""
    url = engine.url
    if url.get_backend_name() == "sqlite":
        return f"sqlite:///{url.database}"
    return URL.create("postgresql", None, None, url.host, url.port, url.database).render_as_string()


def absolute_url(engine: Engine) -> str:
    """The URL, password and all, under which a process in another directory finds the database."""
    url = engine.url
    if url.get_backend_name() == "sqlite" and url.database:
        url = url.set(database=os.path.abspath(url.database))
    return url.render_as_string(hide_password=False)


@contextmanager
def writing(engine: Engine) -> Iterator[Connection]:
    """One writing transaction: committed at the end, rolled back on any exception.

    Raises DatabaseUnavailable where the database cannot be reached or written now.
    """
    with (
        _explained(engine),
        engine.connect().execution_options(**{_WRITES: True}) as connection,
        connection.begin(),
    ):
        yield connection


@contextmanager
def reading(engine: Engine) -> Iterator[Connection]:
    """One reading transaction, all of whose queries see the same moment and hold up no writer.

    Raises DatabaseUnavailable where the database cannot be reached now.
    """
    options: dict[str, Any] = {}
    if engine.dialect.name == "postgresql":
        options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
    with (
        _explained(engine),
        engine.connect().execution_options(**options) as connection,
        connection.begin(),
    ):
        yield connection


@contextmanager
def _explained(engine: Engine) -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        cause = one_line(str(error.orig))[:300]
        if getattr(error.orig, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_NOTADB:
            raise BadDatabaseUrl(
                f"{shown_url(engine)} is another kind of file: "
                "name a new file or a database of nightreel in NIGHTREEL_DATABASE_URL"
            ) from error
        if getattr(error.orig, "sqlite_errorcode", 0) == sqlite3.SQLITE_READONLY_DIRECTORY:
            folder = os.path.dirname(os.path.abspath(str(engine.url.database)))
            raise DatabaseUnavailable(
                f"database {shown_url(engine)} cannot be used: SQLite writes beside its file even "
                f"to read it, and this user may not in {folder}: give the right to, or read a copy"
            ) from error
        if _passing(error):
            raise DatabaseUnavailable(
                f"database {shown_url(engine)} cannot be used: {cause}; "
                "see that it runs and that NIGHTREEL_DATABASE_URL names it"
            ) from error
        raise


def _passing(error: DBAPIError) -> bool:
    if error.connection_invalidated:
        return True
    if isinstance(error.orig, sqlite3.Error):
        return getattr(error.orig, "sqlite_errorcode", 0) & 0xFF in _PASSING
    return isinstance(error, OperationalError | InterfaceError)


def with_retries(
    fn: Callable[[], T],
    *,
    deadline_s: float = 60.0,
    first_s: float = 0.1,
    longest_s: float = 5.0,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    jitter: Callable[[], float] = random.random,
) -> T:
    """What `fn` returns, called again after DatabaseUnavailable with full jitter and doubled
    pauses, until `deadline_s` seconds have passed: then the last error is raised.

    `fn` must be one transaction that may be repeated, as all of `storage` are.
    """
    deadline = clock() + deadline_s
    pause_s = first_s
    while True:
        try:
            return fn()
        except DatabaseUnavailable:
            left_s = deadline - clock()
            if left_s <= 0:
                raise
        sleep(min(pause_s * jitter(), left_s))
        pause_s = min(2 * pause_s, longest_s)


def outlasting(fn: Callable[[], T]) -> T:
    """`with_retries` for work in hand, which is paid for: a database that is away for less than an
    hour costs none of it."""
    return with_retries(fn, deadline_s=3600.0)


def upgrade(engine: Engine) -> list[str]:
    """Bring the tables to this release, and return the revisions applied, oldest first.

    All or nothing, one process at a time. Raises SchemaTooNew, DatabaseUnavailable.
    """
    # Twelve megabytes, which whoever only checks (every worker) would carry for ever.
    from alembic import command  # noqa: PLC0415

    with writing(engine) as connection:
        lock_ledger(connection)
        missing = _missing_revisions(engine, connection)
        if missing:
            config = _alembic()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    return missing


def check(engine: Engine) -> None:
    """Return where the database can be reached and its tables are of this release.

    Raises DatabaseUnavailable, SchemaOutdated, SchemaTooNew.
    """
    # Opening a SQLite file that is not there would make it.
    if engine.dialect.name == "sqlite" and not os.path.exists(str(engine.url.database)):
        raise SchemaOutdated(
            f"there is no file {os.path.abspath(str(engine.url.database))}: name the database with "
            "--db or NIGHTREEL_DATABASE_URL; `nightreel run` and `nightreel db upgrade` make a new "
            "one"
        )
    with reading(engine) as connection:
        if not _missing_revisions(engine, connection):
            return
    raise SchemaOutdated(
        f"database {shown_url(engine)} lacks the tables of this release: run `nightreel db upgrade`"
    )


def _missing_revisions(engine: Engine, connection: Connection) -> list[str]:
    # Files are named by their revisions, each of which follows the one before.
    known = sorted(file.name.partition("_")[0] for file in _MIGRATIONS.glob("versions/[0-9]*.py"))
    current = None
    if inspect(connection).has_table("alembic_version"):
        current = connection.scalar(text("SELECT version_num FROM alembic_version"))
    if current is None:
        return known
    if current not in known:
        raise SchemaTooNew(
            f"database {shown_url(engine)} was made by a later release of nightreel: "
            "install that release or name another database in NIGHTREEL_DATABASE_URL"
        )
    return known[known.index(current) + 1 :]


def _alembic() -> Config:
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    # Alembic reads `%` as interpolation.
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    return config
