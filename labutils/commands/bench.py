"""`python -m labutils bench`: measures time, peak memory and error of attention, and writes tables and figures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from labutils.attention.backends import BACKENDS, IMPLEMENTATIONS
from labutils.commands.arguments import INTERRUPTED, argument_type, listed, new_parser, path, seconds, whole_number

if TYPE_CHECKING:
    import pandas as pd

    from labutils.benchmark import Point

DTYPES = ("bfloat16", "float16", "float32")
FORMATS = ("json", "png", "svg")
REFERENCE = "nvidia_h200"
LIMIT = 0.03  # --against complains if medians of two sweeps differ by more
SHORTEST_MS = 0.1  # --against does not judge shorter times
# The share of points at which the spread must cover the difference. It is below 1 because the spread of a few rounds is
# only an estimate. If rounds vary normally, as sweeps do, the larger range of three rounds covers 94 % of the
# differences (simulated). The variation within a round covers some more. Of some tens of points, a few are chance.
COVERED = 0.9


@argument_type
def _formats(text: str) -> list[str]:
    """The type of --write."""
    values = listed(str, (*FORMATS, "none"))(text)
    if "none" in values and set(values) != {"none"}:
        raise argparse.ArgumentTypeError(f"{text}: 'none' stands alone, since it asks for nothing beside the tables.")
    return values


def parser() -> ArgumentParser:
    """The parser of the command's arguments. Those whose default depends on the machine are missing if not given."""
    parser = new_parser(
        "python -m labutils bench",
        "Measure attention implementations over sequence lengths: time, peak memory and error against float64. Rows "
        "are on disk as they come: after an interrupt, --resume measures the missing ones. If a point runs out of "
        "memory or cannot run, its row says why. Lists are separated by commas.",
        epilog="In a minute: python -m labutils bench --seqlens 256,512,1024 --out bench-small. All stored rows that "
        "the notebooks show: python -m labutils bench --dtype bfloat16,float16 --head-dims 64,128 --full --causal "
        "--pass fwd,bwd",
    )
    _add_what_is_measured(parser.add_argument_group("what is measured"))
    _add_how_long(parser.add_argument_group("how long"))
    _add_where_it_goes(parser.add_argument_group("where it goes"))
    return parser


def _swept(*, on_gpu: bool) -> list[str]:
    """The implementations that are measured without --impls. Without a GPU these are PyTorch's kernels for the CPU."""
    return [b.name for b in BACKENDS.values() if b.swept and b.load and (on_gpu or b.on_cpu == "compiled")]


def _add_what_is_measured(what: Any) -> None:
    names = list(IMPLEMENTATIONS)
    not_swept = [name for name in names if not BACKENDS[name].swept]
    what.add_argument(
        "--impls",
        type=listed(str, names),
        metavar="A,B",
        default=argparse.SUPPRESS,
        help=f"of {', '.join(names)} (default: without a GPU {', '.join(_swept(on_gpu=False))}; with one all but "
        f"{', '.join(not_swept)})",
    )
    what.add_argument(
        "--seqlens",
        type=listed(whole_number),
        metavar="N,N",
        default=argparse.SUPPRESS,
        help="sequence lengths (default: 256 to 2048 without a GPU, 512 to 16384 with one, in powers of two)",
    )
    what.add_argument(
        "--head-dims", type=listed(whole_number), metavar="D,D", default=[64], help="head dimensions (default: 64)"
    )
    batch = what.add_mutually_exclusive_group()
    batch.add_argument(
        "--batch", type=listed(whole_number), metavar="B,B", default=argparse.SUPPRESS, help="batch sizes"
    )
    batch.add_argument(
        "--tokens",
        type=whole_number,
        metavar="T",
        default=argparse.SUPPRESS,
        help="tokens in a batch: B = T // N (default: 16384 with a GPU; B = 1 without one)",
    )
    heads = what.add_mutually_exclusive_group()
    heads.add_argument("--heads", type=whole_number, metavar="H", default=argparse.SUPPRESS, help="heads")
    heads.add_argument(
        "--hidden",
        type=whole_number,
        metavar="W",
        default=argparse.SUPPRESS,
        help="width of all heads: H = W / D (default: 2048 with a GPU; H = 4 without one)",
    )
    what.add_argument(
        "--dtype",
        type=listed(str, DTYPES),
        metavar="T,T",
        default=argparse.SUPPRESS,
        help=f"of {', '.join(DTYPES)} (default: the fastest that the machine computes well in)",
    )
    what.add_argument("--full", action="store_true", help="without a mask (the default without --causal)")
    what.add_argument("--causal", action="store_true", help="with the causal mask; both masks with --full, too")
    what.add_argument(
        "--pass",
        dest="passes",
        type=listed(str, ("fwd", "bwd")),
        metavar="P,P",
        default=["fwd"],
        help="fwd, bwd or fwd,bwd; bwd times only the backward pass (default: fwd)",
    )


