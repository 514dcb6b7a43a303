"""Client of the CLIP HTTP contract: its three routes, and whose fault it is when they fail.

What the endpoint is and can do is found by `workers.endpoint`; errors are those of
`workers.refusals`, where their tree is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from storage.records import Usage
from workers.calls import groups_of
from workers.contract import (
    COMPARE,
    EMBED_IMAGE,
    EMBED_TEXT,
    Body,
    Vectors,
    comparison_body,
    cosines,
    pictures_body,
    texts_body,
    unit_vectors,
)
from workers.endpoint import Asked, Endpoint, Identity, Once, at_each_need, plain_picture
from workers.refusals import (
    ApiError,
    AtRest,
    BadAnswer,
    BadRequest,
    FrameRefused,
    JobPaused,
    JobStopped,
    Outage,
    TextRefused,
    WrongCount,
)
from workers.settings import WorkerSettings
from workers.shared import Shared
from workers.wire import Wire

__all__ = [
    "ApiClient",
    "ApiError",
    "AtRest",
    "FrameRefused",
    "JobPaused",
    "JobStopped",
    "Outage",
    "TextRefused",
    "Vectors",
]

PLAIN_TEXT = "a photo"
"""What an endpoint that answers texts at all will answer."""

_ABOUT_THE_TEXT = (BadAnswer, BadRequest, FrameRefused)
"""What real servers say of a text that is too long, and of a list that they do not take; each may
mean something else too."""


class ApiClient:
    """One process's client of one endpoint, for one job at a time. Threads may share it; processes
    must not."""

    def __init__(
        self, settings: WorkerSettings, shared: Shared | None = None, **of_wire: Any
    ) -> None:
        """`shared` holds what all workers keep to together; the rest is as in `Wire`. Raises
        JobStopped for an address that cannot be one, SecretUnreadable for such a key."""
        self._settings = settings
        self.wire = Wire(settings, shared or Shared(), **of_wire)
        self.base = self.wire.base
        self._asked = Asked(settings, self.wire)

    def close(self) -> None:
        """End the connections that are kept open."""
        self.wire.close()

    @property
    def spent(self) -> Usage:
        """What all calls so far have cost, as in `Wire.spent`."""
        return self.wire.spent

    def work_for(self, job_id: int, once: Once = at_each_need) -> None:
        """Ask for this job from here on, as in `Asked.work_for`."""
        self._asked.work_for(job_id, once)

    def forget(self) -> None:
        """Ask anew what the endpoint is once the next task begins, as in `Asked.forget`."""
        self._asked.forget()

    def endpoint(self) -> Endpoint:
        """Return what the endpoint can do, as in `Asked.endpoint`."""
        return self._asked.endpoint()

    def identity(self) -> Identity:
        """Return who the endpoint says it is, as in `Asked.identity`."""
        return self._asked.identity()

    def only_compares(self) -> bool:
        """Whether no picture is embedded, so that labels need prompts; asked by requests that ask
        for nothing, and cost nothing. Raises Outage, JobStopped."""
        way, missing = self._settings.api_way, self.wire.is_missing
        return way == "compare" or (way == "auto" and missing(EMBED_IMAGE) and not missing(COMPARE))

    def check_key(self) -> None:
        """Raise JobStopped where the key is refused as soon as it is seen, by a request that asks
        for nothing. A server that reads the request first accepts any key here. Raises Outage."""
        self.wire.check_key(EMBED_TEXT)

    def embed_images(self, jpegs: Sequence[bytes]) -> list[Vectors | FrameRefused]:
        """Return for each JPEG its unit vector (D, float32), or the refusal of that one picture.

        At most `endpoint().batch` pictures. A refused batch is asked again picture by picture.
        Raises Outage, JobPaused, JobStopped.
        """
        try:
            return list(self._embed(jpegs, self._settings.api_attempts))
        except (FrameRefused, BadAnswer) as error:
            if len(jpegs) > 1:
                if isinstance(error, WrongCount):
                    self._asked.doubt()  # lists are no longer taken as they were
                return [answer for one in jpegs for answer in self.embed_images([one])]
            if isinstance(error, FrameRefused):
                return [error]
            self._blame(error, lambda grey: self._embed([grey], attempts=1))
            return [FrameRefused(str(error))]

    def embed_texts(self, texts: Sequence[str]) -> Vectors:
        """Return the unit vectors of the texts, len(texts) x D float32; a list that is not taken is
        asked in halves. Raises ApiError, of which TextRefused names the text that is not taken."""
        vectors: list[Vectors] = []
        for answer in self._by_halves(texts, self._embed_texts):
            if isinstance(answer, TextRefused):
                raise answer
            vectors.append(answer)
        return np.stack(vectors)

    def _embed_texts(self, texts: Sequence[str]) -> Vectors:
        return self._asked.post(
            EMBED_TEXT,
            texts_body(texts),
            lambda answer: unit_vectors(answer, len(texts)),
            self._settings.api_attempts,
            texts=1,
        )

    def refused_texts(self, texts: Sequence[str]) -> list[tuple[str, str]]:
        """Return those of the texts that the endpoint does not take, most often for their length,
        each with what it says of it. One call where all are taken; where texts are only compared,
        one for every eight. A server that cuts long texts refuses none. Raises ApiError."""
        if self._settings.api_way == "compare":
            answers = self._by_halves(texts, self._compare_with_plain)
        else:
            try:
                answers = self._by_halves(texts, self._embed_texts)
            except JobStopped:
                if not self.wire.is_missing(EMBED_TEXT):
                    raise
                answers = self._by_halves(texts, self._compare_with_plain)
        return [(one.text, one.why) for one in answers if isinstance(one, TextRefused)]

    def _by_halves(
        self, texts: Sequence[str], ask: Callable[[Sequence[str]], Vectors]
    ) -> list[Vectors | TextRefused]:
        """Return what `ask` answers for each text, or the refusal of that one text; a list that is
        refused is halved until the refused stand alone."""
        if not texts:
            return []
        try:
            return list(ask(texts))
        except _ABOUT_THE_TEXT as error:
            if len(texts) > 1:
                middle = len(texts) // 2
                return self._by_halves(texts[:middle], ask) + self._by_halves(texts[middle:], ask)
            first = error
        # 400 and 500 are said of many things: it is the text's fault if a plain one is answered,
        # and this one still is not.
        try:
            ask([PLAIN_TEXT])
        except FrameRefused as error:
            raise JobStopped(str(error)) from None
        except _ABOUT_THE_TEXT:
            raise first from None
        try:
            return list(ask(texts))
        except _ABOUT_THE_TEXT as error:
            why = error.said if isinstance(error, BadRequest) else str(error)
            return [TextRefused(texts[0], why)]

    def compare(self, jpeg: bytes, prompts: Sequence[str]) -> Vectors | FrameRefused:
        """Return the cosine of each prompt with the picture (len(prompts), float32), or the
        refusal of the picture; asked in groups that the real server accepts."""
        found: list[Vectors] = []
        for group in groups_of(prompts):
            try:
                found.append(self._compare(jpeg, group))
            except FrameRefused as error:
                return error
            except BadRequest:
                self._blame_texts(group)
                raise
            except BadAnswer as error:
                try:
                    self._blame(error, lambda grey: self._compare(grey, group))  # noqa: B023
                except Outage:
                    self._blame_texts(group)
                    raise
                return FrameRefused(str(error))
        return np.concatenate(found)

    def _compare(self, jpeg: bytes, prompts: Sequence[str]) -> Vectors:
        return self._similarity(comparison_body(jpeg, prompts), len(prompts), images=1)

    def compare_texts(self, text: str, prompts: Sequence[str]) -> Vectors:
        """Return the cosine of each prompt with `text` (len(prompts), float32). Raises ApiError, of
        which TextRefused names the text that is not taken."""
        try:
            return self._compare_texts(text, prompts)
        except _ABOUT_THE_TEXT:
            self._blame_texts([text, *prompts])
            raise

    def _compare_texts(self, text: str, prompts: Sequence[str]) -> Vectors:
        found = [
            self._similarity(comparison_body(text, group), len(group), texts=1)
            for group in groups_of(prompts)
        ]
        return np.concatenate(found)

    def _compare_with_plain(self, texts: Sequence[str]) -> Vectors:
        return self._compare_texts(PLAIN_TEXT, texts)

    def _similarity(self, body: Body, n: int, *, images: int = 0, texts: int = 0) -> Vectors:
        return self._asked.post(
            COMPARE,
            body,
            lambda answer: cosines(answer, n),
            self._settings.api_attempts,
            images=images,
            texts=texts,
        )

    def _embed(self, jpegs: Sequence[bytes], attempts: int) -> Vectors:
        return self._asked.post(
            EMBED_IMAGE,
            pictures_body(jpegs),
            lambda answer: unit_vectors(answer, len(jpegs)),
            attempts,
            images=1,
        )

    def _blame(self, error: BadAnswer, ask: Callable[[bytes], object]) -> None:
        """Find out whose fault a 500 is, since the real server says 500 for a bad picture too:
        `ask` the same of a plain grey picture. If that works the fault is the picture's; else
        Outage."""
        try:
            ask(plain_picture(self.identity().input_size))
        except BadAnswer:
            raise Outage(str(error)) from None

    def _blame_texts(self, prompts: Sequence[str]) -> None:
        """Raise TextRefused where a comparison fails for one of its prompts. An endpoint that fails
        with a plain one too is asked no more."""
        try:
            self._compare_with_plain([PLAIN_TEXT])
        except _ABOUT_THE_TEXT:
            return
        for refused in self._by_halves(prompts, self._compare_with_plain):
            if isinstance(refused, TextRefused):
                raise refused
