"""Probing in processes of their own: what a hostile file does to one is no business of the rest."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from clips import make_clip

from scheduler.archive import find
from scheduler.probing import probe_all
from storage.records import ArchiveFile, Sampling
from workers.probing import Asked, Probed, content_id

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


def test_a_known_identity_is_not_hashed_again(tmp_path: Path) -> None:
    """What the database knows of a file is taken over."""
    make_clip(tmp_path / "a.mp4", [("red", 2)])
    (file,) = asked(tmp_path)
    (answer,) = probed([Asked(file.file, "known already")])
    assert answer.content_id == "known already"


@pytest.mark.timeout(60)
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


@pytest.mark.timeout(60)
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
