"""What `docker-compose.yml` says, and its services started by hand where no engine runs.

A service gets the command, the environment and the health check of the file and nothing else.
Only what a container would see elsewhere is replaced: host names, mount points and ports.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docker-compose.yml"
MOUNTED_SECRETS = "/run/secrets/"

_VARIABLE = re.compile(r"\$(?:(\$)|\{(\w+)(?:(:[-+?])([^}]*))?\})")


class VariableMissing(Exception):
    """The file asks for a variable and says what for."""


def interpolated(value: Any, variables: Mapping[str, str]) -> Any:
    """`value` with each ${NAME}, ${NAME:-default}, ${NAME:+other} and ${NAME:?message} of its
    strings replaced as the compose specification has it."""
    if isinstance(value, dict):
        return {key: interpolated(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [interpolated(item, variables) for item in value]
    if not isinstance(value, str):
        return value

    def replaced(match: re.Match[str]) -> str:
        dollar, name, operator, word = match.groups()
        if dollar:
            return "$"
        given = variables.get(name, "")
        match operator:
            case ":-":
                return given or word
            case ":+":
                return word if given else ""
            case ":?" if not given:
                raise VariableMissing(word)
        return given

    return _VARIABLE.sub(replaced, value)


def variables_of(text: str) -> dict[str, str]:
    """What an .env of unquoted lines sets: each line may speak of those above it."""
    variables: dict[str, str] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE):
        variables[name] = interpolated(value, variables)
    return variables


def read(variables: Mapping[str, str]) -> dict[str, Any]:
    """The file as an engine would take it with these variables in .env."""
    project: dict[str, Any] = interpolated(yaml.safe_load(FILE.read_text("utf-8")), variables)
    for service in project["services"].values():
        # A name without a value is passed on where it is set, else left out.
        service["environment"] = {
            name: variables[name] if value is None else str(value)
            for name, value in service.get("environment", {}).items()
            if value is not None or name in variables
        }
    return project


def seconds(duration: str) -> int:
    """A duration of the file, such as 40s or 10m."""
    number, unit = int(duration[:-1]), duration[-1]
    return number * {"s": 1, "m": 60, "h": 3600}[unit]


def size(text: str) -> int:
    """Bytes of a size of the file or of Redis, such as 512m, 256mb or 2g."""
    number, unit = re.fullmatch(r"(\d+)([kmg])b?", text).groups()  # type: ignore[union-attr]
    return int(number) * 1024 ** ("kmg".index(unit) + 1)


def words(command: str | Sequence[str] | None) -> list[str]:
    """A command of the file as the words that are executed."""
    if command is None:
        return []
    return shlex.split(command) if isinstance(command, str) else [str(word) for word in command]


@dataclass(frozen=True, slots=True)
class Place:
    """Where services run by hand: what stands for the inside of their containers."""

    folder: Path
    """An empty working directory."""
    path: Sequence[Path]
    """Directories of the programs."""
    replaced: Mapping[str, str]
    """What a container would see, and what stands for it here."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Further variables, for programs that find their server by them."""

    def here(self, text: str) -> str:
        longest_first = sorted(self.replaced, key=len, reverse=True)
        inside = re.compile("|".join(map(re.escape, longest_first)))
        return inside.sub(lambda found: self.replaced[found[0]], text)

    def environment(self, service: Mapping[str, Any]) -> dict[str, str]:
        """The service's variables, and as little else as a container has."""
        path = os.pathsep.join([*map(str, self.path), "/usr/bin", "/bin"])
        given = {name: self.here(value) for name, value in service["environment"].items()}
        return {"PATH": path, "HOME": str(self.folder), **self.variables, **given}

    def command(self, service: Mapping[str, Any], *arguments: str) -> list[str]:
        """Entry point and command as they are executed; `arguments` instead of the file's own."""
        own = words(arguments or service.get("command"))
        return [self.here(word) for word in [*words(service.get("entrypoint")), *own]]

    def run(self, service: Mapping[str, Any], *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a service that ends by itself."""
        return subprocess.run(
            self.command(service, *arguments),
            cwd=self.folder,
            env=self.environment(service),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def healthy(self, service: Mapping[str, Any]) -> bool:
        """What the service's own health check says now."""
        kind, *check = words(service["healthcheck"]["test"])
        check = ["/bin/sh", "-c", *check] if kind == "CMD-SHELL" else check
        done = subprocess.run(
            [self.here(word) for word in check],
            cwd=self.folder,
            env=self.environment(service),
            capture_output=True,
            check=False,
            timeout=60,
        )
        return done.returncode == 0


class Started:
    """A service started by hand; ended with the context, whatever became of it."""

    def __init__(self, place: Place, service: Mapping[str, Any], *more: str) -> None:
        self.place = place
        self._service = service
        self._log = place.folder.parent / f"{place.folder.name}-{id(self)}.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*place.command(service), *more],
                cwd=place.folder,
                env=place.environment(service),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # a pool's children
        self.process.wait()

    def said(self) -> str:
        """All that it has written."""
        return self._log.read_text("utf-8", "replace")

    def until_healthy(self, limit_s: float = 120) -> None:
        """Ask its health check until it holds."""
        deadline = time.monotonic() + limit_s
        while not self.place.healthy(self._service):
            assert self.process.poll() is None, f"ended: {self.said()[-3000:]}"
            assert time.monotonic() < deadline, f"not healthy: {self.said()[-3000:]}"
            time.sleep(0.1)

    def stop(self) -> float:
        """Seconds that it takes to end after SIGTERM; fails beyond the service's grace period."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(seconds(self._service.get("stop_grace_period", "10s")))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"does not end in time: {self.said()[-3000:]}") from None
        return time.monotonic() - began
