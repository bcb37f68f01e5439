"""Graphs that no exporter of torch writes, in ONNX text: control flow, quantized weights, operators of ONNX alone.

Inputs that begin with a capital letter are no inputs but weights, in the main graph and in the bodies of control
flow: `W` random with the variance that keeps a signal's size, `B` around 0, `S` around 1, `Q` eight-bit integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

from tests.zoo.entry import Entry


def model(text: str, given: Mapping[str, np.ndarray] | None = None) -> onnx.ModelProto:
    """The graph that the text describes, with weights."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21, "local": 1]> {text}')
    _give_weights(proto.graph, dict(given or {}), np.random.default_rng(0))
    onnx.checker.check_model(proto)
    return proto


def _give_weights(graph: onnx.GraphProto, given: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _give_weights(attribute.g, given, rng)
    weights = [value for value in graph.input if value.name[0].isupper()]
    inputs = [value for value in graph.input if not value.name[0].isupper()]
    del graph.input[:]
    graph.input.extend(inputs)
    for value in weights:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        array = given.get(value.name)
        if array is None:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            array = _random(value.name[0], shape, rng).astype(dtype)
        assert list(array.shape) == shape, value.name
        graph.initializer.append(numpy_helper.from_array(array, value.name))


def _random(kind: str, shape: list[int], rng: np.random.Generator) -> np.ndarray:
    if kind == "W":
        return rng.standard_normal(shape) * np.sqrt(2 * shape[0] / np.prod(shape))
    if kind == "Q":
        return rng.integers(-63, 64, shape)  # 7 bits: int8 kernels of processors without VNNI saturate beyond
    return rng.uniform(-0.5, 0.5, shape) + (1.0 if kind == "S" else 0.0)


IF_WEIGHTS = """
g (float[batch,8] x, float[8,20] W1, float[14,5] W4) => (float[batch,5] y) {
  zero = Constant <value_float = 0.0> ()
  h0 = MatMul (x, W1)
  h = Relu (h0)
  total = ReduceMean <keepdims = 0> (x)
  positive = Greater (total, zero)
  z = If (positive) <
    then_branch = left (float[20,14] W2, float[14] B2) => (float[batch,14] a) { p = MatMul (h, W2)  a = Add (p, B2) },
    else_branch = right (float[14,20] W3, float[14] B3) => (float[batch,14] b) {
      q = Gemm <transB = 1> (h, W3, B3)  b = Tanh (q)
    }
  >
  y = MatMul (z, W4)
}
"""
IF_CAPTURES = """
g (bool fancy, float[batch,3,8,8] x, float[12,3,3,3] W1, float[20,12,1,1] W2, float[20] B2, float[20,20,3,3] W3,
   float[5,20,1,1] W4) => (float[batch,5,8,8] y) {
  c = Conv <pads = [1,1,1,1]> (x, W1)
  h = Relu (c)
  p = Conv (h, W2, B2)
  z = If (fancy) <
    then_branch = left () => (float[batch,20,8,8] a) {
      r = Relu (p)  d = Conv <pads = [1,1,1,1]> (r, W3)  a = Add (d, p)
    },
    else_branch = right () => (float[batch,20,8,8] b) { b = Conv (h, W2, B2) }
  >
  y = Conv (z, W4)
}
"""
LOOP_WEIGHTS = """
g (float[batch,8] x, float[8,20] W1, float[20,5] W3) => (float[batch,5] y, float[3,batch,14] steps) {
  three = Constant <value = int64 {3}> ()
  yes = Constant <value = bool {1}> ()
  h0 = MatMul (x, W1)
  h, steps = Loop (three, yes, h0) <
    body = body (int64 i, bool go, float[batch,20] s, float[20,14] W2, float[14,20] W4, float[20] B4)
      => (bool again, float[batch,20] t, float[batch,14] seen) {
      again = Identity (go)
      u0 = MatMul (s, W2)
      seen = Relu (u0)
      v = MatMul (seen, W4)
      w = Add (v, B4)
      t0 = Add (w, s)
      t = Tanh (t0)
    }
  >
  y = MatMul (h, W3)
}
"""
LOOP_CAPTURES = """
g (int64 trips, float[batch,3,8,8] x, float[12,3,3,3] W1, float[12,12,3,3] W2, float[12] B2, float[5,12,1,1] W3)
  => (float[batch,5,8,8] y) {
  yes = Constant <value = bool {1}> ()
  c = Conv <pads = [1,1,1,1]> (x, W1)
  h0 = Relu (c)
  h = Loop (trips, yes, h0) <
    body = body (int64 i, bool go, float[batch,12,8,8] s) => (bool again, float[batch,12,8,8] t) {
      again = Identity (go)
      u = Conv <pads = [1,1,1,1]> (s, W2, B2)
      t0 = Tanh (u)
      t = Add (t0, h0)
    }
  >
  y = Conv (h, W3)
}
"""
SCAN_WEIGHTS = """
g (float[steps,batch,6] x, float[batch,20] state, float[6,14] W1, float[10,4] W5)
  => (float[batch,20] last, float[steps,batch,4] y) {
  z = MatMul (x, W1)
  last, seen = Scan (state, z) <
    num_scan_inputs = 1,
    body = body (float[batch,20] s, float[batch,14] e, float[14,20] W2, float[20,20] W3, float[20] B3, float[20,10] W4)
      => (float[batch,20] t, float[batch,10] o) {
      a = MatMul (e, W2)
      b = MatMul (s, W3)
      c = Sum (a, b, B3)
      t = Tanh (c)
      o0 = MatMul (t, W4)
      o = Relu (o0)
    }
  >
  y = MatMul (seen, W5)
}
"""
DEAD_BRANCH = """
g (float[batch,3,8,8] x, float[12,3,3,3] W1, float[26,12,1,1] W2, float[7,20,1,1] W3, float[12,9] W4, float[5,4] W5)
  => (float[batch,20,8,8] y) {
  axes = Constant <value = int64[2] {2, 3}> ()
  sizes = Constant <value = int64[2] {20, 6}> ()
  c = Conv <pads = [1,1,1,1]> (x, W1)
  h = Relu (c)
  d = Conv (h, W2)
  y, unread = Split <axis = 1> (d, sizes)
  dead = Conv (y, W3)
  deader = Relu (dead)
  pooled = ReduceMean <keepdims = 0> (h, axes)
  lost = MatMul (pooled, W4)
}
"""
SPLITS = """
g (float[batch,3,8,8] x, float[30,3,3,3] W1, float[12,12,3,3] W2, float[10,8,1,1] W3, float[5,32,1,1] W4)
  => (float[batch,5,8,8] y) {
  sizes = Constant <value = int64[3] {12, 8, 10}> ()
  c = Conv <pads = [1,1,1,1]> (x, W1)
  r = Relu (c)
  a, b, d = Split <axis = 1> (r, sizes)
  e = Conv <pads = [1,1,1,1]> (a, W2)
  f = Conv (b, W3)
  k = Add (f, d)
  first, second = Split <axis = -3, num_outputs = 2> (k)
  m = Mul (first, second)
  z = Concat <axis = -3> (e, k, m, second)
  y = Conv (z, W4)
}
"""
CONCATENATED_WEIGHT = """
g (float[batch,3,8,8] x, float[8,3,3,3] W1, float[12,3,3,3] W2, float[8] B1, float[12] B2, float[20,14] W3,
   float[20] S3, float[14,5] W4) => (float[batch,5] y) {
  axes = Constant <value = int64[2] {2, 3}> ()
  one = Constant <value = int64[1] {1}> ()
  w = Concat <axis = 0> (W1, W2)
  bias = Concat <axis = 0> (B1, B2)
  c = Conv <pads = [1,1,1,1]> (x, w, bias)
  r = Relu (c)
  pooled = ReduceMean <keepdims = 0> (r, axes)
  columns = Unsqueeze (S3, one)
  scaled = Mul (W3, columns)
  turned = Transpose <perm = [1,0]> (scaled)
  h0 = Gemm <transB = 1> (pooled, turned)
  h = Relu (h0)
  same = Identity (W4)
  y = MatMul (h, same)
}
"""
FUNCTIONS = """
g (float[batch,8] x, float[8,20] W1, float[20] B1, float[20,14] W2, float[14] B2, float[14,5] W3)
  => (float[batch,5] y) {
  h = local.Layer (x, W1, B1)
  k = local.Layer (h, W2, B2)
  y = MatMul (k, W3)
}
<domain: "local", opset_import: ["": 21]> Layer (a, w, b) => (d) { p = MatMul (a, w)  q = Add (p, b)  d = Relu (q) }
"""
DEFORMABLE = """
g (float[batch,3,8,8] x, float[12,3,3,3] W1, float[36,12,3,3] W2, float[18,12,3,3] W3, float[20,6,3,3] W4,
   float[20] B4, float[5,20,1,1] W5) => (float[batch,5,8,8] y) {
  c = Conv <pads = [1,1,1,1]> (x, W1)
  h = Relu (c)
  offset0 = Conv <pads = [1,1,1,1]> (h, W2)
  offset = Tanh (offset0)
  mask0 = Conv <pads = [1,1,1,1]> (h, W3)
  mask = Sigmoid (mask0)
  d = DeformConv <kernel_shape = [3,3], pads = [1,1,1,1], group = 2, offset_group = 2> (h, W4, offset, B4, mask)
  r = Relu (d)
  y = Conv (r, W5)
}
"""
REGIONS = """
g (float[1,3,16,16] x, float[4,4] boxes, float[12,3,3,3] W1, float[20,12,3,3] W2, float[180,14] W3, float[14] B3,
   float[14,6] W4) => (float[4,6] y) {
  c = Conv <pads = [1,1,1,1], strides = [2,2]> (x, W1)
  h = Relu (c)
  d = Conv <pads = [1,1,1,1]> (h, W2)
  f = Relu (d)
  first = Constant <value = int64[4] {0, 0, 0, 0}> ()
  four = Constant <value = float {4.0}> ()
  small = Abs (boxes)
  where = Mul (small, four)
  p = RoiAlign <output_height = 3, output_width = 3, sampling_ratio = 2, spatial_scale = 0.5> (f, where, first)
  q = Flatten (p)
  e = Gemm (q, W3, B3)
  r = Relu (e)
  y = MatMul (r, W4)
}
"""
UNPOOLING = """
g (float[batch,3,8,8] x, float[12,3,3,3] W1, float[20,12,3,3] W2, float[12,20,3,3] W3, float[5,12,3,3] W4)
  => (float[batch,5,8,8] y) {
  c = Conv <pads = [1,1,1,1]> (x, W1)
  h = Relu (c)
  p, where = MaxPool <kernel_shape = [2,2], strides = [2,2]> (h)
  d = Conv <pads = [1,1,1,1]> (p, W2)
  e0 = Relu (d)
  e = Conv <pads = [1,1,1,1]> (e0, W3)
  shape = Shape (h)
  u = MaxUnpool <kernel_shape = [2,2], strides = [2,2]> (e, where, shape)
  y = Conv <pads = [1,1,1,1]> (u, W4)
}
"""
LOCAL_RESPONSE = """
g (float[batch,3,8,8] x, float[12,3,3,3] W1, float[20,12,3,3] W2, float[5,14,1,1] W3) => (float[batch,5,8,8] y) {
  places = Constant <value = int64[14] {3, 0, 19, 7, 1, 12, 5, 16, 9, 2, 18, 11, 14, 6}> ()
  c = Conv <pads = [1,1,1,1]> (x, W1)
  r = Relu (c)
  n = LRN <size = 5, alpha = 0.5, beta = 0.75, bias = 1.5> (r)
  d = Conv <pads = [1,1,1,1]> (n, W2)
  p = LpNormalization <axis = 1, p = 2> (d)
  k = Gather <axis = 1> (p, places)
  y = Conv (k, W3)
}
"""
QUANTIZED = """
g (float[batch,3,8,8] x, float Sx, uint8 Zx, float Sh, uint8 Zh, int8[12,3,3,3] Q1, float[12] S1, int8[12] Z1,
   int32[12] B1, float[12] S1b, int8[12,1,3,3] Q2, float[12] S2, int8[20,12,1,1] Q3, float[20] S3, int32[20] B3,
   float[20] S3b, int8[12,20,3,3] Q4, float[12] S4, int8[12,5] Q5, float[5] S5) => (float[batch,5] y) {
  xq = QuantizeLinear (x, Sx, Zx)
  xd = DequantizeLinear (xq, Sx, Zx)
  w1 = DequantizeLinear <axis = 0> (Q1, S1, Z1)
  b1 = DequantizeLinear <axis = 0> (B1, S1b)
  c1 = Conv <pads = [1,1,1,1]> (xd, w1, b1)
  q1 = QuantizeLinear (c1, Sh, Zh)
  d1 = DequantizeLinear (q1, Sh, Zh)
  w2 = DequantizeLinear <axis = 0> (Q2, S2)
  c2 = Conv <pads = [1,1,1,1], group = 12> (d1, w2)
  r2 = Relu (c2)
  q2 = QuantizeLinear (r2, Sh, Zh)
  d2 = DequantizeLinear (q2, Sh, Zh)
  w3 = DequantizeLinear <axis = 0> (Q3, S3)
  b3 = DequantizeLinear <axis = 0> (B3, S3b)
  c3 = Conv (d2, w3, b3)
  r3 = Relu (c3)
  q3 = QuantizeLinear (r3, Sh, Zh)
  d3 = DequantizeLinear (q3, Sh, Zh)
  w4 = DequantizeLinear <axis = 0> (Q4, S4)
  c4 = Conv <pads = [1,1,1,1]> (d3, w4)
  a4 = Add (c4, d1)
  q4 = QuantizeLinear (a4, Sh, Zh)
  d4 = DequantizeLinear (q4, Sh, Zh)
  axes = Constant <value = int64[2] {2, 3}> ()
  m = ReduceMean <keepdims = 0> (d4, axes)
  w5 = DequantizeLinear <axis = 1> (Q5, S5)
  y = MatMul (m, w5)
}
"""
INTEGERS = """
g (float[batch,8] x, int8[8,20] Q1, float[20] S1, float[20] B1, int8[20,14] Q2, float[14] S2, float[14,5] W3)
  => (float[batch,5] y) {
  xq, xs, xz = DynamicQuantizeLinear (x)
  i1 = MatMulInteger (xq, Q1, xz)
  f1 = Cast <to = 1> (i1)
  s1 = Mul (xs, S1)
  m1 = Mul (f1, s1)
  a1 = Add (m1, B1)
  h = Relu (a1)
  hq, hs, hz = DynamicQuantizeLinear (h)
  i2 = MatMulInteger (hq, Q2, hz)
  f2 = Cast <to = 1> (i2)
  s2 = Mul (hs, S2)
  m2 = Mul (f2, s2)
  y = MatMul (m2, W3)
}
"""


def quantized_values() -> dict[str, np.ndarray]:
    """Scales that keep activations inside eight bits, each channel with its own."""
    rng = np.random.default_rng(1)

    def scales(count: int, inputs: int) -> np.ndarray:
        return (rng.uniform(0.5, 1.5, count) * 1.4 / 73 / np.sqrt(inputs)).astype(np.float32)

    x, h = np.float32(0.03), np.float32(0.04)
    s1, s3 = scales(12, 27), scales(20, 12)
    return {
        "Sx": np.array(x), "Zx": np.array(128, np.uint8), "Sh": np.array(h), "Zh": np.array(120, np.uint8),
        "S1": s1, "Z1": np.zeros(12, np.int8), "B1": rng.integers(-900, 900, 12).astype(np.int32), "S1b": s1 * x,
        "S2": scales(12, 9), "S3": s3, "B3": rng.integers(-900, 900, 20).astype(np.int32), "S3b": s3 * h,
        "S4": scales(12, 180), "S5": scales(5, 12),
    }  # fmt: skip


def integer_values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.uniform(0.002, 0.01, size).astype(np.float32) for name, size in (("S1", 20), ("S2", 14))}


