"""What the documents promise is tested, and what they tell an operator to look for exists."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest

from compose_file import SERVICES  # placeholder
