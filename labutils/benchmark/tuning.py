"""Finds the launch configurations that are fastest on this GPU, for `python -m labutils tune`.

Two parts that know nothing of each other. `Experiment` checks and times one configuration on the GPU. `tune` decides
what is tried, keeps what came out, and chooses; it takes any experiment, and so can be followed without a GPU.

For each place of the launch table: all candidates are compiled; those that fit and do not spill are checked against
the reference rule and timed once; those near the best are timed again, in rounds with the entry that was there before.
A candidate takes its place only if it is faster by more than the measurements of the two differ by.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from labutils.attention import reference
from labutils.attention.kernels import flash_decode, flash_v1, flash_v2, flash_v2_backward, launch_table
from labutils.attention.kernels.launch_config import LaunchConfig, Place
from labutils.attention.kernels.options import Cache, Options
from labutils.attention.kernels.replay import Replay
from labutils.attention.kernels.tuned_table import Tuned
from labutils.attention.tuning import candidates
from labutils.benchmark.timing import Timing, time_call
from labutils.machine import runtime

NEAR = 0.1  # how much slower than the best, in the first round, a candidate may be to be timed again
ROUNDS = 3
SECONDS = 0.1  # of recorded repeats for a candidate at one size, in one round


class Experiment(Protocol):
    """What `tune` asks of a configuration at one place."""

    def check(self, config: LaunchConfig) -> None:
        """Raises AssertionError where its result breaks the rule of `reference`, RuntimeError where it cannot run."""

    def times(self, config: LaunchConfig) -> Sequence[Timing]:
        """Its time at each size, always the same ones."""


# ------------------------------------------------------------------------------------------------------------
# Choosing
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """What is known of one candidate.

    Attributes:
        place, config: what it is.
        reason: why it is out; "" where it runs and is right.
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
        """The row as JSON takes it."""
        config = {name: value for name, value in asdict(self.config).items() if name != "source"}
        return vars(self) | {"place": self.place._asdict(), "config": config}

    @staticmethod
    def of(stored: Mapping[str, Any]) -> Row:
        """The row of such a dict."""
        return Row(**dict(stored) | {"place": Place(**stored["place"]), "config": LaunchConfig(**stored["config"])})

    def add(self, timings: Sequence[Timing]) -> None:
        """One more round."""
        self.rounds.append([timing.median_ms for timing in timings])
        self.spreads.append(max(timing.spread_ms / timing.median_ms for timing in timings))

    @property
    def ms(self) -> float:
        """The geometric mean over the sizes of the medians over the rounds; NaN where it was not timed."""
        if not self.rounds:
            return math.nan
        return statistics.geometric_mean([statistics.median(at_size) for at_size in zip(*self.rounds, strict=True)])

    @property
    def spread(self) -> float:
        """Relative: within a round the middle half of the repeats, and what the rounds differ by on top."""
        if not self.rounds:
            return math.nan
        means = [statistics.geometric_mean(medians) for medians in self.rounds]
        return max(self.spreads) + (max(means) - min(means)) / statistics.median(means)


@dataclass(frozen=True)
class Decision:
    """What a place gets.

    Attributes:
        best: the row with the least time, of those that are right. shipped: the row of the shipped entry.
        replaced: whether `best` takes the place of the shipped entry.
    """

    best: Row
    shipped: Row
    replaced: bool

    @property
    def gain(self) -> float:
        """How much faster the best is than the shipped entry, 0.1 for 10 %; NaN where the shipped one did not run."""
        return self.shipped.ms / self.best.ms - 1

    @property
    def spread(self) -> float:
        """What `gain` must exceed."""
        return max(self.best.spread, 0.0 if math.isnan(self.shipped.spread) else self.shipped.spread)

    def __str__(self) -> str:
        if self.shipped.reason:
            return f"{self.best.config}: the shipped entry is out, {self.shipped.reason}"
        if self.best is self.shipped:
            return "the shipped entry is the fastest"
        facts = f"{self.best.config} is {self.gain:.1%} faster than the shipped entry, spread {self.spread:.1%}"
        return f"{facts}: {'it takes its place' if self.replaced else 'the shipped entry stays'}"


