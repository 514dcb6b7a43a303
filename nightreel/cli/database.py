"""`nightreel db`: the results database."""

from __future__ import annotations

import click

from nightreel.cli.options import database_option
from nightreel.cli.output import say


@click.group("db")
def database() -> None:
    """Create or upgrade the results database."""


@database.command()
@database_option
def upgrade(database_url: str) -> None:
    """Bring the schema to this release, creating it where there is none."""
    from storage import database as stored

    applied = stored.upgrade(stored.connect(database_url))
    for revision in applied:
        say(f"database: schema {revision} applied")
    if not applied:
        say("database: the schema is current")
