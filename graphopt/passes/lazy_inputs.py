"""Inputs that are made when somebody first asks for them: not every criterion, allocation or search needs any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx_ir as ir

from graphopt.passes.contract import Context


class LazyInputs:
    """Batches of inputs, the same ones for everybody; where they came from is noted in the context once they are made.

    Attributes:
        sentence: where they came from, and why; empty as long as nobody asked.

    Example:
        >>> model = ir.from_onnx_text(
        ...     '<ir_version: 10, opset_import: ["": 21]> g (float[n, 3] x) => (float[n, 3] y) { y = Relu(x) }')
        >>> inputs = LazyInputs(model, Context(), "probes", "look", samples=4)
        >>> inputs.sentence, [feeds["x"].shape for feeds in inputs], inputs.sentence
        ('', [(4, 3)], 'probes: made up from the types and shapes of the inputs')
    """

    def __init__(self, model: ir.Model, context: Context, source: str, what: str, samples: int | None = None) -> None:
        """Make nothing yet.

        Args:
            model: what is to be fed.
            context: makes the inputs.
            source: as for `Context.inputs`.
            what: what they are for, in the words of a remark.
            samples: at most how many, None for what the source gives.
        """
        self._model, self._context, self._source, self._what, self._samples = model, context, source, what, samples
        self._batches: Iterable[Mapping[str, np.ndarray]] | None = None
        self.sentence = ""

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
        if self._batches is None:
            found = self._context.inputs(self._model, self._source, self._samples)
            self._batches = found.batches
            self.sentence = f"{found.source}: {found.why}"
            self._context.note(self._what, f"inputs from {self.sentence}", "model")
        return iter(self._batches)
