"""The deployment's files say what they must, and what they start works as they say.

No engine runs here: the compose file is checked against its specification, and each service is
started by hand with the file's own command, environment and health check, from an environment that
is installed as the Dockerfile installs it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import urllib.parse
import urllib.request
import venv
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import psycopg
import pytest
import redis
import yaml
from clip_home import write_towers
from clips import make_clip
from compose_file import (
    FILE,
    MOUNTED_SECRETS,
    ROOT,
    Place,
    Started,
    VariableMissing,
    read,
    seconds,
    size,
    variables_of,
    words,
)
from conftest import Service, _as_user, _other_user, free_port, missing
from contract_server import (
    ContractServer,
    Handler,
    answer_with,
    contract_server,
    picture_vector,
    text_vector,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from packaging.requirements import Requirement
from prometheus_client import CollectorRegistry

from clipserver.metrics import Metrics
from clipserver.settings import Settings as ServerSettings
from nightreel.cli import cli
from scheduler.metrics import LedgerCollector
from scheduler.settings import SchedulerSettings
from storage import database
from storage.exits import ExitCode
from storage.settings import StorageSettings
from workers.metrics import Meters
from workers.settings import QueueSettings, ServiceSettings, WorkerSettings

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
VERSION = PROJECT["version"]
DOCUMENT = (ROOT / "docs" / "deployment.md").read_text("utf-8")
VARIABLES = {"ARCHIVE_DIR": "/srv/archive"}
SERVICES: dict[str, dict[str, Any]] = read(VARIABLES)["services"]
OURS = {name for name, service in SERVICES.items() if "build" in service}
ONE_SHOT = {"migrate", "nightreel"}
METRICS_PORT = "9102"
KEY = "key-of-the-tests"


# --- the compose file ---


def complaints(file: Path) -> str:
    """What the specification's schema has against a file."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*command, file], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_the_file_is_of_the_compose_specification(tmp_path: Path) -> None:
    """Its schema has nothing against the file, and would have against a word misspelt in it."""
    assert complaints(FILE) == ""
    spoiled = tmp_path / "docker-compose.yml"
    spoiled.write_text(FILE.read_text("utf-8").replace("stop_grace_period", "stop_grace"))
    assert "stop_grace" in complaints(spoiled)


@pytest.mark.parametrize("name", SERVICES)
def test_images_are_pinned_and_name_no_registry(name: str) -> None:
    """Ours by the release, others by a full version; none by a host or `latest`."""
    image, _, tag = SERVICES[name]["image"].partition(":")
    assert "." not in image.split("/")[0]
    if name in OURS:
        assert (image.split("-")[0], tag) == ("nightreel", VERSION)
    else:
        assert re.match(r"v?\d+\.\d+(\.\d+)?(-|$)", tag), tag


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_can_do_no_more_than_it_must(name: str) -> None:
    """Nothing can be written but volumes and memory, no privilege is had or gained, memory and
    logs are bounded."""
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "pid", "network_mode", "container_name"} & set(service)
    assert size(service["deploy"]["resources"]["limits"]["memory"]) <= 4 * 1024**3
    assert service["logging"]["options"]["max-size"] == "10m"
    assert service["restart"] == ("no" if name in ONE_SHOT else "unless-stopped")
    assert service.get("init", False) is (name in OURS)
    assert ("healthcheck" in service) is (name not in ONE_SHOT)


def test_what_keeps_state_is_on_the_inner_network_alone() -> None:
    """Redis and PostgreSQL publish no port; what is published is so on loopback."""
    project = read(VARIABLES)
    assert project["networks"]["backend"] == {"internal": True}
    for name in ("redis", "postgres", "migrate"):
        assert SERVICES[name]["networks"] == ["backend"]
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert set(published) == {"api", "grafana", "flower"}
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for (port,) in published.values())
    outside = {name for name, service in SERVICES.items() if "outside" in service["networks"]}
    assert outside == {"api", "scheduler", "worker", "nightreel", "flower", "grafana"}


def test_a_secret_is_seen_by_those_alone_who_need_it() -> None:
    """The API's key by worker and commands, never the scheduler; each is a file, and each service
    that is told of one has it and the other way round."""
    project = read(VARIABLES)
    assert all(set(secret) == {"file"} for secret in project["secrets"].values())
    holders: dict[str, set[str]] = {name: set() for name in project["secrets"]}
    for name, service in SERVICES.items():
        told = {
            value.removeprefix(MOUNTED_SECRETS)
            for value in service["environment"].values()
            if value.startswith(MOUNTED_SECRETS)
        }
        assert told == set(service.get("secrets", ())), name
        for secret in told:
            holders[secret].add(name)
    assert holders == {
        "database_password": {"postgres", "migrate", "scheduler", "worker", "nightreel"},
        "broker_password": {"scheduler", "worker", "nightreel", "flower"},
        "api_key": {"worker", "nightreel"},
        "notify_secret": {"scheduler"},
        "grafana_password": {"grafana"},
    }
    assert not re.search(r"PASSWORD: |API_KEY: |//\w+:\w+@", FILE.read_text("utf-8"))


def test_the_archive_is_mounted_read_only_at_one_place() -> None:
    """A path means the same file in each service; without ARCHIVE_DIR nothing is started."""
    mounted = {
        name: volume
        for name, service in SERVICES.items()
        for volume in service.get("volumes", ())
        if isinstance(volume, dict) and volume["target"] == "/archive"
    }
    assert set(mounted) == {"worker", "nightreel"}
    for volume in mounted.values():
        assert volume["source"] == VARIABLES["ARCHIVE_DIR"]
        assert volume["read_only"] is True
        assert volume["bind"] == {"create_host_path": False}
    with pytest.raises(VariableMissing, match="ARCHIVE_DIR"):
        read({})


