"""The algebra of labels and axes: what is cut, merged and met in which order must not matter to what is coupled."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from graphopt.ir.ops.axes import Axis, AxisStore, Reason, UntrackableError
from graphopt.ir.ops.labels import LabelStore

INPUT = Reason("graph input 'x'")


def classes(store: AxisStore, axis: Axis) -> list[frozenset[int]]:
    """The atoms of every coordinate of an axis."""
    labels = store.flat(axis)
    found: list[set[int]] = [set() for _ in labels]
    for coordinate, atom in zip(*store.labels.atoms(labels), strict=True):
        found[int(coordinate)].add(int(atom))
    return [frozenset(atoms) for atoms in found]


def test_labels_are_grown_and_unified_in_chains() -> None:
    store = LabelStore()
    axes = [store.fresh(700) for _ in range(5)]
    for a, b in itertools.pairwise(axes):
        store.unify(b, a[::-1])
    assert np.array_equal(store.find(axes[4]), store.find(axes[0]))
    assert len(np.unique(store.find(np.concatenate(axes)))) == 700


def test_uniting_bound_classes_unites_what_they_are_bound_to() -> None:
    store = LabelStore()
    a, b, c, d = store.fresh(3), store.fresh(2), store.fresh(3), store.fresh(2)
    store.unify(store.bound(a, b), store.bound(c, d))
    assert np.array_equal(store.find(a), store.find(c))
    assert np.array_equal(store.find(b), store.find(d))


def test_a_class_bound_to_itself_freezes_only_its_partner() -> None:
    store = LabelStore()
    outer, inner = store.fresh(4), store.fresh(1)
    store.unify(store.bound(outer, inner), outer)
    assert store.break_cycles().tolist() == store.find(inner).tolist()
    assert store.atoms(outer)[1].tolist() == store.find(outer).tolist()


@pytest.mark.parametrize(
    ("labels", "sizes"),
    [([0, 0, 1, 1, 2, 2], [3, 2]), ([0, 1, 2, 0, 1, 2], [2, 3]), ([0, 1, 2, 3], [4])],
)
def test_factors_are_repetitions_and_tilings(labels: list[int], sizes: list[int]) -> None:
    store = LabelStore()
    store.fresh(6)
    assert [size for size, _ in store.factor(np.array(labels))] == sizes


def test_cutting_again_refines_the_first_cut() -> None:
    store = LabelStore()
    labels = store.fresh(32)
    store.split(labels, (8, 4))
    again = store.split(labels, (4, 8))
    assert [[size for size, _ in axis] for axis in again] == [[4], [2, 4]]


def test_cuts_that_do_not_nest_are_coarser_but_keep_every_coordinate_coupled() -> None:
    store = AxisStore()
    axis = store.open(24)
    store.flat(axis)
    store.split(axis, [(4,), (6,)])
    heads, width = store.split(axis, [(6,), (4,)])
    assert (heads.size, width.size) == (6, 4)
    atoms = classes(store, axis)
    for index in range(24):
        assert atoms[index] & classes(store, heads)[index // 4] or atoms[index] & classes(store, width)[index % 4]


def test_an_open_axis_takes_the_channels_of_the_other() -> None:
    store = AxisStore()
    a, b = store.open(6), store.open(6)
    store.unify(a, b)
    assert store.root(a) is store.root(b)
    assert len(store.labels) == 0, "no label is needed before somebody asks for coordinates"


@pytest.mark.parametrize("labelled_first", [True, False])
def test_a_product_meets_labels_in_either_order(labelled_first: bool) -> None:
    store = AxisStore()
    heads, width, flat = store.open(3), store.open(4), store.open(12)
    if labelled_first:
        store.flat(flat)
    store.unify(store.product([heads, width]), flat)
    picked = store.select(flat, np.array([5, 6]))
    assert classes(store, picked)[0] == classes(store, heads)[1] | classes(store, width)[1]


def test_products_with_other_cuts_are_refined() -> None:
    store = AxisStore()
    left = store.product([store.open(4), store.open(6)])
    right = store.product([store.open(2), store.open(2), store.open(6)])
    store.unify(left, right)
    assert [part.size for part in store.leaves(left)] == [2, 2, 6]
    assert classes(store, left) == classes(store, right)


def test_fixed_pieces_stay_out_of_the_labels() -> None:
    store = AxisStore()
    channels, pixels = store.open(3), store.fix(4, INPUT)
    merged = store.product([channels, pixels])
    assert classes(store, merged) == [atoms for atoms in classes(store, channels) for _ in range(4)]


def test_meeting_a_fixed_axis_freezes_with_its_reason() -> None:
    store = AxisStore()
    axis = store.open(5)
    store.unify(axis, store.fix(5, INPUT))
    assert store.reason(axis) == INPUT
    labelled = store.labelled(store.labels.fresh(5))
    store.unify(store.fix(5, INPUT), labelled)
    assert [(mark.kind, mark.reason) for mark in store.marks] == [("frozen", INPUT)]


def test_run_time_lengths_regroup_only_where_all_probes_agree() -> None:
    store = AxisStore(probes=2)
    batch, channels = store.fix((2, 4), INPUT), store.open(12)
    merged, width = store.regroup([batch, channels], [(6, 12), (4, 4)], Reason("disagree"))
    assert [part.sizes for part in store.leaves(merged)] == [(2, 4), (3, 3)]
    assert width.static
    other = store.open(12)
    store.regroup([store.fix((2, 4), INPUT), other], [(3, 3), (8, 16)], Reason("disagree"))
    assert store.reason(other) is not None


def test_single_positions_must_stay() -> None:
    store = AxisStore()
    axis = store.open(3)
    store.select(axis, np.array([1]))
    (mark,) = store.marks
    assert mark.kind == "frozen"
    assert classes(store, mark.axis) == [classes(store, axis)[1]]


def test_axes_of_run_time_or_enormous_length_have_no_labels() -> None:
    store = AxisStore(probes=2)
    with pytest.raises(UntrackableError, match="run time"):
        store.flat(store.product([store.fix((2, 4), INPUT), store.open(3)]))
    with pytest.raises(UntrackableError, match="coordinates"):
        store.flat(store.product([store.open(4096), store.open(4096)]))
