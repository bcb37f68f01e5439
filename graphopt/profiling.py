"""Where the time of a model goes, as the user calls it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from graphopt.errors import GraphoptError
from graphopt.export.write import check_target
from graphopt.inputs.probes import InputSpec, check_specs, probe_feeds, runnable_sizes
from graphopt.ir.figures import check_drawing
from graphopt.ir.load import load, read
from graphopt.latency.attribution import all_nodes
from graphopt.latency.kernels import profile_kernels
from graphopt.latency.profile import VIEWS, Profile, ProfileTable, block_paths
from graphopt.latency.table import LatencyTable, this_machine
from graphopt.optimize import canonical_form, example_feeds, is_torch


def profile(
    model: Any,
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    target: str = "cpu",
    threads: int = 1,
    seconds: float = 5.0,
    specs: Mapping[str, InputSpec] | None = None,
) -> Profile:
    """Time every kernel of a model inside the whole graph, and say which nodes, operators and blocks take how long.

    The model is profiled in canonical form, as `graphopt.load` reads it, with the optimisations of onnxruntime; nothing
    else is changed. See `graphopt.latency.kernels.profile_kernels` for how it is measured. What was found is kept in
    the latency table of this machine (`graphopt.latency.table.LatencyTable.kept`), unless it has a doubt to note.

    Args:
        model: a torch module, an exported program, a path, bytes, an `onnx.ModelProto` or an `onnx_ir.Model`.
        args: example inputs, positional or by name; made up where not given.
        kwargs: more of them by name.
        target: "cpu", "cuda" or "openvino".
        threads: intra-op threads, 0 for onnxruntime's default.
        seconds: about how long to measure at most; it ends earlier where the median is known.
        specs: what is known of inputs that are made up, by name; as `inputs` of `graphopt.optimize`.

    Raises:
        LoadError, InvalidGraphError, TraceError: the model cannot be read, is not valid, or cannot be exported.
        DataError: the example inputs do not fit, or `seconds` is not positive.
        GraphoptError: the target is unknown or not in this build of onnxruntime.

    Example:
        >>> import onnx_ir as ir
        >>> model = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 21]> g (float[8,64] x) => (float[8,64] y) '
        ...     '{ [turn] t = Transpose (x) [scores] h = MatMul (x, t) [weights] w = Softmax (h) '
        ...     '[mix] y = MatMul (w, x) }')
        >>> found = profile(model, seconds=0.1)
        >>> [part.name for part in found.by_node()][-2:], round(sum(part.share for part in found.by_node()), 6)
        (['weights', 'mix'], 1.0)
    """
    if is_torch(model):
        from graphopt.ir.trace import trace_with_feeds

        traced = trace_with_feeds(model, args, kwargs)
        graph, feeds, name = traced.model, traced.feeds[0], type(model).__name__
    else:
        original = read(model)
        check_specs(original, specs or {})
        given = example_feeds(original, args, kwargs)
        sizes = runnable_sizes(original, specs) if given is None else None
        graph = load(original, sizes=sizes) if given is None else canonical_form(original)
        feeds = given if given is not None else probe_feeds(graph, sizes=sizes, specs=specs)[0]
        is_path = isinstance(model, (str, os.PathLike))
        name = Path(model).name if is_path else (original.graph.name or "model")
    (measured,) = profile_kernels(graph, feeds, target=target, threads=threads, seconds=seconds)
    if not measured.notes:
        table = LatencyTable(this_machine(target, threads))
        table.add(measured)
        measured = replace(measured, notes=tuple(table.keep()))
    nodes = [node for node, _ in all_nodes(graph.graph)]
    return Profile(name, measured, block_paths(measured.names, nodes))


def profile_command(
    model: Path,
    inputs: Any,
    *,
    view: tuple[str, int | None, int | None],
    plot: Path | None,
    table: Path | None,
    target: str,
    threads: int,
    seconds: float,
    specs: Mapping[str, InputSpec],
) -> ProfileTable:
    """What `graphopt profile` does: profile, draw, add to a table file, and give what is to be printed.

    Args:
        model: the ONNX file.
        inputs: example inputs, or None.
        view: what to show it by, how many of the dearest, and the depth of blocks.
        plot: picture to draw, or None.
        table: file of a latency table to add the kernels to, or to begin; None for none.
        target: "cpu", "cuda" or "openvino".
        threads: intra-op threads.
        seconds: about how long to measure at most.
        specs: what is known of the inputs.

    Raises:
        GraphoptError: as `profile`, `Profile.table` and `Profile.plot`; or the table is of another machine, which is
            found before anything is measured.
        LoadError, WriteError: a file cannot be read or written.
    """
    by, top, depth = view
    if by not in VIEWS:
        raise GraphoptError(f"nothing to show by {by!r}", where="--by", help=f"show it by {', '.join(VIEWS)}")
    for path in (plot, table):
        if path is not None:
            check_target(path)
    if plot is not None:
        check_drawing(plot)
    machine = this_machine(target, threads)
    exists = table is not None and table.exists()
    rows = LatencyTable.load(table, machine=machine) if table is not None and exists else LatencyTable(machine)
    found = profile(model, inputs, target=target, threads=threads, seconds=seconds, specs=specs)
    if plot is not None:
        found.plot(plot, by, top=top, depth=depth)
    if table is not None:
        rows.add(found.measured)
        rows.save(table)
    return found.table(by, top=top, depth=depth)
