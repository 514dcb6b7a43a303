"""Puts the offline engine together: classifier, colours, sentences and their joint space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clipserver.engines.offline import colour, efficientnet, sources
from clipserver.engines.offline.space import DIMENSION, Space
from clipserver.engines.offline.text import Floats, SentenceEncoder, WordVectors
from clipserver.engines.offline.weights import read_checkpoint, read_safetensors
from clipserver.engines.onnx_session import open_session

_CLASSES = Path(__file__).with_name("imagenet_classes.txt")


class OfflineEngine:
    """An ImageNet classifier and sentence vectors behind the interface of CLIP.

    Loading takes about two seconds; EngineUnavailableError where the weights are not installed.
    """

    description = sources.DESCRIPTION
    dimension = DIMENSION

    def __init__(self, threads: int) -> None:
        tensors = read_checkpoint(sources.CLASSIFIER.read())
        self._sentences = SentenceEncoder(
            read_safetensors(sources.SENTENCES.read()), sources.SENTENCE_TOKENS.read()
        )
        words = WordVectors(read_safetensors(sources.WORDS.read()), sources.WORD_TOKENS.read())
        names = _CLASSES.read_text("utf-8").splitlines()
        self._space = Space(names, tensors["_fc.weight"], self._sentences, words)
        model = efficientnet.build(tensors, self.description.input_size)
        self._classifier = open_session(model, threads)

    def embed_images(self, pictures: NDArray[np.uint8]) -> Floats:
        logits, features = self._classifier.run(["logits", "features"], {"pictures": pictures})
        return self._space.pictures(logits, features, colour.shares(pictures))

    def embed_texts(self, texts: Sequence[str]) -> Floats:
        return self._space.texts(list(texts))

    def check_text(self, text: str) -> None:
        self._sentences.tokens(text)
