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


def _joined_with_past(site: ChannelSite, operand: Operand, index: int) -> Operand:
    """Keys or values behind those of a cache [N, H, T, D], which have the same channels."""
    if not site.given(index):
        return operand
    batch, heads, _, width = (site.take(index, axis) for axis in range(4))
    site.freeze(site.take(index, 2), _TOKENS, channel=False)
    site.unify(batch, operand.batch)
    return Operand(
        operand.batch,
        Track(site.unify(heads, operand.heads), heads.zero and operand.heads.zero),
        operand.tokens,
        Track(site.unify(width, operand.width), width.zero and operand.width.zero),
    )


def attention(site: ChannelSite) -> None:
    """Attention 23 to 25. Query heads go with their key-value head; width is free where the scale is written out."""
    query = _operand(site, 0, "q_num_heads")
    key, value = _operand(site, 1, "kv_num_heads"), _operand(site, 2, "kv_num_heads")
    width = site.unify(query.width, key.width)
    key, value = _joined_with_past(site, key, 4), _joined_with_past(site, value, 5)
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
    if site.given(6):
        site.unify(site.take(6, 0), batch)
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
    batch, tokens = (tracks[0], tracks[1]) if packed else (tracks[0], tracks[2])
    for index in (3,) if site.given(3) else (1, 2):  # without positions, the tables have an entry a token
        for axis, theirs in ((0, batch), (1, tokens)):
            site.unify(site.take(index, axis), theirs)
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
    shared = site.unify(key.heads, value.heads)
    alone = _share_heads(site, query.heads.axis, shared)
    batch = site.unify(query.batch, key.batch, value.batch)
    past_zero = [True, True, True]
    if site.given(3):
        past = site.take_all(3)
        past_zero = [track.zero for track in past[1:]]
        for mine, theirs in zip(past, (batch, shared, width, value.width), strict=True):
            site.unify(mine, theirs)
    if not query.width.zero and not (key.width.zero and past_zero[1]):
        site.inexact(width, "neither query nor key is 0 where masked, yet it sums over their width")
    if not site.attribute("scale", 0.0):
        site.freeze(width, "the scale is computed from it")
    for index in (4, 5):
        if site.given(index):
            first, tokens, last = site.take_all(index)
            site.unify(first, batch)
            site.freeze(tokens, _TOKENS, channel=False)
            outer, inner = site.split(last, (shared.size, -1))
            site.unify(outer, shared)
            if inner.size > 1:
                site.unify(inner, width)
    for axis, role in ((query.heads, "heads"), (width, "head width"), (value.width, "value width")):
        site.role(axis, role)
    for operand in (query, key, value):
        site.freeze(operand.tokens, _TOKENS, channel=False)
    packed = site.product(query.heads, value.width)
    value_zero = value.width.zero and past_zero[2]
    heads_zero = value.heads.zero and past_zero[0]
    site.emit(0, [Track(batch), query.tokens.nonzero(), Track(packed, alone and value_zero and heads_zero)])
    key_width = Track(width, key.width.zero and past_zero[1])
    site.emit(1, [Track(batch), Track(shared, heads_zero), key_width, Track(value.width.axis, value_zero)])


def _packed(site: ChannelSite, index: int, side: str) -> Operand:
    return _operand(site, index, f"{side}_num_heads")
