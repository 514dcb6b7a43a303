"""Label sets as jobs ask for them, and their vectors as a model gives them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, Engine, Row, select

from storage.database import reading, writing
from storage.dialect import insert
from storage.records import Label, LabelSet
from storage.schema import jobs, label_examples, label_sets, labels
from storage.schema import label_vectors as label_vector_rows


def label_set(engine: Engine, label_set_id: int) -> LabelSet:
    """The label set of this number, with its example pictures."""
    with reading(engine) as connection:
        name = connection.scalars(
            select(label_sets.c.name).where(label_sets.c.id == label_set_id)
        ).one()
        rows = connection.execute(
            select(labels).where(labels.c.label_set_id == label_set_id).order_by(labels.c.position)
        ).all()
        pictures = connection.execute(
            select(label_examples.c.label, label_examples.c.picture)
            .where(label_examples.c.label_set_id == label_set_id)
            .order_by(label_examples.c.label, label_examples.c.position)
        ).all()
    examples: dict[int, list[bytes]] = {}
    for label, picture in pictures:
        examples.setdefault(label, []).append(picture)
    return LabelSet(name, tuple(_label(row, examples.get(row.position, ())) for row in rows))


def labels_in(connection: Connection, job_id: int) -> list[Label]:
    """The job's labels in order, without their example pictures."""
    rows = connection.execute(
        select(labels)
        .join(jobs, jobs.c.label_set_id == labels.c.label_set_id)
        .where(jobs.c.id == job_id)
        .order_by(labels.c.position)
    ).all()
    return [_label(row, ()) for row in rows]


def _label(row: Row[*tuple[Any, ...]], examples: Sequence[bytes]) -> Label:
    prompts, samples = tuple(json.loads(row.prompts)), tuple(json.loads(row.samples))
    return Label(row.name, prompts, tuple(examples), row.threshold, row.flag, samples)


def label_vectors(engine: Engine, label_set_id: int, model: str) -> npt.NDArray[np.float32] | None:
    """The label set's vectors as this model gives them, labels x dimension; None if not stored."""
    with reading(engine) as connection:
        return label_vectors_in(connection, label_set_id, model)


def label_vectors_in(
    connection: Connection, label_set_id: int, model: str
) -> npt.NDArray[np.float32] | None:
    """The same within a transaction."""
    row = connection.execute(
        select(label_vector_rows.c.dimension, label_vector_rows.c.vectors).where(
            label_vector_rows.c.label_set_id == label_set_id, label_vector_rows.c.model == model
        )
    ).first()
    if row is None:
        return None
    return np.frombuffer(row.vectors, dtype="<f4").reshape(-1, row.dimension)


def vectors_of_labels(
    engine: Engine, wanted: LabelSet, model: str
) -> npt.NDArray[np.float32] | None:
    """The same of labels of which it is not known whether they are stored."""
    with reading(engine) as connection:
        known = connection.scalar(
            select(label_sets.c.id).where(label_sets.c.digest == wanted.digest)
        )
    return None if known is None else label_vectors(engine, known, model)


def store_label_vectors(
    engine: Engine, label_set_id: int, model: str, vectors: npt.NDArray[np.float32]
) -> None:
    """Keep the label set's vectors, labels x dimension. Of several that come, the first is kept:
    all workers must score with the same numbers."""
    with writing(engine) as connection:
        connection.execute(
            insert(connection, label_vector_rows)
            .values(
                label_set_id=label_set_id,
                model=model,
                dimension=vectors.shape[1],
                vectors=vectors.astype("<f4").tobytes(),
            )
            .on_conflict_do_nothing(index_elements=["label_set_id", "model"])
        )
