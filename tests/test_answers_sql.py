"""Views, example queries and the Python API: what the documentation shows is what they give."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from embedded import directions, done
from rows import SECOND, file, planned
from sqlalchemy import Engine, inspect, text

from nightreel.archive import Archive
from storage import ledger, relabel, vectors
from storage.coverage import coverage
from storage.database import DatabaseError, reading
from storage.labels import store_label_vectors
from storage.records import Label, LabelSet
from storage.scenes import scenes
from storage.summaries import summaries

DOCS = Path(__file__).parents[1] / "docs"
SQL = (DOCS / "sql.md").read_text(encoding="utf-8")
QUERIES = re.findall(r"```sql\n(.*?)```", SQL, re.DOTALL)
VIEWS = ("v_jobs", "v_videos", "v_coverage", "v_samples", "v_predictions", "v_scenes", "v_summary")


@pytest.fixture
def filled(engine: Engine) -> Engine:
    """Two videos under the seasons (job 1) and under other labels (job 2), one rejected file."""
    made = planned(engine, 40, 13)
    bad = ledger.register_file(engine, file("bad"), "bad")
    ledger.reject_video(engine, made.job_id, bad, "not-a-video", "text")
    job = done(engine, made.job_id, directions(3, 2))
    labels = LabelSet("other", tuple(Label(name, (name,)) for name in ("sea", "snow")))
    target = relabel.new_job(engine, job, labels)
    store_label_vectors(engine, target.label_set_id, target.model, directions(2, 1))
    relabel.relabel(engine, job, target)
    return engine


def rows(engine: Engine, query: str) -> list[dict[str, object]]:
    with reading(engine) as connection:
        return [dict(row) for row in connection.execute(text(query)).mappings()]


def test_the_views_are_documented(engine: Engine) -> None:
    """Every view and every column of it stands in the documentation."""
    found = inspect(engine)
    assert set(found.get_view_names()) == set(VIEWS)
    for view in VIEWS:
        (line,) = re.findall(rf"^\| `{view}` \|.*$", SQL, re.MULTILINE)
        for column in found.get_columns(view):
            named = column["name"] in ("job_id", "video_id") or f"`{column['name']}`" in line
            assert named, f"{view}.{column['name']}"


def test_the_views_say_what_python_says(filled: Engine) -> None:
    """Scenes, coverage and summaries are the same rows either way."""
    assert [
        (one["video_id"], one["start_s"], one["end_s"], one["label"], one["confidence"])
        for one in rows(filled, "SELECT * FROM v_scenes WHERE job_id = 1 ORDER BY 2, start_s")
    ] == [
        (video, one.start_us / 1e6, one.end_us / 1e6, one.label, one.confidence)
        for video, of in scenes(filled, 1).items()
        for one in of
    ]
    for job in (1, 2):
        got = rows(filled, f"SELECT * FROM v_coverage WHERE job_id = {job} ORDER BY video_id")
        assert [
            (one["video_id"], one["state"], one["analysed_s"], one["gaps_s"], one["waiting_s"])
            for one in got
        ] == [
            (one.video_id, one.state, one.analysed_us / 1e6, one.gap_us / 1e6, 0.0)
            for one in coverage(filled, job)
        ]
        shares = rows(filled, f"SELECT * FROM v_summary WHERE job_id = {job}")
        for one in summaries(filled, job):
            of_video = [row for row in shares if row["video_id"] == one.video_id]
            assert {(r["label"], r["share"]) for r in of_video if r["label"]} == {
                (share.label, share.share) for share in one.labels
            }
            assert of_video, "a video without scenes has a row too"


def test_there_are_ten_example_queries() -> None:
    """As many as the heading says."""
    assert len(QUERIES) == 10


@pytest.mark.parametrize("number", range(10))
def test_the_example_queries_run(filled: Engine, number: int) -> None:
    """Each gives rows on both databases (flags and a label that is not there may give none)."""
    query = (
        QUERIES[number].strip().rstrip(";").replace("'winter'", "'summer'").replace("< 0.2", "< 2")
    )
    found = rows(filled, query)
    assert found or "flag IS NOT NULL" in query


def test_both_databases_answer_alike(
    sqlite_url: str, postgres_url: str, request: pytest.FixtureRequest
) -> None:
    """The same data give the same rows and types in every view."""
    from storage import database

    found = []
    for url in (sqlite_url, postgres_url):
        engine = database.connect(url)
        made = planned(engine, 20, 7)
        done(engine, made.job_id, directions(3, 2))
        ordered = {view: sorted(rows(engine, f"SELECT * FROM {view}"), key=str) for view in VIEWS}
        found.append(ordered)
        engine.dispose()
    assert found[0] == found[1]
    kinds = [
        {(view, k, type(v)) for view, of in one.items() for row in of for k, v in row.items()}
        for one in found
    ]
    assert kinds[0] == kinds[1]


def executed(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    exec(compile(program, "example", "exec"), {"__name__": "example"})


def python_examples() -> list[tuple[str, str]]:
    return [
        (name, program)
        for name in ("sql.md", "python.md")
        for program in re.findall(
            r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL
        )
    ]


@pytest.mark.parametrize(("name", "program"), python_examples())
def test_the_python_examples_run(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], name: str, program: str,
) -> None:  # fmt: skip
    """What the documentation shows runs as it stands, and prints."""
    from storage import database

    engine = database.connect(sqlite_url)
    made = planned(engine, 30, 7)
    done(engine, made.job_id, directions(3, 2))
    engine.dispose()
    executed(program, tmp_path, monkeypatch)
    assert capsys.readouterr().out
    assert "pandas" in sys.modules or name != "sql.md"


def test_the_python_api(filled: Engine, database_url: str) -> None:
    """Open, iterate, query: the answers of the commands as values."""
    with Archive.open(database_url) as archive:
        assert [job.id for job in archive.jobs()] == [2, 1]
        assert [label.name for label in archive.labels(1)] == ["summer", "winter", "fire"]
        assert [video.path for video in archive.videos(1)] == [
            "/archive/bad.mp4", "/archive/v0.mp4", "/archive/v1.mp4",
        ]  # fmt: skip
        assert archive.scenes("v0.mp4", 1) == scenes(filled, 1)[archive.video("v0.mp4")]
        assert len(archive.samples("v1.mp4")) == 12
        assert archive.summary("v1.mp4").analysed_us == 12 * SECOND
        stored = list(archive.vectors())
        assert sum(len(one.vectors) for one in stored) == 39 + 12
        hit = archive.search(stored[0].vectors[20].astype(np.float32), top=1)[0]
        assert (hit.video_id, hit.t_us) == (stored[0].video_id, int(stored[0].times[20, 1]))
        with pytest.raises(KeyError, match="never asked"):
            archive.search("a goal")
        vectors.remember_text(filled, "clip/1", "a goal", directions(1, 5)[0])
        assert len(archive.search("a goal", top=3)) == 3
        assert archive.find("summer", job=1)
        assert archive.highlights("summer", job=1, top=2)
        assert archive.flags() == []
        assert len(archive.coverage(1)) == 3
        (row,) = archive.query("SELECT COUNT(*) AS n FROM v_samples WHERE job_id = :job", job=1)
        assert row == {"n": 39 + 12}
        with pytest.raises(Exception, match=r"(?i)read-?only|readonly"):
            archive.query("DELETE FROM samples")
        assert archive.query("SELECT COUNT(*) AS n FROM v_samples")[0]["n"] == 2 * (39 + 12)


def test_a_missing_database_is_an_error(tmp_path: Path) -> None:
    """Nothing is created by looking."""
    with pytest.raises(DatabaseError, match="nightreel db upgrade"):
        Archive.open(f"sqlite:///{tmp_path}/none.db")
    assert not list(tmp_path.iterdir())