def test_services_wait_for_the_tables_and_none_for_the_api() -> None:
    """Scheduler and workers start after a migration that succeeded."""
    assert SERVICES["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    for name in ("scheduler", "worker"):
        assert SERVICES[name]["depends_on"] == {
            "migrate": {"condition": "service_completed_successfully"},
            "redis": {"condition": "service_healthy"},
        }
    assert all("api" not in service.get("depends_on", ()) for service in SERVICES.values())


def test_another_api_replaces_the_one_at_home_by_its_address_alone() -> None:
    """Its line in the example is the only one to change: the API at home is started without it, and
    not with it."""
    example = (ROOT / "deploy" / "env.example").read_text("utf-8")
    chosen, count = re.subn("^#(?=NIGHTREEL_API_URL=)", "", example, flags=re.MULTILINE)
    assert count == 1
    address = variables_of(chosen)["NIGHTREEL_API_URL"]
    for variables, asked, replicas in (
        (VARIABLES, "http://api:9001", "1"),
        (variables_of(example), "http://api:9001", "1"),
        (variables_of(chosen), address, "0"),
    ):
        services = read(variables)["services"]
        assert services["worker"]["environment"]["NIGHTREEL_API_URL"] == asked
        assert services["nightreel"]["environment"]["NIGHTREEL_API_URL"] == asked
        assert services["api"]["deploy"]["replicas"] == replicas


def test_the_api_at_home_never_takes_the_offline_engine() -> None:
    """Real CLIP is asked for by name: from a mounted folder, or fetched into a volume."""
    fetched = words(SERVICES["api"]["command"])
    assert fetched[fetched.index("--engine") + 1] == "clip"
    assert "--model-dir" not in fetched
    assert "weights:/models:ro" in SERVICES["api"]["volumes"]
    mounted = read(VARIABLES | {"MODEL_DIR": "/srv/clip"})["services"]["api"]
    assert words(mounted["command"])[-2:] == ["--model-dir", "/models"]
    assert "/srv/clip:/models:ro" in mounted["volumes"]


def test_a_worker_has_time_to_finish_its_tasks() -> None:
    """SIGTERM is Celery's warm shutdown, and the engine kills well after a usual task's end."""
    worker = SERVICES["worker"]
    assert "REMAP_SIGTERM" not in worker["environment"]
    assert "REMAP_SIGTERM" not in (ROOT / "Dockerfile").read_text("utf-8")
    assert seconds(worker["stop_grace_period"]) >= 2 * SchedulerSettings().task_seconds


def test_every_variable_is_one_that_something_reads() -> None:
    """Ours are settings of some package; those of env.example stand in the file, and what else the
    file asks for is told in the document."""
    settings = {
        f"NIGHTREEL_{name}".upper()
        for some in (
            *(StorageSettings, QueueSettings, ServiceSettings, WorkerSettings),
            *(SchedulerSettings, ServerSettings),
        )
        for name in some.model_fields
    }
    text = FILE.read_text("utf-8")
    for name in re.findall(r"^ +(NIGHTREEL_\w+):", text, re.MULTILINE):
        assert name in settings, name
    example = (ROOT / "deploy" / "env.example").read_text("utf-8")
    offered = set(re.findall(r"^#?([A-Z_]+)=", example, re.MULTILINE))
    read_by_the_file = set(re.findall(r"\$\{(\w+)", text))
    passed_on = set(re.findall(r"^ +(NIGHTREEL_\w+):$", text, re.MULTILINE))
    read_by_the_example = set(re.findall(r"\$\{(\w+)", example))
    assert offered <= read_by_the_file | passed_on | read_by_the_example
    for name in read_by_the_file - offered:
        assert f"`{name}" in DOCUMENT, f"{name} is told nowhere"


FIXED = {
    "scheduler": {"NIGHTREEL_NOTIFY_SECRET", "NIGHTREEL_TASK_SECONDS"},
    "worker": {"NIGHTREEL_API_KEY", "NIGHTREEL_WORKER_NAME"},
    "api": {
        *("NIGHTREEL_ENGINE", "NIGHTREEL_MODEL_DIR", "NIGHTREEL_SERVER_HOST"),
        *("NIGHTREEL_SERVER_PORT", "NIGHTREEL_SERVER_API_KEY_FILE"),
    },
}
"""Settings that no line of .env sets: secrets are files, the file's own commands say where the API
listens and what it loads, who submits says how long a task is, a container has a name."""


@pytest.mark.parametrize(
    ("service", "settings"),
    [
        ("scheduler", (StorageSettings, QueueSettings, ServiceSettings, SchedulerSettings)),
        ("worker", (StorageSettings, QueueSettings, ServiceSettings, WorkerSettings)),
        ("api", (ServerSettings,)),
    ],
)
def test_a_service_can_be_told_all_that_it_reads(service: str, settings: tuple[Any, ...]) -> None:
    """A setting in .env reaches the service that reads it, or is one of the few that the file
    decides itself."""
    passed_on = set(yaml.safe_load(FILE.read_text("utf-8"))["services"][service]["environment"])
    reads = {f"NIGHTREEL_{name}".upper() for some in settings for name in some.model_fields}
    assert reads - passed_on == FIXED[service]


def test_the_monitor_is_optional() -> None:
    """Without a profile none of it is started, and neither is the service for commands."""
    assert {name for name, service in SERVICES.items() if "profiles" not in service} == {
        *("redis", "postgres", "migrate", "api", "scheduler", "worker")
    }
    for name in ("flower", "prometheus", "grafana"):
        assert SERVICES[name]["profiles"] == ["monitor"]


def test_workers_speak_of_their_tasks_where_somebody_listens() -> None:
    """With the monitor's profile, as .env chooses it, and not without."""
    watched = read(VARIABLES | {"COMPOSE_PROFILES": "monitor"})["services"]["worker"]
    assert "--task-events" not in words(SERVICES["worker"]["command"])
    assert set(words(watched["command"])) - set(words(SERVICES["worker"]["command"])) == {
        "--task-events"
    }


# --- the image ---


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of the Dockerfile."""

    base: str
    instructions: list[tuple[str, str]]


def stages() -> dict[str, Stage]:
    """The Dockerfile's stages by their names, in order."""
    text = (ROOT / "Dockerfile").read_text("utf-8")
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    found: dict[str, Stage] = {}
    for line in filter(None, lines):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            stage = found[name] = Stage(base, [])
        else:
            stage.instructions.append((instruction, rest.strip()))
    return found


def instructions_of(target: str) -> list[tuple[str, str]]:
    """All that makes a target, from its base up."""
    stage = stages()[target]
    below = instructions_of(stage.base) if stage.base in stages() else []
    return [*below, *stage.instructions]


@pytest.mark.parametrize("name", sorted(OURS))
def test_an_image_runs_as_nobody_and_holds_no_source(name: str) -> None:
    """A user by number, without a file of the tree, in a directory that holds nothing."""
    made = instructions_of(SERVICES[name]["build"]["target"])
    copies = [rest for instruction, rest in made if instruction in ("COPY", "ADD")]
    assert copies
    for copy in copies:
        assert re.fullmatch(r"--from=environment(-\w+)? /opt/nightreel /opt/nightreel", copy)
    assert [rest for instruction, rest in made if instruction == "USER"] == ["10001:10001"]
    assert ("WORKDIR", "/home/nightreel") in made
    assert ("ARG", f"VERSION={VERSION}") in made
    labels = next(rest for instruction, rest in made if instruction == "LABEL")
    assert 'org.opencontainers.image.version="${VERSION}"' in labels
    variables = " ".join(rest for instruction, rest in made if instruction == "ENV")
    assert "PYTHONUNBUFFERED=1" in variables


@pytest.mark.parametrize("name", ["api", "flower", "worker"])
def test_an_image_started_without_the_file_is_looked_after_too(name: str) -> None:
    """It has the file's own health check, at a port where it is heard."""
    made = stages()[name].instructions
    (check,) = [rest for instruction, rest in made if instruction == "HEALTHCHECK"]
    kind, *command = SERVICES[name]["healthcheck"]["test"]
    assert kind == "CMD"
    assert json.loads(check.partition(" CMD ")[2]) == command
    assert dict(re.findall(r"--([a-z-]+)=(\w+)", check)).keys() == {
        *("interval", "timeout", "start-period")
    }
    if name == "worker":
        assert f"NIGHTREEL_METRICS_PORT={METRICS_PORT}" in next(
            rest for instruction, rest in made if instruction == "ENV"
        )


def test_the_builder_gets_what_it_copies_and_nothing_else() -> None:
    """Each source of the Dockerfile exists and is let through, all of the wheel among them;
    everything else is kept back."""
    sources = {
        source
        for stage in stages().values()
        for instruction, rest in stage.instructions
        if instruction == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert all((ROOT / source).exists() for source in sources)
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    rules = [line for line in ignored if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == sources
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages | {"pyproject.toml", PROJECT["readme"]} <= sources


def test_every_stage_begins_with_one_pinned_python() -> None:
    """One base, by its full version; every name a stage builds on is an earlier one."""
    known: set[str] = set()
    bases = set()
    for name, stage in stages().items():
        if stage.base not in known:
            bases.add(stage.base)
        known.add(name)
    (base,) = bases
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)


def test_the_versions_of_an_image_are_pinned() -> None:
    """Each requirement of each image has one version that it allows, and so has all that stands in
    this environment for its sake."""
    text = (ROOT / "deploy" / "constraints.txt").read_text("utf-8")
    pins = dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", text, re.MULTILINE))
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["local"], *extras["reports"], "flower"]
    seen: set[str] = set()
    while wanted:
        requirement = Requirement(wanted.pop())
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        chosen = requirement.extras or {""}
        if name == "nightreel" or f"{name}{sorted(chosen)}" in seen:
            continue
        seen.add(f"{name}{sorted(chosen)}")
        assert name in pins, f"{name} is not pinned in deploy/constraints.txt"
        assert requirement.specifier.contains(pins[name], prereleases=True), str(requirement)
        for needed in importlib.metadata.requires(name) or ():
            marker = Requirement(needed).marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in chosen | {""}):
                wanted.append(needed)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The worker image's environment, made by the Dockerfile's steps: the wheel, built and
    installed with the pinned versions, and no extra."""
    folder = tmp_path_factory.mktemp("image")
    quiet = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", folder / "wheels", ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (folder / "wheels").glob("*.whl")
    environment = folder / "nightreel"
    venv.create(environment, with_pip=False)
    pip = [sys.executable, "-m", "pip", "--python", environment / "bin" / "python", "install", "-q"]
    constraints = ROOT / "deploy" / "constraints.txt"
    subprocess.run([*pip, "--constraint", constraints, wheel], check=True, env=quiet)
    return environment


def test_the_image_needs_no_library_that_a_slim_python_lacks(image: Path) -> None:
    """What the installed packages load from the system is the C and C++ runtime and zlib."""
    libraries = [str(path) for path in image.rglob("*.so*") if path.is_file()]
    done = subprocess.run(["/usr/bin/ldd", *libraries], capture_output=True, text=True, check=False)
    assert "not found" not in done.stdout
    system = {
        Path(path).name.split(".so")[0]
        for path in re.findall(r"=> (/\S+)", done.stdout)
        if not path.startswith(str(image))
    }
    of_libc = {"libc", "libm", "libmvec", "libdl", "libpthread", "librt", "libresolv", "libutil"}
    assert system <= of_libc | {"libgcc_s", "libstdc++", "libz"}


# --- the services, by hand ---


def make_secrets(folder: Path) -> Path:
    """The secrets as docs/deployment.md has an operator make them, and a key."""
    (block,) = re.findall(r"```sh\n(install -d .*?secrets\b.*?)```", DOCUMENT, re.DOTALL)
    subprocess.run(["/bin/bash", "-euo", "pipefail", "-c", block], cwd=folder, check=True)
    (folder / "secrets" / "api_key").write_text(f"{KEY}\n")
    return folder / "secrets"


@dataclass(slots=True)
class Stack:
    """Redis and PostgreSQL of the file's own commands, and where the others are started."""

    place: Place
    secrets: Path
    redis_port: int
    postgres_port: int

    @property
    def database_url(self) -> str:
        password = (self.secrets / "database_password").read_text().strip()
        return f"postgresql://nightreel:{password}@127.0.0.1:{self.postgres_port}/nightreel"

    def apart(self, **replaced: str) -> Place:
        """The place of a service with ports of its own."""
        return replace(self.place, replaced={**self.place.replaced, **replaced})


