"""What is purged is gone from every table, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rows import DIMENSION, RANGE, SECOND, claimed, file, found, info, ranges, spec
from sqlalchemy import Engine, MetaData, Table, select

from nightreel.cli import run_command
from storage import database, ledger, purge, results
from storage.database import reading
from storage.endpoints import store_endpoint
from storage.labels import store_label_vectors
from storage.ledger import NoSuchJob
from storage.purge import CannotPurge, find_video, job_loss, purge_job, purge_video, video_loss
from storage.records import ArchiveFile, Gap, GapKind, Label, LabelSet
from storage.summaries import NoSuchVideo

WEATHER = LabelSet(
    "weather",
    (
        Label("rain", ("rain",), (b"jpeg rain",), 0.5, "wet"),
        Label("snow", ("snow",)),
        Label("sun", ("sun",)),
    ),
)
MATRIX = np.ones((3, DIMENSION), np.float32)

Rows = dict[str, list[dict[str, Any]]]


def tables(engine: Engine) -> list[Table]:
    """Every table that the database itself knows of."""
    there = MetaData()
    there.reflect(engine)
    return [table for table in there.sorted_tables if table.name != "alembic_version"]


def everything(engine: Engine) -> Rows:
    """Every row of every table."""
    with reading(engine) as connection:
        return {
            table.name: [
                dict(row)
                for row in connection.execute(select(table).order_by(*table.primary_key)).mappings()
            ]
            for table in tables(engine)
        }


def named(rows: Rows, column: str, number: int) -> list[str]:
    """The tables in which some row has this job or video."""
    return [name for name, found in rows.items() if any(r.get(column) == number for r in found)]


@dataclass
class Farm:
    """Jobs over some of the same videos, all closed."""

    engine: Engine

    def job(self, key: str, *names: str, closed: bool = True, **changes: Any) -> int:
        """A submitted job with a row in every table that can have one."""
        engine = self.engine
        job = ledger.open_job(
            engine,
            spec(key, request=key, **changes),
            tag="night",
            notify_url="http://127.0.0.1:9/hook",
            files=[file(name) for name in names],
        )
        ledger.set_budget(engine, job.id, 1000)
        store_label_vectors(engine, job.label_set_id, job.model, MATRIX)
        store_endpoint(engine, job.id, "endpoint", (True, 8))
        for probe_id in ledger.feed_probes(engine, 100):
            claim = ledger.claim_probe(engine, probe_id, "worker", 60)
            assert claim is not None
            name = Path(claim.file.path).stem
            video_id = ledger.register_file(engine, claim.file, f"content-{name}")
            assert ledger.plan_probed(engine, claim, video_id, info(10), ranges(10))
        ledger.finish_probed(engine)
        if closed:
            self.work(job.id)
        return job.id

    def work(self, job_id: int) -> None:
        """Do all tasks; the second of each video that does not decode is a gap."""
        while fed := ledger.feed(self.engine, 100):
            for task_id in fed:
                claim = claimed(self.engine, task_id)
                lost = [Gap(5 * SECOND, 6 * SECOND, GapKind.DAMAGED, "noise")]
                gaps = lost if claim.frame_range.bucket_start == RANGE else []
                result = found(claim, gaps=gaps)
                assert results.commit(self.engine, task_id, claim.fence, result)
        ledger.close_finished(self.engine)

    def video(self, name: str) -> int:
        return find_video(self.engine, f"{name}.mp4").video_id


@contextmanager
def opened(url: str) -> Iterator[Engine]:
    """An engine that is disposed of at the end."""
    engine = database.connect(url)
    try:
        yield engine
    finally:
        engine.dispose()


@pytest.fixture
def farm(engine: Engine) -> Farm:
    return Farm(engine)


def test_the_farm_fills_every_table_of_a_job(farm: Farm) -> None:
    """Else these tests would not see what is forgotten."""
    job_id = farm.job("a", "one", "two", labels=WEATHER)
    rows = everything(farm.engine)
    with_job = [table.name for table in tables(farm.engine) if "job_id" in table.c]
    assert named(rows, "job_id", job_id) == with_job
    with_video = [table.name for table in tables(farm.engine) if "video_id" in table.c]
    assert named(rows, "video_id", farm.video("one")) == with_video
    assert rows["label_examples"]
    assert rows["label_vectors"]


def test_nothing_of_a_purged_job_is_left(farm: Farm) -> None:
    """Its rows and its label set are gone, embeddings stay; other jobs stay to the last byte."""
    job_id = farm.job("a", "one", "two", labels=WEATHER)
    other = farm.job("b", "two", "three")
    before = everything(farm.engine)
    (label_set,) = (row["label_set_id"] for row in before["jobs"] if row["id"] == job_id)
    loss = job_loss(farm.engine, job_id)
    deleted = purge_job(farm.engine, job_id)
    after = everything(farm.engine)
    assert named(after, "job_id", job_id) == []
    own = {"jobs": job_id, "label_sets": label_set}
    expected = {
        table: [
            row
            for row in rows
            if row.get("job_id") != job_id
            and row.get("label_set_id") != label_set
            and (table not in own or row["id"] != own[table])
        ]
        for table, rows in before.items()
    }
    # The other job's row names its own label set.
    assert after == expected
    assert len(after["embeddings"]) == 9
    assert [row["id"] for row in after["jobs"]] == [other]
    assert loss.rows == deleted
    assert loss.samples == deleted["samples"] == 18
    assert (loss.image_calls, loss.undelivered) == (0, 1)
    with pytest.raises(NoSuchJob, match="no job"):
        purge_job(farm.engine, job_id)


def test_label_sets_that_others_use_stay(farm: Farm) -> None:
    """Two jobs of the same labels: the set goes with the second."""
    first, second = farm.job("a", "one"), farm.job("b", "two")
    purge_job(farm.engine, first)
    assert len(everything(farm.engine)["label_sets"]) == 1
    purge_job(farm.engine, second)
    rows = everything(farm.engine)
    assert not any(rows[t] for t in ("label_sets", "labels", "label_examples", "label_vectors"))


def test_embeddings_that_another_job_needs_stay(farm: Farm) -> None:
    """Asked for, embeddings go that no other job uses: those of its own video, and of its own
    model; what that costs is said beforehand."""
    job_id = farm.job("a", "one", "two")
    farm.job("b", "two", labels=WEATHER)
    farm.job("c", "one", model="clip/2")
    loss = job_loss(farm.engine, job_id, with_embeddings=True)
    deleted = purge_job(farm.engine, job_id, with_embeddings=True)
    assert loss.rows == deleted
    assert deleted["embeddings"] == 3
    assert loss.image_calls == 9
    kept = {(r["video_id"], r["model"]) for r in everything(farm.engine)["embeddings"]}
    assert kept == {(farm.video("two"), "clip/1"), (farm.video("one"), "clip/2")}


def test_a_large_job_goes_in_pieces_and_goes_on(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted between two pieces, the rest is a job still, and the same call ends it."""
    job_id = farm.job("a", "one", "two", "three")
    monkeypatch.setattr(purge, "SAMPLES_AT_ONCE", 8)
    pieces = purge._delete_videos
    calls: list[list[int]] = []

    def break_down(connection: Any, job: int, videos: list[int]) -> Any:
        calls.append(videos)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return pieces(connection, job, videos)

    with monkeypatch.context() as patch:
        patch.setattr(purge, "_delete_videos", break_down)
        with pytest.raises(KeyboardInterrupt):
            purge_job(farm.engine, job_id)
    assert [len(videos) for videos in calls] == [1, 1]
    assert len(named(everything(farm.engine), "job_id", job_id)) > 5
    assert ledger.status(farm.engine, job_id).videos == 2
    purge_job(farm.engine, job_id)
    assert named(everything(farm.engine), "job_id", job_id) == []


