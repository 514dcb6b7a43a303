"""The purse of one task: calls taken from its job's budget before they are made."""

from __future__ import annotations

import threading

from sqlalchemy import Engine

from storage import ledger
from storage.database import outlasting


class Budget:
    """What a task may still call of what it has taken. Threads share it.

    A job without a budget is asked about once. What is taken twice by a repeated transaction, or by
    a worker that dies, counts as spent: the budget is never exceeded.
    """

    def __init__(self, engine: Engine, job_id: int) -> None:
        self._engine = engine
        self._job_id = job_id
        self._lock = threading.Lock()
        self._unlimited = False
        self._left = 0
        self._from: ledger.Reservation | None = None

    def reserve(self, calls: int) -> None:
        """Take `calls` at once, so that a range begins only if it can be paid to its end. Raises
        `ledger.BudgetSpent`."""
        with self._lock:
            self._reserve(calls)

    def take(self) -> None:
        """Use one call, of those reserved if any are left. Raises `ledger.BudgetSpent`."""
        with self._lock:
            if self._left == 0:
                self._reserve(1)
            self._left -= not self._unlimited

    def refund(self) -> None:
        """Take back the use of a call."""
        with self._lock:
            self._left += not self._unlimited

    def close(self) -> None:
        """Return what is left to the job."""
        with self._lock:
            left, self._left, reservation = self._left, 0, self._from
        if left > 0 and reservation is not None:
            outlasting(lambda: ledger.return_calls(self._engine, self._job_id, reservation, left))

    def _reserve(self, calls: int) -> None:
        if self._unlimited or calls == 0:
            return
        got = outlasting(lambda: ledger.reserve_calls(self._engine, self._job_id, calls))
        if got is None:
            self._unlimited = True
            return
        if self._from is not None and self._from.allowance != got.allowance:
            self._left = 0  # of a budget that has been replaced
        self._from = got
        self._left += calls
