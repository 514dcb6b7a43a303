"""Many new rows at once, from columns of numbers, in the fastest way that each driver has.

PostgreSQL takes COPY in its binary format, which is laid out here as one array (PostgreSQL
documentation, "COPY", "Binary Format"); SQLite takes `executemany` of its own driver.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import BigInteger, Connection, Double, Integer, SmallInteger, Table
from sqlalchemy.exc import DBAPIError
from sqlalchemy.types import TypeEngine

_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_TRAILER = b"\xff\xff"

_ROWS_AT_ONCE = 100_000


def insert_columns(
    connection: Connection,
    table: Table,
    columns: Mapping[str, float | npt.NDArray[np.generic]],
) -> None:
    """Insert rows into `table`, whose columns are all numbers and none NULL.

    Every array has one value a row; a single number stands in all rows. Raises IntegrityError where
    a row of the same key is there already.
    """
    count = max((len(v) for v in columns.values() if isinstance(v, np.ndarray)), default=1)
    way = _copy if connection.dialect.name == "postgresql" else _execute_many
    for at in range(0, count, _ROWS_AT_ONCE):
        rows = slice(at, min(at + _ROWS_AT_ONCE, count))
        part = {
            name: values[rows] if isinstance(values, np.ndarray) else values
            for name, values in columns.items()
        }
        way(connection, table, part, rows.stop - rows.start)


def _execute_many(
    connection: Connection,
    table: Table,
    part: Mapping[str, float | npt.NDArray[np.generic]],
    count: int,
) -> None:
    names, marks = ", ".join(part), ", ".join("?" * len(part))
    statement = f"INSERT INTO {table.name} ({names}) VALUES ({marks})"  # noqa: S608 - our names
    values = (
        column.tolist() if isinstance(column, np.ndarray) else repeat(column, count)
        for column in part.values()
    )
    with by_driver(connection, statement) as driver:
        driver.executemany(statement, zip(*values, strict=True))


def _copy(
    connection: Connection,
    table: Table,
    part: Mapping[str, float | npt.NDArray[np.generic]],
    count: int,
) -> None:
    layout: list[tuple[str, str]] = [("fields", ">i2")]
    for name in part:
        layout += [(f"{name} bytes", ">i4"), (name, _wire_type(table.c[name].type))]
    rows = np.empty(count, dtype=layout)
    rows["fields"] = len(part)
    for name, values in part.items():
        rows[f"{name} bytes"] = rows.dtype[name].itemsize
        rows[name] = values
    statement = f"COPY {table.name} ({', '.join(part)}) FROM STDIN (FORMAT BINARY)"
    with (
        by_driver(connection, statement) as driver,
        driver.cursor() as cursor,
        cursor.copy(statement) as copy,
    ):
        copy.write(_HEADER + rows.tobytes() + _TRAILER)


@contextmanager
def by_driver(connection: Connection, statement: str) -> Iterator[Any]:
    """The driver's own connection, in the same transaction; its errors as SQLAlchemy's."""
    dialect = connection.dialect
    error_type = dialect.loaded_dbapi.Error
    try:
        yield connection.connection.driver_connection
    except error_type as error:
        raise DBAPIError.instance(statement, None, error, error_type, dialect=dialect) from error


def _wire_type(kind: TypeEngine[object]) -> str:
    """The column's type on the wire, as numpy writes it; the order matters: these are subclasses
    of each other."""
    for known, written in (
        (SmallInteger, ">i2"),
        (BigInteger, ">i8"),
        (Integer, ">i4"),
        (Double, ">f8"),
    ):
        if isinstance(kind, known):
            return written
    raise TypeError(f"a column of type {kind} cannot be copied as numbers")
