"""The archive's own files: no command writes over them, and none draws old labels on new ones."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner
from clips import make_clip
from embedded import directions, done
from rows import ranges, spec
from sqlalchemy import text

from nightreel.cli import cli
from storage import database, ledger
from storage.records import ArchiveFile
from workers.footage.probe import probe
from workers.probing import content_id

SECONDS = 8


@dataclass(frozen=True)
class Filed:
    """A clip that a job of this database has analysed."""

    clip: Path
    url: str

    def asked(self, *words: str) -> tuple[int, str]:
        """Exit code and talk of a command."""
        ended = CliRunner().invoke(cli, [*words, "--db", self.url])
        return ended.exit_code, ended.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of eight seconds, ten frames each."""
    return make_clip(tmp_path_factory.mktemp("made") / "clip.mp4", [("red", 4), ("blue", 4)])


@pytest.fixture
def filed(sqlite_url: str, made: Path, tmp_path: Path) -> Filed:
    """The clip in an archive, analysed."""
    clip = tmp_path / "archive" / "clip.mp4"
    clip.parent.mkdir()
    shutil.copyfile(made, clip)
    engine = database.connect(sqlite_url)
    job = ledger.open_job(engine, spec())
    seen = clip.stat()
    file = ArchiveFile(str(clip), seen.st_size, seen.st_mtime_ns)
    video = ledger.register_file(engine, file, content_id(str(clip)))
    info, _ = probe(str(clip))
    ledger.plan_video(engine, job.id, video, info, ranges(SECONDS))
    ledger.finish_planning(engine, job.id)
    done(engine, job.id, directions(3, 2))
    engine.dispose()
    return Filed(clip, sqlite_url)


@pytest.mark.parametrize("link", [os.link, os.symlink])
@pytest.mark.parametrize(
    ("words", "ending"),
    [
        (("annotate", "clip.mp4", "-o"), ".mp4"),
        (("sheet", "clip.mp4", "-o"), ".jpg"),
        (("export", "table", "scenes", "-o"), ".csv"),
        (("export", "timeline", "clip.mp4", "-o"), ".vtt"),
        (("totals", "--plot"), ".svg"),
    ],
)
def test_no_output_takes_the_place_of_an_original(
    filed: Filed, tmp_path: Path, words: tuple[str, ...], ending: str, link: object
) -> None:
    """A video of the archive is refused as output under whatever name, and stays as it is."""
    name = tmp_path / f"other{ending}"
    link(filed.clip, name)  # type: ignore[operator]
    before = filed.clip.read_bytes()
    code, said = filed.asked(*words, str(name))
    assert (code, "it is a video of the archive" in said) == (2, True), said
    assert filed.clip.read_bytes() == before
    assert name.samefile(filed.clip)


def test_no_output_takes_the_place_of_the_database_or_of_its_own_name(filed: Filed) -> None:
    """The path as the job has it, by an ending of one's choice; and the database."""
    before = filed.clip.read_bytes()
    for words in (
        ("annotate", "clip.mp4"),
        ("export", "table", "scenes", "--as", "csv"),
        ("export", "timeline", "clip.mp4", "--as", "vtt"),
    ):
        code, said = filed.asked(*words, "-o", str(filed.clip))
        assert (code, filed.clip.read_bytes() == before) == (2, True), said
    url = filed.url.removeprefix("sqlite:///")
    for beside in ("", "-wal", "-shm", "-journal"):
        code, said = filed.asked("export", "table", "scenes", "--as", "csv", "-o", url + beside)
        assert (code, "it is the database" in said) == (2, True), said
    assert not Path(f"{url}-journal").exists()
    assert filed.asked("summary")[0] == 0


def test_any_other_file_may_be_written_again(filed: Filed, tmp_path: Path) -> None:
    """What a command wrote, it writes again."""
    for _ in range(2):
        assert filed.asked("export", "table", "scenes", "-o", str(tmp_path / "s.csv"))[0] == 0


