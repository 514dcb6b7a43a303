"""The questions of the field, one command each: find, flags, highlights, totals, search."""

from __future__ import annotations

import io
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from click import UsageError
from click.testing import CliRunner
from contract_server import contract_server
from embedded import LOST, asked, directions, done, pictures
from rows import (
    RANGE,
    SEASONS,
    SECOND,
    add_video,
    claimed,
    file,
    planned,
    sample,
    spec,
    vectors_of,
    work,
)
from sqlalchemy import Engine, update

from nightreel.archive import Archive
from nightreel.cli import cli, run_command
from nightreel.cli.likes import labels_like
from scheduler.labels import LabelsError
from storage import ledger, results, vectors
from storage.columns import SampleColumns
from storage.database import reading, writing
from storage.export import Format, Kind, export_rows
from storage.flags import NothingWatched, flagged
from storage.highlights import highlights
from storage.occurrences import NoSuchLabel, occurrences
from storage.recorded import DateSource, recorded
from storage.records import (
    Gap,
    GapKind,
    LabelSet,
    Prediction,
    RangeResult,
    SampleResult,
)
from storage.scenes import scenes_of
from storage.schema import videos
from storage.scoring import Single
from storage.search import search
from storage.summaries import find_videos, known_places
from storage.totals import Period, totals

LETTERS = "swf"


def told(engine: Engine, *texts: str, confidence: float = 0.95) -> tuple[int, list[int]]:
    """A closed job in which each letter of a video's text is a second of summer, winter or fire;
    a blank is a second that does not decode."""
    job = planned(engine, *map(len, texts))
    text_of = dict(zip(job.video_ids, texts, strict=True))
    while fed := ledger.feed(engine, 8, job.job_id):
        for task_id in fed:
            claim = claimed(engine, task_id)
            text, buckets = text_of[claim.video_id], claim.frame_range.buckets
            seen = [b for b in buckets if text[b] != " "]
            found = tuple(sample(b, LETTERS.index(text[b]), confidence) for b in seen)
            gaps = tuple(
                Gap(b * SECOND, (b + 1) * SECOND, GapKind.DAMAGED) for b in buckets if b not in seen
            )
            result = RangeResult(found, gaps, vectors_of(seen) if seen else None, 8)
            assert results.commit(engine, task_id, claim.fence, result)
    ledger.close_finished(engine)
    return job.job_id, job.video_ids


# -- summary


def test_only_videos_with_copies_show_some(engine: Engine, database_url: str) -> None:
    """A table counts the copies of a video that has any, and stays empty for the others."""
    told(engine, "ssss", "ssss")
    ledger.register_file(engine, file("again"), "content-v0")
    shown = CliRunner().invoke(cli, ["summary", "--db", database_url]).stdout
    assert "Copies" in shown
    assert shown.count("+1") == 1
    assert "+0" not in shown


# -- numbers


@pytest.mark.parametrize(
    "words",
    [
        ("summary",),
        ("scenes",),
        ("coverage",),
        ("find", "summer"),
        ("flags",),
        ("highlights", "--label", "summer"),
        ("search", "--like", "/archive/a/same.mp4@1"),
    ],
    ids=" ".join,
)
def test_videos_of_one_name_are_told_apart_by_their_numbers(
    engine: Engine, database_url: str, words: tuple[str, ...]
) -> None:
    """Data name each video's number; a table does where two files are called the same. The number
    is what a video may be asked for by."""
    job = ledger.open_job(engine, spec())
    for name, seconds in (("a/same", 4), ("other", 4), ("b/same", 4)):
        add_video(engine, job.id, name, seconds)
    ledger.finish_planning(engine, job.id)
    while fed := ledger.feed(engine, 8, job.id):
        for task in fed:
            claim = claimed(engine, task)
            seen = tuple(sample(b, 2 if b == 3 else 0) for b in claim.frame_range.buckets)
            result = RangeResult(seen, (), pictures(claim.video_id, (0, 1, 2, 3)).tobytes(), 8)
            assert results.commit(engine, task, claim.fence, result)
    ledger.close_finished(engine)
    _, rows, _ = asked(database_url, *words)
    assert {(row["video_id"], row["video"]) for row in rows} == {
        (1, "/archive/a/same.mp4"), (2, "/archive/other.mp4"), (3, "/archive/b/same.mp4"),
    }  # fmt: skip
    shown = CliRunner().invoke(cli, [*words, "--db", database_url]).stdout
    assert "No." in shown
    if words[0] != "search":
        one = [*words, "3"] if words[0] != "find" else ["summary", "3"]
        assert {row["video_id"] for row in asked(database_url, *one)[1]} == {3}
        assert "No." not in CliRunner().invoke(cli, [*one, "--db", database_url]).stdout


