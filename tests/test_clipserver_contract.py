"""The API at home on the wire, served by CLIP towers of random weights."""

from __future__ import annotations

import hashlib
import http.server
import importlib.util
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import requests
from clip_home import (
    SIDE,
    WIDTH,
    Server,
    encoded,
    environment,
    expected,
    picture,
    start,
    start_with,
    text_tower,
    write_towers,
)
from PIL import Image

from clipserver.__main__ import main
from clipserver.contract import Picture, PictureRefusal
from clipserver.engines.offline import sources
from clipserver.pictures import PictureReader

KEY = "key-that-nobody-may-see"


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_towers(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def server(towers: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start(towers, tmp_path_factory.mktemp("log") / "log", "--max-body-mb", "1",
                   "--max-megapixels", "0.5")  # fmt: skip
    yield server
    server.stop()


@pytest.fixture(scope="module")
def locked(towers: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("locked")
    (folder / "key").write_text(KEY + "\n")
    server = start(towers, folder / "log", "--api-key-file", str(folder / "key"))
    yield server
    server.stop()
    assert KEY not in server.log.read_text()


def embedding(server: Server, image: dict[str, str]) -> np.ndarray:
    answer = server.post("/clip/embed_image", image=image)
    assert answer.status_code == 200, answer.text
    (vector,) = answer.json()["embeddings"]
    return np.array(vector)


def cosine(a: Any, b: Any) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("size", [(64, 64), (160, 90), (90, 161), (33, 40), (640, 64)])
def test_preprocessing_is_clips_own(server: Server, size: tuple[int, int]) -> None:
    """Shorter side to n, bicubic, centre crop, mean and deviation: as Pillow and numpy have it."""
    image = picture(*size)
    assert np.abs(embedding(server, encoded(image)) - expected(image)).max() < 1e-5


@pytest.mark.parametrize("size", [(1, 1), (1, 1200), (1201, 1), (3, 600), (601, 4)])
def test_a_very_long_picture_is_cut_as_any_other(server: Server, size: tuple[int, int]) -> None:
    """The square comes from the very middle, though the ends were never enlarged."""
    image = picture(*size)
    assert np.abs(embedding(server, encoded(image)) - expected(image)).max() < 1e-3


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1)])
def test_a_thread_of_pixels_takes_no_more_than_its_middle(
    server: Server, size: tuple[int, int]
) -> None:
    """A few hundred bytes of a picture that would be a gigabyte once enlarged are answered at once;
    the server's memory hardly grows."""

    def peak_mb() -> float:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) / 1000

    before = peak_mb()
    embedding(server, encoded(Image.new("L", size, 200)))
    assert peak_mb() - before < 100


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_every_format_of_the_contract_is_read(server: Server, kind: str) -> None:
    """JPEG, PNG and WEBP give nearly the same vector."""
    image = picture()
    assert cosine(embedding(server, encoded(image, kind)), expected(image)) > 0.99


def test_orientation_is_applied_and_alpha_dropped(server: Server) -> None:
    """A picture that its tag turns is turned; transparency does not darken."""
    image = picture(80, 70)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = embedding(server, encoded(image, exif=exif.tobytes()))
    assert np.abs(turned - expected(image.transpose(Image.Transpose.ROTATE_270))).max() < 1e-5
    clear = image.copy()
    clear.putalpha(0)
    assert np.abs(embedding(server, encoded(clear)) - expected(image)).max() < 1e-5


def test_prefix_and_line_breaks_of_base64_are_accepted(server: Server) -> None:
    """A data prefix and newlines change nothing."""
    value = encoded(picture())["value"]
    broken = "\n".join(value[i : i + 76] for i in range(0, len(value), 76))
    for variant in (f"data:image/png;base64,{value}", broken):
        vector = embedding(server, {"type": "base64", "value": variant})
        assert np.abs(vector - expected(picture())).max() < 1e-5


