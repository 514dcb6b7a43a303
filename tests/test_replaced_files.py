"""Files that are replaced, touched or moved between planning and reading: what is stored under a
video's content was read of that content."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from clips import make_clip
from contract_server import MODEL, ContractServer, contract_server
from rows import claimed, let_delays_pass
from sqlalchemy import Engine, select

from scheduler.submit import job_spec
from storage import ledger
from storage.coverage import coverage
from storage.database import reading
from storage.records import ArchiveFile, Fit, Label, LabelSet, Sampling, TaskState
from storage.schema import embeddings, tasks
from workers import places, probing, process
from workers.metrics import Outcome
from workers.places import place_of
from workers.probing import Asked, FileUnreadable, archive_file, content_id, probe_and_plan
from workers.process import Process
from workers.tasks import _run

LABELS = LabelSet("colours", (Label("red", ("red",)), Label("blue", ("blue",))))
DONE = Outcome.DONE, None
UNREADABLE = Outcome.FAULT, "unreadable"


def pad(path: Path, size: int) -> None:
    """Make an MP4 longer by a box that says nothing."""
    spare = size - path.stat().st_size
    with path.open("ab") as file:
        file.write(spare.to_bytes(4, "big") + b"free" + bytes(spare - 8))


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """The file that is planned."""
    path = make_clip(tmp_path / "clip.mp4", [("red", 4)])
    pad(path, 60_000)
    return path


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another video of the same codec, timestamps and size."""
    path = make_clip(tmp_path / "other.mp4", [("blue", 2), ("green", 2)])
    pad(path, 60_000)
    return path


@dataclass
class Worker:
    """A worker process run by hand on a job of two ranges."""

    engine: Engine
    process: Process
    server: ContractServer
    job_id: int
    video_id: int

    def run(self) -> object:
        """How the next task of the job ends."""
        let_delays_pass(self.engine)
        (task_id,) = ledger.feed(self.engine, 1, self.job_id)
        return _run(self.process, claimed(self.engine, task_id))

    def stored(self) -> int:
        """Ranges that are kept under the contents of all videos."""
        with reading(self.engine) as connection:
            return len(connection.execute(select(embeddings.c.video_id)).all())

    def states(self) -> set[tuple[TaskState, str | None]]:
        with reading(self.engine) as connection:
            return {(s, e) for s, e in connection.execute(select(tasks.c.state, tasks.c.error))}


@pytest.fixture
def worker(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, database_url: str, clip: Path
) -> Iterator[Worker]:
    spec = job_spec(
        names=["clip"],
        sampling=Sampling(),
        fit=Fit.CROP,
        top_n=2,
        labels=LABELS,
        model=MODEL,
        notice=None,
    )
    job = ledger.open_job(engine, spec)
    probed = probe_and_plan(Asked(archive_file(str(clip)), None), Sampling(), 2_000_000)
    assert probed.info is not None
    assert probed.content_id is not None
    video_id = ledger.register_file(engine, probed.file, probed.content_id)
    ledger.plan_video(engine, job.id, video_id, probed.info, probed.ranges)
    ledger.finish_planning(engine, job.id)
    with contract_server() as server:
        monkeypatch.setenv("NIGHTREEL_DATABASE_URL", database_url)
        monkeypatch.setenv("NIGHTREEL_API_URL", server.url)
        with_a_client = Process()
        yield Worker(engine, with_a_client, server, job.id, video_id)
        with_a_client.engine.dispose()
        with_a_client.client.close()


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose content is compared from here on."""
    paths: list[str] = []

    def noted(path: str, *how: object) -> str:
        paths.append(path)
        return content_id(path, *how)  # type: ignore[arg-type]

    monkeypatch.setattr(places, "content_id", noted)
    return paths


@pytest.mark.parametrize("same_size", [True, False])
def test_nothing_of_another_file_is_stored_under_the_old_content(
    worker: Worker, clip: Path, other: Path, same_size: bool
) -> None:
    """A file that was replaced by a video of the same codec and timestamps is not read: the range
    fails with that reason. Once the planned file is back, it is read."""
    assert worker.run() == DONE
    sent, true = worker.server.pictures(), clip.with_suffix(".true")
    shutil.copy2(clip, true)
    if not same_size:
        pad(other, 70_000)
    other.replace(clip)
    assert worker.run() == UNREADABLE
    assert (worker.server.pictures(), worker.stored()) == (sent, 1)
    why = "the file changed since it was planned; run or submit it again"
    assert (TaskState.PENDING, why) in worker.states()
    true.replace(clip)
    assert worker.run() == DONE
    assert worker.stored() == 2


def test_a_range_that_stays_changed_becomes_a_gap_that_says_so(
    worker: Worker, clip: Path, other: Path
) -> None:
    """After its tries, and its video counts as analysed no more than it was."""
    assert worker.run() == DONE
    other.replace(clip)
    for _ in range(worker.process.settings.max_attempts):
        assert worker.run() == UNREADABLE
    ledger.close_finished(worker.engine)
    (row,) = coverage(worker.engine, worker.job_id)
    assert row.analysed_us == 2_000_000 < row.duration_us
    assert "changed since it was planned" in str(row.reason)


def test_a_file_that_is_replaced_while_it_is_read_is_not_stored(
    worker: Worker, clip: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which of the two each picture was nobody knows."""
    classify_range = process.classify_range

    def meanwhile(*what: object, **how: object) -> object:
        result = classify_range(*what, **how)  # type: ignore[arg-type]
        other.replace(clip)
        return result

    monkeypatch.setattr(process, "classify_range", meanwhile)
    assert worker.run() == UNREADABLE
    assert worker.server.pictures() > 0
    assert worker.stored() == 0


