"""The ledger: each task is done once in effect, whatever happens to workers, messages and time."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import pytest
from rows import (
    RANGE,
    SEASONS,
    SECOND,
    Planned,
    add_video,
    claimed,
    file,
    found,
    frame_range,
    info,
    let_delays_pass,
    let_leases_expire,
    planned,
    ranges,
    spec,
    work,
)
from sqlalchemy import Engine, Table, delete, event, func, insert, select, text, update

from storage import ledger, results
from storage.coverage import coverage
from storage.database import connect, reading, writing
from storage.dialect import Now
from storage.labels import label_set
from storage.ledger import IncompatiblePlan, JobState, NoSuchJob, Units, UnreadableJob, closing
from storage.records import ArchiveFile, Gap, GapKind, TaskState, VideoState
from storage.schema import (
    embeddings,
    gaps,
    job_videos,
    predictions,
    samples,
    scenes,
    tasks,
    usage,
    videos,
)
from storage.schema import jobs as jobs_table


def count(engine: Engine, table: Table) -> int:
    with reading(engine) as connection:
        return int(connection.scalar(select(func.count()).select_from(table)) or 0)


def task(engine: Engine, task_id: int) -> Any:
    with reading(engine) as connection:
        return connection.execute(select(tasks).where(tasks.c.id == task_id)).one()


def rows_of(engine: Engine, *tables: Table) -> list[Any]:
    with reading(engine) as connection:
        return [
            tuple(row)
            for table in tables
            for row in connection.execute(select(table).order_by(*table.primary_key))
        ]


# Jobs and videos


def test_a_job_is_found_again_by_its_key(engine: Engine) -> None:
    """One key is one job; another key another one, with the same label set."""
    one = ledger.open_job(engine, spec())
    again = ledger.open_job(engine, spec())
    other = ledger.open_job(engine, spec("other"))
    assert (one.created, again.created, other.created) == (True, False, True)
    assert one.id == again.id != other.id
    assert one.label_set_id == other.label_set_id
    assert [job.id for job in ledger.jobs(engine)] == [other.id, one.id]
    assert ledger.latest_job(engine).id == other.id
    assert label_set(engine, one.label_set_id) == SEASONS


def test_a_job_that_does_not_exist_is_told(engine: Engine) -> None:
    """Asking for a job that is not there says what to do."""
    with pytest.raises(NoSuchJob, match="nightreel run"):
        ledger.latest_job(engine)
    for ask in (ledger.get_job, ledger.status):
        with pytest.raises(NoSuchJob, match="no job 7"):
            ask(engine, 7)


def test_a_moved_file_is_the_same_video(engine: Engine) -> None:
    """Content decides what a video is: a copy is the same one, a changed file another one."""
    one = ledger.register_file(engine, file("a"), "content")
    assert ledger.register_file(engine, file("moved"), "content") == one
    assert ledger.known_video(engine, file("a")) == one
    changed = replace(file("a"), size_bytes=2000)
    assert ledger.known_video(engine, changed) is None
    assert ledger.known_video(engine, replace(file("a"), mtime_ns=5)) is None
    other = ledger.register_file(engine, changed, "other content")
    assert other != one
    assert ledger.known_video(engine, changed) == other
    assert ledger.known_video(engine, file("a")) is None


@pytest.mark.parametrize(
    "name", ["/a/\udcff\udcfe.mp4", "/a/new\nline\x1b[31m.mp4", "/" + "long" * 1000]
)
def test_a_hostile_name_is_stored_and_opened(engine: Engine, name: str) -> None:
    """Bytes that are no text, control characters and great length: the worker gets the very bytes,
    people get printable text."""
    odd = ArchiveFile(name, 1, 1)
    job = ledger.open_job(engine, spec(), files=())
    video_id = ledger.register_file(engine, odd, "content")
    assert ledger.known_video(engine, odd) == video_id
    ledger.plan_video(engine, job.id, video_id, info(RANGE), ranges(RANGE))
    claim = claimed(engine, ledger.feed(engine, 1)[0])
    assert claim.files == (odd,)


def test_planning_again_adds_nothing(engine: Engine) -> None:
    """However often a video is planned, its tasks are there once and keep their states."""
    job = planned(engine, 10, 5)
    work(engine)
    before = rows_of(engine, tasks, job_videos)
    for name, seconds in (("v0", 10), ("v1", 5)):
        add_video(engine, job.job_id, name, seconds, each=3)
    assert rows_of(engine, tasks, job_videos) == before


def test_two_planners_at_once_plan_once(engine: Engine) -> None:
    """Planning is decided by the row: raced, it still adds each task once."""
    job = ledger.open_job(engine, spec())
    start = threading.Barrier(4)

    def plan(_: int) -> None:
        start.wait()
        add_video(engine, job.id, "v", 20)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(plan, range(4)))
    assert count(engine, tasks) == 5


@pytest.mark.parametrize(
    "bad",
    [
        [],
        [frame_range(0, 4)],
        [frame_range(0, 4), frame_range(5, 10)],
        [frame_range(0, 6), frame_range(4, 10)],
        [frame_range(2, 10)],
        [frame_range(0, 12)],
    ],
)
def test_a_plan_that_leaves_time_out_is_refused(engine: Engine, bad: list[Any]) -> None:
    """Ranges that do not tile the duration never reach the ledger."""
    job = ledger.open_job(engine, spec())
    video_id = ledger.register_file(engine, file("v"), "content")
    with pytest.raises(ValueError, match="do not tile"):
        ledger.plan_video(engine, job.id, video_id, info(10), bad)
    assert ledger.video_in_job(engine, job.id, video_id) is None


def test_a_rejected_video_can_be_planned_later(engine: Engine) -> None:
    """A rejection keeps its reason, never overrides a plan, and gives way to one."""
    job = ledger.open_job(engine, spec())
    video_id = ledger.register_file(engine, file("v"), "content")
    ledger.reject_video(engine, job.id, video_id, "unreadable", "moov atom\0not found\n")
    assert ledger.video_in_job(engine, job.id, video_id) is VideoState.REJECTED
    (row,) = coverage(engine, job.id)
    assert (row.reason_kind, row.reason) == ("unreadable", "moov atom\\x00not found")
    assert row.duration_us == row.analysed_us == row.waiting_us == 0
    add_video(engine, job.id, "v", 4)
    other = ledger.register_file(engine, file("v"), "content-v")
    ledger.reject_video(engine, job.id, other, "unreadable", "later")
    assert ledger.video_in_job(engine, job.id, other) is VideoState.RUNNING
    ledger.plan_video(engine, job.id, video_id, info(4), ranges(4))
    assert ledger.video_in_job(engine, job.id, video_id) is VideoState.RUNNING


# Feeding


def test_the_window_is_never_exceeded(engine: Engine) -> None:
    """What is queued or leased never exceeds the window, and room that is made is filled."""
    planned(engine, 40)
    fed = ledger.feed(engine, 3)
    assert len(fed) == 3
    assert ledger.feed(engine, 3) == []
    claim = claimed(engine, fed[0])
    assert ledger.feed(engine, 3) == []
    results.commit(engine, fed[0], claim.fence, found(claim))
    assert len(ledger.feed(engine, 3)) == 1
    assert ledger.feed(engine, 0) == []


def test_low_ranges_of_all_videos_come_first(engine: Engine) -> None:
    """A long video does not hold up the others: all first ranges, then all second ones."""
    job = planned(engine, 5 * RANGE, 2 * RANGE, RANGE)
    order = [
        (row.video_id, row.ordinal)
        for row in (task(engine, task_id) for task_id in ledger.feed(engine, 100))
    ]
    a, b, c = job.video_ids
    assert order == [(a, 0), (b, 0), (c, 0), (a, 1), (b, 1), (a, 2), (a, 3), (a, 4)]


def submitted(engine: Engine, key: str, tasks_of_it: int, priority: int = 0) -> int:
    """A job that the scheduler service feeds, of one video."""
    job = ledger.open_job(engine, spec(key), priority=priority, files=())
    add_video(engine, job.id, key, tasks_of_it * RANGE)
    return job.id


def fed_by_job(engine: Engine, rounds: int, window: int) -> Counter[int]:
    """How many tasks of each job are fed while workers finish all that is fed."""
    counts: Counter[int] = Counter()
    for _ in range(rounds):
        for task_id in ledger.feed(engine, window):
            claim = claimed(engine, task_id)
            counts[claim.job_id] += 1
            assert results.commit(engine, task_id, claim.fence, found(claim))
    return counts


def test_jobs_share_by_priority(engine: Engine) -> None:
    """A step of priority doubles a job's share, and the least urgent one is served all the same."""
    usual, urgent, late = (
        submitted(engine, key, 40, priority)
        for key, priority in (("usual", 0), ("urgent", 2), ("late", -2))
    )
    counts = fed_by_job(engine, rounds=14, window=3)
    assert counts[urgent] == pytest.approx(32, abs=2)
    assert counts[usual] == pytest.approx(8, abs=1)
    assert counts[late] == pytest.approx(2, abs=1)


