"""Client of the CLIP HTTP contract: what an endpoint can do, and its three routes.

Errors are those of `workers.refusals`, where their tree is drawn.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.records import Usage
from workers.footage.picture import encode_jpeg
from workers.limits import endpoint_id
from workers.refusals import (
    ApiError,
    AtRest,
    BadAnswer,
    BadRequest,
    FrameRefused,
    JobPaused,
    JobStopped,
    ModelChanged,
    Outage,
    TextRefused,
    shown,
)
from workers.settings import MAX_BATCH, WorkerSettings
from workers.shared import Shared
from workers.wire import Wire

__all__ = [
    "ApiClient",
    "ApiError",
    "AtRest",
    "Endpoint",
    "FrameRefused",
    "Identity",
    "JobPaused",
    "JobStopped",
    "Outage",
    "TextRefused",
    "Vectors",
]

Vectors = npt.NDArray[np.float32]

INPUT_SIZES = {"ViT-L-14-336px": 336, "RN50x4": 288, "RN50x16": 384, "RN50x64": 448}
"""Sides in pixels of the models that do not read 224 x 224."""

PLAIN_TEXT = "a photo"
"""What an endpoint that answers texts at all will answer."""

JOBS_REMEMBERED = 32
"""What the endpoint is for the jobs before is asked anew, should they come again."""

_ABOUT_THE_TEXT = (BadAnswer, BadRequest, FrameRefused)
"""What real servers say of a text that is too long, and of a list that they do not take; each may
mean something else too."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who an endpoint is, found without a call that costs."""

    model: str
    """Name that results are keyed by."""
    named: bool
    """Whether the endpoint said that name itself: then every answer that bears one must bear it."""
    input_size: int
    """Side in pixels of the square pictures to send."""
    notice: str | None
    """What every reader of the results must be told, or None."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What an endpoint can do, as found by asking it once."""

    identity: Identity
    embeds: bool
    """Whether `/clip/embed_image` works; else `/clip/compare` serves."""
    batch: int
    """Pictures a request may hold: more than one only where as many embeddings came back."""


@dataclass(slots=True)
class _Known:
    """What the endpoint was found to be when it was asked for one job, or for none."""

    job_id: int | None = None
    identity: Identity | None = None
    endpoint: Endpoint | None = None


