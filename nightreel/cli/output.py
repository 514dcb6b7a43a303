"""Rows to standard output as a table, JSON, JSON Lines or CSV; talk to standard error."""

from __future__ import annotations

import csv
import io
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
    from _typeshed import ReadableBuffer
    from rich.console import Console
    from rich.table import Table as RichTable

Row = Mapping[str, Any]
Justify = Literal["left", "right"]
VIDEO = "video"
"""Key of the column of paths."""
FORMATS = ("table", "json", "jsonl", "csv")
FOLDED_CHARACTERS, FOLDED_LINES = 10, 4
"""Texts in a table are folded no narrower than this, and into so many lines on average at most."""
GAP = 2
"""Characters between two columns."""


class OutputError(Exception):
    """Standard output does not take what is written to it (a full disk)."""

    code = ExitCode.UNEXPECTED


class ReaderGone(Exception):
    """Who read standard output (`head`, `less`) has seen enough."""


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
    with suppress(ReaderGone):
        yield
        sys.stdout.flush()


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

    return Console() if sys.stdout.isatty() else Console(width=10_000)


def _table(rows: Sequence[Row], columns: Sequence[Column], notices: Sequence[str]) -> None:
    """A table, or on a terminal that is too narrow for it a line for each field. What all paths
    have in common stands once, above it."""
    from rich.text import Text

    shown = console()
    videos = [row[VIDEO] for row in rows if row.get(VIDEO)]
    common = _common_folder(videos)
    if 1 < len(videos) == len(rows) and len(set(videos)) == 1:
        shown.print(Text(f"Video {videos[0]}", style="dim"))
        columns = [column for column in columns if column.key != VIDEO]
    elif common:
        shown.print(Text(f"Videos in {common}", style="dim"))
    cells = [
        [
            column.show(row[column.key]).removeprefix(common if column.key == VIDEO else "")
            for column in columns
        ]
        for row in rows
    ]
    shown.print(_as_table(cells, columns, shown.width) or _as_lines(cells, columns))
    for notice in notices:
        shown.print(Text(f"NOTE: {notice}", style="bold yellow"))


def _as_table(
    cells: Sequence[Sequence[str]], columns: Sequence[Column], width: int
) -> RichTable | None:
    """Numbers are never broken over two lines; none where that and a few letters of each text do
    not fit into `width` characters."""
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    longest, narrowest = [], []
    for at, column in enumerate(columns):
        lengths = [cell_len(row[at]) for row in cells] or [0]
        folded = max(FOLDED_CHARACTERS, sum(lengths) // len(lengths) // FOLDED_LINES)
        held = max(lengths) if column.justify == "right" else min(max(lengths), folded)
        longest.append(max(lengths))
        narrowest.append(max(held, *map(cell_len, column.title.split())))
    gaps = GAP * (len(columns) - 1)
    if sum(narrowest) + gaps > width:
        return None
    titles = [cell_len(column.title) for column in columns]
    fits = sum(map(max, titles, longest)) + gaps <= width
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, GAP - 1, 0, 0))
    for column, least in zip(columns, narrowest, strict=True):
        whole = least if column.justify == "right" and not fits else None
        table.add_column(column.title, justify=column.justify, overflow="fold", width=whole)
    for row in cells:
        table.add_row(*map(Text, row))
    return table


def _as_lines(cells: Sequence[Sequence[str]], columns: Sequence[Column]) -> RichTable:
    """What stands in each row, and an empty line below it."""
    from rich.table import Table
    from rich.text import Text

    lines = Table.grid(padding=(0, GAP, 0, 0))
    lines.add_column(style="bold")
    lines.add_column(overflow="fold")
    for row in cells:
        for column, cell in zip(columns, row, strict=True):
            if cell:
                lines.add_row(column.title, Text(cell))
        lines.add_row()
    return lines


def _common_folder(paths: Sequence[str]) -> str:
    """The deepest folder that all paths lie below, with its slash; empty where there is none, so
    that a table names it once and not in every row."""
    folders = {os.path.dirname(path) for path in paths}
    common = os.path.commonpath(folders) if folders and all(map(os.path.isabs, folders)) else "/"
    return f"{common}/" if common != "/" else ""


class _Rows(io.FileIO):
    """Standard output. What it does not take it says once, and not again wherever Python flushes
    what it has kept."""

    _failed = False

    def write(self, rows: ReadableBuffer) -> int:
        if self._failed:
            return len(memoryview(rows))
        try:
            return super().write(rows)
        except BrokenPipeError:
            self._failed = True
            raise ReaderGone from None
        except OSError as error:
            self._failed = True
            raise OutputError(f"the output cannot be written: {error.strerror}") from None


class _Talk(io.FileIO):
    """Standard error, to which nobody may be listening any more, or which may be full: that costs
    the talk alone. What Python kept for another try would fail again wherever it is flushed."""

    def write(self, talk: ReadableBuffer) -> int:
        with suppress(OSError):
            return super().write(talk) or len(memoryview(talk))
        return len(memoryview(talk))


def take_standard_streams() -> None:
    """From here on nothing that is written to this process's standard error fails, and what
    standard output does not take is an OutputError or a ReaderGone.

    One that the caller closed leads nowhere: otherwise the next file that is opened would have its
    number, and get what libraries and children print.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            nowhere = open(os.devnull, mode, errors="backslashreplace")  # noqa: SIM115
            os.set_inheritable(nowhere.fileno(), True)
            setattr(sys, name, nowhere)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout is sys.__stdout__:
        at_once = sys.stdout.line_buffering or sys.stdout.write_through
        sys.stdout = _text(_Rows(sys.stdout.fileno(), "w", closefd=False), sys.stdout, at_once)
    if isinstance(sys.stderr, io.TextIOWrapper) and sys.stderr is sys.__stderr__:
        sys.stderr = _text(_Talk(sys.stderr.fileno(), "w", closefd=False), sys.stderr, True)


def _text(raw: io.FileIO, like: io.TextIOWrapper, line_buffering: bool) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(raw), like.encoding, like.errors, line_buffering=line_buffering
    )


def say(message: str) -> None:
    """Write one line of talk to standard error."""
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
    """A place in a video: `2:05.250`, `1:02:05.250`."""
    if seconds is None:
        return ""
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    rest = f"{milliseconds // 1000:02}.{milliseconds % 1000:03}"
    return f"{hours}:{minutes:02}:{rest}" if hours else f"{minutes}:{rest}"


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
