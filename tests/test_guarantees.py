"""What the documents promise is tested, and what they tell an operator to look for exists."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
import yaml

from nightreel.cli import cli

ROOT = Path(__file__).parents[1]
GUARANTEES = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
SERVICES = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
PACKAGES = ("nightreel", "scheduler", "workers", "storage", "deploy")


def test_every_promise_names_a_test_that_exists() -> None:
    """A promise whose test was renamed or deleted fails here, and so does one without a test."""
    sources = [path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_*.py")]
    known = {name for source in sources for name in re.findall(r"^def (test_\w+)", source, re.M)}
    assert set(re.findall(r"`(test_\w+)`", GUARANTEES)) <= known
    promises = GUARANTEES.split("## What it costs")[0]
    for row in re.findall(r"^\| (?!Promise|Part)(.*) \|$", promises, re.MULTILINE):
        assert re.search(r"`test_\w+`", row), row


def said() -> str:
    """All that the program can say: its sources, with strings of several lines put together."""
    texts = [
        path.read_text(encoding="utf-8")
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".yml")
    ]
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(texts))


def symptoms() -> list[str]:
    """The first column of the table of symptoms."""
    table = OPERATIONS.split("| Symptom |")[1].split("\n\n")[0]
    return [row.split(" | ")[0].strip("| ") for row in table.splitlines()[2:]]


@pytest.mark.parametrize("symptom", symptoms())
def test_every_symptom_is_what_the_program_says(symptom: str) -> None:
    """Log lines, metrics and words of the card, with numbers and names left out."""
    source = said()
    quoted = re.findall(r"`([^`]+)`", symptom)
    assert quoted
    for text in quoted:
        for part in re.split(r"\.\.\.|\b\d+\b(?: s)?|[{}\"=():;]", text):
            words = part.strip(" ,")
            assert len(words) < 4 or words in source, words


def commands() -> list[str]:
    """Each command line of the fenced blocks of the operator's page, once."""
    blocks = re.findall(r"```sh\n(.*?)```", OPERATIONS, re.DOTALL)
    return sorted({line for block in blocks for line in block.splitlines() if line})


@pytest.mark.parametrize("line", commands())
def test_every_command_of_the_operators_page_exists(line: str) -> None:
    """Subcommands and options are those of the program, services those of the compose file."""
    subprocess.run(["/bin/bash", "-n", "-c", line], check=True)
    words = shlex.split(line)
    if words[:2] == ["docker", "compose"]:
        services = [word.partition("=")[0] for word in words[3:] if not word.startswith("-")]
        assert set(services) <= set(SERVICES)
        return
    program, *arguments = words
    assert program == "nightreel"
    command: click.Command | None = cli
    while isinstance(command, click.Group):
        name, *arguments = arguments
        command = command.get_command(click.Context(command), name)
    assert command is not None, name
    command.make_parser(click.Context(command)).parse_args(list(arguments))


@pytest.mark.parametrize("line", re.findall(r"`(nightreel [^`]+)`", OPERATIONS + GUARANTEES))
def test_commands_in_the_text_exist(line: str) -> None:
    """A command that a sentence names is one of the program, with these options."""
    _, name, *arguments = shlex.split(line)
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    if isinstance(command, click.Group):
        assert arguments[0] in command.commands
    else:
        command.make_parser(click.Context(command)).parse_args(arguments)


@pytest.mark.parametrize("document", [GUARANTEES, OPERATIONS], ids=["guarantees", "operations"])
def test_settings_and_metrics_that_are_named_exist(document: str) -> None:
    """Each NIGHTREEL_ variable stands in the table of settings, each metric in that of metrics."""
    settings = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    metrics = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    for name in set(re.findall(r"\bNIGHTREEL_[A-Z_]+\b", document)):
        assert name in settings, name
    for name in set(re.findall(r"\bnightreel_[a-z_]+\b", document)):
        assert name in metrics, name


@pytest.mark.parametrize("document", [GUARANTEES, OPERATIONS], ids=["guarantees", "operations"])
def test_links_lead_to_headings_that_exist(document: str) -> None:
    """A link to a part of a page names one of its headings."""
    for page, anchor in re.findall(r"\]\(([\w.]*)#([\w-]+)\)", document):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8") if page else document
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
