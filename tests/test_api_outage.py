"""What a person is told while the API is away."""

from __future__ import annotations

from rows import claimed, planned, spec
from sqlalchemy import Engine

from storage import ledger
from workers.refusals import API_OUTAGE


def test_the_reason_of_a_wait_is_that_of_this_run(engine: Engine) -> None:
    """It is what the API said of a task that waits for it; what it said before the same command was
    given again is old news."""
    job_id = planned(engine, 8).job_id
    assert ledger.why_waiting(engine, job_id, API_OUTAGE) is None
    first = ledger.feed(engine, 2, job_id)[0]
    claim = claimed(engine, first)
    ledger.release(engine, first, claim.fence, 30, API_OUTAGE, "the API answers 503: no")
    assert ledger.why_waiting(engine, job_id, API_OUTAGE) == "the API answers 503: no"
    assert ledger.why_waiting(engine, job_id, "another") is None
    assert ledger.why_waiting(engine, job_id + 1, API_OUTAGE) is None

    job_id = planned(engine, 4, key="other").job_id
    (old,) = ledger.feed(engine, 1, job_id)
    ledger.release(engine, old, claimed(engine, old).fence, 0, API_OUTAGE, "the API answers 502")
    ledger.open_job(engine, spec("other"), files=())
    assert API_OUTAGE in ledger.status(engine, job_id).waiting
    assert ledger.why_waiting(engine, job_id, API_OUTAGE) is None
