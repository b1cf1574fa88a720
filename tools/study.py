"""Measures and compiles the tables that notebook 04 shows, and stores them under labutils/results."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

LABUTILS_COMMAND_LINE = True  # `import labutils` then imports no torch, and --help is quick
TABLES = {
    "traffic": ("coalescing", "launches", "traffic"),
    "shapes": ("prediction",),
    "blocks": ("blocks",),
    "decoding": ("decoding",),
    "resources": ("resources",),
}
"""Each part, and the tables that it writes."""
PARTS = tuple(TABLES)


def parser() -> ArgumentParser:
    """The parser of the arguments."""
    from labutils.commands.arguments import new_parser, path, some_seconds, whole_number

    parser = new_parser(
        "python tools/study.py",
        "Write tables for notebook 04. traffic: bytes at DRAM and L2, and sectors, by Nsight Compute, on a GPU whose "
        "counters may be read. shapes: times of shapes to fit a prediction on and of others to judge it by, on a GPU. "
        "blocks: times of all block sizes, on a GPU. decoding: bandwidth of reading a cache, on a GPU. resources: "
        "registers, spills and occupancy of kernels compiled for other GPUs; needs no GPU.",
    )
    parser.add_argument("part", choices=PARTS, help="which tables to make")
    parser.add_argument(
        "--out", type=path, required=True, help="folder for the tables, such as labutils/results/my_gpu"
    )
    parser.add_argument(
        "--count-up-to",
        type=whole_number,
        default=2048,
        metavar="N",
        help="traffic: the longest sequence whose bytes are also counted in the interpreter (default: %(default)s; "
        "8192 takes ten minutes)",
    )
    parser.add_argument(
        "--counts-only",
        action="store_true",
        help="traffic: count for the rows that --out holds already, and measure nothing; needs no GPU",
    )
    parser.add_argument("--log", type=path, metavar="FOLDER", help="traffic: folder that keeps the text of ncu")
    parser.add_argument(
        "--work",
        type=path,
        default=Path("study-shapes"),
        metavar="FOLDER",
        help="shapes: folder for the measurements as they come (default: %(default)s)",
    )
    parser.add_argument("--resume", action="store_true", help="shapes: go on with the measurements in --work")
    parser.add_argument(
        "--seconds",
        type=some_seconds,
        default=0.1,
        help="shapes: of recorded repeats for a point (default: %(default)s)",
    )
    parser.add_argument(
        "--processes", type=whole_number, default=1, help="resources: compilers at once (default: %(default)s)"
    )
    return parser


def run(words: Sequence[str]) -> int:
    """Makes the tables of one part. Returns 130 after an interrupt, 2 if they cannot be made."""
    from labutils.commands.arguments import INTERRUPTED

    arguments = parser().parse_args(words)
    parts = {
        "traffic": _traffic,
        "shapes": _shapes,
        "blocks": _blocks,
        "decoding": _decoding,
        "resources": _resources,
    }
    try:
        with _held(arguments):
            return parts[arguments.part](arguments)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"study {arguments.part}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted: the table that was being made was not written.", file=sys.stderr)
        return INTERRUPTED


@contextmanager
def _held(arguments: Namespace) -> Iterator[None]:
    """Holds the folders that the part writes into. Raises ValueError, before any work, if one cannot be written to."""
    from labutils.benchmark import environment, tables
    from labutils.machine import files

    if arguments.part != "resources" and not arguments.counts_only:
        _ask_for_a_gpu()
    folders = {"--out": arguments.out}
    if arguments.part == "shapes":
        folders["--work"] = arguments.work
    if arguments.part == "traffic" and arguments.log is not None:
        folders["--log"] = arguments.log
    with ExitStack() as stack:
        for flag, folder in folders.items():
            files.check_writable(folder, f"{flag}={folder}")
        for folder in {folder.resolve(): folder for folder in folders.values()}.values():
            stack.enter_context(files.held(folder / ".lock", str(folder)))
        if not arguments.counts_only:
            made_by = environment.environment()
            for table in TABLES[arguments.part]:
                tables.check_destination(arguments.out, made_by, table)
        yield


def _ask_for_a_gpu() -> None:
    """Raises RuntimeError, with cause and remedy, if the lab uses no GPU."""
    from labutils.benchmark import environment
    from labutils.machine import runtime

    if runtime.device.type != "cuda":
        cause, remedy = environment.why_no_gpu()
        raise RuntimeError(f"there is no GPU to measure on: {cause}. {remedy}")


def _traffic(arguments: Namespace) -> int:
    import traffic_tables
    from labutils import benchmark
    from labutils.analysis import counters
    from labutils.benchmark import environment
    from labutils.benchmark.sweeping import progress_bar
    from labutils.commands.arguments import INTERRUPTED

    if arguments.counts_only:
        table = benchmark.read_results(arguments.out, "traffic")
        made_by = table.attrs["environment"]
    else:
        _ask_for_a_gpu()
        made_by = environment.environment().as_dict()
        logs = [None, None]
        if arguments.log is not None:
            arguments.log.mkdir(parents=True, exist_ok=True)
            logs = [arguments.log / "ncu-traffic.csv", arguments.log / "ncu-coalescing.csv"]
        print("Copies with gaps, under ncu ...", flush=True)
        gaps = traffic_tables.measure_coalescing(counters.planned_coalescing(), keep=logs[1])
        benchmark.save_results(gaps, arguments.out, made_by, table="coalescing")
        print(gaps.to_string(index=False))
        print("Attention, under ncu ...", flush=True)
        table, launches = traffic_tables.measure_traffic(traffic_tables.planned_traffic(), keep=logs[0])
        benchmark.save_results(launches, arguments.out, made_by, table="launches")
        benchmark.save_results(table, arguments.out, made_by, table="traffic")  # counting may be interrupted
    print(f"Counting in the interpreter, up to N = {arguments.count_up_to:,} ...", flush=True)
    try:
        with progress_bar(len(table)) as bar:
            table = traffic_tables.with_counts(table, arguments.count_up_to, bar.update)
    except KeyboardInterrupt:
        print(
            f"Interrupted: what was measured is in {arguments.out}, without the counts of this run. The same command "
            "with --counts-only counts, and measures nothing again.",
            file=sys.stderr,
        )
        return INTERRUPTED
    path = benchmark.save_results(table, arguments.out, made_by, table="traffic")
    print(table.to_string(index=False))
    print(f"\nWritten: {path}")
    return 0


def _shapes(arguments: Namespace) -> int:
    from labutils import benchmark
    from labutils.analysis import prediction
    from labutils.benchmark import environment, sweeping
    from labutils.commands.arguments import INTERRUPTED

    _ask_for_a_gpu()
    splits = prediction.points_to_measure()
    points = list(splits)
    recorder = benchmark.Recorder(arguments.work, environment.environment(), resume=arguments.resume)
    with sweeping.progress_bar(sweeping.pending(points, recorder.rows, 1)) as bar:
        try:
            for done in sweeping.measure_rounds(
                points, benchmark.IMPLEMENTATIONS, recorder.rows, seconds_per_point=arguments.seconds,
                error_seconds=0.0, describe=bar.set_description_str,
            ):  # fmt: skip
                recorder.write()
                bar.update(done)
        except KeyboardInterrupt:
            recorder.write()
            print(f"Interrupted: the same command with --resume goes on with {recorder.path}.", file=sys.stderr)
            return INTERRUPTED
    recorder.write()
    measured = benchmark.read_results(arguments.work)
    measured["split"] = [splits[benchmark.Point.of(record)] for record in measured.to_dict("records")]
    for (impl, status), rows in measured[measured["status"] != "ok"].groupby(["impl", "status"]):
        print(f"{impl}: {len(rows)} shapes {status}: {rows['reason'].iloc[0]}")
    measured = measured[(measured["status"] == "ok") & (measured["overhead_bound"].astype(str) != "True")]
    gpu = prediction.gpu_for(arguments.out)
    table = prediction.predicted_table(measured, gpu)[list(benchmark.SCHEMAS["prediction"])]
    path = benchmark.save_results(table, arguments.out, recorder.environment, table="prediction")
    held_out = table[table["split"] == "held_out"]
    print(f"\n{gpu}\nHeld-out shapes, absolute relative error:")
    print(prediction.error_summary(held_out).round(3).to_string())
    print(f"\nWritten: {path}")
    return 0


def _blocks(arguments: Namespace) -> int:
    import pandas as pd

    from labutils import benchmark
    from labutils.analysis import blocks
    from labutils.benchmark import environment
    from labutils.benchmark.sweeping import progress_bar

    _ask_for_a_gpu()
    tables = []
    each = len(blocks.BLOCKS) ** 2 * len(blocks.WARPS) * len(blocks.STAGES)
    shapes = [(d, causal) for d in (64, 128) for causal in (False, True)]
    with progress_bar(each * len(shapes)) as bar:
        for d, causal in shapes:
            tables.append(blocks.sweep_blocks(head_dim=d, heads=2048 // d, causal=causal, done=bar.update))
    table = pd.concat(tables, ignore_index=True)
    path = benchmark.save_results(table, arguments.out, environment.environment(), table="blocks")
    print(table.sort_values("ms").groupby(["head_dim", "causal"]).head(3).to_string(index=False))
    print(f"\nWritten: {path}")
    return 0


def _decoding(arguments: Namespace) -> int:
    from labutils import analysis, benchmark
    from labutils.benchmark import environment

    _ask_for_a_gpu()
    table = analysis.decode_points((1, 8, 32, 64))
    path = benchmark.save_results(table, arguments.out, environment.environment(), table="decoding")
    print(table.to_string(index=False))
    print(f"\nExponentials: {analysis.measure_exponentials() / 1e12:.3g} * 10^12 a second")
    print(f"Written: {path}")
    return 0


def _resources(arguments: Namespace) -> int:
    from labutils import benchmark
    from labutils.analysis import resources
    from labutils.benchmark import environment
    from labutils.benchmark.sweeping import progress_bar

    launches = resources.launches_of_the_table() + resources.launches_of_the_grid()
    with progress_bar(len(launches)) as bar:
        table = resources.compile_launches(launches, processes=arguments.processes, done=bar.update)
    path = benchmark.save_results(table, arguments.out, environment.environment(), table="resources")
    print(f"Written: {path}, {len(table)} launches")
    return 0


if __name__ == "__main__":
    from labutils.commands.arguments import exit_status

    sys.exit(exit_status("study", run, sys.argv[1:]))