def test_a_large_job_does_not_hold_up_a_later_one(engine: Engine) -> None:
    """A job that comes after thousands of tasks of another has its half from its first moment."""
    old = submitted(engine, "old", 60)
    fed_by_job(engine, rounds=10, window=4)
    new = submitted(engine, "new", 60)
    assert fed_by_job(engine, rounds=5, window=4) == pytest.approx({old: 10, new: 10}, abs=1)


def test_a_latecomer_starves_nobody(engine: Engine) -> None:
    """However slow the slowest job, one that comes late begins where the others are."""
    submitted(engine, "slow", 60, priority=-9)
    old = submitted(engine, "old", 60)
    fed_by_job(engine, rounds=10, window=1)
    new = submitted(engine, "new", 60)
    counts = fed_by_job(engine, rounds=20, window=1)
    assert counts[old] == pytest.approx(10, abs=1)
    assert counts[new] == pytest.approx(10, abs=1)


def test_files_that_are_probed_cost_no_share_of_the_tasks(engine: Engine) -> None:
    """A job whose files are still being read has its half of the tasks all the same."""
    old, new = submitted(engine, "old", 60), submitted(engine, "new", 60)
    listed = [file(f"listed{number}") for number in range(40)]
    ledger.open_job(engine, spec("new"), files=listed)
    assert len(ledger.feed_probes(engine, 30)) == 30
    assert fed_by_job(engine, rounds=5, window=4) == pytest.approx({old: 10, new: 10}, abs=1)


def test_a_job_that_was_paused_has_no_credit(engine: Engine) -> None:
    """After a night's pause it shares with the others; it does not catch up at their cost."""
    first, second = submitted(engine, "first", 60), submitted(engine, "second", 60)
    ledger.pause_job(engine, first, "by-hand", "for the night")
    assert fed_by_job(engine, rounds=10, window=4) == {second: 40}
    ledger.resume_job(engine, first)
    assert fed_by_job(engine, rounds=5, window=4) == pytest.approx({first: 10, second: 10}, abs=1)


def planned_in_bulk(engine: Engine, key: str, priority: int, ranges_of: list[int]) -> int:
    """A submitted job of videos of so many ranges each, in this order, written by a few statements;
    its plans say nothing, since nobody claims them."""
    job_id = ledger.open_job(engine, spec(key), priority=priority, files=()).id
    named = [f"{key} {number}" for number in range(len(ranges_of))]
    blank = {"plan": "", "state": "pending", "attempts": 0, "fence": 0, "not_before_ms": 0}
    with writing(engine) as connection:
        connection.execute(insert(videos), [{"content_id": name} for name in named])
        mine = select(videos.c.id).where(videos.c.content_id.in_(named)).order_by(videos.c.id)
        of_video = [
            {"job_id": job_id, "video_id": video_id, "duration_us": count * SECOND, "opening": 1}
            for video_id, count in zip(connection.scalars(mine), ranges_of, strict=True)
        ]
        connection.execute(insert(job_videos).values(state="running", analysed_us=0), of_video)
        connection.execute(
            insert(tasks).values(**blank, samples=0, gap_us=0),
            [
                {
                    "job_id": job_id,
                    "video_id": one["video_id"],
                    "ordinal": at,
                    "bucket_start": at,
                    "bucket_end": at + 1,
                    "start_us": at * SECOND,
                    "end_us": (at + 1) * SECOND,
                }
                for one, count in zip(of_video, ranges_of, strict=True)
                for at in range(count)
            ],
        )
    return job_id


