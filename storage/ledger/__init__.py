"""The ledger: what is to be done, by whom it is being done, and what became of it.

The queue carries hints; these rows are the truth. Each function is one transaction that may be
repeated, or a few of which each may; all raise `storage.database.DatabaseUnavailable` where the
database is away.
"""

from storage.ledger.budget import (
    BUDGET_SPENT,
    BudgetSpent,
    Reservation,
    calls_left,
    reserve_calls,
    return_calls,
    set_budget,
)
from storage.ledger.closing import ClosedVideo, close_finished
from storage.ledger.control import (
    cancel_job,
    expire_leases,
    lease_holders,
    pause_job,
    recover,
    resume_job,
    retry_job,
)
from storage.ledger.feeding import PRIORITIES, feed, feed_probes
from storage.ledger.job import (
    Job,
    JobState,
    KeyTaken,
    NoSuchJob,
    finish_planning,
    get_job,
    latest_job,
    open_job,
    reopen_planning,
)
from storage.ledger.job import all_jobs as jobs
from storage.ledger.leader import lead, step_down
from storage.ledger.leases import (
    INCOMPATIBLE,
    MAX_ATTEMPTS,
    WORKER_LOST,
    Claim,
    IncompatiblePlan,
    SweepCount,
    claim,
    give_back,
    heartbeat,
    release,
    sweep,
    unqueue,
)
from storage.ledger.planning import (
    content_id,
    forget_places,
    known_plan,
    known_video,
    places,
    plan_video,
    register_file,
    reject_unread,
    reject_video,
    video_in_job,
)
from storage.ledger.probes import (
    ProbeClaim,
    claim_probe,
    end_probe,
    finish_probed,
    plan_probed,
    reject_probed,
)
from storage.ledger.progress import JobStatus, status

__all__ = [
    "BUDGET_SPENT",
    "INCOMPATIBLE",
    "MAX_ATTEMPTS",
    "PRIORITIES",
    "WORKER_LOST",
    "BudgetSpent",
    "Claim",
    "ClosedVideo",
    "IncompatiblePlan",
    "Job",
    "JobState",
    "JobStatus",
    "KeyTaken",
    "NoSuchJob",
    "ProbeClaim",
    "Reservation",
    "SweepCount",
    "calls_left",
    "cancel_job",
    "claim",
    "claim_probe",
    "close_finished",
    "content_id",
    "end_probe",
    "expire_leases",
    "feed",
    "feed_probes",
    "finish_planning",
    "finish_probed",
    "forget_places",
    "get_job",
    "give_back",
    "heartbeat",
    "jobs",
    "known_plan",
    "known_video",
    "latest_job",
    "lead",
    "lease_holders",
    "open_job",
    "pause_job",
    "places",
    "plan_probed",
    "plan_video",
    "recover",
    "register_file",
    "reject_probed",
    "reject_unread",
    "reject_video",
    "release",
    "reopen_planning",
    "reserve_calls",
    "resume_job",
    "retry_job",
    "return_calls",
    "set_budget",
    "status",
    "step_down",
    "sweep",
    "unqueue",
    "video_in_job",
]
