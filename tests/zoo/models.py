"""The zoo by name, and its cache: `zoo_model(name)` gives a canonical model, `NAMES` lists them all."""

from __future__ import annotations

import hashlib
import importlib
import re
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / ".cache" / "zoo"

FILES: dict[str, tuple[str, ...]] = {
    "convolutional": (
        "resnet", "mobilenet-v2", "mobilenet-v3", "efficientnet", "convnext", "densenet", "inception", "repvgg",
        "unet", "pixel-shuffle", "channel-shuffle", "conv-1d-3d",
    ),
    "sequential": ("vit", "bert", "llama", "swin", "recurrent", "mlp"),
    "convnets": (
        "resnet-padded-shortcut", "resnet-projected-shortcut", "resnet-bottleneck", "resnext", "mobilenet-v1",
        "shufflenet-v1", "shufflenet-v2", "regnet", "vgg", "squeezenet", "ghostnet", "res2net", "dual-path", "resnest",
        "local-response", "prelu",
    ),
    "gating": (
        "selective-kernel", "cbam", "eca", "coordinate-attention", "non-local", "global-context", "glu", "gated-conv",
        "cond-conv", "mixed-linear", "weight-norm", "weight-standardized", "hyper-conv", "depthwise-multiplier",
        "grouped-transpose", "static-shuffle", "grouped-linear", "maxout",
    ),
    "detection": (
        "fpn", "retinanet", "ssd", "yolo-c2f", "yolo-csp", "dfl-head", "hrnet", "siamese", "siamese-depthwise",
        "deformable-grid", "raft", "centre-points",
    ),
    "restoration": (
        "deeplab", "edsr", "espcn", "imdn", "space-to-depth", "kernel-prediction", "generator", "modulated-conv",
        "unet-groupnorm", "wavenet", "unet-3d", "temporal-shift",
    ),
    "mixing": (
        "swin-t", "spatial-linear", "conv-mixer", "capsules", "vector-quantizer", "net-vlad", "point-net", "graph-conv",
        "nerf", "dlrm", "coupling-flow",
    ),
    "odd": (
        "shared-thrice", "conv-and-linear", "tied-autoencoder", "parameter-output", "two-outputs", "nested-outputs",
        "torch-cond", "scalars-only", "any-size", "word-bag", "batch-concat", "input-residual", "channels-last",
        "bilinear-pooling", "channel-order", "low-rank", "repeated-channels", "strided-channels", "masked-channels",
    ),
    "graphs": (
        "if-weights", "if-captures", "loop-weights", "loop-captures", "scan-weights", "dead-branch", "split-operators",
        "concatenated-weight", "local-functions", "deform-conv", "roi-align", "max-unpool", "lrn-operator",
        "quantized-conv", "quantized-linear",
    ),
    "transformers_vision": (
        "hf-vit", "fused-qkv-vit", "vit-attention-operator", "deit-distilled", "dinov2-swiglu", "hf-swin", "hf-swinv2",
        "pvt", "segformer", "cvt", "levit", "mobilevit", "convnext-v2", "uformer", "restormer", "detr", "mlp-mixer",
        "gmlp", "clip",
    ),
    "transformers_language": (
        "hf-bert", "roberta", "albert", "distilbert", "deberta", "modernbert", "gpt2", "opt", "bloom", "gpt-neox",
        "falcon", "phi3", "hf-llama", "qwen3", "gemma", "gemma2", "deepseek", "mixtral", "hf-mamba", "t5", "bart",
        "whisper", "wav2vec2", "moe-dense", "moe-top-k", "mamba", "einsum-attention", "interleaved-rotary",
        "relative-keys", "linear-attention", "cross-attention", "cached-attention", "torch-transformer",
    ),
    "recurrent_models": (
        "lstm-one-layer", "lstm-two-layers", "lstm-bidirectional", "lstm-time-first", "lstm-final-states",
        "lstm-projected-states", "lstm-tied", "gru", "gru-bidirectional", "rnn-tanh", "rnn-relu", "recurrent-pyramid",
        "recurrent-cells", "conv-lstm", "conv-gru", "seq2seq-additive", "seq2seq-dot", "sru", "qrnn", "min-gru", "crnn",
        "deep-speech", "tagger",
    ),
}  # fmt: skip
"""The models in each file `tests/zoo/<key>.py`, known without importing torch."""

CORE = FILES["convolutional"] + FILES["sequential"]
"""The models that everything is tested with; the others are for the tests of structure."""

