"""What the API client and the API at home make of the time and the bytes they have.

    python benchmarks/api.py [CLIPS_FOLDER] [--seconds 5] [--engine auto|clip|offline]

Client: a range of ready pictures goes through the worker's own pipeline to a server, in a process
of its own, that answers each request after 100 ms. Goal: 95 % of concurrency / latency, where the
latency is what a bare socket that sends one ready request after another has of that server.
Bytes: the middle frame of each clip at 1920x1080, as the client sends it (224 pixels, eight a
request) and as the tutorial does (0.6 of the size, JPEG of quality 90, base64, one a request).
Server: one picture a request from 1, 8 and 32 clients in a process of their own, against the same
engine with the same threads called directly, in one process, on ready batches of eight. Goal: 90 %
at 8 and more. The two take turns, so that a busy machine hinders both; beside it stands what a
picture costs in processor time, reading and answering included.
Absolute numbers are the machine's; compare the ratios of one run.
"""

# ruff: noqa: PLC0415 -- the server's engine is loaded after the client has been measured
from __future__ import annotations

import argparse
import base64
import functools
import io
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import cv2
import numpy as np
import requests
from PIL import Image

from storage.records import Fit, Sampling
from workers.api import ApiClient
from workers.calls import range_calls
from workers.classify import LabelVectors, classify_range
from workers.footage.decode import DecodedSample
from workers.footage.picture import Picture, encode_jpeg, load_picture
from workers.settings import MAX_BATCH, WorkerSettings

if TYPE_CHECKING:
    from clipserver.engines import Engine
    from clipserver.engines.choice import Choice

LATENCY_S = 0.1
DIMENSION = 512
SIZE = 224
FULL_HD = (1920, 1080)
TUTORIAL_SCALE = 0.6
TUTORIAL_FPS = 30
LABELS = 5
RANGE_S = 60
TURNS = 7


# -- a server that takes its time


def slow_server(ready: Connection, stacks_lists: bool) -> None:
    """Answer every request after the latency with vectors of no meaning."""
    chance = np.random.default_rng(0)
    vectors = chance.normal(size=(MAX_BATCH, DIMENSION)).tolist()
    answers = {n: json.dumps({"embeddings": vectors[:n]}).encode() for n in range(1, MAX_BATCH + 1)}

    class Routes(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, content: bytes) -> None:
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(content)}\r\n\r\n".encode()
            self.wfile.write(head + content)

        def do_GET(self) -> None:
            self.answer(json.dumps({"model": "none", "input_size": SIZE}).encode())

        def do_POST(self) -> None:
            begun = time.monotonic()
            body = self.rfile.read(int(self.headers["Content-Length"]))
            pictures = 1 if stacks_lists else body.count(b'"base64"')
            time.sleep(max(0.0, LATENCY_S - (time.monotonic() - begun)))
            self.answer(answers[pictures])

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Routes) as http:
        ready.send(f"http://127.0.0.1:{http.server_address[1]}")
        http.serve_forever()


