"""The fuse-* passes on what torch's two exporters write: everything is found, and the outputs stay."""

from __future__ import annotations

import collections
import io
import logging
import warnings
from collections.abc import Callable
from functools import cache

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.ir.canonical import canonicalize
from graphopt.ir.compare import within_exact
from graphopt.ir.session import open_session
from graphopt.passes.contract import Context
from graphopt.passes.eliminate_identity import EliminateIdentity
from graphopt.passes.fuse_activations import FuseActivations
from graphopt.passes.fuse_attention import FuseAttention
from graphopt.passes.fuse_normalization import FuseNormalization

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

_EXPORTERS = ("dynamo", "torchscript")


def _export(
    module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], exporter: str, dynamic: dict[int, str] | None = None
) -> ir.Model:
    """The canonical form of an export; `dynamic` names the open axes, the same of every input."""
    shapes = None if dynamic is None else (dynamic,) * len(inputs)
    names = [f"input_{index}" for index in range(len(inputs))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            if exporter == "dynamo":
                program = torch.onnx.export(module.eval(), inputs, dynamo=True, verbose=False, dynamic_shapes=shapes)
                assert program is not None
                return canonicalize(ir.from_proto(program.model_proto))
            buffer = io.BytesIO()
            axes = None if dynamic is None else dict.fromkeys(names, dynamic)
            torch.onnx.export(module.eval(), inputs, buffer, dynamo=False, input_names=names, dynamic_axes=axes)
        finally:
            logging.disable(level)
    return canonicalize(ir.from_proto(onnx.load_from_string(buffer.getvalue())))


def _fused(model: ir.Model, inputs: tuple[torch.Tensor, ...]) -> collections.Counter[str]:
    """Operator counts after the three passes; the outputs must be those of before."""
    feeds = {value.name or "": tensor.numpy() for value, tensor in zip(model.graph.inputs, inputs, strict=True)}
    expected = open_session(model, optimized=False).run_feeds(feeds)
    context = Context()
    changed = model.clone()
    for pass_ in (EliminateIdentity(), FuseAttention(), FuseNormalization(), FuseActivations()):
        pass_.run(changed, context)
    onnx.checker.check_model(ir.to_proto(changed), full_check=True)
    for optimized in (False, True):
        assert within_exact(expected, open_session(changed, optimized=optimized).run_feeds(feeds))
    assert [value.name for value in changed.graph.outputs] == [value.name for value in model.graph.outputs]
    return collections.Counter(node.op_type for node in changed.graph)


class _Attend(torch.nn.Module):
    """Projections around scaled_dot_product_attention."""

    def __init__(self, kv_heads: int = 4, causal: bool = False) -> None:
        super().__init__()
        self.kv_heads, self.causal = kv_heads, causal
        self.query = torch.nn.Linear(32, 32)
        self.key_value = torch.nn.Linear(32, 16 * kv_heads)
        self.out = torch.nn.Linear(32, 32)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        batch, tokens, _ = x.shape
        q = self.query(x).view(batch, tokens, 4, 8).transpose(1, 2)
        k, v = self.key_value(x).chunk(2, dim=-1)
        k = k.view(batch, tokens, self.kv_heads, 8).transpose(1, 2)
        v = v.view(batch, tokens, self.kv_heads, 8).transpose(1, 2)
        y = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self.causal, enable_gqa=self.kv_heads != 4
        )
        return self.out(y.transpose(1, 2).reshape(batch, tokens, 32))