def test_nothing_of_a_purged_video_is_left(farm: Farm) -> None:
    """No table has its number, its content id or the name of its file, in any job; all else stays
    to the last byte."""
    farm.job("a", "one", "two")
    farm.job("b", "one", labels=WEATHER)
    ledger.register_file(farm.engine, file("copy"), "content-one")
    before = everything(farm.engine)
    video_id = farm.video("one")
    loss = video_loss(farm.engine, video_id)
    deleted = purge_video(farm.engine, video_id)
    after = everything(farm.engine)
    assert named(after, "video_id", video_id) == []
    for trace in ("one.mp4", "copy.mp4", "content-one"):
        assert trace in repr(before)
        assert trace not in repr(after)
    their_tasks = [row["id"] for row in before["tasks"] if row["video_id"] == video_id]
    expected = {
        table: [
            row
            for row in rows
            if row.get("video_id") != video_id
            and row.get("task_id") not in their_tasks
            and (table != "videos" or row["id"] != video_id)
            and (table != "probes" or row["path_raw"] != b"/archive/one.mp4")
        ]
        for table, rows in before.items()
    }
    assert after == expected
    assert loss.rows == deleted
    assert deleted["files"] == 2
    # Both jobs share what was sent.
    assert (loss.samples, loss.image_calls) == (18, 9)
    with pytest.raises(NoSuchVideo):
        purge_video(farm.engine, video_id)