def decide(rows: Sequence[Row]) -> Decision:
    """The fastest of one place's rows, of which the first is the shipped entry's.

    The shipped entry stays unless a candidate is faster by more than the larger spread of the two.

    Raises:
        RuntimeError: none of them ran and was right; the message says why.
        ValueError: the shipped entry runs, and was not timed.
    """
    shipped = rows[0]
    timed = [row for row in rows if not row.reason and row.rounds]
    if not timed:
        raise RuntimeError(
            f"{shipped.place}: no candidate runs here. The shipped entry: {shipped.reason or 'no time'}."
        )
    # A median of one round says less than one of three: what was not timed to the end was not near the best.
    most = max(len(row.rounds) for row in timed)
    best = min((row for row in timed if len(row.rounds) == most), key=lambda row: row.ms)
    if shipped.reason:
        return Decision(best, shipped, replaced=True)
    if not shipped.rounds:
        raise ValueError(f"{shipped.place}: the shipped entry was not timed, and so nothing can be said of the others.")
    decision = Decision(best, shipped, replaced=False)
    return Decision(best, shipped, replaced=best is not shipped and decision.gain > decision.spread)


def contenders(rows: Sequence[Row]) -> list[Row]:
    """Of one place's rows, after their first round, those worth more rounds: the shipped entry, and those near the
    best."""
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
    """Times what `tuned` lacks, and puts winners into `tuned.entries`.

    Args:
        places: what to tune.
        tuned: what is known; its rows are kept, and it is filled here, step by step.
        experiments: for a place, what checks and times.
        compile: for a place, its candidates, the shipped entry first, with what the compiler says of them.
        rounds: how often those near the best are timed.
        save: called after each step: what an interrupt leaves is whole.
        describe: told what is being done. advance: how many candidates are done with.
        decided: told what each place gets.

    Raises:
        RuntimeError: at some place no candidate runs.
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


# ------------------------------------------------------------------------------------------------------------
# Measuring
# ------------------------------------------------------------------------------------------------------------

CHECKED_LENGTH = 397  # no block divides it
LENGTHS = (1024, 4096)
_DECODED = ((1, 8192), (8, 8192))  # queries and keys of a sequence
_HEADS_PER_KEY_HEAD = 8


class OnGpu:
    """The experiment on this GPU.

    Forward, dK/dV and dQ: the kernel alone, launched again and again, at N = 1,024 and 4,096 with 8,192 tokens (16,384
    on a GPU with 40 GiB or more) and H * D = 2,048. v1: N = 1,024, its whole function. Decoding: one and eight queries
    for each sequence, 8,192 keys, 8 query heads a key head, its whole function with the merge.

    Args:
        place: what is timed. seconds: of recorded repeats, at each size.

    Raises:
        RuntimeError: no GPU.
    """

    def __init__(self, place: Place, *, seconds: float = SECONDS):
        self.place, self.seconds = place, seconds
        if runtime.capability is None:
            raise RuntimeError("there is no GPU here to time launch configurations on.")
        capability = runtime.capability
        self.dtype = torch.float32 if place.dtype == "float32" else runtime.default_dtype(capability)
        self.causal = place.causal is not False
        self.shipped = {
            kernel: launch_table.shipped(place._replace(kernel=kernel), capability)
            for kernel in ({"forward", "dkdv", "dq"} if place.kernel in ("dkdv", "dq") else {place.kernel})
        }
        self._inputs: dict[tuple, tuple] = {}

    def check(self, config: LaunchConfig) -> None:
        """At a length that no block divides, with several query heads a key head, by the rule of `reference`."""
        n, d, scale = CHECKED_LENGTH, self.place.head_dim, self.place.head_dim**-0.5
        options = self._options()
        generator = torch.Generator(runtime.device).manual_seed(1)

        def draw(rows: int, heads: int) -> torch.Tensor:
            return torch.randn(2, rows, heads, d, generator=generator, device=runtime.device, dtype=self.dtype)

        causal = dict(causal=self.causal, softmax_scale=scale)
        if self.place.kernel == "decode":
            for n_q in (1, 8):
                q, k, v = draw(n_q, 8), draw(n, 2), draw(n, 2)
                cut = flash_decode.cut_to_rows(config, n_q * 4)
                out, lse = flash_decode.decode(q, k, v, Cache(None, n), options, config=cut)
                reference.check_attention(out, q, k, v, lse=lse, **causal).raise_if_failed()
            return
        q, k, v = draw(n, 4), draw(n, 2), draw(n, 2)
        if self.place.kernel == "v1":
            for mask in (False, True):
                out, lse = flash_v1.forward(q, k, v, scale, mask, config)
                reference.check_attention(out, q, k, v, lse=lse, causal=mask, softmax_scale=scale).raise_if_failed()
        elif self.place.kernel == "forward":
            out, lse = flash_v2.forward(q, k, v, options, config)
            reference.check_attention(out, q, k, v, lse=lse, **causal).raise_if_failed()
        else:
            dout = draw(n, 4)
            out, lse = flash_v2.forward(q, k, v, options, self.shipped["forward"])
            configs = self.shipped | {self.place.kernel: config}
            gradients = flash_v2_backward.backward(dout, q, k, v, out, lse, options, configs)
            for verdict in reference.check_gradients(gradients, dout, q, k, v, **causal):
                verdict.raise_if_failed()

    def times(self, config: LaunchConfig) -> list[Timing]:
        """By `measuring.time_call`."""
        if self.place.kernel == "decode":
            calls = [self._decode(config, *size) for size in _DECODED]
        elif self.place.kernel == "v1":
            calls = [self._v1(config)]
        else:
            calls = [self._launch(config, n) for n in LENGTHS]
        return [time_call(call, seconds=self.seconds) for call in calls]

    def _options(self) -> Options:
        return Options(self.place.head_dim**-0.5, window_right=0 if self.causal else None)

    def _draw(self, *shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        """Random tensors, made once for each size."""
        if shapes not in self._inputs:
            on_gpu = dict(device=runtime.device, dtype=self.dtype)
            generator = torch.Generator(runtime.device).manual_seed(0)
            self._inputs[shapes] = tuple(torch.randn(shape, generator=generator, **on_gpu) for shape in shapes)
        return self._inputs[shapes]

    def _shape(self, n: int) -> tuple[int, int, int, int]:
        tokens = runtime.choose(cpu=8192, gpu=8192, large_gpu=16384)
        return (tokens // n, n, 2048 // self.place.head_dim, self.place.head_dim)

    def _launch(self, config: LaunchConfig, n: int) -> Callable[[], Any]:
        q, k, v, dout = self._draw(*[self._shape(n)] * 4)
        options = self._options()
        if self.place.kernel == "forward":
            launched = flash_v2.launch_forward(q, k, v, options, config)[2]
        else:
            out, lse = flash_v2.forward(q, k, v, options, self.shipped["forward"])
            configs = self.shipped | {self.place.kernel: config}
            _, launches, _ = flash_v2_backward.launch_backward(dout, q, k, v, out, lse, options, configs)
            launched = launches[self.place.kernel]
        assert launched is not None  # as it would be for an empty grid
        again = Replay(launched).again

        # A launch that is done again knows addresses alone; `launched` holds the tensors that are there.
        def repeat(alive: Any = launched) -> Any:
            return again()

        return repeat

    def _v1(self, config: LaunchConfig) -> Callable[[], Any]:
        q, k, v = self._draw(*[self._shape(1024)] * 3)
        return lambda: flash_v1.forward(q, k, v, self.place.head_dim**-0.5, self.causal, config)

    def _decode(self, config: LaunchConfig, n_q: int, n_k: int) -> Callable[[], Any]:
        heads_kv, d = 8, self.place.head_dim
        batch = 4 * runtime.choose(cpu=1, gpu=1, large_gpu=4)
        keys = (batch, n_k, heads_kv, d)
        q, k, v = self._draw((batch, n_q, heads_kv * _HEADS_PER_KEY_HEAD, d), keys, keys)
        cut = flash_decode.cut_to_rows(config, n_q * _HEADS_PER_KEY_HEAD)
        cache = Cache(None, n_k)
        return lambda: flash_decode.decode(q, k, v, cache, self._options(), config=cut)
