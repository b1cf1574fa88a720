"""Draws the README's figure from stored results."""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser

LABUTILS_COMMAND_LINE = True  # `import labutils` then imports no torch, and --help is quick
TABLES = ("attention", "ladder")
KEY = "Source"  # a keyword that PNG knows
NAME = "overview.png"
HEAD_DIM = 128


def parser() -> ArgumentParser:
    """The parser of the arguments."""
    from labutils.commands.arguments import new_parser, path

    parser = new_parser(
        "python tools/figure.py",
        "Draw, from the stored results of a GPU, the throughput of attention over the sequence length and the longest "
        "contexts that train within 16 GB. The file says which tables it was drawn from.",
    )
    parser.add_argument(
        "--out",
        type=path,
        metavar="FILE",
        help=f"the PNG to write (default: {NAME} beside the tables that it is drawn from)",
    )
    parser.add_argument("--gpu", default="nvidia_h200", help="a folder of stored results (default: %(default)s)")
    parser.add_argument(
        "--head-dim", type=int, default=HEAD_DIM, metavar="D", help="head dimension (default: %(default)s)"
    )
    parser.add_argument("--full", action="store_true", help="attention without a mask (default: causal)")
    return parser


def run(words: Sequence[str]) -> int:
    """Writes the figure. Returns 2 if the tables or the folder are missing."""
    arguments = parser().parse_args(words)
    import overview
    from labutils import benchmark
    from labutils.machine import files

    try:
        attention = benchmark.reference_results(arguments.gpu)
        ladder = benchmark.reference_results(arguments.gpu, "ladder")
        kept = (attention["head_dim"] == arguments.head_dim) & (attention["causal"] != arguments.full)
        if not kept.any():
            known = ", ".join(map(str, sorted(set(attention["head_dim"]))))
            mask = "full" if arguments.full else "causal"
            raise ValueError(
                f"no stored rows with head dimension {arguments.head_dim}, {mask}; the dimensions stored are {known}."
            )
        figure = overview.plot_overview(attention[kept], ladder)
        drawn_from = source(arguments.gpu, head_dim=arguments.head_dim, causal=not arguments.full)
        metadata = {KEY: drawn_from, "Software": None}
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=150, metadata=metadata)
        out = arguments.out or benchmark.RESULTS / arguments.gpu / NAME
        files.replace(out, drawn.getvalue())
    except (OSError, ValueError) as error:
        print(f"figure: {error}", file=sys.stderr)
        return 2
    print(f"Written: {out}")
    return 0


def source(gpu: str, *, head_dim: int = HEAD_DIM, causal: bool = True) -> str:
    """Names what a figure was drawn from: the tables, by a hash of their bytes, and which rows.

    Args:
        gpu: a folder under labutils/results, with all `TABLES`.
        head_dim, causal: D and mask of the rows.

    Raises:
        OSError: a table is missing.
    """
    from labutils import benchmark

    content = b"".join((benchmark.RESULTS / gpu / f"{table}.csv").read_bytes() for table in TABLES)
    rows = f"D {head_dim}, {'causal' if causal else 'full'}"
    return f"{gpu}: {', '.join(TABLES)}: {hashlib.sha256(content).hexdigest()[:16]}: {rows}"


if __name__ == "__main__":
    from labutils.commands.arguments import exit_status

    sys.exit(exit_status("figure", run, sys.argv[1:]))
