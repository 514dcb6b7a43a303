"""Where CLIP's files are: a folder, the hub's cache on this machine, or the hub itself.

Answers without importing any library of the hub and within half a second, so that a machine without
internet is not made to wait.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import threading
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clipserver.engines import Description, EngineUnavailableError
from clipserver.engines.int8 import quantised

_ANSWER_S = 0.5
_CONFIG = "preprocessor_config.json"
_CONFIG_BYTES = 65536
_DEFAULT_SIDE = 224
_FINGERPRINT_BYTES = 65536
_FOLDERS = ("", "onnx")
_FP32 = ("vision_model.onnx", "text_model.onnx")
_QUANTISED = ("vision_model_quantized.onnx", "text_model_quantized.onnx")
_WANTED = "onnx/vision_model.onnx onnx/text_model.onnx tokenizer.json preprocessor_config.json"
_TRUE = {"1", "ON", "YES", "TRUE"}
_PINNED = {"Xenova/clip-vit-base-patch16": "c32d8e02b868e2fbb4d080d155161b06393fb0f2"}
"""Revisions that are taken where none is asked for; another model's is its `main`."""


@dataclass(frozen=True, slots=True)
class Files:
    """The files that CLIP needs."""

    vision: Path
    text: Path
    tokenizer: Path


@dataclass(frozen=True, slots=True)
class Located:
    """CLIP weights that can be had; `fetch` brings them here if they are not."""

    description: Description
    fetch: Callable[[], Files]


def in_folder(folder: Path, *, int8: bool) -> Located:
    """Weights in a folder of one's own. EngineUnavailableError naming what is missing.

    `int8` quantises the towers, or takes quantised ones where the folder has no others.
    """
    shipped = int8 and not _complete(folder, _FP32) and _complete(folder, _QUANTISED)
    files = _files(folder, _QUANTISED if shipped else _FP32)
    model = _versioned(f"clip-{folder.resolve().name}", _fingerprint(files), int8)
    return Located(_describe(model, folder), lambda: _ready(files, int8=int8 and not shipped))


def on_hub(model: str, *, int8: bool) -> Located:
    """Weights named `owner/name` or `owner/name@revision`, out of the cache if they are there.
    EngineUnavailableError where they are not and the hub does not answer."""
    name, _, asked = model.partition("@")
    revision = asked or _PINNED.get(name, "main")
    cached = _cached(name, revision)
    if cached is not None and _complete(cached, _FP32):
        files = _files(cached, _FP32)
        description = _describe(_versioned(name, cached.name, int8), cached)
        return Located(description, lambda: _ready(files, int8=int8))
    answer = None if _offline() else _ask_hub(name, revision)
    if answer is None:
        raise EngineUnavailableError(
            f"no CLIP weights: {name} is not on this machine and the hub cannot be reached; where "
            f"there is internet run 'hf download {name} {_WANTED} --revision {revision} "
            "--local-dir clip', "
            "then name that folder in NIGHTREEL_MODEL_DIR, or to the server as --model-dir"
        )
    commit, side = answer
    description = Description("clip", _versioned(name, commit, int8), side, None)
    return Located(description, lambda: _ready(_fetch(name, revision, commit), int8=int8))


def _versioned(name: str, commit: str, int8: bool) -> str:
    return f"{name.rpartition('/')[2]}{'-int8' if int8 else ''}@{commit[:8]}"


def _side(config: bytes) -> int:
    """Pixels a side by the model's own preprocessing, 224 where it says nothing."""
    try:
        crop = json.loads(config)["crop_size"]
        return int(crop["height"] if isinstance(crop, dict) else crop)
    except (ValueError, KeyError, TypeError):
        return _DEFAULT_SIDE


def _describe(model: str, folder: Path) -> Description:
    config = folder / _CONFIG
    side = _side(config.read_bytes()) if config.is_file() else _DEFAULT_SIDE
    return Description("clip", model, side, None)


def _ready(files: Files, *, int8: bool) -> Files:
    if not int8:
        return files
    return Files(quantised(files.vision), quantised(files.text), files.tokenizer)


def _files(folder: Path, towers: tuple[str, str]) -> Files:
    found = []
    for name in (*towers, "tokenizer.json"):
        places = [folder / below / name for below in _FOLDERS]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise EngineUnavailableError(
                f"no CLIP weights: {folder} has no {name}, nor has its folder onnx"
            )
        found.append(path)
    return Files(*found)


def _complete(folder: Path, towers: tuple[str, str]) -> bool:
    try:
        _files(folder, towers)
    except EngineUnavailableError:
        return False
    return True


def _fingerprint(files: Files) -> str:
    """Eight hexadecimal digits of the files' sizes, beginnings and ends: other weights, other
    digits, without reading hundreds of megabytes."""
    digest = hashlib.sha256()
    for path in (files.vision, files.text, files.tokenizer):
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            digest.update(file.read(_FINGERPRINT_BYTES))
            file.seek(max(0, size - _FINGERPRINT_BYTES))
            digest.update(file.read())
    return digest.hexdigest()[:8]


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE


def _cache() -> Path:
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache)
    if home := os.environ.get("HF_HOME"):
        return Path(home, "hub")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base, "huggingface", "hub").expanduser()


def _cached(name: str, revision: str) -> Path | None:
    """The snapshot's folder, whose name is its commit."""
    folder = _cache() / f"models--{name.replace('/', '--')}"
    reference = folder / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = folder / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def _ask_hub(name: str, revision: str) -> tuple[str, int] | None:
    """The commit that a revision stands for and the model's picture size, None where the hub does
    not answer in time.

    Asked for in a thread, since looking up a name may take longer than any timeout says.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    url = f"{endpoint}/{name}/resolve/{revision}/{_CONFIG}"
    answers: list[tuple[str, int]] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(url, timeout=_ANSWER_S) as answer:  # noqa: S310  # the hub
                commit = answer.headers.get("X-Repo-Commit")
                if commit:
                    answers.append((commit, _side(answer.read(_CONFIG_BYTES))))
        except (OSError, ValueError, http.client.HTTPException):
            pass

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(_ANSWER_S)
    return answers[0] if answers else None


def _fetch(name: str, revision: str, commit: str) -> Files:
    from huggingface_hub import snapshot_download  # noqa: PLC0415  # heavy, and rarely needed

    wanted = [*(f"onnx/{tower}" for tower in _FP32), "*.json"]
    try:
        # By the revision's own name, or the cache would not know later what that stands for.
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except OSError as error:
        raise EngineUnavailableError(
            f"the weights of {name} could not be fetched from the hub ({type(error).__name__}): "
            "run the same command again, it resumes"
        ) from error
    if folder.name != commit:
        raise EngineUnavailableError(
            f"{name} changed on the hub while it was being fetched: run the same command again"
        )
    return _files(folder, _FP32)
