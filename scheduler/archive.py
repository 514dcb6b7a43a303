"""From what a person names (folders, files, globs, manifests) to the files of an archive."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from storage.records import ArchiveFile, shown_path

VIDEO_ENDINGS = frozenset(
    [
        ".3g2",
        ".3gp",
        ".asf",
        ".avi",
        ".divx",
        ".dv",
        ".f4v",
        ".flv",
        ".gif",
        ".h264",
        ".h265",
        ".hevc",
        ".ivf",
        ".m1v",
        ".m2t",
        ".m2ts",
        ".m2v",
        ".m4v",
        ".mjpeg",
        ".mjpg",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".mxf",
        ".nut",
        ".ogm",
        ".ogv",
        ".qt",
        ".rm",
        ".rmvb",
        ".ts",
        ".vob",
        ".webm",
        ".wmv",
        ".y4m",
    ]
)
"""Name endings taken from a folder. A file that is named itself is taken whatever its ending."""

STDIN = "-"
MANIFEST = "@"


class ArchiveError(Exception):
    """What was named cannot be read as files of an archive; the message says what to name."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A file that was named, or a folder below one, that cannot even be looked at."""

    path: str
    reason: str


def find(
    names: Iterable[str], *, recursive: bool = True, stdin: Iterable[bytes] | None = None
) -> Iterator[ArchiveFile | Unreadable]:
    """Yield the files that `names` stand for, each once, folders in order of name.

    A name is a folder (its files with a video's ending, below it too if `recursive`), a file, a
    glob, `-` (a manifest on `stdin`) or `@FILE` (a manifest in a file). A manifest holds one path
    a line, or paths ended by NUL bytes; those of a file are relative to it. Hidden files and links
    to folders are passed over. Raises ArchiveError for a name that stands for nothing, before any
    file is yielded; a missing file of a manifest, and a folder that cannot be listed, are yielded
    as Unreadable.
    """
    roots = [root for name in names for root in _roots(name, stdin)]
    seen: set[str] = set()
    for found in (found for root in roots for found in _below(root, recursive)):
        path = found if isinstance(found, str) else found.path
        if path not in seen:
            seen.add(path)
            yield _look(found) if isinstance(found, str) else found


def _roots(name: str, stdin: Iterable[bytes] | None) -> list[str]:
    if name == STDIN:
        lines = sys.stdin.buffer if stdin is None else stdin
        return _manifest(b"".join(lines), ".", "standard input")
    if name.startswith(MANIFEST) and not os.path.lexists(name):
        manifest = Path(name[1:])
        try:
            content = manifest.read_bytes()
        except OSError as error:
            raise ArchiveError(
                f"the manifest {shown_path(os.fsencode(manifest))} cannot be read "
                f"({error.strerror}): name a file that lists one path a line"
            ) from error
        return _manifest(content, str(manifest.parent), name)
    if os.path.lexists(name):
        return [os.path.abspath(name)]
    found = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else []
    if not found:
        raise ArchiveError(
            f"{shown_path(os.fsencode(name))}: no such file or folder, and no glob that finds one"
        )
    return [os.path.abspath(path) for path in found]


def _manifest(content: bytes, base: str, name: str) -> list[str]:
    separator = b"\0" if b"\0" in content else b"\n"
    lines = (line.removesuffix(b"\r") for line in content.split(separator))
    paths = [os.fsdecode(line) for line in lines if line.strip()]
    if not paths:
        raise ArchiveError(f"{name} lists no file: one path a line is expected")
    return [os.path.abspath(os.path.join(base, path)) for path in paths]


def _below(root: str, recursive: bool) -> Iterator[str | Unreadable]:
    if not os.path.isdir(root):
        yield root
        return
    closed: list[Unreadable] = []

    def note(error: OSError) -> None:
        closed.append(Unreadable(error.filename, f"cannot be listed: {error.strerror}"))

    for folder, folders, files in os.walk(root, onerror=note):
        folders[:] = sorted(f for f in folders if not f.startswith(".")) if recursive else []
        for name in sorted(files):
            ending = os.path.splitext(name)[1].lower()
            if ending in VIDEO_ENDINGS and not name.startswith("."):
                yield os.path.join(folder, name)
    yield from closed


def _look(path: str) -> ArchiveFile | Unreadable:
    try:
        found = os.stat(path)
    except OSError as error:
        return Unreadable(path, f"cannot be read: {error.strerror}")
    if not os.path.isfile(path):
        return Unreadable(path, "is not a regular file")
    return ArchiveFile(path, found.st_size, found.st_mtime_ns)