@pytest.fixture(scope="module")
def stack(
    image: Path, tmp_path_factory: pytest.TempPathFactory, _redis_binary: str
) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    for name in ("cwd", "redis", "archive", "out", "labels"):
        (folder / name).mkdir()
    secrets = make_secrets(folder)
    redis_port, postgres_port = free_port(), free_port()
    binaries = postgres_binaries()
    password = (secrets / "database_password").read_text().strip()
    place = Place(
        folder / "cwd",
        [image / "bin", binaries, Path(_redis_binary).parent],
        {
            "redis-server": _redis_binary,
            "redis-cli": f"redis-cli -p {redis_port}",
            "redis://redis:6379": f"redis://127.0.0.1:{redis_port}",
            "@postgres/": f"@127.0.0.1:{postgres_port}/",
            MOUNTED_SECRETS: f"{secrets}/",
            "/archive": str(folder / "archive"),
            "/labels": str(folder / "labels"),
        },
        {"PGPORT": str(postgres_port)},
    )
    made = Stack(place, secrets, redis_port, postgres_port)
    at = ("--port", str(redis_port), "--bind", "127.0.0.1", "--dir", str(folder / "redis"))
    with Started(place, SERVICES["redis"], *at) as started:
        started.until_healthy()
        with postgres(place, binaries, password, postgres_port):
            yield made
        assert started.stop() < seconds(SERVICES["redis"]["stop_grace_period"])


