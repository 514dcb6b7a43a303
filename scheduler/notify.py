"""Webhooks: the outbox's events to those who asked for them, signed, at least once.

A receiver is unknown and perhaps hostile: it is given a bounded time, its answer is not read, its
redirects lead nowhere, and of its address, which may hold a secret, logs show host and scheme.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import random
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import requests
from sqlalchemy import Engine

from storage.database import DatabaseError, with_retries
from storage.ledger.events import Event, delivered, give_up, put_off, take_event

log = logging.getLogger(__name__)

LOOK_S = 2.0
"""Seconds between looks at the outbox."""
TIMEOUT_S = (5.0, 10.0)
"""To connect, and to wait for the next byte."""
DEADLINE_S = 20.0
"""For a whole delivery: a receiver may drip."""
HOLD_S = 120.0
"""How long an event is nobody else's: well beyond a delivery and a blip of the database."""
ATTEMPTS = 34
"""About a day of tries: with full jitter between 0 and 10, 20, 40 ... 7200 seconds."""
BACKOFF_BASE_S = 5.0
BACKOFF_CAP_S = 7200.0
GONE = 410
"""The one answer that says never to come again."""
LONGEST_URL = 2000


class NotDelivered(Exception):
    """The receiver did not accept the event."""

    def __init__(self, why: str, *, final: bool = False) -> None:
        super().__init__(why)
        self.final = final


def check_url(url: str) -> None:
    """Return where events can be posted to `url`; ValueError says in one line why not."""
    if len(url) > LONGEST_URL:
        raise ValueError(f"the address to notify is longer than {LONGEST_URL} characters")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(
            "the address to notify holds characters that a URL cannot: percent-encode them"
        )
    try:
        parts = urlsplit(url)
        named = bool(parts.hostname) and parts.port != 0
    except ValueError:
        named = False
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not named:
        raise ValueError("the address to notify is not an http:// or https:// URL")
    if parts.username is not None or parts.fragment:
        raise ValueError(
            "the address to notify must hold no user name and no fragment: "
            "the signature tells the receiver who is calling"
        )


def signature(secret: str, timestamp: int, body: bytes) -> str:
    """Value of the header `Nightreel-Signature`: HMAC-SHA256 of "TIMESTAMP.BODY" in hex."""
    digest = hmac.new(secret.encode(), b"%d.%b" % (timestamp, body), hashlib.sha256)
    return f"t={timestamp},v1={digest.hexdigest()}"


class Notifier:
    """Delivers due events, one after the other. Several may run: an event is one's at a time."""

    def __init__(
        self,
        engine: Engine,
        secret: str | None,
        *,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        """`secret` signs what is sent; None leaves it unsigned."""
        self._engine = engine
        self._secret = secret
        self._uniform = uniform

    def run(self, stop: threading.Event) -> None:
        """Deliver until `stop` is set. A database that is away is waited for."""
        while not stop.is_set():
            try:
                while not stop.is_set() and self.step():
                    pass
            except DatabaseError as error:
                log.warning("webhooks wait: %s", error)
            stop.wait(LOOK_S)

    def step(self) -> bool:
        """Try to deliver one due event; False where none is due."""
        event = take_event(self._engine, HOLD_S)
        if event is None:
            return False
        try:
            self._deliver(event)
        except NotDelivered as error:
            self._tried_in_vain(event, error)
        else:
            with_retries(lambda: delivered(self._engine, event.id), deadline_s=HOLD_S / 2)
            log.info("job %d: %s was told of its end", event.job_id, _shown(event.url))
        return True

    def _tried_in_vain(self, event: Event, error: NotDelivered) -> None:
        why = str(error)
        if error.final or event.attempts >= ATTEMPTS:
            with_retries(lambda: give_up(self._engine, event.id, why))
            log.error(
                "job %d: %s is not told of its end, given up after %d attempts: %s",
                *(event.job_id, _shown(event.url), event.attempts, why),
            )
            return
        longest_s = min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2.0**event.attempts)
        delay_s = self._uniform(0, longest_s)
        with_retries(lambda: put_off(self._engine, event.id, delay_s, why))
        log.warning(
            "job %d: %s was not told of its end, again in %.0f s: %s",
            *(event.job_id, _shown(event.url), delay_s, why),
        )

    def _deliver(self, event: Event) -> None:
        """Post the event. Raises NotDelivered unless the receiver says 2xx in time."""
        body = event.body.encode()
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "nightreel",
            "Nightreel-Event-Id": event.id,
        }
        if self._secret is not None:
            headers["Nightreel-Signature"] = signature(self._secret, int(time.time()), body)
        outcome: list[int | str] = []
        # The library's timeouts are between bytes; a receiver that drips is left to its own thread.
        posting = threading.Thread(
            target=lambda: outcome.append(_post(event.url, body, headers)), daemon=True
        )
        posting.start()
        posting.join(DEADLINE_S)
        answer = outcome[0] if outcome else f"no answer within {DEADLINE_S:g} s"
        if isinstance(answer, str):
            raise NotDelivered(answer)
        if not 200 <= answer < 300:
            raise NotDelivered(f"it answers {answer}", final=answer == GONE)


def _post(url: str, body: bytes, headers: dict[str, str]) -> int | str:
    """The status of the answer, or why there is none, in words that hold no address."""
    try:
        with requests.Session() as session:
            session.auth = _no_credentials
            with session.post(
                url,
                data=body,
                headers=headers,
                timeout=TIMEOUT_S,
                allow_redirects=False,
                stream=True,  # so that the body of the answer stays unread
            ) as answer:
                return answer.status_code
    except requests.exceptions.Timeout:
        return "no answer in time"
    except requests.exceptions.SSLError:
        return "TLS failed"
    except requests.exceptions.ConnectionError:
        return "connection refused, reset or name unknown"
    except (requests.exceptions.RequestException, ValueError) as error:
        return f"the request failed ({type(error).__name__})"


def _no_credentials(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """In place of what a .netrc would add."""
    return request


def _shown(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
