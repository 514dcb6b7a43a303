"""Many rows at once: the same rows as one by one, in the transaction, with the usual errors."""

from __future__ import annotations

import numpy as np
import pytest
from sqlalchemy import Engine, Text, column, func, select, table
from sqlalchemy.exc import IntegrityError

from storage import bulk
from storage.bulk import insert_columns
from storage.database import reading, writing
from storage.schema import predictions

COUNT = 1000
COLUMNS = {
    "job_id": 1,
    "video_id": 2**40,
    "bucket": np.arange(COUNT) - 2**33,
    "rank": np.arange(COUNT) % 7,
    "label": np.arange(COUNT)[::-1],
    "similarity": np.linspace(-1, 1, COUNT),
    "confidence": np.linspace(0, 1, COUNT, dtype=np.float32),
}


@pytest.fixture(autouse=True)
def _several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "_ROWS_AT_ONCE", 300)


def test_rows_come_back_as_they_were(engine: Engine) -> None:
    """Large, negative and fractional numbers are exact; a single number stands in every row."""
    with writing(engine) as connection:
        insert_columns(connection, predictions, COLUMNS)
    with reading(engine) as connection:
        found = connection.execute(select(predictions).order_by(predictions.c.bucket)).all()
    full = np.broadcast_arrays(*(np.atleast_1d(v) for v in COLUMNS.values()))
    assert [tuple(row) for row in found] == list(zip(*(a.tolist() for a in full), strict=True))


def test_a_transaction_that_fails_leaves_nothing(engine: Engine) -> None:
    """Rows are part of the transaction; a key that is there is SQLAlchemy's error."""
    with writing(engine) as connection:
        insert_columns(connection, predictions, COLUMNS | {"job_id": 2})

    def twice() -> None:
        with writing(engine) as connection:
            insert_columns(connection, predictions, COLUMNS)
            insert_columns(connection, predictions, COLUMNS | {"job_id": 2})

    with pytest.raises(IntegrityError):
        twice()
    with reading(engine) as connection:
        assert connection.scalar(select(func.count()).select_from(predictions)) == COUNT


def test_no_rows_are_no_rows(engine: Engine) -> None:
    """Empty columns write nothing."""
    with writing(engine) as connection:
        insert_columns(
            connection,
            predictions,
            {k: v[:0] if isinstance(v, np.ndarray) else v for k, v in COLUMNS.items()},
        )
    with reading(engine) as connection:
        assert connection.scalar(select(func.count()).select_from(predictions)) == 0


def test_text_is_refused() -> None:
    """Only numbers are laid out for the wire."""
    with pytest.raises(TypeError, match="as numbers"):
        bulk._wire_type(table("t", column("x", Text())).c.x.type)
