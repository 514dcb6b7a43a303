"""The main job by its installed command, with real children, on real H.264 files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from clips import make_clip
from contract_server import ContractServer, answer_with, contract_server

NIGHTREEL = str(Path(sys.executable).with_name("nightreel"))
RESULTS = (
    "select v.content_id, p.bucket, p.rank, p.label, p.similarity, p.confidence from predictions p "
    "join videos v on v.id = p.video_id order by 1, 2, 3"
)


@pytest.fixture
def api() -> Iterator[ContractServer]:
    with contract_server() as server:
        yield server


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    folder = tmp_path / "archive"
    folder.mkdir()
    make_clip(folder / "one.mp4", [("red", 4), ("blue", 5)])
    make_clip(folder / "two.mp4", [("green", 3)])
    return folder


def environment(**settings: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("NIGHTREEL_")}
    return kept | {"NIGHTREEL_TASK_SECONDS": "2", "NIGHTREEL_FEED_INTERVAL_S": "0.1"} | settings


def start(folder: Path, *arguments: str, **settings: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [NIGHTREEL, *arguments],
        cwd=folder,
        env=environment(**settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def nightreel(folder: Path, *arguments: str, **settings: str) -> tuple[int, str, str]:
    process = start(folder, *arguments, **settings)
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def classify(
    folder: Path, api: ContractServer, *more: str, **settings: str
) -> tuple[int, list[dict[str, Any]], str]:
    """Run the main job on the folder's archive; return exit code, rows and talk."""
    code, out, err = nightreel(
        folder,
        *("run", "archive", "--api", api.url, "--label", "red", "--label", "blue"),
        *("--workers", "2", "--format", "json", *more),
        **settings,
    )
    return code, json.loads(out) if out else [], err


def results(folder: Path) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(folder / "nightreel.db")) as database:
        return database.execute(RESULTS).fetchall()


