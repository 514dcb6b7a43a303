"""One vector space for pictures and texts, joined without training from a classifier and sentences.

A picture's meaning is the mean of two estimates in the space of texts: its class probabilities'
mean of class-name vectors (ConSE: M. Norouzi et al., "Zero-Shot Learning by Convex Combination of
Semantic Embeddings", 2013), and a ridge map, closed form, that carries each class's weight row to
its name's vector and so the picture's activations to a place between names.

A vector is laid out as [meaning | colours | shared | own | looks] and has length one:

- meaning and colours are what a picture and a text have in common, weighed so that 100 x cosine
  over a label set gives confidences near the share of right answers;
- shared is a constant that lifts picture-text cosines to CLIP's usual 0.1 to 0.35;
- own stands for the picture in pictures, for the text in texts: it fills the length up to one;
- looks is the picture's place in the classifier's own space and zero for a text. So two pictures
  are compared by how they look, which is finer than what their nearest names say, and labels given
  by example pictures are this space's strong side.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from clipserver.engines.offline import colour
from clipserver.engines.offline.text import Floats, SentenceEncoder, WordVectors, unit

LOOKS = 256
_COLOURS = len(colour.CONCEPTS)
_MEANING = SentenceEncoder.width + WordVectors.width
DIMENSION = _MEANING + _COLOURS + 3 + LOOKS

_TEMPERATURE = 1.5  # of the class probabilities: names of the runners-up count, too
_RIDGE = 1.0  # against weight rows of length one
_GATE = 20.0  # per unit of cosine: how sharply indoors silences the colours

# Shares of the squared length. Measured on hand-labelled frames of sixteen real clips: a slope of
# 16 per unit of cosine in meaning had the least log loss for four of five label sets.
_MEANING_SHARE = 0.16
_COLOUR_SHARE = 0.3 * _MEANING_SHARE
_LOOKS_SHARE = 0.2
_PICTURE_SHARED = 0.75  # sides, not shares: their product is the cosine of an unrelated pair
_TEXT_SHARED = 0.27

# Cosine to a colour's words below which a prompt does not speak of it, and from which it does.
_SILENT, _SPOKEN = 0.3, 0.7


class Space:
    """Maps classifier outputs and texts into the joint space.

    `names` are the class names, `weights` (classes x features) the classifier's last layer. Takes
    seconds: every class name is encoded.
    """

    def __init__(
        self,
        names: list[str],
        weights: Floats,
        sentences: SentenceEncoder,
        words: WordVectors,
    ) -> None:
        self._sentences = sentences
        self._words = words
        named = self._joined(names)
        self._mean = named.mean(axis=0)
        self._named = named - self._mean
        # What all classes share decides between none of them.
        rows = weights - weights.mean(axis=0)
        self._ridge = _ridge(unit(rows), self._named)
        self._looks = _principal(rows, LOOKS)
        self._inside_out = np.subtract(*self._meaning(["outdoors", "indoors"]))
        concepts = [word for concept in colour.CONCEPTS for word in concept]
        self._concepts = self._meaning(concepts).reshape(_COLOURS, -1, _MEANING)

    def pictures(self, logits: Floats, features: Floats, colours: Floats) -> Floats:
        """N x DIMENSION unit vectors from the classifier's outputs and `colour.shares`."""
        likely = np.exp((logits - logits.max(axis=1, keepdims=True)) / _TEMPERATURE)
        likely /= likely.sum(axis=1, keepdims=True)
        meaning = unit(unit(likely @ self._named) + unit(features @ self._ridge))
        outdoors = 1 / (1 + np.exp(-_GATE * (meaning @ self._inside_out)))
        looks = unit(features @ self._looks)
        vectors = np.zeros((len(logits), DIMENSION), np.float32)
        self._fill(vectors, meaning, outdoors[:, None] * colours)
        vectors[:, -LOOKS:] = looks * np.float32(np.sqrt(_LOOKS_SHARE))
        return _complete(vectors, _PICTURE_SHARED, own=1)

    def texts(self, texts: list[str]) -> Floats:
        """N x DIMENSION unit vectors."""
        meaning = self._meaning(texts)
        nearest = np.einsum("td,cwd->tcw", meaning, self._concepts).max(axis=2)
        spoken = np.clip((nearest - _SILENT) / (_SPOKEN - _SILENT), 0, 1)
        vectors = np.zeros((len(texts), DIMENSION), np.float32)
        self._fill(
            vectors, meaning, spoken / np.maximum(1, np.linalg.norm(spoken, axis=1))[:, None]
        )
        return _complete(vectors, _TEXT_SHARED, own=2)

    def _fill(self, vectors: Floats, meaning: Floats, colours: Floats) -> None:
        vectors[:, :_MEANING] = meaning * np.float32(np.sqrt(_MEANING_SHARE))
        vectors[:, _MEANING : _MEANING + _COLOURS] = colours * np.float32(np.sqrt(_COLOUR_SHARE))

    def _joined(self, texts: list[str]) -> Floats:
        both = [self._sentences.encode(texts), self._words.encode(texts)]
        return unit(np.concatenate(both, axis=1))

    def _meaning(self, texts: list[str]) -> Floats:
        return unit(self._joined(texts) - self._mean)


def _complete(vectors: Floats, shared: float, own: int) -> Floats:
    """Set the constant and, at `own` places after it, what is missing to length one."""
    place = _MEANING + _COLOURS
    vectors[:, place] = shared
    vectors[:, place + own] = np.sqrt(1 - (vectors**2).sum(axis=1))
    return vectors


def _ridge(rows: Floats, targets: Floats) -> Floats:
    """The map M, features x width, that minimises |rows M - targets|^2 + _RIDGE |M|^2."""
    gram = rows @ rows.T + np.float32(_RIDGE) * np.eye(len(rows), dtype=np.float32)
    solved: Floats = rows.T @ np.linalg.solve(gram, targets)
    return solved


def _principal(rows: Floats, count: int) -> Floats:
    """features x count: the rows' main directions, each scaled by the root of its singular value.

    In double precision and with fixed signs, so that every machine finds the same vectors.
    """
    exact = rows.astype(np.float64)
    values, left = np.linalg.eigh(exact @ exact.T)
    values, left = values[::-1][:count], left[:, ::-1][:, :count]
    directions = exact.T @ left / np.sqrt(values)
    largest = np.abs(directions).argmax(axis=0)
    signs = np.sign(directions[largest, np.arange(count)])
    scaled: NDArray[np.float64] = directions * signs * values**0.25
    return scaled.astype(np.float32)
