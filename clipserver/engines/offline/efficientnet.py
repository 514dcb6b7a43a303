"""EfficientNet-lite2, an ImageNet classifier, as an ONNX model built in memory from its weights.

Architecture: M. Tan and Q. Le, "EfficientNet" (2019), in the lite variant of TensorFlow's model
garden: no squeeze-and-excitation, ReLU6, stem and head of fixed width. Batch norms are folded into
the convolutions before them, so that the graph is convolutions, clips and sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

SIDE = 260
"""Pixels a side that the weights were trained for."""
FEATURES = 1280

_STAGE_STRIDES = (1, 2, 2, 2, 1, 2, 1)
_NORM_EPSILON = 1e-3
_OPSET = 18

Floats = NDArray[np.float32]


def build(tensors: Mapping[str, NDArray[Any]], side: int = SIDE) -> bytes:
    """A serialised ONNX model: input `pictures`, N x side x side x 3 uint8 RGB; outputs `logits`,
    N x 1000, and `features`, N x 1280 (the pooled activations that the logits are linear in)."""
    graph = _Graph(tensors)
    x = graph.node("Cast", ["pictures"], to=TensorProto.FLOAT)
    x = graph.node("Sub", [x, graph.constant(np.float32(127))])
    x = graph.node("Mul", [x, graph.constant(np.float32(1 / 128))])
    x = graph.node("Transpose", [x], perm=[0, 3, 1, 2])
    x, side_now = graph.convolution(x, "_conv_stem", "_bn0", side, stride=2)
    channels, stage = 0, -1
    block = 0
    while (name := f"_blocks.{block}") + "._depthwise_conv.weight" in tensors:
        out = tensors[f"{name}._project_conv.weight"].shape[0]
        # No two neighbouring stages are of one width, so a new width is a new stage.
        first = out != channels
        stage += first
        stride = _STAGE_STRIDES[stage] if first else 1
        before = x
        if f"{name}._expand_conv.weight" in tensors:
            x, _ = graph.convolution(x, f"{name}._expand_conv", f"{name}._bn0", side_now)
        x, side_now = graph.convolution(
            x, f"{name}._depthwise_conv", f"{name}._bn1", side_now, stride=stride
        )
        x, _ = graph.convolution(
            x, f"{name}._project_conv", f"{name}._bn2", side_now, activate=False
        )
        if not first:
            x = graph.node("Add", [x, before])
        channels = out
        block += 1
    x, _ = graph.convolution(x, "_conv_head", "_bn1", side_now)
    x = graph.node("GlobalAveragePool", [x])
    graph.node("Flatten", [x], output="features")
    weight, bias = graph.constant(tensors["_fc.weight"]), graph.constant(tensors["_fc.bias"])
    graph.node("Gemm", ["features", weight, bias], output="logits", transB=1)
    return graph.serialise(side)


class _Graph:
    """Nodes and constants of a model under construction."""

    def __init__(self, tensors: Mapping[str, NDArray[Any]]) -> None:
        self._tensors = tensors
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._clip = [self.constant(np.float32(0)), self.constant(np.float32(6))]

    def constant(self, value: NDArray[Any] | np.float32) -> str:
        name = f"c{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
        return name

    def node(self, kind: str, inputs: list[str], output: str | None = None, **attrs: Any) -> str:
        name = output or f"n{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [name], **attrs))
        return name

    def convolution(
        self, x: str, conv: str, norm: str, side: int, *, stride: int = 1, activate: bool = True
    ) -> tuple[str, int]:
        """Convolution with its batch norm folded in, and ReLU6; also the side of its output."""
        kernel, bias = self._folded(conv, norm)
        size = kernel.shape[2]
        out = -(-side // stride)
        # TensorFlow's SAME: what does not divide evenly is padded at the end.
        padding = max((out - 1) * stride + size - side, 0)
        start, end = padding // 2, padding - padding // 2
        depthwise = conv.endswith("_depthwise_conv")
        x = self.node(
            "Conv",
            [x, self.constant(kernel), self.constant(bias)],
            strides=[stride, stride],
            pads=[start, start, end, end],
            group=kernel.shape[0] if depthwise else 1,
        )
        return (self.node("Clip", [x, *self._clip]) if activate else x), out

    def _folded(self, conv: str, norm: str) -> tuple[Floats, Floats]:
        scale = self._tensors[f"{norm}.weight"] / np.sqrt(
            self._tensors[f"{norm}.running_var"] + _NORM_EPSILON
        )
        kernel = self._tensors[f"{conv}.weight"] * scale[:, None, None, None]
        bias = self._tensors[f"{norm}.bias"] - self._tensors[f"{norm}.running_mean"] * scale
        return kernel.astype(np.float32), bias.astype(np.float32)

    def serialise(self, side: int) -> bytes:
        float_output = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width])
            for name, width in (("logits", 1000), ("features", FEATURES))
        ]
        pictures = helper.make_tensor_value_info(
            "pictures", TensorProto.UINT8, ["n", side, side, 3]
        )
        graph = helper.make_graph(
            self._nodes, "efficientnet-lite2", [pictures], float_output, self._constants
        )
        opset = [helper.make_opsetid("", _OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=9)
        serialised: bytes = model.SerializeToString()
        return serialised
