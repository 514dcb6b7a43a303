"""How fast an endpoint is asked: by one process, by all together, and not at all while it is away.

`Concurrency` is a process's own. `RateLimit` and `Breaker` are kept in Redis, by its clock, for all
processes that ask the same endpoint. Where Redis is away, a process keeps to its share of the rate
and its breaker stays closed, since no new task can reach it then.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from workers.shared import Shared

log = logging.getLogger(__name__)

Clock = Callable[[], float]


class Concurrency:
    """How many requests a process has under way: additive increase, multiplicative decrease.

    One more after each round of answers without trouble, up to `most`; half as many after a refusal
    for want of capacity, or once answers take more than twice as long as they did on average.
    """

    FAST, SLOW = 0.3, 0.01
    """Weights of the newest answer in the mean of late and in the mean of long."""
    SLACK_S = 0.02
    """Answers of a few milliseconds double by chance."""

    def __init__(self, most: int, *, clock: Clock = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._allowed = 1.0
        self._running = 0
        self._cut_at = -math.inf
        self._of_late_s: float | None = None
        self._of_long_s = 0.0
        self._lock = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()

    @property
    def limit(self) -> int:
        """Requests that may be under way now."""
        return int(self._allowed)

    def begin(self) -> float:
        """Wait until a request may begin, first come first served; return the moment, for `end`."""
        with self._lock:
            if self._running < self.limit and not self._waiting:
                self._running += 1
                return self._clock()
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        try:
            turn.acquire()
        except BaseException:  # a signal's, such as the end of a task's time
            with self._lock:
                if turn in self._waiting:
                    self._waiting.remove(turn)
                else:
                    self._running -= 1
                    self._give_turns()
            raise
        return self._clock()

    def end(self, began: float, *, refused: bool) -> None:
        """Take note of an answer, or of the lack of one; `refused` is one for want of capacity."""
        with self._lock:
            self._running -= 1
            now = self._clock()
            slower = self._slower(now - began)
            # Those that were under way when it was halved say nothing about the half.
            if (refused or slower) and began >= self._cut_at:
                self._allowed = max(1.0, self.limit / 2)
                self._cut_at = now
            elif not refused:
                self._allowed = min(float(self._most), self._allowed + 1 / self.limit)
            self._give_turns()

    def _give_turns(self) -> None:
        """Count those that may begin as running before they wake: one that comes just then would
        overtake them, and the answers that it overtakes are waited for."""
        while self._waiting and self._running < self.limit:
            self._running += 1
            self._waiting.popleft().release()

    def _slower(self, latency_s: float) -> bool:
        if self._of_late_s is None:
            self._of_late_s = self._of_long_s = latency_s
        self._of_late_s += self.FAST * (latency_s - self._of_late_s)
        self._of_long_s += self.SLOW * (latency_s - self._of_long_s)
        return self._of_late_s > 2 * self._of_long_s + self.SLACK_S


_NOW = """
local now = tonumber(ARGV[1])
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000000 + time[2]
end
"""
"""Microseconds by Redis's clock, unless a test has a faster one. A script that asks for the time
replicates its effects, so this is safe to write with."""

_TAKE = (
    _NOW
    + """
local rate, burst = tonumber(ARGV[2]) / 1000000, tonumber(ARGV[3])
local held = redis.call('HMGET', KEYS[1], 'tokens', 'at')
local tokens, at = tonumber(held[1]) or burst, tonumber(held[2]) or now
tokens = math.min(burst, tokens + math.max(0, now - at) * rate) - 1
local wait = math.max(0, math.ceil(-tokens / rate))
redis.call('HSET', KEYS[1], 'tokens', string.format('%.6f', tokens),
           'at', string.format('%.0f', now))
redis.call('PEXPIRE', KEYS[1], 60000 + math.ceil(wait / 1000))
redis.call('ZADD', KEYS[2], now, ARGV[4])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - 60000000)
redis.call('PEXPIRE', KEYS[2], 60000)
return {wait, redis.call('ZCARD', KEYS[2])}
"""
)


class RateLimit:
    """At most `rate` requests a second over all processes: a token bucket that may be overdrawn, so
    that whoever takes a token knows how long to wait for it, and waits in line."""

    BURST_S = 0.1
    """How much of an idle time may be made up for."""

    def __init__(
        self, shared: Shared, endpoint: str, rate: float, *, clock: Clock | None = None
    ) -> None:
        """`clock` in seconds replaces Redis's own, for tests."""
        name = f"rate:{endpoint_id(endpoint)}"
        self._keys = [name, f"{name}:by"]
        self._shared = shared
        self._rate = rate
        self._clock = clock
        self._me = f"{os.uname().nodename}/{os.getpid()}"
        self._sharers = os.cpu_count() or 1
        self._alone = threading.Lock()
        self._next_s = 0.0

    def wait_s(self) -> float:
        """Take a token; return how many seconds to wait before making use of it."""
        burst = max(1.0, self._rate * self.BURST_S)
        arguments = [_now_us(self._clock), self._rate, burst, self._me]
        answer = self._shared.run(_TAKE, self._keys, arguments)
        if answer is None:
            return self._wait_alone_s()
        wait_us, self._sharers = answer
        return float(wait_us) / 1e6

    def _wait_alone_s(self) -> float:
        """This process's even share, by what was last known of the others."""
        with self._alone:
            now = (self._clock or time.monotonic)()
            at = max(now, self._next_s)
            self._next_s = at + self._sharers / self._rate
            return at - now


