"""Brings concurrent requests together: what arrives within a few milliseconds goes to the engine at
once, and what is more than the server can hold is refused instead of queued without end."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from clipserver.contract import Busy

Item = TypeVar("Item")
Vectors = NDArray[np.float32]


class Batcher(Generic[Item]):
    """Turns items into vectors, several callers' items at a time.

    `embed` runs in `executor`, one call after the other, on at most `max_batch` items. The first
    item of a batch waits for others at most `max_delay_s`, and only while some are on their way.
    At most `capacity` items are held, except that one request alone may be of any size.
    """

    def __init__(
        self,
        embed: Callable[[list[Item]], Vectors],
        executor: Executor,
        *,
        max_batch: int,
        max_delay_s: float,
        capacity: int,
        on_batch: Callable[[int], None],
    ) -> None:
        self._embed = embed
        self._executor = executor
        self._max_batch = max_batch
        self._max_delay_s = max_delay_s
        self._capacity = capacity
        self._on_batch = on_batch
        self._held = 0
        self._coming = 0
        self._waiting: deque[tuple[Item, asyncio.Future[Vectors]]] = deque()
        self._changed = asyncio.Event()

    @property
    def held(self) -> int:
        """Items admitted and not yet answered."""
        return self._held

    @contextmanager
    def admit(self, count: int) -> Iterator[Admission[Item]]:
        """Room for `count` items, to be prepared and then embedded. Busy where there is none."""
        if self._held and self._held + count > self._capacity:
            raise Busy
        self._held += count
        self._coming += count
        admission = Admission(self, count)
        try:
            yield admission
        finally:
            admission.arrive()
            self._held -= count

    async def run(self) -> None:
        """Serve until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._next_batch()
            self._on_batch(len(batch))
            items = [item for item, _ in batch]
            try:
                vectors = await loop.run_in_executor(self._executor, self._embed, items)
            # Every caller of the batch gets the engine's error as its own; serving goes on.
            except Exception as error:  # noqa: BLE001
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
            else:
                for (_, future), vector in zip(batch, vectors, strict=True):
                    if not future.done():
                        future.set_result(vector)

    async def _next_batch(self) -> list[tuple[Item, asyncio.Future[Vectors]]]:
        await self._until(lambda: bool(self._waiting))
        try:
            async with asyncio.timeout(self._max_delay_s):
                await self._until(lambda: not self._coming or len(self._waiting) >= self._max_batch)
        except TimeoutError:
            pass
        return [self._waiting.popleft() for _ in range(min(self._max_batch, len(self._waiting)))]

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self._changed.clear()
            await self._changed.wait()

    def _enqueue(self, item: Item) -> asyncio.Future[Vectors]:
        future: asyncio.Future[Vectors] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        return future

    def _arrived(self, count: int) -> None:
        self._coming -= count
        self._changed.set()


class Admission(Generic[Item]):
    """Room that a request holds in a batcher."""

    def __init__(self, batcher: Batcher[Item], count: int) -> None:
        self._batcher = batcher
        self._coming = count

    async def vectors(self, items: Sequence[Item]) -> list[Vectors]:
        """One vector for each item, in order. Raises whatever the engine raised on their batch."""
        futures = [self._batcher._enqueue(item) for item in items]
        self.arrive()
        return await asyncio.gather(*futures)

    def arrive(self) -> None:
        """Nobody need wait for this request's items any more."""
        self._batcher._arrived(self._coming)
        self._coming = 0
