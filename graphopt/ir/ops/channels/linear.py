"""Channels through the products: contracted axes are the same channels on both sides.

A contraction is exact where at least one operand is 0 at every masked channel.
"""

from __future__ import annotations

from graphopt.ir.ops.channels.elementwise import meet
from graphopt.ir.ops.einsum import parse_equation
from graphopt.ir.ops.flow import ChannelSite, Track


def contract(site: ChannelSite, a: Track, b: Track) -> None:
    """Sum over an axis that both operands have."""
    axis = site.unify(a, b)
    if not (a.zero or b.zero):
        site.inexact(axis, "neither operand is 0 where masked, yet it sums over the axis")


def _name_attention(site: ChannelSite, batch: list[Track], inner: Track, columns: list[Track]) -> None:
    """A product of two activations for every entry of a leading axis is attention, whatever the model calls it."""
    site.role(inner, "head width")
    for track in columns:
        site.role(track, "value width")
    for track in batch:
        site.role(track, "heads")


def matmul(site: ChannelSite, left: int = 0, right: int = 1, *, codes: bool = False) -> None:
    """numpy's `matmul`: the last axis of A meets the second last of B, leading axes broadcast.

    With `codes` operands are quantized; of a weight, masked entries are the zero point of this operator, of an
    activation that is not known.
    """
    a, b = site.take_all(left), site.take_all(right)
    if codes:
        a = [track.nonzero() for track in a]
        b = b if site.is_weight(right) else [track.nonzero() for track in b]
    column = b[-2] if len(b) > 1 else b[0]
    contract(site, a[-1], column)
    batch = [meeting.combined("any") for meeting in meet(site, [a[:-2], b[:-2]])] if max(len(a), len(b)) > 2 else []
    if batch and not site.is_weight(left) and not site.is_weight(right):
        _name_attention(site, batch, a[-1], b[-1:])
    site.emit(0, [*batch, *a[-2:-1], *(b[-1:] if len(b) > 1 else [])])
    if site.is_weight(right) and len(b) > 1:
        site.role(b[-1], "outputs")


def gemm(site: ChannelSite, left: int = 0, right: int = 1, bias: int = 2) -> None:
    """[M, N] = A' B' + C; C broadcasts to [M, N]."""
    a, b = site.take_all(left), site.take_all(right)
    rows, inner = reversed(a) if site.attribute("transA", 0) else a
    contracted, columns = reversed(b) if site.attribute("transB", 0) else b
    contract(site, inner, contracted)
    result = [rows, columns]
    if site.given(bias):
        result = [meeting.combined("all") for meeting in meet(site, [result, site.take_all(bias)])]
    site.role(columns, "outputs")
    site.emit(0, result)


def integer_matmul(site: ChannelSite) -> None:
    """MatMulInteger: zero points are scalars, or one a row of A or a column of B."""
    matmul(site, codes=True)
    for index, operand, axis in ((2, 0, -2), (3, 1, -1)):
        along(site, index, site.take(operand, axis))


def quantized_matmul(site: ChannelSite) -> None:
    """QLinearMatMul: A, B at inputs 0 and 3, each followed by scale and zero point."""
    matmul(site, 0, 3, codes=True)
    for index, operand, axis in ((1, 0, -2), (2, 0, -2), (4, 3, -1), (5, 3, -1)):
        along(site, index, site.take(operand, axis))


def along(site: ChannelSite, index: int, track: Track) -> None:
    """A scale, zero point or bias with one entry a channel; one entry for all says nothing."""
    if not site.given(index):
        return
    operand = site.take_all(index)
    if operand and operand[-1].axis.size > 1:
        site.unify(operand[-1], track)


def einsum(site: ChannelSite) -> None:
    """One class of channels a letter; a letter that the result lacks is summed over (ONNX Einsum 12)."""
    operands = [site.take_all(index) for index in range(len(site.node.inputs))]
    terms, output = parse_equation(str(site.attribute("equation")), [site.shape(i) for i in range(len(operands))])
    found: dict[str, list[Track]] = {}
    for names, tracks in zip(terms, operands, strict=True):
        for name, track in zip(names, tracks, strict=True):
            found.setdefault(name, []).append(track)
    letters: dict[str, Track] = {}
    for name, tracks in found.items():
        whole = [track for track in tracks if not (track.axis.static and track.axis.size == 1)]
        letters[name] = Track(site.unify(*tracks), any(track.zero for track in whole))
        if name not in output and whole and not letters[name].zero:
            site.inexact(letters[name], f"no operand is 0 where masked, yet {name!r} is summed over")
    if len(operands) == 2 and not site.is_weight(0) and not site.is_weight(1):
        for name, tracks in found.items():
            if len(tracks) == 2:
                site.role(letters[name], "heads" if name in output else "head width")
    site.emit(0, (letters[name] for name in output))
