"""Measures the kernels on this GPU, and prints required and measured speed side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

LABUTILS_COMMAND_LINE = True  # `import labutils` then imports no torch, and --help is quick


def parser() -> ArgumentParser:
    """The parser of the arguments."""
    from labutils.commands.arguments import new_parser, path, some_seconds, whole_number

    parser = new_parser(
        "python tools/targets.py",
        "Measure, in one run, this lab's kernels beside FlashAttention-2 (PyTorch's flash backend, and the flash-attn "
        "package if it is installed): in fp16 and bf16, with shared key heads, at a length that no block divides, "
        "beside kernels without features, and the host time of a call. Print required and measured for each target, "
        "and exit with 0 if all are met, 1 if not. Needs a GPU and a few minutes. Rows are on disk as they come: after "
        "an interrupt, --resume measures the missing ones.",
        epilog="Stored rows, without a GPU: python tools/targets.py --of labutils/results/nvidia_h200",
    )
    parser.add_argument(
        "--out",
        type=path,
        default=Path("targets-results"),
        metavar="FOLDER",
        help="folder for the results (default: %(default)s)",
    )
    parser.add_argument("--resume", action="store_true", help="keep the rows in --out and measure the missing ones")
    parser.add_argument("--of", type=path, metavar="FOLDER", help="measure nothing: judge the tables of this folder")
    parser.add_argument(
        "--rounds", type=whole_number, default=3, help="times through all points (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds",
        type=some_seconds,
        default=0.3,
        help="of recorded repeats for a point, all rounds together (default: %(default)s)",
    )
    return parser


def run(words: Sequence[str]) -> int:
    """Measures and judges.

    Returns:
        0 if all targets are met, 1 if not or without a GPU, 2 for bad arguments, 130 after an interrupt.
    """
    arguments = parser().parse_args(words)
    from labutils import benchmark
    from labutils.benchmark import environment
    from labutils.machine import runtime

    if arguments.of is not None:
        if arguments.resume:
            return _complain("--of measures nothing, so there is nothing for --resume to go on with.", 2)
        try:
            table = benchmark.read_results(arguments.of)
            return _judge(arguments.of, table, *_others(arguments.of), write=False)
        except (ValueError, OSError) as error:
            return _complain(error, 2)
    if runtime.device.type != "cuda":
        cause, remedy = environment.why_no_gpu()
        return _complain(f"there is no GPU to time kernels on: {cause}. {remedy}", 1)
    try:
        if arguments.resume:
            _others(arguments.out)  # a damaged table is an error before anything is measured
        recorder = benchmark.Recorder(arguments.out, environment.environment(), resume=arguments.resume)
    except (ValueError, OSError) as error:
        return _complain(error, 2)
    try:
        return _measure(arguments, recorder)
    except OSError as error:
        kept = f"Rows that {arguments.out} holds are whole"
        again = "once it can be written to again, the same command with --resume measures the rest."
        return _complain(f"{error}. {kept}: {again}", 1)


def _complain(error: object, status: int) -> int:
    print(f"targets: {error}", file=sys.stderr)
    return status


def _measure(arguments: Namespace, recorder: Any) -> int:
    import pandas as pd

    import required_speed
    from labutils import benchmark
    from labutils.benchmark import sweeping
    from labutils.benchmark.points import DeviceLost
    from labutils.commands.arguments import INTERRUPTED
    from labutils.machine import files

    points = required_speed.points()
    steps = sweeping.pending(points, recorder.rows, arguments.rounds)
    host_file, features_file = arguments.out / "host.csv", arguments.out / "features.csv"
    print(f"{recorder.environment['gpu']}: {len(points)} points, kept in {arguments.out}")
    with sweeping.progress_bar(steps + 1 + 4 * len(required_speed.HEAD_DIMS)) as bar:  # host times, rows of features
        try:
            # Host time comes first: it is measured apart from the sweep, which would leave a warm machine.
            if not (arguments.resume and host_file.exists()):
                bar.set_description_str("host time of a call")
                times = pd.DataFrame(required_speed.host_times(), columns=required_speed.HOST_COLUMNS)
                files.replace(host_file, times.to_csv(index=False))
            bar.update(1)
            for done in sweeping.measure_rounds(
                points, required_speed.implementations(), recorder.rows, rounds=arguments.rounds,
                seconds_per_point=arguments.seconds, error_seconds=0.0, describe=bar.set_description_str,
            ):  # fmt: skip
                recorder.write()
                bar.update(done)
            if not (arguments.resume and features_file.exists()):
                bar.set_description_str("kernels without features")
                rows = []
                for row in required_speed.feature_costs(rounds=arguments.rounds, seconds=arguments.seconds / 2):
                    rows.append(row)
                    bar.update(1)
                table = pd.DataFrame(rows, columns=required_speed.FEATURE_COLUMNS)
                files.replace(features_file, table.to_csv(index=False))
        except KeyboardInterrupt:
            if recorder.rows:
                recorder.write()
            bar.close()
            print(f"\nInterrupted. What was measured is in {arguments.out}; the same command with --resume measures "
                  "the rest.")  # fmt: skip
            return INTERRUPTED
        except DeviceLost as lost:
            bar.close()
            return _complain(f"{lost}. Rows so far are in {arguments.out}; --resume measures the others.", 1)
    return _judge(arguments.out, benchmark.read_results(arguments.out), *_others(arguments.out), write=True)


def _others(folder: Path) -> tuple[Any, Any]:
    """The tables of kernels without features and of host times. None for a table that the folder lacks.

    Raises:
        ValueError: a table is damaged.
    """
    import required_speed

    features = _read(folder / "features.csv", required_speed.FEATURE_COLUMNS)
    return features, _read(folder / "host.csv", required_speed.HOST_COLUMNS)


def _read(file: Path, columns: Sequence[str]) -> Any:
    import pandas as pd

    if not file.exists():
        return None
    try:
        table = pd.read_csv(file)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read ({error}): delete it, and --resume measures it again.") from error
    if list(table.columns) != list(columns):
        raise ValueError(
            f"{file} is damaged: its columns are {', '.join(table.columns)}, and not {', '.join(columns)}. Delete it, "
            "and --resume measures it again."
        )
    return table


def _judge(folder: Path, table: Any, features: Any, host: Any, *, write: bool) -> int:
    import required_speed
    from labutils.machine import files

    made_by = table.attrs["environment"]
    findings = required_speed.assess(table, features, host)
    print(f"{table.attrs['machine']}, torch {made_by['torch']}, triton {made_by['triton']}, {made_by['date']}\n")
    print(required_speed.as_text(findings))
    if write:
        tables = {"features": features, "host": host}
        found = required_speed.as_json(findings, tables, made_by)
        files.replace(folder / "targets.json", json.dumps(found, indent=1) + "\n")
        print(f"\nWritten to {folder}: attention.csv, features.csv, host.csv, environment.json, targets.json")
    met = required_speed.passed(findings)
    print("\nAll targets are met." if met else "\nNot all targets are met.")
    return 0 if met else 1


if __name__ == "__main__":
    from labutils.commands.arguments import exit_status

    sys.exit(exit_status("targets", run, sys.argv[1:]))
