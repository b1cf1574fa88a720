"""The search for the fastest launch configuration of a kernel, for `python -m labutils tune`.

`tune` decides what is tried, keeps the results and chooses. It asks an `Experiment` to check and to time, and so can be
followed without a GPU. `labutils.benchmark.launches` has the experiment that a GPU makes.

For each place of the launch table, all candidates are compiled. Those that fit and do not spill are checked against
the rule of `reference` and timed once. Those near the best are timed again, in rounds with the shipped entry. A
candidate replaces that entry only if it is faster by more than the spread of both measurements.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from labutils.attention.kernels.launch_config import LaunchConfig, Place
from labutils.attention.kernels.tuned_table import Tuned
from labutils.attention.tuning import candidates

NEAR = 0.1  # a candidate is timed again if its first round was slower than the best by at most this share
ROUNDS = 3


class Measured(Protocol):
    """The time of one size, as `benchmark.time_call` returns it."""

    @property
    def median_ms(self) -> float:
        """The median of the repeats."""

    @property
    def spread_ms(self) -> float:
        """Their interquartile range."""


class Experiment(Protocol):
    """Checks and times configurations at one place of the launch table."""

    def check(self, config: LaunchConfig) -> None:
        """Raises AssertionError if the result breaks the rule of `reference`, RuntimeError if the kernel cannot run."""

    def times(self, config: LaunchConfig) -> Sequence[Measured]:
        """The time at each size. Every call measures the same sizes."""


# ------------------------------------------------------------------------------------------------------------
# Choosing
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """What is known of one candidate.

    Attributes:
        place, config: the entry of the launch table, and what is tried there.
        reason: why the candidate is out; "" if it runs and is right.
        registers, spilled_bytes, shared_bytes, blocks_per_sm: what the compiler says.
        rounds: for each round the medians at each size, in milliseconds.
        spreads: for each round the largest interquartile range of a size, relative to its median.
    """

    place: Place
    config: LaunchConfig
    reason: str = ""
    registers: int | None = None
    spilled_bytes: int | None = None
    shared_bytes: int | None = None
    blocks_per_sm: int | None = None
    rounds: list[list[float]] = field(default_factory=list)
    spreads: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The row in JSON's types."""
        config = {name: value for name, value in asdict(self.config).items() if name != "source"}
        return vars(self) | {"place": self.place._asdict(), "config": config}

    @staticmethod
    def of(stored: Mapping[str, Any]) -> Row:
        """The row that `as_dict` made such a dict of."""
        return Row(**dict(stored) | {"place": Place(**stored["place"]), "config": LaunchConfig(**stored["config"])})

    def add(self, timings: Sequence[Measured]) -> None:
        """Adds one round: a time for each size."""
        self.rounds.append([timing.median_ms for timing in timings])
        self.spreads.append(max(timing.spread_ms / timing.median_ms for timing in timings))

    @property
    def ms(self) -> float:
        """The geometric mean over the sizes of the medians over the rounds; NaN if none was timed."""
        if not self.rounds:
            return math.nan
        return statistics.geometric_mean([statistics.median(at_size) for at_size in zip(*self.rounds, strict=True)])

    @property
    def spread(self) -> float:
        """How far the measurements vary, relative to `ms`: within a round, plus what the rounds differ by."""
        if not self.rounds:
            return math.nan
        means = [statistics.geometric_mean(medians) for medians in self.rounds]
        return max(self.spreads) + (max(means) - min(means)) / statistics.median(means)


@dataclass(frozen=True)
class Decision:
    """Which configuration a place gets.

    Attributes:
        best: the fastest of the rows that are right. shipped: the row of the shipped entry.
        replaced: whether `best` replaces the shipped entry.
    """

    best: Row
    shipped: Row
    replaced: bool

    @property
    def gain(self) -> float:
        """How much faster the best is than the shipped entry, 0.1 for 10 %; NaN if the shipped one did not run."""
        return self.shipped.ms / self.best.ms - 1

    @property
    def spread(self) -> float:
        """The larger spread of the two rows. `gain` must exceed it."""
        return max(self.best.spread, 0.0 if math.isnan(self.shipped.spread) else self.shipped.spread)

    def __str__(self) -> str:
        if self.shipped.reason:
            return f"{self.best.config}: the shipped entry is out, {self.shipped.reason}"
        if self.best is self.shipped:
            return "the shipped entry is the fastest"
        facts = f"{self.best.config} is {self.gain:.1%} faster than the shipped entry, spread {self.spread:.1%}"
        return f"{facts}: {'it takes its place' if self.replaced else 'the shipped entry stays'}"