NAMES = tuple(name for names in FILES.values() for name in names)
"""Every model of the zoo."""

_SLOW = {
    # Exported within seconds each, and close to another that is not: they run with the slow tests.
    "dual-path", "resnest", "ghostnet", "res2net", "regnet", "selective-kernel", "cbam", "coordinate-attention",
    "global-context", "mixed-linear", "retinanet", "ssd", "yolo-csp", "hrnet", "deformable-grid", "centre-points",
    "deeplab", "generator", "modulated-conv", "capsules", "vector-quantizer", "net-vlad", "nerf", "dlrm",
    "siamese-depthwise", "unet-3d", "temporal-shift", "conv-mixer", "point-net", "graph-conv", "bilinear-pooling",
    "channels-last", "low-rank", "espcn", "squeezenet", "channel-order", "tied-autoencoder", "nested-outputs",
}  # fmt: skip
_QUICK_TRANSFORMERS = {
    "fused-qkv-vit", "vit-attention-operator", "hf-vit", "mlp-mixer", "gmlp", "hf-bert", "gpt2", "hf-llama",
    "moe-top-k", "moe-dense", "einsum-attention", "interleaved-rotary", "relative-keys", "linear-attention",
    "cross-attention", "cached-attention", "lstm-time-first", "lstm-projected-states", "gru", "rnn-tanh", "conv-lstm",
    "sru", "qrnn",
}  # fmt: skip
_HEAVY = {*FILES["transformers_vision"], *FILES["transformers_language"], *FILES["recurrent_models"]}

QUICK = tuple(name for name in NAMES if name in _QUICK_TRANSFORMERS or name not in _SLOW | _HEAVY)
"""The models whose exports the fast tests can afford; every structure is there once."""

_SHARED = ("entry.py", "blocks.py")
"""Sources on which every export depends; besides these, no file of the zoo imports another one."""
_USUAL_SIZES = {"batch": 2, "batch_size": 2, "sequence": 12, "sequence_length": 12}
_USUAL_RANGES = {"token_type_ids": 2, "trips": 5}
"""Integers below this number by name of the input, below 100 for all others."""


@cache
def _file(name: str) -> Path:
    """The exported model; the cache key is the source of its file and the version of torch."""
    import torch
    from filelock import FileLock

    module = next(file for file, names in FILES.items() if name in names)
    sources = [(HERE / source).read_bytes() for source in (*_SHARED, f"{module}.py")]
    key = hashlib.sha256(b"".join(sources) + torch.__version__.encode()).hexdigest()[:16]
    path = CACHE / key / f"{name}.onnx"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():  # another process may have exported it while this one waited
            from graphopt.export.write import save
            from tests.zoo.entry import export

            save(export(importlib.import_module(f"tests.zoo.{module}").ENTRIES[name]), path)
    return path


def zoo_model(name: str) -> ir.Model:
    """A fresh copy of the canonical graph, exported with BatchNormalization kept."""
    from graphopt.ir.load import load

    return load(_file(name))


def zoo_feeds(model: ir.Model, *, scale: int = 1, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs; dynamic dimensions have 2 elements (batch), 12 (sequence) or 16 (others), times `scale`.

    Masks (booleans, and inputs whose name ends in `mask`) are mostly true, and their first column always is.
    """
    rng = np.random.default_rng(seed)
    feeds: dict[str, np.ndarray] = {}
    for value in model.graph.inputs:
        name, dtype = value.name or "", (value.dtype or ir.DataType.FLOAT).numpy()
        shape = [size if isinstance(size, int) else _elements(str(size), scale) for size in value.shape or ()]
        if dtype == np.bool_ or name.endswith("mask"):
            mask = np.array(rng.random(shape) < 0.75)
            if mask.ndim:
                mask[..., :1] = True
            feeds[name] = mask.astype(dtype)
        elif np.issubdtype(dtype, np.integer):
            feeds[name] = rng.integers(0, _USUAL_RANGES.get(name, 100), shape).astype(dtype)
        else:
            feeds[name] = np.asarray(rng.standard_normal(shape)).astype(dtype)
    return feeds


def _elements(size: str, scale: int) -> int:
    """How large a dynamic dimension is to be; it may be an expression, as in `past + sequence`."""
    from graphopt.ir.dimensions import evaluate

    symbols = re.findall(r"[A-Za-z_]\w*", size)
    return evaluate(size, {symbol: _USUAL_SIZES.get(symbol, 16) * scale for symbol in symbols}) or 16 * scale