@contextmanager
def slowly_answering(*, stacks_lists: bool = False) -> Iterator[str]:
    """Address of such a server, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=slow_server, args=(there, stacks_lists), daemon=True)
    process.start()
    try:
        yield here.recv()
    finally:
        process.terminate()
        process.join()


def samples(pictures: list[Picture], count: int) -> Iterator[DecodedSample]:
    """So many samples, of ready pictures."""
    for n in range(count):
        yield DecodedSample(n, n, n, n, n + 1, pictures[n % len(pictures)])


def client_throughput(pictures: list[Picture], seconds: float) -> None:
    print(
        f"Client against {LATENCY_S * 1000:.0f} ms of latency (goal: 95 % of concurrency / latency)"
    )
    print("  in flight  pictures a call  latency ms   calls/s   possible   ratio   pictures/s")
    labels = LabelVectors(np.eye(LABELS, DIMENSION, dtype=np.float32))
    for stacks in (False, True):
        with slowly_answering(stacks_lists=stacks) as url:
            latency_s = bare_latency_s(url, pictures[:1] if stacks else pictures[:MAX_BATCH])
            for in_flight in (4, 8, 16):
                settings = WorkerSettings(api_url=url, api_in_flight=in_flight)
                with closing(ApiClient(settings)) as client:
                    batch = client.endpoint().batch

                    def run(calls: int, client: ApiClient = client, n: int = in_flight) -> float:
                        before, start = client.spent.image_calls, time.monotonic()
                        given = samples(pictures, calls * client.endpoint().batch)
                        classify_range(
                            given,
                            sampling=Sampling(),
                            fit=Fit.CROP,
                            client=client,
                            labels=labels,
                            top_n=LABELS,
                            in_flight=n,
                        )
                        return (client.spent.image_calls - before) / (time.monotonic() - start)

                    run(in_flight * (in_flight + 1))  # until as much is under way as may be
                    rate = run(round(2 * seconds / LATENCY_S * in_flight))
                possible = in_flight / latency_s
                print(
                    f"  {in_flight:9}  {batch:15}  {latency_s * 1000:10.1f}"
                    f"  {rate:8.1f}  {possible:9.1f}"
                    f"  {rate / possible:5.1%}  {rate * batch:11.0f}"
                )


def bare_latency_s(url: str, pictures: list[Picture]) -> float:
    """Median time that one request takes which is sent and read with no client around it."""
    address = urlsplit(url)
    values = [base64.b64encode(encode_jpeg(one)).decode() for one in pictures]
    body = json.dumps({"image": [{"type": "base64", "value": value} for value in values]}).encode()
    head = f"POST /clip/embed_image HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    took = []
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection.makefile("rb") as answer:
            for _ in range(20):
                start = time.monotonic()
                connection.sendall(head + body)
                answer.readline()
                length = int(answer.readline().split(b":")[1])
                answer.readline()
                answer.read(length)
                took.append(time.monotonic() - start)
    return statistics.median(took)


# -- bytes and calls


def frames_of(clips: Path | None) -> list[Picture]:
    """The middle frame of each clip at 1920x1080; painted ones where there are no clips."""
    found = []
    for path in sorted(clips.glob("*.mp4")) if clips is not None else ():
        with closing_capture(path) as capture:
            capture.set(cv2.CAP_PROP_POS_FRAMES, capture.get(cv2.CAP_PROP_FRAME_COUNT) // 2)
            got, frame = capture.read()
        if got:
            large = cv2.resize(frame, FULL_HD, interpolation=cv2.INTER_CUBIC)
            found.append(cv2.cvtColor(large, cv2.COLOR_BGR2RGB))
    if found:
        return found
    chance = np.random.default_rng(0)
    small = [chance.integers(0, 255, (27, 48, 3), np.uint8) for _ in range(8)]
    return [cv2.resize(one, FULL_HD, interpolation=cv2.INTER_CUBIC) for one in small]


@contextmanager
def closing_capture(path: Path) -> Iterator[cv2.VideoCapture]:
    capture = cv2.VideoCapture(str(path))
    try:
        yield capture
    finally:
        capture.release()


def squares(frames: list[Picture]) -> list[Picture]:
    """The frames as the model reads them."""
    found = []
    for frame in frames:
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "PNG", compress_level=1)
        found.append(load_picture(file.getvalue(), SIZE, Fit.CROP))
    return found


def bytes_per_frame(frames: list[Picture], pictures: list[Picture]) -> None:
    with slowly_answering() as url, closing(ApiClient(WorkerSettings(api_url=url))) as client:
        before = client.spent.bytes_sent
        for at in range(0, len(pictures), MAX_BATCH):
            client.embed_images([encode_jpeg(one) for one in pictures[at : at + MAX_BATCH]])
        ours = (client.spent.bytes_sent - before) / len(pictures)
    theirs = sum(map(tutorial_payload, frames)) / len(frames)
    print(f"\nBytes a frame, request bodies, {len(frames)} frames of 1920x1080")
    print(f"  ours {ours:,.0f}   tutorial {theirs:,.0f}   ratio 1 : {theirs / ours:.1f}")
    print(
        f"  a video hour: ours {ours * 3600 / 1e6:,.0f} MB at one frame a second, tutorial "
        f"{theirs * 3600 * TUTORIAL_FPS / 1e6:,.0f} MB at every frame of {TUTORIAL_FPS} a second"
    )


def tutorial_payload(frame: Picture) -> int:
    """Bytes of the tutorial's request body."""
    small = cv2.resize(frame, None, fx=TUTORIAL_SCALE, fy=TUTORIAL_SCALE)
    file = io.BytesIO()
    Image.fromarray(small).save(file, "JPEG", quality=90)
    value = base64.b64encode(file.getvalue()).decode()
    subject = {"type": "base64", "value": value}
    prompts = ["Winter Season", "Autumn Season", "Spring Season", "Summer Season", "something else"]
    return len(json.dumps({"subject": subject, "subject_type": "image", "prompt": prompts}))


def calls_per_video_hour() -> None:
    def calls(*, embeds: bool, batch: int, prompts: int = LABELS) -> int:
        one = range_calls(RANGE_S, embeds=embeds, batch=batch, prompts=prompts)
        return one * 3600 // RANGE_S

    tutorial = 3600 * TUTORIAL_FPS
    print("\nCalls a video hour, one frame a second in ranges of a minute")
    ways = (
        ("embed, lists of 8", calls(embeds=True, batch=MAX_BATCH)),
        ("embed, one by one", calls(embeds=True, batch=1)),
        ("compare, 5 prompts", calls(embeds=False, batch=1)),
        ("compare, 20 prompts", calls(embeds=False, batch=1, prompts=20)),
        ("tutorial loop, 30/s", tutorial),
    )
    for name, count in ways:
        print(
            f"  {name:20} {count:8,}   1 : {tutorial / count:.0f}   {count * 0.0002:8.4f} credits"
        )