def test_a_takedown_leaves_no_trace_in_the_file(sqlite_url: str, tmp_path: Path) -> None:
    """Neither SQLite's free pages nor its log hold the name of a video that was purged, though
    others have the database open."""
    with opened(sqlite_url) as other, opened(sqlite_url) as engine:
        Farm(other).job("a", "one", "two")
        purge_video(engine, Farm(engine).video("one"))
        data = b"".join(part.read_bytes() for part in tmp_path.glob("nightreel.db*"))
    assert b"two.mp4" in data
    assert b"one.mp4" not in data
    assert b"content-one" not in data


@pytest.fixture
def url(sqlite_url: str) -> str:
    """A database with job 1 over one.mp4 and two.mp4, and job 2 over 7.mp4 and 7."""
    with opened(sqlite_url) as engine:
        farm = Farm(engine)
        farm.job("a", "one", "two")
        farm.job("b", "three")
        seven = ledger.register_file(engine, ArchiveFile("/archive/7", 1, 1), "content-seven")
        ledger.plan_video(engine, 2, seven, info(4), ranges(4))
        farm.work(2)
    return sqlite_url


@pytest.mark.parametrize("worked_on", ["job", "probe"])
def test_what_is_worked_on_is_not_purged(farm: Farm, worked_on: str) -> None:
    """A job that runs, a video that is open in one, and a video whose file waits to be probed are
    refused, before anything is deleted."""
    farm.job("a", "one")
    video_id = farm.video("one")
    if worked_on == "job":
        job_id = farm.job("b", "one", closed=False)
    else:
        job_id = ledger.open_job(farm.engine, spec("b", request="b"), files=[file("one")]).id
    before = everything(farm.engine)
    for attempt in (purge_video, video_loss):
        with pytest.raises(CannotPurge, match=f"cancel {job_id}"):
            attempt(farm.engine, video_id)
    for of_job in (purge_job, job_loss):
        with pytest.raises(CannotPurge, match=f"cancel {job_id}"):
            of_job(farm.engine, job_id)
    assert everything(farm.engine) == before


def test_the_command_takes_a_number_as_a_job(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`7` is a job, `./7` a file of that name; each is named before it is deleted."""
    assert run_command(["purge", "7", "--yes", "--db", url]) == 2
    assert "no job 7" in capsys.readouterr().err
    assert run_command(["purge", "./7", "--db", url]) == 2
    asked = capsys.readouterr().err
    assert "delete /archive/7 from 1 job: " in asked
    assert "4 frames; 4 image calls to get that back" in asked
    assert "--yes" in asked
    assert run_command(["purge", "./7", "--yes", "--db", url]) == 0
    said = capsys.readouterr().err
    assert "/archive/7 is deleted from 1 job" in said
    assert "VACUUM" in said
    assert run_command(["purge", "1", "--yes", "--db", url]) == 0
    assert "job 1 is deleted" in capsys.readouterr().err
    with opened(url) as engine:
        rows = everything(engine)
    assert [row["id"] for row in rows["jobs"]] == [2]
    assert "/archive/7" not in repr(rows)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gone.mp4"], "no job has a video 'gone.mp4'"),
        (["same.mp4"], "names 2 videos: /archive/a/same.mp4, /archive/b/same.mp4"),
        (["0"], "not in the range"),
        (["9" * 40], "no job has a video"),
    ],
)
def test_what_is_not_named_clearly_is_refused(
    url: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is deleted where the name fits no video or several."""
    with opened(url) as engine:
        for folder in ("a", "b"):
            ledger.register_file(engine, file(f"{folder}/same"), f"content-{folder}")
        before = everything(engine)
        assert run_command(["purge", *words, "--yes", "--db", url]) == 2
        assert said in capsys.readouterr().err
        assert everything(engine) == before


def test_labels_made_from_moments_of_it_are_told(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels picked from the video live in the jobs that use them: the command says so."""
    picked = LabelSet(
        "goals", (Label("goal", samples=("content-one@2000000",)), Label("play", ("play",)))
    )
    with opened(url) as engine:
        farm = Farm(engine)
        farm.job("c", "two", labels=picked)
        assert find_video(engine, "content-one").label_sets == ("goals",)
    assert run_command(["purge", "/archive/one.mp4", "--yes", "--db", url]) == 0
    assert "labels of goals were made from moments of it" in capsys.readouterr().err
