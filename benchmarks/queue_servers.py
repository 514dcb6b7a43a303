"""A Redis and a PostgreSQL of a benchmark's own: on free ports, in a folder that is deleted.

Both keep their promises (append-only file, fsync, synchronous commits), as docker-compose.yml has
them: a ledger on a server that forgets would be measured too fast.
"""

from __future__ import annotations

import glob
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import redis
from sqlalchemy import Engine

from storage import database

START_S = 30.0


@contextmanager
def redis_server() -> Iterator[tuple[str, int]]:
    """URL and process of an empty Redis."""
    binary = shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None:
        raise SystemExit("redis-server is needed: apt-get install redis-server")
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        url = f"redis://127.0.0.1:{port}/0"
        words = [binary, "--port", str(port), "--bind", "127.0.0.1", "--dir", folder, "--save", ""]
        kept = [
            "--appendonly",
            "yes",
            "--appendfsync",
            "everysec",
            "--maxmemory-policy",
            "noeviction",
        ]
        client = redis.Redis.from_url(url)
        with _running([*words, *kept], Path(folder), client.ping, redis.ConnectionError) as pid:
            yield url, pid
        client.close()


@contextmanager
def postgresql_server() -> Iterator[tuple[str, int]]:
    """URL of a PostgreSQL, without the name of a database, and its first process."""
    installed = sorted(glob.glob("/usr/lib/postgresql/*/bin/postgres"))
    found = shutil.which("postgres") or (installed[-1] if installed else None)
    if found is None:
        raise SystemExit("PostgreSQL is needed: apt-get install postgresql")
    # The server refuses to run as root.
    user = pwd.getpwnam("postgres") if os.getuid() == 0 else None
    who: dict[str, Any] = (
        {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
    )
    folder = Path(tempfile.mkdtemp(prefix="nightreel-benchmark-"))
    try:
        if user is not None:
            os.chown(folder, user.pw_uid, user.pw_gid)
        initdb = [
            str(Path(found).with_name("initdb")),
            "-D",
            str(folder / "data"),
            "-U",
            "nightreel",
        ]
        subprocess.run(
            [*initdb, "-A", "trust", "-E", "UTF8", "--locale=C"],
            check=True, capture_output=True, cwd=folder, **who,
        )  # fmt: skip
        port = _free_port()
        settings = (
            f"port={port}", "listen_addresses=127.0.0.1", "unix_socket_directories=",
            "shared_buffers=512MB", "max_wal_size=4GB",
        )  # fmt: skip
        words = [found, "-D", str(folder / "data"), *(w for one in settings for w in ("-c", one))]
        url = f"postgresql://nightreel@127.0.0.1:{port}"

        def answers() -> None:
            psycopg.connect(f"{url}/postgres", connect_timeout=5).close()

        with _running(words, folder, answers, psycopg.OperationalError, **who) as pid:
            yield url, pid
    finally:
        shutil.rmtree(folder)


Fresh = Callable[[str], AbstractContextManager[Engine]]
"""Gives an engine on a new database with empty tables, `sqlite` or `postgresql`; leaving it deletes
the database."""


def databases(server: str) -> Fresh:
    """What makes them, on this PostgreSQL and in folders of their own."""

    @contextmanager
    def fresh(kind: str) -> Iterator[Engine]:
        made = _sqlite() if kind == "sqlite" else _postgresql(server)
        with made as url:
            engine = database.connect(url)
            database.upgrade(engine)
            yield engine
            engine.dispose()

    return fresh


@contextmanager
def _sqlite() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        yield f"sqlite:///{folder}/nightreel.db"


@contextmanager
def _postgresql(server: str) -> Iterator[str]:
    name = f"benchmark_{time.monotonic_ns()}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
        yield f"{server}/{name}"
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def processor_s(*pids: int) -> float:
    """Processor time of processes and all that they have started, living and dead."""
    family, ticks = set(pids), 0
    stats = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit():
                after_name = (entry / "stat").read_text().rpartition(")")[2].split()
                stats.append((int(entry.name), [int(field) for field in after_name[1:15]]))
    for one, (parent, *fields) in sorted(stats):
        if one in family or parent in family:
            family.add(one)
            ticks += sum(fields[9:13])
    return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def _running(
    words: list[str],
    folder: Path,
    answers: Callable[[], object],
    not_yet: type[Exception],
    **how: Any,
) -> Iterator[int]:
    log = folder / "log"
    with log.open("ab") as file:
        process = subprocess.Popen(
            words, cwd=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=file, **how
        )
    try:
        deadline = time.monotonic() + START_S
        while True:
            try:
                answers()
                break
            except not_yet:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"{words[0]} does not start: {log.read_text()}") from None
                time.sleep(0.05)
        yield process.pid
    finally:
        process.send_signal(2)  # PostgreSQL's fast shutdown
        process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