# -- the API at home


def server_throughput(pictures: list[Picture], seconds: float, name: str) -> None:
    from clipserver.engines import EngineUnavailableError

    try:
        chosen, threads = engine_at_home(name)
    except EngineUnavailableError as error:
        print(f"\nServer: not measured, {error}")
        return
    side = chosen.description.input_size
    ready = np.stack([cv2.resize(one, (side, side)) for one in pictures * MAX_BATCH])[:MAX_BATCH]
    print(f"\nServer, engine {chosen.description.model}, {threads} thread(s)")
    print("  (goal: 90 % of the engine in-process at 8 and more clients)")
    bodies = [
        json.dumps(
            {"image": {"type": "base64", "value": base64.b64encode(encode_jpeg(one)).decode()}}
        ).encode()
        for one in ready
    ]
    # As the server has it; numpy's threads are counted when it is loaded.
    os.environ |= {f"{library}_NUM_THREADS": "1" for library in ("OPENBLAS", "OMP", "MKL")}
    spawn = multiprocessing.get_context("spawn")
    with served(name) as (url, pid), spawn.Pool(1) as pool, spawn.Pool(1) as engine:
        print("  clients   pictures/s   in-process   ratio   CPU ms a picture   in-process")
        for clients in (1, 8, 32):
            turns = []
            for _ in range(TURNS):
                direct, direct_ms = engine.apply(directly, (name, ready, seconds / TURNS))
                before = processor_s(pid)
                got, pictures_done = pool.apply(
                    ask_together, (url, bodies, clients, seconds / TURNS)
                )
                got_ms = (processor_s(pid) - before) / pictures_done * 1000
                turns.append((got, direct, got / direct, got_ms, direct_ms))
            got, direct, ratio, got_ms, direct_ms = (
                statistics.median(column) for column in zip(*turns, strict=True)
            )
            print(
                f"  {clients:7}  {got:11.1f}  {direct:11.1f}  {ratio:6.1%}"
                f"  {got_ms:17.2f}  {direct_ms:11.2f}"
            )


def engine_at_home(name: str) -> tuple[Choice, int]:
    """The engine that the server would take, and with how many threads."""
    from clipserver.engines.choice import choose
    from clipserver.settings import Settings

    settings = Settings(engine=name)
    chosen = choose(name, model_dir=settings.model_dir, model=settings.model, int8=settings.int8)
    return chosen, settings.server_threads


@functools.cache
def loaded(name: str) -> Engine:
    chosen, threads = engine_at_home(name)
    return chosen.load(threads)


def directly(name: str, ready: Picture, seconds: float) -> tuple[float, float]:
    """Pictures a second of the engine itself, in batches of eight; ms of processor time each."""
    engine = loaded(name)
    engine.embed_images(ready)
    done, start, worked = 0, time.monotonic(), time.process_time()
    while time.monotonic() - start < seconds:
        engine.embed_images(ready)
        done += len(ready)
    spent_ms = (time.process_time() - worked) * 1000
    return done / (time.monotonic() - start), spent_ms / done


def processor_s(pid: int) -> float:
    """Processor time that a process has had."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, after_name[11:13])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def served(name: str) -> Iterator[tuple[str, int]]:
    """Address and process of the API at home."""
    command = [sys.executable, "-m", "clipserver", "--engine", name, "--port", "0"]
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log) as server,
    ):
        try:
            assert server.stdout is not None
            yield json.loads(server.stdout.readline())["url"], server.pid
        finally:
            server.terminate()


def ask_together(url: str, bodies: list[bytes], clients: int, seconds: float) -> tuple[float, int]:
    """Pictures a second that so many clients get together, and how many requests were made."""
    start_together = threading.Barrier(clients)

    def ask(_: int) -> tuple[float, int]:
        done = 0
        with requests.Session() as session:
            session.post(f"{url}/clip/embed_image", data=bodies[0], headers=JSON).raise_for_status()
            start_together.wait()
            start = time.monotonic()
            while time.monotonic() - start < seconds:
                body = bodies[done % len(bodies)]
                session.post(f"{url}/clip/embed_image", data=body, headers=JSON).raise_for_status()
                done += 1
            return done / (time.monotonic() - start), done + 1

    with ThreadPoolExecutor(clients) as pool:
        rates, requests_made = zip(*pool.map(ask, range(clients)), strict=True)
    return sum(rates), sum(requests_made)


JSON = {"Content-Type": "application/json"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("clips", nargs="?", type=Path, help="folder of clips to take frames from")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each figure is taken")
    parser.add_argument("--engine", default="auto", help="engine of the API at home")
    options = parser.parse_args()
    frames = frames_of(options.clips)
    pictures = squares(frames)
    client_throughput(pictures, options.seconds)
    bytes_per_frame(frames, pictures)
    calls_per_video_hour()
    server_throughput(pictures, options.seconds, options.engine)


if __name__ == "__main__":
    main()
