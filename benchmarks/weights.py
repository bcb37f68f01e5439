"""Weights alone as integers (`Quantize(form="weights")`): memory while a decoder of 1.1 B parameters is made 4-bit,
file size, error and speed of 4 and 8 bits against fp32 at 1 and 128 tokens, and recipe `int4-weights` against
onnxruntime's own 4 bits.

    python -m benchmarks.weights

Memory: the decoder lies in a file with external float32 weights, written piece by piece. A new interpreter loads it,
runs the passes of recipe `int4-weights` and saves; a thread samples its anonymous memory, and what was there before
loading is subtracted. The mapped file is no anonymous memory: the system may drop its pages at any time; the figure
with them is beside. Speed: CPU time of this process, one thread, in turns with fp32. Weights are random and normal, so
errors compare the forms and say nothing of a trained network.
"""

from __future__ import annotations

import gc
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from benchmarks.contest import BEYOND_NOISE, contest
from benchmarks.decoder import Decoder, Size, parameters, small, weights
from benchmarks.isolation import Isolation
from benchmarks.results import Column, Goal, Results, Row, progress, ratio, read_options
from benchmarks.rivals import weights_alone, write_all

LARGE, QUICK = Size(), Size(layers=2, hidden=512, heads=8, groups=2, width=64, mlp=1408, vocabulary=4000)
BLOCKS = Size(layers=2, hidden=1024, heads=16, groups=4, width=64, mlp=2816, vocabulary=512)
"""What is timed: 22 M parameters, more than caches hold."""
MEMORY_LIMIT = 1.5
"""Peak of anonymous memory: so many times the largest weight, and the size of the result once."""
TOKENS = (1, 128)
BLOCK_SIZES, ACCURACY_LEVELS = (32, 128), (0, 4)
"""Of the rivals: 0 computes in float32 (their default), 4 rounds activations to int8."""
OURS, FLOAT = "graphopt int4-weights", "fp32"
SAMPLING_SECONDS = 0.005
LIMIT = 3600.0
_PIECE = 2**22
"""Elements of a weight that are made and written at a time."""


@dataclass(frozen=True)
class Variant:
    """One way to quantize: options of the pass."""

    name: str
    options: Mapping[str, object]