def test_ten_hours_of_one_video_hold_up_neither_thousands_of_clips_nor_other_jobs(
    engine: Engine,
) -> None:
    """A video of 600 ranges was submitted before 5,000 clips of one range. Every clip is fed before
    its second range; a more urgent job has four times the share of this one, a less urgent one a
    quarter, of whatever stretch of the night, and then each what the others leave."""
    archive = planned_in_bulk(engine, "archive", 0, [600] + [1] * 5000)
    urgent = planned_in_bulk(engine, "urgent", 2, [1] * 1000)
    late = planned_in_bulk(engine, "late", -2, [1] * 300)
    order: list[tuple[int, int, int]] = []
    with reading(engine) as connection:
        known = {
            row.id: (row.job_id, row.video_id, row.ordinal)
            for row in connection.execute(
                select(tasks.c.id, tasks.c.job_id, tasks.c.video_id, tasks.c.ordinal)
            )
        }
    while fed := ledger.feed(engine, 250):
        order += [known[task_id] for task_id in fed]
        with writing(engine) as connection:
            connection.execute(update(tasks).where(tasks.c.id.in_(fed)).values(state="done"))
    assert len(order) == len(set(order)) == len(known) == 6900

    ours = [(video_id, ordinal) for job_id, video_id, ordinal in order if job_id == archive]
    long_one = min(video_id for video_id, _ in ours)
    assert {ordinal for _, ordinal in ours[:5001]} == {0}
    assert ours[5001:] == [(long_one, ordinal) for ordinal in range(1, 600)]

    jobs_fed = [job_id for job_id, _, _ in order]
    for begin in range(0, 12 * 105, 105):
        shares = Counter(jobs_fed[begin : begin + 105])
        assert shares == pytest.approx({urgent: 80, archive: 20, late: 5}, abs=2)
    last = {job_id: at for at, job_id in enumerate(jobs_fed)}
    assert last[urgent] == pytest.approx(1000 / 80 * 105, abs=10)
    for begin in range(last[urgent] + 1, last[late] - 50, 50):
        shares = Counter(jobs_fed[begin : begin + 50])
        assert shares == pytest.approx({archive: 40, late: 10}, abs=2)
    assert set(jobs_fed[last[late] + 1 :]) == {archive}


def test_a_run_feeds_its_own_job_alone(engine: Engine) -> None:
    """The scheduler service leaves the jobs of runs on single machines to them."""
    of_run = ledger.open_job(engine, spec("run"))
    add_video(engine, of_run.id, "run", RANGE)
    mine = submitted(engine, "mine", 1)
    assert [task(engine, one).job_id for one in ledger.feed(engine, 9)] == [mine]
    assert [task(engine, one).job_id for one in ledger.feed(engine, 9, of_run.id)] == [of_run.id]


def test_feeders_at_once_keep_to_the_window(engine: Engine) -> None:
    """Two schedulers by mistake still feed each task once and no more than the window."""
    planned(engine, 400)
    start = threading.Barrier(6)

    def feed(_: int) -> list[int]:
        start.wait()
        return ledger.feed(engine, 10)

    with ThreadPoolExecutor(6) as pool:
        fed = [one for part in pool.map(feed, range(6)) for one in part]
    assert len(fed) == len(set(fed)) == 10


def test_failed_publishing_is_taken_back(engine: Engine) -> None:
    """Tasks that could not be published are pending again, save those a worker has claimed."""
    planned(engine, 3 * RANGE)
    fed = ledger.feed(engine, 3)
    claimed(engine, fed[0])
    ledger.unqueue(engine, fed)
    ledger.unqueue(engine, [])
    states = [task(engine, one).state for one in fed]
    assert states == [TaskState.LEASED, TaskState.PENDING, TaskState.PENDING]


# Claiming


def test_a_claim_carries_all_that_a_worker_needs(engine: Engine) -> None:
    """Facts, range, settings and every place of the video, the latest first."""
    job = planned(engine, 10)
    ledger.register_file(engine, file("copy"), "content-v0")
    claim = claimed(engine, ledger.feed(engine, 1)[0])
    assert claim.info == info(10)
    assert claim.frame_range == ranges(10)[0]
    assert (claim.job_id, claim.video_id) == (job.job_id, job.video_ids[0])
    assert set(claim.files) == {file("copy"), file("v0")}
    assert (claim.content_id, claim.attempts, claim.fence) == ("content-v0", 1, 1)
    want = spec()
    assert (claim.sampling, claim.fit, claim.top_n, claim.model) == (
        want.sampling,
        want.fit,
        want.top_n,
        want.model,
    )


def test_the_latest_place_of_a_video_comes_first(engine: Engine) -> None:
    """A worker tries the place where the file was seen last."""
    planned(engine, RANGE)
    with writing(engine) as connection:
        connection.execute(text("UPDATE files SET seen_ms = seen_ms - 1000"))
    ledger.register_file(engine, file("moved"), "content-v0")
    claim = claimed(engine, ledger.feed(engine, 1)[0])
    assert claim.files == (file("moved"), file("v0"))


def test_of_many_claims_one_wins(engine: Engine) -> None:
    """However often a message is delivered at once, one worker gets the task."""
    planned(engine, 10 * RANGE)
    start = threading.Barrier(8)
    fed = ledger.feed(engine, 100)

    def race(worker: int) -> list[int]:
        start.wait()
        return [one for one in fed if ledger.claim(engine, one, f"w{worker}", 60) is not None]

    with ThreadPoolExecutor(8) as pool:
        won = [one for part in pool.map(race, range(8)) for one in part]
    assert sorted(won) == sorted(fed)


