"""Small nets that static int8 breaks, as it breaks the published ones of their kind; all built in code."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tests.passes.quantized_nets import canonical_constants, set_weight, weighted


def weight_of(model: ir.Model, name: str) -> np.ndarray:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy().copy()


def spread(model: ir.Model, producer: str, bias: str, reader: str, factors: np.ndarray) -> None:
    """Scale the channels between two Convs: the same function in float, another range a channel for a quantizer."""
    first = weight_of(model, producer)
    set_weight(model, producer, (first * factors[:, None, None, None]).astype(np.float32))
    set_weight(model, bias, (weight_of(model, bias) * factors).astype(np.float32))
    second = weight_of(model, reader)
    shape = (-1, 1, 1, 1) if second.shape[1] == 1 else (1, -1, 1, 1)
    set_weight(model, reader, (second / factors.reshape(shape)).astype(np.float32))


def outlier() -> ir.Model:
    """Six Convs in a chain; two channels of the third activation are 300 times as large as the others."""
    model = weighted(
        "float[n,3,16,16] x => float[n,4] y",
        """a = Conv<pads=[1,1,1,1]>(x, w0, b0) a1 = Relu(a) b = Conv<pads=[1,1,1,1]>(a1, w1, b1) b1r = Relu(b)
           c = Conv<pads=[1,1,1,1]>(b1r, w2, b2) c1 = Relu(c) d = Conv<pads=[1,1,1,1]>(c1, w3, b3) d1 = Relu(d)
           e = Conv<pads=[1,1,1,1]>(d1, w4, b4) e1 = Relu(e) p = GlobalAveragePool(e1) f = Flatten(p)
           y = Gemm<transB=1>(f, v)""",
        w0=(8, 3, 3, 3), b0=(8,), w1=(16, 8, 3, 3), b1=(16,), w2=(16, 16, 3, 3), b2=(16,), w3=(16, 16, 3, 3),
        b3=(16,), w4=(8, 16, 3, 3), b4=(8,), v=(4, 8),
    )  # fmt: skip
    factors = np.ones(16)
    factors[[1, 14]] = 300.0
    spread(model, "w2", "b2", "w3", factors)
    return model


def mobile() -> ir.Model:
    """An inverted bottleneck whose depthwise filter has ranges from 1/64 to 64, as trained MobileNets have."""
    model = weighted(
        "float[n,3,16,16] x => float[n,4] y",
        """lo = Constant<value_float=0.0>()
           a = Conv<pads=[1,1,1,1]>(x, w0, b0) a1 = Relu(a) e = Conv(a1, w1, b1) e1 = Relu(e)
           d = Conv<pads=[1,1,1,1], group=32>(e1, w2, b2) d1 = Relu(d) o = Conv(d1, w3, b3) s = Add(o, a1)
           k = Conv(s, w4, b4) k1 = Relu(k) g = GlobalAveragePool(k1) p = Flatten(g) y = Gemm<transB=1>(p, v)""",
        w0=(16, 3, 3, 3), b0=(16,), w1=(32, 16, 1, 1), b1=(32,), w2=(32, 1, 3, 3), b2=(32,), w3=(16, 32, 1, 1),
        b3=(16,), w4=(24, 16, 1, 1), b4=(24,), v=(4, 24),
    )  # fmt: skip
    model = canonical_constants(model)
    spread(model, "w2", "b2", "w3", 2.0 ** np.linspace(-6, 6, 32))
    return model


def super_resolution() -> ir.Model:
    """EDSR's plan: no normalisation, a residual body, twice the size; two channels of the body are large."""
    model = weighted(
        "float[1,3,16,16] x => float[1,3,32,32] y",
        """h = Conv<pads=[1,1,1,1]>(x, w0, b0) a = Conv<pads=[1,1,1,1]>(h, w1, b1) a1 = Relu(a)
           c = Conv<pads=[1,1,1,1]>(a1, w2, b2) s = Add(c, h) d = Conv<pads=[1,1,1,1]>(s, w3, b3) d1 = Relu(d)
           e = Conv<pads=[1,1,1,1]>(d1, w4, b4) t = Add(e, s) u = Conv<pads=[1,1,1,1]>(t, w5, b5)
           y = DepthToSpace<blocksize=2, mode="CRD">(u)""",
        w0=(16, 3, 3, 3), b0=(16,), w1=(16, 16, 3, 3), b1=(16,), w2=(16, 16, 3, 3), b2=(16,), w3=(16, 16, 3, 3),
        b3=(16,), w4=(16, 16, 3, 3), b4=(16,), w5=(12, 16, 3, 3), b5=(12,),
    )  # fmt: skip
    for name in ("w1", "w2", "w3", "w4", "w5"):
        set_weight(model, name, weight_of(model, name) * np.float32(0.4))
    for name in ("b0", "b2", "b4", "b5"):
        set_weight(model, name, np.zeros_like(weight_of(model, name)))
    # The first three channels carry the image through the stream to the four pixels of each output channel.
    first, last = weight_of(model, "w0"), weight_of(model, "w5")
    first[:3] = 0.0
    last[:, :3] = 0.0
    for channel in range(3):
        first[channel, channel, 1, 1] = 1.0
        last[4 * channel : 4 * channel + 4, channel, 1, 1] = 1.0
    set_weight(model, "w0", first)
    set_weight(model, "w5", last)
    factors = np.ones(16)
    factors[[5, 8]] = 300.0
    spread(model, "w1", "b1", "w2", factors)
    return model


