"""The channel analysis on large graphs: seconds and memory for a decoder of a billion parameters, time per node.

    python -m benchmarks.channels_scale

Weights of the large decoder lie in a file that does not exist, so that reading one is an error. Each measurement is a
new interpreter that has analysed a small decoder before; seconds are the median of three, memory the largest. Time per
node is CPU time of the one thread that works, for other processes on the machine must not count.
"""

from __future__ import annotations

import gc
import tempfile
import time
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import onnx_ir as ir

from benchmarks.decoder import Decoder, Size, parameters, small, weights
from benchmarks.isolation import Isolation
from benchmarks.results import FOLDER, PARTIAL_FOLDER, Column, Goal, Results, Row, progress, read_options

LARGE = "decoder of 1.1 B"
LAYERS = (1, 3, 8, 24, 60, 119)
"""Of the small decoders: about 100 to 10,000 nodes."""
QUICK_LAYERS = (1, 3)
ROUNDS = 3
SECONDS_LIMIT, MEMORY_LIMIT, GROWTH_LIMIT = 10.0, 1.5, 1.5
LIMIT = 900.0
REMOVED = 0.25
_ABSENT = "weights-that-nobody-has.bin"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write `results/channels_scale.json` and the plot beside it."""
    options = read_options("channels_scale", __doc__, arguments)
    results = Results(
        "channels_scale",
        "channel analysis: seconds and memory on a decoder of a billion parameters, time per node up to 10,000 nodes",
        options.command,
        options.complete,
    )
    rounds = 1 if options.quick else ROUNDS
    isolation = Isolation()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if not options.quick:
            results.rows.append(large(isolation, folder, rounds))
            results.goals += goals_of_large(results.rows[0])
        rows = per_node(isolation, folder, QUICK_LAYERS if options.quick else LAYERS, rounds)
    results.rows += rows
    if not any("failure" in row for row in rows):
        results.goals.append(goal_of_growth(rows))
        plot(rows, (FOLDER if options.complete else PARTIAL_FOLDER) / "channels_scale.svg")
    results.show_and_write(COLUMNS)


def large(isolation: Isolation, folder: Path, rounds: int) -> Row:
    """The decoder of a billion parameters."""
    progress(f"{LARGE}: building and loading")
    file = folder / "large.onnx"
    row: Row = {"model": LARGE, **write(Size(), file)}
    progress(f"{LARGE}: analysis")
    found = [isolation.run(analysis, str(file), LIMIT) for _ in range(rounds)]
    failures = [one for one in found if "failure" in one]
    if failures:
        return row | failures[0]
    row |= max(found, key=lambda one: one["peak_bytes"])
    row |= medians(found)
    progress(f"{LARGE}: allocations, removal")
    return row | isolation.run(allocations, str(file), LIMIT) | {"removal": isolation.run(removal, str(file), LIMIT)}


def per_node(isolation: Isolation, folder: Path, layers: Sequence[int], rounds: int) -> list[Row]:
    """Small decoders in turns, each in a new process."""
    rows: list[Row] = []
    for count in layers:
        name = f"decoder of {count} layer{'s' if count > 1 else ''}, hidden size 64"
        progress(f"{name}: building and loading")
        rows.append({"model": name, "layers": count, **write(small(count), folder / f"{count}.onnx")})
    found: dict[int, list[Row]] = {count: [] for count in layers}
    for turn in range(rounds):
        for count in layers:
            progress(f"{count} layers: {turn + 1} of {rounds}")
            found[count].append(isolation.run(analysis, str(folder / f"{count}.onnx"), LIMIT))
    for row in rows:
        measured = found[row["layers"]]
        failures = [one for one in measured if "failure" in one]
        row |= failures[0] if failures else measured[-1] | medians(measured)
        if not failures:
            row["microseconds_per_node"] = row["cpu_seconds"] / row["nodes"] * 1e6
    return rows


def medians(found: Sequence[Row]) -> Row:
    """The median of wall-clock and of CPU seconds, and all that were measured."""
    row: Row = {}
    for key in ("seconds", "cpu_seconds"):
        row[f"all_{key}"] = [one[key] for one in found]
        row[key] = median(row[f"all_{key}"])
    return row


def write(size: Size, file: Path) -> Row:
    """Build a decoder, bring it into canonical form, and save it without its weights."""
    import graphopt

    reads: Counter[str] = Counter()
    built = Decoder(size, lambda name: reads.update([name])).model()
    start = time.perf_counter()
    model = graphopt.load(built)
    row: Row = {
        "load_seconds": time.perf_counter() - start,
        "weights_read_by_load": len(reads),
        "nodes": sum(1 for _ in model.graph.all_nodes()),
        "parameters": parameters(model),
    }
    for value in weights(model):
        tensor = value.const_value
        assert tensor is not None
        value.const_value = ir.ExternalTensor(
            _ABSENT, 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape), name=value.name or "", base_dir=""
        )
    ir.save(model, file)
    return row


# In a process of their own ------------------------------------------------------------------------------------------


def analysis(file: str) -> Row:
    """Seconds of `channel_groups`, and resident memory before, at the peak, and after."""
    import graphopt

    graphopt.channel_groups(graphopt.load(Decoder(small(1)).model()))
    gc.collect()
    bare = _resident("VmRSS")
    model = ir.load(file)
    gc.collect()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak counts from here
    start, cpu_start = time.perf_counter(), time.process_time()
    groups = graphopt.channel_groups(model)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    peak = _resident("VmHWM")
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "groups": len(groups),
        "prunable_groups": sum(group.prunable for group in groups),
        "units": sum(group.units for group in groups),
        "prunable_units": sum(group.units for group in groups if group.prunable),
        "labels": len(groups.units.analysis.store.labels),
        "libraries_bytes": bare,
        "resident_bytes": before,
        "peak_bytes": peak,
        "memory_ratio": peak / before,
    }


def allocations(file: str) -> Row:
    """What Python and numpy allocate for the graph, and for the analysis on top of it."""
    import graphopt

    graphopt.channel_groups(graphopt.load(Decoder(small(1)).model()))
    gc.collect()
    tracemalloc.start()
    model = ir.load(file)
    gc.collect()
    graph, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    groups = graphopt.channel_groups(model)
    _, peak = tracemalloc.get_traced_memory()
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert groups
    return {"graph_bytes": graph, "analysis_peak_bytes": peak - graph, "analysis_kept_bytes": kept - graph}


def removal(file: str) -> Row:
    """Seconds of `remove_channels` for a quarter of the hidden units of every MLP, weights being zeros."""
    import graphopt

    model = ir.load(file)
    for value in weights(model):
        tensor = value.const_value
        assert tensor is not None
        value.const_value = ir.Tensor(np.zeros(tuple(tensor.shape), np.float32), name=value.name)
    groups = graphopt.channel_groups(model)
    chosen = {
        group.name: range(int(REMOVED * group.units))
        for group in groups
        if group.prunable and group.role == "mlp hidden"
    }
    start = time.perf_counter()
    smaller = graphopt.remove_channels(model, {name: list(units) for name, units in chosen.items()}, groups=groups)
    return {
        "seconds": time.perf_counter() - start,
        "groups": len(chosen),
        "units": sum(map(len, chosen.values())),
        "parameters": parameters(smaller),
        "peak_bytes": _resident("VmHWM"),
    }


def _resident(field: str) -> int:
    """A figure of /proc/self/status in bytes: VmRSS now, VmHWM at the peak."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


