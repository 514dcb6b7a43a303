"""Client of the CLIP HTTP contract.

Error tree; what a task does about a failed call is decided by these types alone:

    ApiError
    |-- FrameRefused   this picture will never be answered: its interval becomes a gap
    |-- Outage         the endpoint cannot answer now: the task goes back and spends no attempt
    |-- JobPaused      credits or a paused account: everything stays queued until `resume`
    `-- JobStopped     key, address or model are wrong: no call can succeed until that is mended

No message of these carries the key, an address with a query, or the body of an answer.
"""

from __future__ import annotations

import base64
import json
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import requests
import urllib3
from requests.adapters import HTTPAdapter

from workers.footage.picture import encode_jpeg
from workers.settings import KeyTransport, WorkerSettings

Vectors = npt.NDArray[np.float32]

MAX_BATCH = 8
"""The real server answers 500 beyond this many pictures, or prompts of a comparison."""
ANSWER_LIMIT_BYTES = 16 << 20
BACKOFF_BASE_S = 0.25
BACKOFF_CAP_S = 8.0
LONGEST_WAIT_S = 20.0
"""A longer `Retry-After` is not slept here: the task goes back to the ledger for that long."""
INPUT_SIZES = {"ViT-L-14-336px": 336, "RN50x4": 288, "RN50x16": 384, "RN50x64": 448}
"""Sides in pixels of the models that do not read 224 x 224."""

# urllib3 writes request lines, query and all, at DEBUG; the query may hold the key.
logging.getLogger("urllib3").setLevel(logging.INFO)


class ApiError(Exception):
    """A call failed; the subclass says what follows."""


class FrameRefused(ApiError):
    """The endpoint refuses this picture, and would again."""


class Outage(ApiError):
    """The endpoint cannot answer now."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class JobPaused(ApiError):
    """The account cannot pay or is paused (402, 423)."""


class JobStopped(ApiError):
    """Key, address or model are refused (401, 403, 404)."""


class _BadArgument(Outage):
    """500 or an unusable answer: the endpoint's trouble, or this one picture's."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who an endpoint is, found without a call that costs."""

    model: str
    """Name that results are keyed by."""
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
class Spent:
    """Running totals of a client, over all its threads."""

    image_calls: int = 0
    text_calls: int = 0
    bytes_sent: int = 0
    seconds: float = 0.0