# -- find


def test_find_tells_when_a_label_begins_and_how_long_it_lasts(engine: Engine) -> None:
    """One row a video that shows it, the most of it first; short scenes may be left out."""
    job, (a, b, c) = told(engine, "ssswwwsssswwwwww", "wwwwwwwwwwwwss", "ssssssss")
    found = occurrences(engine, job, "winter")
    assert [(one.video_id, one.first_us, one.total_us, one.scenes) for one in found] == [
        (b, 0, 12 * SECOND, 1),
        (a, 3 * SECOND, 9 * SECOND, 2),
    ]
    assert (found[1].last_us, found[1].longest_us) == (16 * SECOND, 6 * SECOND)
    assert found[1].share == 9 / 16
    longer = occurrences(engine, job, "winter", min_length_us=4 * SECOND)
    assert [one.total_us for one in longer] == [12 * SECOND, 6 * SECOND]
    assert longer[1].first_us == 10 * SECOND
    assert [one.video_id for one in occurrences(engine, job, "SUMMER ")] == [c, a, b]


def test_a_label_that_is_not_asked_for_names_those_that_are(engine: Engine) -> None:
    """A wrong name is an error with the names there are, never an empty answer."""
    job, _ = told(engine, "ssss")
    with pytest.raises(NoSuchLabel, match="only: summer, winter, fire"):
        occurrences(engine, job, "hail")
    assert occurrences(engine, job, "unknown") == []


def test_the_find_command(engine: Engine, database_url: str) -> None:
    """Rows as data; what is not all analysed is said beside them."""
    told(engine, "sss wwwww", "ssss")
    code, rows, said = asked(database_url, "find", "winter", "--min", "3s")
    assert code == 0
    assert rows == [
        {
            "video_id": 1, "video": "/archive/v0.mp4", "label": "winter", "first_s": 4.0,
            "last_s": 9.0, "total_s": 5.0, "share": 0.625, "scenes": 1, "longest_s": 5.0,
            "peak": 0.95,
        }
    ]  # fmt: skip
    assert "1 of the job's videos is not all analysed" in said
    assert asked(database_url, "find", "winter", "--min", "1min")[1] == []


# -- flags


