"""Reconstruction of biases alone: means come right, weights stay, and what has no place for a bias is declined."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.ir.fingerprint import fingerprint
from graphopt.ir.session import open_session
from graphopt.passes import Context, FoldReconstruction, PruneChannels, Quantize
from tests.passes.quantized_nets import RESIDUAL, canonical_constants, feeds, tiny, weighted

Batches = list[dict[str, np.ndarray]]


def outputs(model: ir.Model, batches: Batches) -> np.ndarray:
    session = open_session(model, optimized=False)
    return np.concatenate([session.run_feeds(one)[0] for one in batches])


def narrow(model: ir.Model, batches: Batches, **options: object) -> ir.Model:
    """Quantized to weights of 3 bits, whose rounding shifts means."""
    copy = model.clone()
    Quantize(weight_bits=3, search=False, **options).rewrite(copy, Context(calibration=batches))
    return copy


def stored(model: ir.Model) -> dict[str, np.ndarray]:
    """The integers of all weights."""
    tensors = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    return {name: array for name, array in tensors.items() if array.dtype == np.int8 and array.ndim > 1}


@pytest.mark.parametrize("model", [tiny(), canonical_constants(RESIDUAL.clone())], ids=["tiny", "residual"])
def test_means_come_right_and_weights_stay(model: ir.Model) -> None:
    batches = feeds(24)
    wanted, damaged = outputs(model, batches), narrow(model, batches)
    rebuilt = damaged.clone()
    done = FoldReconstruction(form="bias").rebuild(rebuilt, Context(calibration=batches))
    assert done.count == len(done.solved) >= 2
    assert all(one.after <= one.before for one in done.solved)
    before, after = stored(damaged), stored(rebuilt)
    assert before.keys() == after.keys()
    assert all(np.array_equal(array, after[name]) for name, array in before.items())
    shift = [np.abs((outputs(one, batches) - wanted).mean(axis=0)).max() for one in (damaged, rebuilt)]
    assert shift[1] < 0.1 * shift[0]
    error = [np.square(outputs(one, batches) - wanted).mean() for one in (damaged, rebuilt)]
    assert error[1] < error[0]


def test_it_needs_less_than_least_squares_and_does_less() -> None:
    model, batches = tiny(), feeds(24)
    wanted, damaged = outputs(model, batches), narrow(model, batches)
    errors = {}
    for form in ("bias", "least-squares"):
        rebuilt = damaged.clone()
        FoldReconstruction(form=form).rewrite(rebuilt, Context(calibration=batches))
        errors[form] = np.square(outputs(rebuilt, batches) - wanted).mean()
    assert errors["least-squares"] < errors["bias"]


def test_a_quantized_product_without_bias_is_declined() -> None:
    model = weighted(
        "float[n,8] x => float[n,4] y", "h = MatMul(x, a) r = Relu(h) y = MatMul(r, b)", a=(8, 8), b=(8, 4)
    )
    batches = [{"x": np.random.default_rng(1).standard_normal((32, 8)).astype(np.float32)} for _ in range(2)]
    damaged, context = narrow(model, batches, form="static"), Context(calibration=batches)
    before = fingerprint(damaged)
    FoldReconstruction(form="bias").rewrite(damaged, context)
    assert fingerprint(damaged) == before
    assert any("no place for a bias" in remark.why for remark in context.remarks)


def test_means_that_pruning_shifted_come_right_too() -> None:
    model, batches = tiny(), feeds(24)
    wanted, pruned = outputs(model, batches), model.clone()
    PruneChannels(ratio=0.4, round_to=1, compensation="none").rewrite(pruned, Context())
    rebuilt = pruned.clone()
    FoldReconstruction(form="bias").rewrite(rebuilt, Context(calibration=batches))
    shift = [np.abs((outputs(one, batches) - wanted).mean(axis=0)).max() for one in (pruned, rebuilt)]
    assert shift[1] < 1e-4 * shift[0]


def test_what_is_not_finite_is_declined() -> None:
    model, batches = tiny(), feeds(2)
    damaged, context = narrow(model, batches), Context(calibration=[{"x": np.full((1, 3, 16, 16), np.nan, np.float32)}])
    before = fingerprint(damaged)
    FoldReconstruction(form="bias").rewrite(damaged, context)
    assert fingerprint(damaged) == before or all("finite" in r.why for r in context.remarks if r.kind == "missed")
    assert np.isfinite(outputs(damaged, batches)).all()


def test_nothing_is_done_where_nothing_was_damaged() -> None:
    model, context = tiny(), Context()
    before = fingerprint(model)
    assert FoldReconstruction(form="bias").rebuild(model, context).count == 0
    assert fingerprint(model) == before
