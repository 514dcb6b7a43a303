"""What a person names becomes the files of an archive, each once."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from scheduler.archive import ArchiveError, Unreadable, find
from storage.records import ArchiveFile
from workers.probing import content_id


def tree(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def found(names: list[str], **how: object) -> list[str]:
    return [os.path.basename(file.path) for file in find(names, **how)]  # type: ignore[arg-type]


def test_a_folder_gives_its_videos_in_order(tmp_path: Path) -> None:
    """Files with a video's ending are taken, below too, in order; the rest is passed over."""
    tree(tmp_path, "b.MP4", "a.mkv", "notes.txt", "sub/c.webm", ".hidden.mp4", ".git/d.mp4")
    assert found([str(tmp_path)]) == ["a.mkv", "b.MP4", "c.webm"]
    assert found([str(tmp_path)], recursive=False) == ["a.mkv", "b.MP4"]


def test_a_file_is_taken_whatever_its_ending_and_only_once(tmp_path: Path) -> None:
    """A file named itself needs no ending, and is yielded once though it is named thrice."""
    tree(tmp_path, "clip", "a.mp4")
    names = [str(tmp_path / "clip"), str(tmp_path), str(tmp_path / "a.mp4")]
    assert found(names) == ["clip", "a.mp4"]


def test_a_quoted_glob_is_expanded(tmp_path: Path) -> None:
    """A glob that the shell has not expanded finds its files."""
    tree(tmp_path, "x1.mp4", "x2.mp4", "y.mp4", "deep/er/x3.mp4")
    assert found([f"{tmp_path}/x*.mp4"]) == ["x1.mp4", "x2.mp4"]
    assert found([f"{tmp_path}/**/x*.mp4"]) == ["x3.mp4", "x1.mp4", "x2.mp4"]


def test_a_name_with_wildcards_that_exists_is_that_file(tmp_path: Path) -> None:
    """Brackets in a file's own name are no glob."""
    tree(tmp_path, "take [1].mp4", "take 1.mp4")
    assert found([str(tmp_path / "take [1].mp4")]) == ["take [1].mp4"]


@pytest.mark.parametrize("separator", [b"\n", b"\r\n", b"\0"])
def test_a_manifest_lists_paths_of_any_bytes(tmp_path: Path, separator: bytes) -> None:
    """Spaces, unicode and bytes that are not UTF-8 survive a manifest; its paths are relative to
    it, and a missing file is reported, not fatal."""
    odd = [b"with space.mp4", "zażółć.mp4".encode(), b"latin\xe9.mp4"]
    for name in odd:
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(b"x")
    (tmp_path / "list").write_bytes(separator.join([*odd, b"gone.mp4", b""]))
    files = list(find([f"@{tmp_path}/list"]))
    assert [os.path.basename(f.path_raw) for f in files if isinstance(f, ArchiveFile)] == odd
    (gone,) = [f for f in files if isinstance(f, Unreadable)]
    assert gone.path.endswith("gone.mp4")
    assert "No such file" in gone.reason


def test_standard_input_is_a_manifest(tmp_path: Path) -> None:
    """`-` reads the list of files from standard input."""
    tree(tmp_path, "a.mp4")
    lines = [os.fsencode(tmp_path / "a.mp4") + b"\n"]
    assert [f.path for f in find(["-"], stdin=lines)] == [str(tmp_path / "a.mp4")]


@pytest.mark.parametrize("name", ["missing.mp4", "missing*.mp4", "@missing"])
def test_a_name_for_nothing_is_refused(tmp_path: Path, name: str) -> None:
    """A path, glob or manifest that finds nothing is an error that says so."""
    prefix = "@" if name.startswith("@") else ""
    with pytest.raises(ArchiveError, match=r"no such file|cannot be read"):
        list(find([prefix + str(tmp_path / name.removeprefix("@"))]))


def test_an_empty_manifest_is_refused(tmp_path: Path) -> None:
    """A manifest without a path is a mistake, not an empty archive."""
    (tmp_path / "list").write_text("\n\n")
    with pytest.raises(ArchiveError, match="lists no file"):
        list(find([f"@{tmp_path}/list"]))


def test_identity_is_the_content(tmp_path: Path) -> None:
    """A copy has the identity of its original, as sha256sum prints it; a changed file another."""
    tree(tmp_path, "a.mp4")
    (tmp_path / "copy.mp4").write_bytes(b"a.mp4")
    (tmp_path / "other.mp4").write_bytes(b"b.mp4")
    first = content_id(str(tmp_path / "a.mp4"))
    assert first == hashlib.sha256(b"a.mp4").hexdigest()
    assert content_id(str(tmp_path / "copy.mp4")) == first
    assert content_id(str(tmp_path / "other.mp4")) != first


def test_shown_names_cannot_harm_a_terminal() -> None:
    """Control characters and invalid bytes of a name are shown as escapes."""
    file = ArchiveFile(os.fsdecode(b"/a/\x1b[31mred\xff\n.mp4"), 1, 1)
    assert file.shown == "/a/\\x1b[31mred\\xff\\n.mp4"
