"""What a request must bring before it is served: the key, a body within bounds, the asked shape.

The key comes first, so that a stranger's request is neither judged nor echoed.
"""

from __future__ import annotations

import asyncio
import hmac
from email.message import Message
from typing import TypeVar

import pydantic_core
from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request

from clipserver.contract import (
    KNOWN_VERSIONS,
    ClipRequest,
    Malformed,
    Refusal,
    TooLarge,
    TooSlow,
)

_BODY_S = 30.0  # while it comes, a body holds one of the places that all requests share

Asked = TypeVar("Asked", bound=ClipRequest)


class Intake:
    """Takes requests in for a server that asks for `api_key`, or for none where that is None.

    Of a body at most `max_bytes` are read, and for 30 s at most.
    """

    def __init__(self, api_key: str | None, max_bytes: int) -> None:
        self._api_key = api_key
        self._max_bytes = max_bytes

    def admit(self, request: Request) -> None:
        """Return when a request without a body carries the key. Refusal (401) otherwise."""
        self._check(_key_beside(request))

    async def read(self, request: Request, kind: type[Asked]) -> Asked:
        """The body as `kind`; an empty one is an object without fields.

        The key may be in the query, a bearer token or the body: the first that is present counts.
        Refusal with 401, 404 for an unknown version, 408, 413 or 422.
        """
        key = _key_beside(request)
        if key:
            self._check(key)
        body = await self._body(request) or b"{}"
        if not key and self._api_key is not None:
            self._check(_key_within(body))
        if body != b"{}" and not _is_json(request):
            raise Malformed([_problem("content_type", "Content-Type should be application/json")])
        try:
            asked = kind.model_validate_json(body)
        except ValidationError as error:
            raise _malformed(error) from None
        if asked.clip_version_id is not None and asked.clip_version_id not in KNOWN_VERSIONS:
            raise Refusal(404, "Unknown clip_version_id.")
        return asked

    def _check(self, key: str) -> None:
        if self._api_key is not None and not hmac.compare_digest(
            key.encode(), self._api_key.encode()
        ):
            raise Refusal(401, "Unauthorized: the API key is missing or wrong.")

    async def _body(self, request: Request) -> bytes:
        if int(request.headers.get("content-length", "0")) > self._max_bytes:
            raise TooLarge(f"{self._max_bytes} bytes")
        chunks, size = [], 0
        try:
            async with asyncio.timeout(_BODY_S):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > self._max_bytes:
                        raise TooLarge(f"{self._max_bytes} bytes")
                    chunks.append(chunk)
        except TimeoutError:
            raise TooSlow(_BODY_S) from None
        except ClientDisconnect:
            # Nobody hears this, but who hangs up is no fault of the server's.
            raise Refusal(400, "The request ended early.") from None
        return b"".join(chunks)


def _key_beside(request: Request) -> str:
    """The key in the query or, where there is none, in the bearer token; empty for neither."""
    scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
    beside = bearer.strip() if scheme.lower() == "bearer" else ""
    return request.query_params.get("api_key") or beside


def _key_within(body: bytes) -> str:
    """The key in a body, empty where it has none or is no JSON object."""
    try:
        document = pydantic_core.from_json(body)
    except ValueError:
        return ""
    key = document.get("api_key") if isinstance(document, dict) else None
    return key if isinstance(key, str) else ""


def _is_json(request: Request) -> bool:
    # Asked for, since a web page can send anything else to a server on its reader's machine.
    header = Message()
    header["content-type"] = request.headers.get("content-type", "")
    subtype = header.get_content_subtype()
    return header.get_content_maintype() == "application" and (
        subtype == "json" or subtype.endswith("+json")
    )


def _malformed(error: ValidationError) -> Malformed:
    # The input is echoed, as the contract has it, except where it may not even be characters.
    problems = error.errors(include_url=False, include_context=False)
    return Malformed(
        [
            _problem("json_invalid", problem["msg"])
            if problem["type"] == "json_invalid"
            else {**problem, "loc": ("body", *problem["loc"])}
            for problem in problems
        ]
    )


def _problem(kind: str, message: str) -> dict[str, object]:
    return {"type": kind, "loc": ("body",), "msg": message, "input": {}}
