"""The hard stop: how many API calls a job may still make, counted where every worker looks.

Calls are taken from the budget before they are made, so that several workers together never make
more than were given, whatever becomes of one of them: what a killed worker had taken counts as
spent. Each setting of a budget is an allowance of its own, and what is returned of an earlier one
is no longer wanted.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, Engine, select, update

from storage.database import reading, writing
from storage.dialect import insert
from storage.schema import budgets

BUDGET_SPENT = "budget-spent"
"""Kind of pause of a job that has spent its budget."""


class BudgetSpent(Exception):
    """The job may make no more calls until it is given another budget."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """Calls that were taken from a budget to be made."""

    allowance: int
    calls: int


def set_budget(engine: Engine, job_id: int, max_calls: int | None) -> None:
    """Let the job make `max_calls` more API calls from now on; None lets it make any number."""
    with writing(engine) as connection:
        set_budget_in(connection, job_id, max_calls)


def set_budget_in(connection: Connection, job_id: int, max_calls: int | None) -> None:
    """`set_budget` within a transaction."""
    given = {"max_calls": max_calls, "calls_left": max_calls}
    connection.execute(
        insert(connection, budgets)
        .values(job_id=job_id, allowance=1, **given)
        .on_conflict_do_update(
            index_elements=["job_id"], set_={**given, "allowance": budgets.c.allowance + 1}
        )
    )


def set_budget_anew(connection: Connection, job_id: int, max_calls: int) -> bool:
    """Within a transaction: set the budget unless it is the one that was set last, so that a
    command that is repeated because its answer was lost gives no second one. Whether it was set."""
    known = connection.scalar(select(budgets.c.max_calls).where(budgets.c.job_id == job_id))
    if known != max_calls:
        set_budget_in(connection, job_id, max_calls)
    return known != max_calls


def reserve_calls(engine: Engine, job_id: int, calls: int) -> Reservation | None:
    """Take `calls` from the job's budget, all or none; None where the job has no budget.

    Raises BudgetSpent where fewer are left.
    """
    of_job = budgets.c.job_id == job_id
    with reading(engine) as connection:
        if connection.scalar(select(budgets.c.max_calls).where(of_job)) is None:
            return None
    with writing(engine) as connection:
        allowance = connection.scalar(
            update(budgets)
            .where(of_job, budgets.c.calls_left >= calls)
            .values(calls_left=budgets.c.calls_left - calls)
            .returning(budgets.c.allowance)
        )
        if allowance is not None:
            return Reservation(allowance, calls)
        row = connection.execute(
            select(budgets.c.max_calls, budgets.c.calls_left).where(of_job)
        ).one()
    if row.max_calls is None:
        return None
    raise BudgetSpent(
        f"the budget of {row.max_calls} calls has {row.calls_left} left, and what comes next "
        f"needs {calls}"
    )


def return_calls(engine: Engine, job_id: int, reservation: Reservation, calls: int) -> None:
    """Give back `calls` of a reservation that were not made."""
    with writing(engine) as connection:
        connection.execute(
            update(budgets)
            .where(budgets.c.job_id == job_id, budgets.c.allowance == reservation.allowance)
            .values(calls_left=budgets.c.calls_left + calls)
        )


def calls_left(engine: Engine, job_id: int) -> int | None:
    """Calls of the job's budget that nobody has taken; None where it has no budget."""
    with reading(engine) as connection:
        return connection.scalar(select(budgets.c.calls_left).where(budgets.c.job_id == job_id))