def decide(rows: Sequence[Row]) -> Decision:
    """The fastest of the rows of one place. The first row must be that of the shipped entry.

    The shipped entry stays unless a candidate is faster by more than the larger spread of the two.

    Raises:
        RuntimeError: no row ran and was right; the message says why.
        ValueError: the shipped entry runs, but was not timed.
    """
    shipped = rows[0]
    timed = [row for row in rows if not row.reason and row.rounds]
    if not timed:
        raise RuntimeError(
            f"{shipped.place}: no candidate runs here. The shipped entry: {shipped.reason or 'no time'}."
        )
    # A median of one round says less than one of three. A row with fewer rounds was not near the best.
    most = max(len(row.rounds) for row in timed)
    best = min((row for row in timed if len(row.rounds) == most), key=lambda row: row.ms)
    if shipped.reason:
        return Decision(best, shipped, replaced=True)
    if not shipped.rounds:
        raise ValueError(f"{shipped.place}: the shipped entry was not timed, so the others cannot be compared with it.")
    decision = Decision(best, shipped, replaced=False)
    return Decision(best, shipped, replaced=best is not shipped and decision.gain > decision.spread)


def contenders(rows: Sequence[Row]) -> list[Row]:
    """The rows of one place that deserve more rounds after the first: the shipped entry, and those near the best."""
    timed = [row for row in rows if not row.reason and row.rounds]
    if not timed:
        return []
    first = {id(row): statistics.geometric_mean(row.rounds[0]) for row in timed}
    limit = (1 + NEAR) * min(first.values())
    return [row for row in timed if row is rows[0] or first[id(row)] <= limit]


def tune(
    places: Iterable[Place],
    tuned: Tuned,
    experiments: Callable[[Place], Experiment],
    compile: Callable[[Place], Sequence[candidates.Compiled]],
    *,
    rounds: int = ROUNDS,
    save: Callable[[], None] = lambda: None,
    describe: Callable[[str], None] = lambda text: None,
    advance: Callable[[int], None] = lambda count: None,
    decided: Callable[[Decision], None] = lambda decision: None,
) -> None:
    """Times the candidates that `tuned` lacks, and puts the winners into `tuned.entries`.

    Args:
        places: the entries of the launch table to tune.
        tuned: what earlier runs measured. Its rows are kept, and each step adds to it.
        experiments: makes the experiment for a place.
        compile: compiles the candidates of a place. The shipped entry must come first.
        rounds: how often the candidates near the best are timed.
        save: called after each step, so that an interrupt loses nothing.
        describe: told the current step. advance: told how many more candidates are finished.
        decided: told the decision for each place.

    Raises:
        RuntimeError: at one place no candidate runs.
    """
    tuned.finished = False
    rows = [Row.of(stored) for stored in tuned.measured]

    def keep() -> None:
        tuned.measured = [row.as_dict() for row in rows]
        save()

    for place in places:
        mine = [row for row in rows if row.place == place]
        if not mine:
            describe(f"{place}: compiling")
            mine = [_row(place, found) for found in compile(place)]
            rows += mine
            keep()
        experiment = None
        finished = 0
        for number in range(rounds):
            todo = [row for row in (mine if number == 0 else contenders(mine)) if not row.reason]
            advance(len(mine) - len(todo) - finished)
            finished = len(mine) - len(todo)
            for row in todo:
                if len(row.rounds) > number:
                    continue
                c = row.config
                shape = f"{c.block_m} x {c.block_n}, {c.num_warps} warps, {c.num_stages} stages"
                describe(f"{place}: {shape}, round {number + 1}")
                experiment = experiments(place) if experiment is None else experiment
                try:
                    if not row.rounds:
                        experiment.check(c)
                    row.add(experiment.times(c))
                except (AssertionError, RuntimeError) as error:
                    row.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                    row.rounds, row.spreads = [], []
                keep()
        decision = decide(mine)
        tuned.entries.pop(place, None)
        if decision.replaced:
            tuned.entries[place] = decision.best.config
        keep()
        advance(len(mine) - finished)
        decided(decision)
    tuned.finished = True
    keep()


def _row(place: Place, found: candidates.Compiled) -> Row:
    cost = found.resources
    return Row(
        place, found.config, found.reason, cost.registers, cost.spilled_bytes, cost.shared_bytes, cost.blocks_per_sm
    )
