"""The morning after, by the installed command: asked of what a real run has left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from clips import make_clip
from contract_server import ContractServer, contract_server

NIGHTREEL = str(Path(sys.executable).with_name("nightreel"))


@dataclass(frozen=True)
class Morning:
    """A database that a run has filled, and the API that the run has used."""

    folder: Path
    api: ContractServer

    def asked(self, *words: str, api: bool = True) -> tuple[int, Any, str]:
        """Exit code, what a command prints as JSON, and its talk."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("NIGHTREEL_")}
        named = {"NIGHTREEL_API_URL": self.api.url} if api else {}
        done = subprocess.run(
            [NIGHTREEL, *words, "--format", "json"],
            cwd=self.folder,
            env=kept | named | {"NIGHTREEL_FEED_INTERVAL_S": "0.1"},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Morning]:
    """One run over two clips; the clips are gone in the morning, so nothing can decode them."""
    folder = tmp_path_factory.mktemp("night")
    make_clip(folder / "one.mp4", [("red", 6), ("blue", 6), ("red", 4)])
    make_clip(folder / "two.mp4", [("green", 5)])
    with contract_server() as api:
        morning = Morning(folder, api)
        code, _, said = morning.asked(
            "run", "one.mp4", "two.mp4", "--label", "red", "--label", "blue", "--workers", "1"
        )
        assert code == 0, said
        for clip in folder.glob("*.mp4"):
            clip.unlink()
        yield morning


@pytest.fixture
def morning(night: Morning, tmp_path: Path) -> Morning:
    """The same, in a folder of the test's own."""
    shutil.copyfile(night.folder / "nightreel.db", tmp_path / "nightreel.db")
    night.api.requests.clear()
    return Morning(tmp_path, night.api)


def test_a_search_asks_for_the_text_once(morning: Morning) -> None:
    """One call embeds the text; the second time nothing is called, and no API need be there."""
    code, rows, said = morning.asked("search", "a red square", "--top", "3", "--apart", "2s")
    assert code == 0, said
    assert len(rows) == 3
    assert [path for path, _, _ in morning.api.requests] == ["/clip/embed_text"]
    code, again, said = morning.asked(
        "search", "a red square", "--top", "3", "--apart", "2s", api=False
    )
    assert (code, again) == (0, rows), said
    assert len(morning.api.requests) == 1


def test_other_labels_send_no_picture_and_decode_nothing(morning: Morning) -> None:
    """New prompts ask for texts alone, with the videos themselves gone; the old job stays; the
    same command again calls nothing."""
    (morning.folder / "labels.yaml").write_text(
        "labels:\n- {name: sea, prompts: [the sea, a beach]}\n- {name: snow, threshold: 0.01, "
        "flag: slippery}\n"
    )
    before = morning.asked("summary", "--job", "1")[1]
    code, rows, said = morning.asked("relabel", "1", "--labels", "labels.yaml")
    assert code == 0, said
    assert [Path(row["video"]).name for row in rows] == ["one.mp4", "two.mp4"]
    assert {one["label"] for row in rows for one in row["labels"]} <= {"sea", "snow", "unknown"}
    assert {path for path, _, _ in morning.api.requests} == {"/clip/embed_text"}
    calls = len(morning.api.requests)
    code, again, _ = morning.asked("relabel", "1", "--labels", "labels.yaml", api=False)
    assert (code, again, len(morning.api.requests)) == (0, rows, calls)
    assert morning.asked("summary", "--job", "1")[1] == before
    assert morning.asked("summary", "--job", "2")[1] == rows
    status = morning.asked("status")[1]
    assert (status["job"], status["state"], status["image_calls"]) == (2, "closed", 0)
    assert morning.asked("flags", "--job", "2")[0] == 4


def test_new_labels_whose_flags_could_go_unseen_make_no_job(morning: Morning) -> None:
    """Five labels a frame are kept of the old job, so of more a low threshold is refused before
    anything is asked of the API."""
    rest = "".join(f"- label {at}\n" for at in range(6))
    (morning.folder / "many.yaml").write_text(f"- {{name: fire, threshold: 0.1}}\n{rest}")
    code, _, said = morning.asked("relabel", "1", "--labels", "many.yaml")
    assert (code, "keep 7 (`--top 7`" in said) == (2, True), said
    assert morning.api.requests == []
    assert [job["job"] for job in morning.asked("jobs")[1]] == [1]


def test_labels_picked_from_the_archive_need_no_api(morning: Morning) -> None:
    """Moments of the archive as labels: each second finds the colour that it is like."""
    code, rows, said = morning.asked(
        *("relabel", "1", "--like", "red=one.mp4@2s", "--like", "red=one.mp4@0:00:13"),
        *("--like", "blue=one.mp4@8s", "--like", "green=two.mp4@1"),
        api=False,
    )
    assert code == 0, said
    assert {Path(row["video"]).name: row["labels"][0]["label"] for row in rows} == {
        "one.mp4": "red",
        "two.mp4": "green",
    }
    scenes = morning.asked("scenes", "one.mp4")[1]
    assert [(one["label"], one["start_s"], one["end_s"]) for one in scenes] == [
        ("red", 0, 6), ("blue", 6, 12), ("red", 12, 16),
    ]  # fmt: skip
    assert morning.api.requests == []


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("relabel", "1"), 2, "one of --label, --labels and --like"),
        (("relabel", "9", "--label", "a", "--label", "b"), 2, "no job 9"),
        (("relabel", "9" * 20, "--label", "a", "--label", "b"), 2, "is not in the range"),
        (("relabel", "1", "--label", "a", "--label", "unknown"), 2, "would be taken for"),
        (("relabel", "1", "--like", "a=one.mp4@1s"), 2, "gives one label"),
        (("relabel", "1", "--like", "one.mp4"), 2, "write VIDEO@TIME"),
        (("relabel", "1", "--like", "=one.mp4@1s"), 2, "NAME=VIDEO@TIME"),
        (("relabel", "1", "--like", "a=one.mp4@99:00"), 2, "the video ends at 16.000 s"),
        (("relabel", "1", "--like", "a=one.mp4@soon"), 2, "no place in a video"),
        (("relabel", "1", "--like", "a=gone.mp4@1s"), 2, "no video"),
        (("relabel", "1", "--labels", "gone.yaml"), 2, "gone.yaml"),
        (("search",), 2, "give a TEXT"),
        (("search", "x", "--api", "http://127.0.0.1:1"), 12, "cannot be reached"),
        (("find", "hail"), 2, "only: red, blue"),
        (("highlights", "--label", "hail"), 2, "only: red, blue"),
        (("totals", "--plot", "x.pdf"), 2, ".png or .svg"),
        (("totals", "--plot", "gone/x.svg"), 2, "cannot be written"),
    ],
)
def test_mistakes_are_one_line(
    morning: Morning, words: tuple[str, ...], code: int, said: str
) -> None:
    """Every mistake ends with its code and one line that helps."""
    ended, _, err = morning.asked(*words)
    assert ended == code, err
    assert said in err
    assert "Traceback" not in err


def test_an_api_of_another_model_is_refused(morning: Morning) -> None:
    """Vectors of two models are not compared."""
    with contract_server(info={"model": "other@2", "input_size": 64}) as other:
        code, _, err = morning.asked("search", "snow", "--api", other.url)
    assert code == 12
    assert "other@2" in err
    assert [path for path, _, _ in other.requests if "embed" in path] == []
