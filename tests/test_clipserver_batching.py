"""Concurrent requests brought together, and refused where there is no room."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import requests
from clip_home import served_here
from numpy.typing import NDArray
from PIL import Image
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from clipserver.batching import Batcher
from clipserver.contract import Busy
from clipserver.edge import Edge
from clipserver.engines import Description
from clipserver.settings import Settings


class Recorder:
    """Embeds numbers as themselves, remembers its batches, and waits while it is told to."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.entered = threading.Event()
        self.go = threading.Event()
        self.go.set()

    def embed(self, items: list[int]) -> NDArray[np.float32]:
        self.batches.append(items)
        self.entered.set()
        assert self.go.wait(30)
        if 13 in items:
            raise RuntimeError("thirteen")
        return np.array(items, np.float32)[:, None]


def batched(
    recorder: Recorder,
    scenario: Callable[[Batcher[int]], object],
    *,
    max_batch: int = 4,
    max_delay_s: float = 30,
    capacity: int = 8,
) -> None:
    """Run a coroutine function against a running batcher. A delay of 30 s, so that a batch that
    waits for nobody shows as a test that hangs."""

    async def main() -> None:
        with ThreadPoolExecutor(1) as thread:
            batcher: Batcher[int] = Batcher(
                recorder.embed, thread, max_batch=max_batch, max_delay_s=max_delay_s,
                capacity=capacity, on_batch=lambda size: None,
            )  # fmt: skip
            serving = asyncio.create_task(batcher.run())
            try:
                await scenario(batcher)  # type: ignore[misc]
            finally:
                serving.cancel()

    asyncio.run(asyncio.wait_for(main(), 10))


async def embedded(batcher: Batcher[int], items: Sequence[int]) -> list[float]:
    with batcher.admit(len(items)) as admission:
        return [float(vector[0]) for vector in await admission.vectors(items)]


def test_requests_that_are_on_their_way_share_a_batch() -> None:
    """Items of several requests go to the engine at once, and come back to their owners."""
    recorder = Recorder()

    async def scenario(batcher: Batcher[int]) -> None:
        with batcher.admit(1) as first, batcher.admit(2) as second:
            one = asyncio.create_task(first.vectors([1]))
            await asyncio.sleep(0)
            two = asyncio.create_task(second.vectors([2, 3]))
            assert [float(v[0]) for v in await one] == [1]
            assert [float(v[0]) for v in await two] == [2, 3]

    batched(recorder, scenario)
    assert recorder.batches == [[1, 2, 3]]


def test_a_lone_request_waits_for_nobody() -> None:
    """With no other request on its way a batch starts at once, whatever the delay."""
    recorder = Recorder()

    async def scenario(batcher: Batcher[int]) -> None:
        assert await embedded(batcher, [1]) == [1]
        # One that fails while it is prepared keeps nobody waiting either.
        with pytest.raises(ValueError, match="unreadable"), batcher.admit(1):
            raise ValueError("unreadable")
        assert await embedded(batcher, [2]) == [2]
        assert batcher.held == 0

    batched(recorder, scenario)


def test_a_slow_arrival_is_waited_for_no_longer_than_the_delay() -> None:
    """A request still being prepared holds the others up for the delay at most."""
    recorder = Recorder()

    async def scenario(batcher: Batcher[int]) -> None:
        with batcher.admit(1):
            assert await embedded(batcher, [1]) == [1]

    batched(recorder, scenario, max_delay_s=0.01)


def test_a_batch_is_never_larger_than_allowed() -> None:
    """Ten items of one request are embedded in batches of at most four, in order."""
    recorder = Recorder()

    async def scenario(batcher: Batcher[int]) -> None:
        assert await embedded(batcher, range(10)) == list(range(10))

    batched(recorder, scenario)
    assert [len(batch) for batch in recorder.batches] == [4, 4, 2]


def test_what_finds_no_room_is_refused_and_room_comes_back() -> None:
    """Past its capacity the batcher raises Busy; a request larger than it is served alone."""
    recorder = Recorder()
    recorder.go.clear()

    async def scenario(batcher: Batcher[int]) -> None:
        held = asyncio.create_task(embedded(batcher, range(7)))
        await asyncio.to_thread(recorder.entered.wait, 10)
        with pytest.raises(Busy):
            await embedded(batcher, [8, 9])
        recorder.go.set()
        await held
        assert await embedded(batcher, range(20, 40)) == list(range(20, 40))

    batched(recorder, scenario)


def test_an_engines_error_reaches_its_batch_alone() -> None:
    """Who shared the batch gets the error; who comes after is served."""
    recorder = Recorder()

    async def scenario(batcher: Batcher[int]) -> None:
        with pytest.raises(RuntimeError, match="thirteen"):
            await embedded(batcher, [12, 13])
        assert await embedded(batcher, [14]) == [14]

    batched(recorder, scenario)


class GatedEngine:
    """An engine that embeds no picture until its gate is opened, and never a text."""

    description = Description("clip", "gated@1", 8, None)
    dimension = 2

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.gate = threading.Event()

    def embed_images(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        self.entered.set()
        assert self.gate.wait(30)
        return np.ones((len(pictures), 2), np.float32)

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        raise RuntimeError("what only the log may say")

    def check_text(self, text: str) -> None:
        pass


@pytest.fixture
def gated() -> Iterator[tuple[GatedEngine, str]]:
    engine = GatedEngine()
    with served_here(engine, Settings(server_max_queue=4, server_max_batch=2)) as url:
        yield engine, url
        engine.gate.set()


def test_a_busy_server_says_when_to_come_again(gated: tuple[GatedEngine, str]) -> None:
    """With the queue full the answer is 503 with Retry-After, at once; the queued one is served."""
    engine, url = gated
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    picture = {"type": "base64", "value": base64.b64encode(buffer.getvalue()).decode()}

    def ask() -> requests.Response:
        return requests.post(f"{url}/clip/embed_image", json={"image": [picture] * 3}, timeout=30)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask)
        assert engine.entered.wait(30)
        refused = ask()
        assert refused.status_code == 503
        assert refused.headers["Retry-After"] == "1"
        assert refused.json()["message"]
        assert requests.get(f"{url}/healthz", timeout=30).status_code == 200
        assert 'held{kind="image"} 3' in requests.get(f"{url}/metrics", timeout=30).text
        engine.gate.set()
        assert len(first.result().json()["embeddings"]) == 3
    assert ask().status_code == 200


