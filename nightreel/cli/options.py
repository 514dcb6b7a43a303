"""Options that several commands share, and the values they parse to."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any, TypeVar

import click

from nightreel.cli.output import FORMATS

Command = TypeVar("Command", bound=Callable[..., Any])

DURATION = re.compile(r"(?P<number>\d+(?:\.\d+)?|\d+/\d+)(?P<unit>ms|s|min|m|h)?")
LONGEST_NUMBER = 30
"""Characters of a number: more are no time and no rate, and cost time to read."""
LONGEST_S = 10**7
HIGHEST_RATE = Fraction(1000)
"""Samples a second: no footage has more frames, and its times are kept in microseconds."""
UNITS = {
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "m": Fraction(60),
    "min": Fraction(60),
    "h": Fraction(3600),
}
JOB_ID = click.IntRange(1, 2**31 - 1)
"""The number of a job."""


class Duration(click.ParamType[Fraction]):
    """A time such as `2s`, `0.5`, `500ms` or `2min`, as exact seconds."""

    name = "duration"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Fraction:
        if isinstance(value, Fraction):
            return value
        found = DURATION.fullmatch(str(value).strip())
        seconds = _exact(found["number"]) if found is not None else None
        if found is None or seconds is None:
            units = "the units are ms, s, min and h"
            self.fail(f"{value!r} is no time: write 2s, 500ms, 0.5 or 2min; {units}", param, ctx)
        if seconds == 0:
            self.fail(f"{value!r} is no time above 0: write 2s, 500ms, 0.5 or 2min", param, ctx)
        seconds *= UNITS[found["unit"] or "s"]
        if seconds < 1 / HIGHEST_RATE:
            self.fail(f"{value!r} is shorter than 1ms: write 2s, 500ms, 0.5 or 2min", param, ctx)
        if seconds > LONGEST_S:
            self.fail(f"{value!r} is longer than {LONGEST_S}s: write 2s, 5min or 1h", param, ctx)
        return seconds


class Rate(click.ParamType[Fraction]):
    """A rate such as `1`, `0.5` or `1/5`, as exact samples a second."""

    name = "rate"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Fraction:
        if isinstance(value, Fraction):
            return value
        rate = _exact(str(value).strip())
        if rate is None or rate <= 0:
            self.fail(f"{value!r} is no rate above 0: write 1, 0.5 or 1/5", param, ctx)
        if rate > HIGHEST_RATE:
            self.fail(f"{value!r} is more than {HIGHEST_RATE}: write 1, 0.5 or 1/5", param, ctx)
        return rate


class Share(click.ParamType[Fraction]):
    """A share such as `1%`, `0.01` or `1/100`, exactly."""

    name = "share"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Fraction:
        if isinstance(value, Fraction):
            return value
        text = str(value).strip()
        share = _exact(text.removesuffix("%"))
        if share is not None and text.endswith("%"):
            share /= 100
        if share is None or not 0 <= share <= 1:
            self.fail(f"{value!r} is no share from 0 to 100%: write 1%, 0.01 or 1/100", param, ctx)
        return share


class FiniteFloat(click.FloatRange):
    """A number within a range; click's own type lets `nan` through, and `inf` where no end is."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is no finite number", param, ctx)
        return number


def _exact(text: str) -> Fraction | None:
    if len(text) > LONGEST_NUMBER or "e" in text.lower():
        return None
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
        type=JOB_ID,
        default=None,
        metavar="ID",
        help="Job to ask about.  [default: the latest]",
    )(command)


def api_options(command: Command) -> Command:
    """Add `--api` and `--engine`, for commands that ask only what is not remembered."""
    engine = click.option(
        "--engine",
        envvar="NIGHTREEL_ENGINE",
        type=click.Choice(["auto", "clip", "offline"]),
        default="auto",
        show_default=True,
        help="Engine of the API at home; auto takes the one that made the embeddings.",
    )
    api = click.option(
        "--api",
        "api_url",
        envvar="NIGHTREEL_API_URL",
        metavar="URL",
        help="API that made the embeddings; without it one is served on this machine.",
    )
    return api(engine(command))
