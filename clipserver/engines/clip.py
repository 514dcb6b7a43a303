"""CLIP's picture and text towers through ONNX Runtime.

A. Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021),
as exported for transformers: a vision model of `pixel_values` and a text model of `input_ids`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

from clipserver.engines import Description, EngineUnavailableError, TextTooLongError
from clipserver.engines.hub import Files
from clipserver.engines.onnx_session import open_session

MAX_TOKENS = 77
"""What the text tower reads, the marks of start and end included."""

_MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)
_DEVIATION = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)
_SCALE = 1 / (255 * _DEVIATION)
_SHIFT = -_MEAN / _DEVIATION

Floats = NDArray[np.float32]


class ClipEngine:
    """A pair of towers read from files. EngineUnavailableError where they are no CLIP towers."""

    def __init__(self, description: Description, files: Files, threads: int) -> None:
        self.description = description
        try:
            self._vision = open_session(files.vision, threads)
            self._text = open_session(files.text, threads)
            self._tokenizer = ClipTokenizer(files.tokenizer)
            self._text_inputs = {given.name: given.shape for given in self._text.get_inputs()}
            side = description.input_size
            blank = np.zeros((1, side, side, 3), np.uint8)
            self.dimension = int(self.embed_images(blank).shape[1])
            text_dimension = int(self.embed_texts([""]).shape[1])
        # The runtime's and the tokenizer's errors have no base of their own.
        except Exception as error:
            cause = str(error).splitlines()[0]
            raise EngineUnavailableError(f"no CLIP in {files.vision.parent}: {cause}") from error
        if text_dimension != self.dimension:
            raise EngineUnavailableError(
                f"the towers in {files.vision.parent} are no pair: pictures have "
                f"{self.dimension} dimensions, texts {text_dimension}"
            )

    def embed_images(self, pictures: NDArray[np.uint8]) -> Floats:
        pixels = pictures * _SCALE + _SHIFT
        given = self._vision.get_inputs()[0].name
        return _run(self._vision, "image_embeds", {given: pixels.transpose(0, 3, 1, 2)})

    def embed_texts(self, texts: Sequence[str]) -> Floats:
        tokens = [self._tokenizer.tokens(text) for text in texts]
        fixed = self._text_inputs["input_ids"][1]
        width = fixed if isinstance(fixed, int) else max(map(len, tokens))
        # Filled up with the end mark: the tower reads its vector at the first one, and from there
        # it sees nothing that comes after.
        ids = np.array([row + [row[-1]] * (width - len(row)) for row in tokens], np.int64)
        mask = np.array([[1] * len(row) + [0] * (width - len(row)) for row in tokens], np.int64)
        known = {"input_ids": ids, "attention_mask": mask}
        return _run(self._text, "text_embeds", {name: known[name] for name in self._text_inputs})

    def check_text(self, text: str) -> None:
        self._tokenizer.tokens(text)


class ClipTokenizer:
    """CLIP's byte pair encoding from a `tokenizer.json`, which neither cuts nor fills up here."""

    def __init__(self, path: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def tokens(self, text: str) -> list[int]:
        """Token ids with the marks of start and end. TextTooLongError past 77."""
        ids: list[int] = self._tokenizer.encode(text).ids
        if len(ids) > MAX_TOKENS:
            raise TextTooLongError(
                f"a text has {len(ids)} tokens where the model reads {MAX_TOKENS}"
            )
        return ids


def _run(
    session: onnxruntime.InferenceSession, output: str, inputs: dict[str, NDArray[Any]]
) -> Floats:
    """The named output, or the only one a tower has."""
    names = [out.name for out in session.get_outputs()]
    (vectors,) = session.run([output if output in names else names[0]], inputs)
    return np.asarray(vectors, np.float32)