def test_a_link_leads_to_the_annotated_video(filed: Filed, tmp_path: Path) -> None:
    """An earlier video is replaced where it lies, and a link to it stays one."""
    real, link = tmp_path / "real.mp4", tmp_path / "link.mp4"
    real.write_text("earlier")
    link.symlink_to(real)
    code, said = filed.asked("annotate", "clip.mp4", "-o", str(link), "--range", "0-1s")
    assert code == 0, said
    assert link.is_symlink()
    assert real.read_bytes()[4:8] == b"ftyp"


@pytest.mark.parametrize("length", [255, 250])
def test_a_name_may_be_as_long_as_the_file_system_takes(
    filed: Filed, tmp_path: Path, length: int
) -> None:
    """What is not finished lies under a name that is no longer."""
    for words, ending in (
        (("annotate", "clip.mp4", "--range", "0-1s", "-o"), ".mp4"),
        (("export", "table", "scenes", "-o"), ".csv"),
        (("export", "table", "scenes", "--as", "csv", "-o"), f".{'d' * 200}"),
    ):
        out = tmp_path / f"{'n' * (length - len(ending))}{ending}"
        code, said = filed.asked(*words, str(out))
        assert (code, out.is_file()) == (0, True), said


def test_a_name_that_the_font_lacks_is_told(filed: Filed, tmp_path: Path) -> None:
    """Boxes in a picture are explained in a line."""
    out = str(tmp_path / "out.jpg")
    code, said = filed.asked("sheet", "clip.mp4", "-o", out)
    assert (code, "the font lacks" in said) == (0, False), said
    engine = database.connect(filed.url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE jobs SET name = '施工'"))
    engine.dispose()
    code, said = filed.asked("sheet", "clip.mp4", "-o", out)
    assert (code, "note: the font lacks 施 工: boxes" in said) == (0, True), said


def test_labels_are_drawn_only_on_what_they_are_of(filed: Filed, tmp_path: Path) -> None:
    """A file of the same bytes serves, whatever its time; any other is refused, and one that is
    gone is told."""
    out = tmp_path / "out.jpg"
    words = ("sheet", "clip.mp4", "-o", str(out))
    assert filed.asked(*words)[0] == 0
    os.utime(filed.clip, (1, 1))
    assert filed.asked(*words)[0] == 0
    out.unlink()
    same_size = bytearray(filed.clip.read_bytes())
    same_size[-1] ^= 1
    for other in (bytes(same_size), filed.clip.read_bytes() + b"more"):
        filed.clip.write_bytes(other)
        for command in (words, ("annotate", "clip.mp4", "-o", str(tmp_path / "out.mp4"))):
            code, said = filed.asked(*command)
            assert (code, "the file changed since it was planned" in said) == (2, True), said
    filed.clip.unlink()
    code, said = filed.asked(*words)
    assert (code, "the file is gone" in said) == (2, True), said
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--range", "0:00:01.01-0:00:01.05"), "no frame begins between 1.010 and 1.050 s"),
        (("--scale", "0.001"), "2 x 2 pixels have no room"),
    ],
)
def test_a_video_without_frames_or_room_is_a_mistake(
    filed: Filed, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    """Nothing drawn is never a success, and says why."""
    code, err = filed.asked("annotate", "clip.mp4", "-o", str(tmp_path / "out.mp4"), *options)
    assert (code, said in err) == (2, True), err
    assert not list(tmp_path.glob("*out*"))


def test_a_terminated_command_leaves_nothing(filed: Filed, tmp_path: Path) -> None:
    """SIGTERM ends the drawing as Ctrl-C does: with 130, without the half file, and without the
    promise that anything is kept."""
    folder = tmp_path / "out"
    folder.mkdir()
    process = subprocess.Popen(
        [
            *(Path(sys.executable).with_name("nightreel"), "annotate", "clip.mp4"),
            *("-o", folder / "big.mp4", "--scale", "4", "--db", filed.url),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(folder.iterdir()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.endswith("interrupted; the same command begins anew\n")
    assert not list(folder.iterdir())