def _add_how_long(how: Any) -> None:
    how.add_argument(
        "--seconds",
        type=seconds,
        default=0.3,
        help="of recorded repeats for a point, all rounds together (default: %(default)s)",
    )
    how.add_argument("--rounds", type=whole_number, default=3, help="times through all points (default: %(default)s)")
    how.add_argument(
        "--warm-up",
        type=seconds,
        default=argparse.SUPPRESS,
        help="seconds of load before each measurement (default: 0.1 on a GPU, 0.02 without one)",
    )
    how.add_argument(
        "--error-seconds",
        type=seconds,
        default=2.0,
        help="for the float64 result of one shape; 0 measures no error (default: %(default)s)",
    )


def _add_where_it_goes(where: Any) -> None:
    where.add_argument(
        "--out", type=path, default=Path("bench-results"), help="folder for tables and figures (default: %(default)s)"
    )
    where.add_argument(
        "--resume",
        action="store_true",
        help="keep the rows in --out and measure the missing ones, on the same machine and with the same --seconds, "
        "--rounds, --warm-up and --error-seconds",
    )
    where.add_argument(
        "--write",
        type=_formats,
        metavar="F,F",
        default=list(FORMATS),
        help=f"of {', '.join(FORMATS)}, or none, beside attention.csv and environment.json (default: all)",
    )
    where.add_argument(
        "--reference",
        nargs="?",
        const=REFERENCE,
        metavar="GPU",
        help=f"draw the stored results of this GPU beside your own (without a name: {REFERENCE})",
    )
    where.add_argument(
        "--against",
        type=path,
        metavar="FOLDER",
        help=f"compare with an earlier sweep. List the points and exit with 1 if medians above {SHORTEST_MS} ms differ "
        f"by more than {100 * LIMIT:.0f} percent, or if the larger spread_ms of the two covers the difference of less "
        f"than {100 * COVERED:.0f} percent of them",
    )


def run(words: Sequence[str]) -> int:
    """Measures, writes and prints.

    Returns:
        130 after an interrupt; 1 if --against finds a difference, if files cannot be written any more, or after an
        error that the GPU does not recover from; 2 for bad arguments or a folder that cannot be used.
    """
    arguments = parser().parse_args(words)
    try:
        with ExitStack() as hold:
            return _bench(arguments, hold)
    except OSError as error:
        print(f"labutils bench: {error}. Rows that {arguments.out} holds are whole: once it can be written to again, "
              "the same command with --resume measures the rest.", file=sys.stderr)  # fmt: skip
        return 1


