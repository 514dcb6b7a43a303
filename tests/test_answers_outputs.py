"""What answers are written into: pipes, devices, full disks, and files that are there already."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from clips import make_clip
from embedded import directions, done
from rows import planned, ranges, spec
from sqlalchemy import Engine, update

from nightreel.cli import cli
from storage import database, ledger
from storage.database import writing
from storage.records import ArchiveFile
from storage.schema import labels
from storage.whole_files import whole
from workers.footage.probe import probe
from workers.probing import content_id

NIGHTREEL = str(Path(sys.executable).with_name("nightreel"))
TABLE = ("export", "table", "predictions", "--as", "csv")
TIMELINE = ("export", "timeline", "v0.mp4", "--as", "otio")


@pytest.fixture
def filled(sqlite_url: str) -> str:
    """The URL of a database with a job that is done, and has seen all of its videos."""
    engine = database.connect(sqlite_url)
    done(engine, planned(engine, 5, 4).job_id, directions(3, 2))
    engine.dispose()
    return sqlite_url


def run(url: str, *words: str) -> tuple[int, str]:
    ended = CliRunner().invoke(cli, [*words, "--db", url])
    return ended.exit_code, ended.stderr


# Standard output


@pytest.mark.parametrize("words", [TABLE, TIMELINE])
def test_a_reader_that_has_seen_enough_is_no_fault(filled: str, words: tuple[str, ...]) -> None:
    """`| head` ends the command early and well, without a word."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "wb") as out:
        ended = subprocess.run(
            [NIGHTREEL, *words, "--db", filled],
            stdout=out, stderr=subprocess.PIPE, text=True, check=False, timeout=60,
        )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("words", [TABLE, TIMELINE])