def test_a_list_gives_as_many_vectors_in_order(server: Server) -> None:
    """N pictures of different sizes in, N vectors out; an empty list gives none."""
    images = [picture(64 + 7 * i, 70, seed=i) for i in range(11)]
    answer = server.post("/clip/embed_image", image=[encoded(image) for image in images])
    vectors = np.array(answer.json()["embeddings"])
    assert np.abs(vectors - [expected(image) for image in images]).max() < 1e-5
    assert server.post("/clip/embed_image", image=[]).json()["embeddings"] == []


def test_texts_embed_alike_alone_and_together(server: Server) -> None:
    """A text's vector does not depend on the longer texts beside it, nor on the cache."""
    texts = ["a dog", "a photo of a red cat", "dog", "a dog"]
    together = server.post("/clip/embed_text", text=texts).json()["embeddings"]
    for text, vector in zip(texts, together, strict=True):
        (alone,) = server.post("/clip/embed_text", text=text).json()["embeddings"]
        assert np.allclose(alone, vector, atol=1e-5)
    assert not np.allclose(together[0], together[1], atol=0.1)


def test_answers_have_all_fields_of_the_contract(server: Server) -> None:
    """Nulls are sent, and headers say what served."""
    for answer in (
        server.post("/clip/embed_text", text="dog"),
        server.post("/clip/compare", subject=encoded(picture()), prompt="dog"),
    ):
        body = answer.json()
        assert body["frame_id"] is None
        assert body["parent_id"] is None
        assert len(body["inference_id"]) == 36
        assert 0 < body["time"] < 30
        assert answer.headers["x-inference-engine"] == "clip"
        assert answer.headers["x-model-id"] == server.ready["model"]


def test_compare_gives_raw_cosines_in_the_prompts_shape(server: Server) -> None:
    """A list for a string or a list, more than eight allowed; an object for an object."""
    image = picture()
    texts = ["a dog", "a cat", "a photo of a dog", *(f"{'a ' * i}cat" for i in range(2, 10))]
    vectors = server.post("/clip/embed_text", text=texts).json()["embeddings"]
    wanted = [cosine(expected(image), vector) for vector in vectors]
    subject = encoded(image)
    listed = server.post("/clip/compare", subject=subject, prompt=texts).json()["similarity"]
    assert np.allclose(listed, wanted, atol=1e-5)
    single = server.post("/clip/compare", subject=subject["value"], prompt=texts[0])
    assert np.allclose(single.json()["similarity"], wanted[:1], atol=1e-5)
    named = server.post("/clip/compare", subject=subject, prompt={"y": texts[1], "x": texts[0]})
    assert list(named.json()["similarity"]) == ["y", "x"]
    assert named.json()["similarity"]["x"] == pytest.approx(wanted[0], abs=1e-5)


def test_compare_takes_either_kind_on_either_side(server: Server) -> None:
    """Text with text, text with pictures, pictures with pictures, and one picture as the prompt."""
    one, two = encoded(picture(seed=1)), encoded(picture(seed=2))
    pictures = {"subject": one, "prompt": [one, two["value"]], "prompt_type": "image"}
    same, other = server.post("/clip/compare", **pictures).json()["similarity"]
    assert same == pytest.approx(1, abs=1e-5)
    assert other < 0.99
    (alone,) = server.post("/clip/compare", **{**pictures, "prompt": two}).json()["similarity"]
    assert alone == pytest.approx(other, abs=1e-5)
    texts = {"subject": "a dog", "subject_type": "text", "prompt": ["a dog"]}
    assert server.post("/clip/compare", **texts).json()["similarity"] == pytest.approx([1])
    mixed = {"subject": "a dog", "subject_type": "text", "prompt_type": "image"}
    (there,) = server.post("/clip/compare", **mixed, prompt=one).json()["similarity"]
    (back,) = server.post("/clip/compare", subject=one, prompt="a dog").json()["similarity"]
    assert there == pytest.approx(back, abs=1e-5)