def processes_of(folder: Path) -> list[int]:
    """Processes whose environment names this folder's database."""
    wanted = os.fsencode(folder / "nightreel.db")
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_until(condition: Any, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


def test_a_folder_is_classified_and_the_same_command_does_nothing_more(
    tmp_path: Path, archive: Path, api: ContractServer
) -> None:
    """Every second of every video is analysed; a second run makes no call; a new file is the only
    one that a third run reads."""
    code, rows, err = classify(tmp_path, api)
    assert code == 0, err
    assert [(Path(r["video"]).name, r["state"], r["analysed"]) for r in rows] == [
        ("one.mp4", "complete", 1.0),
        ("two.mp4", "complete", 1.0),
    ]
    assert [row["duration_s"] for row in rows] == [9.0, 3.0]
    assert len(results(tmp_path)) == (9 + 3) * 2
    calls = len(api.requests)
    again, same_rows, _ = classify(tmp_path, api)
    assert (again, same_rows) == (0, rows)
    assert len(api.requests) == calls
    make_clip(archive / "three.mp4", [("white", 2)])
    before = api.pictures()
    code, rows, _ = classify(tmp_path, api)
    assert code == 0
    assert len(rows) == 3
    asked_of_endpoint = 2 * 2  # each of two worker processes may ask once with two pictures
    assert api.pictures() - before <= 2 + asked_of_endpoint
    assert processes_of(tmp_path) == []


def test_bad_files_are_listed_with_their_reasons(
    tmp_path: Path, archive: Path, api: ContractServer
) -> None:
    """Text, nothing, half a file and odd names: exit 3, each bad file with its reason, each good
    one analysed."""
    (archive / "text.mp4").write_text("this is not a video")
    (archive / "empty.mp4").write_bytes(b"")
    whole = (archive / "one.mp4").read_bytes()
    (archive / "half.mp4").write_bytes(whole[: len(whole) // 2])
    odd = [b"with space \xc5\xbc.mp4", b"latin\xe9.mp4", b"new\nline.mp4"]
    for number, name in enumerate(odd):
        made = make_clip(tmp_path / f"{number}.mp4", [("white", 1 + number)])
        shutil.move(made, os.fsdecode(os.fsencode(archive) + b"/" + name))
    code, rows, err = classify(tmp_path, api)
    assert code == 3, err
    by_name = {Path(row["video"]).name: row for row in rows}
    assert {name: row["state"] for name, row in by_name.items()} == {
        "one.mp4": "complete",
        "two.mp4": "complete",
        "with space ż.mp4": "complete",
        "latin\\xe9.mp4": "complete",
        "new\\nline.mp4": "complete",
        "text.mp4": "rejected",
        "empty.mp4": "rejected",
        "half.mp4": "rejected",
    }
    for name in ("text.mp4", "empty.mp4", "half.mp4"):
        assert by_name[name]["reason"]


def test_a_mended_file_replaces_the_rejected_one(
    tmp_path: Path, archive: Path, api: ContractServer
) -> None:
    """A rejected file that was replaced, and one of a list that was missing, stand in the job as
    what they are now: everything is complete."""
    (archive / "one.mp4").write_bytes((archive / "two.mp4").read_bytes()[:1000])
    (tmp_path / "list").write_text("archive/one.mp4\narchive/two.mp4\narchive/three.mp4\n")
    command = (
        *("run", "@list", "--api", api.url, "--label", "red", "--label", "blue"),
        *("--workers", "1", "--format", "json"),
    )
    code, out, err = nightreel(tmp_path, *command)
    assert code == 3, err
    states = {Path(row["video"]).name: row["state"] for row in json.loads(out)}
    assert states == {"one.mp4": "rejected", "two.mp4": "complete", "three.mp4": "rejected"}
    make_clip(archive / "one.mp4", [("red", 2)])
    make_clip(archive / "three.mp4", [("blue", 2)])
    code, out, err = nightreel(tmp_path, *command)
    assert code == 0, err
    code, out, _ = nightreel(tmp_path, "summary", "--format", "json")
    assert code == 0
    states = {Path(row["video"]).name: row["state"] for row in json.loads(out)}
    assert states == dict.fromkeys(["one.mp4", "two.mp4", "three.mp4"], "complete")


def test_an_interrupted_run_is_resumed_to_the_same_results(
    tmp_path: Path, archive: Path, api: ContractServer
) -> None:
    """Ctrl-C ends every child and exits 130; the same command then gives what a calm run gives."""
    calm = tmp_path / "calm"
    calm.mkdir()
    shutil.copytree(archive, calm / "archive")
    assert classify(calm, api)[0] == 0

    def slowly(handler: Any, body: dict[str, Any]) -> None:
        time.sleep(30)

    images = sum("embed_image" in path for path, _, _ in api.requests)
    api.always = slowly
    process = start(
        tmp_path,
        *("run", "archive", "--api", api.url, "--label", "red", "--label", "blue"),
        *("--workers", "2", "--format", "json"),
    )
    wait_until(lambda: sum("embed_image" in path for path, _, _ in api.requests) > images)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "resumes" in err
    wait_until(lambda: processes_of(tmp_path) == [], 10)
    api.always = None
    code, _, err = classify(tmp_path, api)
    assert code == 0, err
    assert results(tmp_path) == results(calm)


def test_a_killed_run_leaves_no_process_and_resumes(
    tmp_path: Path, archive: Path, api: ContractServer
) -> None:
    """After `kill -9` of the command nothing of it runs on, and the same command finishes."""
    api.always = lambda handler, body: time.sleep(30)
    process = start(
        tmp_path,
        *("run", "archive", "--api", api.url, "--label", "red", "--label", "blue"),
        *("--workers", "2", "--format", "json"),
    )
    wait_until(lambda: len(api.requests) > 0)
    process.kill()
    process.communicate()
    wait_until(lambda: processes_of(tmp_path) == [], 15)
    api.always = None
    code, rows, err = classify(tmp_path, api)
    assert code == 0, err
    assert {row["state"] for row in rows} == {"complete"}


def test_a_killed_worker_is_replaced(tmp_path: Path, archive: Path, api: ContractServer) -> None:
    """Killing the workers in the middle of a run loses nothing."""
    slow = [True]

    def slowly(handler: Any, body: dict[str, Any]) -> None:
        if slow[0]:
            time.sleep(60)

    api.always = slowly
    process = start(
        tmp_path, *("run", "archive", "--api", api.url, "--label", "red", "--label", "blue"),
        *("--workers", "2", "--format", "json"), NIGHTREEL_LEASE_S="3",
    )  # fmt: skip
    wait_until(lambda: len(api.requests) > 0)
    slow[0], api.always = False, None
    for pid in processes_of(tmp_path):
        try:
            if b"celery" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        except OSError:
            continue
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert {row["state"] for row in json.loads(out)} == {"complete"}
    assert "started again" in err


def test_a_refused_key_stops_the_job_and_keeps_it(
    tmp_path: Path, archive: Path, api: ContractServer
) -> None:
    """401 ends the run with 12 and one clear line; with the right key the same command resumes.
    The key stands in no file that the run leaves."""
    api.key = "rf_right_key_123456"
    code, _, err = classify(tmp_path, api, NIGHTREEL_API_KEY="rf_wrong_key_654321")
    assert code == 12
    assert "the API answers 401" in err
    assert "Traceback" not in err
    code, _, err = classify(tmp_path, api, NIGHTREEL_API_KEY=api.key)
    assert code == 0, err
    for file in tmp_path.glob("nightreel.db*"):
        assert b"rf_wrong_key" not in file.read_bytes()
        assert b"rf_right_key" not in file.read_bytes()


def test_an_api_that_is_away_for_a_while_costs_nothing(
    tmp_path: Path, archive: Path, api: ContractServer
) -> None:
    """503 to every call for some seconds delays the run and spends no attempt."""
    process = start(
        tmp_path, *("run", "archive", "--api", api.url, "--label", "red", "--label", "blue"),
        *("--workers", "1", "--format", "json"), NIGHTREEL_API_ATTEMPTS="1",
    )  # fmt: skip
    api.always = answer_with(503, {"message": "loading"}, {"Retry-After": "1"})
    wait_until(lambda: len(api.requests) >= 3)
    api.always = None
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    with closing(sqlite3.connect(tmp_path / "nightreel.db")) as database:
        assert database.execute("select max(attempts) from tasks").fetchone() == (1,)


def test_other_labels_on_the_same_archive_send_no_picture(
    tmp_path: Path, archive: Path, api: ContractServer
) -> None:
    """Embeddings are kept: a second job with other labels asks for texts only."""
    assert classify(tmp_path, api)[0] == 0
    before = api.pictures()
    code, out, err = nightreel(
        tmp_path,
        *("run", "archive", "--api", api.url, "--label", "green", "--label", "white"),
        *("--workers", "2", "--format", "json"),
    )
    assert code == 0, err
    assert {row["state"] for row in json.loads(out)} == {"complete"}
    asked_of_endpoint = 2 * 2
    assert api.pictures() - before <= asked_of_endpoint


def test_an_endpoint_that_only_compares_serves_too(tmp_path: Path, archive: Path) -> None:
    """Without embeddings the comparing route gives complete results."""
    with contract_server(embeds=False) as api:
        code, rows, err = classify(tmp_path, api)
    assert code == 0, err
    assert {row["state"] for row in rows} == {"complete"}


def test_an_external_queue_and_postgresql_serve_the_same_command(
    tmp_path: Path, archive: Path, api: ContractServer, redis_url: str, postgres_url: str
) -> None:
    """With NIGHTREEL_BROKER_URL and a PostgreSQL address the same tasks run on those."""
    assert classify(tmp_path, api)[0] == 0
    code, rows, err = classify(tmp_path, api, "--db", postgres_url, NIGHTREEL_BROKER_URL=redis_url)
    assert code == 0, err
    assert {row["state"] for row in rows} == {"complete"}
    code, out, _ = nightreel(tmp_path, "scenes", "--db", postgres_url, "--format", "json")
    assert code == 0
    _, on_sqlite, _ = nightreel(tmp_path, "scenes", "--format", "json")
    assert json.loads(out) == json.loads(on_sqlite)


@pytest.mark.parametrize(
    ("arguments", "settings", "code", "said"),
    [
        (["run"], {}, 2, "PATH"),
        (["run", "nowhere"], {}, 2, "no such file"),
        (["run", "archive", "--fps", "0"], {}, 2, "no rate above 0"),
        (["run", "archive", "--fps", "1", "--every", "2s"], {}, 2, "give one of them"),
        (["run", "archive", "--label", "a"], {}, 2, "2 to 1000 labels"),
        (["run", "archive", "--labels", "gone.yaml"], {}, 2, "gone.yaml"),
        (["run", "archive", "--db", "mysql://x/y"], {}, 11, "sqlite"),
        (["run", "archive", "--db", "postgresql://u:pw-secret@127.0.0.1:1/x"], {}, 11, "127.0.0.1"),
        (["run", "archive", "--api", "http://127.0.0.1:1"], {}, 12, "cannot be reached"),
        (
            ["run", "archive"],
            {"NIGHTREEL_BROKER_URL": "redis://:pw-secret@127.0.0.1:1/0"},
            10,
            "queue",
        ),
        (["summary"], {}, 11, "nightreel"),
        (["scenes", "--db", "sqlite:///gone/x.db"], {}, 11, "nightreel"),
        (["run", "archive"], {"NIGHTREEL_TASK_SECONDS": "soon"}, 2, "NIGHTREEL_TASK_SECONDS"),
        (["run", "archive"], {"NIGHTREEL_API_IN_FLIGHT": "0"}, 2, "NIGHTREEL_API_IN_FLIGHT"),
        (["nonsense"], {}, 2, "nonsense"),
        (["status", "--format", "xml"], {}, 2, "xml"),
    ],
)
def test_bad_input_is_one_line_and_the_right_code(
    tmp_path: Path, archive: Path, api: ContractServer,
    arguments: list[str], settings: dict[str, str], code: int, said: str,
) -> None:  # fmt: skip
    """Every mistake and every missing layer ends with its own code, one clear line, no traceback
    and no password."""
    more = ["--api", api.url] if arguments[0] == "run" and "--api" not in arguments else []
    ended, out, err = nightreel(tmp_path, *arguments, *more, **settings)
    assert ended == code, err
    assert said in err
    assert "Traceback" not in err
    assert "pw-secret" not in err + out
    assert out == ""
