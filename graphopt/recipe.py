"""Recipes: ordered passes as data. Presets, lists and TOML files end in the same checked value."""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.errors import GraphoptError, RecipeError
from graphopt.passes import ALL_PASSES, Pass
from graphopt.train_quantized import TrainQuantized

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

PASSES: dict[str, type[Pass]] = {**ALL_PASSES, TrainQuantized.name: TrainQuantized}
"""Every pass that a recipe may name: those of `graphopt.passes`, and those that stand on several rooms (ADR 0011)."""
_FIRST: tuple[str, ...] = ("fold-constants", "eliminate-identity")
_EXACT: tuple[str, ...] = (
    "fuse-attention",
    "fuse-normalization",
    "fuse-activations",
    "pool-reduce-mean",
    "fuse-pad",
    "fold-batchnorm",
    "fold-affine",
    "merge-branches",
    "merge-linear",
    "merge-common-subexpressions",
    "legalize",
    "eliminate-dead-code",
)
_LAST: tuple[str, ...] = ("pad-channels", "merge-initializers")
_LOSSY: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "exact": ((), ()),
    "int8": ((), ("migrate-scales", "quantize")),
    "int8-datafree": ((), ("migrate-scales", "quantize")),
    "int8-qat": ((), ("train-quantized",)),
    "int4-qat": ((), ("train-quantized",)),
    "int4-weights": ((), ("quantize",)),
    "default": ((), ("migrate-scales", "quantize")),
    "fp16": ((), ("convert-float",)),
    "prune": (("prune-channels",), ()),
    "prune-int8": (("prune-channels",), ("quantize", "fold-reconstruction")),
    "latency": (("meet-budget",), ()),
    "latency-int8": (("meet-budget",), ()),
    "collaborative": (("meet-budget",), ()),
}
"""For each preset what makes the network smaller, between `_FIRST` and `_EXACT`, and what stands between `_EXACT` and
`_LAST`."""
_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "int8": {"quantize": {"measure": True}},
    "default": {"quantize": {"measure": True}},
    "int8-datafree": {"migrate-scales": {"source": "probes"}, "quantize": {"source": "steered", "measure": True}},
    "int4-qat": {"train-quantized": {"weight_bits": 4}},
    "int4-weights": {"fold-constants": {"growth": 0.0}, "quantize": {"form": "weights", "weight_bits": 4}},
    "prune": {"prune-channels": {"compensation": "least-squares"}},
    "prune-int8": {"prune-channels": {"compensation": "least-squares"}},
    "latency-int8": {"meet-budget": {"choices": ("channels", "ranks", "blocks", "int8")}},
    "collaborative": {"meet-budget": {"solver": "collaborative", "choices": ("channels", "ranks")}},
}
"""Options of the passes of a preset that are not the defaults."""
_LEFT_OUT: dict[str, frozenset[str]] = {
    "int4-weights": frozenset({"fold-batchnorm", "fold-affine", "merge-branches", "merge-linear"})
}
"""Passes of `_EXACT` that a preset does without: these compute new weights, which would no longer lie in their file."""
_TOLERANCES = {"default": 0.1}
PRESETS = tuple(sorted(_LOSSY))
"""Names of the recipes of the house."""


@dataclass(frozen=True)
class Recipe:
    """Ordered passes under one name.

    Attributes:
        name: shown in the report.
        passes: the passes, in the order in which they run.
        tolerance: how far the outputs of a lossy pass may move (root mean square, relative) where the user gave
            neither `evaluate` nor a tolerance; None accepts what the recipe asks for.

    Raises:
        RecipeError: a pass comes before one that its contract says must precede it, or there is no pass.

    Example:
        >>> [str(step) for step in preset("int8").passes][-3:]
        ['quantize(measure=True)', 'pad-channels', 'merge-initializers']
    """

    name: str
    passes: tuple[Pass, ...]
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if not self.passes:
            raise RecipeError("the recipe holds no pass", where=self.name)
        for index, earlier in enumerate(self.passes):
            for later in self.passes[index + 1 :]:
                if later.name in earlier.runs_after and later.name != earlier.name:
                    raise RecipeError(
                        f"{earlier.name} stands before {later.name}, but must run after it",
                        where=self.name,
                        help=f"move {earlier.name} behind {later.name}",
                    )

    def with_options(self, name: str, **options: Any) -> Recipe:
        """The same recipe with other options of one pass, wherever that stands in it.

        Args:
            name: of the pass.
            options: its options by name; those that are not named stay as they are.

        Raises:
            RecipeError: the recipe has no such pass, the pass no such option, or a value is bad.

        Example:
            >>> str(preset("int8").with_options("quantize", ranges="entropy").passes[-3])
            "quantize(ranges='entropy', measure=True)"
        """
        names = tuple(dict.fromkeys(single.name for single in self.passes))
        if name not in names:
            raise RecipeError(f"the recipe has no pass {name!r}", where=self.name, help=_suggest(name, names, "passes"))
        passes = tuple(_replaced(single, options) if single.name == name else single for single in self.passes)
        return dataclasses.replace(self, passes=passes)