def postgres_binaries() -> Path:
    found = Path(shutil.which("initdb") or "")
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found.name:
        return found.resolve().parent
    return installed[-1].parent if installed else missing("PostgreSQL")


@contextmanager
def postgres(place: Place, binaries: Path, password: str, port: int) -> Iterator[None]:
    """A server set up as its image does it, which wants the password, run by the file's command."""
    user = _other_user() if os.getuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="nightreel-deployment-"))
    try:
        (folder / "password").write_text(password)
        if user is not None:
            for path in (folder, folder / "password"):
                shutil.chown(path, user)
        given = SERVICES["postgres"]["environment"]
        subprocess.run(
            [
                *(binaries / "initdb", "-D", folder / "data", "-U", given["POSTGRES_USER"]),
                *("--pwfile", folder / "password", "--auth", "scram-sha-256", "--no-sync"),
                *shlex.split(given["POSTGRES_INITDB_ARGS"]),
            ],
            check=True,
            cwd=folder,
            capture_output=True,
            **_as_user(user),
        )
        program, *options = place.command(SERVICES["postgres"])
        here = [f"port={port}", "listen_addresses=127.0.0.1", "unix_socket_directories="]
        command = [str(binaries / program), "-D", str(folder / "data"), *options]
        command += [word for setting in here for word in ("-c", setting)]

        def answers() -> bool:
            return place.healthy(SERVICES["postgres"])

        service = Service(command, folder / "log", answers, user)
        service.start()
        try:
            url = f"postgresql://nightreel:{password}@127.0.0.1:{port}/postgres"
            with psycopg.connect(url, autocommit=True) as connection:
                connection.execute(f'CREATE DATABASE "{given["POSTGRES_DB"]}"')
            yield
        finally:
            service.stop()
    finally:
        shutil.rmtree(folder)


def test_redis_keeps_what_it_is_given_and_evicts_nothing(stack: Stack) -> None:
    """Started by the file's command, it says so itself, and would refuse long before the
    container's limit."""
    with redis.Redis(port=stack.redis_port) as client:
        config = client.config_get("*")
    assert config["appendonly"] == "yes"
    assert config["appendfsync"] == "everysec"
    assert config["maxmemory-policy"] == "noeviction"
    assert config["save"] == ""
    limit = size(SERVICES["redis"]["deploy"]["resources"]["limits"]["memory"])
    assert 0 < int(config["maxmemory"]) <= limit / 2


def test_postgresql_takes_the_connections_of_many_workers(stack: Stack) -> None:
    """By the file's options; and it lets nobody in without the password."""
    with psycopg.connect(stack.database_url) as connection:
        row = connection.execute("SHOW max_connections").fetchone()
        assert row == ("300",)
    bare = re.sub(r":\w+@", "@", stack.database_url)
    with pytest.raises(psycopg.OperationalError, match="no password"):
        psycopg.connect(bare)


def test_migrating_says_truly_whether_the_tables_are_there(stack: Stack) -> None:
    """0 when they were made, 0 when they were there, and the database's code where it is away or
    the password is wrong."""
    migrate = SERVICES["migrate"]
    for _ in range(2):
        done = stack.place.run(migrate)
        assert done.returncode == ExitCode.OK, done.stderr
    assert "the schema is current" in done.stderr
    away = stack.apart(**{"@postgres/": f"@127.0.0.1:{free_port()}/"})
    assert away.run(migrate).returncode == ExitCode.DATABASE
    wrong = stack.apart(**{f"{MOUNTED_SECRETS}database_password": f"{stack.secrets}/api_key"})
    assert wrong.run(migrate).returncode == ExitCode.DATABASE


