"""What kernels took on one machine, by all that it depends on: kept on disk, exchanged as JSON, interpolated.

Rows come from whole graphs (`graphopt.latency.kernels`), so the figure of a kernel has its surroundings in it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime

from graphopt.errors import GraphoptError, LoadError, WriteError
from graphopt.inputs.machine import device
from graphopt.inputs.measurements import Measurements
from graphopt.latency.kernels import Kernel, KernelProfile
from graphopt.latency.staircase import Estimate, Point, interpolate

FORMAT, VERSION = "graphopt latency table", 1
_MOST_ROWS = 1_000_000


@dataclass(frozen=True)
class Machine:
    """Where a table was measured. Rows of two machines are never mixed.

    Attributes:
        device: processor and what it can do, for "cuda" the graphics card too.
        target: "cpu", "cuda" or "openvino".
        threads: intra-op threads, 0 for onnxruntime's default.
        onnxruntime: its version.
    """

    device: str
    target: str
    threads: int
    onnxruntime: str

    def __str__(self) -> str:
        name = self.device.partition(",")[0]
        digest = hashlib.sha256(self.device.encode()).hexdigest()[:8]  # a name alone does not tell what it can do
        threads = f"{self.threads or 'default'} thread{'' if self.threads == 1 else 's'}"
        return f"{name} ({digest}), {self.target}, {threads}, onnxruntime {self.onnxruntime}"


def this_machine(target: str = "cpu", threads: int = 1) -> Machine:
    """The machine that runs this.

    Example:
        >>> this_machine().target, this_machine() == this_machine(threads=2)
        ('cpu', False)
    """
    return Machine(device(target), target, threads, onnxruntime.__version__)


@dataclass(frozen=True)
class Key:
    """All that the time of a kernel depends on besides the machine.

    Attributes:
        operator: as onnxruntime runs it.
        attributes: as text; see `graphopt.latency.attribution.attribute_text`.
        dtypes: element types of the inputs: "float", "uint8".
        input_shapes: shapes of the inputs, weights included.
        output_dtypes: element types of the outputs.
        output_shapes: shapes of the outputs.
        provider: that runs it.
    """

    operator: str
    attributes: str
    dtypes: tuple[str, ...]
    input_shapes: tuple[tuple[int, ...], ...]
    output_dtypes: tuple[str, ...]
    output_shapes: tuple[tuple[int, ...], ...]
    provider: str

    @property
    def form(self) -> str:
        """ "int8" where the kernel reads integers of 8 bits, else the type of its first input.

        Example:
            >>> Key("QLinearConv", "", ("uint8", "float"), ((1, 2), ()), ("uint8",), ((1, 2),), "").form
            'int8'
        """
        eight = {"int8", "uint8"} & set(self.dtypes)
        return "int8" if eight else next(iter(self.dtypes), "none")


def key_of(kernel: Kernel) -> Key:
    """The key of a kernel that was measured."""
    return Key(
        kernel.operator,
        kernel.attributes,
        kernel.dtypes,
        kernel.input_shapes,
        kernel.output_dtypes,
        kernel.output_shapes,
        kernel.provider,
    )


@dataclass(frozen=True)
class Row:
    """Microseconds of one call of a kernel: about the median, quartiles, and how many calls were counted."""

    microseconds: float
    low: float
    high: float
    runs: int


@dataclass
class LatencyTable:
    """Rows of one machine.

    Attributes:
        machine: where they were measured.
        rows: by key.

    Example:
        >>> table = LatencyTable(this_machine())
        >>> key = Key("Relu", "", ("float",), ((1, 16, 8, 8),), ("float",), ((1, 16, 8, 8),), "CPUExecutionProvider")
        >>> table.rows[key] = Row(3.0, 2.5, 3.5, 20)
        >>> table.lookup(key).microseconds, LatencyTable.from_json(table.to_json()) == table
        (3.0, True)
    """

    machine: Machine
    rows: dict[Key, Row] = field(default_factory=dict[Key, Row])

    def add(self, profile: KernelProfile) -> None:
        """Take what was measured in place of what was known: the mean over kernels with the same key.

        Kernels that were not called, and what holds a subgraph, whose time is not its own, are left out.

        Raises:
            GraphoptError: the profile is of another target or number of threads.
        """
        if (profile.target, profile.threads) != (self.machine.target, self.machine.threads):
            raise GraphoptError(
                f"measured on {profile.target} with {profile.threads} threads, but the table is of {self.machine}",
                help="begin a table for them: LatencyTable(this_machine(target, threads))",
            )
        holders = {kernel.inside for kernel in profile.kernels}
        found: dict[Key, list[Kernel]] = {}
        for kernel in profile.kernels:
            if kernel.calls and kernel.dtypes and kernel.name not in holders:
                found.setdefault(key_of(kernel), []).append(kernel)
        for key, kernels in found.items():
            calls = sum(kernel.calls for kernel in kernels)
            self.rows[key] = Row(
                *(sum(getattr(kernel, name) for kernel in kernels) / calls for name in ("microseconds", "low", "high")),
                runs=round(sum(kernel.runs * kernel.calls for kernel in kernels)),
            )

    def lookup(self, key: Key) -> Row | None:
        """What was measured for exactly this, None where nothing was."""
        return self.rows.get(key)

    def estimate(self, key: Key) -> Estimate:
        """Microseconds of a kernel: what was measured, or what kernels of other widths say of it.

        Rows count that have the same operator, attributes, types and sizes but for the channels. See
        `graphopt.latency.staircase.interpolate` for how they are read; outside of them the answer says so.

        Example:
            >>> table = LatencyTable(this_machine())
            >>> def relu(width): return Key("Relu", "", ("float",), ((1, width, 8, 8),), (), ((1, width, 8, 8),), "")
            >>> table.rows |= {relu(width): Row(width / 8, 0, 0, 9) for width in (16, 64)}
            >>> round(table.estimate(relu(40)).microseconds, 6), table.estimate(relu(128)).how
            (6.0, 'outside')
        """
        exact = self.rows.get(key)
        if exact is not None:
            return Estimate(exact.microseconds, "measured", 1)
        family, wanted = _family(key)
        points = [
            Point(*place, row.microseconds)
            for other, row in self.rows.items()
            if other.operator == key.operator
            for found, place in (_family(other),)
            if found == family
        ]
        block = 16 if "avx512" in self.machine.device else 8
        return interpolate(points, *wanted, block=block, is_channelwise=_is_channelwise(key))

    def to_json(self) -> dict[str, Any]:
        """Plain data, which `from_json` takes."""
        rows = [{**asdict(key), **asdict(row)} for key, row in self.rows.items()]
        return {"format": FORMAT, "version": VERSION, "machine": asdict(self.machine), "rows": rows}

    @classmethod
    def from_json(cls, data: Any, *, machine: Machine | None = None, accept: bool = False) -> LatencyTable:
        """What `to_json` wrote.

        Args:
            data: plain data.
            machine: whose table it must be; this machine, with the target and threads of the table, where None.
            accept: take the table of another machine as it is; its rows are not true here.

        Raises:
            LoadError: this is not such a table.
            GraphoptError: it is the table of another machine.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT or data.get("version") != VERSION:  # pyright: ignore[reportUnknownMemberType]
            raise LoadError("this is not a latency table", help=f"write one with LatencyTable.save: {FORMAT} {VERSION}")
        try:
            stated = Machine(**_checked(data["machine"], _MACHINE_TYPES))
            if len(data["rows"]) > _MOST_ROWS:
                raise ValueError(f"{len(data['rows'])} rows")
            rows = dict(_row(entry) for entry in data["rows"])
        except (KeyError, TypeError, ValueError) as error:
            raise LoadError(f"a row of the latency table cannot be read: {error}", help="measure it again") from error
        here = machine or this_machine(stated.target, stated.threads)
        if stated != here and not accept:
            raise GraphoptError(
                f"the latency table is of another machine: it was measured on {stated}; this is {here}",
                help="profile the models again into another file, or LatencyTable.load(path, accept=True) as it is",
            )
        return cls(stated, rows)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table as JSON; what was at the path stays until the new file is complete.

        Raises:
            WriteError: the path cannot be written.
        """
        target = Path(path)
        staged = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            staged.write_text(json.dumps(self.to_json(), indent=1), encoding="utf-8")
            os.replace(staged, target)
        except OSError as error:
            staged.unlink(missing_ok=True)
            raise WriteError(f"the latency table cannot be written: {error.strerror}", where=str(target)) from error
        return target

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, machine: Machine | None = None, accept: bool = False
    ) -> LatencyTable:
        """Read what `save` wrote; see `from_json`.

        Raises:
            LoadError: the file cannot be read, or is no such table.
            GraphoptError: it is the table of another machine.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise LoadError(
                f"the latency table cannot be read: {str(error).splitlines()[0]}",
                where=str(path),
                help="give a file that `graphopt profile --table` wrote",
            ) from error
        return cls.from_json(data, machine=machine, accept=accept)

    @classmethod
    def kept(cls, machine: Machine, store: Measurements | None = None) -> LatencyTable:
        """What was kept of this machine in the user's cache folder; what cannot be read there is left out."""
        table = cls(machine)
        for entry in (store or Measurements()).read_all(_kind(machine)).values():
            try:
                key, row = _row(entry)
            except (KeyError, TypeError, ValueError):
                continue
            table.rows[key] = row
        return table

    def keep(self, store: Measurements | None = None) -> list[str]:
        """Keep every row in the user's cache folder. Returns what went wrong, one sentence each; nothing is raised."""
        chosen = store or Measurements()
        kind = _kind(self.machine)
        entries = {
            hashlib.sha256(f"{kind}\n{key!r}".encode()).hexdigest(): {**asdict(key), **asdict(row)}
            for key, row in self.rows.items()
        }
        chosen.write_all(entries, kind)
        return chosen.notes


