"""A farm's day by its commands: how jobs stand, and how they are paused, cancelled and retried."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import select as polling
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from contract_server import contract_server
from rows import RANGE, SECOND, add_video, claimed, file, found, planned, spec, work
from sqlalchemy import Engine, event, update

from nightreel.cli import run_command
from storage import database, ledger, results
from storage.database import writing
from storage.dialect import Now
from storage.failures import Lost, failures
from storage.ledger import BUDGET_SPENT, JobState
from storage.ledger.progress import BY_HAND, list_jobs
from storage.records import Gap, GapKind, TaskState, VideoState
from storage.schema import gaps, job_videos, jobs, tasks

NIGHTREEL = str(Path(sys.executable).with_name("nightreel"))


@pytest.fixture
def farm(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    """The database that commands of this test use."""
    monkeypatch.setenv("NIGHTREEL_DATABASE_URL", sqlite_url)
    monkeypatch.setenv("TZ", "UTC")
    engine = database.connect(sqlite_url)
    yield engine
    engine.dispose()


class Asked:
    """What a command has ended with, printed and said."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *words: str) -> None:
        self.code = run_command(list(words))
        self.out, self.said = capsys.readouterr()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def fail(engine: Engine, task_id: int, kind: str = "decode") -> None:
    """Have the task fail for good."""
    claim = claimed(engine, task_id)
    state = ledger.give_back(engine, task_id, claim.fence, kind, "no frame came", 1, 0)
    assert state is TaskState.FAILED


def written(engine: Engine, job_id: int, **values: str) -> None:
    """As if another release had written this of the job."""
    with writing(engine) as connection:
        connection.execute(update(jobs).where(jobs.c.id == job_id).values(values))


# How a job stands


def test_status_tells_a_job_in_the_middle_of_its_work(engine: Engine) -> None:
    """Each number is counted from the rows, on both databases: what is done, what is under way and
    by whom, what waits and for what, what is left of the budget."""
    job = planned(engine, 2 * RANGE, 2 * RANGE)
    ledger.set_budget(engine, job.job_id, 100)
    ledger.reserve_calls(engine, job.job_id, 8)
    done, waits, lost, leased = ledger.feed(engine, 4)
    claim = claimed(engine, done)
    assert results.commit(engine, done, claim.fence, found(claim))
    claim = claimed(engine, waits)
    ledger.release(engine, waits, claim.fence, 60, "api-outage", "503")
    fail(engine, lost)
    claimed(engine, leased)
    stands = ledger.status(engine, job.job_id)
    assert {state: n for state, n in stands.tasks_by_state.items() if n} == {
        TaskState.DONE: 1, TaskState.PENDING: 1, TaskState.FAILED: 1, TaskState.LEASED: 1,
    }  # fmt: skip
    assert dict(stands.waiting) == {"api-outage": 1}
    assert stands.workers == ("worker",)
    assert (stands.max_calls, stands.calls_left) == (100, 92)
    assert (stands.samples, stands.analysed_us, stands.gap_us) == (RANGE, 4_000_000, 4_000_000)
    assert not stands.complete


def test_files_to_be_read_are_planning(engine: Engine) -> None:
    """A submitted job without a plan yet counts its files."""
    job = ledger.open_job(engine, spec(), files=[file("one"), file("two")])
    (probe_id,) = ledger.feed_probes(engine, 1)
    assert ledger.claim_probe(engine, probe_id, "reader", 60) is not None
    stands = ledger.status(engine, job.id)
    assert (stands.open_probes, stands.videos, stands.workers) == (2, 0, ("reader",))
    assert stands.eta_s is None


