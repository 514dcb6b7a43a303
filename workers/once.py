"""What an API is asked once for all: its answers are kept in the database, for every worker and for
every later run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sqlalchemy import Engine

from storage.database import outlasting
from storage.endpoints import known_endpoint, store_endpoint
from storage.labels import label_set, label_vectors, store_label_vectors
from storage.records import LabelSet
from workers.contract import Vectors
from workers.endpoint import Found
from workers.shared import Shared

T = TypeVar("T")


class KeptAnswers:
    """One process's view of the answers. What the database kept first is what all go by."""

    def __init__(self, engine: Engine, shared: Shared) -> None:
        """`shared` keeps all but one from asking, as far as Redis helps."""
        self._engine = engine
        self._shared = shared
        self._of_labels: dict[tuple[int, str], Vectors] = {}

    def of_endpoint(
        self, job_id: int, endpoint: str, ask: Callable[[], Found], but: Found | None
    ) -> Found:
        """What the endpoint of this name can do, for all of the job; the answer `but`, which has
        proved wrong, is found out anew. Raises whatever `ask` raises."""
        key = job_id, endpoint

        def kept() -> Found | None:
            known = known_endpoint(self._engine, *key)
            return None if known == but else known

        return self._once(
            f"endpoint:{job_id}:{endpoint}",
            kept,
            ask,
            lambda found: store_endpoint(self._engine, *key, found, but),
        )

    def of_labels(
        self, label_set_id: int, model: str, ask: Callable[[LabelSet], Vectors]
    ) -> Vectors:
        """What is said of a label set under the name of this model. Raises whatever `ask`
        raises."""
        key = label_set_id, model
        if key not in self._of_labels:
            self._of_labels[key] = self._once(
                f"labels:{label_set_id}:{model}",
                lambda: label_vectors(self._engine, *key),
                lambda: ask(outlasting(lambda: label_set(self._engine, label_set_id))),
                lambda vectors: store_label_vectors(self._engine, *key, vectors),
            )
        return self._of_labels[key]

    def _once(
        self,
        name: str,
        kept: Callable[[], T | None],
        ask: Callable[[], T],
        keep: Callable[[T], None],
    ) -> T:
        """What is kept, or else what the first of all that want it asks, while the others wait."""
        if (known := outlasting(kept)) is not None:
            return known
        with self._shared.turn(name):
            if (known := outlasting(kept)) is not None:
                return known
            asked = ask()
            outlasting(lambda: keep(asked))
            known = outlasting(kept)
        # Nothing is kept where the job was purged meanwhile, or what was wrong is found again.
        return asked if known is None else known
