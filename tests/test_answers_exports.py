"""Exports: tables equal the database, timelines parse back to the same cuts."""

from __future__ import annotations

import csv
import io
import json
import subprocess
from fractions import Fraction
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import opentimelineio
import pyarrow.parquet
import pytest
import webvtt as vtt_parser
from click.testing import CliRunner
from embedded import directions, done
from rows import SEASONS, SECOND, planned
from sqlalchemy import Engine, text

from nightreel.cli import cli
from storage import results
from storage.database import reading
from storage.export import Format, Kind, export_file, export_rows
from storage.records import Label, LabelSet, Sampling, Scene
from storage.scenes import scenes as stored_scenes
from storage.timelines import edl, ffmetadata, otio, webvtt

NAMES = ("plain", "a --> b & <c>", "x=1;#2\\", "new\nline\x00", "Ünïcode 雪", "")
RATES = (Fraction(25), Fraction(30_000, 1001), Fraction(24_000, 1001), Fraction(12), Fraction(60))

WATCHED = LabelSet(
    "watched", (*SEASONS.labels[1:], Label("summer", ("sunny",), (), 0.4, "too hot"))
)


def cuts() -> list[Scene]:
    """Scenes of awkward names and times, with a gap before the third and after the last."""
    edges = [0, 1_000_000, 2_333_333, 5_000_001, 6_041_667, 3_601_500_000, 3_661_250_000]
    spans = list(pairwise(edges))
    spans[2] = (spans[2][0] + 500_000, spans[2][1])
    return [
        Scene(start, end, name, 0.9, 0.95, 3, 1.0)
        for (start, end), name in zip(spans, NAMES, strict=True)
    ]


def test_webvtt_parses_back() -> None:
    """A WebVTT parser reads the same number of cues with the same times, to the millisecond."""
    cues = list(vtt_parser.from_string(webvtt(cuts())))
    assert cues[0].text == "plain (90%)"
    assert "b &amp; &lt;c&gt;" in cues[1].raw_text
    for cue, scene in zip(cues, cuts(), strict=True):
        assert cue.start_in_seconds + cue.start_time.milliseconds / 1000 == pytest.approx(
            scene.start_us / 1e6, abs=0.00051
        )
        assert cue.end_in_seconds + cue.end_time.milliseconds / 1000 == pytest.approx(
            scene.end_us / 1e6, abs=0.00051
        )


