"""One process's connection to the API: a request at a time, sent under every limit that there is.

Error tree; what a task does about a failed call is decided by these types alone:

    ApiError
    |-- FrameRefused   this picture will never be answered: its interval becomes a gap
    |-- Outage         the endpoint cannot answer now: the task goes back and spends no attempt
    |   |-- AtRest     its circuit breaker is open: no call was made
    |   `-- BadAnswer  500 or an unusable answer: the endpoint's trouble, or this one picture's
    |-- JobPaused      credits or a paused account: everything stays queued until `resume`
    `-- JobStopped     key, address or model are wrong: no call can succeed until that is mended

No message of these carries the key, an address with a query, or the body of an answer.
"""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter

from storage.records import Usage
from workers.limits import Breaker, Concurrency, EndpointRests, RateLimit
from workers.settings import KeyTransport, WorkerSettings
from workers.shared import Shared

T = TypeVar("T")

ANSWER_LIMIT_BYTES = 16 << 20
BACKOFF_BASE_S = 0.25
BACKOFF_CAP_S = 8.0
LONGEST_WAIT_S = 20.0
"""A longer `Retry-After` is not slept here: the task goes back to the ledger for that long."""
LONGEST_TRYING_S = 120.0
"""No try of a request begins later than this after its first."""

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


class AtRest(Outage):
    """The endpoint was away for all workers: it is left alone for a while."""


class JobPaused(ApiError):
    """The account cannot pay or is paused (402, 423)."""


class JobStopped(ApiError):
    """Key, address or model are refused (401, 403, 404)."""


class BadAnswer(Outage):
    """500, or an answer that is not what was asked for."""


class _TooMany(Outage):
    """429: the endpoint is there, and has had enough for now."""


class _NotReached(Outage):
    """No connection was made: nothing was sent."""


class Purse(Protocol):
    """What calls are paid from. Threads share it."""

    def take(self) -> None:
        """Take one call, or raise what says that there is none left."""

    def refund(self) -> None:
        """Put back a call that was not made, or that the endpoint turned away unworked."""


class _Bottomless:
    def take(self) -> None:
        pass

    def refund(self) -> None:
        pass


