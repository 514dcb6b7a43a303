"""The HTTP routes: Roboflow Inference's CLIP contract over one engine."""

from __future__ import annotations

import hmac
import importlib.metadata
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse

from clipserver.contract import (
    KNOWN_VERSIONS,
    ClipRequest,
    CompareRequest,
    EmbedImageRequest,
    EmbedTextRequest,
    Refusal,
    compare_answer,
    embed_answer,
)
from clipserver.edge import Edge
from clipserver.engines import Engine
from clipserver.metrics import CONTENT_TYPE
from clipserver.service import Service
from clipserver.settings import Settings

NAME = "nightreel clipserver"


def create_app(engine: Engine, settings: Settings, api_key: str | None = None) -> FastAPI:
    """The application. Where an `api_key` is given, requests that embed must carry it."""
    service = Service(engine, settings)
    description = engine.description
    about = {
        "name": NAME,
        "version": importlib.metadata.version("nightreel"),
        "uuid": str(uuid.uuid4()),
        "engine": description.engine,
        "model": description.model,
        "input_size": description.input_size,
        "dimension": engine.dimension,
        "notice": description.notice,
    }

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    app = FastAPI(
        title=NAME,
        lifespan=lifespan,
        max_body_size=int(settings.server_max_body_mb * 1e6),
        redirect_slashes=False,
        # No pages that would load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        # Addresses may carry the key and bodies the pictures: neither is told to anyone.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.add_middleware(
        Edge,
        headers={"x-inference-engine": description.engine, "x-model-id": description.model},
        on_answer=service.metrics.answered,
    )

    @app.exception_handler(Refusal)
    async def refuse(_: Request, refusal: Refusal) -> Response:
        return JSONResponse({"message": refusal.message}, refusal.status, refusal.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        # The input is echoed, as the contract has it; ASCII alone, since it may be any characters.
        body = json.dumps({"detail": jsonable_encoder(error.errors())})
        return Response(body, 422, media_type="application/json")

    @app.exception_handler(Exception)
    async def fail(_: Request, __: Exception) -> Response:
        return JSONResponse({"message": "Internal error."}, 500)

    def admit(request: Request, asked: ClipRequest | None) -> None:
        """Check key and version. The first key present counts: query, bearer, body."""
        if api_key is not None:
            scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
            given = (
                request.query_params.get("api_key")
                or (bearer.strip() if scheme.lower() == "bearer" else "")
                or (asked.api_key if asked else None)
                or ""
            )
            if not hmac.compare_digest(given.encode(), api_key.encode()):
                raise Refusal(401, "Unauthorized: the API key is missing or wrong.")
        version = asked.clip_version_id if asked else None
        if version is not None and version not in KNOWN_VERSIONS:
            raise Refusal(404, "Unknown clip_version_id.")

    @app.post("/clip/embed_image")
    async def embed_image(asked: EmbedImageRequest, request: Request) -> Response:
        started = time.perf_counter()
        admit(request, asked)
        pictures = asked.image if isinstance(asked.image, list) else [asked.image]
        return _json(embed_answer(await service.embed_pictures(pictures), started))

    @app.post("/clip/embed_text")
    async def embed_text(asked: EmbedTextRequest, request: Request) -> Response:
        started = time.perf_counter()
        admit(request, asked)
        texts = asked.text if isinstance(asked.text, list) else [asked.text]
        return _json(embed_answer(await service.embed_texts(texts), started))

    @app.post("/clip/compare")
    async def compare(asked: CompareRequest, request: Request) -> Response:
        started = time.perf_counter()
        admit(request, asked)
        names, similarities = await service.compare(asked)
        return _json(compare_answer(names, similarities, started))

    @app.get("/")
    @app.get("/info")
    async def info() -> dict[str, Any]:
        return about

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "healthy"}

    @app.get("/readiness")
    async def readiness() -> Response:
        if service.ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready"}, 503, {"Retry-After": "1"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(service.metrics.exposition(), media_type=CONTENT_TYPE)

    @app.get("/model/registry")
    async def registry(request: Request) -> dict[str, Any]:
        admit(request, None)
        return models

    @app.post("/model/clear")
    async def clear(request: Request) -> dict[str, Any]:
        """Forgets the remembered texts. The one model of a server at home stays loaded."""
        admit(request, None)
        service.forget()
        return models

    # A path that is known to GET alone answers 405 to POST, as the contract has it for any slash
    # too many.
    @app.get("/{path:path}", include_in_schema=False)
    async def unknown(path: str) -> Response:
        raise HTTPException(404, "Not Found")

    models = {
        "models": [
            {
                "model_id": description.model,
                "task_type": "embed",
                "batch_size": settings.server_max_batch,
                "input_height": description.input_size,
                "input_width": description.input_size,
            }
        ]
    }
    return app


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")
