"""Which work is queued next: a bounded window, fair over jobs and over videos.

Over jobs it is start-time fair queueing (Goyal, Vin and Cheng, 1996): each task that is fed moves
its job on by one over the job's weight, and the job that has come least far is fed next. So jobs
share the workers in proportion to their weights whatever their sizes, and none starves. The virtual
time is where the last task fed began; a job that comes, or comes back, begins there: having had
nothing to do is no credit.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    Table,
    exists,
    select,
    true,
    tuple_,
    update,
)

from storage.database import writing
from storage.dialect import Now, lock_ledger
from storage.ledger.job import JobState
from storage.records import TaskState
from storage.schema import in_flight, jobs, pending, probes, tasks

LARGEST_FEED = 10_000
"""Units of work that one call marks at most: a statement's parameters are bounded."""

AT_ONCE = 16
"""Units of work that a job is asked for at a time."""

PRIORITIES = range(-9, 10)
"""What a job's priority may be; each step doubles the weight."""


def feed(
    engine: Engine, window: int, job_id: int | None = None, *, most: int = LARGEST_FEED
) -> list[int]:
    """Mark due tasks as queued, as many as fit into the window, and return their ids in the order
    to publish them; publish, or `unqueue` them.

    At most `window` tasks are queued or leased at a time, of all submitted jobs or of `job_id`
    alone, and one call marks at most `most`. Jobs share in proportion to 2 to the power of their
    priority; within a job every video's first range goes before any second.
    """
    return _feed(engine, tasks, window, job_id, most)


def feed_probes(
    engine: Engine, window: int, job_id: int | None = None, *, most: int = LARGEST_FEED
) -> list[int]:
    """The same for files to be probed, in the order in which they were listed."""
    return _feed(engine, probes, window, job_id, most)


def _feed(engine: Engine, table: Table, window: int, job_id: int | None, most: int) -> list[int]:
    chosen = jobs.c.submitted if job_id is None else jobs.c.id == job_id
    with writing(engine) as connection:
        lock_ledger(connection)
        # Counted here: asked to group, SQLite walks the index of all tasks instead of this one.
        at_work = Counter(connection.scalars(select(table.c.job_id).where(in_flight(table))))
        of_these = connection.scalars(select(jobs.c.id).where(jobs.c.id.in_(at_work), chosen)).all()
        room = min(window - sum(at_work[one] for one in of_these), most, LARGEST_FEED)
        if room <= 0:
            return []
        fed = _share(connection, table, chosen, room)
        if fed:
            connection.execute(
                update(table)
                .where(table.c.id.in_(fed))
                .values(state=TaskState.QUEUED, queued_ms=Now())
            )
    return fed


def _share(
    connection: Connection, table: Table, chosen: ColumnElement[bool], room: int
) -> list[int]:
    """Ids of due work, `room` of them at most, as the jobs' weights share it out."""
    due = exists().where(
        pending(table), table.c.job_id == jobs.c.id, table.c.not_before_ms <= Now()
    )
    share = jobs.c.served if table is tasks else jobs.c.served_probes
    waiting = connection.execute(
        select(jobs.c.id, share.label("served"), jobs.c.priority).where(
            jobs.c.state == JobState.RUNNING, chosen, due
        )
    ).all()
    if not waiting:
        return []
    stride = {row.id: _stride(row.priority) for row in waiting}
    fed_before = connection.execute(
        select(share.label("served"), jobs.c.priority).where(chosen, share > 0)
    )
    time = max((row.served - _stride(row.priority) for row in fed_before), default=0.0)
    queue = [(max(row.served, time), row.id) for row in waiting]
    heapq.heapify(queue)
    work = {row.id: _due(connection, table, row.id) for row in waiting}
    served: dict[int, float] = {}
    fed: list[int] = []
    while queue and len(fed) < room:
        now, job_id = queue[0]
        found = next(work[job_id], None)
        if found is None:
            heapq.heappop(queue)
            continue
        fed.append(found)
        served[job_id] = now + stride[job_id]
        heapq.heapreplace(queue, (served[job_id], job_id))
    for job_id, value in served.items():
        connection.execute(update(jobs).where(jobs.c.id == job_id).values({share.name: value}))
    return fed


def _stride(priority: int) -> float:
    return 2.0**-priority


def _due(connection: Connection, table: Table, job_id: int) -> Iterator[int]:
    """Ids of the job's due work in its order, a few asked for at a time: of a thousand jobs each
    gives one or two."""
    order = (tasks.c.ordinal, tasks.c.video_id) if table is tasks else (table.c.id,)
    due = select(table.c.id, *order).where(
        pending(table), table.c.job_id == job_id, table.c.not_before_ms <= Now()
    )
    after: ColumnElement[bool] = true()
    while True:
        rows = connection.execute(
            due.where(after).order_by(*order).limit(AT_ONCE).with_for_update(skip_locked=True)
        ).all()
        yield from (row[0] for row in rows)
        if len(rows) < AT_ONCE:
            return
        after = tuple_(*order) > tuple_(*rows[-1][1:])
