"""Checks of notebook 04: a profile, traffic, intensity, the roofline, blocks for a GPU that is not there."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch

from labutils.analysis import compulsory_bytes, io_bytes
from labutils.benchmark import attention_flops
from labutils.exercises.core import Call, exercise, integer, pick
from labutils.exercises.judging import describe, expect_number, expect_values, mismatch, same_number
from labutils.machine import chips


@exercise(
    "04",
    "Read a profile",
    10,
    [
        "The total time of an operation includes the operations that it calls: sum self_ms.",
        "share = self time of the rows whose name contains 'attention' / self time of all rows.",
        "The rest takes as long as before: new time = 1 - share + share / factor, speed-up = 1 / new time (Amdahl).",
    ],
)
def attention_share(call: Call, generator: torch.Generator) -> None:
    """(share of attention in the self time, speed-up of the whole if attention is `factor` times as fast)."""
    for factor in (2.0, 4.0, 10.0):
        ms = [float(integer(generator, 5, 90)) / 10 for _ in range(6)]
        rows: list[dict[str, Any]] = [
            {"op": "aten::linear", "self_ms": 0.1, "total_ms": ms[0] + ms[1] + 0.1},
            {"op": "aten::addmm", "self_ms": ms[0], "total_ms": ms[0] + ms[1]},
            {"op": "aten::copy_", "self_ms": ms[1], "total_ms": ms[1]},
            {
                "op": "aten::scaled_dot_product_attention",
                "self_ms": 0.2,
                "total_ms": ms[2] + ms[3] + 0.2,
            },
            {"op": "aten::_flash_attention_forward", "self_ms": ms[2], "total_ms": ms[2]},
            {"op": "aten::_flash_attention_backward", "self_ms": ms[3], "total_ms": ms[3]},
            {"op": "aten::native_layer_norm", "self_ms": ms[4], "total_ms": ms[4]},
            {"op": "aten::gelu", "self_ms": ms[5], "total_ms": ms[5]},
        ]

        def share_by(column, rows=rows, only_first=False):
            times = [row[column] for row in rows if "attention" in row["op"]]
            return (times[0] if only_first else sum(times)) / sum(row[column] for row in rows)

        share = share_by("self_ms")
        got_share, got_speed = expect_values(call(rows, factor), ("the share", "the speed-up"))
        case = f"a table of {len(rows)} operations, self times {sum(row['self_ms'] for row in rows):.1f} ms in all"
        same_number(
            got_share,
            share,
            "the share of attention",
            case,
            {
                "Total times count the same millisecond several times: take self_ms.": share_by("total_ms"),
                "Divided by the sum of the total times, which counts milliseconds several times.": (
                    share * sum(row["self_ms"] for row in rows) / sum(row["total_ms"] for row in rows)
                ),
                "That is one operation of several: each operation with 'attention' in its name counts.": share_by(
                    "self_ms", only_first=True
                ),
                "The operation that calls the kernels counts, too: 'attention' is in its name, and it has self time.": (
                    (ms[2] + ms[3]) / sum(row["self_ms"] for row in rows)
                ),
                "That is in per cent: a share lies between 0 and 1.": 100 * share,
                "That is the number of operations, not their time.": 3 / 8,
                "That is the time in ms: divide by the sum over all operations.": (
                    share * sum(row["self_ms"] for row in rows)
                ),
            },
        )
        right = 1 / (1 - share + share / factor)
        same_number(
            got_speed,
            right,
            "the speed-up of the whole",
            f"a share of {share:.3f} that becomes {factor:g} times as fast",
            {
                "That is for an attention that costs nothing: it still takes share / factor.": 1 / (1 - share),
                "That is how much of the old time is left: the speed-up is the inverse.": 1 / right,
                "The rest of the step does not become faster: only attention does.": factor,
                "Speed-ups cannot be averaged by share: add times, then take the inverse.": 1 - share + share * factor,
                "You made the rest faster, not attention.": 1 / (share + (1 - share) / factor),
            },
        )


BLOCKS = (16, 32, 64, 128)


def _best_blocks(
    seqlen: int, heads: int, head_dim: int, itemsize: int, shared_bytes: int, stages: int, processors: int, *,
    q: int = 1, kv: int = 2,
) -> tuple[int, int] | None:  # fmt: skip
    """The (block_m, block_n) that the exercise asks for, or None if no pair fits.

    Args:
        seqlen, heads, head_dim: N, H and D of one sequence.
        itemsize: bytes of a number.
        shared_bytes: shared memory that a program may use.
        stages: blocks of K, and of V, that are held at once.
        processors: multiprocessors of the GPU.
        q, kv: blocks of Q that are counted, and blocks of K and V for each stage. Other values than 1 and 2 give the
            answer of a student who forgot a tensor.
    """
    fits = [
        (m, n) for m, n in product(BLOCKS, BLOCKS) if (q * m + kv * stages * n) * head_dim * itemsize <= shared_bytes
    ]
    fits = [(m, n) for m, n in fits if heads * math.ceil(seqlen / m) >= processors] or fits
    return min(fits, key=lambda pair: (math.ceil(seqlen / pair[0]), -pair[1], pair[0]), default=None)


@exercise(
    "04",
    "The traffic of FlashAttention-2",
    10,
    [
        "Q is loaded and O stored once; the log-sum-exp is stored once, one float32 for each row.",
        "Each block of Q reads all of K and V: how many blocks are there? Round up.",
    ],
)
def v2_bytes(call: Call, generator: torch.Generator) -> None:
    """Bytes that FlashAttention-2 loads and stores for one head without a mask."""
    for _ in range(3):
        block, head_dim = pick(generator, [32, 64, 128]), pick(generator, [64, 128])
        itemsize = pick(generator, [2, 4])
        blocks = integer(generator, 3, 30)
        n = blocks * block - integer(generator, 1, block - 1)
        right = io_bytes(
            "v2",
            batch=1,
            heads=1,
            seqlen=n,
            head_dim=head_dim,
            block_m=block,
            block_n=64,
            dtype_bytes=itemsize,
            per_tensor=False,
        )
        tensor, lse = n * head_dim * itemsize, 4 * n

        def bytes_with(q=1, k=blocks, v=blocks, o=1, numbers_a_row=1, tensor=tensor, lse=lse):
            return (q + k + v + o) * tensor + numbers_a_row * lse

        same_number(
            call(n, head_dim, block, itemsize),
            right,
            "the number of bytes",
            f"N = {n}, D = {head_dim}, block_m = {block}, {itemsize} bytes a number",
            {
                "The last block of Q is short, but loads all of K and V as well: round up.": bytes_with(
                    k=blocks - 1, v=blocks - 1
                ),
                "N / block_m was not rounded up: a short block of Q loads all of K and V as well.": (
                    2 * tensor * (1 + n / block) + lse
                ),
                "K and V were counted once. Each block of Q loads them again.": bytes_with(k=1, v=1),
                (
                    "That is version 1's way: it loads Q for each block of K. Version 2 loads Q once, and K and V for "
                    "each block of Q."
                ): bytes_with(q=blocks, k=1, v=1),
                "The log-sum-exp is missing: one float32 is stored for each row.": bytes_with(numbers_a_row=0),
                "V is missing: each block of Q loads all of it, as it does K.": bytes_with(v=0),
                "Q or O is missing: Q is loaded once, and O stored once.": bytes_with(o=0),
                "m and l were counted: version 2 stores only the log-sum-exp of a row.": bytes_with(numbers_a_row=2),
                "The log-sum-exp was counted in 16 bits: it is in float32, 4 bytes a row, whatever the inputs are.": (
                    bytes_with() - 2 * n
                ),
                "Rows that do not exist were counted: the last block of Q and of K ends at N.": (
                    2 * blocks * block * head_dim * itemsize * (1 + blocks) + lse
                ),
                "O was counted for each block of K. In version 2 it stays on chip, and is stored once.": bytes_with(
                    o=blocks
                ),
                "That is the number of elements: each element of Q, K, V and O has `itemsize` bytes.": (
                    bytes_with() / itemsize if itemsize == 4 else (bytes_with() - lse) // itemsize + n
                ),
            },
        )


@exercise(
    "04",
    "The best intensity of attention",
    2,
    [
        "Two products of N · N · D multiply-adds each, two operations for each multiply-add: 4 · N² · D FLOPs.",
        "Bytes: Q, K, V and O once each, 4 · N · D · itemsize. Divide, and see what is left.",
    ],
)
def attention_intensity(call: Call, generator: torch.Generator) -> None:
    """FLOPs per byte of one head if only the compulsory bytes move."""
    for _ in range(3):
        # an odd length: the answer, N / itemsize, is not a whole number, so rounding it is a mistake
        n = 2 * integer(generator, 150, 4500) + 1
        head_dim, itemsize = pick(generator, [64, 96, 128]), pick(generator, [2, 4])
        shape: dict[str, Any] = {"batch": 1, "heads": 1, "head_dim": head_dim}
        flops = attention_flops(seqlen_q=n, **shape)
        moved = compulsory_bytes(seqlen=n, dtype_bytes=itemsize, **shape)
        right = flops / moved
        same_number(
            call(n, head_dim, itemsize),
            right,
            "the arithmetic intensity",
            f"N = {n:,}, D = {head_dim}, {itemsize} bytes a number",
            {
                "A multiply-add is two operations, or there are two products: that is half of the FLOPs.": right / 2,
                "That is FLOPs per number. A number has `itemsize` bytes.": right * itemsize,
                "Only Q, K and V were counted: O is missing, which must be written.": right * 4 / 3,
                "That is bytes per FLOP: take the inverse.": 1 / right,
                "Rounded down: the quotient need not be a whole number (/, not //).": float(n // itemsize),
                "Twice as much: two products of N · N · D multiply-adds are 4 · N² · D FLOPs, over 4 tensors.": 2
                * right,
                "S and P were counted as well. The least that must move is Q, K, V and O.": (
                    flops / io_bytes("naive", seqlen=n, dtype_bytes=itemsize, per_tensor=False, **shape)
                ),
                "Only one of Q, K, V and O was counted.": right * 4,
                "D is in the FLOPs and in the bytes, and cancels: N² · D / (N · D).": right * head_dim,
            },
        )


@exercise(
    "04",
    "What bounds a kernel",
    10,
    [
        ("The arithmetic takes flops / (tflops · 10¹²) seconds, and the bytes take bytes / (gb_per_s · 10⁹) seconds."),
        "Both can run at the same time, so the longer time decides. In ms: times 1,000.",
    ],
)
def roofline_time(call: Call, generator: torch.Generator) -> None:
    """(least time in ms, "arithmetic" or "memory") by the roofline."""
    for wanted in ("arithmetic", "memory", "memory", "arithmetic"):
        tflops, bandwidth = float(integer(generator, 20, 900)), float(integer(generator, 300, 4500))
        ridge = tflops * 1e3 / bandwidth
        flops = float(integer(generator, 10**9, 10**12))
        intensity = ridge * (2 + torch.rand((), generator=generator).item()) ** (1 if wanted == "arithmetic" else -1)
        moved = flops / intensity
        arithmetic, memory = flops / tflops / 1e9, moved / bandwidth / 1e6
        right = max(arithmetic, memory)
        ms, bound = expect_values(call(flops, moved, tflops, bandwidth), ("the least time in ms", "what bounds it"))
        case = f"{flops:.3g} FLOPs, {moved:.3g} bytes, {tflops:.0f} TFLOP/s, {bandwidth:.0f} GB/s"
        same_number(
            ms,
            right,
            "the least time in ms",
            case,
            {
                "That is the shorter of the two times: the kernel waits for the longer time.": min(arithmetic, memory),
                "That is the sum of the two times: both run at the same time, so the longer time counts.": (
                    arithmetic + memory
                ),
                "That is in seconds.": right / 1e3,
                "That is in microseconds.": right * 1e3,
                "1 GB/s is 10⁹ bytes per second (2³⁰ was taken).": moved / bandwidth / 2**30 * 1e3,
            },
        )
        if bound != wanted:
            why = "It must be 'arithmetic' or 'memory'."
            if bound in ("arithmetic", "memory"):
                why = (
                    f"Its intensity is {intensity:.4g} FLOP/byte, the ridge is at {ridge:.4g}: "
                    f"{'above it the arithmetic' if wanted == 'arithmetic' else 'below it memory'} decides."
                )
            raise mismatch(f"The time is right, the bound is not, for {case}.", repr(wanted), repr(bound), why)


@exercise(
    "04",
    "Blocks for a GPU that you do not have",
    30,
    [
        (
            "List all pairs with itertools.product, and keep the pairs that fit: they need (block_m + 2 · stages ·"
            " block_n) · D · itemsize bytes, for Q once, and for K and V of each stage."
        ),
        (
            "Of these, keep the pairs whose heads · ⌈N / block_m⌉ programs are at least as many as the multiprocessors,"
            " if there are such pairs."
        ),
        (
            "min(pairs, key=lambda p: (ceil(N / p[0]), -p[1], p[0])): fewest passes over K and V, then the largest"
            " block_n."
        ),
    ],
)
def choose_blocks(call: Call, generator: torch.Generator) -> None:
    """(block_m, block_n) for a launch, from what is known of a GPU."""
    cases = [
        ("RTX 4090", 4096, 16, 128, 2, 3),
        ("A100", 4096, 16, 64, 2, 2),
        ("RTX 4090", 4096, 16, 128, 2, 2),
        ("T4", 2048, 16, 128, 2, 2),
        ("H200", 512, 8, 128, 2, 3),
        ("RTX 4090", 1024, 4, 64, 2, 2),
        ("A100", 100, 2, 64, 2, 2),
        ("T4", 4096, 32, 64, 4, 3),
        ("H200", 8192, 16, 256, 2, 2),
        ("H200", 64 * integer(generator, 9, 40), pick(generator, [8, 12, 25]), 128, 2, pick(generator, [2, 3, 4])),
    ]
    for gpu, n, heads, head_dim, itemsize, stages in cases:
        card = chips.CARDS[gpu]
        kib = chips.GPUS[card.capability].shared_kib
        arguments = (n, heads, head_dim, itemsize, kib * 1024, stages, card.processors)
        got = expect_values(call(*arguments), ("block_m", "block_n"))
        got = tuple(expect_number(value, f"block_{axis}") for value, axis in zip(got, "mn", strict=True))
        right = _best_blocks(*arguments)
        if got == right:
            continue
        assert right is not None  # blocks of 16 fit all of these
        case = (
            f"a {gpu} ({kib} KiB, {card.processors} multiprocessors), N = {n}, H = {heads}, D = {head_dim},"
            f" {itemsize} bytes, {stages} stages"
        )
        why = _why_not(got, right, arguments)
        raise mismatch(f"The blocks are not right for {case}.", str(right), str(got), why)


def _why_not(got: tuple, right: tuple[int, int], arguments: tuple) -> str:
    """Which rule of the exercise the blocks `got` break."""
    n, heads, head_dim, itemsize, shared, stages, processors = arguments
    if got == right[::-1]:
        return "The two are exchanged: block_m comes first."
    if any(value not in BLOCKS for value in got):
        return f"Both must be among {', '.join(map(str, BLOCKS))}; it returned {describe(got)}."
    need = (got[0] + 2 * stages * got[1]) * head_dim * itemsize
    if need > shared:
        known = {
            "V is missing in your sum: a stage holds a block of K and one of V.": _best_blocks(*arguments, kv=1),
            "The stages are missing in your sum: each holds a block of K and one of V.": _best_blocks(
                n, heads, head_dim, itemsize, shared, 1, processors
            ),
            "The block of Q is missing in your sum.": _best_blocks(*arguments, q=0),
            "The size of a number is missing in your sum.": _best_blocks(
                n, heads, head_dim, 1, shared, stages, processors
            ),
        }
        why = next((f" {text}" for text, pair in known.items() if pair == got), "")
        return f"These tiles take {need:,} bytes of shared memory, and there are {shared:,}.{why}"
    programs, filled = heads * math.ceil(n / got[0]), heads * math.ceil(n / right[0])
    if programs < processors <= filled:
        return f"{programs} programs leave some of the {processors} multiprocessors idle; {filled} would fill them."
    if math.ceil(n / got[0]) > math.ceil(n / right[0]):
        return (
            f"K and V are loaded {math.ceil(n / got[0])} times, once for each block of Q, but {math.ceil(n / right[0])}"
            " times are enough: take a larger block_m."
        )
    if got[1] < right[1]:
        return "A larger block_n fits as well, and the loop over K and V takes fewer steps."
    return "With as many blocks of Q, the smaller block_m masks fewer rows that do not exist."
