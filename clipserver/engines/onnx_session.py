"""How models are opened in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import onnxruntime

_ERRORS_ONLY = 3


def open_session(model: bytes | Path, threads: int) -> onnxruntime.InferenceSession:
    """A session on the CPU with `threads` threads that sleep while there is nothing to do: the
    cores are shared with video decoders, which spinning threads would starve."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
