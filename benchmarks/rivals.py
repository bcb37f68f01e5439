"""What other tools make of the same model file. Each function reads `source` and writes `target`."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from benchmarks.results import progress, stopwatch

Feeds = Mapping[str, np.ndarray]
_PRODUCTS = {"MatMul", "Gemm"}
_CONVOLUTIONS = {"Conv", "ConvTranspose"}


def slim(source: Path, target: Path) -> None:
    """onnxslim at its defaults."""
    import onnxslim

    with contextlib.redirect_stdout(io.StringIO()):  # it prints a table
        onnxslim.slim(str(source), str(target))


def optimize_with_onnxscript(source: Path, target: Path) -> None:
    """`onnxscript.optimizer.optimize` at its defaults."""
    import onnxscript.optimizer

    model = ir.load(source)
    onnxscript.optimizer.optimize(model)
    ir.save(model, target)


@dataclass(frozen=True)
class Written:
    """What several tools made of one model.

    Attributes:
        files: by tool, the file that it wrote, in the order of the tools.
        seconds: by tool, wall-clock time.
        failures: by tool that raised, why.
    """

    files: dict[str, Path]
    seconds: dict[str, float]
    failures: dict[str, str]


def write_all(model: str, writers: Mapping[str, Callable[[Path], object]], folder: Path) -> Written:
    """Let each tool write its file.

    Args:
        model: its name, for the progress lines.
        writers: by tool, what writes the file at a path. The first is the subject: what it raises ends the run. What
            any other raises is a finding.
        folder: where the files go.
    """
    written = Written({}, {}, {})
    for number, (tool, write) in enumerate(writers.items()):
        progress(f"{model}: {tool}")
        path = folder / f"{number}.onnx"
        with stopwatch() as watch:
            try:
                write(path)
                written.files[tool] = path
            except Exception as error:
                if number == 0:
                    raise
                written.failures[tool] = f"{type(error).__name__}: {error}".splitlines()[0]
        written.seconds[tool] = watch.seconds
    return written


@dataclass(frozen=True)
class Quantizer:
    """One way to quantize with onnxruntime's own tools.

    Attributes:
        name: shown in the tables.
        run: from source, target and calibration feeds to the quantized file.
        for_convolutions: whether it makes sense on a network with convolutions; a form that turns them into
            ConvInteger is 8 to 26 times slower and is left out.
        for_products: whether it says anything new about a network of matrix products.
    """

    name: str
    run: Callable[[Path, Path, Iterable[Feeds]], None]
    for_convolutions: bool = True
    for_products: bool = True


def static_u8s8(source: Path, target: Path, feeds: Iterable[Feeds]) -> None:
    """`quantize_static`, QDQ, uint8 activations, int8 weights per channel, after `quant_pre_process`."""
    _quantize_static(source, target, feeds, **_u8s8())


def static_u8s8_float_products(source: Path, target: Path, feeds: Iterable[Feeds]) -> None:
    """As `static_u8s8`, the outputs of matrix products left float."""
    options = {"OpTypesToExcludeOutputQuantization": sorted(_PRODUCTS)}
    _quantize_static(source, target, feeds, **_u8s8(), extra_options=options)


def static_defaults(source: Path, target: Path, feeds: Iterable[Feeds]) -> None:
    """`quantize_static` at its defaults (int8 activations and weights, per tensor), after `quant_pre_process`."""
    _quantize_static(source, target, feeds)


def dynamic(source: Path, target: Path, feeds: Iterable[Feeds]) -> None:
    """`quantize_dynamic` of matrix products, int8 weights per channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _prepared(source) as prepared:
        model = onnx.load(prepared)
        del model.graph.value_info[:]  # stale shapes of the export make quantize_dynamic raise
        quantize_dynamic(
            model, target, op_types_to_quantize=sorted(_PRODUCTS), per_channel=True, weight_type=QuantType.QInt8
        )


def weights_alone(source: Path, target: Path, *, bits: int, block_size: int, accuracy_level: int) -> None:
    """`MatMulNBitsQuantizer`: weights of matrix products in blocks, symmetric, as com.microsoft.MatMulNBits."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        onnx.load(source), bits=bits, block_size=block_size, is_symmetric=True, accuracy_level=accuracy_level
    )
    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)  # a line a node
    quantizer.process()
    onnx.save(quantizer.model.model, target)


QUANTIZERS = (
    Quantizer("ORT static U8S8", static_u8s8),
    Quantizer("ORT static U8S8, float products", static_u8s8_float_products, for_convolutions=False),
    Quantizer("ORT dynamic", dynamic, for_convolutions=False),
    Quantizer("ORT defaults", static_defaults),
)


def quantizers_for(source: Path) -> list[Quantizer]:
    """The ways that are worth a measurement on this network: by whether convolutions or products dominate it."""
    counts = [node.op_type for node in onnx.load(source, load_external_data=False).graph.node]
    convolutional = sum(op in _CONVOLUTIONS for op in counts) > sum(op in _PRODUCTS for op in counts)
    return [way for way in QUANTIZERS if (way.for_convolutions if convolutional else way.for_products)]


def _u8s8() -> dict[str, Any]:
    from onnxruntime.quantization import QuantType

    return {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}


def _quantize_static(source: Path, target: Path, feeds: Iterable[Feeds], **options: Any) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter(feeds)

        def get_next(self) -> Any:
            return next(self.feeds, None)

    with _prepared(source) as prepared:
        quantize_static(prepared, target, Reader(), **options)


@contextlib.contextmanager
def _prepared(source: Path) -> Generator[Path, None, None]:
    """The file after onnxruntime's own preparation, which its documentation asks for; silent."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory() as folder:
            prepared = Path(folder) / "prepared.onnx"
            try:
                quant_pre_process(source, prepared)
            except Exception:  # its symbolic shape inference does not know every op; the rest stands without it
                quant_pre_process(source, prepared, skip_symbolic_shape=True)
            yield prepared
    finally:
        root.setLevel(level)
