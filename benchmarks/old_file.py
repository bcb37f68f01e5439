"""A file as exporters wrote them around 2019: opset 9, every initializer a graph input too.

    python -m benchmarks.old_file

onnxruntime may not treat such weights as constants: it folds no BatchNormalization, packs no weights and fuses
little. The network is a face detector in the style of RFB-320 (depthwise separable backbone, receptive field block,
four scales with a class and a box head each) with random weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import graphopt
from benchmarks.contest import contest, node_count
from benchmarks.results import Column, Goal, Results, ratio, read_options, stopwatch
from graphopt.ir.compare import exact_tolerance

GOAL = 2.0
HEIGHT, WIDTH = 240, 320
CLASSES, BOX = 2, 4
OURS, AS_IT_IS = "graphopt", "as it is"


class Detector:
    """Writes the network node by node, as the exporters of that time did: numbered names, BatchNormalization kept."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.channels = 3  # of what `_conv` wrote last

    def proto(self) -> onnx.ModelProto:
        """The whole model: image [1, 3, 240, 320] to scores [1, N, 2] and boxes [1, N, 4]."""
        x = self._conv("image", self.channels, 16, stride=2)
        for outputs, stride in ((32, 1), (32, 2), (32, 1), (64, 2), (64, 1), (64, 1)):
            x = self._separable(x, self.channels, outputs, stride)
        x = first = self._receptive_field(x, 64)
        for outputs, stride in ((128, 2), (128, 1), (128, 1)):
            x = self._separable(x, self.channels, outputs, stride)
        second = x
        for outputs, stride in ((256, 2), (256, 1)):
            x = self._separable(x, self.channels, outputs, stride)
        third = x
        x = self._conv(x, 256, 64, kernel=1)
        fourth = self._separable(x, 64, 256, 2)
        scales = ((first, 64, 3), (second, 128, 2), (third, 256, 2), (fourth, 256, 3))
        scores = self._node("Concat", *(self._head(*scale, CLASSES) for scale in scales), axis=1)
        boxes = self._node("Concat", *(self._head(*scale, BOX) for scale in scales), axis=1)
        self._node("Softmax", scores, output="scores", axis=2)
        self._node("Mul", boxes, self._weight(np.array([0.1, 0.1, 0.2, 0.2], np.float32)), output="boxes")
        image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, HEIGHT, WIDTH])
        also_inputs = [
            helper.make_tensor_value_info(weight.name, weight.data_type, list(weight.dims)) for weight in self.weights
        ]
        anchors = sum(
            boxes * rows * columns for boxes, rows, columns in ((3, 30, 40), (2, 15, 20), (2, 8, 10), (3, 4, 5))
        )
        outputs = [
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, anchors, CLASSES]),
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [1, anchors, BOX]),
        ]
        graph = helper.make_graph(self.nodes, "detector", [image, *also_inputs], outputs, self.weights)
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=4)
        onnx.checker.check_model(proto, full_check=True)
        return proto

    def _conv(self, x: str, inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, group: int = 1,
              dilation: int = 1, relu: bool = True) -> str:  # fmt: skip
        """Conv without bias, BatchNormalization, Relu."""
        shape = (outputs, inputs // group, kernel, kernel)
        weight = self.random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        pad = dilation * (kernel // 2)
        y = self._node(
            "Conv", x, self._weight(weight), kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4,
            dilations=[dilation] * 2, group=group,
        )  # fmt: skip
        statistics = (
            self.random.uniform(0.8, 1.2, outputs),
            self.random.uniform(-0.1, 0.1, outputs),
            self.random.uniform(-0.1, 0.1, outputs),
            self.random.uniform(0.8, 1.2, outputs),
        )
        y = self._node("BatchNormalization", y, *map(self._weight, statistics), epsilon=1e-5, momentum=0.9)
        self.channels = outputs
        return self._node("Relu", y) if relu else y

    def _separable(self, x: str, inputs: int, outputs: int, stride: int) -> str:
        x = self._conv(x, inputs, inputs, stride=stride, group=inputs)
        return self._conv(x, inputs, outputs, kernel=1)

    def _receptive_field(self, x: str, channels: int) -> str:
        """Branches of growing dilation, concatenated, projected, with a shortcut (Liu et al. 2018, RFB Net)."""
        width = channels // 8
        branches = []
        for dilation in (2, 3, 5):
            y = self._conv(x, channels, width, kernel=1, relu=False)
            y = self._conv(y, width, 2 * width)
            branches.append(self._conv(y, 2 * width, 2 * width, dilation=dilation, relu=False))
        joined = self._node("Concat", *branches, axis=1)
        projected = self._conv(joined, 6 * width, channels, kernel=1, relu=False)
        shortcut = self._conv(x, channels, channels, kernel=1, relu=False)
        return self._node("Relu", self._node("Add", projected, shortcut))

    def _head(self, x: str, channels: int, anchors: int, values: int) -> str:
        """Separable convolution to [1, anchors of the map, values], its shape put together at run time."""
        x = self._conv(x, channels, channels, group=channels)
        weight = self.random.standard_normal((anchors * values, channels, 1, 1)) / np.sqrt(channels)
        bias = self._weight(np.zeros(anchors * values))
        x = self._node("Conv", x, self._weight(weight), bias, kernel_shape=[1, 1])
        x = self._node("Transpose", x, perm=[0, 2, 3, 1])
        batch = self._node("Gather", self._node("Shape", x), self._constant(np.array(0)), axis=0)
        shape = self._node(
            "Concat", self._node("Unsqueeze", batch, axes=[0]), self._constant(np.array([-1, values])), axis=0
        )
        return self._node("Reshape", x, shape)

    def _constant(self, array: np.ndarray) -> str:
        return self._node("Constant", value=numpy_helper.from_array(array.astype(np.int64)))

    def _weight(self, array: np.ndarray) -> str:
        name = f"weight.{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array.astype(np.float32), name))
        return name

    def _node(self, op: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = output or str(len(self.nodes) + 1000)
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write `results/old_file.json`."""
    options = read_options("old_file", __doc__, arguments)
    results = Results(
        "old_file",
        "recipe exact on an opset-9 detector whose initializers are graph inputs",
        options.command,
        options.complete,
    )
    with tempfile.TemporaryDirectory() as temporary:
        files = {OURS: Path(temporary) / "optimized.onnx", AS_IT_IS: Path(temporary) / "detector.onnx"}
        onnx.save(Detector().proto(), files[AS_IT_IS])
        with stopwatch() as watch:
            graphopt.optimize(files[AS_IT_IS], recipe="exact", quiet=True).save(files[OURS])
        measured = contest(files, reference=files[AS_IT_IS], seconds=options.seconds)
        results.rows = [
            {
                "file": name,
                "nodes": node_count(path),
                "load_seconds": measured.load_seconds[name],
                "error": measured.errors[name],
                "speed": vars(measured.speed_over(AS_IT_IS)) if name == OURS else None,
                "tool_seconds": watch.seconds if name == OURS else 0.0,
                **(measured.to_json()["rivals"].get(name, {})),
            }
            for name, path in files.items()
        ]
    speed, error = measured.speed_over(AS_IT_IS), measured.errors[OURS]
    same = error <= exact_tolerance(np.zeros(0, np.float32))
    results.goals = [
        Goal(f"at least {GOAL:g} times faster than the file as it is", ratio(vars(speed)), speed.median >= GOAL),
        Goal("the same outputs up to rounding", f"error {error:.1e}", same),
    ]
    results.show_and_write(COLUMNS)


COLUMNS: tuple[Column, ...] = (
    ("file", lambda row: row["file"]),
    ("nodes", lambda row: str(row["nodes"])),
    ("load s", lambda row: f"{row['load_seconds']:.3f}"),
    ("x as it is", lambda row: ratio(row["speed"]) if row["speed"] else "1"),
    ("error", lambda row: f"{row['error']:.1e}"),
    ("tool s", lambda row: f"{row['tool_seconds']:.1f}"),
)


if __name__ == "__main__":
    main()
