"""Runs the migrations on the connection, and within the transaction, of `storage.database`."""

from __future__ import annotations

from alembic import context

from storage.schema import metadata

# SQLite's DDL is transactional as well, since our transactions begin explicitly.
context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
