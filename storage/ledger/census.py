"""How many rows of the ledger stand how, over all jobs: for whoever watches from outside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import Connection, Engine, Table, func, select

from storage.database import reading
from storage.dialect import Now
from storage.ledger.events import EventState
from storage.ledger.job import JobState
from storage.records import TaskState, VideoState
from storage.schema import events, in_flight, job_videos, jobs, probes, tasks

STATES: Mapping[Table, Iterable[StrEnum]] = {
    jobs: JobState,
    job_videos: VideoState,
    probes: TaskState,
    tasks: TaskState,
    events: EventState,
}


@dataclass(frozen=True, slots=True)
class Census:
    """Rows by state, every state a key, all of the same moment."""

    jobs: Mapping[str, int]
    videos: Mapping[str, int]
    """A video counts once in each job that has it."""
    probes: Mapping[str, int]
    tasks: Mapping[str, int]
    events: Mapping[str, int]
    queue_age_s: float
    """Since the oldest message was sent that no worker has taken, by the database's clock; 0
    without any."""


def take_census(engine: Engine) -> Census:
    """Count all rows. This reads whole tables: at a million tasks, ask seldom."""
    with reading(engine) as connection:
        counted = [_by_state(connection, table, STATES[table]) for table in STATES]
        ages = [_oldest_s(connection, table) for table in (tasks, probes)]
    of_jobs, of_videos, of_probes, of_tasks, of_events = counted
    return Census(of_jobs, of_videos, of_probes, of_tasks, of_events, max(ages))


def _by_state(connection: Connection, table: Table, states: Iterable[StrEnum]) -> Mapping[str, int]:
    rows = connection.execute(select(table.c.state, func.count()).group_by(table.c.state)).all()
    found: dict[str, int] = dict(rows)
    return {state.value: found.get(state.value, 0) for state in states}


def _oldest_s(connection: Connection, table: Table) -> float:
    sent_ms, now_ms = connection.execute(
        select(func.min(table.c.queued_ms), Now()).where(
            in_flight(table), table.c.state == TaskState.QUEUED
        )
    ).one()
    return 0.0 if sent_ms is None else max(0.0, (now_ms - sent_ms) / 1000)
