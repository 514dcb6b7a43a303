"""What the server asks of a model: pictures and texts as vectors of one space.

EngineUnavailableError   the asked engine cannot be had here; the message says why and what to do
TextTooLongError         a text has more tokens than the engine reads
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class EngineUnavailableError(Exception):
    """The asked engine cannot be had here."""


class TextTooLongError(ValueError):
    """A text has more tokens than the engine reads."""


@dataclass(frozen=True, slots=True)
class Description:
    """What is known of an engine before its weights are read."""

    engine: str
    """`clip` or `offline`."""
    model: str
    """Name and version: vectors of one model are comparable, of two never."""
    input_size: int
    """Pixels a side of the square that the engine reads."""
    notice: str | None
    """What every reader of the results must be told, or None."""


class Engine(Protocol):
    """A loaded model. Its methods are called from one thread at a time."""

    description: Description
    dimension: int

    def embed_images(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """N x dimension for N x input_size x input_size x 3 RGB."""

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """N x dimension. TextTooLongError as `check_text` would raise it."""

    def check_text(self, text: str) -> None:
        """Return when the text fits the engine's window, TextTooLongError otherwise. Unlike
        the other two this may be called from any thread."""
