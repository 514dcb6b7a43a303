"""The command line. Each group of commands has a module of its own, loaded when it is used."""

from __future__ import annotations

import codecs
import importlib
import io
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from nightreel.cli.output import ReaderGone, say, take_standard_streams
from storage.exits import MEANINGS, ExitCode

_ESCAPED = "nightreel.escaped"

COMMANDS = {
    "run": "run:run",
    "plan": "plan:plan",
    "submit": "submit:submit",
    "status": "status:status",
    "jobs": "jobs:jobs",
    "pause": "jobs:pause",
    "resume": "jobs:resume",
    "cancel": "jobs:cancel",
    "retry": "jobs:retry",
    "failures": "failures:failures",
    "purge": "purge:purge",
    "summary": "answers:summary",
    "scenes": "answers:scenes",
    "coverage": "answers:coverage",
    "find": "occurrences:find",
    "flags": "occurrences:flags",
    "highlights": "occurrences:highlights",
    "totals": "totals:totals",
    "search": "search:search",
    "relabel": "relabel:relabel",
    "export": "export:export",
    "annotate": "pictures:annotate",
    "sheet": "pictures:sheet",
    "doctor": "doctor:doctor",
    "db": "database:database",
    "scheduler": "services:scheduler",
    "serve-api": "services:serve_api",
}
"""Command to `module:object` of this package."""

SUMMARIES = {
    "run": "Classify videos on this machine and print a summary.",
    "plan": "Say what classifying videos would take: calls, bytes, time, cost.",
    "submit": "Record a job for the workers of a farm.",
    "status": "How a job stands: videos, tasks, speed, time left; --wait for its end.",
    "jobs": "One row a job, newest first.",
    "pause": "Start no more work of a job.",
    "resume": "Go on with a paused job.",
    "cancel": "Give up what of a job is not done.",
    "retry": "Another try for what has failed.",
    "failures": "What a job has given up, and why.",
    "purge": "Delete all that is known of a job or a video.",
    "summary": "One row a video: analysed time, scenes, top labels.",
    "scenes": "One row a scene: start, end, label, confidence.",
    "coverage": "What was analysed and what was not, and why.",
    "find": "Which videos show a label, from when on, for how long.",
    "flags": "What labels with a threshold have raised, worst first.",
    "highlights": "The best moments of a label, as a list of cuts.",
    "totals": "Shares of time over all videos, by month or day of recording.",
    "search": "The moments of the archive nearest to any text.",
    "relabel": "Other labels for a job, without sending a picture again.",
    "export": "Tables for other tools; scenes for editors and players.",
    "annotate": "A video with its labels drawn on every frame.",
    "sheet": "A contact sheet of a video's scenes.",
    "doctor": "Check queue, database, API, codecs: one line a layer.",
    "db": "Create or upgrade the results database.",
    "scheduler": "Feed submitted jobs to the workers: a service.",
    "serve-api": "Serve the CLIP HTTP API from this machine.",
}

RESUMING = frozenset({"run", "submit", "relabel", "status"})
"""Commands that find again what they had done, or look on; others have kept nothing."""

EXIT_CODES = "\b\nExit codes:\n" + "\n".join(
    f"  {int(code):>3}  {meaning}" for code, meaning in MEANINGS.items()
)


class Commands(click.Group):
    """Loads a command's module when that command is used, and knows the others by their names."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(f"nightreel.cli.{module}"), name)
        return with_exit_codes(command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(SUMMARIES.items()))


def with_exit_codes(command: click.Command) -> click.Command:
    """Add the table of exit codes below a command's own closing words."""
    if EXIT_CODES not in (command.epilog or ""):
        command.epilog = f"{command.epilog}\n\n{EXIT_CODES}" if command.epilog else EXIT_CODES
    if isinstance(command, click.Group):
        for child in command.commands.values():
            with_exit_codes(child)
    return command


