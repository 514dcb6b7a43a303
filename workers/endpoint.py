"""Who the endpoint is and what it can do: found out for each job, and anew where it answers
otherwise than it was found to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np

from workers.contract import COMPARE, EMBED_IMAGE, Body, Vectors, pictures_body, unit_vectors
from workers.footage.picture import encode_jpeg
from workers.limits import endpoint_id
from workers.refusals import (
    BadAnswer,
    FrameRefused,
    JobStopped,
    ModelChanged,
    NotThere,
    Outage,
    shown,
)
from workers.settings import MAX_BATCH, WorkerSettings
from workers.wire import Wire

INPUT_SIZES = {"ViT-L-14-336px": 336, "RN50x4": 288, "RN50x16": 384, "RN50x64": 448}
"""Sides in pixels of the models that do not read 224 x 224."""

UNNAMED = "clip:"
"""Begins the name of a model that an endpoint does not name; the one asked of it follows."""

JOBS_REMEMBERED = 32
"""What the endpoint is for the jobs before is asked anew, should they come again."""

_SOFTWARE = ("name", "version", "model", "input_size")
"""What `GET /info` says that stays the same for as long as the endpoint is the same."""


Found = tuple[bool, int]
"""What an endpoint can do, as `Endpoint` says it: whether it embeds, and pictures a request."""

Once = Callable[[str, Callable[[], Found], Found | None], Found]
"""Answers what the endpoint of this name can do: as it was found before by whomever, unless that is
the third argument, which has proved wrong; else as the second one, which asks it, finds out."""


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
    software: str
    """Digest of what it says it runs."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What an endpoint can do, as found by asking it once."""

    identity: Identity
    embeds: bool
    """Whether `/clip/embed_image` works; else `/clip/compare` serves."""
    batch: int
    """Pictures a request may hold: more than one only where as many embeddings came back."""

    @property
    def found(self) -> Found:
        """What was found by asking."""
        return self.embeds, self.batch


def at_each_need(_: str, find_out: Callable[[], Found], __: Found | None) -> Found:
    """The `Once` of whoever has nowhere to keep an answer."""
    return find_out()


@dataclass(slots=True)
class _Known:
    """What the endpoint was found to be when it was asked for one job, or for none."""

    job_id: int | None = None
    once: Once = at_each_need
    identity: Identity | None = None
    endpoint: Endpoint | None = None
    doubted: Found | None = None
    """What was found before, and has proved wrong since."""


