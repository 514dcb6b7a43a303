"""What endpoints were found to be able to do, kept for each job that asked."""

from __future__ import annotations

from sqlalchemy import Engine, select

from storage.database import reading, writing
from storage.dialect import insert
from storage.schema import job_endpoints, jobs


def known_endpoint(engine: Engine, job_id: int, endpoint: str) -> tuple[bool, int] | None:
    """Whether the endpoint of this name embeds, and how many pictures a call may hold; None if the
    job has not asked it."""
    with reading(engine) as connection:
        row = connection.execute(
            select(job_endpoints.c.embeds, job_endpoints.c.batch).where(
                job_endpoints.c.job_id == job_id, job_endpoints.c.endpoint == endpoint
            )
        ).first()
    return None if row is None else (row.embeds, row.batch)


def store_endpoint(
    engine: Engine,
    job_id: int,
    endpoint: str,
    found: tuple[bool, int],
    but: tuple[bool, int] | None = None,
) -> None:
    """Keep what the job found of the endpoint: the first of several that come, and one that comes
    later only in place of `but`, which has proved wrong. A job that was purged keeps nothing."""
    answer = {"embeds": found[0], "batch": found[1]}
    with writing(engine) as connection:
        alive = select(jobs.c.id).where(jobs.c.id == job_id).with_for_update(read=True)
        if connection.scalar(alive) is None:
            return
        row = insert(connection, job_endpoints).values(job_id=job_id, endpoint=endpoint, **answer)
        key = ["job_id", "endpoint"]
        if but is None:
            row = row.on_conflict_do_nothing(index_elements=key)
        else:
            wrong = (job_endpoints.c.embeds == but[0]) & (job_endpoints.c.batch == but[1])
            row = row.on_conflict_do_update(index_elements=key, set_=answer, where=wrong)
        connection.execute(row)