def variables(server: ContractServer) -> dict[str, str]:
    return VARIABLES | {"NIGHTREEL_API_URL": server.url, "NIGHTREEL_TASK_SECONDS": "2"}


@contextmanager
def deployed(
    stack: Stack, services: Mapping[str, Mapping[str, Any]], *names: str
) -> Iterator[list[Started]]:
    """Services started by hand, each on a port of its own, once their health checks hold."""
    with ExitStack() as running:
        started = [
            running.enter_context(
                Started(stack.apart(**{METRICS_PORT: str(free_port())}), services[name])
            )
            for name in names
        ]
        for service in started:
            service.until_healthy()
        yield started


@pytest.fixture
def archive(stack: Stack) -> Iterator[Path]:
    folder = Path(stack.place.replaced["/archive"])
    make_clip(folder / "one.mp4", [("red", 6), ("blue", 6)])
    make_clip(folder / "two.mp4", [("green", 4)])
    yield folder
    for file in folder.iterdir():
        file.unlink()


@pytest.fixture
def api() -> Iterator[ContractServer]:
    with contract_server() as server:
        server.key = KEY
        yield server


def until(ask: Callable[[], object], wanted: object) -> None:
    """Ask until the answer is this one, for two minutes at most."""
    deadline = time.monotonic() + 120
    while (found := ask()) != wanted:
        assert time.monotonic() < deadline, f"{found}, not {wanted}"
        time.sleep(0.2)


def metrics(service: Started) -> dict[str, float]:
    """What a service answers to Prometheus, by name and labels."""
    address = service.place.here(f"http://127.0.0.1:{METRICS_PORT}/metrics")
    with urllib.request.urlopen(address) as page:
        lines = page.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def submit(stack: Stack, services: Mapping[str, Any], *labels: str, fit: str = "crop") -> None:
    options = [word for label in labels for word in ("--label", label)]
    done = stack.place.run(services["nightreel"], "submit", "/archive", "--fit", fit, *options)
    assert done.returncode == ExitCode.OK, done.stderr


def test_from_up_to_the_first_answers(stack: Stack, archive: Path, api: ContractServer) -> None:
    """The services start, are found healthy, do what is submitted with the key of the secret file,
    count it, and end in time on SIGTERM."""
    services = read(variables(api))["services"]
    assert stack.place.run(services["migrate"]).returncode == ExitCode.OK
    with deployed(stack, services, "scheduler", "worker") as (scheduler, worker):
        submit(stack, services, "red", "blue")
        waited = stack.place.run(services["nightreel"], "status", "--wait")
        assert waited.returncode == ExitCode.OK, waited.stdout + waited.stderr + worker.said()
        said = stack.place.run(services["nightreel"], "summary", "--format", "json")
        assert {
            (Path(row["video"]).name, row["state"], row["analysed"])
            for row in json.loads(said.stdout)
        } == {("one.mp4", "complete", 1.0), ("two.mp4", "complete", 1.0)}
        # A worker counts what it has committed, and the job may be closed before it has.
        until(lambda: metrics(worker).get("nightreel_frames_total"), 16)
        scraped = metrics(scheduler) | metrics(worker)
        assert scraped["nightreel_leader"] == 1
        assert scraped['nightreel_videos{state="complete"}'] == 2
        exposed = {re.split(r"[{]", name)[0] for name in scraped}
        assert {name for name in metrics_watched() if name.startswith("nightreel")} <= exposed | {
            "nightreel_errors_total"  # none yet
        }
        for service in (worker, scheduler):
            service.stop()
    assert KEY not in scheduler.said() + worker.said()


def test_a_worker_told_to_end_finishes_its_task_first(
    stack: Stack, archive: Path, api: ContractServer
) -> None:
    """SIGTERM in the middle of tasks: each that was begun is committed or given back, the worker
    ends within its grace period, and another one does the rest."""
    services = read(variables(api) | {"WORKER_PROCESSES": "1"})["services"]
    assert stack.place.run(services["migrate"]).returncode == ExitCode.OK
    begun = threading.Event()

    def slowly(handler: Handler, body: dict[str, Any]) -> None:
        if "image" in body:
            begun.set()
            time.sleep(0.5)  # what makes it slow
            images = body["image"] if isinstance(body["image"], list) else [body["image"]]
            vectors = [picture_vector(b64decode(one["value"])) for one in images]
        else:
            texts = body["text"] if isinstance(body["text"], list) else [body["text"]]
            vectors = [text_vector(text) for text in texts]
        answer_with(200, {"embeddings": vectors, "time": 0.001})(handler, body)

    api.always = slowly
    with deployed(stack, services, "scheduler") as _, psycopg.connect(stack.database_url) as db:
        with deployed(stack, services, "worker") as (worker,):
            # What another test had embedded would not be sent again.
            submit(stack, services, "green", "white", fit="squash")
            assert begun.wait(60), worker.said()
            worker.stop()
        row = db.execute("SELECT count(*) FROM tasks WHERE state = 'leased'").fetchone()
        assert row == (0,), worker.said()
        with deployed(stack, services, "worker"):
            waited = stack.place.run(services["nightreel"], "status", "--wait")
            assert waited.returncode == ExitCode.OK, waited.stdout + waited.stderr


@pytest.fixture
def at_home(stack: Stack, tmp_path: Path) -> Place:
    """Where the API at home runs: its image has what this environment has besides."""
    replaced = {"9001": str(free_port()), "0.0.0.0": "127.0.0.1", "/models": str(tmp_path / "clip")}
    (tmp_path / "empty").mkdir()
    return Place(
        tmp_path / "empty",
        [Path(sys.executable).parent],
        replaced,
        {"NIGHTREEL_SERVER_PORT": replaced["9001"], "HF_HUB_OFFLINE": "1"},
    )


