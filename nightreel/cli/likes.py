"""Samples of the archive that a person points at: `VIDEO@TIME`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from nightreel.cli.asked import SECOND_US, microseconds, one_video
from nightreel.cli.output import clock

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from sqlalchemy import Engine

    from storage.ledger import Job
    from storage.records import LabelSet


@dataclass(frozen=True, slots=True, eq=False)
class LikedSample:
    """An embedded sample and where it stands."""

    name: str
    """`CONTENT_ID@MICROSECONDS`: the same whatever the file is called."""
    vector: npt.NDArray[np.float16]


def sample_like(engine: Engine, job: Job, place: str) -> LikedSample:
    """The job's embedded sample that answers for `VIDEO@TIME`; the video's end is of the last one.
    Raises NoSuchVideo, and UsageError if there is none."""
    from sqlalchemy import select

    from storage import vectors
    from storage.database import reading
    from storage.schema import job_videos, videos
    from storage.search import vector_at

    video, _, at = place.rpartition("@")
    if not (video.strip() and at.strip()):
        raise click.UsageError(f"--like {place!r}: write VIDEO@TIME, such as match.mp4@0:12:03.")
    video_id, t_us = one_video(engine, job, video), microseconds(at)
    with reading(engine) as connection:
        content_id, duration_us = connection.execute(
            select(videos.c.content_id, job_videos.c.duration_us)
            .join(job_videos, job_videos.c.video_id == videos.c.id)
            .where(job_videos.c.job_id == job.id, videos.c.id == video_id)
        ).one()
        if t_us > duration_us:
            raise click.UsageError(
                f"--like {place!r}: the video ends at {duration_us / SECOND_US:.3f} s."
            )
        stored = next(
            vectors.of_job(connection, job.id, job.sampling, job.fit, job.model, [video_id]), None
        )
        if stored is None:
            raise click.UsageError(
                f"job {job.id} holds no embeddings of video {video_id}: take a moment of another."
            )
        found = vector_at(stored, min(t_us, duration_us - 1))
    if found is None:
        raise click.UsageError(
            f"--like {place!r}: no embedded sample stands for {clock(t_us / SECOND_US)}; "
            f"`nightreel coverage {video_id} --job {job.id}` lists what was not analysed."
        )
    at_us, vector = found
    return LikedSample(f"{content_id}@{at_us}", vector)


def labels_like(
    engine: Engine, job: Job, likes: tuple[str, ...]
) -> tuple[LabelSet, npt.NDArray[np.float32]]:
    """Labels given by samples, and their vectors (labels x dimension). `likes` are
    `[NAME=]VIDEO@TIME`, the name being what stands before the first `=`; a name that stands
    several times is the centre of its samples.

    Raises UsageError, LabelsError, NoSuchVideo.
    """
    import numpy as np

    from scheduler.labels import check_name, check_text
    from storage.records import Label, LabelSet
    from storage.scoring import centroid

    found: dict[str, list[LikedSample]] = {}
    for like in likes:
        name, named, place = like.partition("=")
        if not name.strip():
            raise click.UsageError(f"--like {like!r}: write NAME=VIDEO@TIME or VIDEO@TIME.")
        check_text(name.strip(), "label")
        check_name(name.strip(), f"--like {like!r}")
        sample = sample_like(engine, job, place if named else like)
        found.setdefault(name.strip(), []).append(sample)
    if len(found) < 2:
        raise click.UsageError(
            "--like gives one label, and a frame is compared among two or more: name another "
            "(`--like rest=VIDEO@TIME`), or ask for what is like it with `nightreel search --like`."
        )
    labels = tuple(
        Label(name, samples=tuple(one.name for one in samples)) for name, samples in found.items()
    )
    matrix = np.stack([centroid(np.stack([s.vector for s in of])) for of in found.values()])
    return LabelSet("like", labels), matrix
