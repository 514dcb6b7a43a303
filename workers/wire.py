"""One process's connection to the API: a request at a time, sent under every limit that there is.

Error tree; what a task does about a failed call is decided by these types alone:

    ApiError
    |-- FrameRefused   this picture will never be answered: its interval becomes a gap
    |-- Outage         the endpoint cannot answer now: the task goes back and spends no attempt
    |   |-- AtRest     its circuit breaker is open: no call was made
    |   `-- BadAnswer  500 or an unusable answer: the endpoint's trouble, or this one picture's
    |-- JobPaused      credits or a paused account: everything stays queued until `resume`
    `-- JobStopped     key, address or model are wrong: no call can succeed until that is mended
        |-- BadRequest   400: one of these, or what was asked for
        `-- TextRefused  a prompt that the endpoint does not take

No message of these carries the key, an address with a query, or the body of an answer.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, cast
from urllib.parse import urlencode, urlsplit

import pydantic_core
import requests
from requests.adapters import HTTPAdapter
from requests.utils import DEFAULT_CA_BUNDLE_PATH
from urllib3 import BaseHTTPResponse, HTTPConnectionPool, Timeout
from urllib3 import exceptions as trouble

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

SHOWN_CHARACTERS = 80
"""Of a prompt, in a message."""
_CHECK_SETTINGS = "check NIGHTREEL_API_URL, NIGHTREEL_API_KEY and the model"

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


class BadRequest(JobStopped):
    """400 that is not about a picture: a missing key, or a text that is not taken."""

    def __init__(self, said: str) -> None:
        """`said` is the endpoint's answer without the advice that the message adds."""
        super().__init__(f"{said}; {_CHECK_SETTINGS}")
        self.said = said


class TextRefused(JobStopped):
    """The endpoint answers other texts and not this one."""

    def __init__(self, text: str, why: str) -> None:
        cut = "..." * (len(text) > SHOWN_CHARACTERS)
        shown = f"{text[:SHOWN_CHARACTERS]!r}{cut}"
        super().__init__(f"the prompt {shown} is refused ({why}): write a shorter one")
        self.text = text
        self.why = why


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
        # What requests would find out for each request anew is found out here once: proxies and
        # certificates from the environment, the address in pieces. No .netrc is read.
        self._adapter = HTTPAdapter(pool_connections=1, pool_maxsize=settings.api_in_flight + 1)
        proxies = requests.utils.get_environ_proxies(self.base)
        certificates = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")
        try:
            root = requests.Request("GET", self.base).prepare()
            pool = self._adapter.get_connection_with_tls_context(
                root, verify=certificates or DEFAULT_CA_BUNDLE_PATH, proxies=proxies
            )
        except (requests.exceptions.RequestException, trouble.HTTPError, ValueError) as error:
            raise JobStopped(
                f"the API at {self.base} cannot be asked ({type(error).__name__}): "
                "check NIGHTREEL_API_URL, and HTTP_PROXY or HTTPS_PROXY"
            ) from None
        self._pool = cast(HTTPConnectionPool, pool)
        self._path = self._adapter.request_url(root, proxies).rstrip("/")
        self._timeout = Timeout(
            connect=settings.api_connect_timeout_s, read=settings.api_read_timeout_s
        )
        self._headers = {
            "Content-Type": "application/json",
            "Accept-Encoding": "gzip, deflate",
            "User-Agent": "nightreel",
        }
        self._query = ""
        if self._key is not None and self._transport is KeyTransport.QUERY:
            self._query = "?" + urlencode({"api_key": self._key})
        elif self._key is not None and self._transport is KeyTransport.HEADER:
            self._headers["Authorization"] = f"Bearer {self._key}"
        self._counting = threading.Lock()
        self._image_calls = self._text_calls = self._bytes_sent = 0
        self._seconds = 0.0

    def close(self) -> None:
        """End the connections that are kept open."""
        self._adapter.close()

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
            answer = self._send("GET", path, None)
            try:
                found = _json(_read_capped(answer, self._settings.api_read_timeout_s))
            except Outage:
                return {}
        return found if answer.status == 200 and isinstance(found, dict) else {}

    def is_missing(self, route: str) -> bool:
        """Whether there is no such route, by a request that asks for nothing."""
        answer = self._send("POST", route + self._query, self._encoded({}))
        answer.close()
        return answer.status == 404

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
            answer = self._send("POST", route + self._query, content)
            status = answer.status
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
        found = _json(said)
        if not 200 <= status < 300:
            raise self._error(answer, found)
        if not isinstance(found, dict):
            raise BadAnswer("the answer is not a JSON object")
        return read(found)

    def _encoded(self, body: dict[str, Any]) -> bytes:
        """The request's body; made beforehand, so that a turn on the wire is not spent on it."""
        if self._key is not None and self._transport is KeyTransport.BODY:
            body = {**body, "api_key": self._key}
        try:
            return pydantic_core.to_json(body)
        except pydantic_core.PydanticSerializationError:
            raise JobStopped("a text is not valid Unicode: write it anew") from None

    def _send(self, method: str, path: str, content: bytes | None) -> BaseHTTPResponse:
        try:
            return self._pool.urlopen(
                method,
                self._path + path,
                body=content,
                headers=self._headers,
                timeout=self._timeout,
                retries=False,
                redirect=False,  # it would carry the key to another host
                assert_same_host=False,
                preload_content=False,
            )
        except trouble.HTTPError as error:
            kind = _NotReached if isinstance(error, trouble.ConnectTimeoutError) else Outage
            raise kind(f"the API at {self.base} cannot be reached ({_named(error)})") from None

    def _error(self, answer: BaseHTTPResponse, found: Any) -> ApiError:
        """The contract's table of errors, in one place."""
        status = answer.status
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
        if status == 400:
            return BadRequest(text)
        if status in (401, 403, 404, 405) or 300 <= status < 400:
            return JobStopped(f"{text}; {_CHECK_SETTINGS}")
        if status == 500:
            return BadAnswer(text)
        kind = _TooMany if status == 429 else Outage
        return kind(text, _retry_after_s(answer.headers.get("Retry-After")))


def _json(said: bytes) -> Any:
    """The value that was said; None for what is no JSON."""
    try:
        return pydantic_core.from_json(said, cache_strings="keys")
    except ValueError:
        return None


def _read_capped(answer: BaseHTTPResponse, deadline_s: float) -> bytes:
    """Read an answer of bounded size in bounded time; a server may drip or flood."""
    start, content = time.monotonic(), bytearray()
    try:
        # read1 returns what has arrived; read would wait for its whole amount, deadline or not.
        while chunk := answer.read1(1 << 16, decode_content=True):
            content += chunk
            if len(content) > ANSWER_LIMIT_BYTES:
                raise BadAnswer(f"the answer is larger than {ANSWER_LIMIT_BYTES >> 20} MiB")
            if time.monotonic() - start > deadline_s:
                raise Outage(f"the answer is not complete after {deadline_s:g} s")
    except (trouble.HTTPError, OSError):
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


def _named(error: trouble.HTTPError) -> str:
    """What went wrong, in words that hold no address; those of urllib3 hold the whole query."""
    words = {
        trouble.NewConnectionError: "connection refused or name unknown",
        trouble.ConnectTimeoutError: "no connection in time",
        trouble.ReadTimeoutError: "no answer in time",
        trouble.SSLError: "TLS failed",
        trouble.ProxyError: "the proxy refused",
        trouble.ProtocolError: "the connection was cut",
    }
    return next((said for kind, said in words.items() if isinstance(error, kind)), "failed")