def test_a_full_disk_is_one_line(filled: str, words: tuple[str, ...]) -> None:
    """What does not take the rows is named, not a fault of the program."""
    with open("/dev/full", "wb") as out:
        ended = subprocess.run(
            [NIGHTREEL, *words, "--db", filled],
            stdout=out, stderr=subprocess.PIPE, text=True, check=False, timeout=60,
        )  # fmt: skip
    assert ended.returncode == 1
    assert ended.stderr == "nightreel: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_standard_output_cannot_hold_are_escaped(
    filled: str, encoding: str
) -> None:
    """A terminal or a pipe of another time gets every row; JSON says the same as ever, and a
    person's choice of what stands for such characters is kept."""
    name = "été \N{SNOWMAN} 雪 🎬"  # the last has two escapes in JSON, and one in Python
    engine = database.connect(filled)
    with writing(engine) as connection:
        connection.execute(update(labels).values(name=name))
    engine.dispose()

    def printed(form: str, out: str) -> bytes:
        ended = subprocess.run(
            [NIGHTREEL, "scenes", "v0.mp4", "--format", form, "--db", filled],
            env=os.environ | {"PYTHONIOENCODING": out},
            capture_output=True, check=False, timeout=60,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    rows = json.loads(printed("json", encoding).decode(encoding))
    assert rows == json.loads(printed("json", "utf-8"))
    assert name in {row["label"] for row in rows}
    for form in ("table", "csv"):
        assert b"\\u2603 \\u96ea \\ud83c\\udfac" in printed(form, encoding)
    assert b" ? ? ?" in printed("csv", f"{encoding}:replace")


# Named outputs


@pytest.mark.parametrize(
    ("words", "ending", "begins"),
    [
        (("export", "table", "scenes"), ".csv", b"job_id,"),
        (("export", "table", "scenes"), ".parquet", b"PAR1"),
        (("export", "timeline", "v0.mp4"), ".vtt", b"WEBVTT"),
        (("totals",), ".png", b"\x89PNG"),
    ],
)
def test_a_pipe_gets_what_a_file_would(
    filled: str, tmp_path: Path, words: tuple[str, ...], ending: str, begins: bytes
) -> None:
    """A pipe is written into and stays a pipe, and its reader has all that a file would hold."""
    option = "--plot" if words == ("totals",) else "-o"
    plain, pipe = tmp_path / f"plain{ending}", tmp_path / f"pipe{ending}"
    assert run(filled, *words, option, str(plain))[0] == 0
    os.mkfifo(pipe)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    code, said = run(filled, *words, option, str(pipe))
    assert code == 0, said
    assert pipe.is_fifo()
    reader.join(60)
    assert got == [plain.read_bytes()]
    assert got[0].startswith(begins)


def test_a_device_is_not_replaced(filled: str, tmp_path: Path) -> None:
    """What leads to a device still does, and nothing lies beside it."""
    null = tmp_path / "out" / "null.csv"
    null.parent.mkdir()
    null.symlink_to("/dev/null")
    assert run(filled, "export", "table", "scenes", "-o", str(null))[0] == 0
    assert (os.readlink(null), os.listdir(null.parent)) == ("/dev/null", ["null.csv"])


@pytest.mark.parametrize(
    ("words", "ending"),
    [
        (("export", "table", "scenes", "-o"), ".csv"),
        (("export", "timeline", "v0.mp4", "-o"), ".vtt"),
        (("totals", "--plot"), ".svg"),
    ],
)
def test_an_earlier_file_is_replaced_and_never_written_into(
    filled: str, tmp_path: Path, words: tuple[str, ...], ending: str
) -> None:
    """Whoever reads the earlier file reads all of it; a link leads to the new one."""
    real, link, kept = (tmp_path / f"{name}{ending}" for name in ("real", "link", "kept"))
    real.write_text("earlier")
    os.link(real, kept)
    link.symlink_to(real)
    assert run(filled, *words, str(link))[0] == 0
    assert kept.read_text() == "earlier"
    assert link.is_symlink()
    assert len(real.read_text()) > 20
    assert not list(tmp_path.glob("*part*"))


def test_a_contact_sheet_appears_whole(sqlite_url: str, tmp_path: Path) -> None:
    """It replaces an earlier one as tables do."""
    clip = make_clip(tmp_path / "clip.mp4", [("red", 4)])
    engine = database.connect(sqlite_url)
    job, seen = ledger.open_job(engine, spec()), clip.stat()
    archived = ArchiveFile(str(clip), seen.st_size, seen.st_mtime_ns)
    video = ledger.register_file(engine, archived, content_id(str(clip)))
    ledger.plan_video(engine, job.id, video, probe(str(clip))[0], ranges(4))
    ledger.finish_planning(engine, job.id)
    done(engine, job.id, directions(3, 2))
    engine.dispose()
    sheet, kept = tmp_path / "sheet.png", tmp_path / "kept.png"
    sheet.write_text("earlier")
    os.link(sheet, kept)
    code, said = run(sqlite_url, "sheet", "clip.mp4", "-o", str(sheet))
    assert code == 0, said
    assert sheet.read_bytes().startswith(b"\x89PNG")
    assert kept.read_text() == "earlier"


def test_what_fails_halfway_leaves_the_earlier_file(tmp_path: Path) -> None:
    """An error, or Ctrl-C, while a file is written leaves what was there and nothing beside it."""
    file = tmp_path / "rows.csv"
    file.write_text("earlier")

    def interrupted() -> None:
        with whole(file) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (file.read_text(), os.listdir(tmp_path)) == ("earlier", ["rows.csv"])


def test_letters_that_the_font_lacks_are_told_in_one_line(engine: Engine, tmp_path: Path) -> None:
    """A PNG has boxes for them, and says so; an SVG keeps the text."""
    done(engine, planned(engine, 4).job_id, directions(3, 2))
    with writing(engine) as connection:
        connection.execute(update(labels).values(name="雪山 \N{SNOWMAN} snow"))
    url = database.absolute_url(engine)
    code, said = run(url, "totals", "--plot", str(tmp_path / "shares.png"))
    assert code == 0
    assert said == "note: the font has no 山雪: boxes stand for them; an .svg keeps the text\n"
    assert run(url, "totals", "--plot", str(tmp_path / "shares.svg")) == (0, "")
    assert "雪山" in (tmp_path / "shares.svg").read_text()
