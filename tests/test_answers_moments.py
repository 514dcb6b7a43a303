"""Moments of the archive as questions: only what was embedded can be pointed at."""

from __future__ import annotations

import pytest
from click import UsageError
from embedded import LOST, asked, directions, done
from rows import file, planned
from sqlalchemy import Engine

from storage import ledger
from storage.relabel import CannotRelabel

NOBODY = ("--api", "http://127.0.0.1:1")
"""An API that would end the command with 12."""


@pytest.mark.parametrize("at", [f"{LOST}s", f"{LOST}.9s"])
def test_a_moment_that_was_not_analysed_is_refused(
    engine: Engine, database_url: str, at: str
) -> None:
    """No moment nearby stands in for it without a word: the time and where to look are said."""
    done(engine, planned(engine, 8).job_id, directions(3, 2))
    for words in (
        ("search", "--like", f"v0.mp4@{at}"),
        ("relabel", "1", "--like", f"a=v0.mp4@{at}", "--like", "b=v0.mp4@1s"),
    ):
        with pytest.raises(UsageError, match="`nightreel coverage 1 --job 1` lists") as refused:
            asked(database_url, *words)
        assert f"no embedded sample stands for 0:0{at[:-1]}" in str(refused.value)
    assert ledger.latest_job(engine).id == 1


@pytest.mark.parametrize(
    ("at", "second"), [("0", 0), ("4.999s", 4), ("6s", 6), ("7.5s", 7), ("8s", 7)]
)
def test_a_moment_is_the_sample_that_answers_for_it(
    engine: Engine, database_url: str, at: str, second: int
) -> None:
    """From its beginning up to the next one's, or up to the gap behind it; the end of the video is
    the last one's."""
    done(engine, planned(engine, 8).job_id, directions(3, 2))
    code, rows, said = asked(database_url, "search", "--like", f"v0.mp4@{at}", "--top", "1")
    assert code == 0, said
    assert rows[0]["time_s"] == pytest.approx(second, abs=1e-5)


def test_a_job_that_was_only_compared_is_not_searched_by_moments_either(
    engine: Engine, database_url: str
) -> None:
    """No other moment is advised where none is embedded, and no API is asked for a text."""
    done(engine, planned(engine, 8).job_id, directions(3, 2), embeds=False)
    for words in (("--like", "v0.mp4@1s"), ("a text that nobody asked yet", *NOBODY)):
        code, rows, said = asked(database_url, "search", *words)
        assert (code, rows) == (3, []), said
        assert "an API that only compares keeps no embeddings" in said
        assert "take a moment of another" not in said


def test_a_video_without_embeddings_beside_others_is_named(
    engine: Engine, database_url: str
) -> None:
    """Where other videos of the job are embedded, a moment of one of them is advised."""
    job = planned(engine, 8)
    bad = ledger.register_file(engine, file("bad"), "bad")
    ledger.reject_video(engine, job.job_id, bad, "unreadable", "no moov")
    done(engine, job.job_id, directions(3, 2))
    with pytest.raises(UsageError, match=f"no embeddings of video {bad}: take a moment of another"):
        asked(database_url, "search", "--like", "bad.mp4@0")


def test_a_job_without_a_readable_video_blames_no_api(engine: Engine, database_url: str) -> None:
    """Where nothing could be analysed, that is why there are no embeddings."""
    job = planned(engine)
    bad = ledger.register_file(engine, file("bad"), "bad")
    ledger.reject_video(engine, job.job_id, bad, "unreadable", "no moov")
    ledger.close_finished(engine)
    why = "no frame of job 1 could be analysed; see `nightreel coverage --job 1`"
    with pytest.raises(CannotRelabel, match=f"no stored embeddings: {why}"):
        asked(database_url, "relabel", "1", "--label", "a", "--label", "b", *NOBODY)
    code, rows, said = asked(database_url, "search", "a text", *NOBODY)
    assert (code, rows) == (3, []), said
    assert f"is embedded: {why}" in said
