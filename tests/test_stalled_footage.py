"""A decode that makes no progress, in a real worker on real storage that hangs: its range ends with
a gap that says why, and the same process goes on with the next task."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from clips import make_clip
from conftest import missing
from contract_server import MODEL, contract_server
from farm import wait_until
from footage_files import encode, x264
from sqlalchemy import Engine, text

from scheduler.submit import job_spec
from storage import ledger
from storage.database import connect, reading
from storage.records import ArchiveFile, Fit, Label, LabelSet, Sampling
from workers.app import CLASSIFY_RANGE, make_app
from workers.probing import Asked, probe_and_plan
from workers.settings import QueueSettings

QUEUE = "stalled"
SECONDS = 8
STALL_S = 5.0
ONE_PER_SECOND = Sampling(rate=Fraction(1))

IMPATIENT = f"""
import functools
from workers import process
from workers.app import app
from workers.footage.decode import read_range

process.read_range = functools.partial(read_range, stall_s={STALL_S})
"""
"""The worker as it is, but for a stall that lasts seconds instead of a minute."""

HANGING_READ = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

ssize_t read(int file, void *into, size_t count)
{
    static ssize_t (*usual)(int, void *, size_t);
    char link[64], name[4096];
    ssize_t length;

    if (!usual)
        usual = dlsym(RTLD_NEXT, "read");
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    length = readlink(link, name, sizeof name - 1);
    if (length > 0) {
        name[length] = 0;
        if (!strcmp(name, getenv("HANGS_IN")) &&
            lseek(file, 0, SEEK_CUR) >= atol(getenv("HANGS_FROM")))
            for (;;)
                pause();
    }
    return usual(file, into, count);
}
"""
"""Storage of which a part never comes: a read there does not return, as on a dead network mount."""


def grainy_clip(path: Path) -> Path:
    """Half a megabyte of H.264, header first, so that it is read in many pieces."""
    chance = np.random.default_rng(5)
    return encode(
        path,
        [chance.integers(0, 256, (96, 160, 3), np.uint8) for _ in range(SECONDS * 10)],
        rate=10,
        options=x264(gop=10, bframes=0),
        container_options={"movflags": "faststart"},
    )


