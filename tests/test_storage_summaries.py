"""Summaries: a video in a few numbers, and the video that a person means."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rows import RANGE, SECOND, add_video, claimed, file, planned, sample, spec, vectors_of, work
from sqlalchemy import Engine

from nightreel.archive import Archive
from nightreel.cli import run_command
from storage import ledger, results
from storage.records import ArchiveFile, RangeResult, VideoState
from storage.summaries import NoSuchVideo, SeveralVideos, find_video, find_videos, summaries


def test_a_video_in_numbers(engine: Engine) -> None:
    """Shares of analysed time, first and last time, the longest scene, and what was flagged."""
    job = planned(engine, 12)
    labels = [0] * 6 + [1] * 3 + [2] * 3
    for fed in ledger.feed(engine, 10):
        claim = claimed(engine, fed)
        buckets = claim.frame_range.buckets
        found = tuple(sample(bucket, labels[bucket]) for bucket in buckets)
        results.commit(engine, fed, claim.fence, RangeResult(found, (), vectors_of(buckets), 8))
    ledger.register_file(engine, file("copy"), "content-v0")
    ledger.close_finished(engine)
    (one,) = summaries(engine, job.job_id)
    assert one.state is VideoState.COMPLETE
    assert (one.duration_us, one.analysed_us, one.gap_us) == (12 * SECOND, 12 * SECOND, 0)
    assert set(one.paths) == {"/archive/copy.mp4", "/archive/v0.mp4"}
    assert one.scenes == 3
    assert [(share.label, share.share) for share in one.labels] == [
        ("summer", 0.5),
        ("winter", 0.25),
        ("fire", 0.25),
    ]
    assert (one.labels[1].first_us, one.labels[1].last_us) == (6 * SECOND, 9 * SECOND)
    assert one.longest is not None
    assert (one.longest.label, one.longest.end_us) == ("summer", 6 * SECOND)
    (flag,) = one.flags
    assert (flag.label, flag.reason, flag.samples) == ("fire", "burning", 3)
    assert (flag.first_us, flag.last_us, flag.peak) == (9 * SECOND, 11 * SECOND, 0.9)


def test_a_rejected_video_has_a_summary(engine: Engine) -> None:
    """What could not be read is listed with its reason, beside what was."""
    job = planned(engine, RANGE)
    bad = ledger.register_file(engine, file("a-bad"), "bad")
    ledger.reject_video(engine, job.job_id, bad, "unreadable", "moov atom not found")
    work(engine)
    ledger.close_finished(engine)
    one, two = summaries(engine, job.job_id)
    assert (one.path, one.state) == ("/archive/a-bad.mp4", VideoState.REJECTED)
    assert one.reason == "unreadable: moov atom not found"
    assert (one.labels, one.longest, one.flags) == ((), None, ())
    assert two.reason is None
    assert summaries(engine, job.job_id, bad) == [one]


def test_a_video_is_found_by_what_a_person_types(engine: Engine) -> None:
    """Full path, path's end, file name, number and content id; nothing is guessed."""
    job = ledger.open_job(engine, spec())
    one = add_video(engine, job.id, "2023/beach", RANGE)
    two = add_video(engine, job.id, "2024/beach", RANGE)
    for text in ("/archive/2023/beach.mp4", "2023/beach.mp4", str(one), "content-2023/beach"):
        assert find_videos(engine, job.id, text) == [one]
    assert find_videos(engine, job.id, "beach.mp4") == [one, two]
    for text in ("each.mp4", "BEACH.mp4", "%", "_each.mp4", "", "99", "9" * 40):
        with pytest.raises(NoSuchVideo, match="no video"):
            find_videos(engine, job.id, text)
    other = ledger.open_job(engine, spec("other"))
    with pytest.raises(NoSuchVideo):
        find_videos(engine, other.id, "beach.mp4")


def test_a_name_of_several_videos_lists_their_numbers_and_paths(
    engine: Engine, database_url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """One line that a person can choose from, of ten at most, by the command and from Python."""
    job = ledger.open_job(engine, spec())
    one, two = (add_video(engine, job.id, f"{at}/beach", RANGE) for at in (2023, 2024))
    said = (
        "'beach.mp4' names 2 videos: give more of the path, or the number of one "
        f"({one}: /archive/2023/beach.mp4; {two}: /archive/2024/beach.mp4)"
    )
    words = ["export", "timeline", "beach.mp4", "--as", "vtt", "--db", database_url]
    assert run_command(words) == 2
    assert capfd.readouterr() == ("", f"nightreel: {said}\n")
    with Archive.open(database_url) as archive, pytest.raises(ValueError, match=r"names 2 videos"):
        archive.scenes("beach.mp4")
    assert find_video(engine, job.id, "2024/beach.mp4") == two
    for at in range(10):
        add_video(engine, job.id, f"{at}/beach", RANGE)
    with pytest.raises(SeveralVideos, match=r"names 12 videos.*; and 2 more\)") as error:
        find_video(engine, job.id, "beach.mp4")
    assert str(error.value).count("/archive/") == 10


def test_a_video_is_found_by_what_a_shell_completes(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path from here names the file that it leads to, and that one alone, wherever else a file
    is called the same; of a file that is gone from here, the path's end counts."""
    folder = tmp_path / "archive"
    folder.mkdir()
    job = ledger.open_job(engine, spec())
    here = ledger.register_file(engine, ArchiveFile(str(folder / "beach.mp4"), 1, 1), "here")
    ledger.reject_video(engine, job.id, here, "unreadable", "")
    there = add_video(engine, job.id, "2024/beach", RANGE)
    monkeypatch.chdir(tmp_path)
    for text in ("./archive/beach.mp4", "archive/beach.mp4", "archive/../archive//beach.mp4"):
        assert find_videos(engine, job.id, text) == [here]
    assert find_videos(engine, job.id, "./2024/beach.mp4") == [there]
    assert find_videos(engine, job.id, "beach.mp4") == [here, there]
    monkeypatch.chdir(folder)
    for text in ("./beach.mp4", "../archive/beach.mp4", "beach.mp4"):
        assert find_videos(engine, job.id, text) == [here]


def test_a_name_that_is_no_text_is_found(engine: Engine) -> None:
    """A name of odd bytes is found as the shell hands it over."""
    job = ledger.open_job(engine, spec())
    odd = ArchiveFile(os.fsdecode(b"/archive/\xff\xfe.mp4"), 1, 1)
    video = ledger.register_file(engine, odd, "odd")
    ledger.reject_video(engine, job.id, video, "unreadable", "")
    assert find_videos(engine, job.id, os.fsdecode(b"\xff\xfe.mp4")) == [video]
