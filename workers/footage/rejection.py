"""Why a video file is not read.

FootageError            the file cannot be read now, or is not the file that was probed
└── Rejected            what was found is not a video that can be analysed; `kind` says why
"""

from __future__ import annotations

import errno
import os
from enum import StrEnum

import av.error

from storage.records import shown_path


class FootageError(Exception):
    """A video file that was probed cannot be read now: it vanished, changed or fails to read."""


class RejectKind(StrEnum):
    """Why a file is not analysed."""

    MISSING = "missing"
    NO_PERMISSION = "no-permission"
    NOT_A_FILE = "not-a-file"
    EMPTY = "empty"
    UNREADABLE = "unreadable"
    NOT_A_VIDEO = "not-a-video"
    FORBIDDEN_FORMAT = "forbidden-format"
    NO_VIDEO_STREAM = "no-video-stream"
    UNKNOWN_CODEC = "unknown-codec"
    NO_FRAMES = "no-frames"
    TOO_LARGE = "too-large"


class Rejected(FootageError):
    """A file that cannot be analysed; the text says cause and remedy in one line."""

    def __init__(self, kind: RejectKind, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def rejection(path: str, error: BaseException) -> Rejected:
    """The one-line refusal that an error of the operating system or of FFmpeg stands for."""
    kind = RejectKind.UNREADABLE
    match error:
        case FileNotFoundError():
            kind, text = RejectKind.MISSING, "no such file; check the path"
        case PermissionError() if not is_nonsense(error):
            kind = RejectKind.NO_PERMISSION
            text = "no permission to read; grant read access to this user"
        case MemoryError():
            kind = RejectKind.TOO_LARGE
            text = (
                "its tables or pictures take more memory than a file may; copy it with another "
                "program, or cut it into parts"
            )
        case av.error.InvalidDataError() | av.error.EOFError() | av.error.PermissionError():
            kind = RejectKind.NOT_A_VIDEO
            text = (
                "no video container that can be read; the file is damaged, incomplete (a missing "
                "header) or not a video"
            )
        case av.error.ArgumentError():
            kind = RejectKind.FORBIDDEN_FORMAT
            text = "a format that may name other files is not opened; convert it to MP4 or Matroska"
        case av.error.ExitError():
            text = (
                "reading came to nothing in time: the storage is slow, or a large part of the file "
                "holds no video; check the storage, or copy the file with another program"
            )
        case _:
            number = error.errno if isinstance(error, OSError | av.error.FFmpegError) else None
            cause = type(error).__name__
            if number is not None and number in errno.errorcode:
                cause = os.strerror(number)
            text = f"cannot be read ({cause}); check the storage"
    return Rejected(kind, f"{shown_path(os.fsencode(path))}: {text}")


def is_nonsense(error: BaseException) -> bool:
    """Whether FFmpeg does not understand what the file holds. Some demuxers then answer -1, which
    reads as EPERM; that this user may read the file is known when they begin."""
    if isinstance(error, av.error.PermissionError):
        return error.errno == errno.EPERM
    return isinstance(error, av.error.InvalidDataError)