def preset(name: str) -> Recipe:
    """A recipe of the house, one of `PRESETS`. Raises `RecipeError` for another name.

    `exact` rewrites without changing the function. `int8` moves outliers into weights after that, and quantizes.
    `int8-datafree` does so on made-up inputs and BatchNormalization statistics alone, whatever calibration there is.
    `default` is `int8` under a guard that keeps a lossy pass only where its outputs stay near the original (or the
    user's metric does). `prune` removes 30 % of the units of every group and rebuilds what they did, before the exact
    passes, which would hide BatchNormalization and attention from it. `prune-int8` quantizes the pruned graph, and
    rebuilds what rounding did. `latency` leaves 70 % of the measured latency: channels, ranks and blocks in one solve;
    in `latency-int8` each operator may compute on integers, too; `collaborative` decides channels and ranks as
    Collaborative Compression does.
    `int8-qat` trains in the form of `int8` before it is written, `int4-qat` with weights of 4 bits.
    `int4-weights` stores weights as 4-bit integers and computes in floats; only passes that leave weights in their file
    come before.

    Example:
        >>> smaller = preset("prune").with_options("prune-channels", macs=0.6)
        >>> str(smaller.passes[2])
        "prune-channels(macs=0.6, compensation='least-squares')"
    """
    if name not in _LOSSY:
        raise RecipeError(f"unknown recipe {name!r}", help=_suggest(name, PRESETS, "recipes"))
    smaller, lossy = _LOSSY[name]
    options, left_out = _OPTIONS.get(name, {}), _LEFT_OUT.get(name, ())
    names = [entry for entry in (*_FIRST, *smaller, *_EXACT, *lossy, *_LAST) if entry not in left_out]
    return Recipe(name, tuple(build_pass(entry, options.get(entry)) for entry in names), _TOLERANCES.get(name))


def with_budget(recipe: Recipe, budget: Mapping[str, float]) -> Recipe:
    """The recipe that leaves so much of a cost.

    A recipe with `meet-budget` is given the budget, one with `prune-channels` where that knows the cost. `default`,
    which neither prunes nor takes apart, gives way to `latency-int8`, or to `latency` where integers save nothing.

    Args:
        recipe: as it was asked for.
        budget: "latency", "latency_ms", "macs", "params" or "bytes" to how much of it is to be left; one at most.

    Raises:
        RecipeError: there are several budgets, no pass of the recipe can meet one, or the value is out of range.

    Example:
        >>> with_budget(preset("default"), {"latency": 0.6}).name
        'latency-int8'
        >>> str(with_budget(preset("default"), {"macs": 0.6}).passes[2])
        'meet-budget(macs=0.6)'
        >>> str(with_budget(preset("prune-int8"), {"macs": 0.5}).passes[2])
        "prune-channels(macs=0.5, compensation='least-squares')"
    """
    if not budget:
        return recipe
    if len(budget) > 1:
        raise RecipeError(f"several budgets are given: {', '.join(budget)}", help="give one of them")
    if recipe == preset("default"):
        recipe = preset("latency" if set(budget) <= {"macs", "params"} else "latency-int8")
    kinds = {single.name: {option.name for option in dataclasses.fields(single)} for single in recipe.passes}  # type: ignore[arg-type]
    for name in ("meet-budget", "prune-channels"):
        if name in kinds and set(budget) <= kinds[name]:
            return recipe.with_options(name, **budget)
    raise RecipeError(
        f"no pass of the recipe can leave a share of the {next(iter(budget))}",
        where=recipe.name,
        help="recipes latency and collaborative can; in one of your own, put meet-budget behind fold-constants",
    )


