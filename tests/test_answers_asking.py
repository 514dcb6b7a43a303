"""Search and new labels where the API at home is started for the question, and ends with it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from clip_home import write_towers
from clips import make_clip

NIGHTREEL = str(Path(sys.executable).with_name("nightreel"))


@dataclass(frozen=True)
class Home:
    """A folder with a database that a run has filled, and the weights that the run has used."""

    folder: Path
    weights: Path

    def start(self, *words: str, weights: Path | None = None) -> subprocess.Popen[str]:
        """A command that has no API but the one at home."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("NIGHTREEL_", "HF_"))}
        own = {
            "NIGHTREEL_MODEL_DIR": str(weights or self.weights),
            "NIGHTREEL_FEED_INTERVAL_S": "0.1",
            "HF_HUB_OFFLINE": "1",
        }
        return subprocess.Popen(
            [NIGHTREEL, *words, "--format", "json"],
            cwd=self.folder,
            env=kept | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def asked(self, *words: str, weights: Path | None = None) -> tuple[int, Any, str]:
        """Exit code, standard output read as one JSON text, and talk; nothing is left running."""
        process = self.start(*words, weights=weights)
        out, said = process.communicate(timeout=120)
        assert not left_behind(weights or self.weights)
        return process.returncode, json.loads(out) if out else None, said


def left_behind(weights: Path) -> list[str]:
    """Command lines of the processes that still serve these weights."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.fsencode(weights) in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def evening(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """One run over two clips, which are gone afterwards, so that nothing can decode them."""
    if not Path("/proc/self/environ").exists():
        pytest.skip("the processes of this machine cannot be looked at")
    folder = tmp_path_factory.mktemp("evening")
    home = Home(folder, write_towers(folder / "weights"))
    make_clip(folder / "one.mp4", [("red", 4), ("blue", 4)])
    make_clip(folder / "two.mp4", [("green", 4)])
    code, _, said = home.asked(
        "run", "one.mp4", "two.mp4", "--label", "a red dog", "--label", "a cat",
        "--engine", "clip", "--workers", "1",
    )  # fmt: skip
    assert code == 0, said
    for clip in folder.glob("*.mp4"):
        clip.unlink()
    return home


@pytest.fixture
def home(evening: Home, tmp_path: Path) -> Home:
    """The same, in a folder of the test's own."""
    shutil.copyfile(evening.folder / "nightreel.db", tmp_path / "nightreel.db")
    return Home(tmp_path, evening.weights)


def test_a_text_is_searched_by_an_api_that_is_started_for_it(home: Home) -> None:
    """Rows and nothing else are printed, the best first; the second time no API is needed, not
    even its weights."""
    code, rows, said = home.asked("search", "a red photo", "--top", "3", "--apart", "2s")
    assert code == 0, said
    assert [row["rank"] for row in rows] == [1, 2, 3]
    assert rows[0]["score"] >= rows[1]["score"] >= rows[2]["score"]
    nowhere = home.folder / "nowhere"
    again = home.asked("search", "a red photo", "--top", "3", "--apart", "2s", weights=nowhere)
    assert again[:2] == (0, rows), again[2]


def test_new_labels_are_embedded_by_an_api_that_is_started_for_them(home: Home) -> None:
    """The new job is complete and says so; the old one stands beside it; asked again, the labels
    are known and no API is needed."""
    words = ("relabel", "1", "--label", "a photo", "--label", "a red cat", "--label", "dog")
    code, rows, said = home.asked(*words)
    assert code == 0, said
    assert {Path(row["video"]).name for row in rows} == {"one.mp4", "two.mp4"}
    assert {row["state"] for row in rows} == {"complete"}
    assert "job 2 (new)" in said
    code, again, said = home.asked(*words, weights=home.folder / "nowhere")
    assert (code, again) == (0, rows), said
    assert "job 2 (known)" in said
    code, old, said = home.asked("summary", "--job", "1")
    assert code == 0, said
    assert {label["label"] for row in old for label in row["labels"]} <= {
        "a red dog", "a cat", "unknown",
    }  # fmt: skip


def test_weights_that_are_gone_are_an_api_that_cannot_be_reached(home: Home) -> None:
    """One line names the model and the remedy; nothing is printed, nothing is written."""
    gone = home.folder / "nowhere"
    for words in (("search", "a dog"), ("relabel", "1", "--label", "dog", "--label", "cat")):
        code, rows, said = home.asked(*words, "--engine", "clip", weights=gone)
        assert (code, rows) == (12, None), said
        assert len(said.strip().splitlines()) == 1
        assert "Traceback" not in said
    code, jobs, said = home.asked("jobs")
    assert (code, len(jobs)) == (0, 1), said


def test_an_interrupted_question_leaves_no_api_behind(home: Home) -> None:
    """Ctrl-C while the API starts ends both, with 130."""
    process = home.start("search", "a cat")
    deadline = time.monotonic() + 60
    while not any("clipserver --" in line for line in left_behind(home.weights)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), said
    assert "Traceback" not in said
    assert not left_behind(home.weights)
