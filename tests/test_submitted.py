"""Submitted jobs: listed at once, probed by workers under lease, fed by the one that leads."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from clips import make_clip
from rows import RANGE, claimed, found, info, planned, ranges, spec
from sqlalchemy import Engine, Table, func, select, text, update

from storage import ledger, results
from storage.database import connect, reading, writing
from storage.dialect import lock_ledger
from storage.ledger import KeyTaken, ProbeClaim, Units
from storage.ledger.job import lock_job
from storage.ledger.probes import _finish as finish_planning_of
from storage.records import ArchiveFile, TaskState, VideoState
from storage.schema import files, job_videos, jobs, leaders, probes, tasks
from workers import probing
from workers.probing import FileUnreadable, plan_file


def on_disk(path: Path) -> ArchiveFile:
    """The file as listing an archive finds it."""
    stat = path.stat()
    return ArchiveFile(str(path), stat.st_size, stat.st_mtime_ns)


def submitted(engine: Engine, *listed: ArchiveFile, key: str = "key", **options: object) -> int:
    """A job of these files."""
    job = ledger.open_job(engine, spec(key), files=listed, **options)  # type: ignore[arg-type]
    return job.id


def taken(engine: Engine) -> list[ProbeClaim]:
    """All probes that are due, fed and claimed."""
    fed = ledger.feed_probes(engine, 100)
    return [claim for one in fed if (claim := ledger.claim_probe(engine, one, "w", 60))]


def probed(engine: Engine) -> None:
    """Let a worker do all probes there are."""
    for claim in taken(engine):
        assert plan_file(engine, claim)


def states(engine: Engine, table: Table) -> list[str]:
    """The state of each row, in order of id."""
    with reading(engine) as connection:
        return list(connection.scalars(select(table.c.state).order_by(table.c.id)))


def videos_of(engine: Engine, job_id: int) -> dict[str, tuple[str, str | None]]:
    """State and kind of reason of each video of the job, by the name of its file."""
    with reading(engine) as connection:
        rows = connection.execute(
            select(files.c.path, job_videos.c.state, job_videos.c.reason_kind)
            .join(files, files.c.video_id == job_videos.c.video_id)
            .where(job_videos.c.job_id == job_id)
        )
        return {os.path.basename(row.path): (row.state, row.reason_kind) for row in rows}


def finish(engine: Engine, job_id: int) -> None:
    """Do all there is to do, as scheduler and workers would."""
    probed(engine)
    ledger.finish_probed(engine)
    for task_id in ledger.feed(engine, 1000):
        claim = claimed(engine, task_id)
        assert results.commit(engine, task_id, claim.fence, found(claim))
    ledger.close_finished(engine)
    assert ledger.status(engine, job_id).finished


def test_two_submissions_of_a_key_are_one_job(engine: Engine) -> None:
    """The second one finds the job, and changes priority, tag and address alone."""
    file = ArchiveFile("/a.mp4", 1, 1)
    first = ledger.open_job(engine, spec(), files=[file], tag="a")
    again = ledger.open_job(engine, spec(), files=[file], tag="b", priority=3)
    assert (first.created, again.created, again.id) == (True, False, first.id)
    assert (again.tag, again.priority, again.submitted) == ("b", 3, True)
    assert states(engine, probes) == [TaskState.PENDING]


def test_a_repeated_submission_uses_up_no_number(engine: Engine) -> None:
    """However often a key comes again, the next job is the next number."""
    assert [submitted(engine, key=key) for key in ("a", "a", "a", "b", "a", "c")] == [
        1, 1, 1, 2, 1, 3,
    ]  # fmt: skip


def test_a_key_of_something_else_is_refused(engine: Engine) -> None:
    """A key that was given for other files or labels names its job; nothing is changed."""
    ledger.open_job(engine, spec(request="one"), files=[ArchiveFile("/a.mp4", 1, 1)])
    with pytest.raises(KeyTaken, match="job 1"):
        ledger.open_job(engine, spec(request="two"), files=[ArchiveFile("/b.mp4", 1, 1)])
    assert states(engine, probes) == [TaskState.PENDING]


def test_a_budget_stands_from_the_first_moment(engine: Engine) -> None:
    """It is written with the job, so that no worker calls before it is known."""
    job_id = submitted(engine, ArchiveFile("/a.mp4", 1, 1), max_calls=7)
    assert ledger.calls_left(engine, job_id) == 7


def test_a_repeated_submission_gives_no_second_budget(engine: Engine) -> None:
    """The same number again changes nothing; another one is a budget of its own, and opens a job
    that had spent the last."""
    job_id = submitted(engine, max_calls=10)
    ledger.reserve_calls(engine, job_id, 6)
    assert submitted(engine, max_calls=10) == job_id
    assert ledger.calls_left(engine, job_id) == 4
    ledger.pause_job(engine, job_id, ledger.BUDGET_SPENT, "spent")
    submitted(engine, max_calls=20)
    assert ledger.calls_left(engine, job_id) == 20
    assert ledger.get_job(engine, job_id).state is ledger.JobState.RUNNING


def test_what_is_not_given_again_stays(engine: Engine) -> None:
    """A second submission without tag and priority keeps those of the first."""
    submitted(engine, tag="a", priority=3)
    job = ledger.get_job(engine, submitted(engine))
    assert (job.tag, job.priority) == ("a", 3)


def test_a_run_leaves_a_job_of_the_farm_alone(engine: Engine) -> None:
    """Two that plan, feed and close one job would undo each other's work."""
    submitted(engine)
    with pytest.raises(KeyTaken, match="status 1 --wait"):
        ledger.open_job(engine, spec())


