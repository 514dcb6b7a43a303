"""Tensors out of weight files, as plain arrays: safetensors, and torch's checkpoints without torch.

A checkpoint is a pickle. It may build tensors and ordered dictionaries here, and nothing else.
"""

from __future__ import annotations

import collections
import io
import json
import math
import pickle  # only through the allow-list below
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

_CHECKPOINT_MAGIC = 0x1950A86A20F9469CFC6C
_CHECKPOINT_PROTOCOL = 1001
_STORAGES: dict[str, np.dtype[Any]] = {
    "FloatStorage": np.dtype("<f4"),
    "LongStorage": np.dtype("<i8"),
}
_SAFETENSOR_TYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
}
_HEADER_LIMIT = 1 << 20


def read_safetensors(data: bytes) -> dict[str, NDArray[Any]]:
    """Name to array for a safetensors file: eight bytes of header length, the header as JSON with
    type, shape and offsets of each tensor, then the numbers. ValueError for anything malformed."""
    (length,) = struct.unpack_from("<Q", data)
    if length > min(_HEADER_LIMIT, len(data) - 8):
        raise ValueError("safetensors header is longer than its file allows")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        kind = _SAFETENSOR_TYPES[entry["dtype"]]
        count = math.prod(entry["shape"])
        if end - start != count * kind.itemsize:
            raise ValueError(f"safetensors tensor {name} has a size that is not its shape's")
        flat = np.frombuffer(data, kind, count, 8 + length + start)
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


def read_checkpoint(data: bytes) -> dict[str, NDArray[Any]]:
    """Name to array for a state dictionary saved by torch before its zip format (1.6): five pickles
    (magic, protocol, system, tensors, order of storages), then each storage as a count and numbers.

    ValueError for another format; pickle.UnpicklingError for a pickle that names anything but
    tensors and ordered dictionaries.
    """
    stream = io.BytesIO(data)
    if _AllowList(stream).load() != _CHECKPOINT_MAGIC:
        raise ValueError("not a checkpoint in torch's legacy format")
    if _AllowList(stream).load() != _CHECKPOINT_PROTOCOL:
        raise ValueError("a checkpoint of an unknown protocol")
    _AllowList(stream).load()
    tensors: dict[str, _Tensor] = _AllowList(stream).load()
    kinds = {tensor.storage.key: tensor.storage.kind for tensor in tensors.values()}
    storages: dict[str, memoryview] = {}
    for key in _AllowList(stream).load():
        (count,) = struct.unpack("<q", stream.read(8))
        start = stream.tell()
        stream.seek(start + count * kinds[key].itemsize)
        storages[key] = memoryview(data)[start : stream.tell()]
    # numpy refuses a shape, offset or stride that would leave the storage.
    return {name: tensor.view(storages[tensor.storage.key]) for name, tensor in tensors.items()}


@dataclass(frozen=True, slots=True)
class _Storage:
    kind: np.dtype[Any]
    key: str


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """In numbers, not bytes; convolutions that came from TensorFlow keep its order of axes."""

    def view(self, storage: memoryview) -> NDArray[Any]:
        size = self.storage.kind.itemsize
        return np.ndarray(
            self.shape,
            self.storage.kind,
            storage,
            self.offset * size,
            [step * size for step in self.stride],
        )


def _rebuild(
    storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(stride))


class _AllowList(pickle.Unpickler):
    """An unpickler that can build what a state dictionary is made of, and nothing else."""

    _allowed = {  # noqa: RUF012  # read only, and pickle wants a plain class
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
        **{("torch", name): kind for name, kind in _STORAGES.items()},
    }

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream)

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            _refuse(f"a checkpoint must not name {module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        if not (isinstance(pid, tuple) and pid[:1] == ("storage",)):
            _refuse("a checkpoint holds a reference that is no storage")
        return _Storage(kind=pid[1], key=pid[2])


def _refuse(message: str) -> NoReturn:
    raise pickle.UnpicklingError(message)
