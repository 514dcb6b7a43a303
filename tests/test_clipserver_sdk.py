"""Roboflow's own client, unchanged, against the API at home.

The client (`pip install inference-sdk`, 650 MB) pins libraries that nothing here needs, so it runs
in an interpreter of its own: this one where it has the client, or the one that
NIGHTREEL_TEST_SDK_PYTHON names. Without either these tests are skipped, in CI too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clip_home import SIDE, WIDTH, Server, encoded, expected, picture, start, write_towers
from PIL import Image

PYTHON = os.environ.get("NIGHTREEL_TEST_SDK_PYTHON", sys.executable)
KEY = "key-that-nobody-may-see"

CLIENT = """
import json, os, sys
import numpy as np
from inference_sdk import InferenceConfiguration, InferenceHTTPClient
from inference_sdk.http.errors import HTTPCallErrorError
from PIL import Image

url, path, transport = sys.argv[1:4]
client = InferenceHTTPClient(url, api_key=os.environ.get("SDK_KEY"))
if transport:
    client.configure(InferenceConfiguration(api_key_transport=transport))
image = Image.open(path)
array = np.ascontiguousarray(np.asarray(image)[..., ::-1])  # BGR, as OpenCV has it

def refusal(ask):
    try:
        return [ask(), ""]
    except HTTPCallErrorError as error:
        return [error.status_code, str(error)]

