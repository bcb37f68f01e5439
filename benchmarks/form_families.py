"""The computations that `benchmarks.forms` times, each written in the ways that exporters write it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """One way to write a computation.

    Attributes:
        body: nodes in ONNX text that read the family's inputs and weights and write `y`.
        opset: version of the standard operator set that the form needs.
        constants: further initializers in ONNX text.
    """

    body: str
    opset: int = 21
    constants: str = ""


@dataclass(frozen=True)
class Family:
    """One computation.

    Attributes:
        about: what it stands for, one line.
        inputs: shape of each float32 input.
        output: shape of the float32 output `y`.
        forms: by name; the first is the baseline.
        weights: shape of each float32 initializer; values are drawn by the benchmark.
    """

    about: str
    inputs: Mapping[str, Shape]
    output: Shape
    forms: Mapping[str, Form]
    weights: Mapping[str, Shape] = field(default_factory=dict)


_SCALARS = "float half = {0.5}, float one = {1}, float two = {2}, float three = {3}, float six = {6}, float zero = {0}"
_SQRT2 = "float sqrt2 = {1.4142135}, float rsqrt2 = {0.70710677}"
_TANH = "float cubic = {0.044715}, float outer = {0.7978846}"

# Activations read `x` and write `y`.
_ACTIVATIONS: dict[str, tuple[str, dict[str, Form]]] = {
    "gelu": (
        "Gelu, erf form",
        {
            "div-erf (torch)": Form(
                "a = Div(x, sqrt2) b = Erf(a) c = Add(b, one) d = Mul(x, c) y = Mul(d, half)",
                constants=f"{_SCALARS}, {_SQRT2}",
            ),
            "mul-erf, 0.5*x first": Form(
                "h = Mul(half, x) a = Mul(x, rsqrt2) b = Erf(a) c = Add(one, b) y = Mul(h, c)",
                constants=f"{_SCALARS}, {_SQRT2}",
            ),
            "Gelu": Form("y = Gelu(x)"),
        },
    ),
    "gelu-tanh": (
        "Gelu, tanh form",
        {
            "pow-tanh (HF gelu_new)": Form(
                "h = Mul(half, x) a = Pow(x, three) b = Mul(a, cubic) c = Add(x, b) d = Mul(c, outer) "
                "e = Tanh(d) f = Add(e, one) y = Mul(h, f)",
                constants=f"{_SCALARS}, {_TANH}",
            ),
            "mul-tanh (torch)": Form(
                "h = Mul(half, x) s = Mul(x, x) a = Mul(s, x) b = Mul(cubic, a) c = Add(x, b) d = Mul(outer, c) "
                "e = Tanh(d) f = Add(e, one) y = Mul(h, f)",
                constants=f"{_SCALARS}, {_TANH}",
            ),
            "Gelu(tanh)": Form('y = Gelu<approximate="tanh">(x)'),
        },
    ),
    "hardswish": (
        "x * clip(x + 3, 0, 6) / 6",
        {
            "add-clip-mul-div": Form(
                "a = Add(x, three) b = Clip(a, zero, six) c = Mul(x, b) y = Div(c, six)", constants=_SCALARS
            ),
            "add-clip-div-mul": Form(
                "a = Add(x, three) b = Clip(a, zero, six) c = Div(b, six) y = Mul(x, c)", constants=_SCALARS
            ),
            "x * HardSigmoid": Form("a = HardSigmoid<alpha=0.16666667, beta=0.5>(x) y = Mul(x, a)"),
            "HardSwish": Form("y = HardSwish(x)"),
        },
    ),
    "hardsigmoid": (
        "clip(x + 3, 0, 6) / 6",
        {
            "add-clip-div": Form("a = Add(x, three) b = Clip(a, zero, six) y = Div(b, six)", constants=_SCALARS),
            "HardSigmoid": Form("y = HardSigmoid<alpha=0.16666667, beta=0.5>(x)"),
        },
    ),
    "silu": (
        "x * sigmoid(x)",
        {
            "x * Sigmoid": Form("a = Sigmoid(x) y = Mul(x, a)"),
            "Swish (opset 24)": Form("y = Swish(x)", opset=24),
        },
    ),
    "mish": (
        "x * tanh(softplus(x))",
        {
            "softplus-tanh-mul": Form("a = Softplus(x) b = Tanh(a) y = Mul(x, b)"),
            "tanh(log(1 + exp))": Form(
                "e = Exp(x) o = Add(e, one) l = Log(o) b = Tanh(l) y = Mul(x, b)", constants=_SCALARS
            ),
            "sigmoid, rational": Form(
                "n = Neg(x) s = Sigmoid(n) t = Mul(s, s) f = Sub(one, t) g = Add(one, t) r = Div(f, g) y = Mul(x, r)",
                constants=_SCALARS,
            ),
            "sigmoid, tanh(-log)": Form(
                "n = Neg(x) s = Sigmoid(n) l = Log(s) h = Neg(l) r = Tanh(h) y = Mul(x, r)",
                constants=_SCALARS,
            ),
            "Mish": Form("y = Mish(x)", opset=22),
        },
    ),
    "relu6": (
        "min(max(x, 0), 6)",
        {
            "relu-min": Form("a = Relu(x) y = Min(a, six)", constants=_SCALARS),
            "max-min": Form("a = Max(x, zero) y = Min(a, six)", constants=_SCALARS),
            "Clip": Form("y = Clip(x, zero, six)", constants=_SCALARS),
        },
    ),
    "relu": (
        "max(x, 0)",
        {
            "Clip(0, )": Form("y = Clip(x, zero)", constants=_SCALARS),
            "Max": Form("y = Max(x, zero)", constants=_SCALARS),
            "Relu": Form("y = Relu(x)"),
        },
    ),
}


def _alone(about: str, forms: Mapping[str, Form]) -> Family:
    shape = (1, 197, 1536)
    return Family(f"{about}, alone on {list(shape)}", {"x": shape}, shape, forms)


def _after(producer: str, forms: Mapping[str, Form]) -> dict[str, Form]:
    return {name: Form(f"{producer} {form.body}", form.opset, form.constants) for name, form in forms.items()}


def _after_linear(about: str, forms: Mapping[str, Form]) -> Family:
    return Family(
        f"{about}, after MatMul + Add [1,197,384] -> 1536",
        {"u": (1, 197, 384)},
        (1, 197, 1536),
        _after("m = MatMul(u, w) x = Add(m, bias)", forms),
        {"w": (384, 1536), "bias": (1536,)},
    )


def _after_conv(about: str, forms: Mapping[str, Form]) -> Family:
    return Family(
        f"{about}, after Conv 1x1 [1,32,28,28] -> 96",
        {"u": (1, 32, 28, 28)},
        (1, 96, 28, 28),
        _after("x = Conv(u, w, bias)", forms),
        {"w": (96, 32, 1, 1), "bias": (96,)},
    )


FAMILIES: dict[str, Family] = {}
for _name, (_about, _forms) in _ACTIVATIONS.items():
    FAMILIES[_name] = _alone(_about, _forms)
    FAMILIES[f"{_name}-linear"] = _after_linear(_about, _forms)
    FAMILIES[f"{_name}-conv"] = _after_conv(_about, _forms)


def _attention(about: str, tokens: int, heads: int, width: int, kv_heads: int, mask: str | None) -> Family:
    """Scaled dot-product attention between projected q, k, v and the output projection.

    Args:
        about: what it stands for.
        tokens: sequence length of queries and keys.
        heads: number of query heads.
        width: size of one head.
        kv_heads: number of key and value heads.
        mask: None, "add" (a float input [1,1,tokens,tokens] added to the scores), "causal" (a constant).
    """
    scale, root = width**-0.5, width**-0.25
    repeat = heads // kv_heads
    shapes = (
        f"int64[4] qs = {{1,{tokens},{heads},{width}}}, int64[4] ks = {{1,{tokens},{kv_heads},{width}}}, "
        f"int64[3] os = {{1,{tokens},{heads * width}}}, int64[1] two = {{2}}, "
        f"int64[5] es = {{1,{kv_heads},{repeat},{tokens},{width}}}, "
        f"int64[4] hs = {{1,{heads},{tokens},{width}}}, int64[3] fs = {{{heads},{tokens},{width}}}, "
        f"int64[4] ts = {{1,{heads},{width},{tokens}}}, float scale = {{{scale}}}, float root = {{{root}}}"
    )
    split = "q0 = Reshape(q, qs) qh = Transpose<perm=[0,2,1,3]>(q0) k0 = Reshape(k, ks) v0 = Reshape(v, ks) "
    if repeat == 1:
        keys = "kh = Transpose<perm=[0,2,1,3]>(k0) vh = Transpose<perm=[0,2,1,3]>(v0) "
        keys_direct = "kt = Transpose<perm=[0,2,3,1]>(k0) vh = Transpose<perm=[0,2,1,3]>(v0) "
    else:
        keys = (
            "k1 = Transpose<perm=[0,2,1,3]>(k0) k2 = Unsqueeze(k1, two) k3 = Expand(k2, es) kh = Reshape(k3, hs) "
            "v1 = Transpose<perm=[0,2,1,3]>(v0) v2 = Unsqueeze(v1, two) v3 = Expand(v2, es) vh = Reshape(v3, hs) "
        )
        keys_direct = keys + "kt = Transpose<perm=[0,1,3,2]>(kh) "
    dynamo_transpose = "f = Reshape(kh, fs) g = Transpose<perm=[0,2,1]>(f) kt = Reshape(g, ts) "
    add = "" if mask is None else "m = Add(s, mask) "
    last = "s" if mask is None else "m"
    end = f"p = Softmax<axis=-1>({last}) c = MatMul(p, vh) o = Transpose<perm=[0,2,1,3]>(c) y = Reshape(o, os)"
    both = "qm = Mul(qh, root) km = Mul(kt, root) s = MatMul(qm, km) "
    masked = "" if mask is None else ", mask"
    heads_of = f"q_num_heads={heads}, kv_num_heads={kv_heads}, scale={scale}"
    flat = f"y = Attention<{heads_of}>(q, k, v{masked})"
    four = (
        f"{split} kh = Transpose<perm=[0,2,1,3]>(k0) vh = Transpose<perm=[0,2,1,3]>(v0) "
        f"c = Attention<scale={scale}>(qh, kh, vh{masked}) o = Transpose<perm=[0,2,1,3]>(c) y = Reshape(o, os)"
    )
    forms = {
        "torch dynamo": Form(f"{split}{keys}{dynamo_transpose}{both}{add}{end}", constants=shapes),
        "torchscript": Form(f"{split}{keys_direct}{both}{add}{end}", constants=shapes),
        "scale on q": Form(f"{split}{keys_direct} qm = Mul(qh, scale) s = MatMul(qm, kt) {add}{end}", constants=shapes),
        "scale on product": Form(
            f"{split}{keys_direct} r = MatMul(qh, kt) s = Mul(r, scale) {add}{end}", constants=shapes
        ),
        "Attention 3-D, opset 23": Form(flat, 23, shapes),
        "Attention 3-D, opset 24": Form(flat, 24, shapes),
        "Attention 4-D, opset 23": Form(four, 23, shapes),
    }
    if mask == "causal":
        forms["Attention 3-D is_causal"] = Form(f"y = Attention<{heads_of}, is_causal=1>(q, k, v)", 23, shapes)
        forms["Attention 4-D is_causal"] = Form(
            f"{split} kh = Transpose<perm=[0,2,1,3]>(k0) vh = Transpose<perm=[0,2,1,3]>(v0) "
            f"c = Attention<scale={scale}, is_causal=1>(qh, kh, vh) o = Transpose<perm=[0,2,1,3]>(c) "
            "y = Reshape(o, os)",
            23,
            shapes,
        )
    if repeat > 1:
        groups = (
            f"int64[4] gq = {{1,{kv_heads},{repeat * tokens},{width}}}, "
            f"int64[5] gm = {{1,{kv_heads},{repeat},{tokens},{tokens}}}, "
            f"int64[4] gs = {{1,{kv_heads},{repeat * tokens},{tokens}}}, {shapes}"
        )
        to_scores = "s0 = MatMul(qg, kt) s1 = Mul(s0, scale) "
        soft = (
            "p = Softmax<axis=-1>(s1) "
            if mask is None
            else "s2 = Reshape(s1, gm) m = Add(s2, mask) p0 = Softmax<axis=-1>(m) p = Reshape(p0, gs) "
        )
        forms["grouped rows, no repeat"] = Form(
            f"{split} kt = Transpose<perm=[0,2,3,1]>(k0) vh = Transpose<perm=[0,2,1,3]>(v0) qg = Reshape(qh, gq) "
            f"{to_scores}{soft} c = MatMul(p, vh) d = Reshape(c, hs) o = Transpose<perm=[0,2,1,3]>(d) "
            "y = Reshape(o, os)",
            constants=groups,
        )
    inputs: dict[str, Shape] = {
        "q": (1, tokens, heads * width),
        "k": (1, tokens, kv_heads * width),
        "v": (1, tokens, kv_heads * width),
    }
    weights: dict[str, Shape] = {}
    if mask == "add":
        inputs["mask"] = (1, 1, tokens, tokens)
    elif mask == "causal":
        weights["mask"] = (1, 1, tokens, tokens)
    return Family(
        f"{about}, {tokens} tokens, {heads}/{kv_heads} heads of {width}",
        inputs,
        (1, tokens, heads * width),
        forms,
        weights,
    )


def _packed_attention(about: str, batch: int, tokens: int, heads: int, width: int) -> Family:
    """Attention behind one projection to queries, keys and values (timm): permute and unbind, or Split.

    Args:
        about: what it stands for.
        batch: number of sequences.
        tokens: sequence length.
        heads: number of heads.
        width: size of one head.
    """
    features, scale = heads * width, width**-0.5
    constants = (
        f"int64[5] ps = {{{batch},{tokens},3,{heads},{width}}}, int64[3] parts = {{{features},{features},{features}}}, "
        f"int64[3] ones = {{1,1,1}}, int64[1] zero = {{0}}, int64[3] os = {{{batch},{tokens},{features}}}, "
        f"float scale = {{{scale}}}"
    )
    project = "m = MatMul(x, w) qkv = Add(m, bias) "
    unbind = (
        f"{project} r = Reshape(qkv, ps) t = Transpose<perm=[2,0,3,1,4]>(r) a, b, c = Split<axis=0>(t, ones) "
        "q = Squeeze(a, zero) k = Squeeze(b, zero) v = Squeeze(c, zero) "
    )
    join = "j = Transpose<perm=[0,2,1,3]>(o) y = Reshape(j, os)"
    heads_of = f"q_num_heads={heads}, kv_num_heads={heads}, scale={scale}"
    forms = {
        "permute and unbind (timm)": Form(
            f"{unbind} kt = Transpose<perm=[0,1,3,2]>(k) qs = Mul(q, scale) s = MatMul(qs, kt) "
            f"p = Softmax<axis=-1>(s) o = MatMul(p, v) {join}",
            constants=constants,
        ),
        "Attention 4-D": Form(f"{unbind} o = Attention<scale={scale}>(q, k, v) {join}", 23, constants),
        "Split, Attention 3-D": Form(
            f"{project} q, k, v = Split<axis=2>(qkv, parts) y = Attention<{heads_of}>(q, k, v)", 23, constants
        ),
    }
    shape = (batch, tokens, features)
    return Family(
        f"{about}, batch {batch}, {tokens} tokens, {heads} heads of {width}",
        {"x": shape},
        shape,
        forms,
        {"w": (features, 3 * features), "bias": (3 * features,)},
    )


FAMILIES |= {
    "attention-packed-vit": _packed_attention("ViT-S packed projection and attention", 1, 197, 6, 64),
    "attention-packed-short": _packed_attention("short sequences, packed projection and attention", 4, 16, 12, 64),
    "attention-packed-batch": _packed_attention("narrow ViT, packed projection and attention", 4, 197, 3, 64),
    "attention-vit": _attention("ViT-S self-attention, no mask", 197, 6, 64, 6, None),
    "attention-bert": _attention("BERT-base self-attention, added mask", 128, 12, 64, 12, "add"),
    "attention-llama": _attention("LLaMA-like grouped-query attention, constant mask", 128, 16, 64, 4, "causal"),
    "attention-llama-add": _attention("LLaMA-like grouped-query attention, mask input", 128, 16, 64, 4, "add"),
}


_NORM_CONSTANTS = (
    "int64[1] last = {-1}, float eps = {1e-5}, float two = {2}, float minus_half = {-0.5}, float half = {0.5}"
)
_LAYER_NORM = {
    "Pow, Sqrt, Div (torch)": Form(
        "a = ReduceMean(x, last) d = Sub(x, a) e = Pow(d, two) v = ReduceMean(e, last) f = Add(v, eps) s = Sqrt(f) "
        "n = Div(d, s) m = Mul(n, w) y = Add(m, b)",
        constants=_NORM_CONSTANTS,
    ),
    "Mul, Reciprocal, two-term (keras)": Form(
        "a = ReduceMean(x, last) d = Sub(x, a) e = Mul(d, d) v = ReduceMean(e, last) f = Add(v, eps) s = Sqrt(f) "
        "r = Reciprocal(s) g = Mul(r, w) p = Mul(x, g) h = Mul(a, g) q = Sub(b, h) y = Add(p, q)",
        constants=_NORM_CONSTANTS,
    ),
    "LayerNormalization": Form("y = LayerNormalization<epsilon=1e-5>(x, w, b)"),
}
_RMS_NORM = {
    "Pow, Sqrt, Reciprocal (torch)": Form(
        "e = Pow(x, two) v = ReduceMean(e, last) f = Add(v, eps) s = Sqrt(f) r = Reciprocal(s) n = Mul(x, r) "
        "y = Mul(n, w)",
        constants=_NORM_CONSTANTS,
    ),
    "weight first (HF)": Form(
        "e = Pow(x, two) v = ReduceMean(e, last) f = Add(v, eps) s = Sqrt(f) r = Reciprocal(s) n = Mul(x, r) "
        "y = Mul(w, n)",
        constants=_NORM_CONSTANTS,
    ),
    "Sqrt, Div": Form(
        "e = Pow(x, two) v = ReduceMean(e, last) f = Add(v, eps) s = Sqrt(f) n = Div(x, s) y = Mul(n, w)",
        constants=_NORM_CONSTANTS,
    ),
    "Mul, Pow -0.5": Form(
        "e = Mul(x, x) v = ReduceMean(e, last) f = Add(v, eps) r = Pow(f, minus_half) n = Mul(x, r) y = Mul(n, w)",
        constants=_NORM_CONSTANTS,
    ),
    "RMSNormalization (opset 23)": Form("y = RMSNormalization<epsilon=1e-5>(x, w)", 23),
}
_GROUPS = "int64[3] flat = {0, 8, -1}, int64[4] full = {1, 64, 28, 28}, int64[3] norm = {1, 8, 6272}"
_GROUP_NORM = {
    "InstanceNormalization (torch)": Form(
        "f = Reshape(x, flat) i = InstanceNormalization<epsilon=1e-5>(f, ones, zeros) r = Reshape(i, full) "
        "m = Mul(r, w) y = Add(m, b)",
        constants=f"{_GROUPS}, float[8] ones = {{1,1,1,1,1,1,1,1}}, float[8] zeros = {{0,0,0,0,0,0,0,0}}",
    ),
    "LayerNormalization over groups": Form(
        "f = Reshape(x, flat) i = LayerNormalization<epsilon=1e-5>(f, g) r = Reshape(i, full) m = Mul(r, w) "
        "y = Add(m, b)",
        constants=_GROUPS,
    ),
    "GroupNormalization (opset 21)": Form(
        "y = GroupNormalization<epsilon=1e-5, num_groups=8>(x, w1, b1)", constants=_GROUPS
    ),
}
_TOKENS = (1, 197, 384)
FAMILIES |= {
    "layer-norm": Family(
        f"LayerNorm over the last axis of {list(_TOKENS)}",
        {"x": _TOKENS},
        _TOKENS,
        _LAYER_NORM,
        {"w": (384,), "b": (384,)},
    ),
    "rms-norm": Family(
        f"RMSNorm over the last axis of {list(_TOKENS)}", {"x": _TOKENS}, _TOKENS, _RMS_NORM, {"w": (384,)}
    ),
    "group-norm": Family(
        "GroupNorm, 8 groups of [1,64,28,28]",
        {"x": (1, 64, 28, 28)},
        (1, 64, 28, 28),
        _GROUP_NORM,
        {"w": (64, 1, 1), "b": (64, 1, 1), "w1": (64,), "b1": (64,), "g": (6272,)},
    ),
}
_SKIP = {
    "Add (exporters)": Form("s = Add(x, z) y = LayerNormalization<axis=-1, epsilon=1e-5>(s, w, b)"),
    "Sum": Form("s = Sum(x, z) y = LayerNormalization<axis=-1, epsilon=1e-5>(s, w, b)"),
}
FAMILIES |= {
    f"skip-{tokens}x{width}": Family(
        f"residual sum and LayerNorm of {tokens} tokens",
        {"x": (1, tokens, width), "z": (1, tokens, width)},
        (1, tokens, width),
        _SKIP,
        {"w": (width,), "b": (width,)},
    )
    for tokens, width in ((1, 768), (128, 768), (197, 384), (3136, 96))
}


def _encoder_layer(about: str, tokens: int, heads: int, width: int, *, opset: int, fused: bool) -> Form:
    """A pre-norm encoder layer, with or without the Attention op: what the opset and the op cost in context."""
    size = heads * width
    constants = (
        f"int64[4] qs = {{1,{tokens},{heads},{width}}}, int64[3] os = {{1,{tokens},{size}}}, "
        f"float scale = {{{width**-0.5}}}"
    )
    attention = (
        f"c = Attention<q_num_heads={heads}, kv_num_heads={heads}, scale={width**-0.5}>(q, k, v)"
        if fused
        else "q0 = Reshape(q, qs) qh = Transpose<perm=[0,2,1,3]>(q0) k0 = Reshape(k, qs) v0 = Reshape(v, qs) "
        "kt = Transpose<perm=[0,2,3,1]>(k0) vh = Transpose<perm=[0,2,1,3]>(v0) r = MatMul(qh, kt) s = Mul(r, scale) "
        "p = Softmax<axis=-1>(s) h = MatMul(p, vh) o = Transpose<perm=[0,2,1,3]>(h) c = Reshape(o, os)"
    )
    return Form(
        "n = LayerNormalization(x, g1, b1) qm = MatMul(n, wq) q = Add(qm, bq) km = MatMul(n, wk) k = Add(km, bk) "
        f"vm = MatMul(n, wv) v = Add(vm, bv) {attention} om = MatMul(c, wo) ob = Add(om, bo) x1 = Add(x, ob) "
        "n1 = LayerNormalization(x1, g2, b2) um = MatMul(n1, wu) u = Add(um, bu) a = Gelu(u) dm = MatMul(a, wd) "
        "d = Add(dm, bd) y = Add(x1, d)",
        opset,
        constants,
    )


def _encoder(tokens: int, heads: int, width: int) -> Family:
    size = heads * width
    vectors = dict.fromkeys(("g1", "b1", "g2", "b2", "bq", "bk", "bv", "bo", "bd"), (size,))
    matrices = dict.fromkeys(("wq", "wk", "wv", "wo"), (size, size))
    forms = {
        f"{'Attention' if fused else 'primitives'}, opset {opset}": _encoder_layer(
            "", tokens, heads, width, opset=opset, fused=fused
        )
        for opset, fused in ((21, False), (23, False), (23, True), (24, True))
    }
    return Family(
        f"encoder layer, {tokens} tokens, {heads} heads of {width}",
        {"x": (1, tokens, size)},
        (1, tokens, size),
        forms,
        vectors | matrices | {"bu": (4 * size,), "wu": (size, 4 * size), "wd": (4 * size, size)},
    )


FAMILIES |= {"encoder-vit": _encoder(197, 6, 64), "encoder-bert": _encoder(128, 12, 64)}


def _convolutions(opset: int) -> Form:
    """A small residual network: whether onnxruntime's convolution fusions know the operators of an opset."""
    return Form(
        "a = Conv<pads=[1,1,1,1]>(x, w1, b1) r = Relu(a) p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r) "
        "c = Conv<pads=[1,1,1,1]>(p, w2, b1) d = Add(c, p) e = Relu(d) f = Conv(e, w3, b1) "
        "h = HardSigmoid(f) g = GlobalAveragePool(h) y = Flatten(g)",
        opset,
    )


FAMILIES |= {
    "attention-long": _attention("long self-attention, no mask", 1024, 6, 64, 6, None),
    "attention-short": _attention("short self-attention, added mask", 16, 12, 64, 12, "add"),
    "attention-tiny": _attention("tiny self-attention, no mask", 50, 3, 16, 3, None),
    "opset-conv": Family(
        "small residual network [1,32,56,56]",
        {"x": (1, 32, 56, 56)},
        (1, 32),
        {f"opset {opset}": _convolutions(opset) for opset in (21, 22, 23, 24)},
        {"w1": (32, 32, 3, 3), "w2": (32, 32, 3, 3), "w3": (32, 32, 1, 1), "b1": (32,)},
    ),
}