WORKER = """
import sys
sys.path.insert(0, sys.argv[2])
from rows import found
from storage import ledger, results
from storage.database import connect, with_retries
engine = connect(sys.argv[1])
for task_id in map(int, sys.argv[3:]):
    claim = with_retries(lambda: ledger.claim(engine, task_id, "w", 60))
    if claim is not None:
        result = found(claim)
        assert with_retries(lambda: results.commit(engine, task_id, claim.fence, result))
        print(task_id)
"""


def test_processes_that_race_do_each_task_once(
    database_url: str, engine: Engine, request: pytest.FixtureRequest
) -> None:
    """Worker processes that all get all messages commit each task once."""
    job = planned(engine, 10 * RANGE, 10 * RANGE)
    fed = ledger.feed(engine, 100)
    here = str(request.path.parent)
    command = [sys.executable, "-c", WORKER, database_url, here, *map(str, fed)]
    workers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    answers = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, 0], answers
    done = [int(line) for out, _ in answers for line in out.split()]
    assert sorted(done) == sorted(fed)
    status = ledger.status(engine, job.job_id)
    assert status.tasks_by_state[TaskState.DONE] == 20
    assert status.samples == count(engine, samples) == 80
    assert count(engine, predictions) == 160


@pytest.mark.parametrize("state", [TaskState.DONE, TaskState.FAILED, TaskState.CANCELLED])
def test_a_message_for_a_finished_task_is_dropped(engine: Engine, state: TaskState) -> None:
    """Late and repeated messages of finished tasks, and of none, claim nothing."""
    planned(engine, RANGE)
    (fed,) = ledger.feed(engine, 1)
    with writing(engine) as connection:
        connection.execute(update(tasks).values(state=state))
    assert ledger.claim(engine, fed, "w", 60) is None
    assert ledger.claim(engine, fed + 1000, "w", 60) is None


def test_a_plan_of_another_release_is_left_alone(engine: Engine) -> None:
    """A worker that cannot read a plan says so, spends no attempt and leaves the task for another
    one to come."""
    planned(engine, RANGE)
    (fed,) = ledger.feed(engine, 1)
    with writing(engine) as connection:
        connection.execute(update(tasks).values(plan='{"v":99}'))
    with pytest.raises(IncompatiblePlan, match="one release"):
        ledger.claim(engine, fed, "w", 60)
    row = task(engine, fed)
    assert (row.state, row.attempts, row.error_kind) == (TaskState.PENDING, 0, ledger.INCOMPATIBLE)
    assert "one release" in row.error
    assert ledger.claim(engine, fed, "w", 60) is None


@pytest.mark.parametrize("theirs", [{"sampling": "bursts@2"}, {"fit": "spiral"}])
def test_a_job_of_another_release_is_left_alone(engine: Engine, theirs: dict[str, str]) -> None:
    """A worker that cannot read what the job asks for names both releases, and leaves its tasks."""
    planned(engine, RANGE)
    (fed,) = ledger.feed(engine, 1)
    with writing(engine) as connection:
        connection.execute(update(jobs_table).values(version="9.0", **theirs))
    said = f"nightreel {version('nightreel')}, cannot read what nightreel 9.0 planned: "
    with pytest.raises(IncompatiblePlan, match=re.escape(said)):
        ledger.claim(engine, fed, "w", 60)
    row = task(engine, fed)
    assert (row.state, row.attempts, row.error_kind) == (TaskState.PENDING, 0, ledger.INCOMPATIBLE)
    (job,) = ledger.jobs(engine)
    assert job.unreadable is not None
    assert "nightreel 9.0" in job.unreadable
    with pytest.raises(UnreadableJob, match=re.escape(job.unreadable)):
        _ = job.sampling, job.fit


def test_a_job_of_another_release_is_closed_as_it_is_written(engine: Engine) -> None:
    """What its workers have committed closes to the same scenes under a scheduler that cannot read
    how its frames were chosen: vectors are found by the words that stand in the rows."""
    for key, sampling in (("ours", None), ("theirs", "bursts@2")):
        job = ledger.open_job(engine, spec(key), files=())
        add_video(engine, job.id, key, 4 * RANGE)
        work(engine)
        if sampling is not None:
            with writing(engine) as connection:
                of_job = jobs_table.c.id == job.id
                connection.execute(update(jobs_table).where(of_job).values(sampling=sampling))
                mine = embeddings.c.video_id == 2
                connection.execute(update(embeddings).where(mine).values(sampling=sampling))
    assert len(ledger.close_finished(engine)) == 2
    with reading(engine) as connection:
        shown = [column for column in scenes.c if column.name not in ("job_id", "video_id")]
        ours, theirs = (
            connection.execute(select(*shown).where(scenes.c.job_id == number)).all()
            for number in (1, 2)
        )
    assert ours == theirs != []


# Leases and fences


def test_a_zombie_writes_nothing(engine: Engine) -> None:
    """A worker whose lease went to another can neither beat, release, fail nor commit."""
    planned(engine, RANGE)
    (fed,) = ledger.feed(engine, 1)
    zombie = claimed(engine, fed)
    let_leases_expire(engine)
    assert ledger.claim(engine, fed, "too early", 60) is None
    ledger.sweep(engine, 120)
    owner = claimed(engine, fed)
    assert owner.fence > zombie.fence
    late = replace(found(zombie, label=1))
    assert not results.commit(engine, fed, zombie.fence, late)
    assert not ledger.heartbeat(engine, fed, zombie.fence, 60)
    assert not ledger.release(engine, fed, zombie.fence, 5, "api-outage", "503")
    assert ledger.give_back(engine, fed, zombie.fence, "read-error", "x", 1, 0) is TaskState.LEASED
    assert count(engine, samples) == 0
    assert results.commit(engine, fed, owner.fence, found(owner, label=2))
    assert not results.commit(engine, fed, zombie.fence, late)
    with reading(engine) as connection:
        best = select(predictions.c.label).where(predictions.c.rank == 0)
        assert set(connection.scalars(best)) == {2}


