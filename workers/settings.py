"""What a worker reads from its environment (prefix `NIGHTREEL_`)."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from urllib.parse import quote, urlsplit

from pydantic import Field, SecretStr, field_validator
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from storage.settings import SecretUnreadable, read_secret

MAX_BATCH = 8
"""The real server answers 500 beyond this many pictures, or prompts of a comparison."""


class KeyTransport(StrEnum):
    """Where a request carries the API key."""

    AUTO = "auto"
    """In the query for `*.roboflow.com`, in the body elsewhere: as the vendor's own client does."""
    QUERY = "query"
    HEADER = "header"
    BODY = "body"


class QueueSettings(BaseSettings):
    """The queue, as scheduler and workers see it."""

    # No error shows its input: the address may hold a password.
    model_config = SettingsConfigDict(env_prefix="NIGHTREEL_", hide_input_in_errors=True)

    broker_url: SecretStr = Field(
        default=SecretStr("redis://127.0.0.1:6379/0"), description="Redis that carries the tasks"
    )
    broker_password_file: Path | None = Field(
        default=None,
        description="file that holds that Redis's password, where the address names none",
    )
    queue: str = Field(default="nightreel", description="name of the queue on that Redis")

    @field_validator("broker_url")
    @classmethod
    def _of_a_redis(cls, url: SecretStr) -> SecretStr:
        # Celery takes whatever it does not understand for the name of an AMQP host.
        if not _is_redis(url.get_secret_value()):
            raise PydanticCustomError(
                "broker_url",
                "this is no address of a Redis: write redis://HOST:6379/0, rediss:// for TLS, "
                "redis+socket:///FILE for a socket",
            )
        return url

    def address(self) -> str:
        """The broker's address with the password of the secret file, where there is one and the
        address names none. Raises SecretUnreadable."""
        url = self.broker_url.get_secret_value()
        parts = urlsplit(url)
        if parts.password is not None or parts.hostname is None:
            return url
        setting = "NIGHTREEL_BROKER_PASSWORD_FILE"
        password = read_secret(setting, None, self.broker_password_file)
        if password is None:
            return url
        user, _, host = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}").geturl()


def _is_redis(url: str) -> bool:
    """Whether this is an address that Celery and redis-py take for the same Redis."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return False
    if not url.startswith(f"{parts.scheme}://"):
        return False
    if parts.scheme == "redis+socket":
        return parts.path.startswith("/")
    database = parts.path.removeprefix("/")
    named = parts.hostname is not None and (not database or database.isdecimal())
    return parts.scheme in ("redis", "rediss") and named


class LogFormat(StrEnum):
    """How a service writes its log."""

    TEXT = "text"
    JSON = "json"


class ServiceSettings(BaseSettings):
    """How a service (scheduler, worker) shows itself to those who watch it."""

    model_config = SettingsConfigDict(env_prefix="NIGHTREEL_", allow_inf_nan=False)

    log_format: LogFormat = Field(
        default=LogFormat.TEXT, description="log lines as text, or as JSON: one object a line"
    )
    log_level: str = Field(
        default="INFO",
        pattern="^(DEBUG|INFO|WARNING|ERROR)$",
        description="least level that is logged: DEBUG, INFO, WARNING or ERROR",
    )
    metrics_host: str = Field(
        default="127.0.0.1", description="address on which metrics are served"
    )
    metrics_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="port of the metrics; 0 takes a free one, none serves no metrics",
    )
    stall_s: float = Field(
        default=120.0,
        ge=0,
        le=24 * 3600,
        description="seconds after which a worker that takes nothing while messages wait ends "
        "itself; 0: never",
    )


class WorkerSettings(BaseSettings):
    """The API and the pace of a worker process."""

    model_config = SettingsConfigDict(env_prefix="NIGHTREEL_", allow_inf_nan=False)

    api_url: str = Field(
        default="http://127.0.0.1:9001", description="base address of the classification API"
    )
    api_key: SecretStr | None = Field(default=None, description="key of the API")
    api_key_file: Path | None = Field(default=None, description="file that holds the key instead")
    api_key_transport: KeyTransport = Field(
        default=KeyTransport.AUTO, description="where the key travels: auto, query, header or body"
    )
    api_way: str = Field(
        default="auto",
        pattern="^(auto|embed|compare)$",
        description="routes to use: embed, compare, or auto to ask the endpoint",
    )
    clip_version: str = Field(
        default="ViT-B-16", description="model asked of an API that serves several"
    )
    api_in_flight: int = Field(
        default=4, ge=1, le=64, description="most requests under way at once in a worker process"
    )
    api_max_rps: float | None = Field(
        default=None, gt=0, description="most requests a second of all workers together"
    )
    api_connect_timeout_s: float = Field(default=5.0, gt=0, description="seconds to connect")
    api_read_timeout_s: float = Field(default=60.0, gt=0, description="seconds to wait for answers")
    api_attempts: int = Field(
        default=4, ge=1, description="tries of one request before its task is put back"
    )
    lease_s: int = Field(
        default=90, ge=3, description="seconds a claimed task is held without a heartbeat"
    )
    max_attempts: int = Field(
        default=5,
        ge=1,
        le=100,
        description="tries of a task that fails by its own fault, or whose workers vanish",
    )
    worker_name: str = Field(default="", description="prefix of the worker's name in the ledger")

    def key(self) -> str | None:
        """The API key, from the environment or from the secret file; None where none is set.

        Raises SecretUnreadable, also for what no header can carry: the error of whoever tried would
        show it whole.
        """
        key = read_secret("NIGHTREEL_API_KEY_FILE", self.api_key, self.api_key_file)
        if key is not None and not _is_one_word(key):
            raise SecretUnreadable(
                "the API key holds a space, a line break or another character that no header "
                "carries: check NIGHTREEL_API_KEY or the file that NIGHTREEL_API_KEY_FILE names, "
                "which may hold the key alone"
            )
        return key


def _is_one_word(key: str) -> bool:
    """Whether a key has printable Latin-1 characters alone, and no space."""
    return key.isprintable() and " " not in key and max(map(ord, key)) < 256