GOOD = encoded(picture())
CUT = {"type": "base64", "value": GOOD["value"][: len(GOOD["value"]) // 8 * 4]}
UNSAFE = {"type": "base64", "value": GOOD["value"].replace("+", "-").replace("/", "_") + "-_=="}


@pytest.mark.parametrize(
    ("route", "body", "status"),
    [
        ("embed_image", {}, 422),
        ("embed_image", {"image": 5}, 422),
        ("embed_text", {"text": 5}, 422),
        ("embed_text", {"text": "half a pair \ud800"}, 422),
        ("compare", {"subject": GOOD}, 422),
        ("compare", {"subject": GOOD, "prompt": "a", "prompt_type": "sound"}, 422),
        ("compare", {"subject": GOOD, "prompt": [GOOD]}, 400),
        ("embed_image", {"image": {"type": "base64", "value": ""}}, 400),
        ("embed_image", {"image": {"type": "base64", "value": "AAAA"}}, 400),
        ("embed_image", {"image": {"type": "base64", "value": "*"}}, 400),
        ("embed_image", {"image": UNSAFE}, 400),
        ("embed_image", {"image": CUT}, 400),
        ("embed_image", {"image": {"type": "numpy", "value": "AAAA"}}, 400),
        ("embed_image", {"image": {"type": "url", "value": "https://example.org/a.jpg"}}, 400),
        ("embed_image", {"image": encoded(picture(), "BMP")}, 400),
        ("embed_image", {"image": [GOOD, CUT]}, 400),
        ("embed_text", {"text": "dog " * 76}, 400),
        ("embed_text", {"text": "dog", "clip_version_id": "ViT-Z-1"}, 404),
        ("embed_text", {"text": "dog", "clip_version_id": "RN50", "other": [1]}, 200),
        ("embed_text", {"text": "dog " * 75, "clip_version_id": None}, 200),
    ],
)
def test_errors_are_the_contracts(
    server: Server, route: str, body: dict[str, Any], status: int
) -> None:
    """Each fault has its status, and a body that says what was wrong."""
    answer = server.post(f"/clip/{route}", **body)
    assert answer.status_code == status
    if status == 422:
        assert answer.json()["detail"][0]["loc"][0] == "body"
    elif status != 200:
        assert answer.json()["message"]
    if status == 400 and route == "embed_image":
        assert answer.json()["message"].startswith("Could not load input image. Cause: ")


def test_malformed_json_is_unprocessable(server: Server) -> None:
    """What is no JSON gets 422 with a detail, as a wrong shape does."""
    answer = requests.post(
        f"{server.url}/clip/embed_text", data="{", timeout=30,
        headers={"Content-Type": "application/json"},
    )  # fmt: skip
    assert answer.status_code == 422
    assert answer.json()["detail"]


def test_too_large_is_refused_before_it_is_read(server: Server) -> None:
    """A body past the limit gets 413, announced or not; a bomb of pixels gets 400."""
    body = json.dumps({"text": "x" * 1_000_001}).encode()
    headers = {"Content-Type": "application/json"}
    for data in (body, iter([body[:500_000], body[500_000:]])):
        answer = requests.post(
            f"{server.url}/clip/embed_text", data=data, headers=headers, timeout=30
        )
        assert answer.status_code == 413
    bomb = encoded(Image.new("1", (1000, 600)))
    answer = server.post("/clip/embed_image", image=bomb)
    assert answer.status_code == 400
    assert "500000 pixels" in answer.json()["message"]


def test_a_lists_pixels_are_bounded_together(server: Server) -> None:
    """Eight pictures as large as one may be are a list's most, however many smaller ones that is;
    a small one counts as the square that it becomes. More is 413."""
    large, tiny = encoded(Image.new("1", (1000, 500))), encoded(Image.new("1", (2, 2)))
    answer = server.post("/clip/embed_image", image=[large] * 8)
    assert len(answer.json()["embeddings"]) == 8
    compared = {"subject": large, "prompt_type": "image"}
    answers = [
        server.post("/clip/embed_image", image=[large] * 8 + [tiny]),
        server.post("/clip/embed_image", image=[tiny] * (4_000_000 // SIDE**2 + 1)),
        server.post("/clip/embed_image", image=[tiny] * (500_000 // SIDE**2 + 1) + [large] * 7),
        server.post("/clip/compare", **compared, prompt=[large] * 8 + [tiny]),
    ]
    assert {answer.status_code for answer in answers} == {413}
    assert all("4000000 pixels" in answer.json()["message"] for answer in answers)
    assert server.post("/clip/compare", **compared, prompt=[large]).status_code == 200


def test_no_bound_but_the_servers_own_stops_a_large_picture() -> None:
    """A server that allows 190 megapixels refuses one of 196 for that reason and no other."""
    reader = PictureReader(SIDE, max_pixels=190_000_000, max_bytes=10**6, allow_url=False)
    with pytest.raises(PictureRefusal, match="14000 x 14000 is more than the 190000000 pixels"):
        reader.read(Picture(**encoded(Image.new("1", (14_000, 14_000)))), reader.allowance(1))


@pytest.mark.parametrize(
    "path", ["/clip/embed_text/", "//clip/embed_text", "/clip//compare", "/no"]
)
def test_a_slash_too_many_is_not_forgiven(server: Server, path: str) -> None:
    """POST to anything but the exact path gets 405."""
    assert server.post(path, text="dog").status_code == 405


def test_health_and_model_routes_answer(server: Server) -> None:
    """Clients' health checks and the model routes get what they look for."""
    info = server.get("/info").json()
    assert {"name", "version", "uuid"} <= info.keys()
    assert info["engine"] == "clip"
    assert info["model"] == server.ready["model"]
    assert (info["input_size"], info["dimension"], info["notice"]) == (SIDE, WIDTH, None)
    assert server.get("/").status_code == 200
    assert server.get("/healthz").json() == {"status": "healthy"}
    assert server.get("/readiness").json() == {"status": "ready"}
    (entry,) = server.get("/model/registry").json()["models"]
    assert entry["model_id"] == server.ready["model"]
    assert server.post("/model/clear").status_code == 200
    assert server.get("/nothing").status_code == 404


def test_metrics_count_answers_by_route(server: Server) -> None:
    """Answers, batches and cache hits are counted; a stranger's paths make no new series."""
    server.get("/made/up")
    for _ in range(2):
        server.post("/clip/embed_text", text="photo of a photo")
    page = server.get("/metrics")
    assert page.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert 'clipserver_requests_total{route="/clip/embed_text",status="200"}' in page.text
    assert 'clipserver_held{kind="image"} 0' in page.text
    assert "/made/up" not in page.text
    (hits,) = [line for line in page.text.splitlines() if line.startswith("clipserver_text_cache")]
    assert int(hits.split()[1]) >= 1


def test_concurrent_requests_each_get_their_own_answer(server: Server) -> None:
    """Batched with strangers' pictures, a request still gets its own vector."""
    images = [picture(seed=i) for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        vectors = pool.map(lambda image: embedding(server, encoded(image)), images)
        for image, vector in zip(images, vectors, strict=True):
            assert np.abs(vector - expected(image)).max() < 1e-5


def test_the_key_is_asked_for_in_its_order(locked: Server) -> None:
    """Query before bearer before body: the first key that is present counts."""
    url = f"{locked.url}/clip/embed_text"

    def status(query: str = "", bearer: str = "", body: str | None = None) -> int:
        return requests.post(
            url,
            params={"api_key": query} if query else {},
            headers={"Authorization": f"Bearer {bearer}"} if bearer else {},
            json={"text": "dog", "api_key": body},
            timeout=30,
        ).status_code

    assert status() == 401
    assert [status(query=KEY), status(bearer=KEY), status(body=KEY)] == [200] * 3
    assert [status("no", KEY, KEY), status("", "no", KEY), status("", "", "no")] == [401] * 3
    assert [status(KEY, "no", "no"), status("", KEY, "no")] == [200] * 2
    assert locked.get("/healthz").status_code == 200
    assert locked.get("/model/registry").status_code == 401
    refused = requests.post(url, json={"text": "dog"}, timeout=30)
    assert "key" in refused.json()["message"]


def test_it_ends_cleanly_when_told_to(towers: Path, tmp_path: Path) -> None:
    """SIGTERM ends the server with exit code 0, having said one line on standard output."""
    server = start(towers, tmp_path / "log")
    assert server.ready.keys() == {"url", "engine", "model"}
    assert server.url.startswith("http://127.0.0.1:")
    assert server.post("/clip/embed_text", text="dog").status_code == 200
    assert server.stop() == (0, "")


def run(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "clipserver", *options], capture_output=True, text=True,
        timeout=60, check=False, env={**environment(), **variables},
    )  # fmt: skip


def test_describe_names_the_weights_it_would_serve(towers: Path, tmp_path: Path) -> None:
    """The model's name follows the weights, and the environment sets what an option does."""
    said = run("--describe", NIGHTREEL_MODEL_DIR=str(towers))
    first = json.loads(said.stdout)
    assert first["engine"] == "clip"
    assert first["input_size"] == SIDE
    assert first["notice"] is None
    other = write_towers(tmp_path / "tiny")
    changed = text_tower()
    changed.producer_name = "another"
    onnx.save(changed, other / "onnx" / "text_model.onnx")
    second = json.loads(run("--describe", "--model-dir", str(other)).stdout)
    assert first["model"].startswith("clip-tiny@")
    assert second["model"].startswith("clip-tiny@")
    assert first["model"] != second["model"]


def test_weights_in_the_hubs_cache_are_taken(tmp_path: Path) -> None:
    """A snapshot that was fetched once serves without the network, under its commit's name."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--tiny-clip"
    write_towers(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    said = run("--describe", "--model", "someone/tiny-clip", HF_HUB_CACHE=str(tmp_path))
    assert json.loads(said.stdout)["model"] == "tiny-clip@01234567"


def test_an_engine_that_cannot_be_had_is_one_clear_line(tmp_path: Path) -> None:
    """Exit code 12, nothing on standard output, cause and remedy on one line of talk."""
    for options in (
        ("--engine", "clip"),
        ("--engine", "clip", "--describe"),
        ("--model-dir", str(tmp_path)),
    ):
        said = run(*options, HF_HUB_CACHE=str(tmp_path))
        assert said.returncode == 12
        assert said.stdout == ""
        assert said.stderr.count("\n") == 1
        assert "no CLIP weights" in said.stderr


def test_a_service_never_takes_the_offline_engine_unasked(tmp_path: Path) -> None:
    """Without `--engine` it is CLIP or nothing, and the remedy is named, by the variable too, which
    is all that commands which start the server pass on; `auto` is asked for."""
    said = run("--describe", HF_HUB_CACHE=str(tmp_path))
    assert said.returncode == 12
    assert "--model-dir" in said.stderr
    assert "NIGHTREEL_MODEL_DIR" in said.stderr
    assert "--engine offline" in said.stderr
    if importlib.util.find_spec(sources.CLASSIFIER.package) is not None:
        for options, variables in (("--engine", "auto"), {}), ((), {"NIGHTREEL_ENGINE": "auto"}):
            said = run("--describe", *options, HF_HUB_CACHE=str(tmp_path), **variables)
            assert json.loads(said.stdout)["engine"] == "offline"


def test_an_address_that_is_taken_is_named(towers: Path) -> None:
    """Exit code 12, and one line that says which port it was and what to do."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        said = run("--model-dir", str(towers), "--port", str(port))
    assert said.returncode == 12
    assert said.stderr.count("\n") == 1
    assert f"127.0.0.1, port {port}: Address already in use" in said.stderr
    assert "--port" in said.stderr


def test_unusable_settings_are_named(towers: Path) -> None:
    """A wrong value is exit code 2 and names its option, without a traceback."""
    said = run("--engine", "quantum")
    assert said.returncode == 2
    assert said.stderr.startswith("clipserver: --engine: ")
    said = run("--model-dir", str(towers), "--api-key-file", "/nowhere/key")
    assert said.returncode == 12
    assert "Traceback" not in said.stderr
    said = run("--model-dir", str(towers), "--host", "..")
    assert said.returncode == 12
    assert said.stderr.startswith("clipserver: cannot listen on .., port 9001: ")


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--max-body-mb", ("inf", "nan", "1e305")),
        ("--max-megapixels", ("inf", "nan", "1e305")),
        ("--max-delay-ms", ("inf", "nan")),
        ("--threads", ("0", "99999999999")),
    ],
)
def test_a_limit_without_end_is_refused(
    option: str, values: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """What is no number of things that a machine may have ends with 2 and names the option."""
    for value in values:
        assert main([option, value]) == 2
        assert capsys.readouterr().err.startswith(f"clipserver: {option}: Input should be ")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff\xfe\x00abc", "UnicodeDecodeError"),
        (b"\n", "holds no key"),
        (b"one\nanother\n", "may hold the key alone"),
        (b"two words", "may hold the key alone"),
        ("\N{GREEK SMALL LETTER KAPPA}".encode(), "may hold the key alone"),
        (b"\xef\xbb\xbfmarked", "may hold the key alone"),
    ],
)
def test_a_key_that_no_client_could_send_is_refused(
    content: bytes, says: str, towers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 12 and one line that names the file and shows nothing of what is in it."""
    file = tmp_path / "file"
    file.write_bytes(content)
    assert main(["--model-dir", str(towers), "--api-key-file", str(file)]) == 12
    said = capsys.readouterr().err
    assert said.startswith("clipserver: ")
    assert said.count("\n") == 1
    assert str(file) in said
    assert says in said
    assert not any(word in said for word in ("another ke", "two words", "marked", "abc"))


class Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of the hub that fetching one model takes."""

    commit = "0123456789abcdef0123456789abcdef01234567"
    folder: Path

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name = self.path.partition(f"/resolve/{self.commit}/")[2]
        name = name or self.path.partition("/resolve/main/")[2]
        names = [p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*.*")]
        if "/tree/" in self.path:
            sizes = {name: (self.folder / name).stat().st_size for name in names}
            tree = [{"type": "file", "path": n, "size": s, "oid": n} for n, s in sizes.items()]
            body = json.dumps(tree).encode()
        elif self.path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in names]
            model = {"id": "someone/tiny", "sha": self.commit, "siblings": siblings}
            body = json.dumps(model).encode()
        elif name in names:
            body = (self.folder / name).read_bytes()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_weights_are_fetched_from_the_hub_once(tmp_path: Path) -> None:
    """A hub that answers is asked for the commit, then for the files; afterwards it may be gone."""
    Hub.folder = write_towers(tmp_path / "hub")
    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever).start()
    variables = {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    options = ("--model", "someone/tiny")
    try:
        assert json.loads(run("--describe", *options, **variables).stdout)["model"] == (
            "tiny@01234567"
        )
        server = start_with(options, variables, tmp_path / "log")
        assert server.get("/info").json()["input_size"] == SIDE
        assert server.ready["model"] == "tiny@01234567"
        assert server.post("/clip/embed_text", text="dog").status_code == 200
        server.stop()
    finally:
        hub.shutdown()
        hub.server_close()
    said = json.loads(run("--describe", *options, **variables).stdout)
    assert (said["engine"], said["model"]) == ("clip", "tiny@01234567")
