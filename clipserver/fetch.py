"""Fetches a picture by its address, for a server that was started with `--allow-url`.

The address comes from a stranger: only HTTPS to a public host by its full name, checked on the
very connection that is used, so that no name can resolve to this machine or its network.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from urllib.parse import urlsplit

from clipserver.contract import PictureRefusal

_TIMEOUT_S = 10.0
_CHUNK = 65536
_HTTPS_PORT = 443


def fetch(url: str, max_bytes: int) -> bytes:
    """The body at an https address; redirects are not followed. PictureRefusal with the cause
    otherwise."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or _HTTPS_PORT
    except ValueError as error:
        raise PictureRefusal("malformed URL.") from error
    if parts.scheme != "https" or not host or not _is_full_name(host):
        raise PictureRefusal("only https URLs of a fully qualified host are fetched.")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    deadline = time.monotonic() + _TIMEOUT_S
    connection = _PublicConnection(host, port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", target)
        answer = connection.getresponse()
        body = b""
        while len(body) <= max_bytes and (more := answer.read1(_CHUNK)):
            body += more
            if time.monotonic() > deadline:
                raise TimeoutError
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise PictureRefusal("the URL could not be fetched.") from error
    finally:
        connection.close()
    if answer.status != http.client.OK:
        raise PictureRefusal(f"the URL answered {answer.status}.")
    if len(body) > max_bytes:
        raise PictureRefusal(f"the URL's picture is larger than {max_bytes} bytes.")
    return body


class _PublicConnection(http.client.HTTPSConnection):
    """An HTTPS connection that refuses addresses of private networks before a byte is sent."""

    def connect(self) -> None:
        plain = socket.create_connection((self.host, self.port), _TIMEOUT_S)
        try:
            if not ipaddress.ip_address(plain.getpeername()[0]).is_global:
                raise PictureRefusal("only public hosts are fetched.")
            self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)
        except BaseException:
            plain.close()
            raise


def _is_full_name(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return "." in host.strip(".")
    return False
