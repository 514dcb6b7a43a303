"""One process's connection to the API: a request at a time, sent under every limit that there is.

Errors are those of `workers.refusals`, where their tree is drawn.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import random
import re
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
from workers.contract import Body, encoded
from workers.limits import Breaker, Concurrency, EndpointRests, RateLimit
from workers.refusals import (
    CHECK_SETTINGS,
    SAID_CHARACTERS,
    ApiError,
    AtRest,
    BadAnswer,
    JobStopped,
    ModelChanged,
    NotReached,
    Outage,
    TooMany,
    forms_of,
    refusal,
    shown,
)
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
        machine's and Redis's, for tests. Raises JobStopped for an address that cannot be one,
        SecretUnreadable for such a key."""
        try:
            parts = urlsplit(settings.api_url)
        except ValueError:
            raise JobStopped("the API address cannot be read: set NIGHTREEL_API_URL") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise JobStopped(
                "the API address is not an http:// or https:// address: set NIGHTREEL_API_URL"
            )
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise JobStopped(
                "the API address must hold no user name, password, query or fragment: "
                "put the key into NIGHTREEL_API_KEY or NIGHTREEL_API_KEY_FILE"
            )
        path = re.sub("/+", "/", parts.path).rstrip("/")  # a double slash is no route anywhere
        self.base = parts._replace(path=path).geturl()
        self._settings = settings
        self._key = settings.key()
        self._secret = None if self._key is None else forms_of(self._key)
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
        # A proxy's own loopback interface is another machine's.
        at_home = _is_loopback(parts.hostname)
        proxies = {} if at_home else requests.utils.get_environ_proxies(self.base)
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

    def get(self, path: str, attempts: int) -> dict[str, Any]:
        """Return the JSON object at `path`, which is not billed; empty where there is none. Sends
        again as `post` does. Raises Outage where nothing answers, or says that it cannot now: who
        an endpoint is must not be guessed from that."""

        def ask() -> dict[str, Any]:
            answer = self._send("GET", path, None)
            found = _json(_read_capped(answer, self._settings.api_read_timeout_s))
            if answer.status != 200:
                refused = self._refusal(answer, found)
                if isinstance(refused, Outage):
                    raise refused
                return {}
            return found if isinstance(found, dict) else {}

        return self._insisting(ask, attempts)

    def weight(self, body: Body) -> int:
        """Bytes that a request with this body counts for in `spent`. Raises JobStopped."""
        return len(self._encoded(body))

    def is_missing(self, route: str) -> bool:
        """Whether there is no such route, by a request that asks for nothing."""
        # What a server says of routes that it does not know.
        return self._asked_for_nothing(route).status in (404, 405)

    def check_key(self, route: str) -> None:
        """Raise JobStopped where the key is refused, by a request that asks for nothing."""
        answer = self._asked_for_nothing(route)
        if answer.status in (401, 403):
            raise self._refusal(answer, None)

    def _asked_for_nothing(self, route: str) -> BaseHTTPResponse:
        answer = self._send("POST", route + self._query, self._encoded({}))
        answer.close()
        return answer

    def post(
        self,
        route: str,
        body: Body,
        read: Callable[[dict[str, Any]], T],
        attempts: int,
        *,
        model: str | None = None,
        images: int = 0,
        texts: int = 0,
    ) -> T:
        """Send, and send again with full-jitter backoff what may yet succeed; return what `read`
        makes of the answer. An answer that says in its header which model it is of must be of
        `model`, where that is given."""
        content = self._encoded(body)

        def ask() -> T:
            found, served = self._once(route, content, images, texts)
            self._check_model(model, served)
            return read(found)

        return self._insisting(ask, attempts, self._rate)

    def _insisting(self, ask: Callable[[], T], attempts: int, rate: RateLimit | None = None) -> T:
        """What `ask` returns, asked again with backoff while it may yet succeed."""
        began = self._clock()
        for attempt in range(1, attempts + 1):
            if rate is not None:
                self._sleep(rate.wait_s())
            try:
                with self._breaker_asked():
                    return ask()
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
                    if isinstance(error, TooMany):
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
        images: int,
        texts: int,
    ) -> tuple[dict[str, Any], str | None]:
        """One paid request; what it came to, and of which model the answer says that it is."""
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
        except NotReached:
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
            raise self._refusal(answer, found)
        if not isinstance(found, dict):
            raise BadAnswer("the answer is not a JSON object")
        return found, answer.headers.get("x-model-id")

    def _check_model(self, named: str | None, served: str | None) -> None:
        if named is not None and served is not None and shown(served) != named:
            raise ModelChanged(
                f"the API at {self.base} served {named} and answers now as "
                f"{shown(served, self._secret)[:SAID_CHARACTERS]}: "
                "start it with the job's model again, or submit the job anew"
            )

    def _encoded(self, body: Body) -> bytes:
        """The request's body; made beforehand, so that a turn on the wire is not spent on it."""
        key = self._key if self._transport is KeyTransport.BODY else None
        try:
            return encoded(body, self._settings.clip_version, key)
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
            kind = NotReached if isinstance(error, trouble.ConnectTimeoutError) else Outage
            raise kind(f"the API at {self.base} cannot be reached ({_named(error)})") from None
        except ValueError as error:  # whose text may hold a header or the query
            raise JobStopped(
                f"the API at {self.base} cannot be asked ({type(error).__name__}); {CHECK_SETTINGS}"
            ) from None

    def _refusal(self, answer: BaseHTTPResponse, found: Any) -> ApiError:
        said = found.get("message") if isinstance(found, dict) else None
        if not isinstance(said, str) or answer.status == 422:  # which echoes what it was sent
            said = answer.reason or "no word"
        return refusal(answer.status, shown(said, self._secret), answer.headers)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


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
