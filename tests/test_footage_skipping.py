"""Skipped duplicates and tiles through the whole job: results do not depend on how it was cut."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract_server import DIMENSION, contract_server
from footage_files import Picture, encode, scenery, x264

from storage import database, duplicates
from storage.duplicates import Skipped
from storage.scoring import picture_changes, similarities
from storage.search import search, vector_at
from storage.vectors import VideoVectors

NIGHTREEL = str(Path(sys.executable).with_name("nightreel"))
SAMPLES = (
    "select bucket, t_us, start_us, end_us, reused_from, audit_of from samples order by bucket"
)
PREDICTIONS = "select bucket, rank, label, similarity, confidence from predictions order by 1, 2"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """75 s at 4 frames a second: still for 35 s, moving for 20 s, still again."""
    folder = tmp_path_factory.mktemp("archive")
    pictures: list[Picture] = [scenery(0)] * 140
    pictures += [scenery(number * 31) for number in range(80)]
    pictures += [scenery(700)] * 80
    encode(folder / "half_still.mp4", pictures, rate=4, options=x264(gop=8))
    return folder


def run(
    folder: Path, archive: Path, url: str, *options: str, task_s: int = 60, workers: int = 1
) -> tuple[str, dict[str, list[Any]]]:
    """Run the job into the folder's database; its talk and its rows."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("NIGHTREEL_")}
    settings = {"NIGHTREEL_TASK_SECONDS": str(task_s), "NIGHTREEL_FEED_INTERVAL_S": "0.1"}
    folder.mkdir(exist_ok=True)
    process = subprocess.Popen(
        [
            *(NIGHTREEL, "run", str(archive), "--api", url, "--label", "red", "--label", "blue"),
            *("--workers", str(workers), "--format", "json", *options),
        ],
        cwd=folder,
        env=kept | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, talk = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, talk
    assert [row["analysed"] for row in json.loads(out)] == [1.0]
    with closing(sqlite3.connect(folder / "nightreel.db")) as results:
        return talk, {
            "samples": results.execute(SAMPLES).fetchall(),
            "predictions": results.execute(PREDICTIONS).fetchall(),
            "vectors": results.execute(
                "select dimension, vectors from embeddings order by bucket_start"
            ).fetchall(),
            "tasks": results.execute("select id from tasks").fetchall(),
        }


def test_skipping_does_not_depend_on_cuts_or_workers(archive: Path, tmp_path: Path) -> None:
    """With tasks of 2 s and two workers the rows are those of one task and one worker; a duplicate
    has the vector and the labels of its source, and was not sent."""
    options = "--skip-duplicates", "--audit-skips", "10%"
    with contract_server() as server:
        talk, one = run(tmp_path / "one", archive, server.url, *options, task_s=3600)
        sent = server.pictures()
        _talk, many = run(tmp_path / "many", archive, server.url, *options, task_s=2, workers=2)
    assert (len(one["tasks"]), len(many["tasks"])) == (1, 3)
    assert one["samples"] == many["samples"]
    assert one["predictions"] == many["predictions"]
    assert b"".join(v for _, v in one["vectors"]) == b"".join(v for _, v in many["vectors"])

    reused = {bucket: source for bucket, *_, source, _ in one["samples"] if source is not None}
    audited = [bucket for bucket, *_, audit in one["samples"] if audit is not None]
    assert len(one["samples"]) == 75
    assert len(reused) > 35
    assert 0 < len(audited) < 15
    assert 75 - len(reused) <= sent <= 75 - len(reused) + 2  # asks with two whether lists work
    vectors = np.frombuffer(one["vectors"][0][1], "<f2").reshape(75, -1)
    labels = dict.fromkeys(range(75), ())
    for bucket, *prediction in one["predictions"]:
        labels[bucket] += (tuple(prediction),)
    for bucket, source in reused.items():
        assert source < bucket
        assert source not in reused
        assert source // 30 == bucket // 30
        assert np.array_equal(vectors[bucket], vectors[source])
        assert labels[bucket] == labels[source]
    told = duplicates.skipped(database.connect(f"sqlite:///{tmp_path / 'one'}/nightreel.db"), 1)
    assert told == Skipped(75, len(reused), len(audited), 0)
    assert str(told) in talk


def test_other_labels_find_the_duplicates_again(archive: Path, tmp_path: Path) -> None:
    """A second job over stored vectors sends nothing, and knows which samples were reused; a job
    that skips nothing does not take a duplicate's vector for its own."""
    options = "--skip-duplicates", "--audit-skips", "10%"
    with contract_server() as server:
        _talk, first = run(tmp_path, archive, server.url, *options)
        sent = server.pictures()
        _talk, both = run(tmp_path, archive, server.url, *options, "--top", "1")
        assert server.pictures() == sent
        assert both["samples"] == sorted(first["samples"] * 2)
        run(tmp_path, archive, server.url)
        assert server.pictures() >= sent + 75


def test_tiles_score_by_the_best_square(archive: Path, tmp_path: Path) -> None:
    """Three squares a frame are sent, three vectors a sample are kept, and the similarity of a
    label is that of its best square; the cuts do not matter."""
    with contract_server() as server:
        _talk, one = run(tmp_path / "one", archive, server.url, "--fit", "tiles")
        assert 225 <= server.pictures() <= 227
        _talk, many = run(
            tmp_path / "many", archive, server.url, "--fit", "tiles", task_s=5, workers=2
        )
    assert one["predictions"] == many["predictions"]
    assert {dimension for dimension, _ in one["vectors"]} == {3 * DIMENSION}
    squares = np.frombuffer(b"".join(v for _, v in one["vectors"]), "<f2").reshape(75, 3, -1)
    assert np.allclose(np.linalg.norm(squares.astype(float), axis=2), 1, atol=2e-3)
    assert (squares[:, 0] != squares[:, 2]).any(axis=1).all()


def unit(rows: list[list[float]]) -> np.typing.NDArray[np.float16]:
    found = np.array(rows, np.float32)
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float16)


def test_answers_from_stored_vectors_take_the_best_square() -> None:
    """Labels, searches, pictures like another one and changes of picture, over samples of three
    squares each, beside a video with one square a sample."""
    squares = unit([[1, 0], [0, 1], [1, 1], [1, 0], [1, 0.1], [1, 0.2], [-1, 0], [0, -1], [-1, -1]])
    wide = squares.reshape(3, 6)
    labels = np.array([[1, 0], [0, 1]], np.float32)
    one_by_one = similarities(squares, labels).reshape(3, 3, 2).max(axis=1)
    assert np.array_equal(similarities(wide, labels), one_by_one)

    times = np.array([(b, b * 10**7, b * 10**7, (b + 1) * 10**7) for b in range(3)], np.int64)
    tiled = VideoVectors(1, "first@1", "tiles", times, [wide])
    plain = VideoVectors(1, "first@1", "crop", times, [unit([[-1, 0]]), unit([[-1, 0], [0, 1]])])
    hits = search([tiled, plain], labels[1], top=1)
    assert [(hit.video_id, hit.t_us, hit.score) for hit in hits] == [(1, 0, 1.0)]
    at_us, vector = vector_at(tiled, 10_000_001)
    assert at_us == 10_000_000
    assert vector.shape == (2,)
    assert abs(np.linalg.norm(vector.astype(float)) - 1) < 1e-3

    still = picture_changes([wide[:1], np.concatenate([wide[:1], -wide[:1]])])
    assert np.allclose(still, [0, 0, 2], atol=2e-3)
