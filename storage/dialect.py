"""What SQLite and PostgreSQL say differently: the clock, upserts, a lock, lists of numbers, the
text they take."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Dialect,
    Table,
    Text,
    TypeDecorator,
    any_,
    func,
    literal,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

MAX_TEXT = 20_000
"""Characters of a message that are kept; a hostile answer must not fill the database."""

_LEDGER_LOCK = 0x6E6967687472
"""PostgreSQL advisory lock of whoever feeds, sweeps or migrates."""


class Now(FunctionElement[int]):
    """The database's clock in milliseconds since 1970: the only clock that leases are held to."""

    type = BigInteger()
    inherit_cache = True


@compiles(Now, "sqlite")
def _now_sqlite(_element: Now, _compiler: SQLCompiler, **_: Any) -> str:
    # unixepoch('subsec') came with SQLite 3.42; a julian day is exact to 0.04 ms.
    return "CAST(ROUND((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER)"


@compiles(Now, "postgresql")
def _now_postgresql(_element: Now, _compiler: SQLCompiler, **_: Any) -> str:
    # Not clock_timestamp(): that one is volatile, and no index condition may hold it.
    return "CAST(EXTRACT(EPOCH FROM statement_timestamp()) * 1000 AS BIGINT)"


class StorableText(TypeDecorator[str]):
    """Text that both databases take: NUL and lone surrogates, which hostile names and answers
    bring along, are written as escapes on the way in."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """The text as it is stored."""
        return None if value is None else storable(value)


def storable(text: str) -> str:
    """The text with NUL and lone surrogates written as escapes."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def one_line(text: str) -> str:
    """A message of unknown origin as one line of bounded length."""
    return " ".join(text[: 2 * MAX_TEXT].split())[:MAX_TEXT]


def insert(connection: Connection, table: Table) -> sqlite.Insert | postgresql.Insert:
    """An INSERT that knows ON CONFLICT in the connection's dialect."""
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table)
    return sqlite.insert(table)


def upsert(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows, over those of the same primary key; all rows name the same columns."""
    if not rows:
        return
    statement = insert(connection, table)
    key = [column.name for column in table.primary_key]
    values = {name: statement.excluded[name] for name in rows[0] if name not in key}
    connection.execute(
        statement.on_conflict_do_update(index_elements=key, set_=values)
        if values
        else statement.on_conflict_do_nothing(index_elements=key),
        rows,
    )


def among(
    connection: Connection, column: ColumnElement[int], numbers: Iterable[int]
) -> ColumnElement[bool]:
    """Condition that the column holds one of the numbers: one parameter, however many they are,
    where a plain IN would have one each and a statement takes 65,535 (PostgreSQL)."""
    listed = sorted(set(numbers))
    if connection.dialect.name == "postgresql":
        return column == any_(literal(listed, postgresql.ARRAY(BigInteger)))
    values = func.json_each(json.dumps(listed)).table_valued("value")
    return column.in_(select(values.c.value))


def lock_ledger(connection: Connection) -> None:
    """Be the only one that feeds, sweeps or migrates until the transaction ends. SQLite's writers
    are alone anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(_LEDGER_LOCK)))
