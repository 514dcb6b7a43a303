"""Webhooks: the outbox's events to those who asked for them, signed, at least once.

A receiver is unknown and perhaps hostile: all of a delivery, from its name's address to its answer,
is given one bounded time; of the answer the status alone is read, redirects lead nowhere, and of
its address, which may hold a secret, logs show host and scheme.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

from sqlalchemy import Engine

from storage.database import DatabaseError, with_retries
from storage.ledger.events import Event, delivered, give_up, put_off, take_events
from workers import logs

log = logging.getLogger(__name__)

LOOK_S = 2.0
"""Seconds between looks at the outbox."""
AT_ONCE = 16
"""Receivers that are told at the same time: one that is away holds up none of them."""
DEADLINE_S = 20.0
"""For a whole delivery: a receiver may hang or drip."""
SECOND_ADDRESS_S = 1.0
"""How long a host's address may take to be reached before its next is tried besides."""
HOLD_S = 120.0
"""How long an event is nobody else's: well beyond a delivery and a blip of the database."""
ATTEMPTS = 34
"""About a day of tries: with full jitter between 0 and 10, 20, 40 ... 7200 seconds."""
BACKOFF_BASE_S = 5.0
BACKOFF_CAP_S = 7200.0
GONE = 410
"""The one answer that says never to come again."""
LONGEST_URL = 2000

_STATUS = re.compile(rb"HTTP/1\.[01] ([1-9]\d\d)[ \r\n]")
_HOST = re.compile(r"(\w+://)(?:[^/?#]*@)?([^/?#]*)")


@dataclass(frozen=True, slots=True)
class NotDelivered:
    """The receiver did not accept the event."""

    why: str
    """In words that hold no address."""
    final: bool = False


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
    """Delivers due events, one a receiver at a time. Several may run: an event is one's."""

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
        """Deliver until `stop` is set, whatever goes wrong: each trouble is logged once, and a
        database that is away is waited for."""
        trouble = ""
        while not stop.is_set():
            try:
                while not stop.is_set() and self.step():
                    pass
                trouble = ""
            except Exception as error:
                before, trouble = trouble, f"{type(error).__name__}: {error}"
                if trouble != before and isinstance(error, DatabaseError):
                    log.warning("webhooks wait: %s", error)
                elif trouble != before:
                    log.exception("webhooks go on after what was not foreseen")
            stop.wait(LOOK_S)

    def step(self) -> bool:
        """Try to deliver the events that have been due longest, one a receiver and all at once;
        False where none is due. Takes `DEADLINE_S` at most, unless the name service takes longer to
        give up on a name."""
        events = take_events(self._engine, HOLD_S, AT_ONCE)
        if not events:
            return False
        for event, outcome in zip(events, asyncio.run(self._deliver_all(events)), strict=True):
            with logs.about(job=event.job_id):
                self._tried(event, outcome)
        return True

    def _tried(self, event: Event, outcome: NotDelivered | None) -> None:
        if outcome is None:
            with_retries(partial(delivered, self._engine, event.id), deadline_s=HOLD_S / 2)
            log.info("%s was told of its end", _shown(event.url))
            return
        why = outcome.why
        if outcome.final or event.attempts >= ATTEMPTS:
            with_retries(lambda: give_up(self._engine, event.id, why))
            log.error(
                "%s is not told of its end, given up after %d attempts: %s",
                *(_shown(event.url), event.attempts, why),
            )
            return
        longest_s = min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2.0**event.attempts)
        delay_s = self._uniform(0, longest_s)
        with_retries(lambda: put_off(self._engine, event.id, delay_s, why))
        log.warning(
            "%s was not told of its end, again in %.0f s: %s", _shown(event.url), delay_s, why
        )

    async def _deliver_all(self, events: Sequence[Event]) -> list[NotDelivered | None]:
        return await asyncio.gather(*map(self._deliver, events))

    async def _deliver(self, event: Event) -> NotDelivered | None:
        """Post the event; None if the receiver says 2xx in time, else what it did instead."""
        try:
            body = event.body.encode()
            headers = {"Content-Type": "application/json", "Nightreel-Event-Id": event.id}
            if self._secret is not None:
                headers["Nightreel-Signature"] = signature(self._secret, int(time.time()), body)
            async with asyncio.timeout(DEADLINE_S):
                status = await _post(event.url, body, headers)
        except TimeoutError:
            return NotDelivered(f"no answer within {DEADLINE_S:g} s")
        except ssl.SSLError:
            return NotDelivered("TLS failed")
        except OSError:
            return NotDelivered("connection refused, reset or name unknown")
        except Exception as error:  # noqa: BLE001 - one event must not hold up the others
            return NotDelivered(f"the request failed ({type(error).__name__})")
        if 200 <= status < 300:
            return None
        return NotDelivered(f"it answers {status}", final=status == GONE)


async def _post(url: str, body: bytes, headers: Mapping[str, str]) -> int:
    """The status of the answer, whose rest is not read. Raises OSError, and ValueError where the
    address cannot be one or the answer is not HTTP."""
    check_url(url)
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    query = f"?{parts.query}" if parts.query else ""
    reader, writer = await asyncio.open_connection(
        parts.hostname,
        parts.port or (443 if secure else 80),
        ssl=secure or None,
        happy_eyeballs_delay=SECOND_ADDRESS_S,
    )
    try:
        lines = [
            f"POST {parts.path or '/'}{query} HTTP/1.1",
            f"Host: {parts.netloc}",
            "User-Agent: nightreel",
            "Connection: close",
            f"Content-Length: {len(body)}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        writer.write("".join(f"{line}\r\n" for line in [*lines, ""]).encode() + body)
        await writer.drain()
        return await _status(reader)
    finally:
        writer.transport.abort()


async def _status(reader: asyncio.StreamReader) -> int:
    """The status of an answer, interim ones (1xx) passed over."""
    while line := await reader.readline():
        said = _STATUS.match(line)
        if said is None:
            raise ValueError("that is not HTTP")
        if (status := int(said[1])) >= 200:
            return status
        while (await reader.readline()).strip():
            pass
    raise ConnectionResetError("the connection ended before an answer")


def _shown(url: str) -> str:
    parts = _HOST.match(url)
    return "".join(parts.groups()) if parts else "an address that cannot be one"