class ApiClient:
    """One process's connection to one endpoint. Threads may share it; processes must not."""

    def __init__(
        self,
        settings: WorkerSettings,
        *,
        sleep: Callable[[float], None] = time.sleep,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        parts = urlsplit(settings.api_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise JobStopped(
                "the API address is not an http:// or https:// address: set NIGHTREEL_API_URL"
            )
        if parts.username or parts.query or parts.fragment:
            raise JobStopped(
                "the API address must hold no user name, query or fragment: "
                "put the key into NIGHTREEL_API_KEY or NIGHTREEL_API_KEY_FILE"
            )
        self.base = settings.api_url.rstrip("/")
        self._settings = settings
        self._key = settings.key()
        self._transport = settings.api_key_transport
        if self._transport is KeyTransport.AUTO:
            hosted = parts.hostname == "roboflow.com" or parts.hostname.endswith(".roboflow.com")
            self._transport = KeyTransport.QUERY if hosted else KeyTransport.BODY
        self._sleep = sleep
        self._uniform = uniform
        self._session = requests.Session()
        self._session.auth = lambda request: request  # or a .netrc entry would be sent
        adapter = HTTPAdapter(pool_connections=1, pool_maxsize=settings.api_in_flight + 1)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)
        self._asking = threading.Lock()
        self._counting = threading.Lock()
        self._identity: Identity | None = None
        self._endpoint: Endpoint | None = None
        self.spent = Spent()

    # -- what the endpoint can do

    def endpoint(self) -> Endpoint:
        """Return what the endpoint can do, asking it the first time: who it is, and whether two
        different pictures in one request come back as two embeddings (one known server stacks
        them into one picture). Raises Outage, JobPaused, JobStopped."""
        with self._asking:
            if self._endpoint is None:
                self._endpoint = self._ask()
            return self._endpoint

    def _ask(self) -> Endpoint:
        identity = self.identity()
        if self._settings.api_way == "compare":
            return Endpoint(identity, embeds=False, batch=1)
        return Endpoint(identity, *self._batch_that_works(identity.input_size))

    def identity(self) -> Identity:
        """Return who the endpoint says it is, by `GET /info` the first time; what it does not say
        follows from the model that is asked of it. Raises Outage where nothing answers."""
        if self._identity is None:
            self._identity = self._identify()
        return self._identity

    def _identify(self) -> Identity:
        version = self._settings.clip_version
        about = self._information()
        model, size, notice = about.get("model"), about.get("input_size"), about.get("notice")
        if not isinstance(size, int) or not 16 <= size <= 1024:
            size = INPUT_SIZES.get(version, 224)
        return Identity(
            model=model if isinstance(model, str) and model else f"clip:{version}",
            input_size=size,
            notice=notice if isinstance(notice, str) else None,
        )

    def _information(self) -> dict[str, Any]:
        """`GET /info`, which hosted endpoints may not have: then nothing is known."""
        try:
            answer = self._session.get(
                f"{self.base}/info", timeout=self._timeout(), allow_redirects=False, stream=True
            )
            about = json.loads(_read_capped(answer, self._settings.api_read_timeout_s))
        except requests.exceptions.RequestException as error:
            raise Outage(f"the API at {self.base} cannot be reached ({_named(error)})") from None
        except (ValueError, Outage):
            return {}
        return about if answer.status_code == 200 and isinstance(about, dict) else {}

    def _batch_that_works(self, size: int) -> tuple[bool, int]:
        pictures = [_flat_jpeg(size, 40), _flat_jpeg(size, 200)]
        asked = self._settings.api_way
        try:
            embeddings = self._embed(pictures, attempts=self._settings.api_attempts)
        except JobStopped:
            if asked == "embed" or not self._route_is_missing("/clip/embed_image"):
                raise
            return False, 1
        except (_BadArgument, FrameRefused):
            return True, 1
        return True, MAX_BATCH if len(embeddings) == 2 else 1

    def _route_is_missing(self, route: str) -> bool:
        """Whether 404 was said of the route itself: a known model name is never asked here."""
        answer = self._send(route, {})
        return answer.status_code == 404

    # -- the three routes

    def embed_images(self, jpegs: Sequence[bytes]) -> list[Vectors | FrameRefused]:
        """Return for each JPEG its unit vector (D, float32), or the refusal of that one picture.

        At most `endpoint().batch` pictures. A refused batch is asked again picture by picture.
        Raises Outage, JobPaused, JobStopped.
        """
        try:
            vectors = self._embed(jpegs, attempts=self._settings.api_attempts)
            if len(vectors) != len(jpegs):
                raise _BadArgument(f"{len(vectors)} embeddings came back for {len(jpegs)} pictures")
            return list(vectors)
        except (FrameRefused, _BadArgument) as error:
            if len(jpegs) > 1:
                return [answer for one in jpegs for answer in self.embed_images([one])]
            if isinstance(error, FrameRefused):
                return [error]
            self._blame(error)
            return [FrameRefused(str(error))]

    def embed_texts(self, texts: Sequence[str]) -> Vectors:
        """Return the unit vectors of the texts, len(texts) x D float32. Raises ApiError."""
        body = {"text": list(texts)}
        answer = self._post("/clip/embed_text", body, self._settings.api_attempts, texts=1)
        vectors = _unit_vectors(answer)
        if len(vectors) != len(texts):
            raise Outage(f"{len(vectors)} embeddings came back for {len(texts)} texts")
        return vectors

    def compare(self, jpeg: bytes, prompts: Sequence[str]) -> Vectors | FrameRefused:
        """Return the cosine of each prompt with the picture (len(prompts), float32), or the
        refusal of the picture; asked in groups that the real server accepts."""
        found: list[Vectors] = []
        for at in range(0, len(prompts), MAX_BATCH):
            group = list(prompts[at : at + MAX_BATCH])
            body = {"subject": _picture(jpeg), "subject_type": "image", "prompt": group}
            try:
                found.append(self._similarity(body, len(group), images=1))
            except FrameRefused as error:
                return error
            except _BadArgument as error:
                self._blame(error)
                return FrameRefused(str(error))
        return np.concatenate(found)

    def compare_texts(self, text: str, prompts: Sequence[str]) -> Vectors:
        """Return the cosine of each prompt with `text` (len(prompts), float32). Raises ApiError."""
        groups = [prompts[at : at + MAX_BATCH] for at in range(0, len(prompts), MAX_BATCH)]
        bodies = [{"subject": text, "subject_type": "text", "prompt": list(g)} for g in groups]
        return np.concatenate(
            [self._similarity(b, len(g), texts=1) for b, g in zip(bodies, groups, strict=True)]
        )

    def _similarity(self, body: dict[str, Any], n: int, *, images: int = 0, texts: int = 0) -> Vectors:
        body["prompt_type"] = "text"
        attempts = self._settings.api_attempts
        answer = self._post("/clip/compare", body, attempts, images=images, texts=texts)
        try:
            cosines = np.asarray(answer["similarity"], dtype=np.float32)
        except (KeyError, TypeError, ValueError):
            raise _BadArgument("the answer holds no list of similarities") from None
        if cosines.shape != (n,) or not np.isfinite(cosines).all():
            raise _BadArgument(f"the answer does not hold {n} finite similarities")
        return cosines

    def _embed(self, jpegs: Sequence[bytes], attempts: int) -> Vectors:
        image = [_picture(j) for j in jpegs] if len(jpegs) > 1 else _picture(jpegs[0])
        return _unit_vectors(self._post("/clip/embed_image", {"image": image}, attempts, images=1))

    def _blame(self, error: _BadArgument) -> None:
        """Find out whose fault a 500 is, since the real server says 500 for a bad picture too:
        ask about a plain grey picture. If that works the fault is the picture's; else Outage."""
        grey = _flat_jpeg(224, 128)
        try:
            if self._endpoint is not None and self._endpoint.embeds:
                self._embed([grey], attempts=1)
            else:
                body = {"subject": _picture(grey), "subject_type": "image", "prompt": ["grey"]}
                self._similarity(body, 1, images=1)
        except _BadArgument:
            raise Outage(str(error)) from None

    # -- one request

    def _post(
        self, route: str, body: dict[str, Any], attempts: int, *, images: int = 0, texts: int = 0
    ) -> dict[str, Any]:
        """Send, and send again with full-jitter backoff what may yet succeed."""
        body["clip_version_id"] = self._settings.clip_version
        for attempt in range(1, attempts + 1):
            try:
                return self._once(route, body, images, texts)
            except Outage as error:
                wait = error.retry_after_s
                if wait is None:
                    cap = min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2**attempt)
                    wait = self._uniform(0, cap)
                few = 2 if isinstance(error, _BadArgument) else attempts
                if attempt >= min(few, attempts) or wait > LONGEST_WAIT_S:
                    raise
                self._sleep(wait)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _once(self, route: str, body: dict[str, Any], images: int, texts: int) -> dict[str, Any]:
        start = time.monotonic()
        answer = self._send(route, body)
        content = _read_capped(answer, self._settings.api_read_timeout_s)
        with self._counting:
            self.spent.image_calls += images
            self.spent.text_calls += texts
            self.spent.bytes_sent += int(answer.request.headers.get("Content-Length") or 0)
            self.spent.seconds += time.monotonic() - start
        try:
            found = json.loads(content)
        except ValueError:
            found = None
        if not 200 <= answer.status_code < 300:  # `ok` counts redirects as success
            raise self._error(answer, found)
        if not isinstance(found, dict):
            raise _BadArgument("the answer is not a JSON object")
        return found

    def _send(self, route: str, body: dict[str, Any]) -> requests.Response:
        parameters, headers = {}, {}
        if self._key is not None:
            if self._transport is KeyTransport.QUERY:
                parameters = {"api_key": self._key}
            elif self._transport is KeyTransport.HEADER:
                headers = {"Authorization": f"Bearer {self._key}"}
            else:
                body = {**body, "api_key": self._key}
        try:
            return self._session.post(
                self.base + route,
                params=parameters,
                headers=headers,
                json=body,
                timeout=self._timeout(),
                allow_redirects=False,  # a redirect would carry the key to another host
                stream=True,
            )
        except requests.exceptions.RequestException as error:
            raise Outage(f"the API at {self.base} cannot be reached ({_named(error)})") from None

    def _timeout(self) -> tuple[float, float]:
        return self._settings.api_connect_timeout_s, self._settings.api_read_timeout_s

    def _error(self, answer: requests.Response, found: Any) -> ApiError:
        """The contract's table of errors, in one place."""
        status = answer.status_code
        said = found.get("message") if isinstance(found, dict) else None
        said = said[:200] if isinstance(said, str) and status != 422 else answer.reason or "no word"
        if self._key:
            said = said.replace(self._key, "[key]")
        text = f"the API answers {status}: {said}"
        if status in (413, 422) or (status == 400 and said.startswith("Could not load input image")):
            return FrameRefused(text)
        if status in (402, 423):
            return JobPaused(f"{text}; see to the account's credits, then run again")
        if status in (400, 401, 403, 404, 405) or 300 <= status < 400:
            return JobStopped(f"{text}; check NIGHTREEL_API_URL, NIGHTREEL_API_KEY and the model")
        if status == 500:
            return _BadArgument(text)
        return Outage(text, _retry_after_s(answer.headers.get("Retry-After")))


