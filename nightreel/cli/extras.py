"""Packages that only some commands need."""

from __future__ import annotations

import importlib.util

import click


def needs(package: str) -> None:
    """Raise UsageError, with the remedy, where the package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise click.UsageError(f"this needs {package}: pip install 'nightreel[reports]'.")
