"""Sentences as vectors: MiniLM, a small transformer, beside WordLlama's static token vectors.

The first knows what a sentence means, the second what its words are; joined, they place a prompt
better among the names of ImageNet's classes than either does alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from clipserver.engines import TextTooLongError

Floats = NDArray[np.float32]

MAX_TOKENS = 256
"""What MiniLM was trained to read, its two marks included."""

_LAYERS = 6
_HEADS = 12
_NORM_EPSILON = 1e-12


class SentenceEncoder:
    """all-MiniLM-L6-v2: a BERT of six layers, mean over tokens, unit length.

    Attention as in J. Devlin et al., "BERT" (2018). Sentences of one length are computed together,
    so that there is no padding to mask.
    """

    width = 384

    def __init__(self, tensors: dict[str, NDArray[Any]], tokenizer: bytes) -> None:
        self._tensors = tensors
        self._tokenizer = _tokenizer(tokenizer)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text with its two marks. TextTooLongError past the model's window."""
        ids: list[int] = self._tokenizer.encode(text).ids
        if len(ids) > MAX_TOKENS:
            raise TextTooLongError(
                f"a text has {len(ids)} tokens where the model reads {MAX_TOKENS}"
            )
        return ids

    def encode(self, texts: Sequence[str]) -> Floats:
        """N x 384 unit vectors, one a text."""
        vectors = np.empty((len(texts), self.width), np.float32)
        by_length: dict[int, list[int]] = {}
        ids = [self.tokens(text) for text in texts]
        for place, tokens in enumerate(ids):
            by_length.setdefault(len(tokens), []).append(place)
        for places in by_length.values():
            vectors[places] = self._transform(np.array([ids[place] for place in places]))
        return unit(vectors)

    def _transform(self, ids: NDArray[np.int64]) -> Floats:
        t = self._tensors
        x: Floats = (
            t["embeddings.word_embeddings.weight"][ids]
            + t["embeddings.position_embeddings.weight"][: ids.shape[1]]
            + t["embeddings.token_type_embeddings.weight"][0]
        )
        x = self._norm(x, "embeddings.LayerNorm")
        for index in range(_LAYERS):
            layer = f"encoder.layer.{index}"
            attended = self._attention(x, f"{layer}.attention.self")
            attended = self._linear(attended, f"{layer}.attention.output.dense")
            x = self._norm(x + attended, f"{layer}.attention.output.LayerNorm")
            widened = _gelu(self._linear(x, f"{layer}.intermediate.dense"))
            narrowed = self._linear(widened, f"{layer}.output.dense")
            x = self._norm(x + narrowed, f"{layer}.output.LayerNorm")
        mean: Floats = x.mean(axis=1)
        return mean

    def _attention(self, x: Floats, name: str) -> Floats:
        count, length, width = x.shape
        query, key, value = (
            self._linear(x, f"{name}.{part}")
            .reshape(count, length, _HEADS, width // _HEADS)
            .transpose(0, 2, 1, 3)
            for part in ("query", "key", "value")
        )
        scores = query @ key.transpose(0, 1, 3, 2) / np.float32(np.sqrt(width // _HEADS))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        mixed: Floats = (weights @ value).transpose(0, 2, 1, 3).reshape(count, length, width)
        return mixed

    def _linear(self, x: Floats, name: str) -> Floats:
        # One product of two matrices: numpy would make one of each sentence.
        flat = x.reshape(-1, x.shape[-1]) @ self._tensors[f"{name}.weight"].T
        y: Floats = flat.reshape(*x.shape[:-1], -1) + self._tensors[f"{name}.bias"]
        return y

    def _norm(self, x: Floats, name: str) -> Floats:
        centred = x - x.mean(axis=-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + _NORM_EPSILON)
        weight, bias = self._tensors[f"{name}.weight"], self._tensors[f"{name}.bias"]
        y: Floats = centred / scale * weight + bias
        return y


class WordVectors:
    """WordLlama's static vectors: a text is the mean of its tokens' vectors, at unit length."""

    width = 256

    def __init__(self, tensors: dict[str, NDArray[Any]], tokenizer: bytes) -> None:
        self._vectors = tensors["embedding.weight"]
        self._tokenizer = _tokenizer(tokenizer)

    def encode(self, texts: Sequence[str]) -> Floats:
        """N x 256 unit vectors, one a text; zero for a text without a token."""
        vectors = np.zeros((len(texts), self.width), np.float32)
        for row, text in zip(vectors, texts, strict=True):
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
            if ids:
                row[:] = self._vectors[ids].astype(np.float32).mean(axis=0)
        return unit(vectors)


def unit(vectors: Floats) -> Floats:
    """The rows at length one; a row of zeros stays as it is."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32, copy=False)


def _tokenizer(definition: bytes) -> Tokenizer:
    tokenizer = Tokenizer.from_str(definition.decode())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _gelu(x: Floats) -> Floats:
    """x times the normal distribution's mass below x; its error function by M. Abramowitz and
    I. Stegun, "Handbook of Mathematical Functions", 7.1.26 (error below 1.5e-7)."""
    z: Floats = np.abs(x) * np.float32(np.sqrt(0.5))
    t: Floats = np.reciprocal(1 + np.float32(0.3275911) * z)
    tail: Floats = np.full_like(t, 1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        tail = tail * t + np.float32(coefficient)
    error: Floats = np.copysign(1 - tail * t * np.exp(-z * z), x).astype(np.float32, copy=False)
    y: Floats = x * (1 + error) * np.float32(0.5)
    return y
