"""`python -m labutils tune`: times launch configurations on this GPU, and keeps those that beat the shipped ones."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from labutils.commands.arguments import INTERRUPTED, argument_type, listed, new_parser, some_seconds, whole_number
from labutils.machine import chips

if TYPE_CHECKING:
    from labutils.attention.kernels.launch_config import Place

KERNELS = ("v1", "forward", "dkdv", "dq", "decode")
HEAD_DIMS = (64, 128, 256)
DTYPES = {"16-bit": "16 bit", "float32": "float32"}


@argument_type
def _capability(text: str) -> tuple[int, int]:
    """A type of arguments: a compute capability. Raises argparse.ArgumentTypeError for anything else."""
    major, dot, minor = text.partition(".")
    if not (dot and major.isdecimal() and minor.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r}: give a compute capability such as 8.6")
    return int(major), int(minor)


def parser() -> ArgumentParser:
    """The parser of the command's arguments."""
    parser = new_parser(
        "python -m labutils tune",
        "Time launch configurations (block sizes, warps, pipeline stages) of each kernel on this GPU. Candidates that "
        "do not fit or spill registers are sorted out by compiling them. Each other candidate is checked against the "
        "reference before it is timed. If it is faster than the shipped configuration by more than the spread of the "
        "measurement, it is written to a table outside of this repository. labutils uses that table from then on, on "
        "this GPU with this version of Triton. There are some hundreds of candidates. Each result is on disk as it "
        "comes, and after an interrupt --resume measures the rest.",
        epilog="The table is ~/.local/state/labutils/launch_table.json, or in XDG_STATE_HOME, or the file that "
        "LABUTILS_LAUNCH_TABLE names. LABUTILS_LAUNCH_TABLE=none uses only the shipped configurations. To tune only a "
        "part: python -m labutils tune --kernels forward --head-dims 64,128",
    )
    what = parser.add_argument_group("what is tuned")
    what.add_argument(
        "--kernels",
        type=listed(str, KERNELS),
        metavar="K,K",
        default=list(KERNELS),
        help=f"of {', '.join(KERNELS)} (default: all)",
    )
    what.add_argument(
        "--head-dims",
        type=listed(int, HEAD_DIMS),
        metavar="D,D",
        default=list(HEAD_DIMS),
        help="of 64, 128, 256; each serves all up to it (default: all)",
    )
    what.add_argument(
        "--dtypes",
        type=listed(str, list(DTYPES)),
        metavar="T,T",
        default=["16-bit"],
        help=f"of {', '.join(DTYPES)} (default: 16-bit, which is float16 and bfloat16)",
    )
    how = parser.add_argument_group("how long")
    how.add_argument(
        "--rounds", type=whole_number, default=3, help="for candidates near the best (default: %(default)s)"
    )
    how.add_argument(
        "--seconds",
        type=some_seconds,
        default=0.1,
        help="of recorded repeats for a candidate at each of two sizes, in a round (default: %(default)s)",
    )
    how.add_argument(
        "--processes", type=whole_number, help="how many compile at once (default: one for two CPU cores, at most 8)"
    )
    how.add_argument("--resume", action="store_true", help="continue an interrupted run")
    instead = parser.add_argument_group("instead of tuning").add_mutually_exclusive_group()
    instead.add_argument(
        "--show", action="store_true", help="print the configurations in force, and whether each is shipped or tuned"
    )
    instead.add_argument(
        "--reset", action="store_true", help="remove the table, and go back to the shipped configurations"
    )
    instead.add_argument(
        "--compile-only",
        action="store_true",
        help="list the candidates with registers, spills, shared memory and occupancy; needs no GPU",
    )
    parser.add_argument(
        "--capability",
        type=_capability,
        metavar="X.Y",
        help="for --compile-only and --show: of this compute capability, such as 8.6, instead of the GPU here",
    )
    return parser


