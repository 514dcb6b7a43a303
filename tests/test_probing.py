"""Probing in processes of their own: what a hostile file does to one is no business of the rest."""

from __future__ import annotations

import hashlib
import multiprocessing
import operator
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from clips import make_clip
from rows import info, ranges, spec
from sqlalchemy import Engine, select

import workers.footage.probe
import workers.probing
from scheduler.archive import find
from scheduler.children import in_children
from scheduler.probing import probe_all
from scheduler.submit import submit
from storage import ledger
from storage.database import reading
from storage.records import ArchiveFile, Sampling, VideoState
from storage.schema import job_videos
from workers.probing import Asked, Probed, content_id, probe_and_plan

MINUTE_US = 60_000_000


def asked(folder: Path) -> list[Asked]:
    return [Asked(file, None) for file in find([str(folder)]) if isinstance(file, ArchiveFile)]


def probed(files: list[Asked], stop: threading.Event | None = None) -> list[Probed]:
    stop = stop or threading.Event()
    return list(probe_all(files, Sampling(), MINUTE_US, processes=2, stop=stop))


def slow_file(path: Path) -> Path:
    """A sparse file that takes a minute to hash and no room on the disk."""
    path.write_bytes(b"")
    os.truncate(path, 60 << 30)
    return path


def in_the_background(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def children(but: set[int]) -> list[int]:
    return [c.pid for c in multiprocessing.active_children() if c.pid and c.pid not in but]


def test_files_come_back_in_order_with_their_identities(tmp_path: Path) -> None:
    """Each file, good or bad, is answered once, in the order asked."""
    make_clip(tmp_path / "a.mp4", [("red", 2)])
    (tmp_path / "b.mp4").write_text("no video")
    make_clip(tmp_path / "c.mp4", [("blue", 3)])
    first, second, third = probed(asked(tmp_path))
    assert first.info is not None
    assert third.info is not None
    assert (first.info.duration_us, third.info.duration_us) == (2_000_000, 3_000_000)
    assert first.content_id == content_id(str(tmp_path / "a.mp4"))
    assert second.info is None
    assert second.kind == "not-a-video"
    assert second.content_id is not None


@pytest.mark.expects_error_log("unexpected")
def test_a_fault_that_nobody_foresaw_rejects_the_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What a file provokes in this program is logged and rejects the file; it is not raised."""
    make_clip(tmp_path / "a.mp4", [("red", 2)])
    (file,) = asked(tmp_path)

    def fail(*_arguments: object) -> None:
        raise IndexError("nobody foresaw this")

    with monkeypatch.context() as broken:
        broken.setattr("workers.footage.plan.plan", fail)
        answer = probe_and_plan(file, Sampling(), MINUTE_US)
    assert (answer.info, answer.kind) == (None, "unexpected")
    assert "IndexError: nobody foresaw this" in answer.reason
    assert "a.mp4" in caplog.text
    assert "Traceback" in caplog.text


@pytest.mark.expects_error_log("unexpected")
def test_a_plan_that_the_ledger_refuses_rejects_the_file_alone(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that leaves time out rejects its video, and the files after it are planned."""
    found = [
        Probed(ArchiveFile(f"/{name}.mp4", 1, 1), name, info(10), tuple(ranges(seconds)))
        for name, seconds in (("a", 9), ("b", 10))
    ]
    monkeypatch.setattr("scheduler.submit.probe_all", lambda *_asked, **_settings: found)
    job = ledger.open_job(engine, spec(), files=())
    files, stop = [one.file for one in found], threading.Event()
    videos = submit(engine, job.id, Sampling(), files, task_seconds=60, processes=1, stop=stop)
    states = [ledger.video_in_job(engine, job.id, video.video_id) for video in videos]
    assert states == [VideoState.REJECTED, VideoState.RUNNING]
    with reading(engine) as connection:
        row = connection.execute(
            select(job_videos.c.reason_kind, job_videos.c.reason).order_by(job_videos.c.video_id)
        ).first()
    assert row is not None
    assert row.reason_kind == "unexpected"
    assert "do not tile" in row.reason


@pytest.mark.parametrize(
    ("name", "reading"),
    [
        ("a.mkv", "workers.probing.os.pread"),
        ("a.mp4", "workers.footage.skim.SkimmedFile.read"),
        ("a.mkv", "workers.footage.source.Source.packets"),
    ],
)
def test_storage_that_hangs_ends_the_probe(
    name: str, reading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a read does not return, of the hash, of an MP4's tables or of a packet, the file is
    unreadable with that reason and who asked goes on; the reader ends once its read returns."""
    make_clip(tmp_path / name, [("red", 2)])
    (file,) = asked(tmp_path)
    release = threading.Event()
    read = operator.attrgetter(reading.removeprefix("workers."))(workers)

    def hang(*arguments: object, **options: object) -> object:
        release.wait()
        return read(*arguments, **options)

    with monkeypatch.context() as hanging:
        hanging.setattr(reading, hang)
        try:
            answer = probe_and_plan(file, Sampling(), MINUTE_US, stall_s=0.5)
        finally:
            release.set()
            for thread in threading.enumerate():
                if thread.name == "footage":
                    thread.join(20)
                    assert not thread.is_alive()
    assert (answer.info, answer.kind) == (None, "unreadable")
    assert "no progress for 0.5 s" in answer.reason


def movie(path: Path, padding: int) -> Path:
    """An MP4 with so many more bytes of media data, which are holes of the file, behind its tables;
    and these stand apart from its beginning."""
    make_clip(path, [("red", 2)])
    data = path.read_bytes()
    tables = data.index(b"moov") - 4
    assert data.index(b"mdat") < tables, "or the tables' offsets would be wrong"
    apart = (100_000).to_bytes(4, "big") + b"free" + bytes(99_992)
    more = b"\0\0\0\1mdat" + (16 + padding).to_bytes(8, "big")
    path.write_bytes(data[:tables] + apart + data[tables:] + more)
    os.truncate(path, path.stat().st_size + padding)
    return path


LARGE = 3 << 30


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs /proc/self/io")
def test_planning_a_large_mp4_reads_little_of_it(tmp_path: Path) -> None:
    """Of three gigabytes less than 20 MB are read, identity and index together."""
    movie(tmp_path / "large.mp4", LARGE)
    (file,) = asked(tmp_path)
    before = bytes_asked_for()
    answer = probe_and_plan(file, Sampling(), MINUTE_US)
    assert answer.info is not None
    assert answer.info.duration_us == 2_000_000
    assert bytes_asked_for() - before < 20_000_000


def bytes_asked_for() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("at", [0.2, 0.57, 0.9])
def test_the_identity_of_a_large_mp4_sees_what_matters(at: float, tmp_path: Path) -> None:
    """Another size, other tables, another end, a changed stretch of a 512th of the file: another
    identity. The same bytes under another name and time: the same."""
    path = movie(tmp_path / "large.mp4", LARGE)
    whole = content_id(str(path))
    size = path.stat().st_size
    moved = path.rename(tmp_path / "moved.mp4")
    os.utime(moved, (0, 0))
    assert content_id(str(moved)) == whole
    changes = {
        "stretch": (int(size * at), b"\1" * (size // 512)),
        "end": (size - 1, b"\1"),
        "tables": (_offset(moved, b"mvhd") + 12, b"\1"),
    }
    for offset, data in changes.values():
        with moved.open("r+b") as file:
            file.seek(offset)
            before = file.read(len(data))
            file.seek(offset)
            file.write(data)
            file.flush()
            assert content_id(str(moved)) != whole
            file.seek(offset)
            file.write(before)
    assert content_id(str(moved)) == whole
    os.truncate(moved, size - 1)
    assert content_id(str(moved)) != whole


def _offset(path: Path, kind: bytes) -> int:
    with path.open("rb") as file:
        return file.read(2**20).index(kind)


@pytest.mark.parametrize("name", ["small.mp4", "large.mkv"])
def test_other_files_are_told_by_all_their_bytes(name: str, tmp_path: Path) -> None:
    """An MP4 up to 64 MiB, and a large file of another kind: the SHA-256 of the whole file."""
    path = tmp_path / name
    make_clip(path, [("red", 2)])
    if name == "large.mkv":
        os.truncate(path, 70 * 2**20)
    with path.open("rb") as file:
        assert content_id(str(path)) == hashlib.file_digest(file, "sha256").hexdigest()


def test_a_known_identity_is_not_hashed_again(tmp_path: Path) -> None:
    """What the database knows of a file is taken over."""
    make_clip(tmp_path / "a.mp4", [("red", 2)])
    (file,) = asked(tmp_path)
    (answer,) = probed([Asked(file.file, "known already")])
    assert answer.content_id == "known already"


@pytest.mark.timeout(200)
def test_a_file_that_kills_its_process_is_rejected_alone(tmp_path: Path) -> None:
    """A process that dies is tried once more; the file that does it again is rejected, and the
    files behind it are answered as ever."""
    slow_file(tmp_path / "a.mp4")
    make_clip(tmp_path / "b.mp4", [("red", 2)])
    found: list[Probed] = []
    worker = in_the_background(lambda: found.extend(probed(asked(tmp_path))))
    killed: set[int] = set()
    while worker.is_alive() and not any(one.kind == "crashes" for one in found):
        for pid in children(killed):
            # Whichever process reads the large file: the other is done in no time.
            if any("a.mp4" in _target(fd) for fd in _open_files(pid)):
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        time.sleep(0.05)
    worker.join()
    assert len(killed) == 2
    assert [one.kind for one in found] == ["crashes", ""]
    assert "crashes the media library" in found[0].reason
    assert found[1].info is not None


def test_items_that_kill_their_process_are_told_while_others_are_submitted() -> None:
    """The consumer is slow, so that the process is gone already when the next one is submitted; and
    of two in a row the second ends the process that was started for it."""
    found = []
    for item, answer in in_children(_kills, range(8), processes=1, stop=threading.Event()):
        found.append((item, answer))
        time.sleep(0.4)
    assert found == [(item, None if item in KILLERS else item) for item in range(8)]


KILLERS = (2, 5, 6)


def _kills(item: int) -> int:
    if item in KILLERS:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def _open_files(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return []


def _target(fd: Path) -> str:
    try:
        return os.readlink(fd)
    except OSError:
        return ""


@pytest.mark.timeout(200)
def test_stopping_ends_a_probe_in_the_middle_of_a_file(tmp_path: Path) -> None:
    """Once told to stop, nothing is waited for and no process stays."""
    slow_file(tmp_path / "a.mp4")
    before = set(children(set()))
    stop = threading.Event()
    found: list[Probed] = []
    worker = in_the_background(lambda: found.extend(probed(asked(tmp_path), stop)))
    while not children(before):
        time.sleep(0.02)
    stop.set()
    worker.join(timeout=20)
    assert not worker.is_alive()
    assert found == []
    deadline = time.monotonic() + 20
    while children(before) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert children(before) == []
