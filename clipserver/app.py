"""The HTTP routes: Roboflow Inference's CLIP contract over one engine."""

from __future__ import annotations

import importlib.metadata
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pydantic_core
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from clipserver.contract import (
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
from clipserver.intake import Intake
from clipserver.metrics import CONTENT_TYPE
from clipserver.service import Service
from clipserver.settings import Settings

NAME = "nightreel clipserver"


def create_app(engine: Engine, settings: Settings, api_key: str | None = None) -> FastAPI:
    """The application. Where an `api_key` is given, requests that embed must carry it."""
    service = Service(engine, settings)
    intake = Intake(api_key, int(settings.server_max_body_mb * 1e6))
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
        redirect_slashes=False,
        # Bodies are read by the intake, of which a generated description would know nothing.
        openapi_url=None,
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
        # What is echoed may hold numbers that JSON does not have.
        body = pydantic_core.to_json(refusal.body(), inf_nan_mode="null")
        return _json(body, refusal.status, refusal.headers)

    @app.exception_handler(Exception)
    async def fail(_: Request, __: Exception) -> Response:
        return JSONResponse({"message": "Internal error."}, 500)

    @app.post("/clip/embed_image")
    async def embed_image(request: Request) -> Response:
        asked = await intake.read(request, EmbedImageRequest)
        started = time.perf_counter()
        pictures = asked.image if isinstance(asked.image, list) else [asked.image]
        return _json(embed_answer(await service.embed_pictures(pictures), started))

    @app.post("/clip/embed_text")
    async def embed_text(request: Request) -> Response:
        asked = await intake.read(request, EmbedTextRequest)
        started = time.perf_counter()
        texts = asked.text if isinstance(asked.text, list) else [asked.text]
        return _json(embed_answer(await service.embed_texts(texts), started))

    @app.post("/clip/compare")
    async def compare(request: Request) -> Response:
        asked = await intake.read(request, CompareRequest)
        started = time.perf_counter()
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
        intake.admit(request)
        return models

    @app.post("/model/clear")
    async def clear(request: Request) -> dict[str, Any]:
        """Forgets the remembered texts. The one model of a server at home stays loaded."""
        await intake.read(request, ClipRequest)
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


def _json(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(body, status, headers, media_type="application/json")