_ADMIT = (
    _NOW
    + """
local open_until = tonumber(redis.call('HGET', KEYS[1], 'open_until'))
if not open_until then
  return {0, redis.call('EXISTS', KEYS[1]), 0}
end
if now < open_until then
  return {open_until - now, 1, 0}
end
local probe_until = tonumber(redis.call('HGET', KEYS[1], 'probe_until'))
if probe_until and now < probe_until then
  return {math.min(probe_until - now, 1000000), 1, 0}
end
probe_until = string.format('%.0f', now + ARGV[2])
redis.call('HSET', KEYS[1], 'probe_until', probe_until)
redis.call('ZADD', KEYS[2], probe_until, KEYS[1])
return {0, 1, probe_until}
"""
)
_UNDECIDED = """
if redis.call('HGET', KEYS[1], 'probe_until') == ARGV[1] then
  redis.call('HDEL', KEYS[1], 'probe_until')
  redis.call('ZREM', KEYS[2], KEYS[1])
end
"""
_SUCCEEDED = """
local was_open = redis.call('HEXISTS', KEYS[1], 'open_until')
redis.call('DEL', KEYS[1])
redis.call('ZREM', KEYS[2], KEYS[1])
return was_open
"""
_FAILED = (
    _NOW
    + """
local open_until = tonumber(redis.call('HGET', KEYS[1], 'open_until'))
if open_until and now < open_until then
  return 0
end
local failures = redis.call('HINCRBY', KEYS[1], 'failures', 1)
redis.call('HSETNX', KEYS[1], 'since', string.format('%.0f', now))
redis.call('PEXPIRE', KEYS[1], 3600000)
local since = tonumber(redis.call('HGET', KEYS[1], 'since'))
if not open_until and (failures < tonumber(ARGV[2]) or now - since < tonumber(ARGV[3])) then
  return 0
end
local trips = redis.call('HINCRBY', KEYS[1], 'trips', 1)
local rest = math.min(ARGV[5], math.max(ARGV[4] * 2 ^ (trips - 1), tonumber(ARGV[6])))
local rest_until = string.format('%.0f', now + rest)
redis.call('HSET', KEYS[1], 'open_until', rest_until)
redis.call('HDEL', KEYS[1], 'probe_until')
redis.call('ZADD', KEYS[2], rest_until, KEYS[1])
redis.call('PEXPIRE', KEYS[2], 3600000)
return open_until and 0 or 1
"""
)
_RESTING = (
    _NOW
    + """
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
return redis.call('ZCARD', KEYS[1])
"""
)


class EndpointRests(Exception):
    """No call goes to the endpoint before `wait_s` seconds have passed."""

    def __init__(self, wait_s: float) -> None:
        super().__init__(f"the endpoint rests for {wait_s:.1f} s")
        self.wait_s = wait_s


class Breaker:
    """Circuit breaker of one endpoint, for all processes that ask it.

    Closed, all calls go. Once `FAILURES` in a row, over `PATIENCE_S` and all processes, have found
    the endpoint away, it is open: no call goes for a while that doubles each time. Then one call
    goes and decides (half-open). One log line tells of each opening and closing, by the process
    whose call brought it about.
    """

    FAILURES = 5
    PATIENCE_S = 2.0
    """A full queue refuses many calls within a moment, between others that it answers."""
    FIRST_REST_S = 5.0
    LONGEST_REST_S = 60.0

    def __init__(
        self, shared: Shared, endpoint: str, *, probe_s: float, clock: Clock | None = None
    ) -> None:
        """`probe_s` is how long a call may take that decides; `clock` in seconds replaces Redis's
        own, for tests."""
        self._shared = shared
        self._endpoint = endpoint
        self._keys = [f"breaker:{endpoint_id(endpoint)}", _resting_key(shared)]
        self._probe_s = probe_s
        self._clock = clock
        self._troubled = False
        self._gate = threading.Lock()

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Within, one call may go, whose outcome is told by `succeeded` or `failed`, if it had
        one. Raises EndpointRests. While a call of this process decides, its others wait for the
        outcome."""
        with self._gate:
            arguments = [_now_us(self._clock), _us(self._probe_s)]
            answer = self._shared.run(_ADMIT, self._keys, arguments)
            wait_us, troubled, probe = answer or (0, 0, 0)
            self._troubled = bool(troubled)
            if wait_us:
                raise EndpointRests(wait_us / 1e6)
            if probe:
                try:
                    yield
                finally:
                    # A call that came to nothing, for want of budget say, leaves it to the next.
                    self._shared.run(_UNDECIDED, self._keys, [probe])
                return
        yield

    def succeeded(self) -> None:
        """The endpoint answered."""
        if self._troubled and self._shared.run(_SUCCEEDED, self._keys, []):
            log.warning("the API at %s answers again", self._endpoint)

    def failed(self, why: str, retry_after_s: float | None = None) -> None:
        """The endpoint was away, and said perhaps for how long."""
        arguments = [
            _now_us(self._clock),
            self.FAILURES,
            *map(_us, (self.PATIENCE_S, self.FIRST_REST_S, self.LONGEST_REST_S)),
            _us(retry_after_s or 0.0),
        ]
        if self._shared.run(_FAILED, self._keys, arguments):
            log.warning("the API at %s is given a rest: %s", self._endpoint, why)


def is_resting(shared: Shared, *, clock: Clock | None = None) -> bool:
    """Whether a breaker of this queue's workers is open: a task fed now would only come back."""
    return bool(shared.run(_RESTING, [_resting_key(shared)], [_now_us(clock)]))


def endpoint_id(endpoint: str) -> str:
    """A short name of an endpoint's address for keys."""
    return hashlib.sha256(endpoint.encode()).hexdigest()[:16]


def _resting_key(shared: Shared) -> str:
    return f"resting:{shared.queue}"


def _now_us(clock: Clock | None) -> int | str:
    return "" if clock is None else _us(clock())


def _us(seconds: float) -> int:
    return round(seconds * 1e6)
