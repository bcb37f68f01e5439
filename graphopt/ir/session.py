"""onnxruntime sessions over an in-memory `onnx_ir.Model`, without a second copy of the weights in a file or proto."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from graphopt.errors import DataError, GraphoptError, InvalidGraphError
from graphopt.ir.ops.row import tensor_shape

Feeds = Mapping[str, np.ndarray]
"""One set of model inputs: input name to array."""

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}
"""onnxruntime execution provider of each graphopt target."""
LEFT_TO_OPENVINO = ("QDQPropagationTransformer", "MatMulAddFusion", "TransposeOptimizer")
"""Optimizers of onnxruntime that run before the provider sees the graph and spoil it for OpenVINO, which compiles it
whole: they move quantizers and axes away from products, and make Gemm between Reshapes of them. Without them quantized
Swin is 1.14 times as fast, ViT-S 1.05, ConvNeXt 1.03 times (onnxruntime-openvino 1.24.1, one thread of an EPYC)."""
_HEADINGS = ("FrontEnd API failed", "Errors during ONNX translation", "Model wasn't fully converted", "Summary")
_LONGEST_REASON = 300
"""Characters of what OpenVINO has to say."""
_BUILDS = {"cuda": "onnxruntime-gpu", "openvino": "onnxruntime-openvino"}
"""The distribution of onnxruntime that has the provider of a target."""

_INLINE_BYTES = 1024
"""Weights up to this size travel inside the proto: onnxruntime folds and fuses on small constants."""
_TYPES_OF_ORT_VALUES = {
    ir.DataType.FLOAT,
    ir.DataType.DOUBLE,
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
    ir.DataType.INT8,
    ir.DataType.UINT8,
    ir.DataType.INT16,
    ir.DataType.UINT16,
    ir.DataType.INT32,
    ir.DataType.UINT32,
    ir.DataType.INT64,
    ir.DataType.UINT64,
}


class PlacedFeeds(dict[str, np.ndarray]):
    """One set of inputs that knows where it came from, so that an error about it can say so.

    Attributes:
        where: for instance "calibration item 3".

    Example:
        >>> PlacedFeeds({"x": np.ones(2)}, where="calibration item 3").where
        'calibration item 3'
    """

    def __init__(self, feeds: Feeds, *, where: str) -> None:
        super().__init__(feeds)
        self.where = where


class Session(onnxruntime.InferenceSession):
    """An onnxruntime session that keeps the weights alive which it shares with the graph."""

    weights: Sequence[Any] = ()

    def run_feeds(self, feeds: Feeds) -> list[np.ndarray]:
        """Run once and return every output. Raises `DataError` where the feeds do not fit the model."""
        try:
            return [np.asarray(output) for output in self.run(None, dict(feeds))]
        except Exception as error:
            shapes = ", ".join(f"{name}: {array.dtype}{list(array.shape)}" for name, array in feeds.items())
            placed = isinstance(feeds, PlacedFeeds)
            raise DataError(
                f"onnxruntime cannot run the model on these inputs: {_first_line(error)}",
                where=f"{feeds.where}, {shapes}" if placed else shapes,
                help="its inputs must fit together, and ids lie in their tables: leave the item out, or mend it"
                if placed
                else "pass example inputs of the model's own shapes and dtypes (`args`, or `--input`)",
            ) from error


def open_session(
    model: ir.Model,
    *,
    target: str = "cpu",
    threads: int = 1,
    optimized: bool = True,
    extra_outputs: Iterable[str] = (),
    optimized_model_path: str | None = None,
    profile_prefix: str | None = None,
) -> Session:
    """Load a model into onnxruntime.

    Args:
        model: the graph; it is not changed, and its weights are shared, not copied into a proto first.
        target: "cpu", "cuda" or "openvino".
        threads: intra-op threads, 0 for onnxruntime's own default (all cores).
        optimized: False disables every graph optimisation of onnxruntime: the reference side of comparisons.
        extra_outputs: names of main-graph values to return after the model's own outputs.
        optimized_model_path: where onnxruntime is to write the graph as it will run it.
        profile_prefix: onnxruntime times every kernel of every run, and `end_profiling` writes the times to a file
            whose path begins so; weights then go into a file beside the one at `optimized_model_path`.

    Raises:
        InvalidGraphError: onnxruntime refuses the model; the message carries onnxruntime's reason.
        GraphoptError: the target is unknown or its provider is not in this build of onnxruntime.

    Example:
        >>> model = ir.from_onnx_text(
        ...     '<ir_version: 10, opset_import: ["": 21]> g (float[2] x) => (float[2] y) { y = Relu(x) }')
        >>> open_session(model).run(None, {"x": np.array([-1, 1], np.float32)})
        [array([0., 1.], dtype=float32)]
    """
    options = session_options(threads=threads, optimized=optimized)
    if optimized_model_path is not None:
        options.optimized_model_filepath = optimized_model_path
    if profile_prefix is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile_prefix
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
    if target == "openvino":
        options.add_session_config_entry("optimization.disable_specified_optimizers", ";".join(LEFT_TO_OPENVINO))
    chosen = providers(target, threads=threads)
    # OpenVINO reads the proto itself and knows nothing of weights that onnxruntime holds
    proto, names, weights = _proto_and_weights(model, extra_outputs, shares=target != "openvino")
    if names:
        options.add_external_initializers(names, weights)
    try:
        session = Session(proto, options, providers=chosen)
    except Exception as error:
        reason = _first_line(error)
        custom = "not a registered function/op" in reason
        raise InvalidGraphError(
            f"onnxruntime {onnxruntime.__version__} cannot load the model: {reason}",
            where=model.graph.name,
            help="this operator is not in onnxruntime: `graphopt inspect` and `diff` work on the model, but nothing "
            "can be run or proved"
            if custom
            else "check the model with `graphopt inspect`, or export it again with a newer exporter",
        ) from error
    session.weights = weights
    return session


def session_options(*, threads: int, optimized: bool = True) -> onnxruntime.SessionOptions:
    """onnxruntime options that every session of graphopt uses, silent and without thread spinning.

    Spinning threads of one session slow the other one down when two are timed in turns.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    return options


