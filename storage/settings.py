"""Where the results live, as the environment says it."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict


class StorageSettings(BaseSettings):
    """Settings that every process needs which reads or writes the database."""

    model_config = SettingsConfigDict(env_prefix="NIGHTREEL_", env_file=None, extra="ignore")

    # Left out of repr(), since it may hold a password.
    database_url: str = Field(
        default="sqlite:///nightreel.db",
        repr=False,
        description="Database of ledger and results: sqlite:///FILE or postgresql://USER@HOST/NAME",
    )
    database_password_file: Path | None = Field(
        default=None,
        description="file that holds the database's password, where the address names none",
    )