def test_a_pause_keeps_its_first_reason(engine: Engine) -> None:
    """A worker that fails afterwards does not hide that a person paused the job."""
    job_id = submitted(engine)
    ledger.pause_job(engine, job_id, "by-hand", "paused by hand")
    ledger.pause_job(engine, job_id, "api-refused", "no credits")
    assert ledger.get_job(engine, job_id).pause_kind == "by-hand"


def test_a_probe_of_a_later_release_is_left_alone(engine: Engine) -> None:
    """A worker that does not know the job's sampling says so, and spends no attempt."""
    submitted(engine, ArchiveFile("/a.mp4", 1, 1))
    (fed,) = ledger.feed_probes(engine, 1)
    with writing(engine) as connection:
        connection.execute(update(jobs).values(sampling="by-moon@1"))
    with pytest.raises(ledger.IncompatiblePlan):
        ledger.claim_probe(engine, fed, "w", 60)
    with reading(engine) as connection:
        row = connection.execute(select(probes)).one()
    assert (row.state, row.attempts) == (TaskState.PENDING, 0)
    assert row.error_kind == ledger.INCOMPATIBLE


def test_workers_plan_a_job_to_its_end(engine: Engine, tmp_path: Path) -> None:
    """Videos are planned, what is none is rejected with its reason, and the job closes."""
    make_clip(tmp_path / "clip.mp4", [("red", 2)])
    (tmp_path / "notes.mp4").write_text("no video")
    listed = [on_disk(tmp_path / name) for name in ("clip.mp4", "notes.mp4")]
    job_id = submitted(engine, *listed, unreadable={b"/gone.mp4": "cannot be read"})
    finish(engine, job_id)
    assert videos_of(engine, job_id) == {
        "clip.mp4": (VideoState.COMPLETE, None),
        "notes.mp4": (VideoState.REJECTED, "not-a-video"),
        "gone.mp4": (VideoState.REJECTED, "unreadable"),
    }