def providers(target: str, *, threads: int = 0) -> list[str | tuple[str, dict[str, str]]]:
    """Execution providers for a target, the CPU as the last resort for what the target cannot run.

    Args:
        target: one of `PROVIDERS`.
        threads: of OpenVINO, 0 for its own default; the other providers take theirs from the session.

    Raises:
        GraphoptError: the target is unknown, or its provider is not in this build of onnxruntime.
    """
    if target not in PROVIDERS:
        raise GraphoptError(f"unknown target {target!r}", help=f"targets are {', '.join(sorted(PROVIDERS))}")
    wanted = PROVIDERS[target]
    if wanted not in onnxruntime.get_available_providers():
        raise GraphoptError(
            f"target {target!r} needs {wanted}, which this onnxruntime {onnxruntime.__version__} does not have",
            help=f"install {_BUILDS.get(target, 'another build')} in the place of onnxruntime, or use target='cpu'",
        )
    if target == "openvino":
        options = {"device_type": "CPU", **({"num_of_threads": str(threads)} if threads else {})}
        return [(wanted, options), PROVIDERS["cpu"]]
    return [wanted] if target == "cpu" else [wanted, PROVIDERS["cpu"]]


def _proto_and_weights(
    model: ir.Model, extra_outputs: Iterable[str], *, shares: bool
) -> tuple[bytes, list[str], list[Any]]:
    """The serialized graph without the large weights that it `shares`, and those weights as onnxruntime values."""
    shell = model.clone()
    values = {value.name: value for node in shell.graph for value in node.outputs}
    for name in extra_outputs:
        if name not in values:
            raise GraphoptError(f"no value named {name!r} in the main graph", where=shell.graph.name)
        if not values[name].is_graph_output():
            shell.graph.outputs.append(values[name])
    names: list[str] = []
    weights: list[Any] = []
    for name, value in list(shell.graph.initializers.items()):
        tensor = value.const_value
        if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
            del shell.graph.initializers[name]  # onnxruntime refuses external data of a weight that nothing reads
            continue
        inside = not shares or tensor is None or tensor.nbytes <= _INLINE_BYTES
        if inside or tensor is None or tensor.dtype not in _TYPES_OF_ORT_VALUES:
            continue
        if any(use.node.graph is not shell.graph for use in value.uses()):
            continue  # onnxruntime before 1.29 cannot fold with external data that a subgraph captures
        names.append(name)
        weights.append(_ort_value(tensor))
        value.const_value = ir.ExternalTensor(
            "in-memory", 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor_shape(tensor)), name=name
        )
    return ir.to_proto(shell).SerializeToString(), names, weights


def _ort_value(tensor: ir.TensorProtocol) -> Any:
    array = np.ascontiguousarray(tensor.numpy())
    if tensor.dtype == ir.DataType.BFLOAT16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), int(ir.DataType.BFLOAT16))
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _first_line(error: BaseException) -> str:
    """The line that says what is wrong. OpenVINO's stands behind a call stack and headings."""
    text = str(error).strip()
    text = text.split(" : ", 3)[-1] if text.startswith("[ONNXRuntimeError]") else text
    first, *more = text.split("[OpenVINO-EP] ")[-1].splitlines() or [type(error).__name__]
    told = [line.strip() for line in more if line.strip() and not line.startswith(_HEADINGS)]
    return " ".join(told)[:_LONGEST_REASON] if "[OpenVINO-EP]" in text and told else first
