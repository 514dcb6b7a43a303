"""Towers with int8 weights, made from fp32 ones and kept for the next start.

Dynamic quantisation: the weights of matrix products become int8 with a scale for each output
channel, activations are scaled as they come. Convolutions and the token table stay as they are:
quantised they cost accuracy and gain no time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clipserver.engines import EngineUnavailableError

log = logging.getLogger(__name__)


def quantised(tower: Path) -> Path:
    """The tower's int8 twin, made now unless this machine has it already.

    EngineUnavailableError where it cannot be made or written.
    """
    with tower.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        twin = _folder() / f"{digest}.onnx"
        if twin.is_file():
            return twin
        log.info("quantising %s to int8, once", tower.name)
        twin.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=twin.parent) as folder:
            made = Path(folder, "int8.onnx")
            _quantise(tower, made)
            os.replace(made, twin)
    # The converter's errors have no base of their own.
    except Exception as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EngineUnavailableError(f"{tower} cannot be quantised: {cause}") from error
    return twin


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base, "nightreel", "int8").expanduser()


def _quantise(tower: Path, made: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415  # heavy

    with _quiet():
        quantize_dynamic(
            tower,
            made,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            # Seven bits: of eight, sums overflow on processors without VNNI.
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the converter's advice to preprocess, which is for convolutions."""
    root, kept = logging.getLogger(), logging.getLogger().level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(kept)