def test_work_begins_while_files_are_probed(engine: Engine, tmp_path: Path) -> None:
    """The first planned video is fed while others wait to be probed; the job stays open."""
    listed = []
    for at in range(3):
        make_clip(tmp_path / f"{at}.mp4", [("red", 1 + at)])
        listed.append(on_disk(tmp_path / f"{at}.mp4"))
    job_id = submitted(engine, *listed)
    (first,) = ledger.feed_probes(engine, 1)
    claim = ledger.claim_probe(engine, first, "w", 60)
    assert claim is not None
    assert plan_file(engine, claim)
    assert len(ledger.feed(engine, 10)) == 1
    assert ledger.finish_probed(engine) == []
    probed(engine)
    assert ledger.finish_probed(engine) == [job_id]


def test_a_known_file_is_not_read_again(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job of the same sampling plans it from the database; so does the same job again."""
    make_clip(tmp_path / "clip.mp4", [("red", 2)])
    file = on_disk(tmp_path / "clip.mp4")
    finish(engine, submitted(engine, file))

    def never(*_: object) -> None:
        raise AssertionError("the file is read")

    monkeypatch.setattr(probing, "probe_and_plan", never)
    finish(engine, submitted(engine, file))
    other = submitted(engine, file, key="other")
    finish(engine, other)
    assert videos_of(engine, other) == {"clip.mp4": (VideoState.COMPLETE, None)}


def test_a_file_that_one_host_lacks_is_left_to_others(engine: Engine, tmp_path: Path) -> None:
    """What cannot be read is a fault of the place: the probe is tried elsewhere."""
    make_clip(tmp_path / "clip.mp4", [("red", 1)])
    file = on_disk(tmp_path / "clip.mp4")
    (tmp_path / "clip.mp4").rename(tmp_path / "away")
    job_id = submitted(engine, file)
    (claim,) = taken(engine)
    with pytest.raises(FileUnreadable):
        plan_file(engine, claim)
    ledger.give_back(engine, claim.probe_id, claim.fence, "unreadable", "gone", 5, 0, probes)
    (tmp_path / "away").rename(tmp_path / "clip.mp4")
    finish(engine, job_id)
    assert videos_of(engine, job_id) == {"clip.mp4": (VideoState.COMPLETE, None)}


def test_a_file_that_no_worker_survives_is_rejected(engine: Engine) -> None:
    """After its attempts the probe has failed, the file is rejected with that reason, and may be
    tried again."""
    job_id = submitted(engine, ArchiveFile("/a.mp4", 1, 1))
    for _ in range(ledger.MAX_ATTEMPTS):
        (claim,) = taken(engine)
        with writing(engine) as connection:
            connection.execute(update(probes).values(lease_until_ms=0))
        ledger.sweep(engine, 60)
    assert claim.attempts == ledger.MAX_ATTEMPTS
    finish(engine, job_id)
    assert videos_of(engine, job_id) == {"a.mp4": (VideoState.REJECTED, ledger.WORKER_LOST)}
    assert ledger.retry_job(engine, job_id, kind="another") == Units(0, 0)
    assert ledger.retry_job(engine, job_id, kind=ledger.WORKER_LOST) == Units(0, 1)
    assert not ledger.status(engine, job_id).finished
    assert len(taken(engine)) == 1


def test_a_rejected_video_is_read_again_on_demand(engine: Engine, tmp_path: Path) -> None:
    """A retry looks at it anew, whatever is known of the path."""
    (tmp_path / "clip.mp4").write_text("no video")
    job_id = submitted(engine, on_disk(tmp_path / "clip.mp4"))
    finish(engine, job_id)
    assert videos_of(engine, job_id)["clip.mp4"][0] == VideoState.REJECTED
    make_clip(tmp_path / "clip.mp4", [("red", 1)])
    assert ledger.retry_job(engine, job_id) == Units(0, 1)
    finish(engine, job_id)
    assert videos_of(engine, job_id) == {"clip.mp4": (VideoState.COMPLETE, None)}


def test_a_zombie_plans_nothing(engine: Engine) -> None:
    """A worker whose lease went to another writes neither plan nor rejection."""
    job_id = submitted(engine, ArchiveFile("/a.mp4", 1, 1))
    (zombie,) = taken(engine)
    with writing(engine) as connection:
        connection.execute(update(probes).values(lease_until_ms=0))
    ledger.sweep(engine, 60)
    (claim,) = taken(engine)
    video_id = ledger.register_file(engine, zombie.file, "content")
    assert not ledger.plan_probed(engine, zombie, video_id, info(RANGE), ranges(RANGE))
    assert not ledger.reject_probed(engine, zombie, video_id, "unreadable", "gone")
    assert ledger.video_in_job(engine, job_id, video_id) is None
    assert ledger.plan_probed(engine, claim, video_id, info(RANGE), ranges(RANGE))
    assert states(engine, tasks) == [TaskState.PENDING]


def test_cancelling_ends_probing(engine: Engine) -> None:
    """A probe under lease can no longer plan, and the job closes."""
    job_id = submitted(engine, *(ArchiveFile(f"/{at}.mp4", 1, 1) for at in range(3)))
    (fed,) = ledger.feed_probes(engine, 1)
    claim = ledger.claim_probe(engine, fed, "w", 60)
    assert claim is not None
    ledger.cancel_job(engine, job_id)
    video_id = ledger.register_file(engine, claim.file, "content")
    assert not ledger.plan_probed(engine, claim, video_id, info(RANGE), ranges(RANGE))
    ledger.close_finished(engine)
    assert ledger.status(engine, job_id).finished
    assert states(engine, probes) == [TaskState.CANCELLED] * 3


def test_a_paused_job_is_not_probed(engine: Engine) -> None:
    """Its messages on the way are turned down; resuming goes on."""
    job_id = submitted(engine, ArchiveFile("/a.mp4", 1, 1))
    (fed,) = ledger.feed_probes(engine, 1)
    ledger.pause_job(engine, job_id, "by-hand", "")
    assert ledger.claim_probe(engine, fed, "w", 60) is None
    assert ledger.feed_probes(engine, 1) == []
    ledger.resume_job(engine, job_id)
    assert len(taken(engine)) == 1


def test_ten_thousand_files_are_submitted_at_once(engine: Engine) -> None:
    """One transaction, of which each file is a row; the same again changes nothing."""
    listed = [ArchiveFile(f"/archive/{at}.mp4", at, at) for at in range(10_000)]
    for _ in range(2):
        submitted(engine, *listed)
    with reading(engine) as connection:
        assert connection.scalar(select(func.count()).select_from(probes)) == len(listed)


def test_files_that_are_added_while_planning_ends_are_probed(engine: Engine) -> None:
    """Neither the end of planning nor a closing job forgets what a second submission adds."""
    job_id = submitted(engine)
    submitted(engine, ArchiveFile("/late.mp4", 1, 1))
    assert not finish_planning_of(engine, job_id)
    ledger.finish_planning(engine, job_id)
    ledger.close_finished(engine)
    assert not ledger.status(engine, job_id).finished
    assert len(taken(engine)) == 1


def test_a_retry_while_the_job_closes_is_not_lost(postgres_url: str) -> None:
    """Whoever closes waits for the retry, then finds the job at work again."""
    engine = connect(postgres_url)
    job = planned(engine, RANGE)
    for task_id in ledger.feed(engine, 10):
        claim = claimed(engine, task_id)
        ledger.give_back(engine, task_id, claim.fence, "read-error", "gone", 1, 0)
    with writing(engine) as connection:
        connection.execute(update(job_videos).values(state=VideoState.FAILED))
    with ThreadPoolExecutor(1) as pool:
        with writing(engine) as connection:
            lock_job(connection, job.job_id)
            closing = pool.submit(ledger.close_finished, engine)
            until_blocked(engine)
            connection.execute(update(tasks).values(state=TaskState.PENDING, attempts=0))
            connection.execute(update(job_videos).values(state=VideoState.RUNNING))
        closing.result(20)
    assert not ledger.status(engine, job.job_id).finished
    engine.dispose()


def until_blocked(engine: Engine) -> None:
    """Wait until a session waits for another one's lock."""
    waits = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
    deadline = time.monotonic() + 20
    while True:
        with reading(engine) as connection:
            if connection.scalar(waits):
                return
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_planning_worker_waits_for_nobody_who_submits(postgres_url: str) -> None:
    """Planning a video of a job that runs touches nothing that a submission holds, or the two
    would wait for each other."""
    engine = connect(postgres_url)
    submitted(engine, ArchiveFile("/a.mp4", 1, 1))
    (claim,) = taken(engine)
    video_id = ledger.register_file(engine, claim.file, "content")
    with ThreadPoolExecutor(1) as pool, writing(engine) as connection:
        lock_job(connection, claim.job_id)
        ended = pool.submit(ledger.plan_probed, engine, claim, video_id, info(RANGE), ranges(RANGE))
        assert ended.result(20)
    engine.dispose()


COMMANDS: dict[str, Callable[[Engine, int], object]] = {
    "submit again": lambda engine, _: submitted(engine, ArchiveFile("/b.mp4", 1, 1)),
    "pause": lambda engine, job_id: ledger.pause_job(engine, job_id, "by-hand", "later"),
    "cancel": ledger.cancel_job,
    "retry": ledger.retry_job,
    "recover": ledger.recover,
    "sweep": lambda engine, _: ledger.sweep(engine, 60),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_holds_nothing_while_it_waits_for_the_feeder(
    postgres_url: str, command: str
) -> None:
    """What changes many rows waits for its turn before it locks the first of them, or it and the
    feeder would wait for each other."""
    engine = connect(postgres_url)
    job_id = submitted(engine, ArchiveFile("/a.mp4", 1, 1))
    for second in (1, 2):
        video_id = ledger.register_file(engine, ArchiveFile(f"/{second}.mp4", 1, 1), f"c{second}")
        ledger.plan_video(engine, job_id, video_id, info(RANGE), ranges(RANGE))
    ledger.feed(engine, 1)
    with ThreadPoolExecutor(1) as pool:
        with writing(engine) as connection:
            lock_ledger(connection)
            ended = pool.submit(COMMANDS[command], engine, job_id)
            until_blocked(engine)
            for table in (jobs, job_videos, tasks, probes):
                connection.execute(select(table).with_for_update(nowait=True))
        ended.result(20)
    engine.dispose()


def test_a_file_that_is_away_stays_the_place_of_its_video(engine: Engine, tmp_path: Path) -> None:
    """A job that cannot read it takes it away from no other job, and reads it when it is back."""
    make_clip(tmp_path / "clip.mp4", [("red", 2)])
    file = on_disk(tmp_path / "clip.mp4")
    submitted(engine, file)
    probed(engine)
    other = submitted(engine, file, key="other")
    for claim in taken(engine):
        ledger.give_back(engine, claim.probe_id, claim.fence, "unreadable", "away", 1, 0, probes)
    ledger.finish_probed(engine)
    assert videos_of(engine, other) == {"clip.mp4": (VideoState.REJECTED, "unreadable")}
    (task_id,) = ledger.feed(engine, 1)
    (place,) = claimed(engine, task_id).files
    assert place.path == file.path
    assert ledger.retry_job(engine, other) == Units(0, 1)
    probed(engine)
    assert videos_of(engine, other) == {"clip.mp4": (VideoState.RUNNING, None)}


def test_one_scheduler_leads(engine: Engine) -> None:
    """The other one waits until the lease has run out or the leader steps down."""
    assert ledger.lead(engine, "scheduler", "a", 60)
    assert not ledger.lead(engine, "scheduler", "b", 60)
    assert ledger.lead(engine, "other", "b", 60)
    with writing(engine) as connection:
        connection.execute(update(leaders).values(until_ms=0))
    assert ledger.lead(engine, "scheduler", "b", 60)
    assert not ledger.lead(engine, "scheduler", "a", 60)
    ledger.step_down(engine, "scheduler", "a")
    assert not ledger.lead(engine, "scheduler", "a", 60)
    ledger.step_down(engine, "scheduler", "b")
    assert ledger.lead(engine, "scheduler", "a", 60)