def test_speeds_are_those_of_the_last_minutes(engine: Engine) -> None:
    """By the database's clock: what was done long ago does not count, and a job that is younger
    than that is measured over its own age."""
    job = planned(engine, *[RANGE] * 5)
    first = ledger.feed(engine, 3)
    for task_id in first:
        claim = claimed(engine, task_id)
        assert results.commit(engine, task_id, claim.fence, found(claim))
    with writing(engine) as connection:
        connection.execute(
            update(tasks).where(tasks.c.id == first[0]).values(done_ms=Now() - 10**6)
        )
        connection.execute(update(jobs).values(opened_ms=Now() - 10**7))
    stands = ledger.status(engine, job.job_id)
    assert (stands.recent.tasks, stands.recent.samples) == (2, 2 * RANGE)
    assert stands.recent.seconds == 300
    assert stands.recent.times_real == pytest.approx(2 * RANGE / 300)
    assert stands.eta_s == pytest.approx(300)
    with writing(engine) as connection:
        connection.execute(update(jobs).values(opened_ms=Now() - 100_000))
    assert ledger.status(engine, job.job_id).recent.seconds == pytest.approx(100, abs=5)
    ledger.pause_job(engine, job.job_id, BY_HAND, "lunch")
    assert ledger.status(engine, job.job_id).eta_s is None


