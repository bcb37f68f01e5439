"""What counts as ruined where the user set no budget: outputs with little left of what they say.

An output is ruined where its relative root-mean-square error is above `RUINED`, a signal-to-noise ratio of 10.5 dB:
rankings of classes and positions of boxes are then guesswork, while 8 bits leave 25 to 40 dB in a network that takes
them. An output that is an image of the input (super-resolution, denoising) has to stay nearer: its error is compared
with what the network leaves of the true image, commonly 25 to 35 dB below the peak. `IMAGE_DB` below the peak costs
0.4 dB of a reconstruction that has 30.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.inputs.batches import usual_samples
from graphopt.ir.compare import compare_arrays
from graphopt.ir.rewrite import integers, is_op, rank
from graphopt.ir.session import open_session
from graphopt.passes.contract import Context, Verdict
from graphopt.passes.quantize_effects import Agreement, units
from graphopt.passes.quantize_plan import QuantizePlan
from graphopt.passes.quantize_saturation import SAFE_BITS

RUINED = 0.3
"""Relative root-mean-square error from which an output is ruined."""
IMAGE_DB = 40.0
"""How far below its peak, in dB, the error of an output must stay that shows what the input shows."""
_ALIKE = 0.8
"""Correlation from which an output shows what the input shows."""
_SAMPLES, _LARGE_SAMPLES = 16, 4
_LARGEST_MODEL = 2**31
"""Bytes of weights from which a network is not run only to protect it."""


def protection(model: ir.Model, plan: QuantizePlan, context: Context) -> Callable[[ir.Model], Verdict] | None:
    """A judge that knows no budget: whether the outputs are ruined, on calibration or on probes.

    None where widths below 7 bits were asked for (whoever does so repairs afterwards: reconstruction, training), where
    only weights are rounded, or where the model cannot be run here; the last is said in a remark.

    Args:
        model: the float model; it is run at once and not changed.
        plan: what is to be judged first.
        context: calibration, sizes, threads.
    """
    narrow = any(tensor.bits < SAFE_BITS for tensor in plan.tensors)
    if narrow or not any(operator.form in ("static", "dynamic") for operator in units(plan)):
        return None
    tensors = (value.const_value for value in model.graph.initializers.values())
    if sum(tensor.nbytes for tensor in tensors if tensor is not None) > _LARGEST_MODEL:
        return None
    try:
        samples = usual_samples(model, context.sizes, context.specs, most=_SAMPLES, least=_LARGE_SAMPLES)
        source = "probes" if context.calibration is None else "calibration"
        batches = list(context.inputs(model, source, samples).batches)
        session = open_session(model, threads=context.threads)
        reference = [session.run_feeds(feeds) for feeds in batches]
    except GraphoptError as error:
        context.missed("measure what quantization does", error.what, "model")
        return None
    return _Protection(model, batches, reference, context)


class OutputParts:
    """The outputs of a model, those that a Concat puts together taken apart again: boxes and scores of a detector.

    One relative error over both would be that of the larger numbers alone.

    Example:
        >>> model = ir.from_onnx_text('''<ir_version: 10, opset_import: ["": 21]>
        ...     g (float[1,4] boxes, float[1,2] scores) => (float[1,6] y) { y = Concat <axis = 1> (boxes, scores) }''')
        >>> [(name, array.shape) for name, array in OutputParts(model)([np.zeros((1, 6))])]
        [('y[0:4]', (1, 4)), ('y[4:6]', (1, 2))]
    """

    def __init__(self, model: ir.Model) -> None:
        self._outputs = [(value.name or "", _concatenated(value)) for value in model.graph.outputs]

    def __call__(self, outputs: Sequence[np.ndarray]) -> list[tuple[str, np.ndarray]]:
        """Each part with its name."""
        parts: list[tuple[str, np.ndarray]] = []
        for (name, cut), array in zip(self._outputs, outputs, strict=True):
            if cut is None or array.shape[cut[0]] != cut[1][-1]:
                parts.append((name, array))
                continue
            axis, ends = cut
            for start, end in zip((0, *ends), ends, strict=False):
                parts.append((f"{name}[{start}:{end}]", array.take(range(start, end), axis)))
        return parts

    def rms(self, reference: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
        """The largest relative root-mean-square error of a part."""
        pairs = zip(self(reference), self(found), strict=True)
        return max((compare_arrays(a, b, name).rms_error for (name, a), (_, b) in pairs), default=0.0)


def _concatenated(value: ir.Value) -> tuple[int, tuple[int, ...]] | None:
    """Along which axis of an output parts follow each other, and where each ends."""
    axes = list(range(rank(value) or 0))
    node = value.producer()
    while node is not None and is_op(node, "Transpose") and integers(node, "perm") and node.inputs[0] is not None:
        order = integers(node, "perm") or ()
        axes = [order[axis] for axis in axes]
        node = node.inputs[0].producer()
    axis = None if node is None or not is_op(node, "Concat") else node.attributes["axis"].as_int()
    if node is None or axis is None or not axes:
        return None
    axis %= len(axes)
    shapes = [None if read is None or read.shape is None else read.shape for read in node.inputs]
    sizes = [size for size in (shape[axis] for shape in shapes if shape is not None) if isinstance(size, int)]
    return (axes.index(axis), tuple(itertools.accumulate(sizes))) if 1 < len(sizes) == len(node.inputs) else None


class _Protection:
    def __init__(
        self,
        model: ir.Model,
        batches: Sequence[Mapping[str, np.ndarray]],
        reference: Sequence[Sequence[np.ndarray]],
        context: Context,
    ) -> None:
        self.batches, self.context, self.parts = batches, context, OutputParts(model)
        self.reference = [[array for _, array in self.parts(outputs)] for outputs in reference]
        self.names = [name for name, _ in self.parts(reference[0])]
        self.limits = [self._limit(index) for index in range(len(self.names))]

    def _limit(self, index: int) -> tuple[float, str]:
        """The largest relative error of an output, and what that is called."""
        arrays = [outputs[index] for outputs in self.reference]
        fed = [array for array in self.batches[0].values() if _is_image(array)]
        if _is_image(arrays[0]) and any(_shows(arrays[0], image) for image in fed):
            peak = max(float(array.max()) for array in arrays) - min(float(array.min()) for array in arrays)
            mean_square = sum(float(np.square(array, dtype=np.float64).sum()) for array in arrays)
            mean_square /= sum(array.size for array in arrays)
            if mean_square > 0.0:
                relative = 10 ** (-IMAGE_DB / 20) * peak / math.sqrt(mean_square)
                return min(relative, RUINED), f"{IMAGE_DB:.0f} dB below its peak"
        return RUINED, f"error {RUINED}"

    def __call__(self, candidate: ir.Model) -> Verdict:
        agreements = [Agreement() for _ in self.names]
        try:
            session = open_session(candidate, target=self.context.target, threads=self.context.threads)
            for feeds, whole in zip(self.batches, self.reference, strict=True):
                run = self.parts(session.run_feeds(feeds))
                for agreement, expected, (_, found) in zip(agreements, whole, run, strict=True):
                    if expected.dtype.kind == "f":
                        wrong = np.isfinite(expected) & ~np.isfinite(found)
                        agreement.add(expected, np.where(wrong, 0.0, found))
                        agreement.noise += math.inf if wrong.any() else 0.0
        except GraphoptError as error:
            return Verdict(False, math.inf, reason=error.what, budget=self.budget(0))
        errors = [agreement.relative for agreement in agreements]
        worst = max(range(len(errors)), key=lambda index: errors[index] / self.limits[index][0], default=0)
        error = max(errors, default=0.0)
        within = all(found <= limit for found, (limit, _) in zip(errors, self.limits, strict=True))
        reason = "" if within else f"output {self.names[worst]} is ruined: error {errors[worst]:.2g}"
        return Verdict(within, error, reason=reason, budget=self.budget(worst))

    def budget(self, index: int) -> str:
        """The limit of an output in words."""
        name, (limit, what) = self.names[index], self.limits[index]
        shown = what if what.startswith("error") else f"{what} (error {limit:.2g})"
        return f"{shown} of output {name}, from where it counts as ruined"


def _is_image(array: np.ndarray) -> bool:
    return array.ndim == 4 and array.dtype.kind == "f" and array.shape[1] in (1, 3) and min(array.shape[2:]) >= 8


def _shows(output: np.ndarray, image: np.ndarray) -> bool:
    """Whether an output of the size of the input, or of a multiple of it, is like it once reduced to its size."""
    if output.shape[:2] != image.shape[:2] or any(
        a % b for a, b in zip(output.shape[2:], image.shape[2:], strict=True)
    ):
        return False
    n, c, height, width = image.shape
    blocks = output.reshape(n, c, height, output.shape[2] // height, width, output.shape[3] // width)
    reduced = blocks.mean(axis=(3, 5), dtype=np.float64)
    a, b = (one - one.mean() for one in (reduced, image.astype(np.float64)))
    size = math.sqrt(float((a * a).sum()) * float((b * b).sum()))
    return size > 0.0 and float((a * b).sum()) / size > _ALIKE
