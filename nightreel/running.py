"""One run of a job on this machine: plan it, start the farm when there is work, watch it end."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field

from pydantic import SecretStr
from sqlalchemy import Engine

from nightreel.interrupts import terminated_as_interrupted
from nightreel.local import LocalFarm, take_secrets
from nightreel.progress import ProgressDisplay, Snapshot
from scheduler.archive import Unreadable
from scheduler.feeder import check_broker, remove_queue
from scheduler.settings import SchedulerSettings
from scheduler.submit import submit
from storage import ledger
from storage.database import with_retries
from storage.exits import ExitCode
from storage.ledger.progress import BY_HAND
from storage.records import ArchiveFile, Sampling, TaskState
from workers.app import make_app
from workers.refusals import API_OUTAGE
from workers.settings import QueueSettings

POLL_S = 0.25
POLL_SHARE = 20
"""Asking how a large job stands takes a while: at most a twentieth of the time is spent on it."""


class JobHeld(Exception):
    """The job is held because the API refuses key, credits or model."""

    code = ExitCode.API


class BudgetReached(Exception):
    """The run's calls are spent, and no worker is at work any more; the job can go on."""


@dataclass(slots=True)
class Run:
    """Planning goes on in a thread: early videos are worked on while late ones are probed."""

    engine: Engine
    job_id: int
    sampling: Sampling
    database_url: str
    workers: int
    api_engine: str
    """Engine of the API at home, where `api_url` is None."""
    api_url: str | None
    broker_url: str | None
    """None starts the embedded queue."""
    max_rps: float | None = None
    _worker_name: str = field(
        default_factory=lambda: f"{socket.gethostname()}:{secrets.token_hex(4)}"
    )
    video_ids: set[int] = field(default_factory=set)
    """Videos of the files that this run was given."""
    _api_secrets: dict[str, str] = field(default_factory=dict, repr=False)
    _stop: threading.Event = field(default_factory=threading.Event)
    _fault: BaseException | None = None
    _done_while_away: int | None = None
    """Tasks that were done when the API was seen away last; None while it is there."""

    def carry_out(self, files: Iterable[ArchiveFile | Unreadable]) -> None:
        """Bring the job to its end, or raise what stopped it; either way it can be resumed.

        Raises JobHeld, BudgetReached, LocalError, QueueUnavailable, DatabaseUnavailable,
        KeyboardInterrupt.
        """
        secrets_taken = take_secrets()
        self._api_secrets = {k: v for k, v in secrets_taken.items() if "API_KEY" in k}
        ledger.resume_job(self.engine, self.job_id)
        self._take_back()
        # What failed by a passing fault (a disk away, a file locked) is worth another night.
        ledger.retry_job(self.engine, self.job_id)
        planning = threading.Thread(target=self._plan, args=(files,), name="planning")
        with terminated_as_interrupted(), ProgressDisplay() as display:
            try:
                planning.start()
                with ExitStack() as stack:
                    self._watch(display, planning, stack)
            finally:
                self._stop.set()
                planning.join()
                holders = ledger.lease_holders(self.engine, self.job_id)
                stopped = [name for name in holders if name.startswith(f"{self._worker_name}/")]
                ledger.recover(self.engine, self.job_id, stopped)
        if self._fault is not None:
            raise self._fault

    def _take_back(self) -> None:
        """Free what workers on this machine held when they were killed, this run's or an earlier
        one's, without waiting for their leases; a run that goes on elsewhere, or beside this one,
        keeps what it has."""
        dead = [
            name
            for name in ledger.lease_holders(self.engine, self.job_id)
            if name.startswith(f"{socket.gethostname()}:") and not _lives(name.rpartition("/")[2])
        ]
        ledger.expire_leases(self.engine, self.job_id, dead)
        ledger.recover(self.engine, self.job_id)

    def _plan(self, files: Iterable[ArchiveFile | Unreadable]) -> None:
        try:
            submitted = submit(
                self.engine,
                self.job_id,
                self.sampling,
                files,
                task_seconds=SchedulerSettings().task_seconds,
                processes=max(1, (os.cpu_count() or 1) // 2),
                stop=self._stop,
            )
            self.video_ids.update(one.video_id for one in submitted)
            if not self._stop.is_set():
                with_retries(lambda: ledger.finish_planning(self.engine, self.job_id))
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            self._fault = error

    def _watch(
        self, display: ProgressDisplay, planning: threading.Thread, stack: ExitStack
    ) -> None:
        farm: LocalFarm | None = None
        while self._fault is None:
            planned, start = not planning.is_alive(), time.monotonic()
            status = with_retries(lambda: ledger.status(self.engine, self.job_id))
            asked_s = time.monotonic() - start
            if status.held is not None and status.job.pause_kind != BY_HAND:
                if status.job.pause_kind != ledger.BUDGET_SPENT:
                    raise JobHeld(f"{status.held}; the same command resumes")
                # What is paid for is finished and kept.
                if not status.tasks_by_state[TaskState.LEASED]:
                    raise BudgetReached(f"stopped: {status.held}; the same command goes on")
            if farm is None and status.open_tasks:
                farm = stack.enter_context(self._farm(stack))
            if farm is not None and (again := farm.check()):
                for name in again:
                    display.say(f"the {name} process ended and was started again")
                # What it had taken, from the ledger or from the queue, no timeout need find.
                with_retries(self._take_back)
            self._tell_of_the_api(display, status)
            if farm is None and planned:
                # Nothing to do for workers: what is left is closed here.
                with_retries(lambda: ledger.close_finished(self.engine, self.job_id))
                status = with_retries(lambda: ledger.status(self.engine, self.job_id))
            display.show(
                Snapshot(
                    status.closed_videos,
                    status.videos,
                    status.closed_tasks,
                    status.tasks,
                    status.samples,
                    status.covered_us,
                    status.duration_us,
                    not planned,
                )
            )
            if planned and status.finished:
                return
            self._stop.wait(max(POLL_S, POLL_SHARE * asked_s))

    def _tell_of_the_api(self, display: ProgressDisplay, status: ledger.JobStatus) -> None:
        """Say once that the API is away, and once that it is back."""
        done = status.tasks_by_state[TaskState.DONE]
        if API_OUTAGE in status.waiting:
            if self._done_while_away is None:
                why = with_retries(lambda: ledger.why_waiting(self.engine, self.job_id, API_OUTAGE))
                if why is None:
                    return
                display.say(f"the API is away, and the run waits for it: {why}")
            self._done_while_away = done
        elif self._done_while_away is not None and done > self._done_while_away:
            self._done_while_away = None
            display.say("the API answers again")

    def _farm(self, stack: ExitStack) -> LocalFarm:
        if self.broker_url is not None:
            check_broker(make_app(QueueSettings(broker_url=SecretStr(self.broker_url))))
            stack.callback(remove_queue, self.broker_url, self._worker_name)
        return LocalFarm(
            database_url=self.database_url,
            job_id=self.job_id,
            workers=self.workers,
            engine=self.api_engine,
            api_url=self.api_url,
            broker_url=self.broker_url,
            worker_name=self._worker_name,
            api_secrets=self._api_secrets,
            max_rps=self.max_rps,
        )


def _lives(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, PermissionError):
        pass
    return True
