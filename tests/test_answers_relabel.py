"""New labels from stored embeddings: the results of a second run, with nothing sent or decoded."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from embedded import directions, done
from rows import SEASONS, SECOND, file, planned
from sqlalchemy import Engine, func, select, text, update
from sqlalchemy.exc import DBAPIError

from storage import crew, ledger, purge, relabel, results
from storage.columns import SampleColumns, columns_in
from storage.coverage import coverage, listing
from storage.database import reading, writing
from storage.flags import flagged
from storage.highlights import highlights
from storage.labels import label_set, store_label_vectors
from storage.ledger import Job, JobState
from storage.records import GapKind, Label, LabelSet, VideoState
from storage.relabel import CannotRelabel
from storage.relabelled import answers_of
from storage.scenes import scenes
from storage.schema import embeddings, files, flags, gaps, job_videos, jobs, samples, tasks, videos
from storage.schema import predictions as predictions_table
from storage.schema import scenes as scenes_table
from storage.scoring import best_labels, similarities
from workers.classify import predictions

NEW = LabelSet("new", tuple(Label(name, (name,)) for name in ("sea", "snow", "street", "studio")))


LABEL_VECTORS = directions(4, 1)


def relabelled(engine: Engine, job: Job, labels: LabelSet = NEW) -> Job:
    """The job under new labels."""
    target = relabel.new_job(engine, job, labels)
    store_label_vectors(engine, target.label_set_id, target.model, LABEL_VECTORS)
    relabel.relabel(engine, job, target)
    return ledger.get_job(engine, target.id)


def everything(engine: Engine, job: Job, video_ids: list[int]) -> list[object]:
    """All that a job says of its videos."""
    covered = coverage(engine, job.id)
    with reading(engine) as connection:
        raised = connection.execute(
            select(*list(flags.c)[1:]).where(flags.c.job_id == job.id).order_by(flags.c.video_id)
        ).all()
    return [
        [results.samples(engine, job.id, video_id) for video_id in video_ids],
        scenes(engine, job.id),
        [replace(one, video_id=0) for one in covered],
        raised,
        job.state,
    ]


def test_the_numbers_are_those_that_workers_commit() -> None:
    """Similarities and confidences of many samples at once are a worker's to the last bit."""
    vectors = directions(5000, 3).astype(np.float16)
    labels = directions(17, 4)
    label, similarity, confidence = best_labels(similarities(vectors, labels), 5)
    for at in range(0, 5000, 7):
        (best,) = predictions(similarities(vectors[at : at + 1], labels), 5)
        expected = [(p.label, p.similarity, p.confidence) for p in best]
        got = zip(label[at].tolist(), similarity[at].tolist(), confidence[at].tolist(), strict=True)
        assert list(got) == expected


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("at_once", [1, 40, 20_000])
def test_relabelling_gives_what_a_run_with_the_labels_gives(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, at_once: int, together: bool
) -> None:
    """Samples, predictions, scenes, gaps and flags are those of a job that was worked on with the
    new labels, however many are written in a transaction, and whether one process answers or
    several do; the old job stays as it was."""
    if together:
        monkeypatch.setattr(crew, "_cores", lambda: 2)
        monkeypatch.setattr(relabel, "_WORTH_A_CREW", 0)
    monkeypatch.setattr(relabel, "_SAMPLES_AT_ONCE", at_once)
    monkeypatch.setattr(relabel, "_SHARES_AT_ONCE", 4 * at_once)
    new = replace(NEW, labels=(replace(NEW.labels[0], threshold=0.4, flag="wet"), *NEW.labels[1:]))
    old = planned(engine, 30, 4, 61)
    job = done(engine, old.job_id, directions(3, 2))
    before = everything(engine, job, old.video_ids)
    target = relabelled(engine, job, new)
    assert target.id != job.id
    assert everything(engine, job, old.video_ids) == before
    run = planned(engine, 30, 4, 61, key="run", labels=new)
    assert run.video_ids == old.video_ids
    by_workers = done(engine, run.job_id, LABEL_VECTORS)
    assert everything(engine, target, old.video_ids) == everything(
        engine, by_workers, old.video_ids
    )
    assert [label.name for label in label_set(engine, target.label_set_id).labels] == [
        "sea", "snow", "street", "studio",
    ]  # fmt: skip


def test_relabelling_again_is_the_same_job_and_changes_nothing(engine: Engine) -> None:
    """The same labels find their job; a video that was added since is added."""
    old = planned(engine, 8)
    job = done(engine, old.job_id, directions(3, 2))
    first = relabelled(engine, job)
    before = everything(engine, first, old.video_ids)
    again = relabelled(engine, job)
    assert (again.id, everything(engine, again, old.video_ids)) == (first.id, before)
    more = planned(engine, 8, 12)
    job = done(engine, more.job_id, directions(3, 2))
    assert job.id == old.job_id
    third = relabelled(engine, job)
    assert third.id == first.id
    assert [one.analysed_us for one in coverage(engine, third.id)] == [7 * SECOND, 11 * SECOND]