class ApiClient:
    """One process's client of one endpoint, for one job at a time. Threads may share it; processes
    must not."""

    def __init__(
        self, settings: WorkerSettings, shared: Shared | None = None, **of_wire: Any
    ) -> None:
        """`shared` holds what all workers keep to together; the rest is as in `Wire`. Raises
        JobStopped for an address that cannot be one, SecretUnreadable for such a key."""
        self._settings = settings
        self._shared = shared or Shared()
        self.wire = Wire(settings, self._shared, **of_wire)
        self.base = self.wire.base
        self._asking = threading.RLock()
        self._known = _Known()
        self._of_jobs: dict[int, _Known] = {}

    def close(self) -> None:
        """End the connections that are kept open."""
        self.wire.close()

    @property
    def spent(self) -> Usage:
        """What all calls so far have cost, as in `Wire.spent`."""
        return self.wire.spent

    # -- what the endpoint can do

    def work_for(self, job_id: int) -> None:
        """Ask for this job from here on. Each job asks anew who the endpoint is and what it can do:
        it may have been started anew since the one before."""
        with self._asking:
            self._known = self._of_jobs.pop(job_id, _Known(job_id))
            self._of_jobs[job_id] = self._known
            if len(self._of_jobs) > JOBS_REMEMBERED:
                del self._of_jobs[next(iter(self._of_jobs))]

    def forget(self) -> None:
        """Ask anew once the next task begins, of whichever job: the endpoint is not what it was.
        The task at hand keeps what it knows, so that none of its threads mixes two models."""
        with self._asking:
            self._of_jobs.clear()

    def endpoint(self) -> Endpoint:
        """Return what the endpoint can do: who it is, and whether two different pictures in one
        request come back as two embeddings (one known server stacks them into one picture).

        It is asked the first time, and for a job by the first of all its workers. Raises Outage,
        JobPaused, JobStopped.
        """
        with self._asking:
            if self._known.endpoint is None:
                self._known.endpoint = self._ask(self._known.job_id)
            return self._known.endpoint

    def _ask(self, job_id: int | None) -> Endpoint:
        identity = self.identity()
        way = self._settings.api_way
        if way == "compare":
            return Endpoint(identity, embeds=False, batch=1)

        def find_out() -> list[int]:
            return list(self._batch_that_works(identity.input_size))

        if job_id is None:
            embeds, batch = find_out()
        else:
            name = f"endpoint:{endpoint_id(self.base)}:{way}:{job_id}"
            embeds, batch = self._shared.once(name, find_out)
        return Endpoint(identity, bool(embeds), batch)

    def identity(self) -> Identity:
        """Return who the endpoint says it is, by `GET /info` the first time, and for each job; what
        it does not say follows from the model that is asked of it. Raises Outage where nothing
        answers."""
        with self._asking:
            if self._known.identity is None:
                self._known.identity = self._identify()
            return self._known.identity

    def _identify(self) -> Identity:
        version = self._settings.clip_version
        about = self.wire.get("/info")  # which hosted endpoints may not have
        model, size, notice = about.get("model"), about.get("input_size"), about.get("notice")
        if not isinstance(size, int) or not 16 <= size <= 1024:
            size = INPUT_SIZES.get(version, 224)
        named = shown(model) if isinstance(model, str) else ""
        return Identity(
            model=named or f"clip:{version}",
            named=bool(named),
            input_size=size,
            notice=shown(notice) if isinstance(notice, str) else None,
        )

    def _batch_that_works(self, size: int) -> tuple[bool, int]:
        pictures = [_flat_jpeg(size, 40), _flat_jpeg(size, 200)]
        asked = self._settings.api_way
        try:
            embeddings = self._embed(pictures, None, attempts=self._settings.api_attempts)
        except JobStopped:
            if asked == "embed" or not self.wire.is_missing("/clip/embed_image"):
                raise
            return False, 1
        except (BadAnswer, FrameRefused):
            # That may have been any trouble, and what is found here holds for a whole job: lists
            # do not work where a picture alone does, and they still do not.
            self._try_plain(pictures[0])
            try:
                embeddings = self._embed(pictures, None, attempts=1)
            except (BadAnswer, FrameRefused):
                return True, 1
        return True, MAX_BATCH if len(embeddings) == 2 else 1

    def _try_plain(self, picture: bytes) -> None:
        """Embed a picture that any endpoint takes. Raises Outage, JobPaused, JobStopped."""
        try:
            self._embed([picture], 1, attempts=self._settings.api_attempts)
        except FrameRefused as error:
            raise JobStopped(f"a plain picture is refused: {error}") from None

    # -- the three routes

    def embed_images(self, jpegs: Sequence[bytes]) -> list[Vectors | FrameRefused]:
        """Return for each JPEG its unit vector (D, float32), or the refusal of that one picture.

        At most `endpoint().batch` pictures. A refused batch is asked again picture by picture.
        Raises Outage, JobPaused, JobStopped.
        """
        try:
            return list(self._embed(jpegs, len(jpegs), attempts=self._settings.api_attempts))
        except (FrameRefused, BadAnswer) as error:
            if len(jpegs) > 1:
                return [answer for one in jpegs for answer in self.embed_images([one])]
            if isinstance(error, FrameRefused):
                return [error]
            self._blame(error, lambda grey: self._embed([grey], 1, attempts=1))
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
        return self._post(
            "/clip/embed_text",
            {"text": list(texts)},
            lambda answer: _unit_vectors(answer, len(texts)),
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
                if not self.wire.is_missing("/clip/embed_text"):
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
        for at in range(0, len(prompts), MAX_BATCH):
            group = list(prompts[at : at + MAX_BATCH])
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

    def _compare(self, jpeg: bytes, prompts: list[str]) -> Vectors:
        body = {"subject": _picture(jpeg), "subject_type": "image", "prompt": prompts}
        return self._similarity(body, len(prompts), images=1)

    def compare_texts(self, text: str, prompts: Sequence[str]) -> Vectors:
        """Return the cosine of each prompt with `text` (len(prompts), float32). Raises ApiError, of
        which TextRefused names the text that is not taken."""
        try:
            return self._compare_texts(text, prompts)
        except _ABOUT_THE_TEXT:
            self._blame_texts([text, *prompts])
            raise

    def _compare_texts(self, text: str, prompts: Sequence[str]) -> Vectors:
        groups = [prompts[at : at + MAX_BATCH] for at in range(0, len(prompts), MAX_BATCH)]
        bodies = [{"subject": text, "subject_type": "text", "prompt": list(g)} for g in groups]
        return np.concatenate(
            [self._similarity(b, len(g), texts=1) for b, g in zip(bodies, groups, strict=True)]
        )

    def _compare_with_plain(self, texts: Sequence[str]) -> Vectors:
        return self._compare_texts(PLAIN_TEXT, texts)

    def _similarity(
        self, body: dict[str, Any], n: int, *, images: int = 0, texts: int = 0
    ) -> Vectors:
        return self._post(
            "/clip/compare",
            body | {"prompt_type": "text"},
            lambda answer: _cosines(answer, n),
            self._settings.api_attempts,
            images=images,
            texts=texts,
        )

    def _embed(self, jpegs: Sequence[bytes], expected: int | None, attempts: int) -> Vectors:
        return self._post(
            "/clip/embed_image",
            {"image": [_picture(j) for j in jpegs] if len(jpegs) > 1 else _picture(jpegs[0])},
            lambda answer: _unit_vectors(answer, expected),
            attempts,
            images=1,
        )

    def _post(
        self,
        route: str,
        body: dict[str, Any],
        read: Callable[[dict[str, Any]], Vectors],
        attempts: int,
        **counted: int,
    ) -> Vectors:
        """Ask, and take an answer of no other model than the one that the endpoint named."""
        identity = self._known.identity
        model = identity.model if identity is not None and identity.named else None
        try:
            return self.wire.post(route, body, read, attempts, model=model, **counted)
        except ModelChanged:
            self.forget()
            raise

    def _blame(self, error: BadAnswer, ask: Callable[[bytes], object]) -> None:
        """Find out whose fault a 500 is, since the real server says 500 for a bad picture too:
        `ask` the same of a plain grey picture. If that works the fault is the picture's; else
        Outage."""
        try:
            ask(_flat_jpeg(self.identity().input_size, 128))
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


def _picture(jpeg: bytes) -> dict[str, str]:
    return {"type": "base64", "value": base64.b64encode(jpeg).decode("ascii")}


def _flat_jpeg(size: int, grey: int) -> bytes:
    picture = np.full((size, size, 3), grey, dtype=np.uint8)
    return encode_jpeg(picture)


def _unit_vectors(answer: dict[str, Any], expected: int | None) -> Vectors:
    """Return the answer's embeddings as unit vectors, N x D float32; N must be as expected."""
    try:
        vectors = np.asarray(answer["embeddings"], dtype=np.float32)
    except (KeyError, TypeError, ValueError):
        raise BadAnswer("the answer holds no rectangle of embeddings") from None
    if vectors.ndim != 2 or vectors.shape[1] < 2 or not np.isfinite(vectors).all():
        raise BadAnswer("the answer's embeddings are not finite vectors of one length")
    if expected is not None and len(vectors) != expected:
        raise BadAnswer(f"{len(vectors)} embeddings came back where {expected} were asked for")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (lengths > 0).all():
        raise BadAnswer("the answer holds an embedding of length zero")
    return np.asarray(vectors / lengths, dtype=np.float32)


def _cosines(answer: dict[str, Any], n: int) -> Vectors:
    """Return the answer's n similarities, float32."""
    try:
        cosines = np.asarray(answer["similarity"], dtype=np.float32)
    except (KeyError, TypeError, ValueError):
        raise BadAnswer("the answer holds no list of similarities") from None
    if cosines.shape != (n,) or not np.isfinite(cosines).all():
        raise BadAnswer(f"the answer does not hold {n} finite similarities")
    return cosines