print(json.dumps(eval(sys.stdin.read())))
"""


@pytest.fixture(scope="module", autouse=True)
def _the_client_is_there() -> None:
    """Skip where no interpreter has the client."""
    asked = [PYTHON, "-c", "import importlib.util as u; u.find_spec('inference_sdk') or exit(9)"]
    if subprocess.run(asked, check=False).returncode != 0:
        pytest.skip("Roboflow's client: pip install inference-sdk, or NIGHTREEL_TEST_SDK_PYTHON")


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_towers(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def server(towers: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start(towers, tmp_path_factory.mktemp("log") / "log")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def locked(towers: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("locked")
    (folder / "key").write_text(KEY)
    server = start(towers, folder / "log", "--api-key-file", str(folder / "key"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    picture().save(path)
    return path


def said(server: Server, file: Path, expression: str, key: str = "", transport: str = "") -> Any:
    """What an expression in `client`, `path`, `image` and `array` comes to in the client."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ROBOFLOW")}
    done = subprocess.run(
        [PYTHON, "-c", CLIENT, server.url, str(file), transport],
        input=expression,
        env={**kept, "PYTHONPATH": "", **({"SDK_KEY": key} if key else {})},
        cwd=file.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def cosines(server: Server, texts: list[str]) -> Any:
    answer = server.post("/clip/compare", subject=encoded(picture()), prompt=texts)
    return pytest.approx(answer.json()["similarity"], abs=0.01)  # the client sends JPEG


def test_clip_compare_works_with_every_kind_of_picture_and_prompt(
    server: Server, file: Path
) -> None:
    """Array, path and Pillow image; a text, a list, more than eight, an object; picture prompts."""
    texts = ["a dog", "a cat", *(f"{'a ' * n}red photo" for n in range(1, 9))]
    answers = said(
        server,
        file,
        f"""[client.clip_compare(subject=one, prompt={texts!r}) for one in (array, path, image)] + [
            client.clip_compare(subject=path, prompt="a dog"),
            client.clip_compare(subject=path, prompt={{"cat": "a cat", "dog": "a dog"}}),
            client.clip_compare(subject="a dog", subject_type="text", prompt={texts!r}),
            client.clip_compare(subject=array, prompt=[path, image], prompt_type="image"),
            client.clip_compare(subject=path, prompt=array, prompt_type="image"),
            client.clip_compare(subject=path, prompt=["a dog"], clip_version="RN50"),
        ]""",
    )
    wanted = cosines(server, texts)
    *kinds, single, named, from_text, pictures, picture_alone, other_version = (
        answer["similarity"] for answer in answers
    )
    assert kinds == [wanted] * 3
    assert single == cosines(server, ["a dog"])
    assert list(named) == ["cat", "dog"]
    assert list(named.values()) == cosines(server, ["a cat", "a dog"])
    assert from_text[0] == pytest.approx(1)
    assert pictures == pytest.approx([1, 1], abs=0.01)
    assert picture_alone == pytest.approx([1], abs=0.01)
    assert other_version == single


def test_embeddings_of_pictures_come_one_for_each(server: Server, file: Path) -> None:
    """One picture gives an object, three of different kinds give a list in their order."""
    one, several, halves = said(
        server,
        file,
        """[client.get_clip_image_embeddings(array),
            client.get_clip_image_embeddings([array, path, image]),
            client.get_clip_image_embeddings([array, array[:, ::-1].copy()])]""",
    )
    wanted = expected(picture())
    assert one["frame_id"] is None
    assert one["time"] > 0
    assert np.shape(one["embeddings"]) == (1, WIDTH)
    for answer in (one, *several, halves[0]):
        assert np.abs(np.array(answer["embeddings"][0]) - wanted).max() < 0.05
    mirrored = expected(picture().transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert np.abs(np.array(halves[1]["embeddings"][0]) - mirrored).max() < 0.05
    assert np.abs(mirrored - wanted).max() > 0.5


def test_embeddings_of_texts_are_the_servers(server: Server, file: Path) -> None:
    """One text or a list: the vectors that the server gives to anyone."""
    single, listed = said(
        server,
        file,
        """[client.get_clip_text_embeddings("a dog"),
            client.get_clip_text_embeddings(["a dog", "a cat"])]""",
    )
    vectors = server.post("/clip/embed_text", text=["a dog", "a cat"]).json()["embeddings"]
    assert np.allclose(single["embeddings"], vectors[:1], atol=1e-6)
    assert np.allclose(listed["embeddings"], vectors, atol=1e-6)


@pytest.mark.parametrize("transport", ["", "header", "legacy", "both"])
def test_the_key_is_taken_as_the_client_sends_it(
    locked: Server, file: Path, transport: str
) -> None:
    """Each of the client's ways to send a key opens all three routes."""
    calls = """[client.get_clip_text_embeddings("dog")["embeddings"],
                client.get_clip_image_embeddings(path)["embeddings"],
                client.clip_compare(path, "dog")["similarity"]]"""
    assert [len(answer) for answer in said(locked, file, calls, KEY, transport)] == [1, 1, 1]


def test_models_are_listed_and_cleared(server: Server, locked: Server, file: Path) -> None:
    """The client's two questions about models are answered; against a key too, where it sends one:
    in the way called legacy it clears without any key."""
    asked = """[[model.model_id for model in models.models]
                for models in (client.list_loaded_models(), client.unload_all_models())]"""
    assert said(server, file, asked) == [[server.ready["model"]]] * 2
    for transport in ("header", "both"):
        assert said(locked, file, asked, KEY, transport) == [[locked.ready["model"]]] * 2


@pytest.mark.parametrize("key", ["", "wrong-key"])
def test_a_refusal_reaches_the_clients_caller(locked: Server, file: Path, key: str) -> None:
    """A wrong or missing key is the client's error of a call, with 401 and our message."""
    calls = """[refusal(lambda: client.get_clip_text_embeddings("dog")),
                refusal(lambda: client.clip_compare(path, "dog"))]"""
    for status, text in said(locked, file, calls, key):
        assert status == 401
        assert "API key is missing or wrong" in text


def test_the_client_recognises_the_server(server: Server, file: Path) -> None:
    """The client's question who the server is gets its name, version and an identity."""
    name, version, identity = said(
        server, file, "(lambda i: [i.name, i.version, i.uuid])(client.get_server_info())"
    )
    assert name == "nightreel clipserver"
    assert version
    assert len(identity) == 36


def test_an_unreadable_picture_is_the_clients_error_of_a_call(server: Server, file: Path) -> None:
    """400 and the cause reach the caller; the server goes on."""
    file.with_name("broken.png").write_bytes(file.read_bytes()[:SIDE])
    status, text = said(server, file, "refusal(lambda: client.clip_compare('broken.png', 'dog'))")
    assert status == 400
    assert "Could not load input image" in text
