"""The server's settings: from the environment under `NIGHTREEL_`, or options of the same name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from clipserver.engines.choice import EngineName

_MILLION = 1e6  # of megabytes or megapixels: no machine has more, and infinity is no limit


def half_of_the_cores() -> int:
    """At least 1: the server shares its machine with video decoders."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // 2)


class Settings(BaseSettings):
    """Everything that can be set. An option is the field's name without `server_`."""

    model_config = SettingsConfigDict(env_prefix="NIGHTREEL_", extra="ignore")

    engine: Annotated[
        EngineName,
        Field(
            description="clip, offline, or auto: clip where it can be had, else offline. Commands "
            "that start the API at home themselves take auto"
        ),
    ] = "clip"
    model_dir: Annotated[
        Path | None,
        Field(description="folder with vision_model.onnx, text_model.onnx and tokenizer.json"),
    ] = None
    model: Annotated[
        str,
        Field(description="CLIP weights to fetch from the hub, as owner/name or owner/name@rev"),
    ] = "Xenova/clip-vit-base-patch32"
    int8: Annotated[bool, Field(description="quantise the towers to int8: faster, less exact")] = (
        False
    )
    server_threads: Annotated[
        int, Field(ge=1, le=1024, description="threads of the engine (default: half of the cores)")
    ] = Field(default_factory=half_of_the_cores)
    server_host: Annotated[str, Field(description="address to listen on")] = "127.0.0.1"
    server_port: Annotated[
        int, Field(ge=0, le=65535, description="port to listen on; 0 takes a free one")
    ] = 9001
    server_api_key_file: Annotated[
        Path | None, Field(description="file with the key that requests must carry")
    ] = None
    server_allow_url: Annotated[
        bool, Field(description="fetch pictures from public https addresses in requests")
    ] = False
    server_max_body_mb: Annotated[
        float, Field(gt=0, le=_MILLION, description="largest request in MB (10^6 bytes)")
    ] = 20
    server_max_megapixels: Annotated[
        float, Field(gt=0, le=_MILLION, description="largest picture in millions of pixels")
    ] = 50
    server_max_batch: Annotated[
        int, Field(ge=1, description="most pictures that the engine gets at once")
    ] = 8
    server_max_delay_ms: Annotated[
        float,
        Field(
            ge=0,
            allow_inf_nan=False,
            description="how long a picture waits for others that are on their way",
        ),
    ] = 3
    server_max_queue: Annotated[
        int, Field(ge=1, description="pictures held before requests are answered 503")
    ] = 64
    server_text_cache: Annotated[int, Field(ge=0, description="texts whose vectors are kept")] = (
        4096
    )
