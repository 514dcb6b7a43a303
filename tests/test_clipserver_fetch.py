"""Pictures by address: what a server started with `--allow-url` follows, and what it never does."""

from __future__ import annotations

import base64
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from clip_home import encoded, expected, picture, served_here, write_towers
from conftest import missing

from clipserver import fetch as fetching
from clipserver.contract import PictureRefusal
from clipserver.engines import hub
from clipserver.engines.clip import ClipEngine
from clipserver.fetch import fetch, is_public
from clipserver.settings import Settings

HOST = "pictures.example.org"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s"


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/a.jpg",
        "https://localhost/a.jpg",
        "https://127.0.0.1/a.jpg",
        "https://[::1]/a.jpg",
        "https://example.org:port/a.jpg",
        "file:///etc/passwd",
        "https://",
    ],
)
def test_only_https_to_a_full_name_is_followed(url: str) -> None:
    """Anything else is refused before a name is looked up."""
    with pytest.raises(PictureRefusal) as refused:
        fetch(url, 1000)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True),
        ("2606:4700::1", True),
        ("64:ff9b::5db8:d70e", True),  # NAT64 of the first
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("::127.0.0.1", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b:1::1", False),
        ("2002:7f00:1::", False),
        ("2002:a00:1::1", False),
        ("2001:0:1::1", False),
        ("fe80::1", False),
        ("fe80::1%lo", False),
        ("fec0::1", False),
        ("fd00::1", False),
        ("ff02::1", False),
    ],
)
def test_public_is_what_the_internet_owns(address: str, public: bool) -> None:
    """Neither a private address nor one that wraps a private address is public."""
    assert is_public(address) is public


def resolve_to(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Let HOST stand for these addresses; every other name is looked up as ever."""
    real = socket.getaddrinfo

    def resolve(host: str, port: Any, *rest: Any, **options: Any) -> list[Any]:
        if host != HOST:
            return real(host, port, *rest, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


def test_a_name_of_this_machine_is_not_even_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """A public name that stands for a private address is refused before anything is sent."""
    resolve_to(monkeypatch, "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        with pytest.raises(PictureRefusal, match="only public hosts"):
            fetch(f"https://{HOST}:{listener.getsockname()[1]}/a.jpg", 1000)
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate of HOST in one file."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
               "-nodes", "-days", "2", "-subj", f"/CN={HOST}", "-addext",
               f"subjectAltName=DNS:{HOST}", "-keyout", str(path), "-out", str(path)]  # fmt: skip
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        missing("openssl")
    return path


Host = Callable[[Callable[[ssl.SSLSocket], None]], str]


@pytest.fixture
def host(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """Starts HOST on this machine, which counts as public here; what it does with a connection
    whose request has been read is the test's. Gives its address."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setattr(fetching, "is_public", lambda address: address != "10.0.0.1")
    resolve_to(monkeypatch, "10.0.0.1", "127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    listener = socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def start(answer: Callable[[ssl.SSLSocket], None]) -> str:
        def serve() -> None:
            plain, _ = listener.accept()
            with plain, context.wrap_socket(plain, server_side=True) as client:
                assert client.recv(65536).startswith(b"GET /a.png?size=1 HTTP/1.1\r\n")
                with suppress(OSError):  # the fetcher has had enough
                    answer(client)

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return f"https://{HOST}:{listener.getsockname()[1]}/a.png?size=1"

    with closing(listener):
        yield start
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()


def test_a_picture_is_fetched_and_embedded(host: Host, tmp_path: Path) -> None:
    """A server that may follow addresses answers for one as it does for the picture itself."""
    png = base64.b64decode(encoded(picture())["value"])
    url = host(lambda client: client.sendall(OK % (len(png), png)))
    located = hub.in_folder(write_towers(tmp_path / "tiny"), int8=False)
    engine = ClipEngine(located.description, located.fetch(), threads=1)
    with served_here(engine, Settings(server_allow_url=True)) as home:
        asked = {"image": {"type": "url", "value": url}}
        answer = requests.post(f"{home}/clip/embed_image", json=asked, timeout=30)
    (vector,) = answer.json()["embeddings"]
    assert np.abs(np.array(vector) - expected(picture())).max() < 1e-5


def test_no_more_is_fetched_than_allowed(host: Host) -> None:
    """A body of the limit is taken, one byte more is not, nor is one that says no length and never
    ends."""
    assert fetch(host(lambda client: client.sendall(OK % (1000, b"x" * 1000))), 1000) == b"x" * 1000

    def endless(client: ssl.SSLSocket) -> None:
        client.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
        while True:
            client.sendall(b"x" * 65536)

    for answer in (lambda client: client.sendall(OK % (1001, b"x" * 1001)), endless):
        with pytest.raises(PictureRefusal, match="larger than 1000 bytes"):
            fetch(host(answer), 1000)


def test_a_redirect_is_not_followed(host: Host) -> None:
    """What is not 200 is refused with its status."""
    moved = b"HTTP/1.1 302 Found\r\nLocation: https://127.0.0.1/\r\nContent-Length: 0\r\n\r\n"
    with pytest.raises(PictureRefusal, match="answered 302"):
        fetch(host(lambda client: client.sendall(moved)), 1000)


@pytest.mark.parametrize(
    "start", [b"HTTP/1.1 200 OK\r\nX: ", OK % (900, b""), b"HTTP/1.0 200\r\n\r\n"]
)
def test_a_slow_host_is_cut_off_at_the_deadline(host: Host, start: bytes) -> None:
    """A byte now and then, in headers or body, does not hold the server beyond its time."""

    def drip(client: ssl.SSLSocket) -> None:
        client.sendall(start)
        for _ in range(400):
            client.sendall(b"x")
            time.sleep(0.05)

    url = host(drip)
    started = time.monotonic()
    with pytest.raises(PictureRefusal, match="could not be fetched"):
        fetch(url, 1000, timeout_s=0.5)
    assert time.monotonic() - started < 5


def test_a_name_that_is_looked_up_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline holds for the name service too."""
    answered = threading.Event()

    def resolve(*_: Any, **__: Any) -> list[Any]:
        answered.wait(30)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    started = time.monotonic()
    try:
        with pytest.raises(PictureRefusal, match="could not be fetched"):
            fetch(f"https://{HOST}/a.png", 1000, timeout_s=0.2)
        assert time.monotonic() - started < 5
    finally:
        answered.set()
