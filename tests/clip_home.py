"""CLIP towers of random weights in a folder, and the API at home that serves them in a process."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import requests
import tokenizers
import uvicorn
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from clipserver.app import create_app
from clipserver.engines import Engine
from clipserver.settings import Settings

SIDE = 64
POOL = 16
WIDTH = 3 * (SIDE // POOL) ** 2
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
WORDS = ("<|startoftext|>", "<unk>", "a", "dog", "cat", "photo", "of", "red", "<|endoftext|>")


def vision_tower() -> onnx.ModelProto:
    """Means of square patches: what the server's preprocessing did can be read off."""
    nodes = [
        helper.make_node("AveragePool", ["pixel_values"], ["p"], kernel_shape=[POOL] * 2,
                         strides=[POOL] * 2),
        helper.make_node("Flatten", ["p"], ["image_embeds"]),
    ]  # fmt: skip
    pixels = helper.make_tensor_value_info(
        "pixel_values", TensorProto.FLOAT, ["n", 3, "height", "width"]
    )
    return model(nodes, [pixels], "image_embeds", [])


def text_tower() -> onnx.ModelProto:
    """Running sums of token vectors, read at the first end mark: causal, as CLIP's text tower."""
    table = np.random.default_rng(1).normal(size=(len(WORDS), WIDTH)).astype(np.float32)
    constants = [
        numpy_helper.from_array(table, "table"),
        numpy_helper.from_array(np.array(1), "axis"),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["vectors"]),
        helper.make_node("CumSum", ["vectors", "axis"], ["sums"]),
        helper.make_node("ArgMax", ["input_ids"], ["end"], axis=1, keepdims=1),
        helper.make_node("GatherND", ["sums", "end"], ["text_embeds"], batch_dims=1),
    ]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["n", "length"])
    return model(nodes, [ids], "text_embeds", constants)


def model(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    output: str,
    constants: list[onnx.TensorProto],
) -> onnx.ModelProto:
    out = helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n", WIDTH])
    graph = helper.make_graph(nodes, output, inputs, [out], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def write_towers(folder: Path) -> Path:
    """A folder laid out as the hub's exports are."""
    (folder / "onnx").mkdir(parents=True)
    onnx.save(vision_tower(), folder / "onnx" / "vision_model.onnx")
    onnx.save(text_tower(), folder / "onnx" / "text_model.onnx")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[(w, WORDS.index(w)) for w in (WORDS[0], WORDS[-1])],
    )
    # As shipped, CLIP's tokenizer cuts and pads; the server must do neither.
    tokenizer.enable_truncation(77)
    tokenizer.enable_padding(length=77)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "preprocessor_config.json").write_text(json.dumps({"crop_size": {"height": SIDE}}))
    return folder


@dataclass
class Server:
    """A server in a process of its own."""

    url: str
    ready: dict[str, str]
    process: subprocess.Popen[str]
    log: Path

    def post(self, route: str, **body: Any) -> requests.Response:
        return requests.post(self.url + route, json=body, timeout=30)

    def get(self, route: str) -> requests.Response:
        return requests.get(self.url + route, timeout=30)

    def stop(self) -> tuple[int, str]:
        """Exit code after SIGTERM, and what was still said on standard output."""
        self.process.send_signal(signal.SIGTERM)
        said, _ = self.process.communicate(timeout=30)
        return self.process.returncode, said


def environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("NIGHTREEL_", "HF_"))}
    return {**kept, "HF_HUB_OFFLINE": "1"}


def start(folder: Path, log: Path, *options: str) -> Server:
    return start_with(("--model-dir", str(folder), *options), {}, log)


def start_with(options: Sequence[str], variables: dict[str, str], log: Path) -> Server:
    command = [sys.executable, "-m", "clipserver", "--port", "0", *options]
    with log.open("w") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True,
            env={**environment(), **variables},
        )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, log.read_text()
    ready = json.loads(line)
    return Server(ready["url"], ready, process, log)


@contextmanager
def served_here(
    engine: Engine, settings: Settings, api_key: str | None = None, grace_s: int | None = None
) -> Iterator[str]:
    """Address of a server in this process, so that a test can hold its engine. On leaving it waits
    `grace_s` for requests that are still being served, or until they end."""
    started = threading.Event()

    class Here(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            started.set()

    app = create_app(engine, settings, api_key)
    server = Here(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=grace_s))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            assert started.wait(30)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
    assert not thread.is_alive()


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> dict[str, str]:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"type": "base64", "value": base64.b64encode(buffer.getvalue()).decode()}


def picture(width: int = SIDE, height: int = SIDE, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def expected(image: Image.Image) -> np.ndarray:
    """The vision tower's answer by the contract's preprocessing, written down once more."""
    width, height = image.size
    scale = SIDE / min(width, height)
    resized = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = round((resized.width - SIDE) / 2), round((resized.height - SIDE) / 2)
    cut = resized.crop((left, top, left + SIDE, top + SIDE))
    x = (np.asarray(cut, np.float64) / 255 - MEAN) / DEVIATION
    patches = x.reshape(SIDE // POOL, POOL, SIDE // POOL, POOL, 3).mean(axis=(1, 3))
    return patches.transpose(2, 0, 1).ravel()