def _bench(arguments: Namespace, hold: ExitStack) -> int:
    """Does the work of `run`. `hold` holds the folder, so that no other sweep writes into it."""
    try:
        from labutils import benchmark
        from labutils.benchmark import environment, sweeping, tables
        from labutils.benchmark.points import DeviceLost
        from labutils.machine import files, runtime  # raises if the device that is asked for is missing

        if arguments.reference is not None:  # a wrong name fails before anything is measured
            benchmark.reference_results(arguments.reference, dtype=None)
        earlier = None if arguments.against is None else benchmark.read_results(arguments.against)
        points = _plan(arguments)
        if earlier is not None and not tables.rows_by_point(earlier).keys() & set(points):
            raise ValueError(
                f"{arguments.against} has none of the points that were asked for: give the shapes, dtypes, passes and "
                "implementations of that sweep, or leave --against out."
            )
        files.check_writable(arguments.out, f"--out={arguments.out}")
        hold.enter_context(files.held(arguments.out / ".lock", f"--out={arguments.out}"))
        recorder = benchmark.Recorder(
            arguments.out, environment.environment(), resume=arguments.resume, settings=_settings(arguments)
        )
        if unknown := sorted({point.impl for point in recorder.rows} - set(IMPLEMENTATIONS)):
            raise ValueError(
                f"{recorder.path} has rows of {', '.join(unknown)}, which is no implementation of the lab: "
                f"{', '.join(IMPLEMENTATIONS)}. Delete these rows, or correct the name."
            )
    except (ValueError, RuntimeError, OSError) as error:
        print(f"labutils bench: {error}", file=sys.stderr)
        return 2
    kept = sum(point in recorder.rows for point in points)
    steps = sweeping.pending(points, recorder.rows, arguments.rounds)
    print(f"{runtime.machine}: {len(points)} points, {kept} of them in {recorder.path} already.")
    if (recorder.environment["git_revision"] or "").endswith("+changes"):
        print("The code differs from its commit: nobody will be able to check out what measured this.")
    if not recorder.settings_known:
        print(
            "How long the rows in there were measured is not known: their --seconds, --rounds, --warm-up and "
            "--error-seconds may differ from those of this run."
        )
    interrupted, lost = False, None
    with sweeping.progress_bar(steps) as bar:
        try:
            for done in sweeping.measure_rounds(
                points, benchmark.IMPLEMENTATIONS, recorder.rows, rounds=arguments.rounds,
                seconds_per_point=arguments.seconds, warm_up=arguments.get("warm_up"),
                error_seconds=arguments.error_seconds, describe=bar.set_description_str,
            ):  # fmt: skip
                recorder.write()
                bar.update(done)
        except KeyboardInterrupt:
            interrupted = True
        except DeviceLost as error:
            lost = error
    if recorder.rows:
        recorder.write()  # an interrupt may have stopped the writing of the last row
    if not recorder.path.exists():
        print("\nNothing was measured.")
        return INTERRUPTED if interrupted else _complain_of(lost) if lost is not None else 0
    table = benchmark.read_results(arguments.out)
    print()
    print(describe(table))
    _write(table, arguments)
    if interrupted:
        missing = sweeping.pending(points, recorder.rows, arguments.rounds)
        print(f"Interrupted: of {len(points)} points in {arguments.rounds} rounds, {missing} measurements are missing "
              f"from {recorder.path}. The same command with --resume measures the rest.")  # fmt: skip
        return INTERRUPTED
    if lost is not None:
        return _complain_of(lost)
    return 0 if earlier is None else _compare(earlier, table, arguments.against)


def _settings(arguments: Namespace) -> dict[str, float]:
    """How each point is measured, as environment.json keeps it, with the defaults of this machine."""
    from labutils.benchmark import timing
    from labutils.machine import runtime

    return {
        "seconds": arguments.seconds,
        "rounds": arguments.rounds,
        "warm_up": arguments.get("warm_up", timing.WARM_UP_SECONDS[runtime.device.type]),
        "error_seconds": arguments.error_seconds,
    }


def _complain_of(lost: Exception) -> int:
    print(
        f"labutils bench: {lost}. Rows so far are kept, and the row of that point, if it has one, says what happened. "
        "The same command with --resume measures the others; delete that row, and it measures that point again.",
        file=sys.stderr,
    )
    return 1