def voice() -> ir.Model:
    """A voice detector: Conv as filter bank, log power, LSTM. Quiet bands vanish in 8 bits, and their logarithm."""
    model = weighted(
        "float[1,1,512] x => float[1,1] y",
        """zero = Constant<value_ints=[0]>() c = Conv<strides=[16]>(x, w0) e = Conv<strides=[1]>(c, w1, b1)
           p = Mul(e, e) q = Add(p, tiny) l = Log(q)
           s = Transpose<perm=[2,0,1]>(l) o, h = LSTM<hidden_size=8>(s, wi, wr, wb) k = Squeeze(h, zero)
           z = Gemm(k, v) y = Sigmoid(z)""",
        w0=(16, 1, 32), w1=(16, 16, 1), b1=(16,), tiny=(1,), wi=(1, 32, 16), wr=(1, 32, 8), wb=(1, 64), v=(8, 1),
    )  # fmt: skip
    model = canonical_constants(model)
    set_weight(model, "tiny", np.array([1e-7], np.float32))
    set_weight(model, "b1", np.zeros(16, np.float32))
    set_weight(
        model, "w1", (weight_of(model, "w1") * 10.0 ** np.linspace(-3.5, 0, 16)[:, None, None]).astype(np.float32)
    )
    set_weight(model, "v", weight_of(model, "v") * np.float32(4))
    return model


def detector() -> ir.Model:
    """Boxes in pixels and scores between 0 and 1 from one Conv, told apart and put together again as YOLO does."""
    model = weighted(
        "float[1,3,16,16] x => float[1,64,12] y",
        """shape = Constant<value_ints=[1,12,64]>() sizes = Constant<value_ints=[4,8]>()
           a = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w0, b0) a1 = Relu(a) b = Conv<pads=[1,1,1,1]>(a1, w1, b1)
           b2 = Relu(b) h = Conv(b2, w2, b3) r = Reshape(h, shape) boxes, logits = Split<axis=1>(r, sizes)
           scores = Sigmoid(logits) k = Concat<axis=1>(boxes, scores) y = Transpose<perm=[0,2,1]>(k)""",
        w0=(16, 3, 3, 3), b0=(16,), w1=(16, 16, 3, 3), b1=(16,), w2=(12, 16, 1, 1), b3=(12,),
    )  # fmt: skip
    model = canonical_constants(model)
    factors = np.repeat([320.0, 1.0], [4, 8])
    set_weight(model, "w2", (weight_of(model, "w2") * factors[:, None, None, None]).astype(np.float32))
    set_weight(model, "b3", (weight_of(model, "b3") * factors + np.repeat([320.0, -3.0], [4, 8])).astype(np.float32))
    return model


NETS = {
    "outlier": outlier,
    "mobile": mobile,
    "super-resolution": super_resolution,
    "voice": voice,
    "detector": detector,
}
