"""Jobs whose samples have real vectors, worked on as workers do."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt
from click.testing import CliRunner, Result
from rows import DIMENSION, SECOND, claimed
from sqlalchemy import Engine

from nightreel.cli import cli
from storage import ledger, results
from storage.ledger import Job
from storage.records import Gap, GapKind, RangeResult, SampleResult
from storage.scoring import similarities
from workers.classify import predictions

LOST = 5
"""The second of every video that does not decode."""
SHOT = 6
"""Seconds for which pictures stay alike."""


def directions(count: int, seed: int) -> npt.NDArray[np.float32]:
    """Unit vectors."""
    found = np.random.default_rng(seed).normal(size=(count, DIMENSION)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def pictures(video_id: int, buckets: tuple[int, ...]) -> npt.NDArray[np.float16]:
    """Vectors of a video whose pictures stay alike for `SHOT` samples."""
    shots, noise = directions(100, 10 + video_id), directions(600, 1000 + video_id)
    rows = [shots[bucket // SHOT] + 0.2 * noise[bucket] for bucket in buckets]
    found = np.array(rows).reshape(-1, DIMENSION)
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float16)


def scored(
    buckets: tuple[int, ...],
    vectors: npt.NDArray[np.float16],
    labels: npt.NDArray[np.float32],
    top_n: int,
) -> tuple[SampleResult, ...]:
    """What a worker makes of these vectors."""
    best = predictions(similarities(vectors, labels), top_n)
    return tuple(
        SampleResult(
            bucket,
            bucket * SECOND + 7,
            bucket * SECOND,
            (bucket + 1) * SECOND,
            of_sample,
        )
        for bucket, of_sample in zip(buckets, best, strict=True)
    )


def done(
    engine: Engine, job_id: int, labels: npt.NDArray[np.float32], *, embeds: bool = True
) -> Job:
    """Do all of the job's tasks, and close it."""
    while fed := ledger.feed(engine, 8, job_id):
        for task_id in fed:
            claim = claimed(engine, task_id)
            kept = tuple(b for b in claim.frame_range.buckets if b != LOST)
            vectors = pictures(claim.video_id, kept)
            gaps = tuple(
                Gap(b * SECOND, (b + 1) * SECOND, GapKind.DAMAGED, "noise")
                for b in claim.frame_range.buckets
                if b == LOST
            )
            result = RangeResult(
                scored(kept, vectors, labels, claim.top_n),
                gaps,
                vectors.tobytes() if embeds else None,
                DIMENSION if embeds else 0,
            )
            assert results.commit(engine, task_id, claim.fence, result)
    ledger.close_finished(engine)
    return ledger.get_job(engine, job_id)


def asked(url: str, *words: str, **environment: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, rows and talk of a command that is asked for JSON about this database."""
    result: Result = CliRunner().invoke(
        cli,
        [*words, "--db", url, "--format", "json"],
        env={"NIGHTREEL_API_URL": None, **environment},
        standalone_mode=False,
    )
    if result.exception is not None:
        raise result.exception
    code = result.return_value
    return int(code or 0), json.loads(result.stdout), result.stderr