def test_the_api_at_home_serves_the_weights_of_a_folder(at_home: Place) -> None:
    """Started by the file's command it is found ready, says which engine it is, and ends in
    time."""
    write_towers(Path(at_home.replaced["/models"]))
    service = read(VARIABLES | {"MODEL_DIR": "/srv/clip"})["services"]["api"]
    with Started(at_home, service) as started:
        started.until_healthy()
        with urllib.request.urlopen(at_home.here("http://127.0.0.1:9001/info")) as answer:
            assert json.load(answer)["engine"] == "clip"
        started.stop()
        assert started.process.returncode == 0


def test_the_api_at_home_does_not_start_without_weights(at_home: Place) -> None:
    """Where none are mounted and none can be fetched, it ends and says so."""
    done = at_home.run(SERVICES["api"])
    assert done.returncode == ExitCode.API
    assert "weights" in done.stderr


def test_flower_starts_on_the_queue_of_the_workers(stack: Stack, tmp_path: Path) -> None:
    """Started by the file's command on the Redis of the others, it is found healthy and ends in
    time."""
    if importlib.util.find_spec("flower") is None:
        missing("flower")
    (tmp_path / "empty").mkdir()
    place = stack.apart(**{"5555": str(free_port()), "0.0.0.0": "127.0.0.1"})
    place = replace(place, folder=tmp_path / "empty", path=[Path(sys.executable).parent])
    with Started(place, SERVICES["flower"]) as started:
        started.until_healthy()
        started.stop()


# --- the monitor ---


DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/nightreel.json").read_text("utf-8"))


def configuration(path: str) -> Any:
    return yaml.safe_load((ROOT / "deploy" / path).read_text("utf-8"))


def expressions() -> list[str]:
    """Every query of dashboard and alerts."""
    shown = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    rules = configuration("prometheus/rules.yml")
    return shown + [rule["expr"] for group in rules["groups"] for rule in group["rules"]]


def metrics_watched() -> set[str]:
    """Every metric that some query names."""
    return {
        name
        for expression in expressions()
        for name in re.findall(r"\b(?:nightreel|clipserver)_\w+", expression)
    }


def test_every_metric_that_is_watched_is_counted(sqlite_url: str) -> None:
    """A metric renamed in the program and not in the dashboard or an alert fails here."""
    counted = CollectorRegistry()
    Meters(counted)
    known = set()
    for metric in counted.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
        known |= {metric.name + suffix for suffix in suffixes.get(metric.type, [""])}
    at_home = Metrics("clip", "model", lambda: {"image": 0})
    at_home.answered("/info", 200, 0.1)
    known |= set(re.findall(r"^(clipserver_\w+)", at_home.exposition(), re.MULTILINE))
    engine = database.connect(sqlite_url)
    known |= {metric.name for metric in LedgerCollector(engine, lambda: 0, lambda: True).collect()}
    engine.dispose()
    assert metrics_watched() <= known
    assert {"nightreel_tasks_total", "nightreel_leader", "clipserver_held"} <= metrics_watched()


RULES = {
    rule["alert"]: rule
    for group in configuration("prometheus/rules.yml")["groups"]
    for rule in group["rules"]
}
WELL = {
    'nightreel_up{service="database"}': "1x60",
    'nightreel_up{service="queue"}': "1x60",
    "nightreel_leader": "1x60",
    'nightreel_jobs{state="running"}': "1x40 0x20",
    'up{job="worker"}': "1x60",
    'nightreel_tasks{state="pending"}': "1000-20x40 0x20",
    'nightreel_tasks_total{outcome="done"}': "0+20x60",
    'nightreel_probes_total{outcome="done"}': "0x60",
    'nightreel_errors_total{kind="read-error"}': "0+1x60",
    'nightreel_events{state="given-up"}': "0x60",
    "nightreel_queue_length": "64x60",
    "nightreel_queue_age_seconds": "300x60",
}
"""Series by the minute of an hour in which all is well."""
NONE = "_x60"