# Verdict ------------------------------------------------------------------------------------------------------------


def goals_of_large(row: Row) -> list[Goal]:
    """Time and memory."""
    if "failure" in row:
        return [Goal(f"{LARGE}: the analysis reads no weight and succeeds", row["failure"], False)]
    mega = {key: row[key] / 1e6 for key in ("resident_bytes", "peak_bytes", "graph_bytes", "analysis_peak_bytes")}
    return [
        Goal(
            f"{LARGE}: analysed in under {SECONDS_LIMIT:g} s, no weight read",
            f"{row['seconds']:.2f} s for {row['nodes']} nodes, {row['units']} units",
            row["seconds"] < SECONDS_LIMIT,
        ),
        Goal(
            f"{LARGE}: peak of the process under {MEMORY_LIMIT} times what it holds with the graph, weights not loaded",
            f"{row['memory_ratio']:.2f} times, {mega['peak_bytes']:.0f} MB of {mega['resident_bytes']:.0f} MB; "
            f"allocated {mega['graph_bytes']:.1f} MB for the graph, "
            f"{mega['analysis_peak_bytes']:.1f} MB at the analysis' peak",
            row["memory_ratio"] < MEMORY_LIMIT,
        ),
    ]


def goal_of_growth(rows: Sequence[Row]) -> Goal:
    """Constant time per node: the largest graph against the cheapest one."""
    last, least = rows[-1]["microseconds_per_node"], min(row["microseconds_per_node"] for row in rows)
    figures = ", ".join(f"{row['microseconds_per_node']:.0f}" for row in rows)
    return Goal(
        f"CPU time per node at {rows[-1]['nodes']} nodes at most {GROWTH_LIMIT} times the least",
        f"{last / least:.2f} times; microseconds at {', '.join(str(row['nodes']) for row in rows)} nodes: {figures}",
        last <= GROWTH_LIMIT * least,
    )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Microseconds per node over the number of nodes: every measurement, and a line through the medians."""
    try:
        import matplotlib
    except ImportError:
        progress("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "graphopt"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for row in rows:
        measured = [seconds / row["nodes"] * 1e6 for seconds in row["all_cpu_seconds"]]
        axes.plot([row["nodes"]] * len(measured), measured, "o", color="tab:gray", markersize=4)
    middle = [row["microseconds_per_node"] for row in rows]
    axes.plot([row["nodes"] for row in rows], middle, "-", color="tab:blue", label=f"median of {ROUNDS}")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("nodes of the decoder")
    axes.set_ylabel("analysis, CPU microseconds per node")
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


COLUMNS: tuple[Column, ...] = (
    ("model", lambda row: row["model"]),
    ("nodes", lambda row: f"{row['nodes']:,}"),
    ("parameters", lambda row: f"{row['parameters'] / 1e6:,.1f} M"),
    ("groups", lambda row: f"{row['prunable_groups']}/{row['groups']}" if "groups" in row else "-"),
    ("units", lambda row: f"{row['units']:,}" if "units" in row else "-"),
    ("seconds", lambda row: f"{row['seconds']:.2f}" if "seconds" in row else "-"),
    ("CPU s", lambda row: f"{row['cpu_seconds']:.2f}" if "cpu_seconds" in row else "-"),
    ("CPU us/node", lambda row: f"{row['cpu_seconds'] / row['nodes'] * 1e6:.0f}" if "cpu_seconds" in row else "-"),
    ("MB with graph", lambda row: f"{row['resident_bytes'] / 1e6:.0f}" if "resident_bytes" in row else "-"),
    ("peak MB", lambda row: f"{row['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in row else "-"),
    ("load s", lambda row: f"{row['load_seconds']:.1f}"),
    ("removal s", lambda row: f"{row['removal']['seconds']:.1f}" if "seconds" in row.get("removal", {}) else ""),
    ("", lambda row: row.get("failure", "")[:60]),
)


if __name__ == "__main__":
    main()