def test_commits_that_race_write_one_result(engine: Engine) -> None:
    """A zombie and the owner that commit at the same moment leave the owner's rows alone."""
    planned(engine, 10 * RANGE)
    for fed in ledger.feed(engine, 10):
        zombie = claimed(engine, fed)
        let_leases_expire(engine)
        ledger.sweep(engine, 120)
        owner = claimed(engine, fed)
        start = threading.Barrier(2)

        def commit(claim: ledger.Claim, label: int, start: threading.Barrier = start) -> bool:
            start.wait()
            return results.commit(engine, claim.task_id, claim.fence, found(claim, label))

        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(commit, (zombie, owner), (1, 2))) == [False, True]
    with reading(engine) as connection:
        best = select(predictions.c.label).where(predictions.c.rank == 0)
        assert Counter(connection.scalars(best)) == {2: 40}


def test_a_commit_whose_answer_was_lost_may_be_repeated(engine: Engine) -> None:
    """Committing again what this fence has committed is true and changes nothing."""
    planned(engine, RANGE)
    claim = claimed(engine, ledger.feed(engine, 1)[0])
    assert results.commit(engine, claim.task_id, claim.fence, found(claim))
    before = rows_of(engine, tasks, samples, predictions, gaps, embeddings, usage)
    assert results.commit(engine, claim.task_id, claim.fence, found(claim, label=1))
    assert rows_of(engine, tasks, samples, predictions, gaps, embeddings, usage) == before


def test_a_range_committed_anew_replaces_its_rows(engine: Engine) -> None:
    """Should a task be run again after its commit, its rows are the new ones, and no more; what
    both runs have cost is added up."""
    planned(engine, RANGE)
    (fed,) = ledger.feed(engine, 1)
    claim = claimed(engine, fed)
    results.commit(engine, fed, claim.fence, found(claim))
    tables = (samples, predictions, gaps, embeddings)
    before = rows_of(engine, *tables)
    cost = ledger.status(engine, claim.job_id).usage
    with writing(engine) as connection:
        connection.execute(update(tasks).values(state=TaskState.PENDING))
    again = claimed(engine, fed)
    assert results.commit(engine, fed, again.fence, found(again))
    assert rows_of(engine, *tables) == before
    both = ledger.status(engine, claim.job_id).usage
    assert (both.image_calls, both.bytes_sent) == (2 * cost.image_calls, 2 * cost.bytes_sent)


def test_a_heartbeat_keeps_the_lease(engine: Engine) -> None:
    """A worker that beats keeps its task past the first lease."""
    planned(engine, RANGE)
    (fed,) = ledger.feed(engine, 1)
    claim = claimed(engine, fed, lease_s=1)
    first = task(engine, fed).lease_until_ms
    assert ledger.heartbeat(engine, fed, claim.fence, 600)
    assert task(engine, fed).lease_until_ms > first + 500_000
    assert ledger.sweep(engine, 120).expired == 0
    assert ledger.claim(engine, fed, "other", 60) is None


def test_an_outage_spends_no_attempt(engine: Engine) -> None:
    """A hundred outages leave a task pending with all its attempts, and it waits out each delay."""
    planned(engine, RANGE)
    (fed,) = ledger.feed(engine, 1)
    for _ in range(100):
        claim = claimed(engine, fed)
        assert claim.attempts == 1
        assert ledger.release(engine, fed, claim.fence, 30, "api-outage", "503 from the API")
        assert ledger.claim(engine, fed, "w", 60) is None
        assert ledger.feed(engine, 1) == []
        let_delays_pass(engine)
    row = task(engine, fed)
    assert (row.state, row.attempts, row.error_kind) == (TaskState.PENDING, 0, "api-outage")


def test_a_faulty_task_fails_after_its_attempts(engine: Engine) -> None:
    """Faults spend attempts and wait; past the last one the task has failed with its reason."""
    planned(engine, RANGE)
    (fed,) = ledger.feed(engine, 1)
    seen = []
    for _ in range(3):
        claim = claimed(engine, fed)
        seen.append(ledger.give_back(engine, fed, claim.fence, "read-error", "bad\0packet", 3, 30))
        assert ledger.claim(engine, fed, "w", 60) is None
        let_delays_pass(engine)
    assert seen == [TaskState.PENDING, TaskState.PENDING, TaskState.FAILED]
    assert task(engine, fed).error == "bad\\x00packet"
    assert ledger.feed(engine, 1) == []


def test_a_lease_and_a_rest_may_be_as_long_as_one_likes(engine: Engine) -> None:
    """Also beyond the milliseconds that 32 bits count."""
    planned(engine, RANGE)
    (fed,) = ledger.feed(engine, 1)
    claim, months_s = claimed(engine, fed, 10_000_000), 10_000_000
    assert ledger.heartbeat(engine, fed, claim.fence, months_s)
    state = ledger.give_back(engine, fed, claim.fence, "read-error", "no", 9, months_s)
    assert state is TaskState.PENDING
    assert ledger.feed(engine, 1) == []


# Sweeping


def test_a_wiped_queue_heals(engine: Engine) -> None:
    """Messages that nobody answers are pending again after the timeout, and not before."""
    planned(engine, 3 * RANGE)
    assert len(ledger.feed(engine, 3)) == 3
    assert ledger.sweep(engine, 120).unqueued == 0
    with writing(engine) as connection:
        connection.execute(update(tasks).values(queued_ms=Now() - 121_000))
    assert ledger.sweep(engine, 120).unqueued == 3
    assert work(engine) == 3


@pytest.mark.parametrize("waiting", [3, None])
def test_messages_that_wait_are_not_sent_again(engine: Engine, waiting: int | None) -> None:
    """While the queue holds all that is queued, or cannot be asked, nothing is lost: without
    workers it would pile up."""
    planned(engine, 3 * RANGE)
    ledger.feed(engine, 3)
    assert ledger.sweep(engine, -1, waiting=waiting).unqueued == 0
    assert ledger.sweep(engine, -1, waiting=2).unqueued == 3


def test_a_lost_worker_gives_its_task_back(engine: Engine) -> None:
    """An expired lease is swept back to pending; the attempt stays spent."""
    planned(engine, RANGE)
    (fed,) = ledger.feed(engine, 1)
    claimed(engine, fed)
    assert ledger.sweep(engine, 120).expired == 0
    let_leases_expire(engine)
    assert ledger.sweep(engine, 120).expired == 1
    assert task(engine, fed).attempts == 1
    assert ledger.sweep(engine, 120).expired == 0
    assert work(engine) == 1