def _kind(machine: Machine) -> str:
    return f"kernel {hashlib.sha256(repr(machine).encode()).hexdigest()}"


_MACHINE_TYPES = {"device": str, "target": str, "threads": int, "onnxruntime": str}
_TEXTS = ("operator", "attributes", "provider")
_NUMBERS = ("microseconds", "low", "high")


def _checked(entry: Any, types: Mapping[str, type]) -> dict[str, Any]:
    if not isinstance(entry, Mapping) or set(entry) != set(types):  # pyright: ignore[reportUnknownArgumentType]
        raise ValueError(f"fields must be {', '.join(types)}")
    for name, kind in types.items():
        if not isinstance(entry[name], kind) or isinstance(entry[name], bool):
            raise ValueError(f"{name} is {entry[name]!r}")
    return dict(entry)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def _row(entry: Any) -> tuple[Key, Row]:
    """One row of plain data. Raises `ValueError`, `KeyError` or `TypeError` where it is none."""
    texts = {name: entry[name] for name in _TEXTS}
    if not all(isinstance(text, str) for text in texts.values()):
        raise ValueError("operator, attributes and provider must be texts")
    numbers = {name: float(entry[name]) for name in _NUMBERS}
    if not all(math.isfinite(number) and number >= 0 for number in numbers.values()):
        raise ValueError(f"times must be finite numbers of at least 0, these are {numbers}")
    key = Key(
        texts["operator"],
        texts["attributes"],
        _strings(entry["dtypes"]),
        _shapes(entry["input_shapes"]),
        _strings(entry["output_dtypes"]),
        _shapes(entry["output_shapes"]),
        texts["provider"],
    )
    runs = entry["runs"]
    if not isinstance(runs, int) or runs < 0:
        raise ValueError(f"runs is {runs!r}")
    return key, Row(**numbers, runs=runs)


