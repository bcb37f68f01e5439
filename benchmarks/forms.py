"""How fast onnxruntime runs one computation written in several ways: the figures behind the fuse-* passes.

    python -m benchmarks.forms                      # every family
    python -m benchmarks.forms gelu attention-vit   # families by name, or by the start of a name
    python -m benchmarks.forms --rounds 41 gelu

Each family is one function of its inputs, written as several ONNX graphs; the first form is the baseline. The
forms are timed in turn (A B C A B C ...), one intra-op thread, process CPU time, onnxruntime's default graph
optimisations. Printed per form: the median over rounds of baseline time / form time (above 1: faster than the
baseline) with its quartiles, the median time, the largest error against the baseline's unoptimized output, and
what onnxruntime's own fusions leave of the graph.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from benchmarks.form_families import FAMILIES, Family, Form
from graphopt.ir.compare import compare_outputs
from graphopt.ir.session import open_session

SECONDS_PER_TURN = 0.03
"""A turn of one form repeats it for about this much CPU time: far above the resolution of the clock."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Time the families that the command line names."""
    parser = argparse.ArgumentParser(description="Time the forms of one computation in onnxruntime.")
    parser.add_argument("families", nargs="*", help="names of families, or starts of names; all when empty")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each form (default 15)")
    options = parser.parse_args(arguments)
    chosen = [
        name for name in FAMILIES if not options.families or any(name.startswith(start) for start in options.families)
    ]
    if not chosen:
        parser.error(f"no such family; families are {', '.join(FAMILIES)}")
    machine = platform.processor() or platform.machine()
    print(
        f"{datetime.date.today()}  onnxruntime {onnxruntime.__version__}  {machine}  1 thread  {options.rounds} rounds"
    )
    for name in chosen:
        _time_family(name, FAMILIES[name], options.rounds)


def build_model(family: Family, form: Form) -> ir.Model:
    """The graph of one form, with the family's weights filled from a fixed random stream."""
    declared = ", ".join(
        f"float[{','.join(map(str, shape))}] {name}" for name, shape in (family.inputs | family.weights).items()
    )
    output = ",".join(map(str, family.output))
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["": {form.opset}]>\n'
        f"g ({declared}) => (float[{output}] y)\n<{form.constants}>\n{{ {form.body} }}"
    )
    random = np.random.default_rng(0)
    for value in list(model.graph.inputs):
        if value.name in family.weights:
            shape = family.weights[value.name]
            array = (random.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
            model.graph.inputs.remove(value)
            if not value.uses():
                continue
            value.const_value = ir.tensor(array, name=value.name)
            model.graph.register_initializer(value)
    return model


def _time_family(name: str, family: Family, rounds: int) -> None:
    random = np.random.default_rng(1)
    feeds = {key: random.standard_normal(shape).astype(np.float32) * 2 for key, shape in family.inputs.items()}
    models = {form_name: build_model(family, form) for form_name, form in family.forms.items()}
    expected = open_session(next(iter(models.values())), optimized=False).run_feeds(feeds)
    runs: dict[str, Callable[[], object]] = {}
    notes: dict[str, str] = {}
    print(f"\n{name}: {family.about}")
    for form_name, model in models.items():
        try:
            with tempfile.TemporaryDirectory() as folder:
                path = str(Path(folder) / "optimized.onnx")
                session = open_session(model, optimized_model_path=path)
                left = collections.Counter(node.op_type for node in onnx.load(path).graph.node)
            error = compare_outputs(expected, session.run_feeds(feeds))
        except Exception as problem:  # a form that this onnxruntime cannot run is a finding, not a failure
            print(f"  {form_name:34} cannot run: {str(problem).splitlines()[0][:120]}")
            continue
        runs[form_name] = lambda session=session: session.run(None, feeds)
        ops = " ".join(f"{op}{'' if count == 1 else f'x{count}'}" for op, count in sorted(left.items()))
        notes[form_name] = f"error {error:.0e}  {ops}"
    seconds = _interleaved(runs, rounds)
    baseline = np.array(next(iter(seconds.values())))
    for form_name, times in seconds.items():
        low, ratio, high = np.percentile(baseline / np.array(times), [25, 50, 75])
        print(
            f"  {form_name:34} x{ratio:5.2f} ({low:.2f}-{high:.2f})  {np.median(times) * 1e6:9.1f} us  "
            f"{notes[form_name]}"
        )


def _interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds per call of each form and round, the forms taking turns."""
    repeats = {name: max(1, int(SECONDS_PER_TURN / _cpu_seconds(run, 3))) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(_cpu_seconds(run, repeats[name]))
    return seconds


def _cpu_seconds(run: Callable[[], object], repeats: int) -> float:
    run()
    start = time.process_time()
    for _ in range(repeats):
        run()
    return (time.process_time() - start) / repeats


if __name__ == "__main__":
    main()