def test_a_file_that_was_touched_is_read(worker: Worker, clip: Path, hashed: list[str]) -> None:
    """Restored from a backup, say: its content is compared, once for all of its ranges."""
    os.utime(clip, (1, 1))
    assert worker.run() == DONE
    assert worker.run() == DONE
    assert hashed == [str(clip)]


@pytest.mark.parametrize("step", [100, 1_000_000_000, 2_000_000_000])
def test_a_coarse_clock_is_no_other_time(clip: Path, hashed: list[str], step: int) -> None:
    """One host sees nanoseconds, another one the same file by a protocol of fewer digits: nothing
    is hashed for that. A second later is another time."""
    seen = archive_file(str(clip))
    digits = seen.mtime_ns // 10**10 * 10**10 + 1_987_654_321
    coarse = replace(seen, mtime_ns=digits // step * step)
    for planned_ns, found_ns in ((digits, coarse.mtime_ns), (coarse.mtime_ns, digits)):
        os.utime(clip, ns=(found_ns, found_ns))
        assert place_of([replace(seen, mtime_ns=planned_ns)], "").path == str(clip)
    assert hashed == []
    with pytest.raises(FileUnreadable, match="changed"):
        place_of([replace(seen, mtime_ns=digits + 2 * step)], "")
    assert hashed == [str(clip)]


def test_a_copy_elsewhere_stands_in_for_a_changed_file(
    worker: Worker, clip: Path, other: Path, tmp_path: Path
) -> None:
    """Every place of the video is looked at, and one that was never read is compared."""
    copy = Path(shutil.copy(clip, tmp_path / "copy.mp4"))
    video = ledger.register_file(worker.engine, archive_file(str(copy)), content_id(str(clip)))
    assert video == worker.video_id
    other.replace(clip)
    assert worker.run() == DONE
    ledger.reject_unread(worker.engine, worker.job_id, os.fsencode(copy), "unreadable", "away")
    assert worker.run() == DONE


def test_a_video_that_another_has_replaced_is_given_up_at_once(
    worker: Worker, clip: Path, other: Path
) -> None:
    """Listed again, the other file takes its only place. It may yet turn up elsewhere while files
    are listed; afterwards no later try would find it."""
    other.replace(clip)
    ledger.reopen_planning(worker.engine, worker.job_id)
    ledger.register_file(worker.engine, archive_file(str(clip)), content_id(str(clip)))
    assert worker.run() == UNREADABLE
    assert {state for state, _ in worker.states()} == {TaskState.PENDING}
    assert worker.process.unreadable == 0
    ledger.finish_planning(worker.engine, worker.job_id)
    assert worker.run() == worker.run() == UNREADABLE
    why = "another file lies where the video was seen last; run or submit it again"
    assert worker.states() == {(TaskState.FAILED, why)}


def test_a_file_is_known_as_it_was_when_it_was_hashed(clip: Path) -> None:
    """A recording that went on after it was listed has the size of what was hashed."""
    listed = archive_file(str(clip))
    pad(clip, 61_000)
    probed = probe_and_plan(Asked(listed, None), Sampling(), 2_000_000)
    assert probed.file == archive_file(str(clip)) != listed
    known = probing.Asked(ArchiveFile(str(clip), 5, 5), probed.content_id)
    assert probe_and_plan(known, Sampling(), 2_000_000).file == known.file
