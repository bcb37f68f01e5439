"""Where inputs come from, as one thing: the user's calibration, probes, synthetic inputs, and whatever comes later.

A source that makes inputs up is a value with a name; `MADE_UP` holds them. `find_inputs` chooses among them, falls
back to probes with the reason, and keeps what is expensive on disk and in the run.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import onnx_ir as ir

from graphopt.errors import DataError
from graphopt.inputs.batches import ProbeBatches, SampleCounter, batch_dimensions, free_batch, usual_samples
from graphopt.inputs.probes import InputSpec, check_specs, model_inputs
from graphopt.inputs.store import Store, model_digest, storage_key
from graphopt.inputs.synthetic import Report, Synthetic, UnavailableError
from graphopt.ir.dimensions import dimension_name
from graphopt.ir.session import PlacedFeeds


@dataclass(frozen=True)
class Inputs:
    """Batches for one model and where they come from.

    Attributes:
        source: "calibration", "probes", "synthetic", or the name of another source.
        batches: re-iterable; each batch is a dict by input name.
        why: one sentence: why this source, and what was done.
    """

    source: str
    batches: Iterable[Mapping[str, np.ndarray]] = field(repr=False)
    why: str


class InputSource(Protocol):
    """A way to make inputs up: a frozen dataclass of settings. Its `repr` is part of the key that inputs are kept by.

    Attributes:
        name: kebab-case; what `Inputs.source` says.
        stored: whether the inputs are expensive enough to be kept on disk.
    """

    name: ClassVar[str]
    stored: ClassVar[bool]

    def describe(self, model: ir.Model) -> str:
        """One clause: how the inputs of this model are made. Cheap."""
        ...

    def feeds(
        self,
        model: ir.Model,
        *,
        specs: Mapping[str, InputSpec] | None = None,
        sizes: Mapping[str, int] | None = None,
        samples: int | None = None,
        threads: int = 1,
        seed: int = 0,
        progress: Report | None = None,
    ) -> Iterable[Mapping[str, np.ndarray]]:
        """Re-iterable batches by input name, each of a sensible size; `samples` None leaves their number to the source.

        Raises:
            UnavailableError: it has none for this model; the message says why.
            DataError: `specs` do not fit the model, or it cannot be fed at all.
        """
        ...


@dataclass(frozen=True)
class Probes:
    """Images of shapes that hide each other, 1/f sound, plausible tokens; an `InputSource`. Needs nothing.

    Attributes:
        texture: what images show, one of `graphopt.inputs.probes.TEXTURES`: "leaves" or "pink" (1/f noise alone).

    Example:
        >>> model = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 21]>'
        ...     ' g (float[batch, 3, 8, 8] x) => (float[batch, 3, 8, 8] y) { y = Relu(x) }')
        >>> [feeds["x"].shape for feeds in Probes().feeds(model, samples=70)]
        [(64, 3, 8, 8), (6, 3, 8, 8)]
    """

    name: ClassVar[str] = "probes"
    stored: ClassVar[bool] = False

    texture: str = "leaves"

    def describe(self, model: ir.Model) -> str:
        """One clause: what the inputs are."""
        return "made up from the types and shapes of the inputs"

    def feeds(
        self,
        model: ir.Model,
        *,
        specs: Mapping[str, InputSpec] | None = None,
        sizes: Mapping[str, int] | None = None,
        samples: int | None = None,
        threads: int = 1,
        seed: int = 0,
        progress: Report | None = None,
    ) -> ProbeBatches:
        """Probes in batches; see `ProbeBatches`.

        Raises:
            DataError: `specs` do not fit, an input cannot be made up, no usual size of the dimensions runs, or the
                texture is unknown.
        """
        bound, free = free_batch(model, sizes, specs, threads)
        wanted = usual_samples(model, bound, specs) if samples is None else samples
        return ProbeBatches(model, bound, wanted, seed=seed, specs=specs, free=free, texture=self.texture)


MADE_UP: dict[str, InputSource] = {source.name: source for source in (Probes(), Synthetic())}
"""The sources that need no data, by name. A new one is one more value here."""
SOURCES = ("auto", "calibration", *MADE_UP)
"""What a pass may be told to take its inputs from."""


CALIBRATION_SAMPLES = 512
"""How many samples of calibration are read where their number is not stated."""


class FirstSamples:
    """The first samples of batches, streamed: nothing is kept.

    Where every input has a dynamic batch dimension on axis 0 the last batch is cut, else it is given whole.

    Example:
        >>> model = ir.from_onnx_text(
        ...     '<ir_version: 10, opset_import: ["": 21]> g (float[n, 2] x) => (float[n, 2] y) { y = Relu(x) }')
        >>> data = [{"x": np.zeros((4, 2), np.float32)}] * 3
        >>> [feeds["x"].shape[0] for feeds in FirstSamples(model, data, 6)]
        [4, 2]
    """

    def __init__(self, model: ir.Model, batches: Iterable[Mapping[str, np.ndarray]], samples: int) -> None:
        """Wrap re-iterable `batches` for `model`; at most about `samples` samples are given (whole batches count)."""
        names = batch_dimensions(model)
        inputs = model_inputs(model)
        self._cut = bool(inputs) and all(
            value.shape is not None and len(value.shape) > 0 and dimension_name(value, 0) in names for value in inputs
        )
        self._counter = SampleCounter(model)
        self._batches = batches
        self._samples = samples

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
        """One pass over the samples.

        Raises:
            DataError: as the batches do.
        """
        left = self._samples
        for feeds in self._batches:
            count = self._counter({name: array.shape for name, array in feeds.items()})
            if self._cut and count > left and all(len(array) == count for array in feeds.values()):
                cut = {name: array[:left] for name, array in feeds.items()}
                yield PlacedFeeds(cut, where=feeds.where) if isinstance(feeds, PlacedFeeds) else cut
                return
            yield feeds
            left -= count
            if left <= 0:
                return


def find_inputs(
    model: ir.Model,
    source: str | InputSource = "auto",
    *,
    calibration: Iterable[Mapping[str, np.ndarray]] | None = None,
    specs: Mapping[str, InputSpec] | None = None,
    sizes: Mapping[str, int] | None = None,
    samples: int | None = None,
    threads: int = 1,
    seed: int = 0,
    progress: Report | None = None,
    note: Callable[[str], None] | None = None,
    memo: dict[str, Inputs] | None = None,
) -> Inputs:
    """Inputs for a model from the best source there is, or from the one that is asked for.

    "auto" takes the user's calibration where there is one, else synthetic inputs, else probes. A source that has
    nothing for this model (synthetic inputs without torch, of a model that cannot be lifted, or of token ids) is
    replaced by probes, and `Inputs.why` says so. Synthetic inputs are kept on disk, see `graphopt.inputs.store`.

    Args:
        model: canonical where inputs are synthetic; it is not changed.
        source: one of `SOURCES`, or a source with settings of its own.
        calibration: feeds by input name, re-iterable, for instance a `Calibration`; None where there are none.
        specs: what is known of an input, by its name.
        sizes: number of elements of symbolic dimensions, by name.
        samples: at most how many samples, at least 1; a model of fixed batch gets whole batches. None leaves it to
            the source: 512 of calibration or where samples are small, down to 256 large ones (`usual_samples`).
        threads: of onnxruntime and torch, 0 for their own defaults.
        seed: the same seed gives the same inputs.
        progress: `progress(done, total, text)`, called while inputs are made.
        note: called with what went wrong with the cache on disk, one sentence.
        memo: inputs of this run, filled here: what is asked for again is not even read again.

    Raises:
        DataError: the source is unknown, calibration was asked for and not given, `samples` is less than 1, `specs`
            do not fit the model, or it cannot be fed at all.

    Example:
        >>> model = ir.from_onnx_text(
        ...     '<ir_version: 10, opset_import: ["": 21]> g (int64[n, 2] x) => (int64[n, 2] y) { y = Abs(x) }')
        >>> found = find_inputs(model, samples=3)
        >>> found.source, [feeds["x"].shape for feeds in found.batches]
        ('probes', [(3, 2)])
        >>> print(found.why)
        the model has no float input that a gradient could move: made up from the types and shapes of the inputs
    """
    if samples is not None and samples < 1:
        raise DataError(f"`samples` is {samples}, but must be at least 1", where="samples")
    check_specs(model, dict(specs or {}))
    chosen = _named(source, given=calibration is not None)
    if chosen is None:
        assert calibration is not None
        count = CALIBRATION_SAMPLES if samples is None else samples
        return Inputs("calibration", FirstSamples(model, calibration, count), f"the given data, up to {count} samples")
    parts = (chosen, sorted((specs or {}).items()), sorted((sizes or {}).items()), samples, seed)
    key = storage_key(model_digest(model), parts)
    found = None if memo is None else memo.get(key)
    if found is None:
        arguments: dict[str, Any] = {
            "specs": specs,
            "sizes": sizes,
            "samples": samples,
            "threads": threads,
            "seed": seed,
        }
        found = _made(model, chosen, key, arguments, progress, note)
        if memo is not None:
            memo[key] = found
    return found


def _named(source: str | InputSource, *, given: bool) -> InputSource | None:
    """The source that is meant, None for the user's calibration."""
    if not isinstance(source, str):
        return source
    if source == "calibration" and not given:
        raise DataError(
            "inputs are to come from calibration data, and there is none",
            where="source",
            help="pass `calibration`, or use source='auto'",
        )
    if source == "calibration" or (source == "auto" and given):
        return None
    if source == "auto":
        return MADE_UP["synthetic"]
    if source not in MADE_UP:
        near = difflib.get_close_matches(source, SOURCES, n=1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise DataError(f"unknown source of inputs {source!r}", help=f"{meant}sources are {', '.join(SOURCES)}")
    return MADE_UP[source]


def _made(
    model: ir.Model,
    source: InputSource,
    key: str,
    arguments: Mapping[str, Any],
    progress: Report | None,
    note: Callable[[str], None] | None,
) -> Inputs:
    """Inputs of a source, from disk where they are kept, or probes with the reason."""
    store = Store() if source.stored else None
    batches: Iterable[Mapping[str, np.ndarray]] | None = None if store is None else store.read(key)
    if batches is not None and not _fits(model, batches):
        batches = None
    try:
        if batches is None:
            batches = source.feeds(model, progress=progress, **arguments)
            if store is not None:
                batches = list(batches)
                store.write(key, batches)
        found = Inputs(source.name, batches, source.describe(model))
    except UnavailableError as error:
        probes = Probes()
        found = Inputs(probes.name, probes.feeds(model, **arguments), f"{error.what}: {probes.describe(model)}")
    if store is not None and note is not None:
        for line in store.notes:
            note(line)
    return found


def _fits(model: ir.Model, batches: Iterable[Mapping[str, np.ndarray]]) -> bool:
    """Whether batches have the names, types and ranks of the inputs: what lies on disk is not trusted."""
    inputs = {value.name or "": value for value in model_inputs(model)}
    return all(
        set(feeds) == set(inputs)
        and all(
            (value.dtype is None or feeds[name].dtype == value.dtype.numpy())
            and (value.shape is None or feeds[name].ndim == len(value.shape))
            for name, value in inputs.items()
        )
        for feeds in batches
    )