def test_a_task_that_kills_workers_ends(engine: Engine) -> None:
    """A poison task is given out at most so many times, however often its message comes."""
    planned(engine, RANGE)
    (fed,) = ledger.feed(engine, 1)
    for attempt in range(1, ledger.MAX_ATTEMPTS + 1):
        assert claimed(engine, fed).attempts == attempt
        let_leases_expire(engine)
        assert ledger.claim(engine, fed, "next victim", 60) is None
        swept = ledger.sweep(engine, 120)
    assert (swept.expired, swept.failed) == (0, 1)
    assert task(engine, fed).error_kind == ledger.WORKER_LOST
    (closed,) = ledger.close_finished(engine)
    assert closed.state is VideoState.FAILED


# Pausing, recovering, cancelling, trying again


def test_a_paused_job_is_neither_fed_nor_claimed(engine: Engine) -> None:
    """Pausing turns away messages on their way, lets work under lease end, and can be undone."""
    job = planned(engine, 3 * RANGE)
    fed = ledger.feed(engine, 2)
    claim = claimed(engine, fed[0])
    ledger.pause_job(engine, job.job_id, "api-refused", "401:\nthe key is not valid")
    status = ledger.status(engine, job.job_id)
    assert (status.held, status.job.pause_kind) == ("401: the key is not valid", "api-refused")
    assert ledger.feed(engine, 10) == []
    assert ledger.claim(engine, fed[1], "w", 60) is None
    assert results.commit(engine, fed[0], claim.fence, found(claim))
    ledger.resume_job(engine, job.job_id)
    assert ledger.status(engine, job.job_id).held is None
    assert work(engine) == 2


def test_recovery_takes_tasks_back_at_once(engine: Engine) -> None:
    """After an interruption all that was queued or held by the stopped workers is pending, no
    attempt is spent, and such a worker that lives all the same writes nothing; others go on."""
    job = planned(engine, 4 * RANGE)
    fed = ledger.feed(engine, 4)
    mine = ledger.claim(engine, fed[0], "mine/1", 60)
    other = ledger.claim(engine, fed[1], "other/1", 60)
    assert mine is not None
    assert other is not None
    assert ledger.lease_holders(engine, job.job_id) == {"mine/1", "other/1"}
    assert ledger.recover(engine, job.job_id, ["mine/1"]) == 3
    assert ledger.recover(engine, job.job_id, ["mine/1"]) == 0
    assert not results.commit(engine, fed[0], mine.fence, found(mine))
    assert results.commit(engine, fed[1], other.fence, found(other))
    assert ledger.status(engine, job.job_id).tasks_by_state[TaskState.PENDING] == 3
    assert [task(engine, one).attempts for one in fed] == [0, 1, 0, 0]
    assert work(engine) == 3


def test_leases_of_dead_workers_run_out_at_once(engine: Engine) -> None:
    """A worker known to be dead does not hold its task for the rest of its lease; the attempt is
    spent, since the task may have killed it."""
    job = planned(engine, 2 * RANGE)
    fed = ledger.feed(engine, 2)
    for one, worker in zip(fed, ["dead/1", "alive/1"], strict=True):
        ledger.claim(engine, one, worker, 60)
    assert ledger.expire_leases(engine, job.job_id, ["dead/1"]) == 1
    assert ledger.sweep(engine, 60).expired == 1
    assert task(engine, fed[0]).state == TaskState.PENDING
    assert task(engine, fed[0]).attempts == 1
    assert task(engine, fed[1]).state == TaskState.LEASED


def test_a_cancelled_job_closes_with_gaps(engine: Engine) -> None:
    """What is not done is given up: it becomes gaps, and work under lease is not written."""
    job = planned(engine, 2 * RANGE, RANGE)
    fed = ledger.feed(engine, 2)
    first, second = claimed(engine, fed[0]), claimed(engine, fed[1])
    results.commit(engine, fed[0], first.fence, found(first))
    assert ledger.cancel_job(engine, job.job_id) == Units(2, 0)
    assert not results.commit(engine, fed[1], second.fence, found(second))
    states = {one.video_id: one.state for one in ledger.close_finished(engine)}
    assert list(states.values()) == [VideoState.PARTIAL, VideoState.CANCELLED]
    assert {gap.kind for one in coverage(engine, job.job_id) for gap in one.gaps} == {
        GapKind.CANCELLED
    }
    assert ledger.status(engine, job.job_id).finished


def test_failed_tasks_can_be_tried_again(engine: Engine) -> None:
    """Trying again opens video and job, and ends with what a calm run gives."""
    calm = planned(engine, 3 * RANGE, key="calm")
    work(engine)
    ledger.close_finished(engine)
    job = planned(engine, 3 * RANGE)
    fed = ledger.feed(engine, 1)
    claim = claimed(engine, fed[0])
    ledger.give_back(engine, fed[0], claim.fence, "read-error", "the share is away", 1, 0)
    work(engine)
    (closed,) = ledger.close_finished(engine)
    assert closed.state is VideoState.PARTIAL
    assert ledger.retry_job(engine, calm.job_id) == Units(0, 0)
    assert ledger.retry_job(engine, job.job_id) == Units(1, 0)
    assert not ledger.status(engine, job.job_id).finished
    assert ledger.close_finished(engine) == []
    assert work(engine) == 1
    (closed,) = ledger.close_finished(engine)
    assert closed.state is VideoState.COMPLETE
    for table in (samples, predictions, scenes, gaps):
        mine = [row[1:] for row in rows_of(engine, table) if row[0] == job.job_id]
        assert mine == [row[1:] for row in rows_of(engine, table) if row[0] == calm.job_id]


