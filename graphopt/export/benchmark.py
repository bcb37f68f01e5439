"""How fast models are beside each other, as the user calls it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from graphopt.errors import DataError
from graphopt.inputs.calibration import fit_feeds
from graphopt.inputs.probes import probe_feeds, runnable_sizes
from graphopt.ir.load import Source, read
from graphopt.ir.session import open_session
from graphopt.ir.timing import Benchmark, interleave


def benchmark(
    *models: Source,
    inputs: Any = None,
    names: Sequence[str] | None = None,
    seconds: float = 2.0,
    threads: int = 1,
    target: str = "cpu",
) -> Benchmark:
    """Time models on the same inputs, in turns.

    Args:
        models: two or more models with the same inputs, as for `graphopt.load`; ratios are relative to the first.
        inputs: one set of inputs (an array, a tuple, a dict by name); probes of a size that runs where not given.
        names: what to call the models, one name each.
        seconds: about how long to measure, all models together; at least 7 rounds are run.
        threads: intra-op threads, 0 for onnxruntime's default.
        target: "cpu", "cuda" or "openvino".

    Raises:
        DataError: no model was given, or the inputs do not fit.
        InvalidGraphError: onnxruntime cannot load one of the models.

    Example:
        >>> import onnx_ir as ir
        >>> model = ir.from_onnx_text(
        ...     '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) { y = Relu(x) }')
        >>> benchmark(model, model, seconds=0.1).names
        ('model 1', 'model 2')
    """
    if not models:
        raise DataError("no model to benchmark")
    labels = tuple(names) if names is not None else tuple(f"model {index + 1}" for index in range(len(models)))
    if len(labels) != len(models):
        raise DataError(f"{len(labels)} names for {len(models)} models", where="names")
    graphs = [read(model) for model in models]
    first = graphs[0]
    feeds = probe_feeds(first, sizes=runnable_sizes(first))[0] if inputs is None else fit_feeds(first, inputs)
    sessions = [open_session(graph, threads=threads, target=target) for graph in graphs]
    return interleave(sessions, feeds, names=labels, seconds=seconds, threads=threads, target=target)
