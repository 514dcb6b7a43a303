"""A real HTTP server that speaks the CLIP contract and misbehaves on command.

Its embeddings are a fixed function of the decoded picture or the text, so that results of two runs
can be compared to the last bit. `script` holds answers to give instead of working, first come
first served.
"""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import cv2
import numpy as np

DIMENSION = 48
MODEL = "test-colours@1"

Handler = BaseHTTPRequestHandler
Misbehaviour = Callable[["Handler", dict[str, Any]], None]


@dataclass
class ContractServer:
    """The server's address, what it was asked, and what it shall do next."""

    url: str = ""
    stacks_lists: bool = False
    """The known bug: a list of pictures comes back as one embedding."""
    embeds: bool = True
    """Whether /clip/embed_image exists."""
    longest_text: int | None = None
    """Words; a longer text is refused."""
    most_texts: int | None = None
    """A longer list of texts is refused."""
    refusal: int = 500
    """How texts are refused: 500 without a word, or 400 with one."""
    key: str | None = None
    info_status: int = 200
    answers_name_model: bool = True
    """Whether the header of an answer says which model it is of, as /info does."""
    unknown_route: int = 404
    """What is said of a route that is not there."""
    info: dict[str, Any] = field(default_factory=lambda: {"model": MODEL, "input_size": 64})
    info_script: list[Misbehaviour] = field(default_factory=list)
    """What is answered to GET /info first, instead."""
    script: list[Misbehaviour] = field(default_factory=list)
    always: Misbehaviour | None = None
    requests: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    """Path with query, body and headers of every POST."""

    def pictures(self) -> int:
        """Pictures that were sent, over all requests."""
        images = [body["image"] for path, body, _ in self.requests if "embed_image" in path]
        return sum(len(image) if isinstance(image, list) else 1 for image in images)


def picture_vector(jpeg: bytes) -> list[float]:
    """Mean colours of a 4 x 4 grid: what the picture looks like, in 48 numbers."""
    picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    if picture is None:
        raise ValueError("no picture")
    small = cv2.resize(picture, (4, 4), interpolation=cv2.INTER_AREA)
    return [float(value) + 1.0 for value in small.reshape(-1)]


def text_vector(text: str) -> list[float]:
    """A fixed direction for a text."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    return [float(v) for v in np.random.default_rng(seed).uniform(0.1, 1.0, DIMENSION)]


def answer_with(
    status: int, body: Any, headers: dict[str, str] | None = None, raw: bytes | None = None
) -> Misbehaviour:
    """Answer with this status and body."""

    def act(handler: Handler, _: dict[str, Any]) -> None:
        content = raw if raw is not None else json.dumps(body).encode()
        handler.send_response_only(status)  # no Date of its own
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    return act


def hang_up(handler: Handler, _: dict[str, Any]) -> None:
    """Promise an answer and cut the connection in its middle."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"embeddings": [')
    handler.wfile.flush()
    handler.close_connection = True


def half_close(handler: Handler, _: dict[str, Any]) -> None:
    """Say nothing more, and go on listening."""
    handler.connection.shutdown(socket.SHUT_WR)
    handler.close_connection = True


def drip(handler: Handler, _: dict[str, Any]) -> None:
    """Send a byte now and then, for ever."""
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    try:
        for _ in range(200):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)
    except OSError:
        pass
    handler.close_connection = True


def keep_silent(handler: Handler, _: dict[str, Any]) -> None:
    """Say nothing until the client hangs up, or for longer than any test waits."""
    handler.connection.settimeout(8.0)
    with suppress(OSError):
        handler.connection.recv(1)
    handler.close_connection = True


class TextNotTaken(ValueError):
    """A text that is too long, or one too many."""


def _check_texts(server: ContractServer, texts: list[str]) -> None:
    if server.most_texts is not None and len(texts) > server.most_texts:
        raise TextNotTaken("Too many texts.")
    if server.longest_text is not None:
        longest = max((len(text.split()) for text in texts), default=0)
        if longest > server.longest_text:
            raise TextNotTaken(f"Text too long: {longest} words.")


def _work(server: ContractServer, path: str, body: dict[str, Any]) -> Any:
    def image(one: Any) -> list[float]:
        return picture_vector(base64.b64decode(one["value"]))

    frame: dict[str, Any] = {
        "inference_id": None,
        "frame_id": None,
        "time": 0.001,
        "parent_id": None,
    }
    if path == "/clip/embed_image":
        images = body["image"] if isinstance(body["image"], list) else [body["image"]]
        vectors = [image(one) for one in images]
        return frame | {"embeddings": vectors[:1] if server.stacks_lists else vectors}
    if path == "/clip/embed_text":
        texts = body["text"] if isinstance(body["text"], list) else [body["text"]]
        _check_texts(server, texts)
        return frame | {"embeddings": [text_vector(text) for text in texts]}
    typed = body.get("subject_type", "image") == "text"
    _check_texts(server, body["prompt"])
    _check_texts(server, [body["subject"]] if typed else [])
    subject = np.array(text_vector(body["subject"]) if typed else image(body["subject"]))
    prompts = [np.array(text_vector(text)) for text in body["prompt"]]
    if len(prompts) > 8:
        raise ValueError("more than 8 prompts")
    cosines = [float(subject @ p / np.linalg.norm(subject) / np.linalg.norm(p)) for p in prompts]
    return frame | {"similarity": cosines}


@contextmanager
def contract_server(**how: Any) -> Iterator[ContractServer]:
    """Serve the contract on a free port of the loopback interface."""
    server = ContractServer(**how)
    lock = threading.Lock()

    class Routes(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            if self.path == "/info" and server.info_script:
                server.info_script.pop(0)(self, {})
                return
            status = server.info_status if self.path == "/info" else 404
            answer_with(status, server.info if status == 200 else {"detail": "Not Found"})(self, {})

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length))
            path = self.path.split("?")[0]
            with lock:
                server.requests.append((self.path, body, dict(self.headers)))
                act = server.always or (server.script.pop(0) if server.script else None)
            if act is not None:
                act(self, body)
                return
            known = ("/clip/embed_image",) * server.embeds + ("/clip/embed_text", "/clip/compare")
            if path not in known:
                answer_with(server.unknown_route, {"detail": "Not Found"})(self, body)
                return
            given = (
                body.get("api_key"),
                self.headers.get("Authorization", "").removeprefix("Bearer "),
            )
            in_query = self.path.partition("api_key=")[2]
            if server.key is not None and server.key not in (*given, in_query):
                answer_with(401, {"message": "Unauthorized"})(self, body)
                return
            if "image" not in body and "text" not in body and "subject" not in body:
                answer_with(422, {"detail": [{"input": body}]})(self, body)
                return
            try:
                named = server.answers_name_model and "model" in server.info
                served = {"x-model-id": server.info["model"]} if named else {}
                answer_with(200, _work(server, path, body), served)(self, body)
            except TextNotTaken as error:
                said = "Internal error." if server.refusal == 500 else str(error)
                answer_with(server.refusal, {"message": said})(self, body)
            except ValueError:
                answer_with(500, {"message": "Internal error."})(self, body)

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """A client that hangs up is the client's business."""

    with Quiet(("127.0.0.1", 0), Routes) as http:
        server.url = f"http://127.0.0.1:{http.server_address[1]}"
        thread = threading.Thread(target=http.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
