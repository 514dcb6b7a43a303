"""Answers requests out of one engine: reads pictures, batches, remembers texts, compares."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from clipserver.batching import Batcher
from clipserver.contract import CompareRequest, Picture, Refusal, Side
from clipserver.engines import Engine, TextTooLongError
from clipserver.metrics import Metrics
from clipserver.pictures import PictureReader
from clipserver.settings import Settings

Vectors = NDArray[np.float32]
T = TypeVar("T")

_TEXTS_AT_ONCE = 32  # so that a request of thousands of texts lets pictures through
_TEXTS_HELD = 10_000
_TEXT_CHARACTERS = 4096  # far more than any engine's tokens hold; counting tokens takes its time


class Service:
    """One engine, shared by all requests. Its methods run on the event loop, inside `running`."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        description = engine.description
        self.engine = engine
        self.ready = False
        # One thread for the engine: it has threads of its own, and two calls at once would only
        # fight over the cores.
        self._engine_thread = ThreadPoolExecutor(1, "engine")
        self._readers = ThreadPoolExecutor(settings.server_threads + 1, "reader")
        self._reader = PictureReader(
            description.input_size,
            max_pixels=int(settings.server_max_megapixels * 1e6),
            max_bytes=int(settings.server_max_body_mb * 1e6),
            allow_url=settings.server_allow_url,
        )
        self.metrics = Metrics(description.engine, description.model, self._held)
        self._pictures: Batcher[NDArray[np.uint8]] = Batcher(
            lambda pictures: engine.embed_images(np.stack(pictures)),
            self._engine_thread,
            max_batch=settings.server_max_batch,
            max_delay_s=settings.server_max_delay_ms / 1000,
            capacity=settings.server_max_queue,
            on_batch=lambda size: self.metrics.embedded("image", size),
        )
        self._texts: Batcher[str] = Batcher(
            engine.embed_texts,
            self._engine_thread,
            max_batch=_TEXTS_AT_ONCE,
            max_delay_s=settings.server_max_delay_ms / 1000,
            capacity=_TEXTS_HELD,
            on_batch=lambda size: self.metrics.embedded("text", size),
        )
        self._known: OrderedDict[str, Vectors] = OrderedDict()
        self._known_limit = settings.server_text_cache

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Batches are served while this is entered."""
        tasks = [asyncio.create_task(batcher.run()) for batcher in (self._pictures, self._texts)]
        self.ready = True
        try:
            yield
        finally:
            self.ready = False
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # Nobody waits any more for what is queued; what is being computed ends by itself.
            for threads in (self._readers, self._engine_thread):
                threads.shutdown(wait=False, cancel_futures=True)

    async def embed_pictures(self, pictures: Sequence[Picture | str]) -> Vectors:
        """One row for each picture. Refusal where one of them cannot be used."""
        if not pictures:
            return np.empty((0, self.engine.dimension), np.float32)
        loop = asyncio.get_running_loop()
        allowance = self._reader.allowance(len(pictures))
        with self._pictures.admit(len(pictures)) as admission:
            squares = await _all(
                loop.run_in_executor(self._readers, self._reader.read, p, allowance)
                for p in pictures
            )
            return np.stack(await admission.vectors(squares))

    async def embed_texts(self, texts: Sequence[str]) -> Vectors:
        """One row for each text. Refusal where one of them is too long."""
        found = {text: self._known[text] for text in dict.fromkeys(texts) if text in self._known}
        for text in found:
            self._known.move_to_end(text)
        self.metrics.text_cache_hits += len(found)
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        if missing:
            with self._texts.admit(len(missing)) as admission:
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self._readers, self._check, missing)
                found |= dict(zip(missing, await admission.vectors(missing), strict=True))
            self._known |= {text: found[text] for text in missing}
            while len(self._known) > self._known_limit:
                self._known.popitem(last=False)
        if not texts:
            return np.empty((0, self.engine.dimension), np.float32)
        return np.stack([found[text] for text in texts])

    async def compare(self, request: CompareRequest) -> tuple[list[str] | None, Vectors]:
        """The prompts' names, if they have any, and the subject's cosine with each prompt."""
        names, prompts = request.prompts()
        subject, others = await _all(
            [
                self._embed(request.subject_type, [request.subject]),
                self._embed(request.prompt_type, prompts),
            ]
        )
        return names, cosines(subject[0], others)

    def forget(self) -> None:
        """Drop the remembered texts."""
        self._known.clear()

    async def _embed(self, kind: str, sides: Sequence[Side]) -> Vectors:
        if kind == "image":
            return await self.embed_pictures(sides)
        texts = [side for side in sides if isinstance(side, str)]
        if len(texts) != len(sides):
            raise Refusal(400, "A picture was sent where the request says text.")
        return await self.embed_texts(texts)

    def _check(self, texts: Sequence[str]) -> None:
        for text in texts:
            if len(text) > _TEXT_CHARACTERS:
                raise Refusal(
                    400,
                    f"Text too long: a text has {len(text)} characters where at most "
                    f"{_TEXT_CHARACTERS} are taken.",
                )
            try:
                self.engine.check_text(text)
            except TextTooLongError as error:
                raise Refusal(400, f"Text too long: {error}.") from error

    def _held(self) -> dict[str, int]:
        return {"image": self._pictures.held, "text": self._texts.held}


def cosines(vector: Vectors, others: Vectors) -> Vectors:
    """The cosine of `vector` (D) with each row of `others` (N x D); 0 where one has no length."""
    lengths = np.linalg.norm(others, axis=1) * np.linalg.norm(vector)
    return (others @ vector / np.where(lengths > 0, lengths, math.inf)).astype(np.float32)


async def _all(awaitables: Iterable[Awaitable[T]]) -> list[T]:
    """The results, once all have ended: an error does not leave the others running."""
    results = await asyncio.gather(*awaitables, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return cast(list[T], results)
