"""Mask: train a network while some of its weights are zero."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from graphopt.errors import GraphoptError, LiftError
from graphopt.ir.channels import ChannelGroup, channel_groups
from graphopt.ir.lifted import Insertion, LiftedModule
from graphopt.ir.lower import Folding, Link, attribute
from graphopt.ir.ops import default_table
from graphopt.ir.ops.row import Shape, tensor_shape
from graphopt.ir.removal import remove_channels
from graphopt.ir.rewrite import is_op
from graphopt.train.places import linear_layers

_SCOPES = ("layer", "global")
_Place = tuple[str, int, tuple[int, ...]]
"""An initializer, an axis of it, and indices on that."""
_Rule = Callable[[list[torch.Tensor], float], list[torch.Tensor]]
"""Weights and a share of the final sparsity to masks; see `_smallest` and `_n_of_m`."""


class Mask(Insertion):
    """Masks of zeros and ones on weights: w' = m * w, so that what is masked has no effect and no gradient.

    Made by one of the constructors: `unstructured` (single weights, smallest magnitude first), `n_of_m` (N of M
    consecutive inputs stay), `units` (whole units of channel groups). Unstructured and N:M masks are chosen anew at
    every step while the sparsity rises, by the cubic schedule of Zhu and Gupta 2017, "To Prune, or Not to Prune":
    s(t) = s (1 - (1 - t)^3), and stay when it has been reached. They fold to zeros, units also to their removal.

    Attributes:
        skipped: weights that were asked for and have no mask, and why.
    """

    def __init__(self, masks: Mapping[str, torch.Tensor], *, skipped: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.names: dict[str, str] = {f"m{number}": name for number, name in enumerate(masks)}
        self.skipped = dict(skipped or {})
        self.masks = nn.ModuleDict({key: _Masked(masks[name].clone()) for key, name in self.names.items()})
        self._rule: _Rule | None = None
        self._ramp = 0.0
        self._units: list[frozenset[_Place]] = []
        self._weights: list[torch.Tensor] = []

    @classmethod
    def unstructured(
        cls,
        model: ir.Model,
        sparsity: float,
        *,
        scope: str = "layer",
        weights: Collection[str] = ("*",),
        ramp: float = 0.0,
    ) -> Mask:
        """Mask single weights of linear layers, the smallest first.

        Args:
            model: the canonical graph that is lifted.
            sparsity: share of the weights that is zero in the end, from 0 up to but not including 1.
            scope: "layer" (the same share of each weight) or "global" (the smallest of all weights together).
            weights: shell patterns of initializer names.
            ramp: share of the training during which the sparsity rises; 0 masks all at once.

        Raises:
            GraphoptError: an option is out of range, or no weight matches.
        """
        if not 0 <= sparsity < 1:
            raise GraphoptError(f"sparsity is {sparsity}", help="give a share, from 0 up to but not including 1")
        if scope not in _SCOPES:
            raise GraphoptError(f"unknown scope {scope!r}", help=f"one of {', '.join(_SCOPES)}")
        chosen = _chosen_weights(model, weights)
        mask = cls({name: torch.ones(shape, dtype=torch.bool) for name, (shape, _) in chosen.items()})
        mask._rule = functools.partial(_smallest, sparsity=sparsity, together=scope == "global")
        mask._ramp = _checked_ramp(ramp)
        return mask

    @classmethod
    def n_of_m(
        cls, model: ir.Model, n: int = 2, m: int = 4, *, weights: Collection[str] = ("*",), ramp: float = 0.0
    ) -> Mask:
        """Keep the `n` largest of every `m` consecutive weights along the axis that the products are summed over.

        For Conv that is the input channels at one kernel position, for Gemm and MatMul the inputs of one output.
        Weights whose axis is no multiple of `m` (first convolutions, depthwise ones) are in `skipped`.

        Raises:
            GraphoptError: `n` and `m` do not fit, or no weight matches.
        """
        if not 0 < n < m:
            raise GraphoptError(f"{n} of {m} is no pattern", help="n must be at least 1 and less than m")
        chosen, skipped = _chosen_weights(model, weights), dict[str, str]()
        for name, (shape, axis) in list(chosen.items()):
            if shape[axis] % m:
                skipped[name] = f"{shape[axis]} inputs are no multiple of {m}"
                del chosen[name]
        mask = cls({name: torch.ones(shape, dtype=torch.bool) for name, (shape, _) in chosen.items()}, skipped=skipped)
        mask._rule = functools.partial(_n_of_m, n=n, m=m, axes=[axis for _, axis in chosen.values()])
        mask._ramp = _checked_ramp(ramp)
        return mask

    @classmethod
    def units(cls, model: ir.Model, selection: Mapping[str, Iterable[int]], *, remove: bool = True) -> Mask:
        """Mask whole units of channel groups; `remove` has them cut out when the mask is folded, else zeroed.

        Args:
            model: the canonical graph that is lifted.
            selection: group name to the units of it, as for `graphopt.remove_channels`.
            remove: whether folding removes the units by the dependency engine.

        Raises:
            SelectionError: a group or unit does not exist or cannot be removed.
        """
        wanted: dict[str | ChannelGroup, list[int]] = {name: sorted(units) for name, units in selection.items()}
        remove_channels(model, wanted)  # refuses what cannot be removed before anything is trained
        masks: dict[str, torch.Tensor] = {}
        removed: list[frozenset[_Place]] = []
        for group in channel_groups(model):
            for unit in wanted.get(group.name, ()):
                removed.append(_places(group, unit, {}))
                for name, slices in group.slices(unit).items():
                    value = model.graph.initializers[name]
                    assert value.const_value is not None
                    if not value.const_value.dtype.is_floating_point() or _is_statistic(value):
                        continue
                    shape = tensor_shape(value.const_value)
                    mask = masks.setdefault(name, torch.ones(shape, dtype=torch.bool))
                    for axis, indices in slices:
                        mask.index_fill_(axis, torch.as_tensor(np.asarray(indices), dtype=torch.int64), False)
        result = cls(masks)
        result._units = removed if remove else []
        return result

    @property
    def sparsity(self) -> float:
        """The share of the masked weights that is zero now."""
        masks = [site.mask for site in self._sites()]
        total = sum(mask.numel() for mask in masks)
        return 1.0 - sum(int(mask.sum()) for mask in masks) / total if total else 0.0

    def insert(self, lifted: LiftedModule, path: str) -> None:
        """See `Insertion`."""
        initializers = lifted.interface.initializers
        for key, name in self.names.items():
            if name not in initializers:
                raise LiftError(f"the graph has no weight {name!r}", help="mask weights of the model that is lifted")
            shape = attribute(lifted, initializers[name]).shape
            if shape != self.masks.get_submodule(key).get_buffer("mask").shape:
                raise LiftError(
                    f"the mask of {name!r} is not {list(shape)}", help="make it for the model that is lifted"
                )
            lifted.place(name, f"{path}.masks.{key}")
        if self._rule is not None:
            self._weights = [attribute(lifted, initializers[name]) for name in self.names.values()]
            self._choose(0.0 if self._ramp else 1.0)

    def advance(self, step: int, steps: int) -> None:
        """See `Insertion`: the sparsity of this step of the schedule, by the weights as they are now."""
        if self._rule is not None and self._ramp:
            done = min((step + 1) / (self._ramp * steps), 1.0)
            before = min(step / (self._ramp * steps), 1.0)
            if before < 1.0:
                self._choose(1.0 - (1.0 - done) ** 3)

    def settled(self, step: int, steps: int) -> bool:
        """Whether the sparsity has been reached."""
        return self._rule is None or step >= self._ramp * steps

    def fold(self, folding: Folding) -> None:
        """See `Insertion`."""
        for name, site in zip(self.names.values(), self._sites(), strict=True):
            _fold_mask(folding, name, site.mask.cpu().numpy())
        if self._units:
            folding.at_end(functools.partial(_remove_units, units=self._units, origins=folding.origins))

    @torch.no_grad()
    def _choose(self, share: float) -> None:
        """Set the masks to `share` of the final sparsity."""
        assert self._rule is not None
        for site, mask in zip(
            self._sites(), self._rule([weight.detach() for weight in self._weights], share), strict=True
        ):
            site.mask.copy_(mask)

    def _sites(self) -> list[_Masked]:
        return list(self.masks.children())  # pyright: ignore[reportReturnType]


class _Masked(nn.Module):
    """One masked weight."""

    mask: torch.Tensor

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.where(self.mask, weight, 0.0)


def _fold_mask(folding: Folding, name: str, mask: np.ndarray) -> None:
    """Zeros in the weight, or in the integers that a quantizer has made of it, else a multiplication."""
    stored = name if folding.is_constant(name) else _symmetric_integers(folding, name)
    if stored is not None:
        array = folding.constant(stored)
        folding.set_constant(stored, np.where(mask, array, np.zeros((), array.dtype)))
    else:
        kept = folding.add_constant(f"{name}_mask", mask.astype(folding.element_type(name).numpy()))
        folding.insert_after(name, [Link("Mul", [kept])])


def _symmetric_integers(folding: Folding, name: str) -> str | None:
    """The stored integers that a DequantizeLinear behind the weight reads, where integer 0 stands for 0."""
    producer = folding.value(name).producer()
    if producer is None or not is_op(producer, "DequantizeLinear"):
        return None
    integers, zero = producer.inputs[0], producer.inputs[2] if len(producer.inputs) > 2 else None
    if integers is None or not integers.is_initializer() or len(integers.uses()) != 1:
        return None
    if zero is not None and (not zero.is_initializer() or folding.constant(zero.name or "").any()):
        return None
    return integers.name


def _places(group: ChannelGroup, unit: int, origins: Mapping[str, str]) -> frozenset[_Place]:
    """Where a unit lies: initializer (by the name that it had when lifted), axis and indices."""
    return frozenset(
        (origins.get(name, name), axis, tuple(np.asarray(indices).tolist()))
        for name, slices in group.slices(unit).items()
        for axis, indices in slices
    )


def _remove_units(model: ir.Model, units: Sequence[frozenset[_Place]], origins: Mapping[str, str]) -> ir.Model:
    """Remove units of the graph that was lifted from what folding made of it; names of groups may differ by then."""
    groups = channel_groups(model)
    wanted = {place for unit in units for place in unit}
    selection: dict[str | ChannelGroup, list[int]] = {}
    for group in groups:
        found = [unit for unit in range(group.units) if _places(group, unit, origins) & wanted]
        if found:
            selection[group.name] = found
    if sum(map(len, selection.values())) != len(units):
        raise LiftError(
            "masked units cannot be removed from the folded graph",
            where=", ".join(map(str, selection)),
            help="fold without removal: Mask.units(..., remove=False)",
        )
    return remove_channels(model, selection, groups=groups)


def _smallest(weights: list[torch.Tensor], share: float, *, sparsity: float, together: bool) -> list[torch.Tensor]:
    """True where a weight stays: all but the smallest `share * sparsity` of each weight, or of all together."""
    sizes = [weight.abs().float() for weight in weights]
    if not together:
        return [_all_but_smallest(size, round(share * sparsity * size.numel())) for size in sizes]
    flat = torch.cat([size.reshape(-1) for size in sizes])
    kept = _all_but_smallest(flat, round(share * sparsity * flat.numel()))
    parts = kept.split([size.numel() for size in sizes])
    return [part.reshape(size.shape) for part, size in zip(parts, sizes, strict=True)]


def _all_but_smallest(sizes: torch.Tensor, count: int) -> torch.Tensor:
    kept = torch.ones(sizes.numel(), dtype=torch.bool, device=sizes.device)
    kept[torch.argsort(sizes.reshape(-1), stable=True)[:count]] = False
    return kept.reshape(sizes.shape)


def _n_of_m(weights: list[torch.Tensor], share: float, *, n: int, m: int, axes: list[int]) -> list[torch.Tensor]:
    """True for the n largest of every m along an axis; for `share` < 1 only so many of the m - n have gone."""
    kept = m - round(share * (m - n))
    masks: list[torch.Tensor] = []
    for weight, axis in zip(weights, axes, strict=True):
        grouped = weight.abs().float().movedim(axis, -1).unflatten(-1, (-1, m))
        largest = torch.argsort(grouped, dim=-1, descending=True, stable=True)[..., :kept]
        mask = torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, largest, True)
        masks.append(mask.flatten(-2).movedim(-1, axis))
    return masks


def _chosen_weights(model: ir.Model, patterns: Collection[str]) -> dict[str, tuple[Shape, int]]:
    """Shape and summed axis of the weights of linear layers whose names match."""
    if isinstance(patterns, str):
        raise GraphoptError("weights is one string", help=f"give a list of patterns: weights=[{patterns!r}]")
    found: dict[str, tuple[Shape, int]] = {}
    for layer in linear_layers(model):
        name = layer.weight.name or ""
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            found[name] = layer.weight_shape, layer.input_axis
    if not found:
        raise GraphoptError(f"no weight of a linear layer matches {', '.join(patterns)}")
    return found


def _is_statistic(value: ir.Value) -> bool:
    """Whether only BatchNormalization reads the value, as a mean or variance: its scale and shift are masked."""
    rows = [(default_table().row(use.node.domain, use.node.op_type, 21), use.idx) for use in value.uses()]
    return all(row is not None and index in row.statistics for row, index in rows)


def _checked_ramp(ramp: float) -> float:
    if not 0 <= ramp <= 1:
        raise GraphoptError(f"ramp is {ramp}", help="give the share of the training, 0 to 1")
    return ramp