def entry(text: str, purpose: str, given: Mapping[str, np.ndarray] | None = None) -> Entry:
    return Entry(partial(model, text, given), tuple, purpose)


ENTRIES = {
    "if-weights": entry(IF_WEIGHTS, "If with weights inside both branches"),
    "if-captures": entry(IF_CAPTURES, "If whose branches read streams and weights of the main graph"),
    "loop-weights": entry(LOOP_WEIGHTS, "Loop with weights in the body, a carried stream and a stacked output"),
    "loop-captures": entry(LOOP_CAPTURES, "Loop that reads a stream and weights of the main graph, trips given"),
    "scan-weights": entry(SCAN_WEIGHTS, "Scan as a recurrent network, weights in the body"),
    "dead-branch": entry(DEAD_BRANCH, "nodes, weights and a part of the channels that reach no output"),
    "split-operators": entry(SPLITS, "Split into equal and unequal parts along a negative axis, Mul of the parts"),
    "concatenated-weight": entry(CONCATENATED_WEIGHT, "weights by Concat, Mul, Transpose and Identity of others"),
    "local-functions": entry(FUNCTIONS, "layers as functions of the model"),
    "deform-conv": entry(DEFORMABLE, "DeformConv in groups, its offsets and mask from the same stream"),
    "roi-align": entry(REGIONS, "RoiAlign, flattened into a linear layer"),
    "max-unpool": entry(UNPOOLING, "indices of MaxPool bind two streams by MaxUnpool"),
    "lrn-operator": entry(LOCAL_RESPONSE, "LRN and LpNormalization as operators, Gather of some channels"),
    "quantized-conv": entry(QUANTIZED, "QDQ with scales per channel, integer biases, a residual", quantized_values()),
    "quantized-linear": entry(INTEGERS, "dynamic quantization by MatMulInteger", integer_values()),
}
