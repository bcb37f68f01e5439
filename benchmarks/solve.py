"""How long it takes to decide ResNet-50 under a budget: widths in packets of 16 of all groups, and 16 blocks.

The instance has the shapes of ResNet-50: 53 convolutions and the classifier, 37 groups (stem, 4 residual streams, 2 in
each of 16 blocks), 16 blocks that may be dropped, 4 projections that stay. A layer costs MACs in both its widths, a
fixed part, and memory traffic, on the staircase of 16 channels, with a jitter of 5 % an entry, as a measured table has;
what is kept of it is worth a concave share of an importance drawn at random (the best channels first), more alike
within a block than between blocks, so that some blocks are worth little.

    python -m benchmarks.solve [--step 16] [--seconds 20]
"""

from __future__ import annotations

import argparse

import numpy as np

from graphopt.search.budget import Assignment, BudgetProblem, Choice, Term, totals
from graphopt.search.knapsack import solve_knapsack
from graphopt.search.milp import solve_milp

_STAGES = ((64, 256, 3, 56), (128, 512, 4, 28), (256, 1024, 6, 14), (512, 2048, 3, 7))
"""Width inside a block, width of the stream, blocks, pixels along a side."""
_MACS_A_MILLISECOND = 60e6
_BYTES_A_MILLISECOND = 15e6


class _ResNet:
    """The tables of a ResNet-50, layer by layer."""

    def __init__(self, step: int, seed: int) -> None:
        self.step = step
        self.random = np.random.default_rng(seed)
        self.importance = 1.0
        self.choices: list[Choice] = []
        self.terms: list[Term] = []
        self.widths: dict[str, np.ndarray] = {}

    def width(self, name: str, channels: int) -> str:
        """A choice of how many channels of a group are kept: all, then one packet less each."""
        self.widths[name] = np.arange(channels, 0, -self.step)
        self.choices.append(Choice(name, tuple(str(kept) for kept in self.widths[name])))
        return name

    def layer(self, name: str, into: str | int, out: str | int, kernel: int, side: int, gate: str | None) -> None:
        """The cost of a layer by both its widths, and what its output channels are worth."""
        axes = [self.widths.get(str(width), np.array([width])) for width in (into, out)]
        reads, writes = np.meshgrid(*axes, indexing="ij")
        macs = reads * writes * kernel**2 * side**2
        moved = 4 * (reads * writes * kernel**2 + (reads + writes) * side**2)
        cost = 0.01 + macs / _MACS_A_MILLISECOND + moved / _BYTES_A_MILLISECOND
        cost = cost * self.random.uniform(0.95, 1.05, size=cost.shape)
        gone = 1 - writes / writes.max()
        value = self.importance * self.random.lognormal(0, 0.5) * (1 - gone ** self.random.uniform(1.1, 2.5))
        names = tuple(width for width in (into, out) if isinstance(width, str))
        shape = [len(self.widths[width]) for width in names]
        self.terms.append(Term(name, names, cost.reshape(shape), value.reshape(shape), gate))


def resnet50(ratio: float, *, step: int = 16, seed: int = 0) -> BudgetProblem:
    """The instance, with a budget of this share of what the whole network costs."""
    net = _ResNet(step, seed)
    stream = net.width("stem", 64)
    net.layer("conv1", 3, stream, 7, 112, None)
    for stage, (inner, outer, blocks, side) in enumerate(_STAGES, start=1):
        net.importance = 1.0
        before, stream = stream, net.width(f"stream{stage}", outer)
        net.layer(f"layer{stage}.projection", before, stream, 1, side, None)
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            net.importance = float(net.random.lognormal(-0.5, 1.0))
            net.choices.append(Choice(name, ("keep", "drop")))
            first, second = net.width(f"{name}.conv1", inner), net.width(f"{name}.conv2", inner)
            net.layer(f"{name}.conv1", before if block == 0 else stream, first, 1, side, name)
            net.layer(f"{name}.conv2", first, second, 3, side, name)
            net.layer(f"{name}.conv3", second, stream, 1, side, name)
    net.importance = 1.0
    net.layer("classifier", stream, 1000, 1, 1, None)
    choices, terms = tuple(net.choices), tuple(net.terms)
    whole = totals(BudgetProblem(choices, terms, 0.0), [0] * len(choices))[1]
    return BudgetProblem(choices, terms, ratio * whole)


def _line(label: str, ratio: float, found: Assignment, problem: BudgetProblem) -> str:
    dropped = sum(option == 1 for name, option in found.options.items() if name in _blocks(problem))
    return (
        f"{ratio:5.2f}  {label:9}  {found.seconds:7.2f} s  value {found.value:9.4f}  bound {found.bound:9.4f}  "
        f"gap {found.gap:8.2e}  of the budget {found.cost / problem.budget:.5f}  blocks dropped {dropped}"
        f"{'  (' + found.note + ')' if found.note else ''}"
    )


def _blocks(problem: BudgetProblem) -> set[str]:
    return {choice.name for choice in problem.choices if choice.options == ("keep", "drop")}


def main() -> None:
    """Print seconds, gap and what was chosen for each ratio and solver."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--step", type=int, default=16, help="channels a packet")
    parser.add_argument("--seconds", type=float, default=20.0, help="time limit of a solve")
    parser.add_argument("--gap", type=float, default=1e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="leave out the bounds: HiGHS has to do it all")
    arguments = parser.parse_args()
    for ratio in (0.8, 0.5, 0.3):
        problem = resnet50(ratio, step=arguments.step, seed=arguments.seed)
        if ratio == 0.8:
            entries = sum(term.cost.size for term in problem.terms)
            print(f"{len(problem.choices)} choices, {len(problem.terms)} terms, {entries} combinations")
        found = solve_milp(problem, seconds=arguments.seconds, gap=arguments.gap, reduce=not arguments.plain)
        print(_line("milp", ratio, found, problem), flush=True)
        print(_line("knapsack", ratio, solve_knapsack(problem), problem), flush=True)


if __name__ == "__main__":
    main()
