"""What a worker reads from its environment (prefix `NIGHTREEL_`)."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

MAX_BATCH = 8
"""The real server answers 500 beyond this many pictures, or prompts of a comparison."""


class KeyUnreadable(Exception):
    """The file that should hold the API key cannot be read."""


class KeyTransport(StrEnum):
    """Where a request carries the API key."""

    AUTO = "auto"
    """In the query for `*.roboflow.com`, in the body elsewhere: as the vendor's own client does."""
    QUERY = "query"
    HEADER = "header"
    BODY = "body"


class QueueSettings(BaseSettings):
    """The queue, as scheduler and workers see it."""

    model_config = SettingsConfigDict(env_prefix="NIGHTREEL_")

    broker_url: SecretStr = Field(
        default=SecretStr("redis://127.0.0.1:6379/0"), description="Redis that carries the tasks"
    )
    queue: str = Field(default="nightreel", description="name of the queue on that Redis")


class LogFormat(StrEnum):
    """How a service writes its log."""

    TEXT = "text"
    JSON = "json"


class ServiceSettings(BaseSettings):
    """How a service (scheduler, worker) shows itself to those who watch it."""

    model_config = SettingsConfigDict(env_prefix="NIGHTREEL_")

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
        description="seconds after which a worker that takes nothing while messages wait ends "
        "itself; 0: never",
    )


class WorkerSettings(BaseSettings):
    """The API and the pace of a worker process."""

    model_config = SettingsConfigDict(env_prefix="NIGHTREEL_")

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
        default=5, ge=1, description="tries of a task that fails by its own fault"
    )
    worker_name: str = Field(default="", description="prefix of the worker's name in the ledger")

    def key(self) -> str | None:
        """The API key, from the environment or from the secret file; None where none is set.

        Raises KeyUnreadable where the secret file cannot be read.
        """
        if self.api_key is not None:
            return self.api_key.get_secret_value().strip() or None
        if self.api_key_file is None:
            return None
        try:
            return self.api_key_file.read_text(encoding="utf-8").strip() or None
        except (OSError, UnicodeDecodeError) as error:
            raise KeyUnreadable(
                f"the API key file {self.api_key_file} cannot be read ({error}): "
                "check NIGHTREEL_API_KEY_FILE"
            ) from error