@pytest.mark.parametrize(
    ("changes", "alerts"),
    [
        ({}, {}),
        ({"nightreel_leader": NONE}, {"NoScheduler": {}}),
        ({"nightreel_leader": "0x60"}, {"NoScheduler": {}}),
        ({'nightreel_up{service="queue"}': "0x60"}, {"ServiceAway": {"service": "queue"}}),
        (
            {'nightreel_tasks_total{outcome="done"}': "500x60"},
            {"NothingConsumes": {}},
        ),
        (
            # A queue that is full takes nothing, and what was in it is done.
            {
                'nightreel_up{service="queue"}': "0x60",
                'nightreel_jobs{state="running"}': "1x60",
                'nightreel_tasks{state="pending"}': "1000x60",
                'nightreel_tasks_total{outcome="done"}': "500x60",
                "nightreel_queue_length": NONE,
            },
            {"ServiceAway": {"service": "queue"}, "NothingDone": {}},
        ),
        (
            # What a person has paused may wait.
            {
                'nightreel_jobs{state="running"}': "0x60",
                'nightreel_jobs{state="paused"}': "1x60",
                'nightreel_tasks{state="pending"}': "1000x60",
                'nightreel_tasks_total{outcome="done"}': "500x60",
                "nightreel_queue_length": "0x60",
            },
            {},
        ),
        (
            # Reading new files is work, too.
            {
                'nightreel_tasks_total{outcome="done"}': "0x60",
                'nightreel_probes_total{outcome="done"}': "0+1x60",
            },
            {},
        ),
        (
            {
                'nightreel_tasks_total{outcome="done"}': "500x60",
                "nightreel_queue_length": "0x60",
            },
            {},
        ),
        (
            {
                'up{job="worker"}': NONE,
                'nightreel_jobs{state="running"}': "1x60",
                'nightreel_tasks{state="pending"}': "1000x60",
                'nightreel_tasks_total{outcome="done"}': NONE,
                'nightreel_probes_total{outcome="done"}': NONE,
                "nightreel_queue_age_seconds": "0+60x60",
            },
            {"NoWorker": {}, "NothingConsumes": {}, "NothingDone": {}, "QueueOld": {}},
        ),
        (
            {'nightreel_errors_total{kind="read-error"}': "0+10x60"},
            {"TasksFail": {"kind": "read-error"}},
        ),
        ({'nightreel_events{state="given-up"}': "0x30 1x30"}, {"WebhookGivenUp": {}}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_an_alert_fires_when_it_should_and_not_otherwise(
    tmp_path: Path, changes: dict[str, str], alerts: dict[str, dict[str, str]]
) -> None:
    """As Prometheus itself evaluates the rules over an hour that is well but for what changes."""
    if shutil.which("promtool") is None:
        missing("promtool")

    def fired(name: str) -> dict[str, Any]:
        labels, annotations = alerts[name], dict(RULES[name]["annotations"])
        for label, value in labels.items():
            shown = annotations["summary"].replace(f"{{{{ $labels.{label} }}}}", value)
            annotations["summary"] = shown
        return {"exp_labels": labels, "exp_annotations": annotations}

    expected = [
        {
            "eval_time": "50m",
            "alertname": name,
            "exp_alerts": [fired(name)] if name in alerts else [],
        }
        for name in RULES
    ]
    series = [{"series": name, "values": values} for name, values in (WELL | changes).items()]
    hour = {"interval": "1m", "input_series": series, "alert_rule_test": expected}
    rules = str(ROOT / "deploy" / "prometheus" / "rules.yml")
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [rules], "tests": [hour]}))
    done = subprocess.run(
        ["promtool", "test", "rules", file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_label_that_is_asked_for_is_one_that_is_given(sqlite_url: str) -> None:
    """A label or a value of one that was renamed in the program fails here."""
    counted = CollectorRegistry()
    Meters(counted)
    engine = database.connect(sqlite_url)
    given: dict[str, dict[str, set[str]]] = {}
    for metric in [
        *counted.collect(),
        *LedgerCollector(engine, lambda: 0, lambda: True).collect(),
    ]:
        for sample in metric.samples:
            labels = given.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    engine.dispose()
    asked = [
        (name, label, value)
        for expression in expressions()
        for name, matchers in re.findall(r"(nightreel_\w+)\{(.*?)\}", expression)
        for label, values in re.findall(r"(\w+)=~?\"(.*?)\"", matchers)
        for value in values.split("|")
    ]
    assert ("nightreel_events", "state", "given-up") in asked
    for name, label, value in asked:
        assert value in given[name][label], (name, label, value)


def test_every_replica_is_asked_for_its_metrics() -> None:
    """By name service, at the port where the service says that it serves them."""
    jobs = configuration("prometheus/prometheus.yml")["scrape_configs"]
    asked = {}
    for job in jobs:
        (found,) = job["dns_sd_configs"]
        assert found["type"] == "A"
        asked[job["job_name"]] = (found["names"], found["port"])
    for name in ("scheduler", "worker"):
        environment = SERVICES[name]["environment"]
        assert asked[name] == ([name], int(environment["NIGHTREEL_METRICS_PORT"]))
        assert environment["NIGHTREEL_METRICS_HOST"] == "0.0.0.0"
        assert set(SERVICES[name]["networks"]) & set(SERVICES["prometheus"]["networks"])
    assert asked["api"] == (["api"], 9001)


def test_grafana_finds_its_dashboard_and_its_data() -> None:
    """Folders are mounted where the provisioning names them; every panel asks the data source
    that is provisioned, and lies beside the others."""
    (source,) = configuration("grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = configuration("grafana/provisioning/dashboards/nightreel.yml")["providers"]
    mounted = dict(volume.split(":")[:2][::-1] for volume in SERVICES["grafana"]["volumes"])
    assert (ROOT / mounted[provider["options"]["path"]] / "nightreel.json").exists()
    assert mounted["/etc/grafana/provisioning"] == "./deploy/grafana/provisioning"
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        assert panel["datasource"]["uid"] == source["uid"]
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_grafana_s_own_types_know_every_word_of_the_dashboard() -> None:
    """Read and written again by the types that Grafana publishes, which drop what they do not know,
    all of it is there: no option of a panel is misspelt or in the wrong place."""
    register_default_plugins()
    known = Dashboard.from_json(DASHBOARD)
    again = json.loads(JSONEncoder().encode(known))
    assert list(lost(DASHBOARD, again, "dashboard")) == []


def lost(given: Any, found: Any, place: str) -> Iterator[str]:
    """Places of what was given and is not found, or is something else there."""
    if isinstance(given, dict) and isinstance(found, dict):
        for name, value in given.items():
            yield from lost(value, found.get(name), f"{place}.{name}")
    elif isinstance(given, list) and isinstance(found, list) and len(given) == len(found):
        for number, pair in enumerate(zip(given, found, strict=True)):
            yield from lost(*pair, f"{place}[{number}]")
    elif given != found:
        yield place


PANELS = {panel["title"]: [t["expr"] for t in panel["targets"]] for panel in DASHBOARD["panels"]}
QUIET = {"Errors"}
"""Panels without a series as long as nothing goes wrong."""


@pytest.fixture
def watching(tmp_path: Path) -> Place:
    """Where Prometheus runs: it asks every second, at addresses instead of names, and stands in for
    the name that Grafana knows it by."""
    for program in ("prometheus", "wget"):
        if shutil.which(program) is None:
            missing(program)
    (tmp_path / "prometheus" / "data").mkdir(parents=True)
    inside = {
        "/etc/prometheus/": f"{tmp_path}/prometheus/",
        "=/prometheus": f"={tmp_path}/prometheus/data",
        "//prometheus:": "//127.0.0.1:",
        "9090": str(free_port()),
    }
    return Place(tmp_path / "prometheus", [], inside)


def write_targets(watching: Place, ports: Mapping[str, int]) -> None:
    """Prometheus's files with the ports of services here for the names that it would look up."""
    asked = configuration("prometheus/prometheus.yml")
    asked["global"] = dict.fromkeys(asked["global"], "1s")
    for job in asked["scrape_configs"]:
        del job["dns_sd_configs"]
        job["static_configs"] = [{"targets": [f"127.0.0.1:{ports[job['job_name']]}"]}]
    (watching.folder / "prometheus.yml").write_text(yaml.safe_dump(asked))
    shutil.copy(ROOT / "deploy" / "prometheus" / "rules.yml", watching.folder)


def test_what_befalls_a_deployment_is_seen_on_its_dashboard(
    stack: Stack, archive: Path, at_home: Place, watching: Place
) -> None:
    """All that the file starts at once, Prometheus by its own command: each service is asked, every
    panel's queries answer at the address that Grafana is given, and once all is done no alert is
    up."""
    write_towers(Path(at_home.replaced["/models"]))
    services = read(
        VARIABLES
        | {"MODEL_DIR": "/srv/clip", "NIGHTREEL_TASK_SECONDS": "2"}
        | {"NIGHTREEL_API_URL": at_home.here("http://127.0.0.1:9001")}
    )["services"]
    ports = {"scheduler": free_port(), "worker": free_port(), "api": int(at_home.here("9001"))}
    write_targets(watching, ports)
    (source,) = configuration("grafana/provisioning/datasources/prometheus.yml")["datasources"]

    def ask(path: str, **query: str) -> Any:
        address = f"{watching.here(source['url'])}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(address) as answer:
            return json.load(answer)["data"]

    def shown() -> set[str]:
        return {
            title
            for title, queries in PANELS.items()
            if all(ask("query", query=query)["result"] for query in queries)
        }

    assert stack.place.run(services["migrate"]).returncode == ExitCode.OK
    with ExitStack() as running:
        for place, name, *more in (
            (at_home, "api"),
            *((stack.apart(**{METRICS_PORT: str(ports[n])}), n) for n in ("scheduler", "worker")),
            (watching, "prometheus", watching.here("--web.listen-address=127.0.0.1:9090")),
        ):
            # The image's own entry point, where the file says none.
            service = {"entrypoint": ["prometheus"]} if name == "prometheus" else {}
            started = running.enter_context(Started(place, service | services[name], *more))
            started.until_healthy()
        submit(stack, services, "red", "blue", fit="pad")
        waited = stack.place.run(services["nightreel"], "status", "--wait")
        assert waited.returncode == ExitCode.OK, waited.stdout + waited.stderr
        until(lambda: set(PANELS) - QUIET - shown(), set())

        # What Prometheus asked last is a second old, and a service that was busy is late.
        def asked() -> dict[str, str]:
            return {t["labels"]["job"]: t["health"] for t in ask("targets")["activeTargets"]}

        until(asked, dict.fromkeys(ports, "up"))

        def rules() -> dict[str, str]:
            (group,) = ask("rules")["groups"]
            return {rule["name"]: rule["health"] for rule in group["rules"]}

        until(rules, dict.fromkeys(RULES, "ok"))
        # While the job ran, a rule that waits before it fires may have held.
        until(lambda: ask("alerts")["alerts"], [])
        started.stop()


# --- the document ---


def commands_of_the_document() -> list[str]:
    """Each command line of the fenced blocks, with its continuations."""
    blocks = re.findall(r"```sh\n(.*?)```", DOCUMENT, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def check_nightreel(arguments: list[str]) -> None:
    """The command exists and takes these options."""
    command: click.Command = cli
    context = click.Context(cli, resilient_parsing=True)
    while isinstance(command, click.Group):
        name, *arguments = arguments
        found = command.get_command(context, name)
        assert found is not None, f"no command {name}"
        command = found
    command.make_parser(click.Context(command)).parse_args(list(arguments))


def check_compose(arguments: list[str]) -> None:
    """The subcommand is one of compose, and each service it names is one of the file."""
    while arguments[0] in ("--profile", "--env-file"):
        if arguments[0] == "--profile":
            known = {name for service in SERVICES.values() for name in service.get("profiles", ())}
            assert arguments[1] in known
        arguments = arguments[2:]
    verb, *rest = arguments
    assert verb in {"up", "down", "build", "run", "exec", "logs", "ps", "stop", "config", "pull"}
    while rest and rest[0].startswith("-"):
        option, *rest = rest
        if option == "--scale":
            assert rest[0].split("=")[0] in SERVICES
        if option in ("--scale", "--tail"):
            rest = rest[1:]
    if verb == "run":
        name, *words_of_it = rest
        assert name == "nightreel"
        check_nightreel(words_of_it)
    elif verb == "exec":
        assert rest[0] in SERVICES
    else:
        assert set(rest) <= set(SERVICES)


@pytest.mark.parametrize("line", commands_of_the_document())
def test_every_command_of_the_document_is_one_that_exists(line: str) -> None:
    """Services, subcommands and options are those of the files and of the program."""
    subprocess.run(["/bin/bash", "-n", "-c", line], check=True)
    for part in re.split(r"\s*(?:\||&&|;)\s*", line):
        arguments = shlex.split(re.split(r"\s[<>]", part)[0], comments=True)
        if arguments[:2] == ["docker", "compose"]:
            check_compose(arguments[2:])
        elif arguments[:1] == ["nightreel"]:
            check_nightreel(arguments[1:])


def test_the_document_shows_the_files_as_they_are() -> None:
    """Every file and service that it names exists; every service is named."""
    for name in SERVICES:
        assert f"`{name}`" in DOCUMENT, name
    for path in re.findall(r"`((?:deploy|docs)/[\w./-]+)`", DOCUMENT):
        assert (ROOT / path).exists(), path
    assert SERVICES["worker"]["stop_grace_period"].removesuffix("s") + " s" in DOCUMENT
