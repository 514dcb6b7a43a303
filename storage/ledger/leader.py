"""Of several schedulers one leads; another takes over once its lease has run out.

The lead saves work, not correctness: feeding and sweeping are safe whoever does them.
"""

from __future__ import annotations

from sqlalchemy import Engine, delete, or_, select

from storage.database import reading, writing
from storage.dialect import Now, insert
from storage.ledger.leases import after
from storage.schema import leaders


def lead(engine: Engine, name: str, holder: str, lease_s: float) -> bool:
    """Take or keep the lead called `name` for `lease_s` seconds; False where another has it.

    Asked often, it writes seldom: a third of the lease before it runs out.
    """
    values = {"holder": holder, "until_ms": after(lease_s)}
    with reading(engine) as connection:
        held = connection.execute(
            select(leaders.c.holder, leaders.c.until_ms - Now() > round(lease_s * 1000 / 3)).where(
                leaders.c.name == name, leaders.c.until_ms > Now()
            )
        ).first()
    if held is not None and (held.holder != holder or held[1]):
        return bool(held.holder == holder)
    with writing(engine) as connection:
        taken = connection.execute(
            insert(connection, leaders)
            .values(name=name, **values)
            .on_conflict_do_update(
                index_elements=["name"],
                set_=values,
                where=or_(leaders.c.holder == holder, leaders.c.until_ms <= Now()),
            )
            .returning(leaders.c.holder)
        ).first()
    return taken is not None


def step_down(engine: Engine, name: str, holder: str) -> None:
    """Leave the lead to whoever asks next."""
    with writing(engine) as connection:
        connection.execute(
            delete(leaders).where(leaders.c.name == name, leaders.c.holder == holder)
        )