def _picture(jpeg: bytes) -> dict[str, str]:
    return {"type": "base64", "value": base64.b64encode(jpeg).decode("ascii")}


def _flat_jpeg(size: int, grey: int) -> bytes:
    picture = np.full((size, size, 3), grey, dtype=np.uint8)
    return encode_jpeg(picture)


def _unit_vectors(answer: dict[str, Any]) -> Vectors:
    """Return the answer's embeddings as unit vectors, N x D float32."""
    try:
        vectors = np.asarray(answer["embeddings"], dtype=np.float32)
    except (KeyError, TypeError, ValueError):
        raise _BadArgument("the answer holds no rectangle of embeddings") from None
    if vectors.ndim != 2 or vectors.shape[1] < 2 or not np.isfinite(vectors).all():
        raise _BadArgument("the answer's embeddings are not finite vectors of one length")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (lengths > 0).all():
        raise _BadArgument("the answer holds an embedding of length zero")
    return vectors / lengths


def _read_capped(answer: requests.Response, deadline_s: float) -> bytes:
    """Read an answer of bounded size in bounded time; a server may drip or flood."""
    start, content = time.monotonic(), bytearray()
    try:
        # read1 returns what has arrived; read would wait for its whole amount, and the deadline too.
        while chunk := answer.raw.read1(1 << 16, decode_content=True):
            content += chunk
            if len(content) > ANSWER_LIMIT_BYTES:
                raise _BadArgument(f"the answer is larger than {ANSWER_LIMIT_BYTES >> 20} MiB")
            if time.monotonic() - start > deadline_s:
                raise Outage(f"the answer is not complete after {deadline_s:g} s")
    except (urllib3.exceptions.HTTPError, OSError):
        raise Outage("the answer broke off") from None
    finally:
        answer.close()
    return bytes(content)


def _retry_after_s(header: str | None) -> float | None:
    """Seconds of a `Retry-After` header; None where there is none or it holds a date."""
    try:
        seconds = float(header) if header is not None else None
    except ValueError:
        return None
    return min(max(seconds, 0.0), 3600.0) if seconds is not None else None


def _named(error: requests.exceptions.RequestException) -> str:
    """What went wrong, in words that hold no address: requests puts the whole query into its own."""
    words = {
        requests.exceptions.ConnectTimeout: "no connection in time",
        requests.exceptions.ReadTimeout: "no answer in time",
        requests.exceptions.SSLError: "TLS failed",
        requests.exceptions.ProxyError: "the proxy refused",
        requests.exceptions.ChunkedEncodingError: "the connection was cut",
        requests.exceptions.ConnectionError: "connection refused, reset or name unknown",
    }
    return next((said for kind, said in words.items() if isinstance(error, kind)), "failed")