class Wire:
    """Threads may share it; processes must not."""

    def __init__(
        self,
        settings: WorkerSettings,
        shared: Shared,
        *,
        sleep: Callable[[float], None] = time.sleep,
        uniform: Callable[[float, float], float] = random.uniform,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """`shared` holds what all workers keep to together. `clock`, in seconds, replaces the
        machine's and Redis's, for tests."""
        try:
            parts = urlsplit(settings.api_url)
        except ValueError:
            raise JobStopped("the API address cannot be read: set NIGHTREEL_API_URL") from None
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
        self._clock = clock or time.monotonic
        self._concurrency = Concurrency(settings.api_in_flight, clock=self._clock)
        longest_call_s = settings.api_connect_timeout_s + 2 * settings.api_read_timeout_s
        self._breaker = Breaker(shared, self.base, probe_s=longest_call_s, clock=clock)
        self._rate: RateLimit | None = None
        if settings.api_max_rps is not None:
            self._rate = RateLimit(shared, self.base, settings.api_max_rps, clock=clock)
        self.purse: Purse = _Bottomless()
        self._session = requests.Session()
        # The environment is read once, here, instead of for each request; and no .netrc is.
        self._session.trust_env = False
        self._session.proxies.update(requests.utils.get_environ_proxies(self.base))
        self._session.verify = (
            os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or True
        )
        adapter = HTTPAdapter(pool_connections=1, pool_maxsize=settings.api_in_flight + 1)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)
        self._counting = threading.Lock()
        self._image_calls = self._text_calls = self._bytes_sent = 0
        self._seconds = 0.0

    def close(self) -> None:
        """End the connections that are kept open."""
        self._session.close()

    @property
    def spent(self) -> Usage:
        """What all calls so far have cost. A call is a request that the endpoint bills: one that
        it answered, or may have worked on; not one that never reached it or that it turned away."""
        with self._counting:
            return Usage(self._image_calls, self._text_calls, self._bytes_sent, self._seconds)

    def get(self, path: str) -> dict[str, Any]:
        """Return the JSON object at `path`, which is not billed; empty where there is none. Raises
        Outage where nothing answers."""
        with self._breaker_asked():
            try:
                answer = self._session.get(
                    self.base + path, timeout=self._timeout(), allow_redirects=False, stream=True
                )
                found = json.loads(_read_capped(answer, self._settings.api_read_timeout_s))
            except requests.exceptions.RequestException as error:
                said = f"the API at {self.base} cannot be reached ({_named(error)})"
                raise Outage(said) from None
            except (ValueError, Outage):
                return {}
        return found if answer.status_code == 200 and isinstance(found, dict) else {}

    def is_missing(self, route: str) -> bool:
        """Whether there is no such route, by a request that asks for nothing."""
        with self._send(route, self._encoded({})) as answer:
            return answer.status_code == 404

    def post(
        self,
        route: str,
        body: dict[str, Any],
        read: Callable[[dict[str, Any]], T],
        attempts: int,
        *,
        images: int = 0,
        texts: int = 0,
    ) -> T:
        """Send, and send again with full-jitter backoff what may yet succeed; return what `read`
        makes of the answer."""
        content = self._encoded(body | {"clip_version_id": self._settings.clip_version})
        began = self._clock()
        for attempt in range(1, attempts + 1):
            if self._rate is not None:
                self._sleep(self._rate.wait_s())
            try:
                with self._breaker_asked():
                    return self._once(route, content, read, images, texts)
            except AtRest:
                raise
            except Outage as error:
                wait = error.retry_after_s
                if wait is None:
                    cap = min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2**attempt)
                    wait = self._uniform(0, cap)
                few = 2 if isinstance(error, BadAnswer) else attempts
                late = self._clock() + wait - began > LONGEST_TRYING_S
                if attempt >= min(few, attempts) or wait > LONGEST_WAIT_S or late:
                    raise
                self._sleep(wait)
        raise AssertionError("unreachable: the last attempt returns or raises")

    @contextmanager
    def _breaker_asked(self) -> Iterator[None]:
        """Ask the breaker before a request and tell it the outcome: an endpoint that refuses, or
        says "too many", is not away."""
        try:
            with self._breaker.admitted():
                try:
                    yield
                except Outage as error:
                    if isinstance(error, _TooMany):
                        self._breaker.succeeded()
                    else:
                        self._breaker.failed(str(error), error.retry_after_s)
                    raise
                except ApiError:
                    self._breaker.succeeded()
                    raise
                self._breaker.succeeded()
        except EndpointRests as error:
            raise AtRest(
                f"the API at {self.base} was away and is given a rest", error.wait_s
            ) from None

    def _once(
        self,
        route: str,
        content: bytes,
        read: Callable[[dict[str, Any]], T],
        images: int,
        texts: int,
    ) -> T:
        """One paid request, and what it came to."""
        self.purse.take()
        billed, status = True, None
        began = self._concurrency.begin()
        start = time.monotonic()
        try:
            answer = self._send(route, content)
            status = answer.status_code
            billed = 200 <= status < 300 or (status >= 500 and status != 503)
            with self._counting:
                self._bytes_sent += len(content)
            said = _read_capped(answer, self._settings.api_read_timeout_s)
        except _NotReached:
            billed = False
            raise
        finally:
            self._concurrency.end(began, refused=status in (429, 503))
            with self._counting:
                self._image_calls += images * billed
                self._text_calls += texts * billed
                self._seconds += time.monotonic() - start
            if not billed:
                self.purse.refund()
        try:
            found = json.loads(said)
        except ValueError:
            found = None
        if not 200 <= status < 300:  # `ok` counts redirects as success
            raise self._error(answer, found)
        if not isinstance(found, dict):
            raise BadAnswer("the answer is not a JSON object")
        return read(found)

    def _encoded(self, body: dict[str, Any]) -> bytes:
        """The request's body; made beforehand, so that a turn on the wire is not spent on it."""
        if self._key is not None and self._transport is KeyTransport.BODY:
            body = {**body, "api_key": self._key}
        return json.dumps(body).encode()

    def _send(self, route: str, content: bytes) -> requests.Response:
        parameters, headers = {}, {"Content-Type": "application/json"}
        if self._key is not None:
            if self._transport is KeyTransport.QUERY:
                parameters = {"api_key": self._key}
            elif self._transport is KeyTransport.HEADER:
                headers["Authorization"] = f"Bearer {self._key}"
        try:
            return self._session.post(
                self.base + route,
                params=parameters,
                headers=headers,
                data=content,
                timeout=self._timeout(),
                allow_redirects=False,  # a redirect would carry the key to another host
                stream=True,
            )
        except requests.exceptions.RequestException as error:
            kind = _NotReached if _never_sent(error) else Outage
            raise kind(f"the API at {self.base} cannot be reached ({_named(error)})") from None

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
        if status in (413, 422) or (
            status == 400 and said.startswith("Could not load input image")
        ):
            return FrameRefused(text)
        if status in (402, 423):
            return JobPaused(f"{text}; see to the account's credits, then run again")
        if status in (400, 401, 403, 404, 405) or 300 <= status < 400:
            return JobStopped(f"{text}; check NIGHTREEL_API_URL, NIGHTREEL_API_KEY and the model")
        if status == 500:
            return BadAnswer(text)
        kind = _TooMany if status == 429 else Outage
        return kind(text, _retry_after_s(answer.headers.get("Retry-After")))


def _read_capped(answer: requests.Response, deadline_s: float) -> bytes:
    """Read an answer of bounded size in bounded time; a server may drip or flood."""
    start, content = time.monotonic(), bytearray()
    try:
        # read1 returns what has arrived; read would wait for its whole amount, deadline or not.
        while chunk := answer.raw.read1(1 << 16, decode_content=True):
            content += chunk
            if len(content) > ANSWER_LIMIT_BYTES:
                raise BadAnswer(f"the answer is larger than {ANSWER_LIMIT_BYTES >> 20} MiB")
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


def _never_sent(error: requests.exceptions.RequestException) -> bool:
    """Whether the request cannot have reached the endpoint, for want of a connection."""
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return True
    cause = error.args[0] if error.args else None
    reason = getattr(cause, "reason", None)
    return isinstance(reason, urllib3.exceptions.NewConnectionError)


def _named(error: requests.exceptions.RequestException) -> str:
    """What went wrong, in words that hold no address; those of requests hold the whole query."""
    words = {
        requests.exceptions.ConnectTimeout: "no connection in time",
        requests.exceptions.ReadTimeout: "no answer in time",
        requests.exceptions.SSLError: "TLS failed",
        requests.exceptions.ProxyError: "the proxy refused",
        requests.exceptions.ChunkedEncodingError: "the connection was cut",
        requests.exceptions.ConnectionError: "connection refused, reset or name unknown",
    }
    return next((said for kind, said in words.items() if isinstance(error, kind)), "failed")
