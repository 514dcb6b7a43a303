"""The three routes of the CLIP HTTP contract: what they are sent, and what their answers must hold.

A worker sends these bodies and a plan weighs them, so that both count the same bytes.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pydantic_core

from workers.refusals import BadAnswer, WrongCount

EMBED_IMAGE = "/clip/embed_image"
EMBED_TEXT = "/clip/embed_text"
COMPARE = "/clip/compare"

Vectors = npt.NDArray[np.float32]
Body = dict[str, Any]


def pictures_body(jpegs: Sequence[bytes]) -> Body:
    """What `/clip/embed_image` is sent: a picture alone is no list, which some endpoints refuse."""
    pictures = [_picture(jpeg) for jpeg in jpegs]
    return {"image": pictures if len(pictures) > 1 else pictures[0]}


def texts_body(texts: Sequence[str]) -> Body:
    """What `/clip/embed_text` is sent."""
    return {"text": list(texts)}


def comparison_body(subject: bytes | str, prompts: Sequence[str]) -> Body:
    """What `/clip/compare` is sent of a JPEG, or a text, and the prompts to hold against it."""
    of_text = isinstance(subject, str)
    return {
        "subject": subject if isinstance(subject, str) else _picture(subject),
        "subject_type": "text" if of_text else "image",
        "prompt": list(prompts),
        "prompt_type": "text",
    }


def _picture(jpeg: bytes) -> dict[str, str]:
    return {"type": "base64", "value": base64.b64encode(jpeg).decode("ascii")}


def base64_length(size: int) -> int:
    """Characters that a picture of `size` bytes is sent as."""
    return -(-size // 3) * 4


def encoded(body: Body, clip_version: str, key: str | None = None) -> bytes:
    """The body as JSON, naming the model that is asked for, and the key where it travels here.
    Raises pydantic_core.PydanticSerializationError for a text that is not valid Unicode."""
    named = body | {"clip_version_id": clip_version}
    return pydantic_core.to_json(named if key is None else named | {"api_key": key})


def unit_vectors(answer: dict[str, Any], expected: int | None) -> Vectors:
    """Return the answer's embeddings as unit vectors, N x D float32; N must be as expected, if
    anything is. Raises BadAnswer, and WrongCount for embeddings that are right but for N."""
    try:
        vectors = np.asarray(answer["embeddings"], dtype=np.float32)
    except (KeyError, TypeError, ValueError):
        raise BadAnswer("the answer holds no rectangle of embeddings") from None
    if vectors.ndim != 2 or vectors.shape[1] < 2 or not np.isfinite(vectors).all():
        raise BadAnswer("the answer's embeddings are not finite vectors of one length")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (lengths > 0).all():
        raise BadAnswer("the answer holds an embedding of length zero")
    if expected is not None and len(vectors) != expected:
        raise WrongCount(f"{len(vectors)} embeddings came back where {expected} were asked for")
    return np.asarray(vectors / lengths, dtype=np.float32)


def cosines(answer: dict[str, Any], n: int) -> Vectors:
    """Return the answer's n similarities, float32. Raises BadAnswer."""
    try:
        found = np.asarray(answer["similarity"], dtype=np.float32)
    except (KeyError, TypeError, ValueError):
        raise BadAnswer("the answer holds no list of similarities") from None
    if found.shape != (n,) or not np.isfinite(found).all():
        raise BadAnswer(f"the answer does not hold {n} finite similarities")
    return found
