"""CLIP towers quantised to int8: close to the exact ones, made once, and known by another name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from clip_home import SIDE, WORDS, environment, write_towers
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from clipserver.engines import EngineUnavailableError, hub
from clipserver.engines.clip import ClipEngine

INNER = 256
AGREEMENT = 0.995
"""Lowest cosine of an int8 vector with its fp32 twin."""


def deepen(path: Path, layers: int = 4) -> None:
    """Put a stack of matrix products with residuals behind a tower's output, in random weights."""
    tower = onnx.load(path)
    chance = np.random.default_rng(len(path.name))
    graph = tower.graph
    out = graph.output[0].name
    width = graph.output[0].type.tensor_type.shape.dim[1].dim_value
    graph.node[-1].output[0] = x = "shallow"
    for layer in range(layers):
        shapes = {"up": (width, INNER), "down": (INNER, width)}
        for name, shape in shapes.items():
            weights = (chance.normal(size=shape) / shape[0] ** 0.5).astype(np.float32)
            graph.initializer.append(numpy_helper.from_array(weights, f"{name}{layer}"))
        y = out if layer == layers - 1 else f"deep{layer}"
        graph.node.extend(
            [
                helper.make_node("MatMul", [x, f"up{layer}"], [f"wide{layer}"]),
                helper.make_node("Tanh", [f"wide{layer}"], [f"bent{layer}"]),
                helper.make_node("MatMul", [f"bent{layer}", f"down{layer}"], [f"added{layer}"]),
                helper.make_node("Add", [x, f"added{layer}"], [y]),
            ]
        )
        x = y
    onnx.checker.check_model(tower)
    onnx.save(tower, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_towers(tmp_path_factory.mktemp("clip") / "deep")
    for tower in sorted((folder / "onnx").iterdir()):
        deepen(tower)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nightreel" / "int8"


def engine(folder: Path, *, int8: bool) -> ClipEngine:
    located = hub.in_folder(folder, int8=int8)
    return ClipEngine(located.description, located.fetch(), threads=1)


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(axis=1) / lengths


def test_vectors_stay_close_to_the_exact_ones(folder: Path, cache: Path) -> None:
    """Pictures and texts keep a cosine of 0.995 with what fp32 gives, and are not the same."""
    exact, coarse = engine(folder, int8=False), engine(folder, int8=True)
    pictures = np.random.default_rng(0).integers(0, 256, (16, SIDE, SIDE, 3), dtype=np.uint8)
    texts = list(WORDS[2:-1])
    for ours, theirs in (
        (coarse.embed_images(pictures), exact.embed_images(pictures)),
        (coarse.embed_texts(texts), exact.embed_texts(texts)),
    ):
        assert cosines(ours, theirs).min() > AGREEMENT
        assert not np.array_equal(ours, theirs)


def test_matrix_weights_are_int8_and_nothing_else(folder: Path, cache: Path) -> None:
    """Every matrix product of the tower is one of integers; the token table stays as it was."""
    files = hub.in_folder(folder, int8=True).fetch()
    for tower in (files.vision, files.text):
        kinds = {node.op_type for node in onnx.load(tower).graph.node}
        assert "MatMulInteger" in kinds
        assert "MatMul" not in kinds
    tables = {w.name: w.data_type for w in onnx.load(files.text).graph.initializer}
    assert tables["table"] == TensorProto.FLOAT


def test_a_tower_is_quantised_once(folder: Path, cache: Path) -> None:
    """The second load reads what the first one wrote; other weights get files of their own."""
    first = hub.in_folder(folder, int8=True).fetch()
    assert {path.parent for path in (first.vision, first.text)} == {cache}
    written = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(written) == 2
    assert hub.in_folder(folder, int8=True).fetch() == first
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == written


def test_int8_has_a_name_of_its_own(folder: Path, cache: Path) -> None:
    """Vectors of the two are never taken for each other's; naming them quantises nothing."""
    exact, coarse = (hub.in_folder(folder, int8=int8).description.model for int8 in (False, True))
    assert exact.replace("@", "-int8@") == coarse
    assert not cache.exists()


def test_quantised_files_serve_where_there_are_no_others(
    folder: Path, cache: Path, tmp_path: Path
) -> None:
    """A folder of quantised towers alone is used as it is; as exact ones it is refused."""
    made = hub.in_folder(folder, int8=True).fetch()
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    shutil.copy(made.vision, shipped / "vision_model_quantized.onnx")
    shutil.copy(made.text, shipped / "text_model_quantized.onnx")
    shutil.copy(made.tokenizer, shipped)
    assert hub.in_folder(shipped, int8=True).fetch().vision.parent == shipped
    with pytest.raises(EngineUnavailableError, match=r"no vision_model\.onnx"):
        hub.in_folder(shipped, int8=False)


def test_what_cannot_be_quantised_is_one_clear_line(
    folder: Path, cache: Path, tmp_path: Path
) -> None:
    """A damaged tower ends the start with cause and file, and leaves nothing in the cache."""
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    tower = damaged / "onnx" / "vision_model.onnx"
    tower.write_bytes(tower.read_bytes()[:1000])
    with pytest.raises(EngineUnavailableError, match=r"vision_model\.onnx cannot be quantised: "):
        hub.in_folder(damaged, int8=True).fetch()
    assert list(cache.iterdir()) == []


def test_the_server_serves_int8(folder: Path, tmp_path: Path) -> None:
    """`--int8` starts without a word of the converter's, and says what it serves."""
    with subprocess.Popen(
        [sys.executable, "-m", "clipserver", "--model-dir", str(folder), "--int8", "--port", "0"],
        env={**environment(), "XDG_CACHE_HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        process.terminate()
        _, talk = process.communicate(timeout=30)
    assert process.returncode == 0
    assert ready["model"].startswith("clip-deep-int8@")
    assert "quantising vision_model.onnx" in talk
    assert "WARNING" not in talk
