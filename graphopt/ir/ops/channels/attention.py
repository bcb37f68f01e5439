"""Channels through attention: heads, width of a query or key head, width of a value head."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.ir.ops.axes import Axis
from graphopt.ir.ops.channels.layout import known_sizes
from graphopt.ir.ops.flow import ChannelSite, OpaqueError, RepairSite, Track

_TOKENS = "its positions are tokens"


@dataclass(frozen=True)
class Operand:
    """Query, key or value with its axes told apart, whether packed [N, T, H * D] or not [N, H, T, D]."""

    batch: Track
    heads: Track
    tokens: Track
    width: Track


def _operand(site: ChannelSite, index: int, heads: str) -> Operand:
    tracks = site.take_all(index)
    if len(tracks) == 4:
        return Operand(*tracks)
    if len(tracks) != 3 or not site.attribute(heads):
        raise OpaqueError(f"input {index} is no query, key or value that it knows")
    batch, tokens, packed = tracks
    outer, inner = site.split(packed, (int(site.attribute(heads)), -1))
    site.behind(heads, outer)
    return Operand(batch, Track(outer, packed.zero), tokens, Track(inner, packed.zero))


def _share_heads(site: ChannelSite, query: Axis, shared: Axis) -> bool:
    """Query heads come in groups, one a key-value head. Returns whether each has its own."""
    if query.size == shared.size:
        site.unify(query, shared)
        return True
    group, _ = site.split(query, (shared.size, -1))
    site.unify(group, shared)
    return False


def attention(site: ChannelSite) -> None:
    """Attention 23 to 25. Query heads go with their key-value head; width is free where the scale is written out."""
    query = _operand(site, 0, "q_num_heads")
    key, value = _operand(site, 1, "kv_num_heads"), _operand(site, 2, "kv_num_heads")
    width = site.unify(query.width, key.width)
    if not (query.width.zero or key.width.zero):
        site.inexact(width, "neither query nor key is 0 where masked, yet it sums over their width")
    if "scale" not in site.node.attributes:
        site.freeze(width, "its scale is computed from it")
    shared = site.unify(key.heads, value.heads)
    alone = _share_heads(site, query.heads.axis, shared)
    batch = site.unify(query.batch, key.batch, value.batch)
    for track in (query.tokens, key.tokens, value.tokens):
        site.freeze(track, _TOKENS, channel=False)
    for axis, role in ((query.heads, "heads"), (width, "head width"), (value.width, "value width")):
        site.role(axis, role)
    if site.given(3):
        for axis, theirs in ((-3, query.heads.axis), (-4, batch)):
            if site.rank(3) >= -axis and site.shape(3)[axis] > 1:
                site.unify(site.take(3, axis), theirs)
    for index, other in ((4, key), (5, value)):
        if site.given(index):
            for axis, theirs in ((0, batch), (1, other.heads), (3, other.width)):
                site.unify(site.take(index, axis), theirs)
    site.freeze_rest(_TOKENS)
    heads = Track(query.heads.axis, value.heads.zero and alone)
    tokens = Track(query.tokens.axis)
    if site.rank(0) == 4:
        site.emit(0, [Track(batch), heads, tokens, value.width])
    else:
        packed = site.product(heads, value.width)
        site.emit(0, [Track(batch), tokens, Track(packed, heads.zero and value.width.zero)])
    for index, own in ((1, key), (2, value)):
        if index < len(site.node.outputs):
            length = site.fixed(known_sizes(site, index)[2], _TOKENS)
            site.emit(index, [Track(batch), Track(shared, own.heads.zero), length, own.width])
    if len(site.node.outputs) > 3:
        length = site.fixed(known_sizes(site, 3)[3], _TOKENS)
        site.emit(3, [Track(batch), Track(query.heads.axis), tokens, length])


def repair_attention(site: RepairSite) -> None:
    """The numbers of heads follow."""
    for name in ("q_num_heads", "kv_num_heads"):
        heads = site.counted(name)
        if heads is not None:
            site.set_attribute(name, heads)


def rotation(site: ChannelSite) -> None:
    """RotaryEmbedding 23: channel i turns with its partner, and both with one entry of the tables."""
    tracks = site.take_all(0)
    packed = len(tracks) == 3
    if packed and not site.attribute("num_heads"):
        raise OpaqueError("it does not say how many heads its input has")
    width = tracks[-1].axis
    if packed:
        heads, width = site.split(tracks[2], (int(site.attribute("num_heads")), -1))
        site.behind("num_heads", heads)
    turned = int(site.attribute("rotary_embedding_dim", 0)) or width.size
    if turned != width.size:
        raise OpaqueError("it turns only a part of each head")
    pairs = site.unify(site.take(1, -1), site.take(2, -1))
    halves = site.repeats(2, "both halves turn together")
    partners = (pairs, halves) if site.attribute("interleaved", 0) else (halves, pairs)
    site.unify(width, site.product(*partners))
    site.freeze_rest(_TOKENS)
    site.emit(0, tracks)


def repair_rotation(site: RepairSite) -> None:
    """The number of heads follows."""
    heads = site.counted("num_heads")
    if heads is not None:
        site.set_attribute("num_heads", heads)


def linear_attention(site: ChannelSite) -> None:
    """LinearAttention 27: packed query, key, value; the state is [N, key heads, key width, value width]."""
    query, key, value = (_packed(site, index, name) for index, name in ((0, "q"), (1, "kv"), (2, "kv")))
    width = site.unify(query.width, key.width)
    if not (query.width.zero or key.width.zero):
        site.inexact(width, "neither query nor key is 0 where masked, yet it sums over their width")
    shared = site.unify(key.heads, value.heads)
    alone = _share_heads(site, query.heads.axis, shared)
    batch = site.unify(query.batch, key.batch, value.batch)
    if not site.attribute("scale", 0.0):
        site.freeze(width, "the scale is computed from it")
    if site.given(3):
        past = site.take_all(3)
        for mine, theirs in zip(past, (batch, shared, width, value.width), strict=True):
            site.unify(mine, theirs)
    for index in (4, 5):
        if site.given(index):
            last = site.take(index, -1)
            if last.axis.size == shared.size:
                site.unify(last, shared)
            else:
                outer, inner = site.split(last, (shared.size, -1))
                site.unify(outer, shared)
                site.unify(inner, width)
    for axis, role in ((query.heads, "heads"), (width, "head width"), (value.width, "value width")):
        site.role(axis, role)
    site.freeze_rest(_TOKENS)
    packed = site.product(query.heads, value.width)
    site.emit(0, [Track(batch), query.tokens.nonzero(), Track(packed, alone and value.width.zero)])
    site.emit(1, [Track(batch), Track(shared), Track(width), Track(value.width.axis)])


def _packed(site: ChannelSite, index: int, side: str) -> Operand:
    return _operand(site, index, f"{side}_num_heads")