def test_ffprobe_reads_the_chapters(tmp_path: Path) -> None:
    """ffprobe finds each chapter with its times, exact to the microsecond, and its title."""
    file = tmp_path / "chapters.ffmetadata"
    file.write_text(ffmetadata(cuts(), "a=b; c"), encoding="utf-8")
    try:
        done_ = subprocess.run(
            ["ffprobe", "-v", "error", "-show_chapters", "-show_format", "-of", "json", file],
            capture_output=True, check=True,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("ffprobe is missing")
    found = json.loads(done_.stdout)
    assert found["format"]["tags"]["title"] == "a=b; c"
    assert [(c["start"], c["end"], c["time_base"]) for c in found["chapters"]] == [
        (one.start_us, one.end_us, "1/1000000") for one in cuts()
    ]
    titles = [c.get("tags", {}).get("title", "") for c in found["chapters"]]
    assert titles == ["plain", "a --> b & <c>", "x=1;#2\\ ", "new line ", "Ünïcode 雪", ""]


@pytest.mark.parametrize("rate", RATES)
def test_otio_parses_back(rate: Fraction) -> None:
    """OpenTimelineIO reads clips and gaps that fill the video, cut at the nearest frames."""
    written = otio(cuts(), b"/archive/\xff match #1.mp4", 3_700 * SECOND, rate, model="clip/1")
    timeline = opentimelineio.adapters.read_from_string(written, "otio_json")
    clips = list(timeline.find_clips())
    shown = [name.replace("\n", " ").replace("\0", " ") for name in NAMES]
    assert [clip.metadata["nightreel"]["label"] for clip in clips] == shown
    assert [clip.name for clip in clips] == shown
    for clip, scene in zip(clips, cuts(), strict=True):
        span = clip.source_range
        assert span.start_time.value == round(scene.start_us * rate / SECOND)
        assert span.end_time_exclusive().value == round(scene.end_us * rate / SECOND)
        assert clip.range_in_parent().start_time == span.start_time
    assert timeline.duration().value == round(3_700 * rate)
    assert clips[0].media_reference.target_url == "file:///archive/%FF%20match%20%231.mp4"
    assert timeline.metadata["nightreel"]["model"] == "clip/1"


@pytest.mark.parametrize("rate", [rate for rate in RATES if rate != 12])
def test_an_edit_decision_list_parses_back(rate: Fraction) -> None:
    """The CMX 3600 adapter of OpenTimelineIO, which knows the rates of television and film, reads
    the same cuts, to the frame."""
    written = edl(cuts(), "match.mp4", rate)
    timeline = opentimelineio.adapters.read_from_string(
        written, "cmx_3600", rate=float(round(rate))
    )
    clips = list(timeline.find_clips())
    assert [clip.name for clip in clips] == ["match.mp4"] * len(NAMES)
    for clip, scene in zip(clips, cuts(), strict=True):
        assert clip.source_range.start_time.value == round(scene.start_us * rate / SECOND)
        assert clip.source_range.end_time_exclusive().value == round(scene.end_us * rate / SECOND)


@pytest.mark.parametrize(
    ("rate", "read_as"), [(Fraction(171, 10), 24), (Fraction(2997, 100), 30), (Fraction(90), 60)]
)
def test_a_rate_that_editors_do_not_know_is_the_nearest_they_do(
    rate: Fraction, read_as: int
) -> None:
    """The mean rate of a clip of varying rate says nothing to an editor: its list is read at a rate
    of film or television, and means the same seconds."""
    scene = Scene(0, 61_500_000, "x", 0.9, 0.9, 1, 1.0)
    timeline = opentimelineio.adapters.read_from_string(
        edl([scene], "a.mp4", rate), "cmx_3600", rate=float(read_as)
    )
    (clip,) = timeline.find_clips()
    frames = clip.source_range.end_time_exclusive().value
    nominal = min((Fraction(24_000, 1001), Fraction(30_000, 1001), Fraction(60)),
                  key=lambda one: abs(one - read_as))  # fmt: skip
    assert frames == round(Fraction(123, 2) * nominal)


def test_what_is_shorter_than_a_frame_is_no_event() -> None:
    """No event of no length; nothing at all is still a list."""
    short = Scene(0, 1000, "x", 0.9, 0.9, 1, 1.0)
    assert "AX" not in edl([short], "a.mp4", None)
    assert list(vtt_parser.from_string(webvtt([]))) == []
    timeline = opentimelineio.adapters.read_from_string(
        otio([short], b"/a.mp4", 0, None), "otio_json"
    )
    assert list(timeline.find_clips()) == []


@pytest.mark.parametrize("rate", [Fraction(25), Fraction(30_000, 1001), Fraction(60)])
def test_an_edit_decision_list_ends_before_a_day_does(rate: Fraction) -> None:
    """Timecode has no hour 24: what lasts longer is refused, not written as editors misread it."""
    day_us = 24 * 3600 * SECOND
    if rate.denominator == 1:
        last = Scene(day_us - 2 * SECOND, day_us - SECOND, "x", 0.9, 0.9, 1, 1.0)
        assert " 23:59:58:00 23:59:59:00 " in edl([last], "cam.mp4", rate)
    later = Scene(day_us, day_us + 100 * SECOND, "x", 0.9, 0.9, 1, 1.0)
    with pytest.raises(ValueError, match="less than 24 hours"):
        edl([later], "cam.mp4", rate)


def rows_of(engine: Engine, view: str, order: str) -> list[dict[str, Any]]:
    with reading(engine) as connection:
        found = connection.execute(text(f"SELECT * FROM {view} ORDER BY {order}"))
        return [dict(row) for row in found.mappings()]


@pytest.mark.parametrize(
    ("kind", "view", "order"),
    [
        (Kind.SAMPLES, "v_samples", "video_id, bucket"),
        (Kind.PREDICTIONS, "v_predictions", "video_id, bucket, rank"),
        (Kind.SCENES, "v_scenes", "video_id, start_s"),
        (Kind.SUMMARIES, "v_summary", "video_id, first_s"),
        (Kind.FLAGS, "v_flags", "video_id, first_s, label"),
    ],
)
def test_tables_say_what_the_database_says(
    engine: Engine, tmp_path: Path, kind: Kind, view: str, order: str
) -> None:
    """CSV, JSON Lines and Parquet hold every row and column of the view."""
    made = planned(engine, 20, 7, labels=WATCHED)
    job = done(engine, made.job_id, directions(3, 2))
    expected = rows_of(engine, view, order)
    assert expected
    counts = {
        form: export_file(engine, job, kind, tmp_path / f"rows.{form}", form) for form in Format
    }
    assert set(counts.values()) == {len(expected)}
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == expected
    parquet = pyarrow.parquet.read_table(tmp_path / "rows.parquet")
    assert parquet.to_pylist() == expected
    about = json.loads(parquet.schema.metadata[b"nightreel"])
    assert (about["model"], about["sampling"]) == ("clip/1", str(Sampling()))
    assert about["version"] == version("nightreel")
    assert [(one["prompts"], one["threshold"], one["flag"]) for one in about["labels"]] == [
        (list(one.prompts), one.threshold, one.flag) for one in WATCHED.labels
    ]
    with (tmp_path / "rows.csv").open() as file:
        read = list(csv.DictReader(file))
    shown = [{k: "" if v is None else str(v) for k, v in row.items()} for row in expected]
    assert read == shown
    assert sorted(p.name for p in tmp_path.glob("*rows*")) == [
        "rows.csv", "rows.jsonl", "rows.parquet",
    ]  # fmt: skip
    one = io.StringIO()
    only = [made.video_ids[1]]
    export_rows(engine, job.id, kind, one, Format.JSONL, video_ids=only)
    assert {json.loads(line)["video_id"] for line in one.getvalue().splitlines()} == set(only)


def test_an_empty_table_is_a_table(engine: Engine, tmp_path: Path) -> None:
    """No row: a header, no line, a Parquet file with its columns."""
    made = planned(engine, 4)
    job = done(engine, made.job_id, directions(3, 2))
    for form in Format:
        file = tmp_path / f"none.{form}"
        assert export_file(engine, job, Kind.SCENES, file, form, video_ids=[99]) == 0
    assert (tmp_path / "none.csv").read_text().startswith("job_id,video_id,path")
    assert (tmp_path / "none.jsonl").read_text() == ""
    assert pyarrow.parquet.read_table(tmp_path / "none.parquet").num_rows == 0


def run(url: str, *words: str) -> tuple[int, str, str]:
    done_ = CliRunner().invoke(cli, [*words, "--db", url])
    return done_.exit_code, done_.stdout, done_.stderr


def test_the_export_commands(engine: Engine, database_url: str, tmp_path: Path) -> None:
    """Files by their endings, standard output by --as; mistakes are named."""
    made = planned(engine, 20, 7)
    job = done(engine, made.job_id, directions(3, 2))
    scenes = stored_scenes(engine, job.id)[made.video_ids[0]]
    assert run(database_url, "export", "table", "scenes", "-o", str(tmp_path / "s.parquet"))[0] == 0
    assert pyarrow.parquet.read_table(tmp_path / "s.parquet").num_rows == sum(
        map(len, stored_scenes(engine, job.id).values())
    )
    code, out, _ = run(database_url, "export", "table", "samples", "v0.mp4", "--as", "csv")
    assert code == 0
    assert len(out.splitlines()) == 1 + len(results.samples(engine, job.id, made.video_ids[0]))
    for ending in ("vtt", "edl", "ffmetadata", "otio"):
        file = tmp_path / f"t.{ending}"
        assert run(database_url, "export", "timeline", "v0.mp4", "-o", str(file))[0] == 0
        assert file.stat().st_size > 50
    timeline = opentimelineio.adapters.read_from_file(str(file))
    said = timeline.metadata["nightreel"]
    assert (said["model"], said["version"]) == ("clip/1", version("nightreel"))
    assert list(said["labels"][0]["prompts"]) == ["a photo of summer", "sunny"]
    code, out, _ = run(database_url, "export", "timeline", "v0.mp4", "--as", "ffmetadata")
    assert out.count("[CHAPTER]") == len(scenes)
    for words, said in (
        (("table", "scenes"), "--as"),
        (("table", "scenes", "-o", "x.xls"), "no format ends so"),
        (("table", "scenes", "--as", "parquet"), "-o FILE.parquet"),
        (("table", "scenes", "-o", f"{tmp_path}/gone/x.csv"), "cannot be written"),
        (("timeline", "v0.mp4", "-o", f"{tmp_path}/gone/x.vtt"), "cannot be written"),
    ):
        code, _, err = run(database_url, "export", *words)
        assert (code, said in err) == (2, True), err
