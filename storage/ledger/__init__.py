"""The ledger: what is to be done, by whom it is being done, and what became of it.

The queue carries hints; these rows are the truth. Each function is one transaction that may be
repeated, or a few of which each may; all raise `storage.database.DatabaseUnavailable` where the
database is away.
"""

from storage.ledger.closing import ClosedVideo, close_finished
from storage.ledger.job import (
    Job,
    JobState,
    NoSuchJob,
    cancel_job,
    finish_planning,
    get_job,
    latest_job,
    open_job,
    pause_job,
    recover,
    reopen_planning,
    resume_job,
    retry_job,
)
from storage.ledger.job import all_jobs as jobs
from storage.ledger.leases import (
    MAX_ATTEMPTS,
    WORKER_LOST,
    Claim,
    IncompatiblePlan,
    SweepCount,
    claim,
    feed,
    give_back,
    heartbeat,
    release,
    sweep,
    unqueue,
)
from storage.ledger.planning import (
    known_video,
    plan_video,
    register_file,
    reject_video,
    video_in_job,
)
from storage.ledger.progress import JobStatus, status

__all__ = [
    "MAX_ATTEMPTS",
    "WORKER_LOST",
    "Claim",
    "ClosedVideo",
    "IncompatiblePlan",
    "Job",
    "JobState",
    "JobStatus",
    "NoSuchJob",
    "SweepCount",
    "cancel_job",
    "claim",
    "close_finished",
    "feed",
    "finish_planning",
    "get_job",
    "give_back",
    "heartbeat",
    "jobs",
    "known_video",
    "latest_job",
    "open_job",
    "pause_job",
    "plan_video",
    "recover",
    "register_file",
    "reject_video",
    "release",
    "reopen_planning",
    "resume_job",
    "retry_job",
    "status",
    "sweep",
    "unqueue",
    "video_in_job",
]
