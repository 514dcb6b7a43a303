"""`nightreel doctor`: one line a layer."""

from __future__ import annotations

import os

import click

from nightreel.cli.options import database_option
from nightreel.cli.output import to_standard_output
from storage.exits import ExitCode


@click.command()
@database_option
@click.option("--api", "api_url", envvar="NIGHTREEL_API_URL", metavar="URL", help="API to check.")
@click.argument("paths", nargs=-1, metavar="[PATH]...")
def doctor(database_url: str, api_url: str | None, paths: tuple[str, ...]) -> int:
    """Check queue, database, API, codecs and, if named, the archive: one line a layer.

    Nothing is changed and no call that costs is made. Ends with the code of the first layer that
    fails: 10 queue, 11 database, 12 API, 3 the rest.
    """
    from nightreel import doctor as layers

    first: ExitCode | None = None
    broker_url = os.environ.get("NIGHTREEL_BROKER_URL") or None
    for finding in layers.examine(broker_url, database_url, api_url, paths):
        mark = click.style("ok  ", fg="green") if finding.ok else click.style("FAIL", fg="red")
        with to_standard_output():
            click.echo(f"{mark}  {finding.layer:<9} {finding.said}")
        if not finding.ok and first is None:
            first = finding.code
    return first or ExitCode.OK