def test_relabelling_twice_at_once_is_relabelling_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two commands that give a job the same labels at the same time both end well, with one job."""
    monkeypatch.setattr(relabel, "_SAMPLES_AT_ONCE", 10)
    old = planned(engine, *range(12, 20))
    job = done(engine, old.job_id, directions(3, 2))
    together = Barrier(2)

    def begin() -> Job:
        together.wait()
        return relabelled(engine, job)

    with ThreadPoolExecutor(2) as threads:
        first, second = (one.result() for one in [threads.submit(begin) for _ in range(2)])
    assert first.id == second.id
    run = planned(engine, *range(12, 20), key="run", labels=NEW)
    by_workers = done(engine, run.job_id, LABEL_VECTORS)
    assert everything(engine, first, old.video_ids) == everything(engine, by_workers, old.video_ids)


def test_the_answers_come_before_the_rows_they_are_made_of(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States, scenes, flags, highlights and curves of every video are there when that is told; the
    rows of samples follow, and only then is the job done."""
    monkeypatch.setattr(relabel, "_SAMPLES_AT_ONCE", 1)
    labels = replace(
        NEW, labels=(replace(NEW.labels[0], threshold=0.4, flag="wet"), *NEW.labels[1:])
    )
    old = planned(engine, 30, 4, 61)
    job = done(engine, old.job_id, directions(3, 2))
    told: list[object] = []

    def said() -> list[object]:
        with reading(engine) as connection:
            columns = [columns_in(connection, target.id, one) for one in old.video_ids]
        return [
            scenes(engine, target.id),
            coverage(engine, target.id),
            flagged(engine, target.id),
            highlights(engine, target.id, "sea", top=1000, least=0.0),
            [[getattr(one, name).tolist() for name in SampleColumns.__slots__] for one in columns],
        ]

    def answers(samples: int) -> None:
        told.extend([samples, *said()])
        assert not any(results.samples(engine, target.id, one) for one in old.video_ids)
        assert ledger.get_job(engine, target.id).state is JobState.RUNNING
        assert not listing(engine, target.id).complete

    target = relabel.new_job(engine, job, labels)
    store_label_vectors(engine, target.label_set_id, target.model, LABEL_VECTORS)
    written: list[int] = []
    relabel.relabel(engine, job, target, answers=answers, progress=written.append)
    count = sum(len(results.samples(engine, target.id, one)) for one in old.video_ids)
    assert told == [count, *said()]
    assert all(told)
    assert sum(written) == count
    assert len(written) == 3
    assert ledger.get_job(engine, target.id).state is JobState.CLOSED
    assert listing(engine, target.id).complete


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_relabelling_that_was_cut_off_is_gone_on_with(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Ended between answers and rows, or after some of the rows, its job is not done and says so;
    the same again gives the rows that a relabelling in one go gives, and writes none twice."""
    monkeypatch.setattr(relabel, "_SAMPLES_AT_ONCE", 1)
    old = planned(engine, 30, 4, 61)
    job = done(engine, old.job_id, directions(3, 2))

    class CutOff(Exception):
        pass

    told: list[int] = []

    def tell(samples: int) -> None:
        told.append(samples)
        if len(told) > after:
            raise CutOff

    target = relabel.new_job(engine, job, NEW)
    store_label_vectors(engine, target.label_set_id, target.model, LABEL_VECTORS)
    with pytest.raises(CutOff):
        relabel.relabel(engine, job, target, answers=tell, progress=tell)
    assert ledger.get_job(engine, target.id).state is JobState.RUNNING
    assert not listing(engine, target.id).complete
    written = {one for one in old.video_ids if results.samples(engine, target.id, one)}
    assert len(written) == after
    again: list[int] = []
    relabel.relabel(engine, job, target, answers=again.append)
    lacking = [one for one in old.video_ids if one not in written]
    assert again == [sum(len(results.samples(engine, target.id, one)) for one in lacking)]
    run = planned(engine, 30, 4, 61, key="run", labels=NEW)
    by_workers = done(engine, run.job_id, LABEL_VECTORS)
    target = ledger.get_job(engine, target.id)
    assert everything(engine, target, old.video_ids) == everything(
        engine, by_workers, old.video_ids
    )


def test_what_was_answered_anew_gets_new_rows(engine: Engine) -> None:
    """A video that the source analysed anew loses the rows of before, and gets those of now."""
    old = planned(engine, 8, 12)
    job = done(engine, old.job_id, directions(3, 2))
    target = relabelled(engine, job)
    changed, same = old.video_ids
    with writing(engine) as connection:
        connection.execute(
            embeddings.delete().where(
                embeddings.c.video_id == changed, embeddings.c.bucket_start == 4
            )
        )
        connection.execute(
            update(job_videos)
            .where(job_videos.c.job_id == job.id, job_videos.c.video_id == changed)
            .values(closed_ms=job_videos.c.closed_ms + 60_000)
        )
    before = results.samples(engine, target.id, same)
    assert len(results.samples(engine, target.id, changed)) == 7
    target = relabelled(engine, job)
    assert [one.bucket for one in results.samples(engine, target.id, changed)] == [0, 1, 2, 3]
    assert results.samples(engine, target.id, same) == before
    assert target.state is JobState.CLOSED


def meanwhile(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    """Let something happen between what a relabelling reads first and what answers come of it."""
    read = relabel._gaps_of

    def late(connection: Any, job_id: int) -> Any:
        monkeypatch.setattr(relabel, "_gaps_of", read)
        found = read(connection, job_id)
        happens()
        return found

    monkeypatch.setattr(relabel, "_gaps_of", late)


@pytest.mark.parametrize("together", [False, True])
def test_what_becomes_of_the_old_job_meanwhile_loses_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    """The old job is purged, or one of its videos is done anew, while it is relabelled: the new one
    holds what was read, and the same command again what is new."""
    if together:
        monkeypatch.setattr(crew, "_cores", lambda: 2)
        monkeypatch.setattr(relabel, "_WORTH_A_CREW", 0)
    old = planned(engine, 8, 12)
    job = done(engine, old.job_id, directions(3, 2))
    changed, _ = old.video_ids
    of_changed = (job_videos.c.job_id == job.id) & (job_videos.c.video_id == changed)

    def done_anew() -> None:
        with writing(engine) as connection:
            connection.execute(
                embeddings.delete().where(
                    embeddings.c.video_id == changed, embeddings.c.bucket_start == 4
                )
            )
            later = update(job_videos).where(of_changed)
            connection.execute(later.values(closed_ms=job_videos.c.closed_ms + 1))

    meanwhile(monkeypatch, done_anew)
    for seconds in (7, 4):
        target = relabelled(engine, job)
        assert [one.analysed_us // SECOND for one in coverage(engine, target.id)] == [seconds, 11]
        assert len(results.samples(engine, target.id, changed)) == seconds
        assert target.state is JobState.CLOSED

    other = replace(NEW, name="other", labels=NEW.labels[:2])
    meanwhile(monkeypatch, lambda: purge.purge_job(engine, job.id))
    other_target = relabel.new_job(engine, job, other)
    store_label_vectors(engine, other_target.label_set_id, job.model, LABEL_VECTORS[:2])
    relabel.relabel(engine, job, other_target)
    assert [one.video_id for one in coverage(engine, other_target.id)] == old.video_ids
    assert ledger.get_job(engine, other_target.id).state is JobState.CLOSED


def test_a_video_that_is_purged_meanwhile_leaves_nothing(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither answers nor rows come back for it; a new job that is purged itself says so."""
    old = planned(engine, 8, 12)
    job = done(engine, old.job_id, directions(3, 2))
    gone, kept = old.video_ids
    target = relabel.new_job(engine, job, NEW)
    store_label_vectors(engine, target.label_set_id, target.model, LABEL_VECTORS)

    def purged(_: int) -> None:
        with writing(engine) as connection:
            for table in (scenes_table, flags, gaps, tasks, job_videos, embeddings, files):
                connection.execute(table.delete().where(table.c.video_id == gone))
            connection.execute(samples.delete().where(samples.c.video_id == gone))
            connection.execute(
                predictions_table.delete().where(predictions_table.c.video_id == gone)
            )
            connection.execute(videos.delete().where(videos.c.id == gone))

    relabel.relabel(engine, job, target, answers=purged)
    assert results.samples(engine, target.id, gone) == []
    assert len(results.samples(engine, target.id, kept)) == 11
    again = relabel.new_job(engine, job, replace(NEW, name="again", labels=NEW.labels[:2]))
    store_label_vectors(engine, again.label_set_id, job.model, LABEL_VECTORS[:2])

    def purge_new() -> None:
        ledger.cancel_job(engine, again.id)
        ledger.close_finished(engine)
        purge.purge_job(engine, again.id)

    meanwhile(monkeypatch, purge_new)
    with pytest.raises(CannotRelabel, match="was purged while it was filled"):
        relabel.relabel(engine, job, again)


def test_a_job_with_rows_to_come_does_not_close(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another relabelling that ends meanwhile does not close the job over answers without rows."""
    old = planned(engine, 8)
    job = done(engine, old.job_id, directions(3, 2))
    target = relabel.new_job(engine, job, NEW)
    store_label_vectors(engine, target.label_set_id, target.model, LABEL_VECTORS)
    meanwhile(monkeypatch, lambda: relabel._finish(engine, target.id))

    def cut_off(_: int) -> None:
        assert not relabel._finish(engine, target.id)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        relabel.relabel(engine, job, target, answers=cut_off)
    assert ledger.get_job(engine, target.id).state is JobState.RUNNING
    assert relabel.relabel(engine, job, target)
    assert ledger.get_job(engine, target.id).state is JobState.CLOSED


def test_many_labels_are_answered_for_a_few_videos_at_a_time(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The videos whose scenes are found together are the fewer, the more labels there are."""
    sizes: list[int] = []

    def counted(connection: Any, part: Any, question: Any) -> Any:
        sizes.append(len(part[0]))
        return answers_of(connection, part, question)

    monkeypatch.setattr(relabel, "answers_of", counted)
    monkeypatch.setattr(relabel, "_SHARES_AT_ONCE", 4 * 20)
    old = planned(engine, *[11] * 8)
    relabelled(engine, done(engine, old.job_id, directions(3, 2)))
    assert sizes == [2, 2, 2, 2]


def test_what_the_database_refuses_is_raised_and_made_up_for(engine: Engine) -> None:
    """A failure to write ends the call with the database's error; repeating it gives everything."""
    old = planned(engine, 30, 4, 61)
    job = done(engine, old.job_id, directions(3, 2))
    with writing(engine) as connection:
        connection.execute(text("ALTER TABLE scenes RENAME TO missing"))
    with pytest.raises(DBAPIError):
        relabelled(engine, job)
    with writing(engine) as connection:
        connection.execute(text("ALTER TABLE missing RENAME TO scenes"))
    target = relabelled(engine, job)
    assert target.state is JobState.CLOSED
    assert [one.analysed_us for one in coverage(engine, target.id)] == [
        one.analysed_us for one in coverage(engine, job.id)
    ]


def test_a_rejected_video_stays_rejected(engine: Engine) -> None:
    """What could not be read stands in the new job with its reason."""
    old = planned(engine, 8)
    (good,) = old.video_ids
    bad = ledger.register_file(engine, file("bad"), "bad")
    ledger.reject_video(engine, old.job_id, bad, "unreadable", "no moov")
    target = relabelled(engine, done(engine, old.job_id, directions(3, 2)))
    assert [(one.video_id, one.state, one.reason) for one in coverage(engine, target.id)] == [
        (good, VideoState.PARTIAL, "noise"),
        (bad, VideoState.REJECTED, "no moov"),
    ]


def test_what_was_only_compared_says_so(engine: Engine) -> None:
    """A job without embeddings is refused with the remedy; where some are missing, their time is a
    gap with its reason, and nothing is claimed."""
    old = planned(engine, 8)
    job = done(engine, old.job_id, directions(3, 2), embeds=False)
    with pytest.raises(CannotRelabel, match="no stored embeddings"):
        relabel.new_job(engine, job, NEW)
    with reading(engine) as connection:
        assert connection.scalar(select(func.count()).select_from(jobs)) == 1
    other = planned(engine, 8, 12, key="more")
    job = done(engine, other.job_id, directions(3, 2))
    with writing(engine) as connection:
        connection.execute(embeddings.delete().where(embeddings.c.bucket_start == 4))
    target = relabelled(engine, job)
    first, second = coverage(engine, target.id)
    assert (first.state, first.analysed_us) == (VideoState.PARTIAL, 4 * SECOND)
    assert [(gap.start_us, gap.end_us, gap.kind) for gap in first.gaps] == [
        (4 * SECOND, 5 * SECOND, GapKind.NOT_EMBEDDED),
        (5 * SECOND, 6 * SECOND, GapKind.DAMAGED),
        (6 * SECOND, 8 * SECOND, GapKind.NOT_EMBEDDED),
    ]
    for one in (first, second):
        assert one.analysed_us + one.gap_us == one.duration_us
        assert one.waiting_us == 0


def test_a_job_that_is_not_done_is_refused(engine: Engine) -> None:
    """Half a job has no complete new labels: it says to finish it first."""
    old = planned(engine, 8)
    with pytest.raises(CannotRelabel, match="not done"):
        relabel.new_job(engine, ledger.get_job(engine, old.job_id), NEW)


def test_labels_differ_by_their_samples() -> None:
    """Label sets of the same names and other samples are other label sets."""
    one = LabelSet("a", tuple(replace(label, samples=("c@1",)) for label in SEASONS.labels))
    two = LabelSet("a", tuple(replace(label, samples=("c@2",)) for label in SEASONS.labels))
    assert len({one.digest, two.digest, SEASONS.digest}) == 3
