"""Loads an engine, serves it, and ends cleanly when told to."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import uvicorn

from clipserver.app import create_app
from clipserver.engines import Engine
from clipserver.engines.choice import Choice
from clipserver.settings import Settings

_GRACE_S = 10
_BACKLOG = 1024

log = logging.getLogger(__name__)


def serve(choice: Choice, settings: Settings, api_key: str | None) -> None:
    """Serve until SIGTERM or SIGINT. When requests can be answered, one line of JSON with `url`,
    `engine` and `model` is printed. EngineUnavailableError or OSError where it cannot begin."""
    # The address first: to find it taken after the weights are read would be a waste.
    with _listen(settings.server_host, settings.server_port) as listener:
        engine = choice.load(settings.server_threads)
        warm_up(engine)
        description = engine.description
        if description.notice:
            log.warning(description.notice)
        host, port = listener.getsockname()[:2]
        ready = {
            "url": f"http://{f'[{host}]' if ':' in host else host}:{port}",
            "engine": description.engine,
            "model": description.model,
        }
        config = uvicorn.Config(
            create_app(engine, settings, api_key),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_GRACE_S,
        )
        asyncio.run(_Server(config, ready).serve([listener]))


def warm_up(engine: Engine) -> None:
    """Embed one picture and one text, so that the first request is not the slow one."""
    side = engine.description.input_size
    engine.embed_images(np.zeros((1, side, side, 3), np.uint8))
    engine.embed_texts(["a picture"])


class _Server(uvicorn.Server):
    """Says when it is ready, and takes a signal to end for what it is: no failure."""

    def __init__(self, config: uvicorn.Config, ready: dict[str, str]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            sys.stdout.write(json.dumps(self._ready) + "\n")
            sys.stdout.flush()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        kept = {s: signal.signal(s, self.handle_exit) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # With its protocol named, or asyncio would not know that it may turn Nagle's algorithm off,
        # and every answer would wait 40 ms for an acknowledgement.
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    # UnicodeError: what is too long for a name, or has an empty part.
    except (OSError, UnicodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "that is no host's name"
        raise OSError(
            f"cannot listen on {host}, port {port}: {cause}; "
            "see --host and --port (0 takes a free one)"
        ) from error
    listener.listen(_BACKLOG)
    return listener
