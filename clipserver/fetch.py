"""Fetches a picture by its address, for a server that was started with `--allow-url`.

The address comes from a stranger: only HTTPS to a public host by its full name. The name is looked
up once and the addresses found are the ones that are connected to, so that no name can lead to this
machine or its network; and everything together, looking up included, has one deadline.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from urllib.parse import urlsplit

from clipserver.contract import PictureRefusal

_TIMEOUT_S = 10.0
_CHUNK = 65536
_HTTPS_PORT = 443
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")  # RFC 6052: the last 32 bits are IPv4


def fetch(url: str, max_bytes: int, timeout_s: float = _TIMEOUT_S) -> bytes:
    """The body at an https address; redirects are not followed. PictureRefusal with the cause
    otherwise, after `timeout_s` at the latest."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or _HTTPS_PORT
    except ValueError as error:
        raise PictureRefusal("malformed URL.") from error
    if parts.scheme != "https" or not host or not _is_full_name(host):
        raise PictureRefusal("only https URLs of a fully qualified host are fetched.")
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    connection = _PublicConnection(host, port, time.monotonic() + timeout_s)
    try:
        connection.request("GET", target)
        answer = connection.getresponse()
        body = bytearray()
        while len(body) <= max_bytes and (more := answer.read1(_CHUNK)):
            body += more
        # An answer that was cut off at the deadline looks like one that has ended.
        connection.left_s()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise PictureRefusal("the URL could not be fetched.") from error
    finally:
        connection.end()
    if answer.status != http.client.OK:
        raise PictureRefusal(f"the URL answered {answer.status}.")
    if len(body) > max_bytes:
        raise PictureRefusal(f"the URL's picture is larger than {max_bytes} bytes.")
    return bytes(body)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet's own. One that stands for an IPv4 address, by
    6to4 or NAT64, is what that is."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        within = ip.sixtofour
        if ip in _TRANSLATED:
            within = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if within is None:
            return ip in _GLOBAL_UNICAST and ip.is_global
        ip = within
    return ip.is_global and not ip.is_multicast


class _PublicConnection(http.client.HTTPSConnection):
    """An HTTPS connection to public addresses alone, cut off when its deadline comes.

    A time limit of the socket's own would be one for each read, and a host that sends a byte every
    few seconds would hold a thread for days.
    """

    def __init__(self, host: str, port: int, deadline: float) -> None:
        super().__init__(host, port)
        self._deadline = deadline
        self._cutter: threading.Timer | None = None
        self._watched: socket.socket | None = None

    def left_s(self) -> float:
        """Seconds to the deadline. TimeoutError once it is past."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def connect(self) -> None:
        plain = self._reach(_addresses(self.host, self.port, self.left_s()))
        plain.settimeout(None)
        self._watched = plain.dup()
        self._cutter = threading.Timer(self.left_s(), _cut, [self._watched])
        self._cutter.daemon = True
        self._cutter.start()
        try:
            self.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=self.host)
        except BaseException:
            plain.close()
            raise

    def end(self) -> None:
        """Close it for good. `close` is also called once the headers are read, when a body that is
        still to come has to be watched."""
        self.close()
        if self._cutter is not None:
            self._cutter.cancel()
        if self._watched is not None:
            self._watched.close()

    def _reach(self, addresses: list[str]) -> socket.socket:
        public = [address for address in addresses if is_public(address)]
        if not public:
            raise PictureRefusal("only public hosts are fetched.")
        for address in public:
            try:
                return socket.create_connection((address, self.port), self.left_s())
            except OSError as error:
                last = error
        raise last


def _cut(connected: socket.socket) -> None:
    """End a connection under whoever is reading it."""
    with contextlib.suppress(OSError):  # it has ended by itself
        connected.shutdown(socket.SHUT_RDWR)


def _addresses(host: str, port: int, timeout_s: float) -> list[str]:
    """What a name stands for. Looked up in a thread, since that knows no time limit."""
    found: list[str] = []

    def look_up() -> None:
        try:
            entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.extend(str(entry[4][0]) for entry in entries)
        except (OSError, UnicodeError):
            pass

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not found:
        raise OSError(f"{host} was not found")
    return found


def _is_full_name(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return "." in host.strip(".")
    return False
