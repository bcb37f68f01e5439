"""The command line: the public calls, one command each. Exit codes: 0 done, 1 target missed, 2 bad input or usage."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.text import Text

from graphopt.errors import DataError, GraphoptError, RecipeError, TargetMissedError

if TYPE_CHECKING:
    from graphopt.inputs.probes import InputSpec
    from graphopt.recipe import Recipe

application = typer.Typer(
    name="graphopt",
    help="Make trained networks faster and smaller in onnxruntime, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_WIDTH_OF_FILES = 160
"""Columns of text that goes to a file or a pipe, where no terminal says how wide it is."""

ModelPath = Annotated[Path, typer.Argument(metavar="MODEL.onnx", help="the ONNX file")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
Inputs = Annotated[
    Path | None,
    typer.Option("--input", metavar="FILE.npz|.npy", help="example inputs: .npz by input name, .npy for one input"),
]
Threads = Annotated[int, typer.Option(help="intra-op threads of all timings, 0 for onnxruntime's default", min=0)]
_QUANTIZED = "for a quantized model give --tolerance, for instance 0.1, and inputs of its kind: --input FILE.npy"
Target = Annotated[str, typer.Option(help="cpu, cuda or openvino")]
CalibrationPath = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE|FOLDER",
        help="calibration: .npy/.npz whose axis 0 counts samples, or a folder of such files",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PASS.OPTION=VALUE",
        help="another value of an option of a pass in the recipe, as in TOML; may be repeated",
    ),
]
Specs = Annotated[
    list[str] | None,
    typer.Option(
        "--input-spec",
        metavar="NAME:KEY=VALUE,...",
        help="what is known of an input, for inputs that are made up: kind, mean, std, low, high; may be repeated",
    ),
]


@application.callback(invoke_without_command=True)
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="show the Python traceback of errors")] = False,
    version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False,
) -> None:
    del debug  # taken out by `main`, wherever it stands on the line
    if version:
        typer.echo(f"graphopt {importlib.metadata.version('graphopt')}")
        raise typer.Exit


@application.command()
def optimize(
    model: ModelPath,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT.onnx", help="where the result goes")],
    recipe: Annotated[str, typer.Option(help="a preset (docs/passes.md), or a TOML file")] = "default",
    settings: Settings = None,
    inputs: Inputs = None,
    calibration: CalibrationPath = None,
    specs: Specs = None,
    tolerance: Annotated[
        float | None, typer.Option(help="how far outputs may move: rms of the difference over rms of the output")
    ] = None,
    latency: Annotated[float | None, typer.Option(help="share of the measured latency that may be left")] = None,
    latency_ms: Annotated[float | None, typer.Option(help="milliseconds that a run may take")] = None,
    macs: Annotated[float | None, typer.Option(help="share of the multiply-accumulates that is to be left")] = None,
    weight_bytes: Annotated[
        float | None, typer.Option("--bytes", help="share of the bytes of the weights that is to be left")
    ] = None,
    target: Target = "cpu",
    threads: Threads = 1,
    report: Annotated[Path | None, typer.Option(metavar="FILE.json", help="write the report there as JSON")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE.html", help="write the graph diff there")] = None,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress, no report")] = False,
) -> None:
    """Optimize an ONNX model and write the result with its proof."""
    from graphopt.export.write import check_target, write_text
    from graphopt.ir.diff import diff
    from graphopt.optimize import optimize as run

    for path in (output, report, html):
        if path is not None:
            check_target(path)
    asked = {"latency": latency, "latency_ms": latency_ms, "macs": macs, "bytes": weight_bytes}
    budget: dict[str, Any] = {name: share for name, share in asked.items() if share is not None}
    result = run(
        model,
        None if inputs is None else _arrays(inputs),
        recipe=_recipe(recipe, settings, budget),
        target=target,
        calibration=None if calibration is None else _calibration(calibration),
        inputs=_specs(specs),
        tolerance=tolerance,
        threads=threads,
        quiet=quiet or as_json,
        **budget,
    )
    result.save(output)
    if report is not None:
        write_text(json.dumps(result.report.to_json(), indent=2), report)
    if html is not None:
        write_text(diff(result.original, result.model).to_html(title=f"{model.name} → {output.name}"), html)
    if not quiet:
        _show(result.report, as_json)
    if result.report.missed:
        raise TargetMissedError(
            "a target was missed: " + "; ".join(result.report.missed),
            where=str(output),
            help="the file holds the best model within the budget; loosen the target or give calibration data",
        )


@application.command()
def plan(
    model: ModelPath,
    recipe: Annotated[str, typer.Option(help="prune, int8, another recipe, or a TOML file")] = "prune",
    settings: Settings = None,
    inputs: Inputs = None,
    calibration: CalibrationPath = None,
    specs: Specs = None,
    target: Target = "cpu",
    threads: Threads = 1,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg|.png|.pdf", help="draw what is left of each layer there")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show which channels would go (or which layers would be rounded): what the first lossy pass of a recipe plans."""
    from graphopt.ir.figures import check_drawing
    from graphopt.planning import plan_recipe

    if plot is not None:
        check_drawing(plot)
    found = plan_recipe(
        model,
        None if inputs is None else _arrays(inputs),
        recipe=_recipe(recipe, settings),
        calibration=None if calibration is None else _calibration(calibration),
        specs=_specs(specs),
        target=target,
        threads=threads,
    )
    _show(found, as_json)
    if plot is not None:
        draw = getattr(found, "plot", None)
        if draw is None:
            raise GraphoptError(
                "this plan has no picture", where=recipe, help="plans of meet-budget have: --recipe latency"
            )
        draw(plot)


