"""The main job by its installed command, with real children, on real H.264 files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from clips import make_clip, make_sound
from contract_server import ContractServer, answer_with, contract_server

from workers.contract import pictures_body
from workers.endpoint import asking_pictures

NIGHTREEL = str(Path(sys.executable).with_name("nightreel"))
RESULTS = (
    "select v.content_id, p.bucket, p.rank, p.label, p.similarity, p.confidence from predictions p "
    "join videos v on v.id = p.video_id order by 1, 2, 3"
)


@pytest.fixture
def api() -> Iterator[ContractServer]:
    with contract_server() as server:
        yield server


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path: Path) -> Iterator[None]:
    """A test that fails leaves no process behind either."""
    yield
    for pid in processes_of(tmp_path):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    folder = tmp_path / "archive"
    folder.mkdir()
    make_clip(folder / "one.mp4", [("red", 4), ("blue", 5)])
    make_clip(folder / "two.mp4", [("green", 3)])
    return folder


def environment(folder: Path, **settings: str) -> dict[str, str]:
    """As few variables as a fresh login has, and one by which all processes of a test are found:
    children inherit it whatever else they are denied."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("NIGHTREEL_", "PYTHON"))}
    return kept | {
        "NIGHTREEL_TASK_SECONDS": "2",
        "NIGHTREEL_FEED_INTERVAL_S": "0.1",
        "OF_THE_TEST_IN": str(folder),
        **settings,
    }