@pytest.mark.expects_error_log("Exception in ASGI application")
def test_a_fault_of_the_engine_is_an_internal_error(gated: tuple[GatedEngine, str]) -> None:
    """The answer is 500 and says nothing of the cause; the server goes on."""
    _, url = gated
    answer = requests.post(f"{url}/clip/embed_text", json={"text": "dog"}, timeout=30)
    assert answer.status_code == 500
    assert answer.json() == {"message": "Internal error."}
    assert requests.get(f"{url}/readiness", timeout=30).status_code == 200


@pytest.mark.expects_error_log("timeout graceful shutdown exceeded")
def test_who_is_cut_off_at_the_end_may_ask_again() -> None:
    """A request that outlasts the server's grace gets 503 with Retry-After, and nothing but the
    server's own word of it is logged; the end does not wait for what is being computed."""
    engine = GatedEngine()
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    picture = {"type": "base64", "value": base64.b64encode(buffer.getvalue()).decode()}
    with ThreadPoolExecutor(1) as pool:
        try:
            with served_here(engine, Settings(), grace_s=1) as url:
                asking = pool.submit(
                    requests.post, f"{url}/clip/embed_image", json={"image": picture}, timeout=30
                )
                assert engine.entered.wait(30)
            answer = asking.result()
        finally:
            engine.gate.set()
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "1"
    assert answer.json()["message"]


class CountingEngine:
    """Counts the texts that it is given; all of them mean the same."""

    description = Description("clip", "counting@1", 8, None)
    dimension = 2

    def __init__(self) -> None:
        self.texts: list[str] = []

    def embed_images(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.ones((len(pictures), 2), np.float32)

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        self.texts += texts
        return np.ones((len(texts), 2), np.float32)

    def check_text(self, text: str) -> None:
        pass


def test_the_texts_asked_for_last_are_remembered() -> None:
    """Of more texts than the cache holds the one unused for longest is embedded again, and clearing
    forgets them all."""
    engine = CountingEngine()
    with served_here(engine, Settings(server_text_cache=2)) as url:

        def embedded(*texts: str) -> list[str]:
            """What the engine was given for a request of these."""
            engine.texts.clear()
            answer = requests.post(f"{url}/clip/embed_text", json={"text": texts}, timeout=30)
            assert len(answer.json()["embeddings"]) == len(texts)
            return list(engine.texts)

        assert embedded("a", "b", "a") == ["a", "b"]
        assert embedded("a", "b") == []
        assert embedded("a") == []
        assert embedded("c") == ["c"]  # and b, unused for longest, is forgotten
        assert embedded("a", "c") == []
        assert embedded("b") == ["b"]
        assert requests.post(f"{url}/model/clear", timeout=30).status_code == 200
        assert embedded("b") == ["b"]


def test_more_requests_than_there_is_memory_for_are_refused() -> None:
    """256 are taken in at once. The next that would send a body gets 503 with Retry-After, health
    is still answered, and one that ends makes room."""

    async def main() -> None:
        entered, go = 0, asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            nonlocal entered
            if scope["method"] == "POST":
                entered += 1
                await go.wait()
            await Response()(scope, receive, send)

        edge = Edge(app, {}, lambda route, status, seconds: None)

        async def ask(method: str) -> tuple[int, dict[bytes, bytes]]:
            said: list[Message] = []

            async def receive() -> Message:
                raise AssertionError("nothing is read here")

            async def send(message: Message) -> None:
                said.append(message)

            await edge({"type": "http", "method": method, "path": "/"}, receive, send)
            return said[0]["status"], dict(said[0]["headers"])

        held = [asyncio.create_task(ask("POST")) for _ in range(256)]
        while entered < 256:
            await asyncio.sleep(0)
        status, headers = await ask("POST")
        assert entered == 256
        assert (status, headers[b"retry-after"]) == (503, b"1")
        assert (await ask("GET"))[0] == 200
        go.set()
        assert {status for status, _ in await asyncio.gather(*held)} == {200}
        assert (await ask("POST"))[0] == 200

    asyncio.run(asyncio.wait_for(main(), 30))


SERVE = """
import sys
sys.path.insert(0, sys.argv[1])
from test_clipserver_batching import CountingEngine
from clipserver.engines.choice import Choice
from clipserver.serve import serve
from clipserver.settings import Settings

class Loud(CountingEngine):
    def embed_images(self, pictures):
        print("picture", flush=True)
        return super().embed_images(pictures)

    def embed_texts(self, texts):
        print("text", flush=True)
        return super().embed_texts(texts)

serve(Choice(Loud.description, lambda threads: Loud()), Settings(server_port=0), None)
"""


def test_the_first_request_finds_a_warm_engine() -> None:
    """Before the server says that it is ready, a picture and a text have been embedded."""
    command = [sys.executable, "-c", SERVE, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        said = [server.stdout.readline().strip()]
        while said[-1] in {"picture", "text"}:
            said.append(server.stdout.readline().strip())
        server.terminate()
    assert said[:-1] == ["picture", "text"]
    assert json.loads(said[-1])["model"] == "counting@1"
