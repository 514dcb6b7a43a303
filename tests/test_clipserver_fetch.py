"""Pictures by address: what a server started with `--allow-url` follows, and what it never does."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from clipserver.contract import PictureRefusal
from clipserver.fetch import fetch


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


def test_a_name_of_this_machine_is_refused_before_a_byte_is_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A public name that resolves to a private address is found out on the connection itself."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def resolve(host: str, asked: int, *_: Any) -> list[Any]:
            assert host == "pictures.example.org"
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", asked))]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        with pytest.raises(PictureRefusal, match="only public hosts"):
            fetch(f"https://pictures.example.org:{port}/a.jpg", 1000)
        listener.settimeout(10)
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.recv(1) == b""