def _strings(entries: Sequence[Any]) -> tuple[str, ...]:
    if not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"{entries!r} are no element types")
    return tuple(entries)


def _shapes(entries: Iterable[Any]) -> tuple[tuple[int, ...], ...]:
    shapes = tuple(tuple(entry) for entry in entries)
    if not all(isinstance(size, int) and size >= 0 for shape in shapes for size in shape):
        raise ValueError(f"{shapes!r} are no shapes")
    return shapes


_CONVOLUTIONS = ("Conv", "FusedConv", "QLinearConv", "ConvInteger", "ConvTranspose")
_WIDTHS = ("channels", "group", "K", "N")
"""Attributes that say how many channels there are, in some kernels."""


def _family(key: Key) -> tuple[tuple[Any, ...], tuple[int, int]]:
    """What rows must share to say something of each other, and the channels that come in and go out."""
    if not key.input_shapes or not key.output_shapes:
        return (key,), (0, 0)
    first, last = key.input_shapes[0], key.output_shapes[0]
    in_front = len(last) > 3 or key.operator in _CONVOLUTIONS
    is_first = in_front and "channels_last=1" not in key.attributes
    before, into = _without(first, is_first)
    behind, out = _without(last, is_first)
    if _is_channelwise(key):
        into = out
    attributes = [
        f"{name}=*" if name in _WIDTHS and value in (str(into), str(out)) and value != "1" else f"{name}={value}"
        for name, _, value in (entry.partition("=") for entry in key.attributes.split(" "))
    ]
    ranks = tuple(map(len, key.input_shapes))
    family = (key.operator, tuple(attributes), key.dtypes, key.output_dtypes, key.provider, ranks, before, behind)
    return family, (into, out)


def _is_channelwise(key: Key) -> bool:
    """Whether each channel is computed from its own: all that is no product, and depthwise convolutions."""
    if key.operator in _CONVOLUTIONS:
        groups = re.search(r"(?:^| )group=([0-9]+)", key.attributes)
        is_last = "channels_last=1" in key.attributes
        return (
            groups is not None
            and int(groups[1]) > 1
            and int(groups[1]) == _without(key.input_shapes[0], not is_last)[1]
        )
    return "MatMul" not in key.operator and "Gemm" not in key.operator


def _without(shape: tuple[int, ...], is_first: bool) -> tuple[tuple[int, ...], int]:
    """A shape without its channels, and how many there are."""
    if not shape:
        return (), 1
    axis = 1 if is_first and len(shape) > 1 else len(shape) - 1
    return (*shape[:axis], *shape[axis + 1 :]), shape[axis]
