"""Rows of attention: both products count in full, a causal mask skips nothing; softmax and rotation are 0."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from graphopt.ir.ops.channels import attention as channels
from graphopt.ir.ops.families import MICROSOFT, elements, no_macs, same_shape, unary
from graphopt.ir.ops.row import OpRow, Shape, Site, TorchFunction, UnknownShapeError


@dataclass(frozen=True)
class Heads:
    """The sizes of one attention: `heads` query heads, `shared` key and value heads (fewer in GQA)."""

    batch: int
    heads: int
    shared: int
    queries: int
    keys: int
    width: int
    value_width: int

    @property
    def macs(self) -> int:
        """Products of Q K^T and of P V."""
        return self.batch * self.heads * self.queries * self.keys * (self.width + self.value_width)

    @property
    def shapes(self) -> list[Shape]:
        """[batch, queries, heads * value width] and the present key and value, heads second."""
        return [
            (self.batch, self.queries, self.heads * self.value_width),
            (self.batch, self.shared, self.keys, self.width),
            (self.batch, self.shared, self.keys, self.value_width),
            (self.batch, self.heads, self.queries, self.keys),
        ]


def _optional_shape(site: Site, index: int) -> Shape | None:
    return site.inputs[index] if index < len(site.inputs) else None


def _past_length(site: Site, index: int, axis: int = 2) -> int:
    if index >= len(site.node.inputs) or site.node.inputs[index] is None:
        return 0
    return site.input_shape(index)[axis]


def standard_heads(site: Site) -> Heads:
    """ONNX Attention 23 to 25: Q, K, V as [batch, heads, length, width] or [batch, length, heads * width]."""
    query, key, value = (site.input_shape(index) for index in range(3))
    past = _past_length(site, 4)
    if len(query) == 4:
        return Heads(query[0], query[1], key[1], query[2], past + key[2], query[3], value[3])
    heads = _count(site, "q_num_heads")
    shared = _count(site, "kv_num_heads")
    return Heads(query[0], heads, shared, query[1], past + key[1], query[2] // heads, value[2] // shared)


def multi_head_heads(site: Site) -> Heads:
    """com.microsoft MultiHeadAttention; packed as [batch, length, heads, 3, width] (QKV) or with 2 (KV)."""
    heads = _count(site, "num_heads")
    query, key, value = site.input_shape(0), _optional_shape(site, 1), _optional_shape(site, 2)
    past = _past_length(site, 6)
    if len(query) == 5:
        return Heads(query[0], heads, heads, query[1], past + query[1], query[4], query[4])
    width = query[2] // heads
    if key is None:
        raise UnknownShapeError(site.node, "input 1")
    if len(key) == 5:
        return Heads(query[0], heads, heads, query[1], past + key[1], width, key[4])
    if value is None:
        raise UnknownShapeError(site.node, "input 2")
    if len(key) == 4:
        return Heads(query[0], heads, heads, query[1], key[2], width, value[3])
    return Heads(query[0], heads, heads, query[1], past + key[1], width, value[2] // heads)


def grouped_query_heads(site: Site) -> Heads:
    """com.microsoft GroupQueryAttention; without a key input, Q K V lie behind one another in the query.

    The past buffer may be longer than what is filled: total_sequence_length (input 6) says how many keys
    count.
    """
    heads, shared = _count(site, "num_heads"), _count(site, "kv_num_heads")
    query = site.input_shape(0)
    packed = site.node.inputs[1] is None
    width = query[2] // (heads + 2 * shared if packed else heads)
    total = site.constants[6] if len(site.constants) > 6 else None
    keys = _past_length(site, 3) + query[1] if total is None else int(total.reshape(()))
    return Heads(query[0], heads, shared, query[1], keys, width, width)


def attention_macs(site: Site) -> int:
    """Batch x heads x queries x keys x (key width + value width)."""
    return standard_heads(site).macs


def attention_shape(site: Site) -> list[Shape]:
    """Output (packed or with heads apart, as the query), present key and value, and the scores."""
    found = standard_heads(site)
    output, *others = found.shapes
    if len(site.input_shape(0)) == 4:
        output = (found.batch, found.heads, found.queries, found.value_width)
    return [output, *others]


def multi_head_macs(site: Site) -> int:
    """Batch x heads x queries x keys x (key width + value width)."""
    return multi_head_heads(site).macs


def grouped_query_macs(site: Site) -> int:
    """Batch x heads x queries x keys x (key width + value width), keys as far as the cache is filled."""
    return grouped_query_heads(site).macs


def projected_attention_macs(site: Site, past: int) -> int:
    """Projection (batch x queries x elements of the weight), then both attention products."""
    return elements(site.input_shape(0)[:2]) * elements(site.input_shape(1)) + _projected_heads(site, past).macs


def _count(site: Site, name: str) -> int:
    """A number of heads. Raises `UnknownShapeError` where the node, which is not valid then, does not say it."""
    found = site.attribute(name)
    if found is None or int(found) < 1:
        raise UnknownShapeError(site.node, f"the heads ({name} is missing)")
    return int(found)


def _projected_heads(site: Site, past: int) -> Heads:
    """com.microsoft Attention and QAttention: X [batch, length, input], weight [input, Q + K + V]."""
    data, weight, heads = site.input_shape(0), site.input_shape(1), _count(site, "num_heads")
    sizes = site.attribute("qkv_hidden_sizes") or [weight[1] // 3] * 3
    keys = data[1] + _past_length(site, past, axis=3)
    return Heads(data[0], heads, heads, data[1], keys, sizes[0] // heads, sizes[2] // heads)


def projected_attention_shape(site: Site, past: int) -> list[Shape]:
    """[batch, length, V] and the present [2, batch, heads, keys, width]."""
    found = _projected_heads(site, past)
    return [found.shapes[0], (2, found.batch, found.heads, found.keys, found.width)]


def multi_head_shape(site: Site) -> list[Shape]:
    """Output, present key and value, and the scores."""
    return multi_head_heads(site).shapes


def grouped_query_shape(site: Site) -> list[Shape]:
    """Output and present key and value: the longer of the past buffer and the keys that count."""
    found = grouped_query_heads(site)
    length = max(_past_length(site, 3), found.keys)
    present = (found.batch, found.shared, length, found.width)
    return [found.shapes[0], present, present, (found.batch, found.heads, found.queries, length)]


_DELTA_RULES = ("delta", "gated_delta")


def linear_attention_macs(site: Site) -> int:
    """Tokens x state elements x (query heads + key heads, key heads twice for the delta rules).

    ONNX LinearAttention 27 run token by token: the outer product k v^T and, for the delta rules, the read-out
    S^T k, once a key head; the read-out q^T S once a query head. Chunked kernels do more.
    """
    tokens = elements(site.input_shape(0)[:2])
    queries, keys, width, value_width = _linear_sizes(site)
    updates = 2 if site.attribute("update_rule", "gated_delta") in _DELTA_RULES else 1
    return tokens * width * value_width * (queries + updates * keys)


def linear_attention_shape(site: Site) -> list[Shape]:
    """Output [batch, length, query heads * value width], state [batch, key heads, key width, value width]."""
    batch, length = site.input_shape(0)[:2]
    queries, keys, width, value_width = _linear_sizes(site)
    return [(batch, length, queries * value_width), (batch, keys, width, value_width)]


def _linear_sizes(site: Site) -> tuple[int, int, int, int]:
    queries, keys = _count(site, "q_num_heads"), _count(site, "kv_num_heads")
    return queries, keys, site.input_shape(0)[2] // queries, site.input_shape(2)[2] // keys


ROWS: tuple[OpRow, ...] = (
    OpRow(
        "Attention",
        structural=(6,),
        cost=attention_macs,
        channels=channels.attention,
        repair=channels.repair_attention,
        shape=attention_shape,
        torch=TorchFunction("attention", "Attention"),
    ),
    OpRow(
        "LinearAttention",
        cost=linear_attention_macs,
        channels=channels.linear_attention,
        repair=channels.repair_attention,
    ),
    *unary(
        "RotaryEmbedding",
        channels=channels.rotation,
        repair=channels.repair_rotation,
        shape=same_shape,
        torch="attention",
    ),
    OpRow(
        "Attention",
        domain=MICROSOFT,
        structural=(3, 6),
        cost=partial(projected_attention_macs, past=4),
        shape=partial(projected_attention_shape, past=4),
    ),
    OpRow(
        "QAttention",
        domain=MICROSOFT,
        structural=(5,),
        cost=partial(projected_attention_macs, past=8),
        shape=partial(projected_attention_shape, past=8),
        quantization=(3, 4, 6, 7),
        element_type=3,
    ),
    OpRow(
        "MultiHeadAttention",
        domain=MICROSOFT,
        structural=(8,),
        cost=multi_head_macs,
        shape=multi_head_shape,
        torch=TorchFunction("fused_attention", "MultiHeadAttention"),
    ),
    OpRow(
        "GroupQueryAttention",
        domain=MICROSOFT,
        structural=(5, 6),
        cost=grouped_query_macs,
        shape=grouped_query_shape,
        quantization=(12, 13),
    ),
    OpRow("LinearAttention", domain=MICROSOFT, cost=linear_attention_macs, shape=linear_attention_shape),
    *unary("RotaryEmbedding", domain=MICROSOFT),
    OpRow("RelativePositionBias", domain=MICROSOFT, structural=(1, 2), cost=no_macs),
)
