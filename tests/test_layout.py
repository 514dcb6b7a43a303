"""The house's rules: what may load what, and what the wheel holds."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"nightreel", "scheduler", "workers", "storage", "clipserver"}


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after `statement`."""
    program = f"{statement}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "never"),
    [
        ("import scheduler.submit", {"cv2", "av", "requests", "onnxruntime"}),
        ("import scheduler.feeder", {"cv2", "av", "requests", "onnxruntime"}),
        ("import workers.app", {"cv2", "av", "requests", "sqlalchemy"}),
        ("import storage.records", {"sqlalchemy", "numpy", "pydantic"}),
        ("import nightreel.cli", {"sqlalchemy", "numpy", "rich", "celery", "requests"}),
        ("import clipserver", PACKAGES - {"clipserver"}),
        ("import workers.tasks", {"nightreel", "scheduler", "clipserver", "onnxruntime"}),
        # Whatever the parent has loaded counts in each process of the pool.
        ("import workers.startup, workers.tasks, workers.footage.probe", {"alembic", "cv2"}),
        ("import storage.database", {"alembic"}),
    ],
)
def test_a_module_loads_no_more_than_its_room_needs(statement: str, never: set[str]) -> None:
    """A scheduler needs no decoder, `--help` no database, plain values nothing at all."""
    assert not loaded_by(statement) & never


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this tree."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT],
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    """Migrations, data files and type markers included; tests and benchmarks not."""
    tracked = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    expected = {name for name in tracked if name.split("/")[0] in PACKAGES}
    expected = {name for name in expected if (ROOT / name).exists()}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected


def test_the_installed_wheel_works_away_from_its_source(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, from a neutral directory, without any extra: the command
    answers, the database is made, each package is the wheel's alone."""
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "-q", wheel],
        check=True,
        env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    neutral = tmp_path / "neutral"
    neutral.mkdir()

    def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("NIGHTREEL", "PYTHON"))}
        return subprocess.run(
            command, cwd=neutral, env=clean, capture_output=True, text=True, check=False
        )

    command = environment / "bin" / "nightreel"
    version = importlib.metadata.version("nightreel")
    assert run(command, "--version").stdout == f"nightreel {version}\n"
    upgraded = run(command, "db", "upgrade")
    assert upgraded.returncode == 0, upgraded.stderr
    assert (neutral / "nightreel.db").exists()
    without_engine = run(command, "run", neutral)
    assert without_engine.returncode == 12
    assert "nightreel[local]" in without_engine.stderr
    # Plain names may collide with other distributions: here they are ours alone.
    program = (
        "import importlib.metadata as m; d = m.packages_distributions(); "
        f"print(sorted({{o for p in {sorted(PACKAGES)!r} for o in d[p]}}))"
    )
    assert run(python, "-c", program).stdout == "['nightreel']\n"
