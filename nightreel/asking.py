"""The API that gave a job its embeddings, asked again: for texts and example pictures."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Self

import numpy as np
from sqlalchemy import Engine

from nightreel.local import ApiAtHome, LocalError, describe_engine
from storage import vectors
from storage.exits import ExitCode
from storage.scoring import Single
from workers.api import ApiClient, JobStopped
from workers.settings import WorkerSettings


class SameApi:
    """An API that serves a certain model. A context manager.

    It is looked for, and one at home started, when it is first needed; what is remembered needs
    none. Vectors of another model could not be compared, so any other is refused.
    """

    def __init__(self, model: str, api_url: str | None, engine: str) -> None:
        """`api_url` None starts the API at home for as long as this lasts, with `engine`, or for
        `auto` with whichever serves the model."""
        self._model = model
        self._api_url = api_url
        self._engine = engine
        self._stack = ExitStack()
        self._client: ApiClient | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def client(self) -> ApiClient:
        """The connection. Raises ApiError, LocalError."""
        if self._client is None:
            url = self._api_url or self._stack.enter_context(ApiAtHome(self._serving())).url
            client = ApiClient(WorkerSettings(api_url=url))
            served = client.identity().model
            if served != self._model:
                raise JobStopped(
                    f"the embeddings are of {self._model} and this API serves {served}: "
                    "name the API that made them with --api"
                )
            self._client = client
        return self._client

    def _serving(self) -> str:
        """The engine at home that serves the model."""
        engines = ("auto", "clip", "offline") if self._engine == "auto" else (self._engine,)
        for engine in engines:
            try:
                if describe_engine(engine).model == self._model:
                    return engine
            except LocalError:
                if len(engines) == 1:
                    raise
        raise LocalError(
            f"the embeddings are of {self._model}, which no engine on this machine serves: "
            "name the API that made them with --api",
            ExitCode.API,
        )

    def text_vector(self, engine: Engine, text: str) -> Single:
        """The unit vector of a text: asked once, then remembered in the database. Raises ApiError,
        LocalError."""
        known = vectors.text_vector(engine, self._model, text)
        if known is not None:
            return known
        (found,) = self.client.embed_texts([text])
        vectors.remember_text(engine, self._model, text, found)
        return np.asarray(found, dtype=np.float32)
