"""Options that several commands share, and the values they parse to."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any, TypeVar

import click

from nightreel.cli.output import FORMATS

Command = TypeVar("Command", bound=Callable[..., Any])

DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?|\d+/\d+)(?P<unit>ms|s|min|m|h)?")
UNITS = {
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "m": Fraction(60),
    "min": Fraction(60),
    "h": Fraction(3600),
}


class Duration(click.ParamType[Fraction]):
    """A time such as `2s`, `0.5`, `500ms` or `2min`, as exact seconds."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Fraction:
        if isinstance(value, Fraction):
            return value
        found = DURATION.fullmatch(str(value).strip())
        if found is None or (seconds := _exact(found["number"])) is None or seconds <= 0:
            self.fail(f"{value!r} is no time above 0: write 2s, 500ms, 0.5 or 2min", param, ctx)
        return seconds * UNITS[found["unit"] or "s"]


class Rate(click.ParamType[Fraction]):
    """A rate such as `1`, `0.5` or `1/5`, as exact samples a second."""

    name = "rate"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Fraction:
        if isinstance(value, Fraction):
            return value
        rate = _exact(str(value).strip())
        if rate is None or not 0 < rate <= 1000:
            self.fail(f"{value!r} is no rate above 0: write 1, 0.5 or 1/5", param, ctx)
        return rate


def _exact(text: str) -> Fraction | None:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None


def database_option(command: Command) -> Command:
    """Add `--db`."""
    return click.option(
        "--db",
        "database_url",
        envvar="NIGHTREEL_DATABASE_URL",
        default="sqlite:///nightreel.db",
        show_default=True,
        metavar="URL",
        help="Results database: sqlite:///FILE or postgresql://USER@HOST/NAME.",
    )(command)


def format_option(command: Command) -> Command:
    """Add `--format`."""
    return click.option(
        "--format",
        "form",
        type=click.Choice(FORMATS),
        default="table",
        show_default=True,
        help="How rows are written to standard output.",
    )(command)


def job_option(command: Command) -> Command:
    """Add `--job`."""
    return click.option(
        "--job",
        "job_id",
        type=int,
        default=None,
        metavar="ID",
        help="Job to ask about.  [default: the latest]",
    )(command)
