"""How long each kernel takes inside the whole graph, and which nodes of the graph it computes.

A kernel timed alone in a model of one node misses what surrounds it: changes of layout, caches that its neighbour has
filled, what was fused into it. So the whole graph runs under onnxruntime's own profiler, several models in turns where
they are to be compared, and the time of each kernel is put down to the nodes that it computes
(`graphopt.latency.attribution`). See docs/adr/0014-latency-is-measured-inside-whole-graphs.md.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.errors import DataError, GraphoptError
from graphopt.inputs.observe import bound_sizes
from graphopt.ir.cost import ModelCost, cost
from graphopt.ir.session import Feeds, Session, open_session
from graphopt.ir.timing import Latency
from graphopt.latency.attribution import Marked, Placed, attribute, mark, placed_kernels
from graphopt.latency.calm import (
    EXCESS,
    UNDISTURBED,
    believed_level,
    inner_mean,
    kernels_together,
    scaled_to,
    undisturbed,
)

LEAST_ROUNDS = 15
"""Each model runs at least so often."""
_MOST_ROUNDS = 1000
_WARM_UP = 2
_MOST_EVENTS = 250_000
"""onnxruntime drops events above a million; each is half a kilobyte in its file."""
STABLE = 0.005
"""Enough rounds were run once the standard error of every median, about its spread over the root of the number of runs,
is below this share of it."""
NOISY = 0.01
"""Above this error, when time is up, the measurement is called noisy."""
_CHAIN, _CHAIN_ROUNDS = 64, 40
_LEAST_CALM = 7
"""Runs go on until so many were undisturbed, or time is up."""

_DISAGREE, _DISAGREE_MICROSECONDS = 0.1, 20.0
"""How far the sum over kernels may be from the time of the whole, as a share of that and beyond, without a note."""

Clock = Callable[[], float]


@dataclass(frozen=True)
class Kernel:
    """One kernel of the graph as onnxruntime runs it.

    Attributes:
        name: as onnxruntime calls it, with the names of the model.
        operator: for instance "Conv", "FusedMatMul", "ReorderOutput".
        dtypes: element types of the inputs, as onnxruntime writes them: "float", "uint8".
        input_shapes: of the inputs that are tensors.
        output_dtypes: element types of the outputs.
        output_shapes: shapes of the outputs.
        provider: "CPUExecutionProvider" and the like.
        microseconds: time in one run of the model, all calls together, without that of kernels in its subgraphs: mean
            of the inner half of the runs.
        low: first quartile.
        high: third quartile.
        runs: how many runs were counted.
        calls: how often it is called in one run: more than once in a loop, 0 in a branch that is not taken.
        nodes: the nodes of the model that it computes, the one with the most work first; empty for a change of layout.
        serves: the node that a change of layout is for; None for all other kernels.
        inside: name of the kernel in whose subgraph it runs, None in the main graph.
        attributes: of the operator as onnxruntime runs it, as text; empty where the provider hides them.
    """

    name: str
    operator: str
    dtypes: tuple[str, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    output_dtypes: tuple[str, ...]
    output_shapes: tuple[tuple[int, ...], ...]
    provider: str
    microseconds: float
    low: float
    high: float
    runs: int
    calls: float
    nodes: tuple[str, ...]
    serves: str | None = None
    inside: str | None = None
    attributes: str = ""

    @property
    def node(self) -> str | None:
        """The node that the time is put down to: the one with the most work, or the one that is served."""
        return self.nodes[0] if self.nodes else self.serves


@dataclass(frozen=True)
class KernelProfile:
    """The kernels of one model, in the order in which they run, and the time of the whole.

    Attributes:
        kernels: all kernels, those of subgraphs after the one that holds them.
        latency: of a run of the model without the profiler, milliseconds.
        rounds: how often the model ran, with the profiler and without it.
        target: "cpu", "cuda" or "openvino".
        threads: intra-op threads, 0 for onnxruntime's default.
        names: every node of the model, as `graphopt.latency.attribution.node_names` calls them, in its order.
        without_kernel: nodes that onnxruntime has folded or never runs; their time is 0.
        notes: what to know about the measurement, for instance that the machine is noisy.
        cost: multiply-accumulates and bytes of the nodes at the sizes of the feeds.
        macs: multiply-accumulates of each of `names`.
    """

    kernels: tuple[Kernel, ...]
    latency: Latency
    rounds: int
    target: str
    threads: int
    names: tuple[str, ...]
    without_kernel: tuple[str, ...]
    notes: tuple[str, ...]
    cost: ModelCost = field(repr=False, compare=False)
    macs: tuple[int, ...] = field(repr=False, default=())

    @property
    def microseconds(self) -> float:
        """Sum over the kernels, each once."""
        return sum(kernel.microseconds for kernel in self.kernels)

    @property
    def layout_microseconds(self) -> float:
        """Of that, in changes of layout."""
        return sum(kernel.microseconds for kernel in self.kernels if not kernel.nodes)

    def by_node(self) -> dict[str, float]:
        """Microseconds of each node of the model, changes of layout for it included; the sum is `microseconds`.

        A kernel that computes several nodes is put down to the one with the most work; the others have 0. What belongs
        to no node, if there is any, is under "".
        """
        found = dict.fromkeys(self.names, 0.0)
        for kernel in self.kernels:
            found[kernel.node or ""] = found.get(kernel.node or "", 0.0) + kernel.microseconds
        return found


def profile_kernels(
    model: ir.Model,
    feeds: Feeds,
    *,
    target: str = "cpu",
    threads: int = 1,
    seconds: float = 5.0,
    against: Sequence[ir.Model] = (),
    clock: Clock | None = None,
) -> tuple[KernelProfile, ...]:
    """Time every kernel of a model inside the whole graph, and of others beside it in turns.

    Runs are repeated until the median of each model is known to `STABLE`, `LEAST_ROUNDS` at least, or until time is up.
    Each round runs every model once with onnxruntime's profiler and once without, so that what disturbs the machine
    disturbs all alike. With one thread on the CPU only runs that had the core for themselves are counted, where there
    are enough of them; where other processes took so much of the core that the kernels together still take longer than
    the whole does in CPU time, the slower calls of each kernel are left out until they no longer do; where even the
    fastest take too long, they are scaled to the whole, and a note says so. Nothing is written but to a temporary
    folder, which is removed.

    Args:
        model: a model in canonical form; it is not changed.
        feeds: one set of inputs, which fits all models.
        target: "cpu", "cuda" or "openvino".
        threads: intra-op threads, 0 for onnxruntime's default.
        seconds: about how long to measure, all models together.
        against: more models with the same inputs.
        clock: seconds; the thread's CPU time for one thread on the CPU, else wall-clock time, where not given.

    Returns:
        One profile a model, in order.

    Raises:
        DataError: `seconds` is not positive, or the feeds do not fit a model.
        InvalidGraphError: onnxruntime cannot load a model.
        GraphoptError: the target is unknown or not in this build of onnxruntime.

    Example:
        >>> model = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 21]> g (float[8,64] x) => (float[8,8] y) '
        ...     '{ [turn] t = Transpose (x) [product] h = MatMul (x, t) [weights] y = Softmax (h) }')
        >>> (found,) = profile_kernels(model, {"x": np.ones((8, 64), np.float32)}, seconds=0.1)
        >>> [(kernel.operator, kernel.nodes) for kernel in found.kernels]
        [('FusedMatMul', ('product', 'turn')), ('Softmax', ('weights',))]
    """
    if not seconds > 0:
        raise DataError(f"the time to measure is {seconds}", where="seconds", help="give a number of seconds above 0")
    own_core = target == "cpu" and threads == 1
    tick = clock or (time.thread_time if own_core else time.perf_counter)
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        runs: list[_Model] = []
        for number, one in enumerate((model, *against)):
            place = Path(folder) / str(number)
            place.mkdir()
            runs.append(_Model(one, feeds, place, target=target, threads=threads, own_core=own_core))
        rounds, notes = _run_in_turns(runs, feeds, seconds, tick)
        overhead = profiler_overhead(Path(folder), target=target, threads=threads)
        return tuple(one.profile(rounds, notes, overhead) for one in runs)


@dataclass(frozen=True)
class Overhead:
    """What the profiler itself costs, microseconds a call of a kernel.

    Attributes:
        counted: inside of what it reports as the time of the kernel.
        between: after that, inside of the kernel that holds a subgraph.
    """

    counted: float
    between: float


def profiler_overhead(folder: Path, *, target: str, threads: int) -> Overhead:
    """Measured on a chain of operators on a single number, with the profiler and without it.

    What the chain takes without the profiler, divided by its length, is what a call costs; what the profiler
    reports beyond that is its own time.
    """
    names = [f"v{number}" for number in range(_CHAIN)]
    links = " ".join(
        f"{after} = {'Tanh' if index % 2 else 'Sin'} ({before})"
        for index, (before, after) in enumerate(pairwise(["x", *names, "y"]))
    )
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 21]> g (float[1] x) => (float[1] y) {{ {links} }}')
    feeds = {"x": np.ones(1, np.float32)}
    place = folder / "overhead"
    place.mkdir()
    chain = _Model(model, feeds, place, target=target, threads=threads, own_core=False)
    chain.warm_up(feeds)
    for _ in range(_CHAIN_ROUNDS):
        chain.run(feeds, time.perf_counter)
    runs = chain.events()
    times, _ = _times(chain.placed, [run for run, _ in runs], Overhead(0.0, 0.0))
    reported = inner_mean(times.sum(axis=1))
    length = max(len(chain.placed), 1)
    whole = inner_mean(np.array([microseconds for _, microseconds in runs]))
    return Overhead(
        max(reported - inner_mean(np.array(chain.seconds) * 1e6), 0.0) / length, max(whole - reported, 0.0) / length
    )


def _run_in_turns(runs: Sequence[_Model], feeds: Feeds, seconds: float, clock: Clock) -> tuple[int, list[str]]:
    """How many rounds were run, and what to know about them."""
    for one in runs:
        one.warm_up(feeds)
    most = max(LEAST_ROUNDS, min(_MOST_ROUNDS, _MOST_EVENTS // sum(max(len(one.placed), 1) for one in runs)))
    deadline, rounds, error = time.perf_counter() + seconds, 0, np.inf
    is_stable = False
    while rounds < LEAST_ROUNDS or (rounds < most and not is_stable and time.perf_counter() < deadline):
        for turn in range(len(runs)):
            runs[(turn + rounds) % len(runs)].run(feeds, clock)
        rounds += 1
        error = max(one.latency().spread for one in runs) / np.sqrt(rounds)
        is_stable = error <= STABLE and all(one.calm_runs() >= _LEAST_CALM for one in runs)
    if error <= NOISY:
        return rounds, []
    spread = max(one.latency().spread for one in runs)
    return rounds, [
        f"the machine is noisy: half of the {rounds} runs differ from the median by more than {spread:.0%}; "
        "differences below that mean nothing. Close what else runs, or measure longer"
    ]


class _Model:
    """One model under measurement: a session with the profiler and one without."""

    def __init__(
        self, model: ir.Model, feeds: Feeds, folder: Path, *, target: str, threads: int, own_core: bool
    ) -> None:
        self.target, self.threads, self.own_core = target, threads, own_core
        self.marked = mark(model)
        saved = folder / "optimized.onnx"
        prefix = str(folder / "profile")
        try:
            self.profiled = open_session(
                self.marked.model,
                target=target,
                threads=threads,
                optimized_model_path=str(saved),
                profile_prefix=prefix,
            )
            self.placed = placed_kernels(onnx.load(str(saved), load_external_data=False).graph)
        except (GraphoptError, OSError, ValueError):
            if target == "cpu":
                raise
            # a graph with parts that the provider has compiled cannot be saved: names of kernels must do
            self.profiled = open_session(self.marked.model, target=target, threads=threads, profile_prefix=prefix)
            self.placed: list[Placed] = []
        self.plain: Session = open_session(model, target=target, threads=threads)
        self.cost = cost(model, bound_sizes(model, feeds))
        self.seconds: list[float] = []
        self.shares: list[float] = []

    def warm_up(self, feeds: Feeds) -> None:
        """Run twice; what fits no model is found here."""
        for _ in range(_WARM_UP):
            self.plain.run_feeds(feeds)
            self.profiled.run_feeds(feeds)

    def run(self, feeds: Feeds, clock: Clock) -> None:
        """Run once without the profiler, by the clock, and once with it."""
        start = clock()
        self.plain.run(None, feeds)  # type: ignore[arg-type]
        self.seconds.append(clock() - start)
        thread = time.thread_time()
        wall = time.perf_counter()
        self.profiled.run(None, feeds)  # type: ignore[arg-type]
        wall = time.perf_counter() - wall
        self.shares.append((time.thread_time() - thread) / max(wall, 1e-9))

    def calm_runs(self) -> int:
        """How many runs with the profiler had the core for themselves; all where that is not known."""
        return sum(share >= UNDISTURBED for share in self.shares) if self.own_core else len(self.shares)

    def latency(self) -> Latency:
        """Of the runs so far, milliseconds."""
        low, median, high = np.percentile(np.maximum(self.seconds, 1e-9), [25, 50, 75]) * 1e3
        return Latency(float(median), float(low), float(high))

    def events(self) -> list[tuple[_Run, float]]:
        """What the profiler saw in each run but the first; the session with it cannot be used any more."""
        file = self.profiled.end_profiling()
        return list(_runs(json.loads(Path(file).read_bytes())))[_WARM_UP:]

    def profile(self, rounds: int, notes: Sequence[str], overhead: Overhead) -> KernelProfile:
        """Put what was measured down to kernels and nodes."""
        runs = [run for run, _ in self.events()]
        marked, kernels = self.marked, self._executed(runs)
        known = {entry.node: (entry.macs, entry.bytes_read + entry.bytes_written) for entry in self.cost.nodes}
        work = [known.get(node, (0, 0)) for node in marked.nodes]
        lost = attribute(marked, kernels, work)
        times, calls = _times(kernels, runs, overhead)
        times, level, rough = self._believed(times)
        found = tuple(
            _kernel(marked, kernel, _first_event(kernel, runs), times[:, place], calls[place], level)
            for place, kernel in enumerate(kernels)
        )
        without = tuple(marked.names[number] for number in lost)
        whole = KernelProfile(
            found,
            self.latency(),
            rounds,
            self.target,
            self.threads,
            marked.names,
            without,
            tuple(notes),
            self.cost,
            tuple(macs for macs, _ in work),
        )
        return replace(whole, notes=(*notes, *rough, *_doubts(whole)))

    def _believed(self, times: np.ndarray) -> tuple[np.ndarray, float, list[str]]:
        """The runs to count, at which level of `inner_mean`, and what to know about it."""
        if not self.own_core:
            return times, 0.5, []
        whole = self.latency().median * 1e3
        calm = times[undisturbed(np.array(self.shares[: len(times)]))]
        level = believed_level(calm, whole)
        if kernels_together(calm, level) <= EXCESS * whole:
            return calm, level, []
        level = believed_level(times, whole)
        together = kernels_together(times, level)
        if together <= EXCESS * whole:
            return times, level, []
        note = (
            f"others had the core in every run: the kernels take {together / whole:.2f} times as long as the whole; "
            "those beyond a millisecond are scaled to add up to it and are rough. Close what else runs"
        )
        return scaled_to(times, level, whole), level, [note]

    def _executed(self, runs: Sequence[_Run]) -> list[Placed]:
        """The kernels of the graph in the order in which they run, and those that the graph does not show."""
        order = {name: place for place, name in enumerate(dict.fromkeys(name for run in runs for name in run))}
        operators = {name: events[0]["args"]["op_name"] for run in runs for name, events in run.items()}
        known = {kernel.name for kernel in self.placed}
        unknown: dict[str, list[str]] = {}
        for name in order:
            if name not in known:
                unknown.setdefault(operators[name], []).append(name)
        for kernel in self.placed:
            if not kernel.name and unknown.get(kernel.operator):  # without a name it goes by its operator and a number
                kernel.name = unknown[kernel.operator].pop(0)
        extra = [Placed(name, operator) for operator, names in unknown.items() for name in names]
        return sorted([*self.placed, *extra], key=lambda kernel: order.get(kernel.name, len(order)))


_Run = dict[str, list[dict[str, Any]]]
"""The events of one run by name of the kernel, in order."""
_SUFFIX = "_kernel_time"


def _runs(events: Sequence[Mapping[str, Any]]) -> Iterator[tuple[_Run, float]]:
    """The events of each whole run, those of its kernels come before its own, and its microseconds."""
    current: _Run = {}
    for event in events:
        name = event["name"]
        if event["cat"] == "Node" and name.endswith(_SUFFIX):
            current.setdefault(name[: -len(_SUFFIX)], []).append(dict(event))
        elif name == "model_run":
            yield current, float(event["dur"])
            current = {}


def _first_event(kernel: Placed, runs: Sequence[_Run]) -> Mapping[str, Any]:
    return next((run[kernel.name][0]["args"] for run in runs if kernel.name in run), {})


def _times(kernels: Sequence[Placed], runs: Sequence[_Run], overhead: Overhead) -> tuple[np.ndarray, np.ndarray]:
    """Microseconds [runs, kernels] of all calls in a run, without what runs inside; and the mean number of calls.

    The profiler cuts durations to whole microseconds; the middle of the last one is taken.
    """
    place = {kernel.name: index for index, kernel in enumerate(kernels)}
    times, calls = np.zeros((len(runs), len(kernels))), np.zeros((len(runs), len(kernels)))
    for row, run in enumerate(runs):
        for name, events in run.items():
            times[row, place[name]] = sum(event["dur"] + 0.5 for event in events)
            calls[row, place[name]] = len(events)
    inside = times + overhead.between * calls
    times -= overhead.counted * calls
    for index, kernel in enumerate(kernels):
        if kernel.holder is not None and kernel.holder in place:
            times[:, place[kernel.holder]] -= inside[:, index]
    return np.maximum(times, 0.0), calls.mean(axis=0)


def _doubts(profile: KernelProfile) -> Iterator[str]:
    """What makes the sum over kernels something else than the time of the whole."""
    whole = profile.latency.median * 1e3
    if abs(profile.microseconds - whole) > _DISAGREE * whole + _DISAGREE_MICROSECONDS:
        yield (
            f"the kernels take {profile.microseconds:.0f} us together, the whole {whole:.0f} us: "
            + (
                "the machine was disturbed, or several threads were at work"
                if profile.target == "cpu"
                else f"{profile.target} runs kernels beside each other, or after the call that is timed has returned"
            )
        )


def _kernel(
    marked: Marked, kernel: Placed, event: Mapping[str, Any], times: np.ndarray, calls: float, level: float
) -> Kernel:
    dtypes, shapes = _types(event.get("input_type_shape", ()), kernel.constants)
    output_dtypes, output_shapes = _types(event.get("output_type_shape", ()), {})
    return Kernel(
        marked.readable(kernel.name),
        kernel.operator,
        dtypes,
        shapes,
        output_dtypes,
        output_shapes,
        event.get("provider", ""),
        inner_mean(times, level),
        *map(float, np.percentile(times, [25, 75])),
        runs=len(times),
        calls=float(calls),
        nodes=tuple(marked.names[number] for number in kernel.nodes),
        serves=None if kernel.serves is None else marked.names[kernel.serves],
        inside=None if kernel.holder is None else marked.readable(kernel.holder),
        attributes=kernel.attributes,
    )


def _types(
    entries: Sequence[Mapping[str, Sequence[int]]], constants: Mapping[int, tuple[str, tuple[int, ...]]]
) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Element types and shapes, with the weights that onnxruntime has packed for itself and no longer lists."""
    pairs = [(dtype, tuple(shape)) for entry in entries for dtype, shape in entry.items()]
    listed = list(pairs)
    for place, constant in sorted(constants.items() if pairs else ()):
        if constant in listed:
            listed.remove(constant)
        else:
            pairs.insert(place, constant)
    return tuple(dtype for dtype, _ in pairs), tuple(shape for _, shape in pairs)