def start(folder: Path, *arguments: str, **settings: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [NIGHTREEL, *arguments],
        cwd=folder,
        env=environment(folder, **settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_hear_signals,  # noqa: PLW1509 - it sets two signals and calls nothing else
    )


def _hear_signals() -> None:
    """As at a terminal: what runs in the background of a script ignores these, and so would what
    it starts."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def nightreel(folder: Path, *arguments: str, **settings: str) -> tuple[int, str, str]:
    process = start(folder, *arguments, **settings)
    try:
        out, err = process.communicate(timeout=200)
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
    """Every process that a command started in this folder has left, whatever it is."""
    wanted = b"OF_THE_TEST_IN=" + os.fsencode(folder) + b"\0"
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and wanted in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def wait_until(condition: Any, seconds: float = 90.0) -> None:
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
    assert api.pictures() - before == 2
    assert processes_of(tmp_path) == []


def test_bad_files_are_listed_with_their_reasons(
    tmp_path: Path, archive: Path, api: ContractServer
) -> None:
    """Text, nothing, sound alone, files cut off and odd names: exit 3, each bad file with its
    reason, each good one analysed, and every second of every video accounted for."""
    (archive / "text.mp4").write_text("this is not a video")
    (archive / "empty.mp4").write_bytes(b"")
    make_sound(archive / "sound.mp4", 2)
    whole = (archive / "one.mp4").read_bytes()
    (archive / "no index.mp4").write_bytes(whole[: len(whole) // 2])
    index_first = make_clip(
        tmp_path / "whole.mp4", [("red", 10), ("blue", 10)], options={"movflags": "faststart"}
    ).read_bytes()
    (archive / "cut off.mp4").write_bytes(index_first[: len(index_first) * 6 // 10])
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
        "cut off.mp4": "partial",
        "text.mp4": "rejected",
        "empty.mp4": "rejected",
        "sound.mp4": "rejected",
        "no index.mp4": "rejected",
    }
    assert all(row["reason"] for row in rows if row["state"] != "complete")
    code, out, _ = nightreel(tmp_path, "coverage", "--format", "json")
    assert code == 3
    for one in json.loads(out):
        assert one["analysed_s"] + one["gaps_s"] == pytest.approx(one["duration_s"], abs=1e-9)
    (cut_off,) = [one for one in json.loads(out) if one["video"].endswith("cut off.mp4")]
    assert cut_off["duration_s"] == 20
    assert {gap["kind"] for gap in cut_off["gaps"]} <= {"truncated", "damaged"}
    assert 5 < cut_off["analysed_s"] < 16


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
        time.sleep(100)

    images = sum("embed_image" in path for path, _, _ in api.requests)
    api.always = slowly
    process = start(
        tmp_path,
        *("run", "archive", "--api", api.url, "--label", "red", "--label", "blue"),
        *("--workers", "2", "--format", "json"),
    )
    wait_until(lambda: sum("embed_image" in path for path, _, _ in api.requests) > images)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "resumes" in err
    wait_until(lambda: processes_of(tmp_path) == [], 30)
    api.always = None
    code, _, err = classify(tmp_path, api)
    assert code == 0, err
    assert results(tmp_path) == results(calm)


def test_a_resumed_run_asks_the_endpoint_nothing_again(
    tmp_path: Path, archive: Path, api: ContractServer
) -> None:
    """What the interrupted run learned, whether lists of pictures work, is known to the next one,
    though each has workers and a queue of its own."""
    question = pictures_body(asking_pictures(64))["image"]

    def asked() -> int:
        return sum(body.get("image") == question for _, body, _ in api.requests)

    def slowly(handler: Any, body: dict[str, Any]) -> None:
        if body.get("image") != question:
            time.sleep(100)
        answer_with(200, {"embeddings": [[1.0, 2.0], [2.0, 1.0]]})(handler, body)

    api.always = slowly
    process = start(
        tmp_path,
        *("run", "archive", "--api", api.url, "--label", "red", "--label", "blue"),
        *("--workers", "2", "--format", "json"),
    )
    wait_until(lambda: len(api.requests) > asked())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert asked() == 1
    api.always = None
    code, rows, err = classify(tmp_path, api)
    assert code == 0, err
    assert {row["state"] for row in rows} == {"complete"}
    assert asked() == 1


def test_a_killed_run_leaves_no_process_and_resumes(
    tmp_path: Path, archive: Path, api: ContractServer
) -> None:
    """After `kill -9` of the command nothing of it runs on, and the same command finishes."""
    api.always = lambda handler, body: time.sleep(100)
    process = start(
        tmp_path,
        *("run", "archive", "--api", api.url, "--label", "red", "--label", "blue"),
        *("--workers", "2", "--format", "json"),
    )
    wait_until(lambda: len(api.requests) > 0)
    process.kill()
    process.communicate()
    wait_until(lambda: processes_of(tmp_path) == [], 30)
    api.always = None
    code, rows, err = classify(tmp_path, api)
    assert code == 0, err
    assert {row["state"] for row in rows} == {"complete"}


@pytest.mark.parametrize("robbed", [False, True], ids=["", "with-its-messages"])
def test_killed_workers_are_replaced(
    tmp_path: Path, archive: Path, api: ContractServer, redis_url: str, robbed: bool
) -> None:
    """Killing the workers in the middle of a run loses nothing; messages that they had taken and
    not answered are missed at once, not when the queue's timeout is over."""
    slow = [True]

    def slowly(handler: Any, body: dict[str, Any]) -> None:
        if slow[0]:
            time.sleep(60)

    api.always = slowly
    process = start(
        tmp_path, *("run", "archive", "--api", api.url, "--label", "red", "--label", "blue"),
        *("--workers", "2", "--format", "json"), NIGHTREEL_LEASE_S="3",
        NIGHTREEL_QUEUED_TIMEOUT_S="3600", NIGHTREEL_BROKER_URL=redis_url,
    )  # fmt: skip
    wait_until(lambda: len(api.requests) > 0)
    if robbed:
        with redis.Redis.from_url(redis_url) as queue:
            wait_until(lambda: _taken(queue) > 0)
    slow[0], api.always = False, None
    for pid in processes_of(tmp_path):
        if b"celery" in _command_line(pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert {row["state"] for row in json.loads(out)} == {"complete"}
    assert "started again" in err


def test_a_killed_queue_is_replaced(tmp_path: Path, archive: Path, api: ContractServer) -> None:
    """Killing the embedded queue with all that it holds delays the run and loses nothing."""
    api.always = lambda handler, body: time.sleep(2)
    process = start(
        tmp_path, *("run", "archive", "--api", api.url, "--label", "red", "--label", "blue"),
        *("--workers", "1", "--format", "json"),
        NIGHTREEL_QUEUED_TIMEOUT_S="3600", NIGHTREEL_API_READ_TIMEOUT_S="1",
    )  # fmt: skip
    wait_until(lambda: len(api.requests) > 0)

    leashes = [
        pid
        for pid in processes_of(tmp_path)
        if {b"nightreel.leash", b"--unixsocket"} <= set(_command_line(pid).split(b"\0"))
    ]
    (leash,) = leashes
    (queue,) = Path(f"/proc/{leash}/task/{leash}/children").read_text().split()
    os.kill(int(queue), signal.SIGKILL)
    api.always = None
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert {row["state"] for row in json.loads(out)} == {"complete"}
    assert "the queue process ended and was started again" in err


def _taken(queue: redis.Redis) -> int:
    """Take what waits in the run's queue, as a worker does that then dies."""
    lists = [key for key in queue.keys("*") if queue.type(key) == b"list"]
    return sum(queue.llen(key) * queue.delete(key) for key in lists)


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
    """503 to every call for some seconds delays the run and spends no attempt. One line says so,
    with the API's word, and one that it is over."""
    # Tasks rest for so long that the run, which looks now and then, cannot miss it.
    api.always = answer_with(503, {"message": "loading"}, {"Retry-After": "5"})
    process = start(
        tmp_path, *("run", "archive", "--api", api.url, "--label", "red", "--label", "blue"),
        *("--workers", "1", "--format", "json"), NIGHTREEL_API_ATTEMPTS="1",
    )  # fmt: skip
    wait_until(lambda: len(api.requests) >= 3)
    api.always = None
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    said = [line for line in err.splitlines() if line.startswith("the API ")]
    assert said == [
        "the API is away, and the run waits for it: the API answers 503: loading",
        "the API answers again",
    ]
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
        (["run", "archive", "--fps", "100000"], {}, 2, "more than 1000"),
        (["run", "archive", "--every", "0s"], {}, 2, "no time above 0"),
        (["run", "archive", "--every", "1us"], {}, 2, "the units are ms, s, min and h"),
        (["run", "archive", "--every", "9999h"], {}, 2, "longer than 10000000s"),
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
        (["run", "archive"], {"NIGHTREEL_BROKER_URL": "foo"}, 2, "write redis://HOST:6379/0"),
        (["run", "archive"], {"NIGHTREEL_BROKER_URL": "redis://[::1"}, 2, "NIGHTREEL_BROKER_URL"),
        (
            ["run", "archive"],
            {"NIGHTREEL_BROKER_URL": "redis://h", "NIGHTREEL_BROKER_PASSWORD_FILE": "gone"},
            2,
            "NIGHTREEL_BROKER_PASSWORD_FILE",
        ),
        (["run", "archive"], {"NIGHTREEL_API_KEY_FILE": "gone"}, 2, "NIGHTREEL_API_KEY_FILE"),
        (["run", "archive", "--api", "http://[::1"], {}, 12, "NIGHTREEL_API_URL"),
        (["run", "archive", "--db", "postgresql://h:bad/x"], {}, 11, "NIGHTREEL_DATABASE_URL"),
        (["run", "archive", "--every", "9" * 40 + "h"], {}, 2, "no time"),
        (["run", "archive", "--fps", "1e-5000000"], {}, 2, "no rate"),
        (["summary", "--job", "9" * 30], {}, 2, "--job"),
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


def test_two_runs_of_one_job_share_its_work(
    tmp_path: Path, archive: Path, api: ContractServer
) -> None:
    """The same command started twice at once: both end well, and the results are those of one."""
    make_clip(archive / "long.mp4", [("red", 30), ("green", 30)])
    command = (
        *("run", "archive", "--api", api.url, "--label", "red", "--label", "blue"),
        *("--workers", "1", "--format", "json"),
    )
    both = [start(tmp_path, *command) for _ in range(2)]
    ended = [process.communicate(timeout=180) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    calm = tmp_path / "calm"
    calm.mkdir()
    shutil.copytree(archive, calm / "archive")
    assert classify(calm, api)[0] == 0
    assert results(tmp_path) == results(calm)


def test_doctor_names_the_layer_that_fails(tmp_path: Path, api: ContractServer) -> None:
    """One line a layer; the exit code is that of the first that fails."""
    code, out, err = nightreel(tmp_path, "doctor", "--api", api.url)
    assert code == 0, out + err
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["ok", "queue"],
        ["ok", "database"],
        ["ok", "API"],
        ["ok", "codecs"],
    ]
    assert not (tmp_path / "nightreel.db").exists()
    api.key = "rf_right_key_123456"
    code, out, _ = nightreel(tmp_path, "doctor", "--api", api.url, NIGHTREEL_API_KEY="wrong")
    assert code == 12
    assert "the API answers 401" in out
    away = "http://127.0.0.1:1"
    assert nightreel(tmp_path, "doctor", "--api", away)[0] == 12
    right = {"NIGHTREEL_API_KEY": api.key}
    assert nightreel(tmp_path, "doctor", "--api", api.url, "--db", "mysql://h/x", **right)[0] == 11
    code, out, _ = nightreel(
        tmp_path, "doctor", "--api", away, NIGHTREEL_BROKER_URL="redis://:pw-secret@127.0.0.1:1"
    )
    assert code == 10
    assert "pw-secret" not in out
    assert out.count("FAIL") == 2


def test_status_counts_what_was_done(tmp_path: Path, archive: Path, api: ContractServer) -> None:
    """The latest job with its videos and frames."""
    (archive / "text.mp4").write_text("this is not a video")
    classify(tmp_path, api)
    code, out, err = nightreel(tmp_path, "status", "--format", "jsonl")
    assert code == 0, err
    row = json.loads(out)
    found = [row[key] for key in ("job", "state", "videos", "videos_complete", "videos_rejected")]
    assert found == [1, "closed", 3, 2, 1]
    assert row["samples"] == 12
    assert row["analysed"] == 1.0


def test_scenes_follow_what_the_pictures_show(tmp_path: Path, api: ContractServer) -> None:
    """With labels given by example pictures, the cut from red to blue is found at its second, and
    the label file's flag is raised."""
    from PIL import Image

    folder = tmp_path / "archive"
    folder.mkdir()
    make_clip(folder / "tape.mp4", [("red", 6), ("blue", 5)])
    for name, colour in (("r.png", (200, 30, 30)), ("b.png", (30, 40, 200))):
        Image.new("RGB", (64, 64), colour).save(tmp_path / name)
    (tmp_path / "labels.yaml").write_text(
        "- {name: reddish, examples: r.png}\n"
        "- {name: bluish, examples: b.png, threshold: 0.9, flag: too blue}\n"
    )
    code, out, err = nightreel(
        tmp_path,
        *("run", "archive", "--api", api.url, "--labels", "labels.yaml", "--workers", "1"),
        *("--format", "json"),
    )
    assert code == 0, err
    (video,) = json.loads(out)
    assert video["flags"] == ["too blue"]
    assert [one["label"] for one in video["labels"]] == ["reddish", "bluish"]
    _, out, _ = nightreel(tmp_path, "scenes", "tape.mp4", "--format", "json")
    found = [(one["label"], one["start_s"], one["end_s"]) for one in json.loads(out)]
    assert found == [("reddish", 0.0, 6.0), ("bluish", 6.0, 11.0)]
    _, table, _ = nightreel(tmp_path, "scenes")
    assert "0:06.000" in table


@pytest.mark.parametrize("form", ["csv", "jsonl", "json", "table"])
def test_rows_go_to_standard_output_alone(
    tmp_path: Path, archive: Path, api: ContractServer, form: str
) -> None:
    """Data is data: what a command says beside its rows goes to standard error."""
    api.info["notice"] = "take these labels with salt"
    classify(tmp_path, api)
    code, out, err = nightreel(tmp_path, "summary", "--format", form)
    assert code == 0
    if form == "table":
        assert out.rstrip().endswith("NOTE: take these labels with salt")
    else:
        assert "salt" not in out
        assert "salt" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_ways_to_be_ended_are_interruptions_too(
    tmp_path: Path, archive: Path, api: ContractServer, number: signal.Signals
) -> None:
    """A closed terminal and a plain `kill` end a run as Ctrl-C does."""
    api.always = lambda handler, body: time.sleep(100)
    process = start(tmp_path, "run", "archive", "--api", api.url, "--workers", "1")
    wait_until(lambda: len(api.requests) > 0)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    wait_until(lambda: processes_of(tmp_path) == [], 30)


def test_a_run_killed_while_it_reads_files_leaves_no_process(
    tmp_path: Path, api: ContractServer
) -> None:
    """The processes that probe files end with a killed command, in whatever file they are."""
    (tmp_path / "archive").mkdir()
    make_clip(tmp_path / "archive" / "a.mp4", [("red", 2)])
    (tmp_path / "archive" / "large.mp4").write_bytes(b"")
    os.truncate(tmp_path / "archive" / "large.mp4", 240 << 30)  # sparse: minutes to hash
    process = start(tmp_path, "run", "archive", "--api", api.url, "--workers", "1")

    def probing() -> bool:
        pids = processes_of(tmp_path)
        return any(b"spawn_main" in _command_line(pid) for pid in pids) and len(pids) > 3

    wait_until(probing)
    process.kill()
    process.communicate()
    wait_until(lambda: processes_of(tmp_path) == [], 30)


def _command_line(pid: int) -> bytes:
    return _told_by_the_kernel(pid, "cmdline")


def _told_by_the_kernel(pid: int, what: str) -> bytes:
    """A file of the process; empty where it has ended since it was listed."""
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("command", ["run", "plan"])
def test_ctrl_c_while_a_large_file_is_read_is_obeyed_at_once(
    tmp_path: Path, api: ContractServer, command: str
) -> None:
    """Nobody waits for the hash of a large file after Ctrl-C."""
    (tmp_path / "archive").mkdir()
    (tmp_path / "archive" / "large.mp4").write_bytes(b"")
    os.truncate(tmp_path / "archive" / "large.mp4", 240 << 30)
    process = start(tmp_path, command, "archive", "--api", api.url)
    wait_until(lambda: any(b"spawn_main" in _command_line(p) for p in processes_of(tmp_path)))
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    wait_until(lambda: processes_of(tmp_path) == [], 30)


def test_the_key_is_given_to_workers_alone(
    tmp_path: Path, archive: Path, api: ContractServer
) -> None:
    """No child but the workers has the key, nor passwords of others, in its environment."""
    api.key = "rf_key_for_workers_only"
    api.always = lambda handler, body: time.sleep(100)
    process = start(
        tmp_path, "run", "archive", "--api", api.url, "--workers", "1", NIGHTREEL_API_KEY=api.key
    )
    wait_until(lambda: len(api.requests) > 0)
    having = [
        _command_line(pid)
        for pid in processes_of(tmp_path)
        if pid != process.pid and api.key.encode() in _told_by_the_kernel(pid, "environ")
    ]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert having
    assert all(b"celery" in line for line in having)
    assert not any(api.key.encode() in line for line in having)


def test_a_killed_leash_leaves_no_worker_behind(
    tmp_path: Path, archive: Path, api: ContractServer
) -> None:
    """Killing what holds a child ends the child, and both are started again."""
    slow = [True]

    def slowly(handler: Any, body: dict[str, Any]) -> None:
        if slow[0]:
            time.sleep(60)

    api.always = slowly
    process = start(
        tmp_path, *("run", "archive", "--api", api.url, "--label", "red", "--label", "blue"),
        *("--workers", "1", "--format", "json"), NIGHTREEL_LEASE_S="3",
    )  # fmt: skip
    wait_until(lambda: len(api.requests) > 0)
    slow[0], api.always = False, None
    leashes = [
        pid
        for pid in processes_of(tmp_path)
        if b"nightreel.leash" in (line := _command_line(pid)) and b"celery" in line
    ]
    for pid in leashes:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert leashes
    wait_until(lambda: processes_of(tmp_path) == [], 30)


def test_a_copy_is_said_to_be_one_and_a_moved_file_is_not(
    tmp_path: Path, archive: Path, api: ContractServer
) -> None:
    """Two files of one content are one video, shown with its copies; after a move nothing is
    analysed again and nothing is called a copy."""
    shutil.copy(archive / "one.mp4", archive / "zwei.mp4")
    code, rows, err = classify(tmp_path, api)
    assert code == 0, err
    assert sorted(Path(p).name for row in rows for p in [row["video"], *row["copies"]]) == [
        *("one.mp4", "two.mp4", "zwei.mp4"),
    ]
    (archive / "zwei.mp4").unlink()
    (archive / "two.mp4").rename(archive / "moved.mp4")
    before = len(api.requests)
    code, rows, err = classify(tmp_path, api)
    assert code == 0, err
    assert len(api.requests) == before
    by_name = {Path(row["video"]).name: row["copies"] for row in rows}
    assert by_name["moved.mp4"] == []


def test_a_reader_that_leaves_early_is_no_fault(
    tmp_path: Path, archive: Path, api: ContractServer
) -> None:
    """`nightreel summary | head -0` ends quietly; a full disk is said in one line."""
    assert classify(tmp_path, api)[0] == 0
    for form in ("table", "json", "csv"):
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(
            [NIGHTREEL, "summary", "--format", form],
            cwd=tmp_path,
            env=environment(tmp_path),
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        os.close(write)
        assert (done.returncode, done.stderr) == (0, "")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [NIGHTREEL, "summary"],
            cwd=tmp_path,
            env=environment(tmp_path),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(params=["closed", "full"])
def deaf(request: pytest.FixtureRequest) -> Iterator[int]:
    """A standard error to which nobody listens, or which takes nothing."""
    if request.param == "full":
        if not Path("/dev/full").exists():
            pytest.skip("no /dev/full")
        write = os.open("/dev/full", os.O_WRONLY)
    else:
        read, write = os.pipe()
        os.close(read)
    yield write
    os.close(write)


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_run_goes_on_when_nobody_listens_to_its_talk(
    unbuffered: str, deaf: int, tmp_path: Path, archive: Path, api: ContractServer
) -> None:
    """That costs nothing but the talk, whether or not Python would keep it for another try."""
    done = subprocess.run(
        [NIGHTREEL, "run", "archive", "--api", api.url, "--workers", "1", "--format", "json"],
        cwd=tmp_path,
        env=environment(tmp_path, PYTHONUNBUFFERED=unbuffered),
        stdout=subprocess.PIPE,
        stderr=deaf,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert {row["state"] for row in json.loads(done.stdout)} == {"complete"}


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(
    ("arguments", "code"), [(["--no-such-option"], 2), (["--api", "http://127.0.0.1:1"], 12)]
)
def test_a_failure_has_its_code_when_nobody_listens(
    arguments: list[str], code: int, unbuffered: str, deaf: int, tmp_path: Path, archive: Path
) -> None:
    """The exit code says so, though no line can."""
    done = subprocess.run(
        [NIGHTREEL, "run", str(archive), *arguments],
        cwd=tmp_path,
        env=environment(tmp_path, PYTHONUNBUFFERED=unbuffered),
        stderr=deaf,
        check=False,
    )
    assert done.returncode == code


def test_a_run_goes_on_when_its_standard_streams_are_closed(
    tmp_path: Path, archive: Path, api: ContractServer
) -> None:
    """Input, output and error, as a service without a terminal may be started."""
    words = f"{NIGHTREEL} run archive --api {api.url} --workers 1"
    done = subprocess.run(
        ["sh", "-c", f"exec {words} <&- >&- 2>&-"],
        cwd=tmp_path,
        env=environment(tmp_path),
        check=False,
    )
    assert done.returncode == 0
    assert len(results(tmp_path)) > 0


def test_no_file_takes_the_number_of_a_closed_stream(tmp_path: Path) -> None:
    """Else what a library or a child prints would go into it."""
    code = (
        "import os, nightreel.cli.output as output; output.take_standard_streams(); "
        "opened = os.open('opened', os.O_CREAT | os.O_WRONLY); os.write(opened, b'%d' % opened); "
        "os.system('echo of a child; echo of a child >&2')"
    )
    command = ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, code]
    subprocess.run(command, cwd=tmp_path, env=environment(tmp_path), check=True)
    assert int((tmp_path / "opened").read_text()) > 2


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["doctor", "--help"]])
def test_help_that_cannot_be_written_is_one_line(
    words: list[str], unbuffered: str, deaf: int, tmp_path: Path
) -> None:
    """On a full disk; a reader who has seen enough is no failure."""
    done = subprocess.run(
        [NIGHTREEL, *words],
        env=environment(tmp_path, PYTHONUNBUFFERED=unbuffered),
        stdout=deaf,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    full = "nightreel: the output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) in {(1, full), (0, "")}
    assert bool(done.returncode) == stat.S_ISCHR(os.fstat(deaf).st_mode)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"NIGHTREEL_API_IN_FLIGHT": "0"}, "NIGHTREEL_API_IN_FLIGHT"),
        ({"NIGHTREEL_API_KEY_FILE": "/nowhere"}, "NIGHTREEL_API_KEY_FILE"),
        ({"NIGHTREEL_BROKER_PASSWORD_FILE": "/nowhere"}, "NIGHTREEL_BROKER_PASSWORD_FILE"),
    ],
)
def test_a_worker_with_a_wrong_setting_does_not_start(
    tmp_path: Path, settings: dict[str, str], said: str
) -> None:
    """It ends with 2 and says which setting is wrong, before it takes a task."""
    done = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "workers.app", "worker", "--concurrency", "1"],
        cwd=tmp_path,
        env=environment(tmp_path, NIGHTREEL_BROKER_URL="redis://127.0.0.1:1/0", **settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
