"""The outbox: what is to be told of jobs to those who asked for it, at least once.

An event is written in the transaction that makes it true, so that it is lost with that transaction
or not at all. Whoever delivers takes it for a while; one that is not heard of again comes due anew.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Engine, Row, Table, func, select, update
from sqlalchemy import insert as plain_insert

from storage.database import writing
from storage.dialect import Now, one_line
from storage.ledger.leases import after
from storage.records import TaskState, VideoState
from storage.schema import events, job_videos, jobs, probes, tasks

JOB_CLOSED = "job.closed"
"""The one kind of event."""


class EventState(StrEnum):
    """How an event stands."""

    PENDING = "pending"
    DELIVERED = "delivered"
    GIVEN_UP = "given-up"


@dataclass(frozen=True, slots=True)
class Event:
    """An event that was taken to be delivered."""

    id: str
    job_id: int
    url: str
    body: str
    """JSON; every delivery of the event has the same."""
    attempts: int
    """Deliveries begun, this one included."""


def job_closed(connection: Connection, job_id: int) -> None:
    """Within the transaction that closes the job: have it told to the job's `notify_url`, if it has
    one. A job that is opened and closed again is another event."""
    job = connection.execute(select(jobs).where(jobs.c.id == job_id)).one()
    if job.notify_url is None:
        return
    event_id = str(uuid.uuid4())
    connection.execute(
        plain_insert(events).values(
            id=event_id,
            job_id=job_id,
            kind=JOB_CLOSED,
            url=job.notify_url,
            body=json.dumps(_closed_body(connection, event_id, job)),
            state=EventState.PENDING,
            attempts=0,
            not_before_ms=0,
            created_ms=Now(),
        )
    )


def _closed_body(
    connection: Connection, event_id: str, job: Row[*tuple[Any, ...]]
) -> dict[str, Any]:
    files, videos, ranges = (_by_state(connection, t, job.id) for t in (probes, job_videos, tasks))
    samples, duration_us, analysed_us = connection.execute(
        select(
            select(func.coalesce(func.sum(tasks.c.samples), 0))
            .where(tasks.c.job_id == job.id)
            .scalar_subquery(),
            func.coalesce(func.sum(job_videos.c.duration_us), 0),
            func.coalesce(func.sum(job_videos.c.analysed_us), 0),
        ).where(job_videos.c.job_id == job.id)
    ).one()
    if TaskState.CANCELLED in ranges or TaskState.CANCELLED in files:
        state = "cancelled"
    elif TaskState.FAILED in files or videos.keys() - {VideoState.COMPLETE}:
        state = "incomplete"
    else:
        state = "complete"
    closed = datetime.fromtimestamp(job.closed_ms / 1000, UTC)
    return {
        "event_id": event_id,
        "kind": JOB_CLOSED,
        "job": job.id,
        "name": job.name,
        "tag": job.tag,
        "state": state,
        "files": files,
        "videos": videos,
        "tasks": ranges,
        "samples": int(samples),
        "duration_s": int(duration_us) / 1e6,
        "analysed_s": int(analysed_us) / 1e6,
        "closed_at": closed.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
    }


def _by_state(connection: Connection, table: Table, job_id: int) -> dict[str, int]:
    """Rows of the job by state; those there are."""
    rows = connection.execute(
        select(table.c.state, func.count())
        .where(table.c.job_id == job_id)
        .group_by(table.c.state)
        .order_by(table.c.state)
    )
    return dict(rows.all())


def take_events(engine: Engine, hold_s: float, at_most: int) -> list[Event]:
    """Take the events that have been due longest, one of each receiver (scheme, host and port), so
    that none of them waits for another's; nobody else is given them for `hold_s` seconds. Then
    `delivered`, `put_off` or `give_up`."""
    due = [events.c.state == EventState.PENDING, events.c.not_before_ms <= Now()]
    longest = (events.c.not_before_ms, events.c.created_ms, events.c.id)
    with writing(engine) as connection:
        first_of: dict[str, str] = {}
        for event_id, url in connection.execute(
            select(events.c.id, events.c.url).where(*due).order_by(*longest)
        ):
            first_of.setdefault("/".join(url.split("/", 3)[:3]), event_id)
        chosen = list(first_of.values())[:at_most]
        if not chosen:
            return []
        # Due still: another scheduler may have taken one meanwhile, or be about to.
        free = select(events.c.id).where(events.c.id.in_(chosen), *due)
        free = free.with_for_update(skip_locked=True)
        rows = connection.execute(
            update(events)
            .where(events.c.id.in_(connection.scalars(free).all()))
            .values(attempts=events.c.attempts + 1, not_before_ms=after(hold_s))
            .returning(events.c.id, events.c.job_id, events.c.url, events.c.body, events.c.attempts)
        ).all()
    return [Event(*row) for row in sorted(rows, key=lambda row: chosen.index(row.id))]


def delivered(engine: Engine, event_id: str) -> None:
    """Record that the event was accepted."""
    _record(engine, event_id, state=EventState.DELIVERED, delivered_ms=Now(), error=None)


def put_off(engine: Engine, event_id: str, delay_s: float, error: str) -> None:
    """Have the event tried again in `delay_s` seconds."""
    _record(engine, event_id, not_before_ms=after(delay_s), error=one_line(error))


def give_up(engine: Engine, event_id: str, error: str) -> None:
    """Have the event tried no more."""
    _record(engine, event_id, state=EventState.GIVEN_UP, error=one_line(error))


def _record(engine: Engine, event_id: str, **values: object) -> None:
    with writing(engine) as connection:
        connection.execute(
            update(events)
            .where(events.c.id == event_id, events.c.state == EventState.PENDING)
            .values(**values)
        )
