"""What the processes on one queue tell each other through its Redis: hints, never results.

A limit that all keep together, how an endpoint is doing, whose turn it is to ask what all want to
know. Where Redis is away each question is answered by None, at once and for some seconds without
asking again, and whoever asked goes on alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import parse_qs, urlsplit

import redis
from redis.backoff import NoBackoff
from redis.commands.core import Script
from redis.exceptions import LockError, RedisError, ResponseError
from redis.retry import Retry

log = logging.getLogger(__name__)

PREFIX = "nightreel:"
TIMEOUT_S = 2.0
REST_S = 5.0
"""How long a Redis that failed is not asked."""
TURN_S = 9.0
"""How long a turn is held unless its holder asks for more, as a live one does every third of it."""
LONGEST_TURN_S = 60.0
"""How long others wait for one that holds the turn; it may hang."""
ROOM_S = 60
"""How long what was written to see whether there is room stays."""


def require_room(client: redis.Redis) -> None:
    """Return where Redis takes what is written; raise its answer, a ResponseError, where it is
    full, read-only or cannot persist. One that is full still answers whoever reads."""
    # Refused as any write is, and where the key stands it writes nothing.
    client.set(f"{PREFIX}room", 1, ex=ROOM_S, nx=True)


def redis_url(broker_url: str) -> str:
    """The broker's address in the words of redis-py: kombu calls a socket `redis+socket://`."""
    parts = urlsplit(broker_url)
    if parts.scheme != "redis+socket":
        return broker_url
    database = parse_qs(parts.query).get("virtual_host", ["0"])[0].strip("/")
    return f"unix://{parts.netloc}{parts.path}?db={database or 0}"


class Shared:
    """One process's view of what is shared. Threads may use it together; make it after any fork.

    `broker_url` None, or an address that redis-py does not know, shares nothing.
    """

    def __init__(
        self,
        broker_url: str | None = None,
        queue: str = "",
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.queue = queue
        self._clock = clock
        self._rest_until = 0.0
        self._away = False
        self._scripts: dict[str, Script] = {}
        self._redis = None if broker_url is None else _client(broker_url)

    def close(self) -> None:
        """End the connections that are kept open."""
        if self._redis is not None:
            self._redis.close()

    def run(self, script: str, keys: Sequence[str], arguments: Sequence[str | float]) -> Any:
        """Return what the Lua `script` returns, run as one step; None where Redis is away. Keys are
        prefixed."""
        return self._ask(lambda client: self._script(client, script)(self._named(keys), arguments))

    def waiting(self) -> int | None:
        """Messages in the queue that no worker has taken; None where Redis is away or refuses."""

        def ask(client: redis.Redis) -> Any:
            require_room(client)
            return client.llen(self.queue)

        length: int | None = self._ask(ask)
        return length

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """Be the only process within, as far as Redis helps: what is done here twice is only done
        in vain."""
        lock = self._ask(
            lambda client: client.lock(
                f"{PREFIX}turn:{name}",
                timeout=TURN_S,
                blocking_timeout=LONGEST_TURN_S,
                thread_local=False,
            )
        )
        held = lock is not None and self._ask(lambda _: lock.acquire())
        if not held:
            yield
            return
        done = threading.Event()

        def keep() -> None:
            # Until a turn has lasted its longest: whoever holds it may hang.
            for _ in range(int(LONGEST_TURN_S / TURN_S) * 3):
                if done.wait(TURN_S / 3):
                    return
                with suppress(LockError, RedisError, OSError):
                    lock.extend(TURN_S, replace_ttl=True)

        keeping = threading.Thread(target=keep, name="turn", daemon=True)
        keeping.start()
        try:
            yield
        finally:
            done.set()
            keeping.join()
            # It may have taken longer than a turn may, or Redis may be gone.
            with suppress(LockError, RedisError, OSError):
                lock.release()

    def _named(self, keys: Sequence[str]) -> list[str]:
        return [PREFIX + key for key in keys]

    def _script(self, client: redis.Redis, text: str) -> Script:
        if text not in self._scripts:
            self._scripts[text] = client.register_script(text)
        return self._scripts[text]

    def _ask(self, question: Callable[[redis.Redis], Any]) -> Any:
        if self._redis is None or self._clock() < self._rest_until:
            return None
        try:
            if self._away:
                require_room(self._redis)
            answer = question(self._redis)
        except (RedisError, OSError) as error:
            self._rest_until = self._clock() + REST_S
            if not self._away:
                self._away = True
                why = str(error) if isinstance(error, ResponseError) else type(error).__name__
                log.warning("Redis is away (%s): this process keeps its limits alone", why)
            return None
        if self._away:
            self._away = False
            log.info("Redis is back: limits are shared again")
        return answer


def _client(broker_url: str) -> redis.Redis | None:
    try:
        return redis.Redis.from_url(
            redis_url(broker_url),
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
    except ValueError:
        log.warning("limits are not shared: the queue is no single Redis")
        return None