def test_status_is_one_card_one_object_or_one_row(
    farm: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    """For people a card, for programs the same numbers in each format."""
    job = planned(farm, 2 * RANGE, RANGE, notice="a coarse engine")
    ledger.reject_video(
        farm, job.job_id, ledger.register_file(farm, file("text"), "text"), "no-video", "text"
    )
    work(farm)
    ledger.close_finished(farm)
    as_json = Asked(capsys, "status", "--json").json
    assert as_json == Asked(capsys, "status", "--format", "json").json
    assert as_json == json.loads(Asked(capsys, "status", "1", "--format", "jsonl").out)
    (row,) = csv.DictReader(io.StringIO(Asked(capsys, "status", "--format", "csv").out))
    assert list(row) == list(as_json)
    chosen = ("job", "state", "videos", "videos_complete", "videos_rejected", "tasks_done", "held")
    assert [as_json[key] for key in chosen] == [1, "closed", 3, 2, 1, 3, None]
    assert (as_json["analysed"], as_json["image_calls"], as_json["calls_left"]) == (1, 12, None)
    assert as_json["closed"].endswith("Z")
    card = Asked(capsys, "status")
    assert card.code == 0
    for line in (
        "Job 1: seasons, closed",
        "3 of 3 closed: 2 complete, 1 rejected",
        "100 % of 12.0 s analysed",
        "12 image calls, 0 text calls, 0.0 MB sent",
        "NOTE: a coarse engine",
    ):
        assert line in card.out


def test_the_card_of_a_job_at_work_tells_what_holds_it(
    farm: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    """Speed, workers, what tasks wait for, and why nothing moves."""
    job = planned(farm, 2 * RANGE)
    one, two = ledger.feed(farm, 2)
    claimed(farm, one)
    claim = claimed(farm, two)
    ledger.release(farm, two, claim.fence, 60, "api-outage", "503")
    ledger.pause_job(farm, job.job_id, "api-refused", "401: the key is not valid")
    card = Asked(capsys, "status").out
    for line in ("401: the key is not valid", "1 at work: worker", "api-outage (1)", "x real"):
        assert line in card
    assert "none is running" in card
    assert ledger.lead(farm, "scheduler", "me", 60)
    assert "none is running" not in Asked(capsys, "status").out


def test_status_shows_the_job_asked_for(farm: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    """The latest by default, by number or by --job; what is not there or contradicts is refused."""
    planned(farm, RANGE)
    planned(farm, RANGE, key="b")
    assert Asked(capsys, "status", "--json").json["job"] == 2
    assert Asked(capsys, "status", "1", "--json").json["job"] == 1
    assert Asked(capsys, "status", "--job", "1", "--json").json["job"] == 1
    for words in (["7"], ["1", "--job", "2"], ["x"], ["0"]):
        refused = Asked(capsys, "status", *words)
        assert (refused.code, refused.out) == (2, "")
    assert "`nightreel jobs`" in Asked(capsys, "pause", "7").said


# Waiting


def waiting(*words: str) -> subprocess.Popen[str]:
    """A process that waits for a job, and has said that it does."""
    process = subprocess.Popen(
        [NIGHTREEL, "status", "--wait", "--json", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert "0/1 videos" in process.stderr.readline()
    return process


def test_waiting_ends_with_the_job(farm: Engine) -> None:
    """A job that somebody has paused is waited for; its end is an exit code and the numbers."""
    job = planned(farm, RANGE)
    ledger.pause_job(farm, job.job_id, BY_HAND, "lunch")
    process = waiting()
    ledger.resume_job(farm, job.job_id)
    work(farm)
    ledger.close_finished(farm)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert json.loads(out)["state"] == "closed"


def test_an_interrupted_wait_leaves_the_job_alone(farm: Engine) -> None:
    """Ctrl-C ends the waiting with 130 and nothing else."""
    job = planned(farm, RANGE)
    process = waiting()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "job 1 goes on" in err
    assert ledger.get_job(farm, job.job_id).state is JobState.RUNNING


@pytest.mark.parametrize(
    ("kind", "code"), [(BUDGET_SPENT, 3), ("api-refused", 12), ("model-differs", 12)]
)
def test_waiting_ends_where_the_job_is_held(
    farm: Engine, capsys: pytest.CaptureFixture[str], kind: str, code: int
) -> None:
    """A spent budget and an API that refuses do not pass by themselves."""
    job = planned(farm, RANGE)
    ledger.pause_job(farm, job.job_id, kind, "because")
    asked = Asked(capsys, "status", "--wait")
    assert asked.code == code
    assert "because" in asked.out


def test_waiting_for_a_job_with_gaps_ends_with_3(
    farm: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code tells that something is not analysed."""
    job = planned(farm, RANGE)
    ledger.cancel_job(farm, job.job_id)
    ledger.close_finished(farm)
    assert Asked(capsys, "status", "--wait").code == 3


# Many jobs


def test_jobs_are_listed_newest_first(farm: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    """One row a job, chosen by tag and state; more than the limit is told."""
    for key, tag in (("a", "night"), ("b", None), ("c", "night")):
        job = ledger.open_job(farm, spec(key, request=key), tag=tag, files=())
        add_video(farm, job.id, "v0", 2 * RANGE)
        add_video(farm, job.id, "v1", RANGE)
        ledger.finish_planning(farm, job.id)
    work(farm, 1)
    ledger.close_finished(farm)
    (task_id,) = ledger.feed(farm, 1, 3)
    claim = claimed(farm, task_id)
    assert results.commit(farm, task_id, claim.fence, found(claim))
    ledger.pause_job(farm, 2, BY_HAND, "lunch")
    rows = Asked(capsys, "jobs", "--format", "json").json
    assert [(r["job"], r["state"], r["tag"], r["videos"]) for r in rows] == [
        (3, "running", "night", 2), (2, "paused", None, 2), (1, "closed", "night", 2),
    ]  # fmt: skip
    assert [row["done"] for row in rows] == [pytest.approx(1 / 3), 0, 1]
    assert [row["held"] for row in rows] == [None, "lunch", None]
    chosen = Asked(capsys, "jobs", "--tag", "night", "--state", "closed", "--format", "jsonl")
    assert json.loads(chosen.out)["job"] == 1
    table = Asked(capsys, "jobs", "--limit", "2")
    assert "2 of 3 jobs" in table.said
    assert "33 %" in table.out
    assert "seasons" in table.out


def test_a_list_of_many_jobs_is_a_few_queries(engine: Engine) -> None:
    """However many jobs there are, the database is asked as often as for one."""
    asked: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *given: asked.append(given[2]))

    def queries() -> int:
        asked.clear()
        found, every = list_jobs(engine, limit=100)
        assert len(found) == every
        return len(asked)

    planned(engine, RANGE)
    of_one = queries()
    for key in range(20):
        planned(engine, RANGE, key=str(key))
    assert queries() == of_one


@pytest.mark.parametrize(
    "theirs", [{"sampling": "bursts@2"}, {"sampling": "first@1/0"}, {"fit": "spiral"}]
)
def test_a_job_of_a_later_release_is_listed_and_ended_as_any_other(
    farm: Engine, capsys: pytest.CaptureFixture[str], theirs: dict[str, str]
) -> None:
    """It says that this release cannot read it, stops no answer about the others, and can be
    paused, cancelled and purged; what would have to read it ends with one line."""
    planned(farm, 2 * RANGE, key="theirs")
    claim = claimed(farm, ledger.feed(farm, 1)[0])
    assert results.commit(farm, claim.task_id, claim.fence, found(claim))
    written(farm, 1, version="9.0", **theirs)
    planned(farm, RANGE, key="ours")
    ours, of_them = Asked(capsys, "jobs", "--format", "json").json
    assert (ours["unreadable"], ours["done"]) == (None, 0)
    assert "made by nightreel 9.0" in of_them["unreadable"]
    assert "Unreadable because" in Asked(capsys, "jobs").out
    assert "made by nightreel 9.0" in Asked(capsys, "status", "1").out
    told = Asked(capsys, "status", "1", "--json").json
    assert (told["unreadable"], told["tasks_done"]) == (of_them["unreadable"], 1)
    assert {name: told[name] for name in theirs} == theirs
    assert Asked(capsys, "status", "2", "--json").json["unreadable"] is None
    refused = Asked(capsys, "search", "--like", "v0.mp4@0:00:01", "--job", "1")
    assert (refused.code, refused.said) == (11, f"nightreel: {told['unreadable']}\n")
    assert "is paused" in Asked(capsys, "pause", "1").said
    assert "goes on" in Asked(capsys, "resume", "1").said
    assert "1 task given up" in Asked(capsys, "cancel", "1", "--yes").said
    assert Asked(capsys, "status", "1", "--json").json["state"] == "closed"
    assert Asked(capsys, "purge", "1", "--yes").code == 0
    assert [row["job"] for row in Asked(capsys, "jobs", "--format", "json").json] == [2]


def test_a_state_of_a_later_release_is_shown_as_it_is(
    farm: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the job, its videos, its tasks: each is counted under its own name, and nothing is begun
    or ended that this release does not know to be so."""
    job = planned(farm, RANGE, RANGE, RANGE)
    written(farm, job.job_id, state="draining", version="9.0")
    with writing(farm) as connection:
        connection.execute(update(tasks).where(tasks.c.id == 2).values(state="parked"))
        mine = job_videos.c.video_id == job.video_ids[2]
        connection.execute(update(job_videos).where(mine).values(state="sealed"))
    (row,) = Asked(capsys, "jobs", "--format", "json").json
    assert (row["state"], "nightreel 9.0" in row["unreadable"]) == ("draining", True)
    told = Asked(capsys, "status", "--json").json
    assert [told[name] for name in ("tasks_parked", "tasks_pending", "videos_sealed")] == [1, 2, 1]
    assert "1 parked" in Asked(capsys, "status").out
    assert "is draining: there is nothing to pause" in Asked(capsys, "pause", "1").said
    assert "is draining: there is nothing to resume" in Asked(capsys, "resume", "1").said
    assert ledger.feed(farm, 9) == []
    assert Asked(capsys, "cancel", "1", "--yes").code == 0
    assert Asked(capsys, "purge", "1", "--yes").code == 0


@pytest.mark.expects_error_log("cannot be closed")
def test_a_job_that_cannot_be_closed_can_be_purged(
    farm: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once it is cancelled nobody works on it, though a video of it holds what only another release
    can read; before, it is refused."""
    job = planned(farm, 2 * RANGE)
    claim = claimed(farm, ledger.feed(farm, 1)[0])
    gap = Gap(0, RANGE * SECOND, GapKind.DAMAGED)
    assert results.commit(farm, claim.task_id, claim.fence, found(claim, gaps=[gap]))
    with writing(farm) as connection:
        connection.execute(update(gaps).values(kind="eaten"))
    assert Asked(capsys, "purge", "1", "--yes").code == 2
    assert Asked(capsys, "cancel", "1", "--yes").code == 0
    assert not ledger.status(farm, job.job_id).finished
    assert Asked(capsys, "purge", "1", "--yes").code == 0
    assert Asked(capsys, "jobs", "--format", "json").json == []


@pytest.mark.parametrize("key", ["", " ", "\t\n"])
def test_a_blank_idempotency_key_is_refused(
    farm: Engine, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    """It is a script's unset variable: jobs that have nothing in common would share it."""
    asked = ["submit", "/archive", "--label", "a", "--api", "http://127.0.0.1:9"]
    refused = Asked(capsys, *asked, "--idempotency-key", key)
    assert (refused.code, refused.out) == (2, "")
    assert refused.said.splitlines()[-1].startswith("Error: Invalid value for --idempotency-key: ")


# Steering


def test_pausing_and_resuming_say_what_happened(
    farm: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line each, and what there is nothing to do for is said and is no mistake."""
    job = planned(farm, RANGE)
    nothing = Asked(capsys, "resume", "1")
    assert (nothing.code, "nothing to resume" in nothing.said) == (0, True)
    assert ledger.calls_left(farm, job.job_id) is None
    assert "is paused" in Asked(capsys, "pause", "1").said
    assert ledger.get_job(farm, job.job_id).pause_kind == BY_HAND
    assert ledger.feed(farm, 1) == []
    assert "paused already" in Asked(capsys, "pause", "1").said
    assert "goes on: 1 task open" in Asked(capsys, "resume", "1").said
    work(farm)
    ledger.close_finished(farm)
    closed = Asked(capsys, "pause", "1")
    assert (closed.code, "nothing to pause" in closed.said) == (0, True)


def test_a_spent_budget_wants_more_calls(farm: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    """Resuming would only stop again: more calls are asked for, and given."""
    job = planned(farm, RANGE)
    ledger.set_budget(farm, job.job_id, 1)
    ledger.pause_job(farm, job.job_id, BUDGET_SPENT, "the budget is spent")
    refused = Asked(capsys, "resume", "1")
    assert (refused.code, "--max-calls" in refused.said) == (2, True)
    assert Asked(capsys, "resume", "1", "--max-calls", "50").code == 0
    assert ledger.calls_left(farm, job.job_id) == 50
    assert ledger.get_job(farm, job.job_id).state is JobState.RUNNING


def test_a_job_that_runs_is_given_a_budget_too(
    farm: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    """It need not be paused for that; one that is closed is given none, and that is an error."""
    job = planned(farm, RANGE)
    given = Asked(capsys, "resume", "1", "--max-calls", "50")
    said = "job 1 is running: 50 calls may be billed from now on\n"
    assert (given.code, given.said) == (0, said)
    assert ledger.calls_left(farm, job.job_id) == 50
    work(farm)
    ledger.close_finished(farm)
    refused = Asked(capsys, "resume", "1", "--max-calls", "60")
    assert (refused.code, "is closed" in refused.said) == (2, True)
    assert ledger.calls_left(farm, job.job_id) == 50


def test_a_submission_of_a_job_that_has_spent_its_budget_says_what_goes_on(
    farm: Engine, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The command that it names is one that is not refused."""
    (tmp_path / "a.mp4").write_bytes(b"a")
    with contract_server() as server:
        asked = ["submit", str(tmp_path), "--label", "a", "--label", "b", "--api", server.url]
        asked += ["--max-calls", "5"]
        assert Asked(capsys, *asked).code == 0
        ledger.pause_job(farm, 1, BUDGET_SPENT, "the budget is spent")
        again = Asked(capsys, *asked)
    assert (again.code, "`nightreel resume 1 --max-calls N` goes on" in again.said) == (0, True)


@pytest.mark.parametrize("option", ["--name", "--tag"])
def test_a_name_is_one_line(farm: Engine, capsys: pytest.CaptureFixture[str], option: str) -> None:
    """What would break the tables of everybody's jobs is refused."""
    asked = ["submit", "/archive", "--label", "a", "--api", "http://127.0.0.1:9"]
    refused = Asked(capsys, *asked, option, "two\nlines")
    assert (refused.code, refused.out) == (2, "")
    assert f"Invalid value for '{option}': printable characters" in refused.said


def test_a_cancelled_job_is_closed_and_can_be_retried(
    farm: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is done stays; without a scheduler the job is closed all the same; retrying opens the
    rest."""
    job = planned(farm, 2 * RANGE, RANGE)
    (task_id,) = ledger.feed(farm, 1)
    claim = claimed(farm, task_id)
    assert results.commit(farm, task_id, claim.fence, found(claim))
    unsure = Asked(capsys, "cancel", "1")
    assert unsure.code == 2
    assert "give up 2 tasks" in unsure.said
    assert "--yes" in unsure.said
    assert "2 tasks given up" in Asked(capsys, "cancel", "1", "--yes").said
    stands = ledger.status(farm, job.job_id)
    assert stands.finished
    assert stands.videos_by_state[VideoState.PARTIAL] == 1
    again = Asked(capsys, "cancel", "1", "--yes")
    assert (again.code, "nothing to cancel" in again.said) == (0, True)
    assert "job 1: 2 tasks open again" in Asked(capsys, "retry", "1").said
    assert not ledger.status(farm, job.job_id).finished


def test_cancelling_ends_the_reading_of_files_too(
    farm: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    """A submitted job whose files wait to be read is closed; retrying has them read. What is said
    counts files as files."""
    job = ledger.open_job(farm, spec(), files=[file("one"), file("two")])
    ledger.pause_job(farm, job.id, BY_HAND, "lunch")
    assert "goes on: 2 unread files open" in Asked(capsys, "resume", "1").said
    assert "give up 2 unread files?" in Asked(capsys, "cancel", "1").said
    assert "is cancelled: 2 unread files given up" in Asked(capsys, "cancel", "1", "--yes").said
    stands = ledger.status(farm, job.id)
    assert (stands.finished, stands.complete, stands.open_probes) == (True, False, 0)
    assert "job 1: 2 unread files open again" in Asked(capsys, "retry", "1").said
    assert ledger.status(farm, job.id).open_probes == 2
    add_video(farm, job.id, "v0", RANGE)
    ledger.pause_job(farm, job.id, BY_HAND, "lunch")
    assert "goes on: 1 task and 2 unread files open" in Asked(capsys, "resume", "1").said


@pytest.mark.parametrize(("answer", "code", "closed"), [("n", 130, False), ("y", 0, True)])
def test_at_a_terminal_one_is_asked(farm: Engine, answer: str, code: int, closed: bool) -> None:
    """The question names what goes; only yes does it."""
    job = planned(farm, RANGE)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [NIGHTREEL, "cancel", "1"], stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True
    )
    os.close(theirs)
    shown = b""
    while b"[y/N]" not in shown:
        assert polling.select([ours], [], [], 60)[0], shown
        shown += os.read(ours, 1024)
    assert b"give up 1 task" in shown
    os.write(ours, f"{answer}\n".encode())
    assert process.wait(60) == code
    os.close(ours)
    assert ledger.status(farm, job.job_id).finished is closed


def test_retrying_chooses_by_reason_and_video(
    farm: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only what failed for this reason, only of this video; nothing to retry is no mistake."""
    planned(farm, RANGE, RANGE, RANGE)
    for task_id, kind in zip(ledger.feed(farm, 3), ("decode", "decode", "lost"), strict=True):
        fail(farm, task_id, kind)
    ledger.close_finished(farm)
    nothing = Asked(capsys, "retry", "1", "--reason", "weather")
    assert (nothing.code, "nothing for weather" in nothing.said) == (0, True)
    assert "job 1: 1 task open again" in Asked(capsys, "retry", "1", "--reason", "lost").said
    assert "1 task open again" in Asked(capsys, "retry", "1", "--video", "v1.mp4").said
    assert Asked(capsys, "retry", "1", "--video", "gone.mp4").code == 2
    assert ledger.status(farm, 1).tasks_by_state[TaskState.FAILED] == 1


def test_retrying_takes_every_reason_that_failures_names(
    farm: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    """That of a range, and that of a video all of whose ranges failed or were cancelled."""
    planned(farm, 2 * RANGE, RANGE)
    for task_id in ledger.feed(farm, 2):
        fail(farm, task_id, "read-error")
    ledger.cancel_job(farm, 1)
    ledger.close_finished(farm)
    named = {row["kind"] for row in Asked(capsys, "failures", "--format", "json").json}
    assert named == {"read-error", "task-failed"}
    for kind, opened in (("cancelled", 1), ("task-failed", 2)):
        said = Asked(capsys, "retry", "1", "--reason", kind).said
        assert f"{opened} task{'s' * (opened > 1)} open again" in said
    for task_id in ledger.feed(farm, 9):
        fail(farm, task_id, "read-error")
    assert "3 tasks open again" in Asked(capsys, "retry", "1", "--reason", "read-error").said


# Dead letters


def test_failures_lists_what_was_given_up(engine: Engine) -> None:
    """Files that no worker could probe, rejected and failed videos, failed ranges: each with its
    reason, its tries and its last worker; a bound on the rows tells that there are more."""
    job = ledger.open_job(engine, spec(), files=[file("vanished")])
    add_video(engine, job.id, "v0", 2 * RANGE)
    add_video(engine, job.id, "v1", RANGE)
    rejected = ledger.register_file(engine, file("text"), "text")
    ledger.reject_video(engine, job.id, rejected, "no-video", "this is text")
    fail(engine, ledger.feed(engine, 1)[0])
    (probe_id,) = ledger.feed_probes(engine, 1)
    claim = ledger.claim_probe(engine, probe_id, "reader", 0)
    assert claim is not None
    ledger.sweep(engine, 60, max_attempts=1)
    found, more = failures(engine, job.id, limit=10)
    assert not more
    assert [(one.lost, one.path, one.kind, one.attempts, one.worker) for one in found] == [
        (Lost.FILE, "/archive/vanished.mp4", "worker-lost", 1, "reader"),
        (Lost.RANGE, "/archive/v0.mp4", "decode", 1, "worker"),
        (Lost.VIDEO, "/archive/text.mp4", "no-video", None, None),
    ]
    assert (found[1].start_us, found[1].end_us, found[1].error) == (0, 4_000_000, "no frame came")
    assert all(one.ended_ms for one in found)
    assert [one.kind for one in failures(engine, job.id, kind="decode", limit=9)[0]] == ["decode"]
    bounded, more = failures(engine, job.id, limit=2)
    assert (bounded, more) == (found[:2], True)


def test_failures_are_printed_for_people_and_programs(
    farm: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranges as clock times in a table, seconds in data; nothing failed is said, and is no row."""
    planned(farm, RANGE, 2 * RANGE)
    calm = Asked(capsys, "failures")
    assert (calm.code, calm.out, "nothing failed" in calm.said) == (0, "", True)
    assert Asked(capsys, "failures", "--format", "json").json == []
    for task_id in ledger.feed(farm, 9)[-1:]:
        fail(farm, task_id)
    table = Asked(capsys, "failures")
    assert table.code == 0
    for cell in ("v1.mp4", "0:04.000", "0:08.000", "decode", "no frame came"):
        assert cell in table.out
    (row,) = Asked(capsys, "failures", "--job", "1", "--format", "json").json
    assert (row["start_s"], row["end_s"], row["attempts"]) == (4.0, 8.0, 1)
    assert Asked(capsys, "failures", "--reason", "weather", "--format", "csv").out.count("\n") == 1