@application.command()
def diagnose(
    model: ModelPath,
    recipe: Annotated[str, typer.Option(help="int8, another recipe that quantizes, or a TOML file")] = "int8",
    settings: Settings = None,
    inputs: Inputs = None,
    calibration: CalibrationPath = None,
    specs: Specs = None,
    target: Target = "cpu",
    threads: Threads = 1,
    samples: Annotated[int, typer.Option(help="on how many samples the nets are compared", min=1)] = 32,
    measure: Annotated[str, typer.Option(help="how outputs are compared: rms, or kl for class logits")] = "rms",
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg|.png|.pdf", help="draw it there")] = None,
    as_json: AsJson = False,
) -> None:
    """Show where quantization loses: each operator quantized alone, each tensor's noise, the worst first."""
    from graphopt.export.write import check_target
    from graphopt.planning import diagnose_recipe

    if plot is not None:
        check_target(plot)
    found = diagnose_recipe(
        model,
        None if inputs is None else _arrays(inputs),
        recipe=_recipe(recipe, settings),
        calibration=None if calibration is None else _calibration(calibration),
        specs=_specs(specs),
        target=target,
        threads=threads,
        samples=samples,
        measure=measure,
    )
    if plot is not None:
        found.plot(plot)
    _show(found, as_json)


@application.command()
def inspect(model: ModelPath, inputs: Inputs = None, as_json: AsJson = False) -> None:
    """Show inputs, outputs, opset, operators with counts and MACs, largest weights, dynamic dimensions."""
    from graphopt.export.inspect import inspect as run

    _show(run(model, None if inputs is None else _arrays(inputs)), as_json)


@application.command()
def groups(
    model: ModelPath,
    inputs: Inputs = None,
    frozen: Annotated[bool, typer.Option("--frozen", help="list what cannot be pruned, with the reasons")] = False,
    dot: Annotated[Path | None, typer.Option(metavar="FILE.dot", help="write the groups as a Graphviz graph")] = None,
    svg: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="write a picture of the groups")] = None,
    as_json: AsJson = False,
) -> None:
    """Show which channels can be pruned together, how much of the model they cover, and what keeps the rest."""
    from graphopt.export.group_graph import group_graph, to_dot
    from graphopt.export.group_picture import picture
    from graphopt.export.groups import describe_groups, find_groups
    from graphopt.export.write import check_target, write_text

    for path in (dot, svg):
        if path is not None:
            check_target(path)
    found = find_groups(model, None if inputs is None else _arrays(inputs))
    report = describe_groups(found)
    for path, drawn in ((dot, to_dot), (svg, picture)):
        if path is not None:
            write_text(drawn(group_graph(found)), path)
    _show(report.frozen() if frozen and not as_json else report, as_json)


