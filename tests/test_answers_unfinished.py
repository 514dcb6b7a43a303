"""Answers about a job that is not done: what was not seen is never taken for what is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from clips import make_clip
from embedded import asked, directions, done
from rows import SECOND, claimed, file, found, planned, ranges, spec, work
from sqlalchemy import Engine

from nightreel.cli import run_command
from storage import ledger, relabel, results
from storage.coverage import listing
from storage.database import connect, upgrade
from storage.labels import store_label_vectors
from storage.ledger import JobState
from storage.records import ArchiveFile, Gap, GapKind, Label, LabelSet
from workers.footage.probe import probe
from workers.probing import content_id

OTHER = LabelSet(
    "other", (Label("sea", ("sea",)), Label("land", ("land",)), Label("lake", (), (), 0.6, "deep"))
)
VECTORS = directions(2, 1)[[0, 1, 0]]
"""Lake is what sea is, so it never has more than half of the confidence, and flags nothing."""
QUESTIONS = (
    ("scenes", "{video}"),
    ("search", "--like", "{video}@1"),
    ("export", "table", "scenes", "{video}", "--as", "csv"),
    ("export", "timeline", "{video}", "--as", "vtt"),
    ("export", "timeline", "{video}", "--as", "edl"),
)
"""What answers of a video as far as it is known, and ends with 0."""


def codes(url: str, *more: str) -> dict[str, tuple[int, str]]:
    """Exit code and talk of each question that a script may build on."""
    answers = {}
    for command in ("flags", "summary", "coverage"):
        code, _, said = asked(url, command, *more)
        answers[command] = code, said
    return answers


def test_files_that_nobody_has_read_are_not_free_of_flags(
    engine: Engine, database_url: str
) -> None:
    """A job that was just submitted is incomplete for every question, and says why."""
    ledger.open_job(engine, spec(), files=[file("one"), file("two")])
    for command, (code, said) in codes(database_url).items():
        assert code == 3, command
        assert "2 files still to be read; job 1 is running" in said, command
    ledger.pause_job(engine, 1, "by-hand", "later")
    code, rows, said = asked(database_url, "find", "winter")
    assert (code, rows) == (0, [])
    assert "2 files still to be read; job 1 is paused" in said


def test_a_job_without_its_list_of_videos_is_incomplete(engine: Engine, database_url: str) -> None:
    """A run that was stopped before it had planned anything has nothing to show, and says so."""
    ledger.open_job(engine, spec())
    for command, (code, said) in codes(database_url).items():
        assert code == 3, command
        assert "job 1 is running, and not all of its videos and frames are here yet" in said, (
            command
        )


def test_an_interrupted_relabel_is_incomplete_until_it_is_repeated(
    engine: Engine, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The half-made job is the latest one: it answers nothing as if it were whole."""
    monkeypatch.setattr(relabel, "_SAMPLES_AT_ONCE", 1)
    job = done(engine, planned(engine, 4, 4, 4).job_id, directions(3, 2))
    target = relabel.new_job(engine, job, OTHER)
    store_label_vectors(engine, target.label_set_id, target.model, VECTORS)

    def stop(_samples: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        relabel.relabel(engine, job, target, progress=stop)
    for command, (code, said) in codes(database_url).items():
        assert code == 3, command
        assert f"job {target.id} is running" in said, command
    assert f"job {target.id} is running" in asked(database_url, "find", "land")[2]
    relabel.relabel(engine, job, target)
    assert [code for code, _ in codes(database_url).values()] == [0, 0, 0]


def test_the_summary_of_a_relabel_does_not_wait_for_the_rows(
    engine: Engine,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The command prints its whole answer before it writes the first of the samples, and one that
    is interrupted then is told to be repeated."""
    job = done(engine, planned(engine, 4, 4, 4).job_id, directions(3, 2))
    printed: list[object] = []

    def interrupted(*_: object) -> int:
        printed.append(json.loads(capfd.readouterr().out))
        raise KeyboardInterrupt

    monkeypatch.setenv("NIGHTREEL_DATABASE_URL", database_url)
    monkeypatch.setattr(relabel, "_write_rows", interrupted)
    words = ["relabel", str(job.id), "--format", "json"]
    words += ["--like", "a=1@1", "--like", "b=1@3"]
    assert run_command(words) == 130
    assert "the same command resumes" in capfd.readouterr().err
    assert run_command(["export", "table", "predictions", "--as", "csv"]) == 0
    assert "not all of its videos and frames are here yet" in capfd.readouterr().err
    monkeypatch.undo()
    code, rows, said = asked(database_url, *words)
    assert (code, said.count("known")) == (0, 1)
    assert printed == [rows]


def test_rows_are_written_though_nobody_can_be_told(tmp_path: Path) -> None:
    """A full disk under the summary, and no place to complain, end with 1 and cost nothing."""
    url = f"sqlite:///{tmp_path}/results.db"
    engine = connect(url)
    upgrade(engine)
    job = done(engine, planned(engine, 4, 4, 4).job_id, directions(3, 2))
    words = f"relabel {job.id} --like a=1@1 --like b=1@3 --db {url}"
    nightreel = Path(sys.executable).with_name("nightreel")
    command = f"exec {nightreel} {words} > /dev/full 2>&-"
    assert subprocess.run(["sh", "-c", command], check=False, timeout=60).returncode == 1
    target = ledger.latest_job(engine)
    assert target.id != job.id
    assert target.state is JobState.CLOSED
    assert len(results.samples(engine, target.id, 1)) == 4
    engine.dispose()


def test_files_that_were_given_up_unread_are_told(engine: Engine, database_url: str) -> None:
    """A job that was cancelled early is closed, and has seen nothing of these files all the same;
    one that is a video of the job, if a rejected one, counts as that."""
    job = ledger.open_job(engine, spec(), files=[file("one"), file("two")])
    ledger.cancel_job(engine, job.id)
    ledger.close_finished(engine)
    assert ledger.get_job(engine, job.id).state is JobState.CLOSED
    for command, (code, said) in codes(database_url).items():
        assert code == 3, command
        assert "2 files of the job never read: `nightreel retry 1`" in said, command
    ledger.reject_unread(engine, job.id, file("one").path_raw, "unreadable", "gone")
    assert listing(engine, job.id).unread == 1


def test_one_video_is_judged_by_itself_once_all_are_known(
    engine: Engine, database_url: str
) -> None:
    """While others are worked on, the question about a finished video is answered; while files are
    to be read, one of them may be called the same."""
    planned(engine, 4, 4)
    first, _ = ledger.feed(engine, 8)
    claim = claimed(engine, first)
    assert results.commit(engine, first, claim.fence, found(claim))
    ledger.close_finished(engine)
    video = str(claim.video_id)
    assert [code for code, _ in codes(database_url, video).values()] == [0, 0, 0]
    assert [code for code, _ in codes(database_url).values()] == [3, 3, 3]
    ledger.open_job(engine, spec(), files=[file("late")])
    assert [code for code, _ in codes(database_url, video).values()] == [3, 3, 3]


@pytest.mark.parametrize("question", QUESTIONS, ids=" ".join)
def test_every_answer_about_half_a_video_says_so(
    engine: Engine,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    question: tuple[str, ...],
) -> None:
    """While a video is at work, and after a part of it was given up; nothing is said to whoever
    asks about another one, which was all analysed. A search is about all of them."""
    monkeypatch.setenv("NIGHTREEL_DATABASE_URL", database_url)

    def notes(video: int) -> str:
        assert run_command([word.format(video=video) for word in question]) == 0
        ended = capfd.readouterr()
        return ended.out + ended.err

    half, other = planned(engine, 8, 4).video_ids
    for task in ledger.feed(engine, 8):
        claim = claimed(engine, task)
        if claim.frame_range.bucket_start == 0:
            assert results.commit(engine, task, claim.fence, found(claim))
    ledger.close_finished(engine)
    told = "1 of the job's videos is not all analysed: see `nightreel coverage --job 1`"
    assert told in " ".join(notes(half).split())
    assert ("not all analysed" in notes(other)) == (question[0] == "search")
    ledger.cancel_job(engine, 1)
    ledger.close_finished(engine)
    assert told in " ".join(notes(half).split())


def test_scenes_and_timelines_of_what_nobody_has_seen_say_why_they_are_empty(
    engine: Engine,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Of files that are not read yet there are no scenes, and of a rejected video no timeline: the
    answer is empty, and not silent."""
    job = ledger.open_job(engine, spec(), files=[file("one"), file("two")])
    assert asked(database_url, "scenes") == (
        0, [], "note: 2 files still to be read; job 1 is running\n",
    )  # fmt: skip
    for name in ("one", "two"):
        ledger.reject_unread(engine, job.id, file(name).path_raw, "unreadable", "gone")
    bad = ledger.register_file(engine, file("bad"), "bad")
    ledger.reject_video(engine, job.id, bad, "not-a-video", "text")
    ledger.finish_planning(engine, job.id)
    ledger.close_finished(engine)
    monkeypatch.setenv("NIGHTREEL_DATABASE_URL", database_url)
    assert run_command(["export", "timeline", "bad.mp4", "--as", "vtt"]) == 0
    assert "1 of the job's videos is not all analysed" in capfd.readouterr().err


def test_pictures_of_half_a_video_say_so(
    sqlite_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A sheet and an annotated video are drawn of what was seen, with a note of what was not."""
    clip = make_clip(tmp_path / "clip.mp4", [("red", 8)])
    engine = connect(sqlite_url)
    job, seen = ledger.open_job(engine, spec()), clip.stat()
    archived = ArchiveFile(str(clip), seen.st_size, seen.st_mtime_ns)
    video = ledger.register_file(engine, archived, content_id(str(clip)))
    ledger.plan_video(engine, job.id, video, probe(str(clip))[0], ranges(8))
    ledger.finish_planning(engine, job.id)
    lost = Gap(4 * SECOND, 8 * SECOND, GapKind.DAMAGED, "noise")
    for task in ledger.feed(engine, 8, job.id):
        claim = claimed(engine, task)
        gaps = [lost] if claim.frame_range.bucket_start else []
        assert results.commit(engine, task, claim.fence, found(claim, gaps=gaps))
    ledger.close_finished(engine)
    engine.dispose()
    monkeypatch.setenv("NIGHTREEL_DATABASE_URL", sqlite_url)
    for command, name in (("sheet", "sheet.png"), ("annotate", "drawn.mp4")):
        out = tmp_path / name
        assert run_command([command, "clip.mp4", "-o", str(out)]) == 0
        assert "1 of the job's videos is not all analysed" in capfd.readouterr().err
        assert out.stat().st_size > 0


def test_an_empty_table_of_flags_says_that_there_could_be_none(
    engine: Engine,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Where labels have no threshold, the file of flags is no proof of anything; where one has,
    nothing is said."""
    unwatched = LabelSet("plain", tuple(Label(name, (name,)) for name in "abc"))
    monkeypatch.setenv("NIGHTREEL_DATABASE_URL", database_url)
    for key, labels, said in (
        ("plain", unwatched, "job 1 has no label with a `threshold`: it cannot flag anything"),
        ("other", OTHER, ""),
    ):
        work(engine, planned(engine, 4, key=key, labels=labels).job_id)
        ledger.close_finished(engine)
        assert run_command(["export", "table", "flags", "--as", "csv"]) == 0
        assert capfd.readouterr().err == f"note: {said}\n" * bool(said)