class Asked:
    """What one process knows of the endpoint. Threads may share it."""

    def __init__(self, settings: WorkerSettings, wire: Wire) -> None:
        self._settings = settings
        self._wire = wire
        self._asking = threading.RLock()
        self._known = _Known()
        self._of_jobs: dict[int | None, _Known] = {}

    def work_for(self, job_id: int, once: Once) -> None:
        """Ask for this job from here on; `once` keeps what is found for all of its workers. Each
        job asks anew who the endpoint is and what it can do: it may have been started anew since
        the one before."""
        with self._asking:
            self._known = self._of_jobs.pop(job_id, _Known(job_id))
            self._known.once = once
            self._of_jobs[job_id] = self._known
            if len(self._of_jobs) > JOBS_REMEMBERED:
                del self._of_jobs[next(iter(self._of_jobs))]

    def forget(self) -> None:
        """Ask anew once the next task begins, of whichever job: the endpoint is not what it was.
        The task at hand keeps what it knows, so that none of its threads mixes two models."""
        with self._asking:
            self._of_jobs.clear()

    def doubt(self) -> None:
        """The same, and take nobody's word for what has just proved wrong of this job."""
        with self._asking:
            known = self._known
            if self._of_jobs.get(known.job_id) is known:
                found = None if known.endpoint is None else known.endpoint.found
                self._of_jobs = {known.job_id: _Known(known.job_id, known.once, doubted=found)}

    def endpoint(self) -> Endpoint:
        """Return what the endpoint can do: who it is, and whether two different pictures in one
        request come back as two embeddings (one known server stacks them into one picture).

        It is asked the first time, and where `once` keeps it, by the first of all that want to know
        it for the job. Raises Outage, JobPaused, JobStopped.
        """
        with self._asking:
            if self._known.endpoint is None:
                self._known.endpoint = self._ask(self._known)
            return self._known.endpoint

    def _ask(self, known: _Known) -> Endpoint:
        identity = self.identity()
        way = self._settings.api_way
        if way == "compare":
            return Endpoint(identity, embeds=False, batch=1)
        name = f"{endpoint_id(self._wire.base)}:{identity.software}:{way}"
        found = known.once(name, lambda: self._way_that_works(identity.input_size), known.doubted)
        return Endpoint(identity, *found)

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
        # Which hosted endpoints may not have.
        about = self._wire.get("/info", self._settings.api_attempts)
        model, size, notice = about.get("model"), about.get("input_size"), about.get("notice")
        if not isinstance(size, int) or not 16 <= size <= 1024:
            size = INPUT_SIZES.get(version, 224)
        named = shown(model) if isinstance(model, str) else ""
        software = repr([about.get(one) for one in _SOFTWARE]).encode(errors="replace")
        return Identity(
            model=named or UNNAMED + version,
            named=bool(named),
            input_size=size,
            notice=shown(notice) if isinstance(notice, str) else None,
            software=sha256(software).hexdigest()[:16],
        )

    def _way_that_works(self, input_size: int) -> Found:
        pictures = asking_pictures(input_size)
        asked = self._settings.api_way
        try:
            embeddings = self._embed(pictures, None, attempts=self._settings.api_attempts)
        except NotThere:
            # Where neither route is, nothing is learned: a gateway may stand before them.
            missing = self._wire.is_missing
            if asked == "embed" or not missing(EMBED_IMAGE) or missing(COMPARE):
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

    def _embed(self, jpegs: list[bytes], expected: int | None, attempts: int) -> Vectors:
        return self._of_its_model(
            EMBED_IMAGE,
            pictures_body(jpegs),
            lambda answer: unit_vectors(answer, expected),
            attempts,
            images=1,
        )

    def post(
        self,
        route: str,
        body: Body,
        read: Callable[[dict[str, Any]], Vectors],
        attempts: int,
        **counted: int,
    ) -> Vectors:
        """Ask as `Wire.post` does, and take an answer of no other model than the one that the
        endpoint named. Where a route is gone that the job's way needs, and another way is there,
        that is an Outage: the task goes back, and the next one goes that way."""
        try:
            return self._of_its_model(route, body, read, attempts, **counted)
        except NotThere as error:
            endpoint = self._known.endpoint
            needs = endpoint is not None and route == (EMBED_IMAGE if endpoint.embeds else COMPARE)
            if not needs or not self._goes_another_way():
                raise
            raise Outage(f"{route} is gone, and another way is taken ({error})") from None

    def _of_its_model(
        self,
        route: str,
        body: Body,
        read: Callable[[dict[str, Any]], Vectors],
        attempts: int,
        **counted: int,
    ) -> Vectors:
        identity = self._known.identity
        model = identity.model if identity is not None and identity.named else None
        try:
            return self._wire.post(route, body, read, attempts, model=model, **counted)
        except ModelChanged:
            self.forget()
            raise

    def _goes_another_way(self) -> bool:
        """Ask anew, for the job's next task, what the endpoint can do; whether its other route is
        what works now. Raises as `endpoint` does, so JobStopped where neither is there."""
        with self._asking:
            self.doubt()
            before, now = self._known, self._of_jobs.get(self._known.job_id)
            if before.endpoint is None or now is None:
                return False
            now.identity = before.identity
            if now.endpoint is None:
                now.endpoint = self._ask(now)
            return now.endpoint.embeds != before.endpoint.embeds


def asking_pictures(size: int) -> list[bytes]:
    """The two different pictures by which an endpoint is asked whether it takes lists."""
    return [plain_picture(size, 40), plain_picture(size, 200)]


def plain_picture(size: int, grey: int = 128) -> bytes:
    """A JPEG of one grey, size x size, which any endpoint takes."""
    return encode_jpeg(np.full((size, size, 3), grey, dtype=np.uint8))
