"""The CLIP routes' requests, answers and refusals as they stand on the wire.

Refusal             an answer that is an error: status and message, `{"message": ...}`
  PictureRefusal    400, a picture that cannot be used
  TooSlow           408, a body that did not come within the server's time
  TooLarge          413, a body or a list of pictures past the server's limit
  Malformed         422 with `{"detail": [...]}`, a body that is not what was asked for
  Busy              503 with Retry-After
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import pydantic_core
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

KNOWN_VERSIONS = frozenset(
    {
        "RN50",
        "RN101",
        "RN50x4",
        "RN50x16",
        "RN50x64",
        "ViT-B-16",
        "ViT-B-32",
        "ViT-L-14",
        "ViT-L-14-336px",
    }
)
"""What a request may name as `clip_version_id`. The one loaded engine answers for all of them."""

_NAMED_PROMPTS = 10_000
_DECIMALS = 8  # of a vector's numbers on the wire: finer than float32 resolves in unit vectors


class Refusal(Exception):  # an answer of the contract, not only a fault
    """An answer that is an error."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """What is answered, to be written as JSON."""
        return {"message": self.message}


class PictureRefusal(Refusal):
    """A picture that cannot be used, with the cause."""

    def __init__(self, cause: str) -> None:
        super().__init__(400, f"Could not load input image. Cause: {cause}")


class TooSlow(Refusal):
    """A body that did not come within the server's time. What still comes of it is not read."""

    def __init__(self, within_s: float) -> None:
        super().__init__(
            408,
            f"The request's body did not come within {within_s:g} s.",
            {"Connection": "close"},
        )


class TooLarge(Refusal):
    """More than the server's `limit`, a number with its unit, allows in one request."""

    def __init__(self, limit: str) -> None:
        super().__init__(413, f"The request is larger than the {limit} allowed.")


class Malformed(Refusal):
    """A body that is no JSON or not of the asked shape: one entry for each problem, with `type`,
    `loc`, `msg` and the `input` that was found there."""

    def __init__(self, detail: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(422, "The request does not have the asked shape.")
        self.detail = detail

    def body(self) -> dict[str, Any]:
        return {"detail": self.detail}


class Busy(Refusal):
    """More work is waiting than the server takes on."""

    def __init__(self) -> None:
        super().__init__(503, "The server is busy. Try again in a moment.", {"Retry-After": "1"})


class Picture(BaseModel):
    """A picture by value or by address. Which types are served is decided when it is loaded."""

    model_config = ConfigDict(extra="ignore")

    type: str
    value: str


class ClipRequest(BaseModel):
    """What every request may carry. Unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")

    api_key: Annotated[str | None, Field(repr=False)] = None
    clip_version_id: str | None = "ViT-B-16"


Listed = TypeVar("Listed")
FirstFault = Annotated[Listed, Field(fail_fast=True)]
"""A list of which the first wrong item alone is told: there may be millions."""


class EmbedImageRequest(ClipRequest):
    """One picture or a list of them."""

    image: Picture | FirstFault[list[Picture]]


class EmbedTextRequest(ClipRequest):
    """One text or a list of them."""

    text: str | FirstFault[list[str]]


Side = Picture | str
"""A picture, or a string: a text, or a picture's bare base64 where pictures are compared."""


def _told_apart(prompts: object) -> object:
    if isinstance(prompts, dict) and len(prompts) > _NAMED_PROMPTS:
        raise ValueError(f"at most {_NAMED_PROMPTS} named prompts are taken, a list is not bounded")
    return prompts


NamedSides = Annotated[dict[str, Side], BeforeValidator(_told_apart)]
"""Bounded, since of a mapping every wrong item is told, not the first alone."""


class CompareRequest(ClipRequest):
    """One subject and the prompts to compare it with.

    A prompt object with both keys `type` and `value` is one picture, not two named prompts.
    """

    subject: Side
    subject_type: Literal["image", "text"] = "image"
    # In this order: what is a picture is no mapping.
    prompt: Annotated[Side | FirstFault[list[Side]] | NamedSides, Field(union_mode="left_to_right")]
    prompt_type: Literal["image", "text"] = "text"

    def prompts(self) -> tuple[list[str] | None, list[Side]]:
        """The prompts' names, None where they have none, and the prompts in the same order."""
        if isinstance(self.prompt, dict):
            return list(self.prompt), list(self.prompt.values())
        return None, self.prompt if isinstance(self.prompt, list) else [self.prompt]


def embed_answer(vectors: NDArray[np.float32], started: float) -> bytes:
    """One vector for each input; `started` is what `time.perf_counter` said on arrival."""
    rounded = np.round(vectors.astype(np.float64), _DECIMALS)
    return _answer({"embeddings": rounded.tolist()}, started)


def compare_answer(
    names: Sequence[str] | None, similarities: NDArray[np.float32], started: float
) -> bytes:
    """Raw cosines in the order of the prompts, under their names where they have names."""
    values = similarities.astype(np.float64).tolist()
    similarity = values if names is None else dict(zip(names, values, strict=True))
    return _answer({"similarity": similarity}, started)


def _answer(result: dict[str, Any], started: float) -> bytes:
    return pydantic_core.to_json(
        {
            "inference_id": str(uuid.uuid4()),
            "frame_id": None,
            "time": time.perf_counter() - started,
            **result,
            "parent_id": None,
        }
    )