def _plan(given: Namespace) -> list[Point]:
    """The points that the arguments ask for. Missing arguments get the defaults of this machine."""
    import torch

    from labutils.benchmark import sweeping
    from labutils.machine import runtime

    impls = _swept(on_gpu=runtime.device.type == "cuda")
    lengths = runtime.choose(cpu=[256, 512, 1024, 2048], gpu=[512, 1024, 2048, 4096, 8192, 16384])
    tokens = None if "batch" in given else given.get("tokens", runtime.choose(cpu=None, gpu=16384))
    hidden = None if "heads" in given else given.get("hidden", runtime.choose(cpu=None, gpu=2048))
    return sweeping.plan(
        given.get("impls", impls),
        given.get("seqlens", lengths),
        head_dims=given.head_dims,
        dtypes=[getattr(torch, name) for name in given.dtype] if "dtype" in given else None,
        causal=[False] * (given.full or not given.causal) + [True] * given.causal,
        passes=given.passes,
        batches=given.get("batch", [1]),
        tokens=tokens,
        heads=given.get("heads"),
        hidden=hidden,
    )


# ------------------------------------------------------------------------------------------------------------
# What is printed
# ------------------------------------------------------------------------------------------------------------


def describe(df: pd.DataFrame) -> str:
    """The table as text: a block for each pass, dtype, head dimension and mask. Reasons and marks stand below."""
    made = df.attrs["environment"]
    lines = [f"{df.attrs['machine']}, torch {made['torch']}, triton {made['triton']}, {made['date']}", ""]
    reasons: dict[str, list[str]] = {}
    for (which, dtype, d, causal), block in df.groupby(["pass", "dtype", "head_dim", "causal"], sort=False):
        lines.append(f"{which}, {dtype}, D = {d}, {'causal' if causal else 'full'}")
        lines.append(
            f"  {'implementation':<15}{'N':>8}{'B':>5}{'H':>4}{'ms':>11}{'spread':>8}{'TFLOP/s':>9}{'peak MiB':>10}"
            f"{'max error':>11}"
        )
        for row in block.sort_values("seqlen", kind="stable").itertuples():
            lines.append(_line(row))
            if row.status != "ok":
                reasons.setdefault(f"{row.status}: {row.reason}", []).append(row.impl)
        lines.append("")
    if df["overhead_bound"].map(lambda value: str(value) == "True").any():
        lines += ["* bound by launching: for a tenth of this time or more the GPU waits for the host.", ""]
    if ((df["status"] == "ok") & df["max_error"].isna()).any():
        lines += ["- no error: the float64 result takes longer than --error-seconds, or memory that is not there.", ""]
    lines += [f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in reasons.items()]
    return "\n".join(lines)


def _line(row: Any) -> str:
    start = f"  {row.impl:<15}{row.seqlen:>8,}{row.batch:>5}{row.heads:>4}"
    error = "-" if row.max_error != row.max_error else f"{row.max_error:.1e}"
    if row.status != "ok":
        return f"{start}{row.status:>12}{'':>26}{error:>11}"
    mark = "*" if str(row.overhead_bound) == "True" else " "
    return (
        f"{start}{row.ms:>11.4g}{mark}{row.spread_ms / row.ms:>7.1%}{row.tflops:>9.3g}{row.peak_mib:>10,.1f}{error:>11}"
    )


def _compare(earlier: pd.DataFrame, now: pd.DataFrame, folder: Path) -> int:
    """Prints how much two sweeps differ, and returns the exit status.

    It is 1 if a median differs by more than `LIMIT`, or if the spread covers less than `COVERED` of the differences.
    """
    from labutils import benchmark
    from labutils.benchmark import environment, tables

    try:
        both = benchmark.compare(earlier, now)
    except ValueError as error:
        print(f"labutils bench: {error}", file=sys.stderr)
        return 2
    long = both[(both["first_ms"] > SHORTEST_MS) & (both["second_ms"] > SHORTEST_MS)]
    print(f"\nAgainst {folder}: {len(both)} points in common, {len(long)} of them above {SHORTEST_MS} ms.")
    made, remade = earlier.attrs["environment"], now.attrs["environment"]
    changes = environment.differences(made, remade)
    if changes:
        print(f"They were not measured in the same environment: {'; '.join(changes)}.")
    if (
        "settings" in made
        and "settings" in remade
        and (others := tables.other_settings(made["settings"], remade["settings"]))
    ):
        print(f"They were not measured with the same settings: {'; '.join(others)}.")
    if long.empty:
        print("None is long enough to be judged.")
        return 0
    print(
        f"Medians of these differ by up to {long['difference'].max():.2%}, half of them by less than "
        f"{long['difference'].median():.2%}; the reported spread covers {int(long['covered'].sum())} of {len(long)}."
    )
    far = long[(long["difference"] > LIMIT) | ~long["covered"]].sort_values("difference", ascending=False)
    for row, which in zip(far.itertuples(), far["pass"], strict=True):
        mask, mark = "causal" if row.causal else "full", ", bound by launching" if row.overhead_bound else ""
        print(
            f"  {row.impl} {which} {row.dtype} D={row.head_dim} {mask} N={row.seqlen:,}: {row.first_ms:.4g} and "
            f"{row.second_ms:.4g} ms, {row.difference:.2%} apart, spread {row.spread:.2%}{mark}"
        )
    over, uncovered = int((long["difference"] > LIMIT).sum()), int((~long["covered"]).sum())
    if far.empty:
        return 0
    print(
        f"Of {len(long)} points, {over} differ by more than {100 * LIMIT:.0f} percent, and {uncovered} by more than "
        f"the reported spread, which is to cover {100 * COVERED:.0f} percent of them."
    )
    if not over and long["covered"].mean() >= COVERED:
        return 0
    return 1


