"""What the scheduler reads from its environment (prefix `NIGHTREEL_`)."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class SchedulerSettings(BaseSettings):
    """The pace of feeding and sweeping."""

    model_config = SettingsConfigDict(env_prefix="NIGHTREEL_")

    task_seconds: int = Field(
        default=60, ge=1, description="seconds of video in a task, cut at the next keyframe"
    )
    window: int = Field(
        default=64, ge=1, description="most tasks queued or running at once; 4 a worker process"
    )
    feed_interval_s: float = Field(default=0.5, gt=0, description="seconds between feeds")
    sweep_interval_s: float = Field(default=10.0, gt=0, description="seconds between sweeps")
    queued_timeout_s: int = Field(
        default=120, ge=1, description="seconds after which a message nobody took is sent again"
    )
