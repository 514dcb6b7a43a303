"""Views, example queries and the Python API: what the documentation shows is what they give."""

from __future__ import annotations

import io
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from embedded import asked, directions, done
from rows import (
    SEASONS,
    SECOND,
    add_video,
    claimed,
    file,
    planned,
    sample,
    spec,
    vectors_of,
)
from sqlalchemy import Engine, inspect, text
from sqlalchemy.exc import DBAPIError

from nightreel.archive import Archive
from storage import ledger, relabel, results, vectors
from storage.coverage import coverage
from storage.database import DatabaseError, reading
from storage.export import Format, Kind, export_rows
from storage.highlights import highlights
from storage.labels import store_label_vectors
from storage.ledger import NoSuchJob
from storage.records import Label, LabelSet, RangeResult, Sampling
from storage.scenes import scenes
from storage.summaries import summaries

DOCS = Path(__file__).parents[1] / "docs"
SQL = (DOCS / "sql.md").read_text(encoding="utf-8")
QUERIES = re.findall(r"```sql\n(.*?)```", SQL, re.DOTALL)
VIEWS = (
    "v_jobs", "v_labels", "v_videos", "v_coverage", "v_samples", "v_predictions", "v_scenes",
    "v_summary", "v_flags",
)  # fmt: skip


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
    """Each gives rows on both databases."""
    query = (
        QUERIES[number].strip().rstrip(";").replace("'winter'", "'summer'").replace("< 0.2", "< 2")
    )
    assert rows(filled, query)


def test_the_views_say_what_made_the_results(filled: Engine) -> None:
    """Model, sampling, release and every label with its prompts, threshold and flag, of each
    job."""
    (one, two) = rows(filled, "SELECT * FROM v_jobs ORDER BY job_id")
    assert one["version"] == two["version"] == version("nightreel")
    found = rows(filled, "SELECT * FROM v_labels WHERE job_id = 1 ORDER BY position")
    assert [
        (row["label"], json.loads(str(row["prompts"])), row["threshold"], row["flag"])
        for row in found
    ] == [(one.name, list(one.prompts), one.threshold, one.flag) for one in SEASONS.labels]
    assert [row["examples"] for row in found] == [0, 2, 0]
    for view in ("v_samples", "v_predictions", "v_scenes", "v_summary"):
        made = rows(filled, f"SELECT DISTINCT model, sampling FROM {view}")
        assert made == [{"model": "clip/1", "sampling": str(Sampling())}]


def test_a_flag_needs_no_scene(engine: Engine) -> None:
    """One frame that reaches the threshold stands in the view, in the documented query and in the
    exported table, though its label has no scene."""
    made = planned(engine, 8)
    while fed := ledger.feed(engine, 8):
        for task_id in fed:
            claim = claimed(engine, task_id)
            seen = tuple(sample(b, 2 if b == 5 else 0) for b in claim.frame_range.buckets)
            result = RangeResult(seen, (), vectors_of(claim.frame_range.buckets), 8)
            assert results.commit(engine, task_id, claim.fence, result)
    ledger.close_finished(engine)
    assert [one.label for one in scenes(engine, made.job_id)[made.video_ids[0]]] == ["summer"]
    (query,) = (one for one in QUERIES if "v_flags" in one)
    (row,) = rows(engine, query.strip().rstrip(";"))
    assert row == {
        "path": "/archive/v0.mp4", "reason": "burning", "label": "fire", "samples": 1,
        "first_s": 5.0, "last_s": 5.0, "peak": 0.9,
    }  # fmt: skip
    out = io.StringIO()
    assert export_rows(engine, made.job_id, Kind.FLAGS, out, Format.JSONL) == 1
    assert row.items() <= json.loads(out.getvalue()).items()


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
        assert archive.search([1, 0, 0, 0, 0, 0, 0, 0]) == archive.search(np.eye(8)[0])
        assert archive.find("summer", job=1)
        assert archive.highlights("summer", job=1, top=2)
        assert {one.reason for one in archive.flags(1)} == {"burning"}
        assert len(archive.coverage(1)) == 3
        (row,) = archive.query("SELECT COUNT(*) AS n FROM v_samples WHERE job_id = :job", job=1)
        assert row == {"n": 39 + 12}
        assert archive.query(r"SELECT '12\:30' AS clock") == [{"clock": "12:30"}]


