"""What int8 gains and loses: a CLIP picture tower in fp32 and dynamically quantised.

    python benchmarks/int8.py [TOWER.onnx] [--threads 1] [--seconds 10] [--batch 8]

Without a tower one of ViT-B/32's architecture is built with random weights: good for the time, and
for how closely the vectors agree, but not for how often labels change, which real weights decide.
The two are run in turns on the same random pictures; medians of the turns are printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from clipserver.engines.int8 import quantised
from clipserver.engines.onnx_session import open_session

SIDE, PATCH, WIDTH, LAYERS, HEADS, DIMENSION = 224, 32, 768, 12, 12, 512
TURNS = 7


class Graph:
    """Nodes and random weights, in the order in which they are added."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._chance = np.random.default_rng(0)

    def add(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name, **attributes))
        return name

    def constant(self, value: np.ndarray) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def weights(self, *shape: int, scale: float) -> str:
        return self.constant((self._chance.normal(size=shape) * scale).astype(np.float32))

    def linear(self, x: str, given: int, out: int) -> str:
        product = self.add("MatMul", x, self.weights(given, out, scale=given**-0.5))
        return self.add("Add", product, self.weights(out, scale=0.02))

    def norm(self, x: str) -> str:
        ones, zeros = np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)
        given = (x, self.constant(ones), self.constant(zeros))
        return self.add("LayerNormalization", *given, axis=-1, epsilon=1e-5)

    def heads(self, x: str, order: list[int]) -> str:
        split = self.constant(np.array([0, 0, HEADS, WIDTH // HEADS]))
        return self.add("Transpose", self.add("Reshape", x, split), perm=order)

    def attention(self, x: str) -> str:
        query, key, value = (self.linear(x, WIDTH, WIDTH) for _ in range(3))
        scores = self.add("MatMul", self.heads(query, [0, 2, 1, 3]), self.heads(key, [0, 2, 3, 1]))
        scale = self.constant(np.array((WIDTH // HEADS) ** -0.5, np.float32))
        shares = self.add("Softmax", self.add("Mul", scores, scale), axis=-1)
        mixed = self.add("MatMul", shares, self.heads(value, [0, 2, 1, 3]))
        joined = self.constant(np.array([0, 0, WIDTH]))
        back = self.add("Reshape", self.add("Transpose", mixed, perm=[0, 2, 1, 3]), joined)
        return self.linear(back, WIDTH, WIDTH)

    def mlp(self, x: str) -> str:
        wide = self.linear(x, WIDTH, 4 * WIDTH)
        slope = self.constant(np.array(1.702, np.float32))
        gate = self.add("Sigmoid", self.add("Mul", wide, slope))
        return self.linear(self.add("Mul", wide, gate), 4 * WIDTH, WIDTH)


def random_tower(path: Path) -> None:
    """Write a ViT of CLIP's shape: `pixel_values` N x 3 x 224 x 224 to `image_embeds` N x 512.

    A. Radford et al., "Learning Transferable Visual Models From Natural Language Supervision"
    (2021), with A. Dosovitskiy et al., "An Image is Worth 16x16 Words" (2020).
    """
    graph = Graph()
    kernel = graph.weights(WIDTH, 3, PATCH, PATCH, scale=(3 * PATCH**2) ** -0.5)
    patches = graph.add("Conv", "pixel_values", kernel, strides=[PATCH] * 2)
    flat = graph.add("Reshape", patches, graph.constant(np.array([0, WIDTH, -1])))
    rows = graph.add("Transpose", flat, perm=[0, 2, 1])
    tokens = (SIDE // PATCH) ** 2 + 1
    padded = graph.add("Pad", rows, graph.constant(np.array([0, 1, 0, 0, 0, 0])))
    x = graph.norm(graph.add("Add", padded, graph.weights(tokens, WIDTH, scale=0.5)))
    for _ in range(LAYERS):
        x = graph.add("Add", x, graph.attention(graph.norm(x)))
        x = graph.add("Add", x, graph.mlp(graph.norm(x)))
    first = graph.add("Gather", x, graph.constant(np.array(0)), axis=1)
    projection = graph.weights(WIDTH, DIMENSION, scale=WIDTH**-0.5)
    vector = graph.add("MatMul", graph.norm(first), projection)
    graph.nodes.append(helper.make_node("Identity", [vector], ["image_embeds"]))
    pixels = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["n", 3, SIDE, SIDE])
    out = helper.make_tensor_value_info("image_embeds", TensorProto.FLOAT, ["n", DIMENSION])
    made = helper.make_graph(graph.nodes, "tower", [pixels], [out], graph.constants)
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(made, opset_imports=opset, ir_version=9), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tower", nargs="?", type=Path, help="a vision_model.onnx")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each of the two")
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        tower = options.tower or Path(folder, "random.onnx")
        if options.tower is None:
            random_tower(tower)
        begun = time.monotonic()
        twin = quantised(tower)
        made_s = time.monotonic() - begun
        print(f"{tower.stat().st_size / 1e6:.0f} MB -> {twin.stat().st_size / 1e6:.0f} MB")
        print(f"made in {made_s:.1f} s")
        compare(tower, twin, options.threads, options.batch, options.seconds)


def compare(tower: Path, twin: Path, threads: int, batch: int, seconds: float) -> None:
    sessions = [open_session(path, threads) for path in (tower, twin)]
    chance = np.random.default_rng(1)
    coarse = chance.normal(size=(batch, 3, 14, 14)).astype(np.float32)
    pixels = coarse.repeat(16, axis=2).repeat(16, axis=3)
    given = sessions[0].get_inputs()[0].name
    rates: list[list[float]] = [[], []]
    for _ in range(TURNS):
        for session, found in zip(sessions, rates, strict=True):
            session.run(None, {given: pixels})
            done, start = 0, time.monotonic()
            while time.monotonic() - start < seconds / TURNS:
                session.run(None, {given: pixels})
                done += batch
            found.append(done / (time.monotonic() - start))
    exact, coarser = (s.run(["image_embeds"], {given: pixels})[0] for s in sessions)
    lengths = np.linalg.norm(exact, axis=1) * np.linalg.norm(coarser, axis=1)
    cosines = (exact * coarser).sum(axis=1) / lengths
    fp32, int8 = map(statistics.median, rates)
    ratio = statistics.median(b / a for a, b in zip(*rates, strict=True))
    print(f"pictures/s, {threads} thread(s), batches of {batch}")
    print(f"  fp32 {fp32:.1f}   int8 {int8:.1f}   ratio {ratio:.2f}")
    print(f"cosine of int8 to fp32: lowest {cosines.min():.4f}, mean {cosines.mean():.4f}")


if __name__ == "__main__":
    main()