# ------------------------------------------------------------------------------------------------------------
# What is written
# ------------------------------------------------------------------------------------------------------------


def _write(df: pd.DataFrame, arguments: Namespace) -> None:
    from labutils.benchmark import tables

    written = ["attention.csv", "environment.json"]
    if "json" in arguments.write:
        tables.save_json(df, arguments.out / "attention.json", df.attrs["environment"])
        written.append("attention.json")
    pictures = [name for name in arguments.write if name in ("png", "svg")]
    if pictures:
        written += _draw(df, arguments.out, pictures, arguments.reference)
    print(f"\nWritten to {arguments.out}: {', '.join(written)}")


def _draw(df: pd.DataFrame, folder: Path, formats: Sequence[str], reference: str | None) -> list[str]:
    """Draws a figure of time and one of memory for each pass, dtype, head dimension and mask; returns their names."""
    import matplotlib

    matplotlib.use("agg")  # no screen is needed, nor opened
    from labutils import plotting

    written = []
    for (dtype, d, causal), block in df.groupby(["dtype", "head_dim", "causal"], sort=False):
        for which, rows in block.groupby("pass", sort=False):
            for name, part in _drawable(rows):
                part.attrs.update(df.attrs)
                stored = _stored(reference, part, which)
                mask = "causal" if causal else "full"
                for what, draw in (("time", plotting.plot_time), ("memory", plotting.plot_memory)):
                    if part["peak_mib" if what == "memory" else "ms"].isna().all():
                        continue  # all points failed; the table says how
                    figure = draw(part, stored, which=which)
                    for ending in formats:
                        path = folder / f"{what}_{which}_{dtype}_d{d}_{mask}{name}.{ending}"
                        figure.savefig(path, dpi=150)
                        written.append(path.name)
    return written


def _drawable(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Parts of a table with one row for each implementation and length. A resumed sweep may have several B and H."""
    if not rows.duplicated(["impl", "seqlen"]).any():
        return [("", rows)]
    return [(f"_b{b}_h{h}", part) for (b, h), part in rows.groupby(["batch", "heads"], sort=False)]


def _stored(gpu: str | None, rows: pd.DataFrame, which: str) -> pd.DataFrame | None:
    """Stored rows at the same head dimension and mask, in the same dtype if there are such rows."""
    if gpu is None:
        return None
    from labutils import benchmark

    stored = benchmark.reference_results(gpu, dtype=None)
    first = rows.iloc[0]
    dtype = first["dtype"] if first["dtype"] in set(stored["dtype"]) else benchmark.STORED_DTYPE
    like = stored[
        (stored["dtype"] == dtype) & (stored["head_dim"] == first["head_dim"]) & (stored["causal"] == first["causal"])
    ]
    if not (like["pass"] == which).any():
        mask = "causal" if first["causal"] else "full"
        print(f"{gpu} has no stored rows at D = {first['head_dim']}, {mask}, {which}: that figure shows only your own.")
        return None
    return like
