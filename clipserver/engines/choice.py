"""Which engine serves: decided quickly, before any weights are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from clipserver.engines import Description, Engine, EngineUnavailableError, hub
from clipserver.engines.offline import sources

EngineName = Literal["auto", "clip", "offline"]


@dataclass(frozen=True, slots=True)
class Choice:
    """An engine that can be had, and how to load it with a number of threads."""

    description: Description
    load: Callable[[int], Engine]


def choose(name: EngineName, *, model_dir: Path | None, model: str, int8: bool) -> Choice:
    """The asked engine; for `auto` CLIP where its weights can be had, else the offline engine.

    EngineUnavailableError with cause and remedy. A `model_dir` that is given is meant: where it
    cannot be used, `auto` does not take something else instead. The offline engine is never taken
    unless `offline` or `auto` was asked for in so many words.
    """
    if name == "offline":
        return _offline()
    try:
        return _clip(model_dir, model, int8=int8)
    except EngineUnavailableError as no_clip:
        if model_dir is not None:
            raise
        if name == "clip":
            remedy = "or ask for the coarse offline engine by --engine offline"
            raise EngineUnavailableError(f"{no_clip}; {remedy}") from no_clip
        try:
            return _offline()
        except EngineUnavailableError as no_offline:
            raise EngineUnavailableError(f"{no_offline}; or, for CLIP: {no_clip}") from no_clip


def _clip(model_dir: Path | None, model: str, *, int8: bool) -> Choice:
    if model_dir is not None:
        located = hub.in_folder(model_dir, int8=int8)
    else:
        located = hub.on_hub(model, int8=int8)

    def load(threads: int) -> Engine:
        files = located.fetch()
        from clipserver.engines.clip import ClipEngine  # noqa: PLC0415  # heavy

        return ClipEngine(located.description, files, threads)

    return Choice(located.description, load)


def _offline() -> Choice:
    sources.check_installed()

    def load(threads: int) -> Engine:
        from clipserver.engines.offline.engine import OfflineEngine  # noqa: PLC0415  # heavy

        return OfflineEngine(threads)

    return Choice(sources.DESCRIPTION, load)
