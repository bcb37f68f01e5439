"""The whole zoo pruned at random by graphopt and by Torch-Pruning, and what came of it.

    python -m benchmarks.channels                   # all models, about half an hour
    python -m benchmarks.channels resnet llama      # some

Of graphopt: 30 % of the units of every exact group are removed and the result is held against the masked model; then
30 % of every prunable group, where the result must load and run. Of Torch-Pruning: its README's call and those of its
transformer examples, with random importance where the README's raises; the best outcome counts. Graphs that are no
torch modules do not count for it, and pruning nothing is success where graphopt finds nothing to prune either.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import partial
from statistics import median

from benchmarks import channel_cuts, torch_pruning_cuts
from benchmarks.channel_cuts import RATIO, TOLERANCE
from benchmarks.isolation import Isolation
from benchmarks.results import Column, Goal, Results, Row, progress, read_options
from benchmarks.torch_pruning_cuts import OUTCOMES, README, RUNS, VARIANTS
from tests.zoo.models import CORE, NAMES

PRELOADED = ("torch", "transformers", "torch_pruning", "benchmarks.channel_cuts", "benchmarks.torch_pruning_cuts")
GRAPHOPT_SECONDS, TORCH_PRUNING_SECONDS = 600.0, 60.0
"""Limits for one model; graphopt's holds the export to ONNX where it is not cached yet."""
LEAST_MEDIAN_SHARE = 0.9
_NO_TORCH = OUTCOMES[0]
_NOTHING_TO_PRUNE = "nothing to prune"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write `results/channels.json`."""
    options = read_options("channels", __doc__, arguments, models=NAMES, quick_models=CORE)
    results = Results(
        "channels",
        f"channel groups over the zoo: {RATIO:.0%} of the units removed at random, beside Torch-Pruning",
        options.command,
        options.complete,
    )
    isolation = Isolation(PRELOADED)
    rival = importlib.util.find_spec("torch_pruning") is not None
    for number, name in enumerate(options.models, start=1):
        progress(f"{name} ({number} of {len(options.models)})")
        row: Row = {"model": name, **isolation.run(channel_cuts.measure, name, GRAPHOPT_SECONDS)}
        if rival:
            row["torch_pruning"] = _rival(isolation, name, nothing=row.get("prunable_groups") == 0)
        results.rows.append(row)
    results.goals = goals(results.rows)
    results.show_and_write(COLUMNS)


def _rival(isolation: Isolation, name: str, *, nothing: bool) -> Row:
    """The best outcome of Torch-Pruning; `nothing`: graphopt finds nothing to prune."""

    def call(variant: str, random: bool = False) -> Row:
        found = isolation.run(partial(torch_pruning_cuts.measure, variant, random), name, TORCH_PRUNING_SECONDS)
        if "outcome" not in found:
            found["outcome"] = "takes too long" if found["failure"].startswith("no result") else "raises"
        if found["outcome"] == "nothing pruned" and nothing:
            found["outcome"] = _NOTHING_TO_PRUNE
        return {"variant": variant + (", random importance" if random else ""), **found}

    found = [call(README)]
    first = found[0]["outcome"]
    if first not in (_NO_TORCH, _NOTHING_TO_PRUNE, OUTCOMES[-1]):
        random = first == "raises"
        if random:
            found.append(call(README, random))
        if isolation.run(torch_pruning_cuts.has_heads, name, TORCH_PRUNING_SECONDS).get("has_heads"):
            told = [variant for variant, options in VARIANTS.items() if options]
            found += [call(variant, random) for variant in (told[-1:] if first == "takes too long" else told)]
    return max(found, key=_rank) | {"tried": {row["variant"]: row["outcome"] for row in found}}


def _rank(row: Row) -> int:
    return len(OUTCOMES) if row["outcome"] == _NOTHING_TO_PRUNE else OUTCOMES.index(row["outcome"])


def goals(rows: Sequence[Row]) -> list[Goal]:
    """What is claimed of all rows."""
    lost = [row["model"] for row in rows if not row.get("traced")]
    empty = [row["model"] for row in rows if row.get("prunable_groups", 0) == 0]
    shares = [row["prunable_share"] for row in rows if "prunable_share" in row]
    found = [
        Goal("every model is read", f"{len(rows) - len(lost)} of {len(rows)}{_list(lost)}", not lost),
        Goal(
            "at least 95 % of the models have a prunable group",
            f"{len(rows) - len(empty)} of {len(rows)}{_list(empty)}",
            len(empty) <= 0.05 * len(rows),
        ),
    ]
    for kind, claim in (
        ("exact", f"cut by exact groups, models load, and equal the masked model up to {TOLERANCE:g}, optimized too"),
        ("every", "cut by all prunable groups, models load and run"),
    ):
        tried, failed = channel_cuts.summary(rows, kind)
        measured = f"{len(tried) - len(failed)} of {len(tried)}{_list(failed)}"
        found.append(Goal(claim, measured, not failed and bool(tried)))
    share = median(shares) if shares else 0.0
    found.append(
        Goal(
            f"median share of prunable parameters at least {LEAST_MEDIAN_SHARE:.0%}",
            f"{share:.2%}, {sum(share >= LEAST_MEDIAN_SHARE for share in shares)} of {len(shares)} models above",
            share >= LEAST_MEDIAN_SHARE,
        )
    )
    return found + _goals_against_rival(rows)


def _goals_against_rival(rows: Sequence[Row]) -> list[Goal]:
    modules = [row for row in rows if row.get("torch_pruning", {}).get("outcome", _NO_TORCH) != _NO_TORCH]
    exact = [row for row in modules if row.get("exact_groups") == row.get("prunable_groups")]
    found: list[Goal] = []
    for claim, chosen, kind, good in (
        ("torch modules: more of them run after a cut than after Torch-Pruning's", modules, "every", RUNS),
        ("torch modules without inexact groups: more of them equal the masked model", exact, "exact", RUNS[-1:]),
    ):
        ours = sum("failure" not in (row.get(kind) or {}) and "analysis_seconds" in row for row in chosen)
        theirs = sum(row["torch_pruning"]["outcome"] in (*good, _NOTHING_TO_PRUNE) for row in chosen)
        found.append(Goal(claim, f"{ours} of {len(chosen)} against {theirs}", ours > theirs))
    return found if modules else []


def _list(names: Sequence[str]) -> str:
    return f"; not {', '.join(names)}" if names else ""


def _ratio(row: Row, kind: str) -> str:
    cut = row.get(kind) or {}
    return f"{cut['parameters'] / row['parameters']:.0%}" if "parameters" in cut else "-"


def _rival_ratio(row: Row) -> str:
    cut = row.get("torch_pruning", {})
    return f"{cut['parameters'] / cut['parameters_before']:.0%}" if "parameters" in cut else "-"


def _error(row: Row) -> str:
    cut = row.get("exact") or {}
    return f"{max(cut['error'], cut['error_optimized']):.0e}" if "error" in cut else "-"


COLUMNS: tuple[Column, ...] = (
    ("model", lambda row: row["model"]),
    ("nodes", lambda row: str(row.get("nodes", "-"))),
    ("groups", lambda row: f"{row['prunable_groups']}/{row['groups']}" if "groups" in row else "-"),
    ("exact", lambda row: str(row.get("exact_groups", "-"))),
    ("share", lambda row: f"{row['prunable_share']:.1%}" if "prunable_share" in row else "-"),
    ("parameters", lambda row: f"{row['parameters']:,}" if "parameters" in row else "-"),
    ("cut exact", lambda row: _ratio(row, "exact")),
    ("error", _error),
    ("cut all", lambda row: _ratio(row, "every")),
    ("s", lambda row: f"{row['analysis_seconds']:.2f}" if "analysis_seconds" in row else "-"),
    ("failure", lambda row: row.get("failure", "")[:40]),
    ("Torch-Pruning", lambda row: row.get("torch_pruning", {}).get("outcome", "-")),
    ("cut", _rival_ratio),
)


if __name__ == "__main__":
    main()