def resolve(recipe: str | os.PathLike[str] | Recipe | Sequence[Pass | str]) -> Recipe:
    """The recipe behind a preset name, the path of a TOML file, a list of passes (or their names), or itself."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str):
        return read_recipe(recipe) if recipe.endswith(".toml") else preset(recipe)
    if isinstance(recipe, os.PathLike):
        return read_recipe(recipe)
    if isinstance(recipe, Pass):
        return Recipe(recipe.name, (recipe,))
    passes = tuple(build_pass(entry) if isinstance(entry, str) else entry for entry in recipe)
    for entry in passes:
        if isinstance(entry, Pass) and not hasattr(entry, "name"):  # pyright: ignore
            raise RecipeError(
                f"{type(entry).__name__} has no name",
                help="a pass needs class attributes name (kebab-case) and semantics, see CONTRIBUTING.md",
            )
        if not isinstance(entry, Pass):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise RecipeError(
                f"a recipe is made of passes, not of {type(entry).__name__}",
                help="pass objects such as graphopt.passes.FoldBatchnorm(), or their names",
            )
    return Recipe("custom", passes)


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe from TOML: `name`, `tolerance`, and one `[[pass]]` table a pass with `name` and its options.

    Raises:
        RecipeError: the file is missing or not TOML, or names an unknown field, pass or option.
    """
    file = Path(path)
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"the recipe cannot be read: {error.strerror}",
            where=str(file),
            help=f"presets are {', '.join(PRESETS)}",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe is not valid TOML: {error}", where=str(file)) from error
    unknown = set(document) - {"name", "tolerance", "pass"}
    if unknown:
        raise RecipeError(
            f"unknown field {sorted(unknown)[0]!r}",
            where=str(file),
            help="fields are name, tolerance and [[pass]]",
        )
    entries = document.get("pass")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "name" in entry for entry in entries):
        raise RecipeError("a recipe needs [[pass]] tables, each with a name", where=str(file))
    tolerance = document.get("tolerance")
    if tolerance is not None and (
        isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or tolerance < 0
    ):
        raise RecipeError("tolerance must be a number of at least 0", where=f"{file}, field tolerance")
    try:
        passes = tuple(
            build_pass(str(entry["name"]), {key: value for key, value in entry.items() if key != "name"})
            for entry in entries
        )
        return Recipe(str(document.get("name", file.stem)), passes, tolerance)
    except RecipeError as error:
        where = f"{file}, {error.where}" if error.where else str(file)
        raise RecipeError(error.what, where=where, help=error.help) from error


def read_value(text: str) -> Any:
    """The value of an option that was written on a command line: as TOML has it, or else the text itself.

    Example:
        >>> read_value("0.5"), read_value("[1, 2]"), read_value("l2"), read_value('{name = "global"}')
        (0.5, [1, 2], 'l2', {'name': 'global'})
    """
    try:
        document = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return document["value"] if set(document) == {"value"} else text


def build_pass(name: str, options: Mapping[str, Any] | None = None) -> Pass:
    """The pass of that name with these options. Raises `RecipeError` for an unknown name, option or bad value."""
    kind = PASSES.get(name)
    if kind is None:
        raise RecipeError(f"unknown pass {name!r}", help=_suggest(name, tuple(PASSES), "passes"))
    return _made(kind, name, options or {})


def _replaced(single: Pass, options: Mapping[str, Any]) -> Pass:
    """A pass with other values of some options."""
    return _made(type(single), single.name, {**dict(single.options()), **options})


def _made(kind: type[Pass], name: str, options: Mapping[str, Any]) -> Pass:
    fields = {option.name for option in dataclasses.fields(kind) if option.init}  # type: ignore[arg-type]
    for option in options:
        if option not in fields:
            raise RecipeError(
                f"pass {name} has no option {option!r}",
                where=name,
                help=_suggest(option, tuple(sorted(fields)), "options") if fields else "it has no options",
            )
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    try:
        return kind(**values)
    except GraphoptError as error:
        raise RecipeError(error.what, where=f"pass {name}", help=error.help) from error
    except (TypeError, ValueError) as error:
        raise RecipeError(f"bad option of pass {name}: {error}", where=name) from error


def _suggest(word: str, known: Sequence[str], kind: str) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    guess = f"did you mean {near[0]!r}? " if near else ""
    return f"{guess}{kind} are {', '.join(known)}"