def test_flags_are_ranges_and_the_worst_come_first(engine: Engine) -> None:
    """Neighbouring samples that raise are one range; a range ends where none raises for long."""
    job, (a, b) = told(engine, "ffssssssffsf", "ssfsss")
    assert [
        (one.video_id, one.start_us // SECOND, one.end_us // SECOND, one.samples, one.reason)
        for one in flagged(engine, job)
    ] == [(a, 8, 12, 3, "burning"), (a, 0, 2, 2, "burning"), (b, 2, 3, 1, "burning")]
    assert [one.video_id for one in flagged(engine, job, [b])] == [b]


def test_the_worst_flag_is_the_highest_then_the_longest(engine: Engine) -> None:
    """Order is by peak, then by length, whatever the time; the mean is of the samples that
    raise."""
    apart = (0.0, 0.0, 0.0)
    job = curve(engine, 0.6, *apart, 0.7, 0.7, *apart, 0.9, 0.5, *apart, 0.7, label=2)
    found = flagged(engine, job)
    assert [(one.start_us // SECOND, one.samples, one.peak) for one in found] == [
        (9, 2, 0.9), (4, 2, 0.7), (14, 1, 0.7), (0, 1, 0.6),
    ]  # fmt: skip
    assert [one.confidence for one in found] == pytest.approx([0.7, 0.7, 0.7, 0.6])


def test_the_flags_command_tells_a_script(engine: Engine, database_url: str) -> None:
    """4 where something is flagged, 3 where nothing is but not all was seen, else 0."""
    told(engine, "ssff", "ss s", "ssss")
    assert asked(database_url, "flags")[0] == 4
    assert asked(database_url, "flags", "v0.mp4")[0] == 4
    code, rows, said = asked(database_url, "flags", "v1.mp4")
    assert (code, rows) == (3, [])
    assert "not all analysed" in said
    assert asked(database_url, "flags", "v2.mp4")[0] == 0


def test_a_job_that_cannot_flag_never_says_that_nothing_is_flagged(
    engine: Engine,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The latest job may be one of other labels: a script that asks it is told so with 2, and
    which job can answer for the same video, if one can."""
    told(engine, "ssff")
    plain = replace(
        SEASONS,
        labels=tuple(replace(one, threshold=None, flag=None) for one in SEASONS.labels),
    )
    planned(engine, key="of no video")
    for key in ("plain", "later"):
        work(engine, planned(engine, 4, 4, key=key, labels=plain).job_id)
    ledger.close_finished(engine)
    monkeypatch.setenv("NIGHTREEL_DATABASE_URL", database_url)
    cause = "nightreel: job 4 cannot flag anything, as none of its labels has a `threshold`; "
    for words, remedy in (
        (("flags", "v0.mp4"), "ask one that can: `--job 1` (seasons)"),
        (("flags",), "give it others with `nightreel relabel 4 --labels FILE`"),
        (("flags", "v1.mp4"), "give it others with `nightreel relabel 4 --labels FILE`"),
    ):
        assert run_command([*words, "--format", "csv"]) == 2
        assert capfd.readouterr() == ("", f"{cause}{remedy}\n")
    assert run_command(["flags", "v0.mp4", "--job", "1"]) == 4
    with Archive.open(database_url) as archive:
        with pytest.raises(NothingWatched, match="job 4 cannot flag"):
            archive.flags()
        assert [one.reason for one in archive.flags(1)] == ["burning"]


def test_a_flag_below_its_threshold_is_not_raised(engine: Engine) -> None:
    """The confidence counts, not the rank."""
    job, _ = told(engine, "ffff", confidence=0.45)
    assert flagged(engine, job) == []


# -- highlights


def curve(engine: Engine, *shares: float, label: int = 1) -> int:
    """A job with one video in which each second gives winter, or another label, this
    confidence."""
    job = ledger.open_job(engine, spec())
    add_video(engine, job.id, "v0", len(shares), each=len(shares))
    ledger.finish_planning(engine, job.id)
    (task_id,) = ledger.feed(engine, 8, job.id)
    claim = claimed(engine, task_id)
    found = tuple(
        SampleResult(
            at, at * SECOND + 5, at * SECOND, (at + 1) * SECOND,
            (Prediction(label, 0.3, share), Prediction(0, 0.2, 1 - share)),
        )
        for at, share in enumerate(shares)
    )  # fmt: skip
    result = RangeResult(found, (), vectors_of(claim.frame_range.buckets), 8)
    assert results.commit(engine, task_id, claim.fence, result)
    ledger.close_finished(engine)
    return job.id


def test_highlights_are_the_peaks_of_a_curve(engine: Engine) -> None:
    """A cut reaches down to half of its peak; higher peaks come first."""
    job = curve(engine, 0.1, 0.2, 0.6, 0.9, 0.5, 0.1, 0.1, 0.7, 0.2, 0.0, 0.0, 0.3)
    cuts = highlights(engine, job, "winter", top=3, least=0.3)
    assert [(c.start_us // SECOND, c.end_us // SECOND, c.peak) for c in cuts] == [
        (2, 5, 0.9),
        (7, 8, 0.7),
        (11, 12, 0.3),
    ]
    assert cuts[0].peak_us == 3 * SECOND + 5
    assert cuts[0].confidence == pytest.approx((0.6 + 0.9 + 0.5) / 3)
    assert len(highlights(engine, job, "winter", top=1)) == 1


def test_weak_peaks_are_no_highlights(engine: Engine, database_url: str) -> None:
    """A cut needs a peak of the least confidence, and a weak one lengthens no other by touching it;
    where none has it, the highest is told."""
    job = curve(engine, 0.4, 0.1, 0.9, 0.1, 0.1)
    (cut,) = highlights(engine, job, "winter", pad_us=SECOND)
    assert (cut.start_us // SECOND, cut.end_us // SECOND, cut.peak) == (1, 4, 0.9)
    assert len(highlights(engine, job, "winter", least=0.1)) > 1
    code, rows, said = asked(database_url, "highlights", "--label", "winter", "--least", "0.95")
    assert (code, rows) == (0, [])
    assert "no peak reaches a confidence of 0.95: its highest is 0.90" in said


def test_time_without_a_label_has_no_highlights(engine: Engine, database_url: str) -> None:
    """`unknown` has scenes and no confidence of its own, so nothing is said of its peaks."""
    curve(engine, 0.5, 0.5, 0.5, 0.5)
    assert len(asked(database_url, "find", "unknown")[1]) == 1
    with pytest.raises(NoSuchLabel, match="`unknown` is where no label leads"):
        asked(database_url, "highlights", "--label", "Unknown")


def test_padded_highlights_that_touch_are_one(engine: Engine) -> None:
    """Padding stays within the video; merged cuts keep the higher peak."""
    job = curve(engine, 0.8, 0.1, 0.1, 0.9, 0.0, 0.0, 0.0, 0.0, 0.0, 0.7)
    cuts = highlights(engine, job, "winter", top=5, pad_us=SECOND)
    assert [(c.start_us // SECOND, c.end_us // SECOND, c.peak) for c in cuts] == [
        (0, 5, 0.9),
        (8, 10, 0.7),
    ]


def test_no_highlight_reaches_over_a_gap(engine: Engine, database_url: str) -> None:
    """What was not seen is not part of a cut."""
    job, _ = told(engine, "sww wws")
    cuts = highlights(engine, job, "winter")
    assert sorted((c.start_us // SECOND, c.end_us // SECOND) for c in cuts) == [(1, 3), (4, 6)]
    code, rows, _ = asked(database_url, "highlights", "--label", "winter", "--top", "1")
    assert (code, len(rows), rows[0]["peak"]) == (0, 1, 0.95)


# -- totals


@pytest.mark.parametrize(
    ("created", "path", "mtime_s", "expected"),
    [
        ("2018-04-19T22:46:00.000000Z", "/a/2020-01-02.mp4", 1, ("2018-04-19", "container")),
        ("2021-07-01 10:00:00", "/a/b.mp4", 1, ("2021-07-01", "container")),
        ("1970-01-01T00:00:00Z", "/a/VID_20200102_030405.mp4", 1, ("2020-01-02", "file name")),
        ("yesterday", "/a/cam 2020.01.02.mp4", 1, ("2020-01-02", "file name")),
        (None, "/a/2020-01-02/x.mp4", 86_400 * 365, ("1971-01-01", "modification time")),
        (None, "/a/20201399.mp4", 86_400, ("1970-01-02", "modification time")),
        (None, "/a/12020010203.mp4", 86_400, ("1970-01-02", "modification time")),
        (None, "/a/20240701123456.mp4", 1, ("2024-07-01", "file name")),
        (None, "/a/VID20240701235959.mp4", 1, ("2024-07-01", "file name")),
        (None, "/a/2024_0701_123456_001.MP4", 1, ("2024-07-01", "file name")),
        (None, "/a/202407011234.mp4", 1, ("2024-07-01", "file name")),
        (None, "/a/cam1_202407012359_01.mp4", 1, ("2024-07-01", "file name")),
        (None, "/a/202407012460.mp4", 86_400, ("1970-01-02", "modification time")),
        (None, "/a/20240701123.mp4", 86_400, ("1970-01-02", "modification time")),
        ("2024:07:01 10:00:00", "/a/b.mp4", 1, ("2024-07-01", "container")),
        ("20240701T100000Z", "/a/b.mp4", 1, ("2024-07-01", "container")),
        ("2024/07/01", "/a/b.mp4", 1, ("2024-07-01", "container")),
        ("1719828000", "/a/b.mp4", 86_400, ("1970-01-02", "modification time")),
        (None, "/a/20240701126060.mp4", 86_400, ("1970-01-02", "modification time")),
        (None, "/a/202407_01.mp4", 86_400, ("1970-01-02", "modification time")),
        (None, "/a/unread.mp4", -1, None),
    ],
)
def test_the_day_of_recording(
    created: str | None, path: str, mtime_s: int, expected: tuple[str, str] | None
) -> None:
    """The container's word, else a date in the file's own name, else its modification time."""
    found = recorded(created, path, mtime_s * 10**9)
    assert found == (expected and (date.fromisoformat(expected[0]), DateSource(expected[1])))


def test_planning_records_the_day_and_its_source(engine: Engine) -> None:
    """Which of the three it was stands beside the day."""
    job = ledger.open_job(engine, spec())
    add_video(engine, job.id, "walk_2019-02-03", RANGE)
    add_video(engine, job.id, "plain", RANGE)
    with reading(engine) as connection:
        rows = connection.execute(
            videos.select().with_only_columns(videos.c.recorded_on, videos.c.recorded_from)
        ).all()
    assert list(map(tuple, rows)) == [
        ("2019-02-03", "file name"),
        ("2023-11-14", "modification time"),
    ]


def test_totals_by_month(engine: Engine, database_url: str, tmp_path: Path) -> None:
    """Shares of each period's time, in order of time, undated last; a plot in both formats."""
    job, ids = told(engine, "ssssssss", "ssssssww", "wwwwwwww", "ffff")
    days = ["2024-01-05", "2024-01-31", "2024-02-01", None]
    with writing(engine) as connection:
        for video_id, day in zip(ids, days, strict=True):
            connection.execute(
                update(videos).where(videos.c.id == video_id).values(recorded_on=day)
            )
    found = totals(engine, job, Period.MONTH)
    assert [(one.period, one.videos) for one in found] == [
        ("2024-01", 2),
        ("2024-02", 1),
        ("undated", 1),
    ]
    assert [(one.label, one.share, one.videos) for one in found[0].labels] == [
        ("summer", 14 / 16, 2),
        ("winter", 2 / 16, 1),
    ]
    assert [one.period for one in totals(engine, job, Period.DAY)][:2] == days[:2]
    (every,) = totals(engine, job)
    assert (every.period, every.videos, every.analysed_us) == ("all", 4, 28 * SECOND)
    for name in ("shares.png", "shares.svg"):
        plot = tmp_path / name
        code, rows, _ = asked(database_url, "totals", "--by", "month", "--plot", str(plot))
        assert code == 0
        assert plot.stat().st_size > 1000
    assert {(row["period"], row["label"]) for row in rows} == {
        ("2024-01", "summer"), ("2024-01", "winter"), ("2024-02", "winter"), ("undated", "fire"),
    }  # fmt: skip
    svg = plot.read_text()
    assert all(text in svg for text in ("2024-01", "winter", "100%"))


# -- many videos


def test_questions_about_very_many_videos_are_answered(engine: Engine) -> None:
    """More videos than a statement takes parameters are asked about as few are."""
    job, _ = told(engine, "ssffww", "ssss")
    many = range(70_000)
    assert flagged(engine, job, many) == flagged(engine, job) != []
    assert highlights(engine, job, "winter", video_ids=many) == highlights(engine, job, "winter")
    assert sorted(known_places(engine, [*many, *many]).values()) == [
        "/archive/v0.mp4", "/archive/v1.mp4",
    ]  # fmt: skip
    assert known_places(engine, []) == {}
    out = io.StringIO()
    assert export_rows(engine, job, Kind.SAMPLES, out, Format.CSV, video_ids=many) == 10


# -- search


def test_search_finds_the_nearest_moments(engine: Engine) -> None:
    """The best samples of all videos in order of their cosines, each moment once."""
    planned_job = planned(engine, 60, 60)
    job = done(engine, planned_job.job_id, directions(3, 2))
    first, second = planned_job.video_ids
    wanted = pictures(second, (33,))[0].astype(np.float32)
    with reading(engine) as connection:
        every = list(vectors.of_job(connection, job.id, job.sampling, job.fit, job.model))
    hits = search(every, wanted, top=5, apart_us=6 * SECOND)
    assert (hits[0].video_id, hits[0].t_us) == (second, 33 * SECOND + 7)
    assert hits[0].score == pytest.approx(1.0, abs=2e-3)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    for one in hits:
        for other in hits:
            near = one.video_id == other.video_id and abs(one.t_us - other.t_us) < 6 * SECOND
            assert one == other or not near
    # Without the spacing it is the plain order of all products.
    plain = search(every, wanted, top=20, apart_us=0)
    scores = np.concatenate([v.vectors.astype(np.float32) @ wanted for v in every])
    assert [hit.score for hit in plain] == pytest.approx(
        np.sort(scores)[::-1][:20].clip(-1, 1).tolist(), abs=1e-5
    )
    assert {first, second} >= {hit.video_id for hit in plain}


def test_vectors_may_be_left_unread(engine: Engine) -> None:
    """A reading that is left early, by choice or by an error, leaves its transaction usable."""
    planned_job = planned(engine, 60, 60)
    job = done(engine, planned_job.job_id, directions(3, 2))
    with reading(engine) as connection:
        assert next(vectors.of_model(connection, job.model)).video_id == planned_job.video_ids[0]
        with pytest.raises(ValueError, match=r"a query of shape \(7,\): .* \(8,\)"):
            search(vectors.of_model(connection, job.model), np.ones(7, np.float32))
        with vectors.ahead(vectors.of_model(connection, job.model)) as videos:
            next(videos)
        with vectors.ahead(vectors.of_model(connection, job.model)) as videos:
            assert [one.video_id for one in videos] == planned_job.video_ids


def test_search_by_a_moment_needs_no_api(engine: Engine, database_url: str) -> None:
    """`--like` takes the vector of a sample that is there."""
    job = planned(engine, 30, 30)
    done(engine, job.job_id, directions(3, 2))
    code, rows, _ = asked(database_url, "search", "--like", "v1.mp4@0:00:20", "--top", "3")
    assert code == 0
    assert (rows[0]["video"], rows[0]["time_s"], rows[0]["rank"]) == (
        "/archive/v1.mp4", 20.000007, 1,
    )  # fmt: skip
    assert len(rows) == 3


def test_a_job_without_embeddings_cannot_be_searched(engine: Engine, database_url: str) -> None:
    """It says so, and why."""
    job = planned(engine, 8)
    done(engine, job.job_id, directions(3, 2), embeds=False)
    vectors.remember_text(engine, "clip/1", "a goal", directions(1, 5)[0])
    code, rows, said = asked(database_url, "search", "a goal")
    assert (code, rows) == (3, [])
    assert "keeps no embeddings" in said


def test_a_remembered_text_needs_no_api(engine: Engine, database_url: str) -> None:
    """What was asked once is answered from the database."""
    job = planned(engine, 8)
    done(engine, job.job_id, directions(3, 2))
    vector: Single = directions(1, 5)[0]
    vectors.remember_text(engine, "clip/1", "a goal", vector)
    code, rows, _ = asked(database_url, "search", " a goal ", "--apart", "1s")
    assert (code, len(rows)) == (0, 8 - 1)
    kept = pictures(job.video_ids[0], tuple(b for b in range(8) if b != LOST))
    best = float((kept.astype(np.float32) @ vector).max())
    assert rows[0]["score"] == pytest.approx(best, abs=1e-5)


def test_a_search_in_what_is_not_worked_on_yet_says_so(engine: Engine, database_url: str) -> None:
    """Nothing is blamed on the API before any frame is analysed."""
    planned(engine, 8)
    vectors.remember_text(engine, "clip/1", "a goal", directions(1, 5)[0])
    code, rows, said = asked(database_url, "search", "a goal")
    assert (code, rows) == (3, [])
    assert "no frame of job 1 is analysed yet; see `nightreel status 1`" in said
    assert "only compares" not in said


def test_a_moment_of_a_replaced_video_is_named_by_its_number(
    engine: Engine, database_url: str
) -> None:
    """A hit whose file holds another video by now is no hit without a name."""
    job = planned(engine, 4)
    done(engine, job.job_id, directions(3, 2))
    ledger.register_file(engine, file("v0"), "other content")
    vectors.remember_text(engine, "clip/1", "a goal", directions(1, 5)[0])
    _, rows, _ = asked(database_url, "search", "a goal", "--top", "1")
    assert [row["video"] for row in rows] == ["(video 1, replaced)"]


@pytest.mark.parametrize("text", ["\udcff", "two\nlines", "long " * 201])
def test_a_text_that_is_none_is_a_mistake(engine: Engine, database_url: str, text: str) -> None:
    """No API is asked for it, nor blamed."""
    done(engine, planned(engine, 4).job_id, directions(3, 2))
    with pytest.raises(LabelsError, match="the text '"):
        asked(database_url, "search", text)


def test_a_text_that_the_model_does_not_take_is_a_mistake(
    engine: Engine, database_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The API is there and answers other texts: the text is to be changed, and the code says so."""
    done(engine, planned(engine, 4).job_id, directions(3, 2))
    with contract_server(info={"model": "clip/1", "input_size": 64}, longest_text=77) as api:
        for words in (
            ("search", "long " * 90),
            ("relabel", "1", "--label", "long " * 90, "--label", "b"),
        ):
            assert run_command([*words, "--api", api.url, "--db", database_url]) == 2
            assert "write a shorter one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("",), "an empty TEXT"),
        ((" ",), "an empty TEXT"),
        (("--like", "v0.mp4"), "write VIDEO@TIME"),
        (("--like", "@3s"), "write VIDEO@TIME"),
        (("--like", "v0.mp4@0:00:09"), "the video ends at 8.000 s"),
    ],
)
def test_what_cannot_be_searched_for_is_a_mistake(
    engine: Engine, database_url: str, words: tuple[str, ...], said: str
) -> None:
    """Refused before anything is asked of an API, and nothing is remembered."""
    done(engine, planned(engine, 8).job_id, directions(3, 2))
    with pytest.raises(UsageError, match=said):
        asked(database_url, "search", *words)
    assert vectors.text_vector(engine, "clip/1", "") is None


def test_labels_by_moments_are_the_centres_of_all_their_moments(engine: Engine) -> None:
    """Every moment of a name counts; a name ends at the first `=`, so that a path may hold one."""
    job = ledger.open_job(engine, spec())
    add_video(engine, job.id, "a=b", 20)
    add_video(engine, job.id, "c", 20)
    ledger.finish_planning(engine, job.id)
    job = done(engine, job.id, directions(3, 2))
    first, second = (find_videos(engine, job.id, name)[0] for name in ("a=b.mp4", "c.mp4"))
    labels, matrix = labels_like(
        engine, job, ("one=a=b.mp4@3s", "one=c.mp4@12s", "two=c.mp4@19s", "three=a=b.mp4@20s")
    )
    assert [label.name for label in labels.labels] == ["one", "two", "three"]
    assert [len(label.samples) for label in labels.labels] == [2, 1, 1]
    both = pictures(first, (3,))[0].astype(np.float32) + pictures(second, (12,))[0]
    assert matrix[0] == pytest.approx(both / np.linalg.norm(both), abs=2e-3)
    assert matrix[1] == pytest.approx(pictures(second, (19,))[0], abs=2e-3)


def test_no_moment_is_called_as_no_label(engine: Engine) -> None:
    """`unknown` is what answers call time in which no label leads, in whatever case."""
    job = done(engine, planned(engine, 8).job_id, directions(3, 2))
    with pytest.raises(LabelsError, match="'Unknown' would be taken for"):
        labels_like(engine, job, ("Unknown=v0.mp4@1s", "b=v0.mp4@2s"))


# -- scenes in columns


def test_columns_are_the_samples(engine: Engine) -> None:
    """Samples in columns give the curves and shares of the samples one by one."""
    found = [sample(0, 0, 0.8), replace(sample(1, 1), predictions=(Prediction(2, 0.1, 0.4),))]
    columns = SampleColumns.of(found)
    assert columns.curve(0).tolist() == [0.8, 0.0]
    curves = columns.curves(3)
    assert curves.curve(0).tolist() == pytest.approx([0.8, 0.0])
    assert curves.best.tolist() == [0, 2]
    assert curves.shares()[:, 0].tolist() == pytest.approx([0.8, 0.2, 0.0])
    assert curves.shares()[:, 1].tolist() == pytest.approx([0.3, 0.3, 0.4])
    assert len(SampleColumns.of([])) == 0
    assert LabelSet("x", SEASONS.labels).digest == SEASONS.digest
    assert scenes_of([], [], []) == []
