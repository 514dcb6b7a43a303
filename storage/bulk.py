"""Many new rows at once, from columns of numbers, in the fastest way that each driver has.

PostgreSQL takes COPY in its binary format, which is laid out here as one array (PostgreSQL
documentation, "COPY", "Binary Format"); SQLite takes `executemany` of its own driver.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from sqlalchemy import BigInteger, Connection, Double, Integer, SmallInteger, Table
from sqlalchemy.types import TypeEngine

_HEADER = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_TRAILER = b"\xff\xff"

_ROWS_AT_ONCE = 100_000


def insert_columns(
    connection: Connection, table: Table, columns: Mapping[str, int | npt.NDArray[np.generic]]
) -> None:
    """Insert rows into `table`, whose columns are all numbers and none NULL.

    Every array has one value a row; a single number stands in all rows. IntegrityError of the
    driver where a row of the same key is there already.
    """
    arrays = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v)) for v in columns.values()))
    given = dict(zip(columns, arrays, strict=True))
    for at in range(0, len(arrays[0]), _ROWS_AT_ONCE):
        part = {name: values[at : at + _ROWS_AT_ONCE] for name, values in given.items()}
        if connection.dialect.name == "postgresql":
            _copy(connection, table, part)
        else:
            names, marks = ", ".join(part), ", ".join("?" * len(part))
            connection.exec_driver_sql(
                f"INSERT INTO {table.name} ({names}) VALUES ({marks})",  # noqa: S608 - our names
                list(zip(*(values.tolist() for values in part.values()), strict=True)),
            )


def _copy(
    connection: Connection, table: Table, part: Mapping[str, npt.NDArray[np.generic]]
) -> None:
    layout: list[tuple[str, str]] = [("fields", ">i2")]
    for name in part:
        layout += [(f"{name} bytes", ">i4"), (name, _wire_type(table.c[name].type))]
    count = len(next(iter(part.values())))
    rows = np.empty(count, dtype=layout)
    rows["fields"] = len(part)
    for name, values in part.items():
        rows[f"{name} bytes"] = rows.dtype[name].itemsize
        rows[name] = values
    driver = connection.connection.driver_connection
    if driver is None:
        raise RuntimeError("the connection is closed")
    statement = f"COPY {table.name} ({', '.join(part)}) FROM STDIN (FORMAT BINARY)"
    with driver.cursor() as cursor, cursor.copy(statement) as copy:
        copy.write(_HEADER + rows.tobytes() + _TRAILER)


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