@application.command()
def diff(
    before: ModelPath,
    after: ModelPath,
    html: Annotated[Path | None, typer.Option(metavar="FILE.html", help="write one self-contained page")] = None,
    full: Annotated[bool, typer.Option("--full", help="every change, not one of each shape")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what changed between two models, equal changes collapsed."""
    from graphopt.export.write import write_text
    from graphopt.ir.diff import diff as run
    from graphopt.ir.load import read

    found = run(read(before), read(after))
    if html is not None:
        write_text(found.to_html(title=f"{before.name} → {after.name}"), html)
    if full and not as_json:
        typer.echo(found.text(full=True))
    else:
        _show(found, as_json)


@application.command()
def bench(
    models: Annotated[list[Path], typer.Argument(metavar="A.onnx B.onnx ...", help="models with the same inputs")],
    inputs: Inputs = None,
    seconds: Annotated[float, typer.Option(help="about how long to measure", min=0.1)] = 5.0,
    threads: Threads = 1,
    target: Target = "cpu",
    as_json: AsJson = False,
) -> None:
    """Time models in turns and print how many times faster each is than the first."""
    from graphopt.export.benchmark import benchmark
    from graphopt.ir.load import read
    from graphopt.optimize import example_feeds

    loaded = [read(path) for path in models]
    feeds = None if inputs is None else example_feeds(loaded[0], _arrays(inputs), None)
    names = [path.name for path in models]
    _show(
        benchmark(*loaded, inputs=feeds, names=names, seconds=seconds, threads=threads, target=target),
        as_json,
    )


@application.command()
def profile(
    model: ModelPath,
    by: Annotated[str, typer.Option(help="what to show: block, node, or op (as onnxruntime runs it)")] = "block",
    top: Annotated[int | None, typer.Option(help="how many of the dearest to show", min=1)] = None,
    depth: Annotated[int | None, typer.Option(help="how many parts of a module path make a block", min=1)] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg|.png|.pdf", help="draw it there")] = None,
    table: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="add the kernels to this latency table, or begin one")
    ] = None,
    inputs: Inputs = None,
    specs: Specs = None,
    target: Target = "cpu",
    threads: Threads = 1,
    seconds: Annotated[float, typer.Option(help="about how long to measure at most", min=0.1)] = 5.0,
    as_json: AsJson = False,
) -> None:
    """Show where the time goes: every kernel timed inside the whole model, by block, node or operator."""
    from graphopt.profiling import profile_command

    shown = profile_command(
        model,
        None if inputs is None else _arrays(inputs),
        view=(by, top, depth),
        plot=plot,
        table=table,
        target=target,
        threads=threads,
        seconds=seconds,
        specs=_specs(specs),
    )
    _show(shown, as_json)


@application.command()
def verify(
    reference: ModelPath,
    candidate: ModelPath,
    inputs: Inputs = None,
    tolerance: Annotated[
        float | None, typer.Option(help="largest rms error allowed; default: the rounding of an exact rewrite")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the outputs of two models; exit code 1 where they differ by more than the tolerance."""
    from graphopt.export.verify import verify as run

    verdict = run(reference, candidate, None if inputs is None else _arrays(inputs), tolerance)
    _show(verdict, as_json)
    if not verdict.passed:
        raise TargetMissedError(
            f"outputs differ: {verdict.judged}",
            where=f"{reference} and {candidate}",
            help=None if tolerance is not None else _QUANTIZED,
        )


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `graphopt` command. Turns every `GraphoptError` into a message and an exit code.

    `--debug` works wherever it stands on the line: the traceback comes before the message, the exit code stays.
    """
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    try:
        application([word for word in given if word != "--debug"], standalone_mode=True)
    except TargetMissedError as error:
        sys.exit(_report(error, 1, debug))
    except GraphoptError as error:
        sys.exit(_report(error, 2, debug))


def _report(error: GraphoptError, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exception(error)
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {error}", markup=False)
    return code


def _show(thing: Any, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(thing.to_json(), indent=2) + "\n")
    else:
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = _WIDTH_OF_FILES
        drawn = hasattr(thing, "__rich_console__") or hasattr(thing, "__rich__")
        console.print(thing if drawn else Text(str(thing)))


def _arrays(path: Path) -> dict[str, np.ndarray] | np.ndarray:
    """Arrays of an .npz by name, or the one array of an .npy. Pickled objects are refused."""
    return _read(path, lambda: np.load(path, allow_pickle=False))


def _read(path: Path, reader: Callable[[], Any]) -> Any:
    try:
        loaded = reader()
        return {name: loaded[name] for name in loaded.files} if hasattr(loaded, "files") else loaded
    except FileNotFoundError as error:
        raise DataError(
            "there is no such file", where=str(path), help="paths are relative to the folder that you are in"
        ) from error
    except (OSError, ValueError, EOFError, IsADirectoryError) as error:
        raise DataError(
            f"these are not NumPy arrays: {str(error).splitlines()[0]}",
            where=str(path),
            help="write them with numpy.save or numpy.savez, without pickled objects",
        ) from error


def _recipe(name: str, settings: Sequence[str] | None, budget: Mapping[str, float] | None = None) -> Recipe:
    """A recipe that meets a budget, with the options that `--set` gives."""
    from graphopt.recipe import read_value, resolve, with_budget

    recipe = with_budget(resolve(name), budget or {})
    for setting in settings or ():
        place, equals, text = setting.partition("=")
        single, dot, option = place.strip().partition(".")
        if not (equals and dot and single and option):
            raise RecipeError(
                f"{setting!r} is no setting",
                where="--set",
                help="write PASS.OPTION=VALUE, for instance prune-channels.ratio=0.5",
            )
        recipe = recipe.with_options(single, **{option.strip(): read_value(text.strip())})
    return recipe


def _specs(texts: Sequence[str] | None) -> dict[str, InputSpec]:
    """What is known of inputs: `NAME:KEY=VALUE,...` each; names may hold colons themselves."""
    from graphopt.inputs.probes import InputSpec

    found: dict[str, InputSpec] = {}
    keys = [field.name for field in dataclasses.fields(InputSpec)]
    for text in texts or ():
        name, _, stated = text.rpartition(":")
        values: dict[str, Any] = {}
        for entry in stated.split(","):
            key, equals, value = (part.strip() for part in entry.partition("="))
            if not (name and equals) or key not in keys or key in values:
                raise DataError(
                    f"{entry!r} says nothing of an input",
                    where=f"--input-spec {text}",
                    help=f"write NAME:KEY=VALUE,... with the keys {', '.join(keys)}, each once",
                )
            values[key] = value if key == "kind" else _number(value, f"--input-spec {text}")
        if name in found:
            raise DataError(f"input {name!r} is stated twice", where="--input-spec", help="put all keys into one")
        found[name] = InputSpec(**values)
    return found


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise DataError(
            f"{text!r} is not a number", where=where, help="all keys but `kind` take one number, for instance mean=0.5"
        ) from error


def _calibration(path: Path) -> list[Any]:
    """One item a sample: axis 0 of each array counts samples; a folder is read file by file, in name order."""
    files = sorted(path.glob("*.np[yz]")) if path.is_dir() else [path]
    if not files:
        raise DataError(
            "the folder holds no .npy or .npz file", where=str(path), help="write some with numpy.save or numpy.savez"
        )
    samples: list[Any] = []
    for file in files:
        loaded = _arrays(file)
        arrays = loaded if isinstance(loaded, dict) else {"": loaded}
        counts = {array.shape[0] if array.ndim else 0 for array in arrays.values()}
        if len(counts) != 1 or 0 in counts:
            raise DataError(
                "axis 0 of the arrays must count samples, the same number in each and at least one",
                where=str(file),
                help="stack the samples: an array of 64 images has the shape [64, 3, 224, 224]",
            )
        for index in range(counts.pop()):
            item = {name: array[index : index + 1] for name, array in arrays.items()}
            samples.append(item if isinstance(loaded, dict) else item[""])
    return samples
