"""What stands between the socket and the routes: counts, common headers, and a bound on how many
requests are taken in at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clipserver.contract import Busy

_REQUESTS_AT_ONCE = 256  # beyond the queue of pictures: bodies take memory before they are admitted


class Edge:
    """ASGI middleware that answers 503 to more requests at once than there is memory for.

    Every answer gets `headers` and its processing time, and is told to `on_answer` with its route
    (a path that the server has, or `other`), status and seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        headers: dict[str, str],
        on_answer: Callable[[str, int, float], None],
    ) -> None:
        self._app = app
        self._headers = headers
        self._on_answer = on_answer
        self._requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 0

        async def marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update(self._headers)
                headers["x-processing-time"] = f"{time.perf_counter() - started:.6f}"
            await send(message)

        busy = Busy()
        refusal = JSONResponse(busy.body(), busy.status, busy.headers)
        app = self._app
        if scope["method"] == "POST" and self._requests >= _REQUESTS_AT_ONCE:
            app = refusal
        self._requests += 1
        try:
            await app(scope, receive, marked)
        except asyncio.CancelledError:
            # The server ends and its grace is over. Who waited may ask the next one.
            if status:
                raise
            await refusal(scope, receive, marked)
        finally:
            self._requests -= 1
            path = getattr(scope.get("route"), "path", "other")
            route = "other" if "{" in path else path
            self._on_answer(route, status or 500, time.perf_counter() - started)