def run(words: Sequence[str]) -> int:
    """Tunes. Returns 130 after an interrupt, 1 if there is no GPU or nothing runs, 2 for bad arguments."""
    arguments = parser().parse_args(words)
    if arguments.capability is not None and not (arguments.show or arguments.compile_only):
        return _complain("--capability is for --compile-only and --show: only the GPU here can be timed.", 2)
    from labutils.attention.kernels import tuned_table
    from labutils.benchmark import environment
    from labutils.machine import files, runtime

    capability = arguments.capability or runtime.capability
    if capability is not None and capability not in chips.GPUS:
        known = ", ".join(map(chips.dotted, chips.GPUS))
        return _complain(f"of compute capability {chips.dotted(capability)} nothing is known: {known}.", 2)
    try:
        file = tuned_table.path()
    except RuntimeError as error:
        return _complain(error, 2)
    if file is None and not (arguments.compile_only or arguments.show or arguments.reset):
        return _complain(f"{tuned_table.VARIABLE}=none says that no table is used: unset it, or name a file.", 2)
    if capability is None and not (arguments.show or arguments.reset):
        cause, remedy = environment.why_no_gpu()
        hint = " The compiler needs none: --compile-only --capability 8.6." if arguments.compile_only else ""
        return _complain(f"there is no GPU to time kernels on: {cause}. {remedy}{hint}", 1)
    try:
        if arguments.reset:
            return _reset(file)
        if arguments.show:
            return _show(arguments, file, capability)
        assert capability is not None  # else it was said above
        places = _places(arguments, capability)
        if arguments.compile_only:
            return _list(places, capability, _processes(arguments))
        assert file is not None  # this, too
        if not file.exists():  # else the table is read, and then replaced
            files.check_writable(file.parent, f"{file.parent}, the folder of the table,")
        with files.held(file.with_name(f".{file.name}.lock"), str(file)):
            return _tune(arguments, places, file, capability)
    except files.InUse as error:
        return _complain(error, 2)
    except (RuntimeError, ValueError, OSError) as error:  # OSError: the table cannot be written
        return _complain(error, 1)


def _complain(error: object, status: int) -> int:
    print(f"labutils tune: {error}", file=sys.stderr)
    return status


def _places(arguments: Namespace, capability: tuple[int, int]) -> list[Place]:
    """The places that the arguments ask for, without those that do not fit the GPU."""
    from labutils.attention.tuning import candidates

    dtypes = [DTYPES[name] for name in arguments.dtypes]
    return candidates.places(arguments.kernels, arguments.head_dims, dtypes, capability)


