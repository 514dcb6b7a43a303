"""Where the results live, as the environment says it, and how it holds secrets."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict


class SecretUnreadable(Exception):
    """The file that should hold a key or password cannot be read; the message names the setting."""


def read_secret(setting: str, value: SecretStr | None, file: Path | None) -> str | None:
    """The secret that the environment holds as `value` or in `file`, which `setting` names; None
    where neither is given or both are empty. Raises SecretUnreadable."""
    given = value.get_secret_value().strip() if value is not None else ""
    if given or file is None:
        return given or None
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        raise SecretUnreadable(
            f"the secret file {file} cannot be read ({type(error).__name__}): check {setting}"
        ) from error


def complaint(error: ValidationError) -> str:
    """What is wrong with settings, in one line that names the variables and shows no value."""
    wrong = error.errors(include_url=False, include_input=False)
    return "; ".join(f"NIGHTREEL_{one['loc'][0]}".upper() + f": {one['msg']}" for one in wrong)


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

    def database_password(self) -> str | None:
        """What the password file holds, if there is one. Raises SecretUnreadable."""
        return read_secret("NIGHTREEL_DATABASE_PASSWORD_FILE", None, self.database_password_file)
