"""Rows to standard output as a table, JSON, JSON Lines or CSV; talk to standard error."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import click

from storage.exits import ExitCode

if TYPE_CHECKING:
    from rich.console import Console

Row = Mapping[str, Any]
Justify = Literal["left", "right"]
VIDEO = "video"
"""Key of the column of paths."""
FORMATS = ("table", "json", "jsonl", "csv")


class OutputError(Exception):
    """Standard output does not take the rows (a full disk)."""

    code = ExitCode.UNEXPECTED


@dataclass(frozen=True, slots=True)
class Column:
    """One field of the rows: its key in data, its title and looks in a table."""

    key: str
    title: str
    show: Callable[[Any], str] = lambda value: "" if value is None else str(value)
    justify: Justify = "left"


def write_rows(
    rows: Sequence[Row], columns: Sequence[Column], form: str, notices: Iterable[str | None] = ()
) -> None:
    """Write `rows` to standard output. `notices` stand below a table, and on standard error beside
    data, so that a warning about the results is never lost and never breaks a parser."""
    said = list(dict.fromkeys(notice for notice in notices if notice))
    with to_standard_output():
        _write(rows, columns, form, said)


@contextmanager
def to_standard_output() -> Iterator[None]:
    """What is written within reaches its reader, or the reader is gone, or OutputError says why."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`head`, `less`) has seen enough. Python would try to flush once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OutputError(f"the rows cannot be written: {error.strerror}") from None


def _write(rows: Sequence[Row], columns: Sequence[Column], form: str, said: Sequence[str]) -> None:
    if form == "table":
        _table(rows, columns, said)
        return
    out = sys.stdout
    data = ({column.key: row[column.key] for column in columns} for row in rows)
    if form == "json":
        json.dump(list(data), out, ensure_ascii=False, indent=2)
        out.write("\n")
    elif form == "jsonl":
        out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in data)
    else:
        writer = csv.DictWriter(out, [column.key for column in columns], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: _flat(v) for k, v in row.items()} for row in data)
    for notice in said:
        say(f"note: {notice}")


def _flat(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value


def console() -> Console:
    """A console on standard output. Into a file or a pipe nothing is folded or cut, whatever the
    terminal's width."""
    from rich.console import Console

    class Pipe(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Pipe() if sys.stdout.isatty() else Pipe(width=10_000)


def _table(rows: Sequence[Row], columns: Sequence[Column], notices: Sequence[str]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = console()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1))
    for column in columns:
        table.add_column(column.title, justify=column.justify, overflow="fold")
    folder = _common_folder([row[VIDEO] for row in rows if row.get(VIDEO)])
    for row in rows:
        cells = {column.key: column.show(row[column.key]) for column in columns}
        if folder:
            cells[VIDEO] = cells[VIDEO].removeprefix(folder)
        table.add_row(*map(Text, cells.values()))
    if folder:
        shown.print(Text(f"Videos in {folder}", style="dim"))
    shown.print(table)
    for notice in notices:
        shown.print(Text(f"NOTE: {notice}", style="bold yellow"))


def _common_folder(paths: Sequence[str]) -> str:
    """The deepest folder that all paths lie below, with its slash; empty where there is none, so
    that a table names it once and not in every row."""
    folders = {os.path.dirname(path) for path in paths}
    common = os.path.commonpath(folders) if folders and all(map(os.path.isabs, folders)) else "/"
    return f"{common}/" if common != "/" else ""


def say(message: str) -> None:
    """Write one line of talk to standard error; nobody may be listening any more."""
    with suppress(OSError, ValueError):
        click.echo(message, err=True)


def counted(number: int, thing: str) -> str:
    """A number of things in words."""
    return f"{number:,} {thing}{'s' * (number != 1)}"


def duration(seconds: float | None) -> str:
    """Seconds as a person reads them: `9.5 s`, `2:05`, `1:02:05`."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def clock(seconds: float | None) -> str:
    """A place in a video: `0:02:05.250`."""
    if seconds is None:
        return ""
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{milliseconds // 1000:02}.{milliseconds % 1000:03}"


def percent(share: float | None) -> str:
    """A share as whole percent; 100 % and 0 % are said only of all and nothing."""
    if share is None:
        return ""
    if 0 < share < 0.005:
        return "<1 %"
    if 0.995 <= share < 1:
        return ">99 %"
    return f"{share:.0%}".replace("%", " %")


def utc(milliseconds: int | None) -> str | None:
    """A moment of the database's clock as data hold it: `2026-11-22T21:05:00Z`."""
    if milliseconds is None:
        return None
    return f"{datetime.fromtimestamp(milliseconds // 1000, UTC):%Y-%m-%dT%H:%M:%SZ}"


def moment(text: str | None) -> str:
    """A moment from `utc` as a person reads it: in the time of this place."""
    return f"{datetime.fromisoformat(text).astimezone():%Y-%m-%d %H:%M}" if text else ""