def test_a_search_from_python_is_that_of_the_command(engine: Engine, database_url: str) -> None:
    """Without a job, all that the model has embedded is searched, whichever job did it; with one,
    its videos."""
    done(engine, planned(engine, 20).job_id, directions(3, 2))
    later = ledger.open_job(engine, spec("later"))
    add_video(engine, later.id, "w", 20)
    ledger.finish_planning(engine, later.id)
    done(engine, later.id, directions(3, 2))
    vectors.remember_text(engine, "clip/1", "a goal", directions(1, 5)[0])
    with Archive.open(database_url) as archive:
        for job, held in ((None, {1, 2}), (1, {1}), (2, {2})):
            hits = archive.search("a goal", top=40, apart_s=1, job=job)
            words = ["--top", "40", "--apart", "1s", *(["--job", str(job)] if job else [])]
            code, found, said = asked(database_url, "search", "a goal", *words)
            assert code == 0, said
            assert [(hit.video_id, hit.t_us / 1e6, hit.score) for hit in hits] == [
                (row["video_id"], row["time_s"], row["score"]) for row in found
            ]
            assert {hit.video_id for hit in hits} == held


CHANGE = "INSERT INTO text_vectors (model, text, vector) VALUES ('m', 't', 'v')"


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM samples",
        CHANGE,
        f"COMMIT; {CHANGE}; COMMIT; SELECT 1",
        f"SELECT 1; COMMIT; {CHANGE}",
        "COMMIT",
        "SET default_transaction_read_only = off",
        "ATTACH DATABASE 'made.db' AS made",
        "VACUUM INTO 'made.db'",
        "PRAGMA user_version = 7",
        "PRAGMA journal_mode = DELETE",
        "COPY (SELECT 1) TO '/tmp/made'",
    ],
)
def test_a_query_only_reads(
    filled: Engine, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, query: str
) -> None:
    """Whatever is no single SELECT is refused, changes nothing and makes no file; the next query is
    answered."""
    monkeypatch.chdir(tmp_path)
    with Archive.open(database_url) as archive:
        with pytest.raises(DBAPIError):
            archive.query(query)
        (row,) = archive.query("SELECT COUNT(*) AS n FROM v_samples")
        assert row == {"n": 2 * (39 + 12)}
        assert archive.query("SELECT COUNT(*) AS n FROM text_vectors WHERE text = :t", t="t") == [
            {"n": 0}
        ]
    assert not (tmp_path / "made.db").exists()
    ledger.finish_planning(filled, 1)  # the connections of others write as before


def test_arguments_without_sense_are_named(filled: Engine, database_url: str) -> None:
    """Each is one ValueError that says what is wrong."""
    with Archive.open(database_url) as archive:
        for seconds in (-5, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=r"pad_s=.*give seconds"):
                archive.highlights("summer", pad_s=seconds, job=1)
            with pytest.raises(ValueError, match=r"min_length_s=.*give seconds"):
                archive.find("summer", min_length_s=seconds, job=1)
            with pytest.raises(ValueError, match=r"apart_s=.*give seconds"):
                archive.search(np.ones(8), apart_s=seconds)
        for vector in (np.zeros(8), np.full(8, np.nan), np.full(8, np.inf)):
            with pytest.raises(ValueError, match="no direction"):
                archive.search(vector)
        with pytest.raises(ValueError, match=r"shape \(7,\).*\(8,\)"):
            archive.search(np.ones(7))
        every = archive.search(next(archive.vectors()).vectors[20].astype(float), apart_s=0, top=99)
        assert max(hit.score for hit in every) <= 1
        for top in (0, -1):
            with pytest.raises(ValueError, match=f"top={top}: ask for one"):
                archive.highlights("summer", top=top, job=1)
            with pytest.raises(ValueError, match=f"top={top}: ask for one"):
                archive.search(np.ones(8), top=top)
        for least in (float("nan"), -0.1, 1.1):
            with pytest.raises(ValueError, match="least="):
                archive.highlights("summer", least=least, job=1)
        with pytest.raises(ValueError, match=r"min_length_s=.*give seconds"):
            archive.find("summer", min_length_s=1e300, job=1)
        for number in (0, -1, 10**20):
            with pytest.raises(NoSuchJob, match=f"no job {number}"):
                archive.flags(number)
        with pytest.raises(ValueError, match="an empty query"):
            archive.query(" ")
        with pytest.raises(ValueError, match="columns are called 'path'"):
            archive.query("SELECT a.path, b.path FROM v_videos a JOIN v_videos b ON TRUE")
    with pytest.raises(ValueError, match="pad_us=-1"):
        highlights(filled, 1, "summer", pad_us=-1)


def test_a_missing_database_is_an_error(tmp_path: Path) -> None:
    """Nothing is created by looking."""
    with pytest.raises(DatabaseError, match="nightreel db upgrade"):
        Archive.open(f"sqlite:///{tmp_path}/none.db")
    assert not list(tmp_path.iterdir())
