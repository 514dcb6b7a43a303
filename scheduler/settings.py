"""What the scheduler reads from its environment (prefix `NIGHTREEL_`)."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from storage.settings import read_secret

SOON_S = 30
"""Most seconds between steps: a loop that has not gone round for a minute counts as ill."""
DAY_S = 24 * 3600


class SchedulerSettings(BaseSettings):
    """The pace of feeding and sweeping."""

    model_config = SettingsConfigDict(env_prefix="NIGHTREEL_", allow_inf_nan=False)

    task_seconds: int = Field(
        default=60,
        ge=1,
        le=DAY_S,
        description="seconds of video in a task, cut at the next keyframe",
    )
    window: int = Field(
        default=64,
        ge=1,
        le=1_000_000,
        description="most tasks queued or running at once, 4 a worker process; beside them an "
        "eighth as many files to be probed",
    )
    feed_interval_s: float = Field(
        default=0.5, gt=0, le=SOON_S, description="seconds between feeds"
    )
    sweep_interval_s: float = Field(
        default=10.0, gt=0, le=DAY_S, description="seconds between sweeps"
    )
    queued_timeout_s: int = Field(
        default=120,
        ge=1,
        le=DAY_S,
        description="seconds after which a message nobody took is sent again",
    )
    leader_lease_s: float = Field(
        default=15.0,
        gt=0,
        le=DAY_S,
        description="seconds after which another scheduler takes over from one that is gone",
    )
    notify_secret: SecretStr | None = Field(
        default=None, description="secret that signs what is sent to `--notify` addresses"
    )
    notify_secret_file: Path | None = Field(
        default=None, description="file that holds that secret instead"
    )

    max_attempts: int = Field(
        default=5,
        ge=1,
        le=100,
        description="tries of a task that fails by its own fault, or whose workers vanish",
    )

    def secret(self) -> str | None:
        """What signs webhooks, from the environment or from the secret file; None where none is
        set. Raises SecretUnreadable."""
        return read_secret(
            "NIGHTREEL_NOTIFY_SECRET_FILE", self.notify_secret, self.notify_secret_file
        )