class _Heads(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class _Written(torch.nn.Module):
    """Activations and norms written out by hand, as model code does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(32) + 0.5)
        self.bias = torch.nn.Parameter(torch.rand(32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 0.5 * (1.0 + torch.erf(x * 0.7071067811865476))
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + 1e-6) * self.weight + self.bias
        x = 0.5 * x * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))
        x = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        x = x * torch.nn.functional.relu6(x + 3) / 6
        return x * torch.tanh(torch.nn.functional.softplus(x))


def _boolean() -> torch.Tensor:
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
    mask[1, :, 2] = False  # one query that may see nothing
    return mask


@cache
def _tokens() -> torch.Tensor:
    return torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))


_ATTENTIONS: dict[str, Callable[[], tuple[torch.nn.Module, tuple[torch.Tensor, ...]]]] = {
    "plain": lambda: (_Attend(), (_tokens(),)),
    "causal": lambda: (_Attend(causal=True), (_tokens(),)),
    "float mask": lambda: (_Attend(), (_tokens(), torch.randn(1, 1, 6, 6))),
    "boolean mask": lambda: (_Attend(), (_tokens(), _boolean())),
    "multi-head": lambda: (_Heads(), (_tokens(),)),
}


@pytest.mark.parametrize("exporter", _EXPORTERS)
@pytest.mark.parametrize("name", _ATTENTIONS)
def test_attention_is_fused(name: str, exporter: str) -> None:
    module, inputs = _ATTENTIONS[name]()
    counts = _fused(_export(module, inputs, exporter), inputs)
    assert counts["Attention"] == 1
    assert counts["Softmax"] == counts["IsNaN"] == 0


def test_grouped_queries_are_read_before_they_are_repeated() -> None:
    inputs = (_tokens(),)
    counts = _fused(_export(_Attend(kv_heads=2), inputs, "dynamo"), inputs)
    assert counts["Attention"] == 1
    assert counts["Expand"] == counts["Transpose"] == 0


@pytest.mark.parametrize("exporter", _EXPORTERS)
def test_written_activations_and_norms_are_fused(exporter: str) -> None:
    inputs = (_tokens(),)
    counts = _fused(_export(_Written(), inputs, exporter), inputs)
    assert counts["Gelu"] == 2
    assert counts["LayerNormalization"] == counts["HardSigmoid"] == counts["ReduceMean"] == counts["Pow"] == 1
    assert counts["Erf"] == counts["Tanh"] == counts["Softplus"] == counts["Reciprocal"] == 0


def test_half_precision_attention_is_declined() -> None:
    inputs = (_tokens().half(),)
    model = _export(_Attend().half(), inputs, "dynamo")
    context = Context()
    result = FuseAttention().run(model, context)
    assert not result.modified
    assert "unless float32" in str(context.remarks[0])


def test_half_precision_rms_norm_keeps_its_outputs() -> None:
    class Norm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.rand(32).half() + 0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.float()
            y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
            return self.weight * y.to(x.dtype)

    inputs = (_tokens().half(),)
    counts = _fused(_export(Norm(), inputs, "dynamo"), inputs)
    assert counts["Div"] == 1
    assert counts["Reciprocal"] == 0


_OPEN = {0: "batch", 1: "sequence"}
_SIZES = [(1, 1), (1, 6), (3, 1), (2, 9), (4, 4), (4, 8), (8, 4)]
"""Batch and sequence; equal ones, ones that divide each other, and 1 are where names could be mixed up."""


def _fused_at_sizes(model: ir.Model, feeds: Callable[[int, int], dict[str, np.ndarray]]) -> ir.Model:
    """The model with attention fused, whose outputs are those of before at every size."""
    changed = model.clone()
    context = Context()
    for pass_ in (EliminateIdentity(), FuseAttention()):
        pass_.run(changed, context)
    assert not [remark for remark in context.remarks if remark.what == "fuse attention"]
    onnx.checker.check_model(ir.to_proto(changed), full_check=True)
    reference, fused = open_session(model, optimized=False), open_session(changed)
    for batch, sequence in _SIZES:
        inputs = feeds(batch, sequence)
        assert within_exact(reference.run_feeds(inputs), fused.run_feeds(inputs)), (batch, sequence)
    return changed


class _Packed(torch.nn.Module):
    """Attention behind one projection, as timm and others write it."""

    def __init__(self, split: str) -> None:
        super().__init__()
        self.project, self.split = torch.nn.Linear(32, 96), split

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        if self.split == "chunk":
            parts = [part.reshape(batch, tokens, 4, 8).transpose(1, 2) for part in self.project(x).chunk(3, -1)]
            q, k, v = parts
        else:
            q, k, v = self.project(x).reshape(batch, tokens, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        if self.split == "eager":
            attended = ((q * 8**-0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        else:
            attended = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return attended.transpose(1, 2).reshape(batch, tokens, width)


@pytest.mark.parametrize("exporter", _EXPORTERS)
@pytest.mark.parametrize("split", ["chunk", "unbind", "eager"])
def test_packed_projections_with_dynamic_batch_and_tokens(split: str, exporter: str) -> None:
    random = np.random.default_rng(0)
    model = _export(_Packed(split), (torch.randn(2, 7, 32),), exporter, _OPEN)
    name = model.graph.inputs[0].name or ""
    changed = _fused_at_sizes(
        model, lambda batch, tokens: {name: random.standard_normal((batch, tokens, 32), dtype=np.float32)}
    )
    counts = collections.Counter(node.op_type for node in changed.graph)
    assert counts["Softmax"] == counts["Transpose"] == 0
    assert counts["Attention"] == 1
    assert counts["Split"] + counts["Slice"] in (1, 3)  # torchscript writes chunk as three slices


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("exporter", _EXPORTERS)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_transformers_with_dynamic_batch_and_tokens(name: str, attention: str, exporter: str) -> None:
    module, inputs = _transformer(name, attention, exporter)
    model = _export(module, inputs, exporter, _OPEN)
    ids, *masks = (value.name or "" for value in model.graph.inputs)
    random = np.random.default_rng(0)

    def feeds(batch: int, sequence: int) -> dict[str, np.ndarray]:
        mask = np.ones((batch, sequence), dtype=np.int64)
        mask[1:2, 2:] = 0
        return {ids: random.integers(0, 50, (batch, sequence)), **dict.fromkeys(masks, mask)}

    changed = _fused_at_sizes(model, feeds)
    attentions = [node for node in changed.graph if node.op_type == "Attention"]
    assert len(attentions) == 2
    assert all(("q_num_heads" in node.attributes) == (name != "llama") for node in attentions)  # rotated heads are 4-D


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("exporter", _EXPORTERS)
@pytest.mark.parametrize("name", ["bert", "vit", "gpt2", "llama"])
def test_transformers(name: str, attention: str, exporter: str) -> None:
    module, inputs = _transformer(name, attention, exporter)
    counts = _fused(_export(module, inputs, exporter), inputs)
    assert counts["Attention"] == 2
    assert counts["Softmax"] == counts["Erf"] == counts["ReduceMean"] == 0
    assert counts["RMSNormalization" if name == "llama" else "LayerNormalization"] == 5


def _transformer(name: str, attention: str, exporter: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """A tiny model of the family with two layers, and inputs of it; skips what cannot be exported."""
    if name == "gpt2" and exporter == "torchscript":
        pytest.skip("torch's older exporter does not know aten::diff, which GPT-2 calls")
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "attn_implementation": attention,
    }
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 50, (2, 7)))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    inputs: tuple[torch.Tensor, ...]
    if name == "bert":
        config = transformers.BertConfig(vocab_size=50, max_position_embeddings=16, **sizes)
        module, inputs = transformers.BertModel(config), (ids, mask)
    elif name == "vit":
        config = transformers.ViTConfig(image_size=16, patch_size=4, **sizes)
        module, inputs = transformers.ViTModel(config), (torch.randn(2, 3, 16, 16),)
    elif name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=50,
            n_positions=16,
            n_embd=32,
            n_layer=2,
            n_head=4,
            use_cache=False,
            attn_implementation=attention,
        )
        module, inputs = transformers.GPT2Model(config), (ids,)
    else:
        config = transformers.LlamaConfig(
            vocab_size=50, num_key_value_heads=2, use_cache=False, max_position_embeddings=16, **sizes
        )
        module, inputs = transformers.LlamaModel(config), (ids, mask)

    class First(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return (module(ids) if mask is None else module(ids, mask))[0]

    return First(), inputs