_FORM = {"form": "weights", "search": False}
VARIANTS = (
    Variant("4 bits, blocks of 32", {**_FORM, "weight_bits": 4}),
    Variant("4 bits, blocks of 32, symmetric", {**_FORM, "weight_bits": 4, "symmetric": True}),
    Variant("4 bits, blocks of 32, error feedback", {**_FORM, "weight_bits": 4, "rounding": "error-feedback"}),
    Variant("4 bits, blocks of 32, level 0", {**_FORM, "weight_bits": 4, "contrib": True, "accuracy_level": 0}),
    Variant("4 bits, blocks of 128", {**_FORM, "weight_bits": 4, "block_size": 128}),
    Variant("4 bits, one scale an output", {**_FORM, "weight_bits": 4, "block_size": 0}),
    Variant("2 bits, blocks of 32", {**_FORM, "weight_bits": 2}),
    Variant("8 bits, blocks of 32", {**_FORM, "weight_bits": 8}),
    Variant("8 bits, blocks of 128", {**_FORM, "weight_bits": 8, "block_size": 128}),
    Variant("int8 dynamic", {"form": "dynamic", "search": False}),
)
QUICK_VARIANTS = (VARIANTS[0], VARIANTS[7])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write `results/weights.json`."""
    options = read_options("weights", __doc__, arguments, seconds=8.0)
    results = Results(
        "weights",
        "weights alone as integers: memory of the conversion, file size, error and speed against fp32",
        options.command,
        options.complete,
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        row = memory(folder, QUICK if options.quick else LARGE)
        results.rows.append(row)
        results.goals += goals_of_memory(row)
        results.rows += forms(folder, QUICK_VARIANTS if options.quick else VARIANTS, options.seconds)
        for block_size in BLOCK_SIZES[:1] if options.quick else BLOCK_SIZES:
            rows, goals = against_onnxruntime(folder, block_size, options.seconds)
            results.rows += rows
            results.goals += goals
    results.show_and_write(COLUMNS)


# Memory -------------------------------------------------------------------------------------------------------------


def memory(folder: Path, size: Size) -> Row:
    """Load, passes and save in a new interpreter."""
    file = folder / "decoder.onnx"
    progress("writing the decoder")
    row: Row = {"model": "decoder", "form": "4 bits, blocks of 32", **write(size, file)}
    progress(f"{row['parameters'] / 1e9:.2f} B parameters: load, quantize, save")
    return row | Isolation().run(convert, str(file), LIMIT)


def write(size: Size, file: Path) -> Row:
    """A decoder with random weights in a data file beside it, no more than a piece of one in memory."""
    model = Decoder(size).model()
    model.graph.name = file.stem
    generator = np.random.default_rng(0)
    data, offset, largest = file.with_suffix(".data"), 0, 0
    with data.open("wb") as stream:
        for value in weights(model):
            tensor = value.const_value
            assert tensor is not None
            shape = tuple(int(length) for length in tensor.shape)
            for begin in range(0, tensor.size, _PIECE):
                count = min(_PIECE, tensor.size - begin)
                stream.write(generator.standard_normal(count, np.float32) / np.float32(shape[0] ** 0.5))
            value.const_value = ir.ExternalTensor(
                data.name,
                offset,
                tensor.nbytes,
                tensor.dtype,
                shape=ir.Shape(shape),
                name=value.name or "",
                base_dir=file.parent,
            )
            offset, largest = offset + tensor.nbytes, max(largest, tensor.nbytes)
    for name, value in model.graph.initializers.items():
        if name.split(".")[-2:-1] and "norm" in name.split(".")[-2] and value.shape is not None:
            value.const_value = ir.tensor(np.ones(tuple(value.shape.numpy()), np.float32), name=name)
        if name == "frequencies":
            half = np.arange(size.width // 2, dtype=np.float32)[None] / (size.width // 2)
            value.const_value = ir.tensor(np.float32(10000.0) ** -half, name=name)
    ir.save(model, file)
    return {
        "parameters": parameters(model),
        "largest_bytes": largest,
        "float_bytes": offset + file.stat().st_size,
    }


def convert(file: str) -> Row:
    """What the user does, after the same on a small decoder, so that libraries are loaded and caches filled."""
    import graphopt
    from graphopt.passes.contract import Context
    from graphopt.recipe import preset

    def run(source: Path, target: Path) -> None:
        model = graphopt.load(source)
        for single in preset("int4-weights").passes:
            single.run(model, Context())
        graphopt.save(model, target)

    source = Path(file)
    warm = source.with_name("warm.onnx")
    write(small(1), warm)
    run(warm, warm.with_name("warm.int4.onnx"))
    gc.collect()
    target = source.with_name("decoder.int4.onnx")
    anonymous, total = _status("RssAnon"), _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    start, cpu_start = time.perf_counter(), time.process_time()
    with sampled() as peak:
        run(source, target)
    saved = target.stat().st_size
    beside = target.with_name(f"{target.name}.data")
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu_start,
        "saved_bytes": saved + (beside.stat().st_size if beside.exists() else 0),
        "anonymous_bytes": peak[0] - anonymous,
        "resident_bytes": _status("VmHWM") - total,
    }


@contextmanager
def sampled() -> Iterator[list[int]]:
    """The largest anonymous memory of this process, sampled by a thread; read after the block."""
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLING_SECONDS):
            peak[0] = max(peak[0], _status("RssAnon"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def _status(field: str) -> int:
    """A figure of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def goals_of_memory(row: Row) -> list[Goal]:
    """The bound on anonymous memory."""
    claim = f"peak memory under {MEMORY_LIMIT} times the largest weight and the size of the result"
    if "failure" in row:
        return [Goal(claim, row["failure"], False)]
    bound = MEMORY_LIMIT * row["largest_bytes"] + row["saved_bytes"]
    figures = f"{row['anonymous_bytes'] / 1e6:.0f} MB anonymous, bound {bound / 1e6:.0f} MB"
    return [Goal(claim, figures, row["anonymous_bytes"] <= bound)]


# Forms --------------------------------------------------------------------------------------------------------------


def forms(folder: Path, variants: Sequence[Variant], seconds: float) -> list[Row]:
    """One row for each variant: size, error and speed of some decoder layers."""
    import graphopt
    from graphopt.ir.session import open_session
    from graphopt.ir.timing import interleave
    from graphopt.passes.contract import Context
    from graphopt.passes.quantize import Quantize
    from graphopt.recipe import preset

    file = folder / "layers.onnx"
    written = write(BLOCKS, file)
    model = graphopt.load(file)
    for single in preset("exact").passes:
        single.run(model, Context())
    generator = np.random.default_rng(1)
    feeds = {tokens: {"input_ids": generator.integers(0, BLOCKS.vocabulary, (1, tokens))} for tokens in TOKENS}
    reference = open_session(model)
    expected = reference.run_feeds(feeds[TOKENS[-1]])[0].astype(np.float64)
    rows: list[Row] = []
    for variant in variants:
        progress(variant.name)
        changed, start = model.clone(), time.process_time()
        Quantize(**variant.options).run(changed, Context())  # pyright: ignore[reportArgumentType]
        spent = time.process_time() - start
        path = graphopt.save(changed, folder / "changed.onnx")
        session = open_session(changed)
        found = session.run_feeds(feeds[TOKENS[-1]])[0]
        row: Row = {
            "model": "2 layers",
            "form": variant.name,
            "float_bytes": written["float_bytes"],
            "parameters": written["parameters"],
            "saved_bytes": path.stat().st_size,
            "cpu_seconds": spent,
            "error": float(np.linalg.norm(found - expected) / np.linalg.norm(expected)),
        }
        for tokens in TOKENS:
            timed = interleave(
                [reference, session], feeds[tokens], names=("fp32", "changed"), seconds=seconds, threads=1, target="cpu"
            )
            row[f"speed_{tokens}"] = vars(timed.speeds[1])
        rows.append(row)
    return rows