def _processes(arguments: Namespace) -> int:
    import os

    return arguments.processes or max(1, min(8, len(os.sched_getaffinity(0)) // 2))


# ------------------------------------------------------------------------------------------------------------
# Tuning
# ------------------------------------------------------------------------------------------------------------


def _tune(arguments: Namespace, places: Sequence[Place], file: Path, capability: tuple[int, int]) -> int:
    from labutils.attention.kernels import tuned_table
    from labutils.attention.tuning import candidates, search
    from labutils.benchmark import environment, launches, sweeping

    gpu = tuned_table.TunedFor.here()
    try:
        tables = tuned_table.read(file)
    except FileNotFoundError:
        tables = {}
    made_by = environment.environment(launch_table=False).as_dict()
    tuned = tables.setdefault(gpu, tuned_table.Tuned(environment=made_by, finished=True))
    if arguments.resume:
        for stored in tuned.measured:
            _place(stored, file)
        if changes := environment.differences(tuned.environment, made_by):
            return _complain(
                f"{file} was begun in another environment ({'; '.join(changes)}), and times of two cannot be compared: "
                "go back to that one, or remove the table with --reset.",
                2,
            )
    elif not tuned.finished:
        return _complain(
            f"{file} holds what an interrupted run has measured on {gpu}: go on with --resume, or remove it with "
            "--reset.",
            2,
        )
    else:
        tuned.measured = [stored for stored in tuned.measured if _place(stored, file) not in places]
        tuned.environment = made_by
    print(f"{gpu}: {len(places)} entries of the launch table, kept in {file}")
    steps = sum(len(candidates.candidates(place, capability)) for place in places)
    processes = _processes(arguments)
    with sweeping.progress_bar(steps) as bar:
        try:
            search.tune(
                places, tuned,
                lambda place: launches.OnGpu(place, seconds=arguments.seconds),
                lambda place: candidates.compile_candidates(place, capability, processes=processes),
                rounds=arguments.rounds, save=lambda: tuned_table.write(file, tables),
                describe=bar.set_description_str, advance=bar.update,
                decided=lambda decision: bar.write(f"{decision.best.place}: {decision}", file=sys.stdout),
            )  # fmt: skip
        except KeyboardInterrupt:
            tuned_table.write(file, tables)
            bar.close()
            print(f"Interrupted. What was measured is in {file}; the same command with --resume measures the rest.")
            return INTERRUPTED
    own = sum(place in tuned.entries for place in places)
    print(f"{own} of {len(places)} configurations are faster than the shipped ones by more than the spread, and are "
          "used from now on.")  # fmt: skip
    return 0


def _place(stored: Any, file: Path) -> Place:
    """The place of a row that the table has under "measured". Raises RuntimeError if the row is damaged."""
    from labutils.attention.tuning import search

    try:
        return search.Row.of(stored).place
    except (KeyError, TypeError, ValueError) as error:
        raise RuntimeError(
            f'{file} has a damaged row under "measured" ({type(error).__name__}: {error}): remove the table with '
            "`python -m labutils tune --reset`."
        ) from error


# ------------------------------------------------------------------------------------------------------------
# Instead of tuning
# ------------------------------------------------------------------------------------------------------------


def _reset(file: Path | None) -> int:
    """Removes the table. Sets a damaged one aside, and refuses a file that is no table."""
    from labutils.attention.kernels import tuned_table
    from labutils.machine import files

    if file is None or not file.exists():
        print("There is no table: the shipped launch configurations are in force.")
        return 0
    state = tuned_table.state(file)
    if state == "foreign":
        return _complain(
            f"{file} is no table that `python -m labutils tune` wrote, so --reset leaves it as it is. Name another "
            f"file with {tuned_table.VARIABLE}, or move that file away.",
            2,
        )
    if state == "damaged":
        what = f"{file} was damaged, and is now {files.set_aside(file).name}"
    else:
        file.unlink()
        what = f"Removed {file}"
    print(f"{what}: the shipped launch configurations are in force.")
    return 0


def _show(arguments: Namespace, file: Path | None, capability: tuple[int, int] | None) -> int:
    from labutils.attention.kernels import tuned_table
    from labutils.attention.tuning import candidates

    tables = {}
    if file is not None and file.exists():
        tables = tuned_table.read(file)
        for gpu, tuned in tables.items():
            state = "" if tuned.finished else ", interrupted: --resume measures the rest"
            print(f"{file}: {len(tuned.entries)} entries for {gpu}, {tuned.environment.get('date', 'no date')}{state}")
    else:
        print("No table of the user's own: every entry is the shipped one.")
    if capability is None:
        print("Without a GPU kernels run in Triton's interpreter, with blocks of up to 128 x 128. --capability 8.6 "
              "shows the shipped entries of such a GPU.")  # fmt: skip
        return 0
    index = 0 if arguments.capability is None else None
    shipped_for = f"compute capability {chips.dotted(capability)}"
    print(f"\nIn force for {tuned_table.TunedFor.here() if index == 0 else shipped_for}:")
    for place in candidates.places(capability=capability):
        config = tuned_table.in_force(place, capability, index)
        print(f"  {place!s:<38}{_config(config):<44}{'tuned' if config.source else 'shipped'}")
    return 0


def _config(config: Any) -> str:
    loads = ", descriptors" if config.tma else ""
    return f"{config.block_m} x {config.block_n}, {config.num_warps} warps, {config.num_stages} stages{loads}"


def _list(places: Sequence[Place], capability: tuple[int, int], processes: int) -> int:
    """Prints the candidates of each place with what the compiler says. Marks the shipped entry and the best."""
    from labutils.attention.kernels import tuned_table
    from labutils.attention.tuning import candidates
    from labutils.benchmark import sweeping

    every = {place: candidates.candidates(place, capability) for place in places}
    with sweeping.progress_bar(sum(map(len, every.values()))) as bar:
        for place, configs in every.items():
            bar.set_description_str(f"compiling {place}")
            found = candidates.compile_candidates(place, capability, configs, processes=processes, done=bar.update)
            bar.write(_block(place, capability, found), file=sys.stdout)
    print("* the shipped entry. > the best by only these figures: see labutils.attention.tuning.candidates."
          f" Nothing was timed; {tuned_table.VARIABLE} was not read.")  # fmt: skip
    return 0


def _block(place: Place, capability: tuple[int, int], found: Sequence[Any]) -> str:
    from labutils.attention.kernels import launch_table
    from labutils.attention.tuning import candidates

    shipped, best = launch_table.shipped(place, capability), candidates.best_by_resources(found)
    gpu = chips.GPUS[capability]
    lines = [
        f"{place}, compute capability {chips.dotted(capability)} ({gpu.names})",
        f"    {'blocks, warps, stages':<42}{'registers':>10}{'spilled':>9}{'KiB':>7}{'blocks/SM':>11}{'occupancy':>11}",
    ]
    for one in found:
        cost = one.resources
        marks = ("*" if one.config == shipped else " ") + (">" if one.config == best else " ")
        lines.append(
            f" {marks} {_config(one.config):<42}{cost.registers:>10}{cost.spilled_bytes:>9}"
            f"{cost.shared_bytes / 1024:>7.0f}{cost.blocks_per_sm:>11}{cost.occupancy:>11.0%}  {one.reason}".rstrip()
        )
    return "\n".join(lines) + "\n"