def test_a_failed_task_is_tried_again_while_its_video_runs(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long video's lost range need not wait for the others; a close that was computed before the
    retry is not written."""
    job = planned(engine, 2 * RANGE)
    lost, other = ledger.feed(engine, 2)
    claim = claimed(engine, lost)
    ledger.give_back(engine, lost, claim.fence, "read-error", "the share is away", 1, 0)
    assert ledger.retry_job(engine, job.job_id, kind="weather") == Units(0, 0)
    assert ledger.retry_job(engine, job.job_id, kind="read-error") == Units(1, 0)
    assert task(engine, lost).state == TaskState.PENDING
    claim = claimed(engine, other)
    assert results.commit(engine, other, claim.fence, found(claim))
    claim = claimed(engine, lost)
    ledger.give_back(engine, lost, claim.fence, "read-error", "the share is away", 1, 0)
    computed = closing._outcome

    def retried_meanwhile(*asked: Any) -> Any:
        outcome = computed(*asked)
        ledger.retry_job(engine, job.job_id)
        return outcome

    monkeypatch.setattr(closing, "_outcome", retried_meanwhile)
    assert ledger.close_finished(engine) == []
    monkeypatch.undo()
    assert work(engine) == 1
    (closed,) = ledger.close_finished(engine)
    assert closed.state is VideoState.COMPLETE


# Closing


def test_a_video_is_closed_when_its_rows_say_so(engine: Engine) -> None:
    """Complete, partial and failed follow from the rows; each video is closed once."""
    job = planned(engine, 2 * RANGE, 2 * RANGE, RANGE)
    complete, partial, failed = job.video_ids
    assert ledger.close_finished(engine) == []
    for fed in ledger.feed(engine, 100):
        claim = claimed(engine, fed)
        start = claim.frame_range.start_us
        if claim.video_id == failed:
            ledger.give_back(engine, fed, claim.fence, "read-error", "no such file", 1, 0)
        elif claim.video_id == partial and start == 0:
            gap = Gap(start, start + SECOND, GapKind.DAMAGED, "2 packets")
            results.commit(engine, fed, claim.fence, found(claim, gaps=[gap]))
        else:
            results.commit(engine, fed, claim.fence, found(claim))
    states = {one.video_id: one.state for one in ledger.close_finished(engine)}
    assert states == {
        complete: VideoState.COMPLETE,
        partial: VideoState.PARTIAL,
        failed: VideoState.FAILED,
    }
    assert ledger.close_finished(engine) == []
    rows = {one.video_id: one for one in coverage(engine, job.job_id)}
    assert rows[complete].gaps == ()
    assert rows[partial].gaps == (Gap(0, SECOND, GapKind.DAMAGED, "2 packets"),)
    lost = Gap(0, RANGE * SECOND, GapKind.TASK_FAILED, "read-error: no such file")
    assert rows[failed].gaps == (lost,)
    assert (rows[failed].reason_kind, rows[failed].reason) == (lost.kind, lost.detail)
    status = ledger.status(engine, job.job_id)
    assert status.job.state is JobState.CLOSED
    assert status.covered_us == status.duration_us


def spoil(engine: Engine, job: Planned) -> None:
    """Have the job's first video hold a row that no release at hand can read."""
    gap = {"start_us": 0, "end_us": 1, "kind": "eaten", "detail": "", "task_id": 1}
    with writing(engine) as connection:
        connection.execute(insert(gaps).values(job_id=job.job_id, video_id=job.video_ids[0], **gap))


@pytest.mark.expects_error_log("cannot be closed")
def test_a_video_that_cannot_be_closed_holds_up_no_other(engine: Engine) -> None:
    """It stays open and is told in the log; jobs of this release go on."""
    broken, whole = (planned(engine, RANGE, key=key) for key in ("broken", "whole"))
    work(engine)
    spoil(engine, broken)
    closed = ledger.close_finished(engine)
    assert [one.job_id for one in closed] == [whole.job_id]


@pytest.mark.expects_error_log("cannot be closed")
def test_what_cannot_be_closed_is_told_once(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever looks twice a second fills no disk with it, and tries again now and then."""
    job = planned(engine, RANGE)
    work(engine)
    now = [0.0]
    unclosable = ledger.Unclosable(clock=lambda: now[0])
    spoil(engine, job)
    for now[0] in (0.0, 0.5, 70.0):
        assert ledger.close_finished(engine, unclosable=unclosable) == []
    assert caplog.text.count("cannot be closed") == 1
    with writing(engine) as connection:
        connection.execute(delete(gaps))
    now[0] = 100.0
    assert ledger.close_finished(engine, unclosable=unclosable) == []
    now[0] = 140.0
    assert len(ledger.close_finished(engine, unclosable=unclosable)) == 1


def test_many_videos_are_closed_a_few_at_a_time(engine: Engine) -> None:
    """So that workers wait for work no longer than that takes."""
    planned(engine, RANGE, RANGE, RANGE)
    work(engine)
    assert [len(ledger.close_finished(engine, limit=2)) for _ in range(3)] == [2, 1, 0]


def test_closers_at_once_close_once(engine: Engine) -> None:
    """Each video is reported closed by one of several closers, and its scenes are there once."""
    planned(engine, *[RANGE] * 6)
    work(engine)
    start = threading.Barrier(4)

    def close(_: int) -> list[ledger.ClosedVideo]:
        start.wait()
        return ledger.close_finished(engine)

    with ThreadPoolExecutor(4) as pool:
        closed = [one for part in pool.map(close, range(4)) for one in part]
    assert len(closed) == len(set(closed)) == 6
    assert count(engine, scenes) == 6


def test_a_job_stays_open_while_it_is_planned(engine: Engine) -> None:
    """A job closes after its planning only, and opens again for new videos."""
    job = ledger.open_job(engine, spec(), files=())
    add_video(engine, job.id, "a", RANGE)
    work(engine)
    assert len(ledger.close_finished(engine)) == 1
    assert not ledger.status(engine, job.id).finished
    ledger.finish_planning(engine, job.id)
    ledger.close_finished(engine)
    assert ledger.status(engine, job.id).finished
    assert not ledger.open_job(engine, spec(), files=()).created
    assert not ledger.status(engine, job.id).finished
    add_video(engine, job.id, "b", RANGE)
    ledger.finish_planning(engine, job.id)
    ledger.close_finished(engine)
    assert not ledger.status(engine, job.id).finished
    work(engine)
    ledger.close_finished(engine)
    assert ledger.status(engine, job.id).finished


def test_a_new_video_opens_a_closed_job(engine: Engine) -> None:
    """Planning into a closed job opens it even where nobody said that planning goes on."""
    job = planned(engine, RANGE)
    work(engine)
    ledger.close_finished(engine)
    add_video(engine, job.job_id, "late", RANGE)
    assert not ledger.status(engine, job.job_id).finished
    work(engine)
    ledger.close_finished(engine)
    assert ledger.status(engine, job.job_id).finished


def test_time_adds_up_at_every_step(engine: Engine) -> None:
    """Analysed, gaps and waiting are the duration of each video after every single step."""
    job = planned(engine, 11, 5)

    def check() -> None:
        rows = coverage(engine, job.job_id)
        for row in rows:
            assert row.analysed_us + row.gap_us + row.waiting_us == row.duration_us
            if row.state is not VideoState.RUNNING:
                assert row.waiting_us == 0
        status = ledger.status(engine, job.job_id)
        assert status.duration_us == sum(row.duration_us for row in rows) == 16 * SECOND
        assert status.analysed_us == sum(row.analysed_us for row in rows)

    check()
    for turn, fed in enumerate(ledger.feed(engine, 100)):
        claim = claimed(engine, fed)
        check()
        one = claim.frame_range
        if turn == 1:
            ledger.give_back(engine, fed, claim.fence, "read-error", "gone", 1, 0)
        elif turn == 2:
            gap = Gap(one.end_us - SECOND, one.end_us, GapKind.TRUNCATED)
            results.commit(engine, fed, claim.fence, found(claim, gaps=[gap]))
        else:
            results.commit(engine, fed, claim.fence, found(claim))
        check()
    ledger.close_finished(engine)
    check()
    assert coverage(engine, job.job_id, job.video_ids[1])[0].video_id == job.video_ids[1]


def test_status_counts_what_was_spent(engine: Engine) -> None:
    """Samples, calls and seconds of committed tasks add up, and of nothing else."""
    job = planned(engine, 2 * RANGE)
    assert ledger.status(engine, job.job_id).usage.image_calls == 0
    work(engine)
    status = ledger.status(engine, job.job_id)
    assert (status.samples, status.usage.image_calls, status.usage.bytes_sent) == (8, 8, 800)
    assert (status.usage.api_seconds, status.usage.decode_seconds) == (1.0, 0.5)
    assert (status.videos, status.closed_videos, status.tasks, status.open_tasks) == (1, 0, 2, 0)


# Query plans


COUNTED = {"id", "bucket_start", "bucket_end", "ordinal", "state"}


def test_the_hot_queries_use_their_indexes(engine: Engine) -> None:
    """On a table of 1,000,000 finished and pending tasks, neither feeding, claiming, committing,
    sweeping nor closing reads all of it."""
    job = planned(engine, RANGE, RANGE)
    columns = ", ".join(column.name for column in tasks.c if column.name not in COUNTED)
    numbers = "WITH RECURSIVE n(i) AS (SELECT 10 UNION ALL SELECT i + 1 FROM n WHERE i < 1000009)"
    if engine.dialect.name == "postgresql":
        numbers = "WITH n(i) AS (SELECT generate_series(10, 1000009))"
    with writing(engine) as connection:
        connection.execute(
            text(
                f"INSERT INTO tasks ({columns}, bucket_start, bucket_end, ordinal, state) "
                f"{numbers} SELECT {columns}, i * {RANGE}, (i + 1) * {RANGE}, i, "
                "CASE WHEN i % 4 = 0 THEN 'pending' ELSE 'done' END "
                "FROM n, (SELECT * FROM tasks LIMIT 1) AS one"
            )
        )
    with writing(engine) as connection:
        connection.execute(text("ANALYZE"))
    (fed,) = ledger.feed(engine, 1)
    claim = claimed(engine, fed)

    plans = explained(engine, lambda: ledger.feed(engine, 20))
    assert "ix_tasks_in_flight" in plans
    assert "ix_tasks_feed" in plans
    assert_no_scan(plans)
    assert_no_scan(explained(engine, lambda: ledger.claim(engine, fed, "w", 60)))
    assert_no_scan(explained(engine, lambda: ledger.heartbeat(engine, fed, claim.fence, 60)))
    plans = explained(engine, lambda: ledger.sweep(engine, 120))
    assert plans.count("ix_tasks_in_flight") == 3
    assert_no_scan(plans)
    plans = explained(engine, lambda: ledger.close_finished(engine))
    assert "ix_tasks_open" in plans
    assert_no_scan(plans)
    result = found(claim)
    plans = explained(engine, lambda: results.commit(engine, fed, claim.fence, result))
    assert_no_scan(plans)
    assert job.video_ids


def explained(engine: Engine, act: Callable[[], object]) -> str:
    """The query plans of every statement that touches tasks while acting."""
    seen: list[tuple[str, Any]] = []

    def note(_c: Any, _k: Any, statement: str, parameters: Any, _x: Any, many: bool) -> None:
        if "tasks" in statement and not many:
            seen.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", note)
    try:
        act()
    finally:
        event.remove(engine, "before_cursor_execute", note)
    assert seen
    prefix = "EXPLAIN QUERY PLAN " if engine.dialect.name == "sqlite" else "EXPLAIN "
    lines = []
    with writing(engine) as connection:
        for statement, parameters in seen:
            rows = connection.exec_driver_sql(prefix + statement, parameters)
            lines += [str(row[-1]) for row in rows]
    return "\n".join(lines)


def assert_no_scan(plans: str) -> None:
    full = [
        line
        for line in plans.splitlines()
        if "Seq Scan on tasks" in line or line.strip() in ("SCAN tasks", "SCAN TABLE tasks")
    ]
    assert not full, plans


def test_a_connection_of_another_process_is_not_needed(database_url: str, engine: Engine) -> None:
    """What one engine commits, another one on the same URL sees."""
    job = planned(engine, RANGE)
    other = connect(database_url)
    assert ledger.status(other, job.job_id).tasks == 1
    other.dispose()
