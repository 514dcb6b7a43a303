"""Services: `nightreel serve-api` and `nightreel scheduler`."""

from __future__ import annotations

import importlib.util
import os
import sys

import click

from storage.exits import ExitCode


@click.command(
    "serve-api",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    add_help_option=False,
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve_api(arguments: tuple[str, ...]) -> None:
    """Serve the CLIP HTTP API from this machine until SIGTERM or Ctrl-C."""
    if importlib.util.find_spec("fastapi") is None:
        click.echo("nightreel: the API at home needs: pip install 'nightreel[local]'", err=True)
        raise click.exceptions.Exit(ExitCode.API)
    # The server stands alone (`python -m clipserver`); it takes over this process, signals and all.
    os.execv(sys.executable, [sys.executable, "-m", "clipserver", *arguments])  # noqa: S606


@click.command()
def scheduler() -> None:
    """Feed submitted jobs to the workers until SIGTERM or Ctrl-C.

    Also gives out again what was lost, closes what is finished and sends what `--notify` asked for.
    Several may run: one leads, the others wait. Settings come from the environment
    (docs/settings.md); the workers are `celery -A workers.app worker`.
    """
    # It takes over this process, signals and all.
    os.execv(sys.executable, [sys.executable, "-P", "-m", "scheduler"])  # noqa: S606