@click.group(cls=Commands, epilog=EXIT_CODES, context_settings={"max_content_width": 100})
@click.version_option(package_name="nightreel", message="nightreel %(version)s")
def cli() -> None:
    """Classify the scenes of a large video archive overnight; ask about them for years.

    \b
    nightreel run ~/Videos                         label the seasons of every video below
    nightreel run clips/ --label cricket --label "wicket celebration" --label crowd
    nightreel scenes match.mp4                     what was seen when
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; end the process with a code of `storage.exits`."""
    take_standard_streams()
    codecs.register_error(_ESCAPED, _escaped)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors=_ESCAPED)
    sys.exit(run_command(arguments))


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """Characters that standard output cannot hold, as JSON escapes them: only there are they part
    of data that is parsed by such a rule, and a person can read them anywhere."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def run_command(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Bad input is one line on standard error, never a
    traceback; `NIGHTREEL_DEBUG=1` shows the traceback of an unexpected fault."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result: Any = cli.main(list(words), prog_name="nightreel", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return ExitCode.USAGE if isinstance(error, click.UsageError) else error.exit_code
    except ReaderGone:  # of the help, say: commands go on, and have a code of their own
        return ExitCode.OK
    except (click.Abort, KeyboardInterrupt):
        say(f"interrupted; the same command {_goes_on(words)}")
        return ExitCode.INTERRUPTED
    except Exception as error:
        code = _code_of(error)
        if code is None and os.environ.get("NIGHTREEL_DEBUG"):
            raise
        say(f"nightreel: {_said(error) if code is not None else _unexpected(error, words)}")
        return ExitCode.UNEXPECTED if code is None else code
    return result if isinstance(result, int) else ExitCode.OK


def _said(error: Exception) -> str:
    """The error in one line; of a wrong setting, its variable and what is wrong with it."""
    wrong = getattr(error, "errors", None)
    if wrong is None:
        return str(error)
    found = wrong(include_url=False, include_input=False)
    return "; ".join(f"NIGHTREEL_{'_'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in found)


def _unexpected(error: Exception, words: Sequence[str]) -> str:
    said = " ".join(str(error).split())[:500]
    return (
        f"unexpected {type(error).__name__}: {said} (a fault of nightreel; "
        f"NIGHTREEL_DEBUG=1 shows where; the same command {_goes_on(words)})"
    )


def _goes_on(words: Sequence[str]) -> str:
    """What the command of this line does when it is given again."""
    # No option of the whole program takes a value, so the first plain word is the command.
    command = next((word for word in words if not word.startswith("-")), None)
    return "resumes" if command in RESUMING else "begins anew"


def _code_of(error: Exception) -> ExitCode | None:
    """The exit code of a layer's error, by its type alone; None for what nobody expected. Only
    modules that are loaded can have raised it, so none is loaded for the question."""
    by_type = (
        ("storage.database", "DatabaseError", ExitCode.DATABASE),
        ("storage.summaries", "NoSuchVideo", ExitCode.USAGE),
        ("storage.ledger", "NoSuchJob", ExitCode.USAGE),
        ("storage.ledger", "KeyTaken", ExitCode.USAGE),
        ("storage.occurrences", "NoSuchLabel", ExitCode.USAGE),
        ("storage.relabel", "CannotRelabel", ExitCode.USAGE),
        ("scheduler.archive", "ArchiveError", ExitCode.USAGE),
        ("scheduler.labels", "LabelsError", ExitCode.USAGE),
        ("scheduler.feeder", "QueueUnavailable", ExitCode.QUEUE),
        ("workers.api", "TextRefused", ExitCode.USAGE),
        ("workers.api", "ApiError", ExitCode.API),
        ("storage.settings", "SecretUnreadable", ExitCode.USAGE),
        ("pydantic_core", "ValidationError", ExitCode.USAGE),
    )
    for module, name, code in by_type:
        loaded = sys.modules.get(module)
        if loaded is not None and isinstance(error, getattr(loaded, name)):
            return code
    own = getattr(error, "code", None)
    return own if isinstance(own, ExitCode) else None