# onnxruntime's own ----------------------------------------------------------------------------------------------------


def against_onnxruntime(folder: Path, block_size: int, seconds: float) -> tuple[list[Row], list[Goal]]:
    """`optimize` with recipe `int4-weights` for one token, beside onnxruntime's 4 bits in blocks of the same size.

    The layers are those that `forms` has left in the folder.
    """
    import graphopt
    from graphopt.recipe import preset

    source = folder / "layers.onnx"
    generator = np.random.default_rng(2)
    feeds = {tokens: {"input_ids": generator.integers(0, BLOCKS.vocabulary, (1, tokens))} for tokens in TOKENS}
    recipe = preset("int4-weights").with_options("quantize", block_size=block_size)
    writers: dict[str, Callable[[Path], object]] = {
        OURS: lambda path: graphopt.optimize(source, feeds[1], recipe=recipe, quiet=True).save(path)
    }
    for level in ACCURACY_LEVELS:
        options = {"bits": 4, "block_size": block_size, "accuracy_level": level}
        writers[f"ORT MatMulNBits, level {level}"] = partial(weights_alone, source, **options)
    results = folder / f"blocks-{block_size}"
    results.mkdir()
    written = write_all("2 layers", writers, results)
    files = {OURS: written.files[OURS], FLOAT: source, **written.files}
    rows: dict[str, Row] = {
        tool: {
            "model": "2 layers",
            "form": f"{tool}, blocks of {block_size}",
            "saved_bytes": path.stat().st_size,
            "cpu_seconds": written.seconds[tool],
        }
        for tool, path in written.files.items()
    }
    goals: list[Goal] = []
    for tokens in TOKENS:
        measured = contest(files, reference=source, seconds=seconds, feeds=feeds[tokens])
        for tool, row in rows.items():
            row["error"] = measured.errors[tool]
            row |= {f"over_{tokens}": vars(measured.speed_over(tool))} if tool != OURS else {}
        rows[OURS][f"speed_{tokens}"] = vars(measured.speed_over(FLOAT))
        best = min((tool for tool in rows if tool != OURS), key=lambda tool: measured.speed_over(tool).median)
        beaten = measured.is_beaten_by(best) or measured.is_beaten_by(FLOAT)
        claim = f"blocks of {block_size}, {tokens} tokens: not slower than fp32, nor than ORT's best beyond noise"
        figures = (
            f"{ratio(vars(measured.speed_over(FLOAT)))} of fp32, {ratio(vars(measured.speed_over(best)))} of {best}"
        )
        goals.append(Goal(f"{claim} (ratio {BEYOND_NOISE})", figures, not beaten))
    return list(rows.values()), goals


COLUMNS: tuple[Column, ...] = (
    ("model", lambda row: row["model"]),
    ("form", lambda row: row["form"]),
    ("parameters", lambda row: f"{row['parameters'] / 1e6:,.1f} M" if "parameters" in row else "-"),
    ("fp32 MB", lambda row: f"{row['float_bytes'] / 1e6:,.1f}" if "float_bytes" in row else "-"),
    ("MB", lambda row: f"{row['saved_bytes'] / 1e6:,.1f}" if "saved_bytes" in row else "-"),
    ("error", lambda row: f"{row['error']:.4f}" if "error" in row else "-"),
    *(
        (f"x fp32, {tokens} tokens", lambda row, key=f"speed_{tokens}": ratio(row[key]) if key in row else "-")
        for tokens in TOKENS
    ),
    *(
        (f"graphopt x it, {tokens} tokens", lambda row, key=f"over_{tokens}": ratio(row[key]) if key in row else "-")
        for tokens in TOKENS
    ),
    ("CPU s", lambda row: f"{row['cpu_seconds']:.1f}" if "cpu_seconds" in row else "-"),
    ("largest MB", lambda row: f"{row['largest_bytes'] / 1e6:.0f}" if "largest_bytes" in row else "-"),
    ("peak anonymous MB", lambda row: f"{row['anonymous_bytes'] / 1e6:.0f}" if "anonymous_bytes" in row else "-"),
    ("with mapped files MB", lambda row: f"{row['resident_bytes'] / 1e6:.0f}" if "resident_bytes" in row else "-"),
    ("", lambda row: row.get("failure", "")[:60]),
)


if __name__ == "__main__":
    main()