@contextmanager
def hanging_in_the_middle(path: Path) -> Iterator[dict[str, str]]:
    """What a worker needs around it for reading of the file's second half never to return."""
    compiler = shutil.which("cc") or missing("a C compiler")
    library = path.with_name("hanging.so")
    command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", library, "-ldl"]
    subprocess.run(command, input=HANGING_READ.encode(), check=True)
    yield {
        "LD_PRELOAD": str(library),
        "HANGS_IN": str(path.resolve()),
        "HANGS_FROM": str(path.stat().st_size // 2),
    }


@contextmanager
def hanging_at_the_door(path: Path) -> Iterator[dict[str, str]]:
    """While this lasts the kernel lets nobody open the file: it waits for the holder of a lease on
    it, which does not answer (fcntl(2), F_SETLEASE)."""
    if not hasattr(fcntl, "F_SETLEASE"):
        missing("leases on files")
    usual = signal.signal(signal.SIGIO, signal.SIG_IGN)
    holder = os.open(path, os.O_RDWR)
    try:
        fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        yield {}
    finally:
        os.close(holder)
        signal.signal(signal.SIGIO, usual)


def planned(engine: Engine, clips: list[Path]) -> int:
    """A job with a task for each clip."""
    labels = LabelSet("colours", (Label("red", ("red",)), Label("blue", ("blue",))))
    job = ledger.open_job(
        engine,
        job_spec(
            names=["clips"], sampling=ONE_PER_SECOND, fit=Fit.CROP, top_n=2, labels=labels,
            model=MODEL, notice=None,
        ),
    )  # fmt: skip
    for clip in clips:
        stat = clip.stat()
        file = ArchiveFile(str(clip), stat.st_size, stat.st_mtime_ns)
        found = probe_and_plan(Asked(file, None), ONE_PER_SECOND, 60_000_000)
        assert found.info is not None
        assert found.content_id is not None
        assert len(found.ranges) == 1
        video = ledger.register_file(engine, found.file, found.content_id)
        ledger.plan_video(engine, job.id, video, found.info, found.ranges)
    ledger.finish_planning(engine, job.id)
    return job.id


@contextmanager
def working(folder: Path, settings: dict[str, str]) -> Iterator[None]:
    """A real Celery worker with one process in its pool; it must end by itself when asked to."""
    (folder / "impatient.py").write_text(IMPATIENT)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("NIGHTREEL_")}
    with (folder / "worker.log").open("wb") as log:
        worker = subprocess.Popen(
            [
                *(sys.executable, "-m", "celery", "-A", "impatient", "worker"),
                *("--concurrency", "1", "--without-gossip", "--without-mingle"),
            ],
            cwd=folder,
            env=kept | settings,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 0
    finally:
        if worker.poll() is None:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
        print((folder / "worker.log").read_text())  # noqa: T201


@pytest.mark.skipif(sys.platform != "linux", reason="makes storage hang as only Linux can")
@pytest.mark.parametrize(
    ("hanging", "most"),
    [(hanging_in_the_middle, SECONDS - 2), (hanging_at_the_door, 0)],
    ids=["reading", "opening"],
)
def test_a_stalled_decode_is_a_gap_and_its_process_goes_on(
    hanging: Callable[[Path], AbstractContextManager[dict[str, str]]],
    most: int,
    tmp_path: Path,
    sqlite_url: str,
    redis_url: str,
) -> None:
    """What came before the stall is had, the rest of the range is a `stalled` gap in the database,
    no attempt is spent, and the next tasks are done by the process that stalled."""
    stuck = grainy_clip(tmp_path / "stuck.mp4")
    good = [make_clip(tmp_path / f"{c}.mp4", [(c, SECONDS)]) for c in ("red", "blue")]
    engine = connect(sqlite_url)
    job_id = planned(engine, [stuck, *good])
    queue = QueueSettings(broker_url=redis_url, queue=QUEUE)  # type: ignore[arg-type]

    def rows(query: str) -> list[tuple[object, ...]]:
        with reading(engine) as connection:
            return [tuple(row) for row in connection.execute(text(query))]

    with contract_server() as server, hanging(stuck) as around:
        settings = {
            "NIGHTREEL_DATABASE_URL": sqlite_url,
            "NIGHTREEL_BROKER_URL": redis_url,
            "NIGHTREEL_QUEUE": QUEUE,
            "NIGHTREEL_API_URL": server.url,
            "PYTHONWARNINGS": "ignore",
        }
        with working(tmp_path, settings | around):
            app = make_app(queue)
            for task_id in sorted(ledger.feed(engine, 100, job_id)):
                app.send_task(CLASSIFY_RANGE, args=[task_id])
            app.close()
            wait_until(
                lambda: rows("SELECT COUNT(*) FROM tasks WHERE state = 'done'") == [(3,)],
                "all three tasks done",
            )
    done_by = re.findall(r"workers.tasks\[(\d+)\].* done: ", (tmp_path / "worker.log").read_text())
    assert len(done_by) == 3
    assert len(set(done_by)) == 1, "the process that stalled did not go on"
    assert rows("SELECT attempts, error_kind FROM tasks") == [(1, None)] * 3
    ((video, start_us, end_us, kind, detail),) = rows(
        "SELECT video_id, start_us, end_us, kind, detail FROM gaps"
    )
    assert (kind, detail) == ("stalled", f"decoding made no progress for {STALL_S:g} s")
    assert end_us == SECONDS * 1_000_000
    counted = dict(rows("SELECT video_id, COUNT(*) FROM samples GROUP BY video_id"))
    had = counted.pop(video, 0)
    assert min(most, 1) <= had <= most
    assert start_us == had * 1_000_000
    assert list(counted.values()) == [SECONDS, SECONDS]
    engine.dispose()
