"""Checks of notebook 02: a masked load, programs, tiles, heads, a window, the backward pass, bugs, GPT-2."""

from __future__ import annotations

import math
from typing import Any

import torch

from labutils.attention.bugs import tiles_without
from labutils.attention.reference import exact_attention, naive_attention, visible_mask
from labutils.exercises.core import Call, Wrong, draw, exercise, integer, pick
from labutils.exercises.judging import (
    dtype_name,
    expect_number,
    expect_tensor,
    indices,
    mismatch,
    same_number,
    same_tensor,
)
from labutils.machine import chips, runtime


@exercise(
    "02",
    "A masked load",
    10,
    [
        (
            "As in softmax_kernel: offsets 0 to BLOCK - 1, a mask that says which columns exist, and one program for"
            " each row."
        ),
        "Columns that do not exist must not change the maximum or the sum: load them as -inf, and exp makes them 0.",
        "tl.store(y_ptr + row, m + tl.log(tl.sum(tl.exp(x - m), axis=0))), with m = tl.max(x, axis=0).",
    ],
    parts=["row_lse_kernel"],
)
def row_lse(call: Call, generator: torch.Generator) -> None:
    """log(sum(exp(x))) of each row, by a Triton kernel."""
    wide = draw(generator, 5, 40)
    cases = {
        "16 columns, a whole block": draw(generator, 5, 16),
        "11 columns in a block of 16": draw(generator, 6, 11) - 3,
        "11 columns of a matrix with 40, rows 40 apart": wide[:, 7:18],
        "large numbers": draw(generator, 4, 13) * 20 + 300,
        "one number far above the others": draw(generator, 3, 13) - 150.0 * (1 - torch.eye(3, 13)),
    }
    for case, x in cases.items():
        block = 1 << (x.shape[1] - 1).bit_length()
        x_max, x_mean, rest = x.amax(dim=-1), x.mean(dim=-1), block - x.shape[1]
        zeros = torch.cat([x, torch.zeros(len(x), rest)], dim=-1)
        m_zero = zeros.amax(dim=-1)
        mistakes = {
            "The maximum is missing: the result is m + log(sum).": ((x - x_max[:, None]).exp().sum(dim=-1).log()),
            "That is the maximum of each row. The log-sum-exp is m + log(sum(exp(x - m))).": x_max,
            "e^x overflowed: subtract the row's maximum before tl.exp.": x.exp().sum(dim=-1).log(),
            "That is the sum of the row's exponentials: the logarithm is missing.": x.exp().sum(dim=-1),
            "The mean was subtracted, not the maximum: a number far above the mean still overflows.": (
                x_mean + (x - x_mean[:, None]).exp().sum(dim=-1).log()
            ),
            "That is the logarithm of the mean: the exponentials are added, not averaged.": (
                x.logsumexp(dim=-1) - math.log(x.shape[1])
            ),
            "tl.log2 gives a logarithm to base 2; the natural one is tl.log.": (
                x_max + (x - x_max[:, None]).exp().sum(dim=-1).log2()
            ),
        }
        if rest:
            mistakes["Columns that do not exist were read as 0, and e^0 was added: `other` must be -inf."] = (
                zeros.logsumexp(-1)
            )
            mistakes[
                "Columns that do not exist were read as 0 for the maximum and the sum: `other` must be -inf, not 0."
            ] = m_zero + (zeros - m_zero[:, None]).exp().sum(dim=-1).log()
        got = expect_tensor(call(x), (len(x),), "The result")
        unmasked = _unmasked(x, block)
        if unmasked is not None:
            mistakes[
                "Neighbours were read as well: the load needs mask=offs < n_columns (and other=-inf for the rest)."
            ] = unmasked
        contiguous = _as_if_contiguous(x)
        if contiguous is not None:
            mistakes["Rows were taken to be n_columns apart. From one row to the next it is row_stride elements."] = (
                contiguous
            )
        same_tensor(
            got,
            x.double().logsumexp(dim=-1),
            x.logsumexp(dim=-1),
            name="log-sum-exp",
            requirement=f"The log-sum-exp is not right for {case}.",
            place=indices("row"),
            mistakes=mistakes,
        )


def _memory(x: torch.Tensor) -> torch.Tensor:
    """The memory of x on the device, from its first element on: what is not an element of x is NaN."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    memory = torch.full((extent + 64,), math.nan)
    torch.as_strided(memory, x.shape, x.stride()).copy_(x)
    return memory


def _unmasked(x: torch.Tensor, block: int) -> torch.Tensor | None:
    """The result of a load without a mask, or None if it is the same as with one."""
    if block == x.shape[1]:
        return None
    memory = _memory(x)
    rows = torch.stack([memory[i * x.stride(0) : i * x.stride(0) + block] for i in range(len(x))])
    # tl.max and NumPy's maximum may or may not keep a NaN; either way the row's result is NaN
    return rows.logsumexp(dim=-1)


def _as_if_contiguous(x: torch.Tensor) -> torch.Tensor | None:
    """The result if rows are taken to be n_columns apart, or None if they are."""
    if x.is_contiguous():
        return None
    memory, n = _memory(x), x.shape[1]
    return torch.stack([memory[i * n : (i + 1) * n].logsumexp(dim=0) for i in range(len(x))])


@exercise(
    "02",
    "How many programs",
    2,
    [
        "One program works on one block of rows, of one head of one sequence.",
        "N / block_m, rounded up: the last block may be short. triton.cdiv(a, b) rounds up, as does -(-a // b).",
    ],
)
def program_count(call: Call, generator: torch.Generator) -> None:
    """The number of programs that a launch of the v2 kernel starts."""
    for _ in range(3):
        batch, heads, block = pick(generator, [3, 5]), pick(generator, [7, 11, 13]), pick(generator, [32, 64, 128])
        blocks = integer(generator, 3, 40)
        n = blocks * block - integer(generator, 1, block - 1)
        right = batch * heads * blocks
        same_number(
            call(batch, heads, n, block),
            right,
            "the number of programs",
            f"B = {batch}, H = {heads}, N = {n}, block_m = {block}",
            {
                "The last rows have no program: N is not a multiple of block_m, so round up.": (
                    batch * heads * (blocks - 1)
                ),
                "N / block_m is not rounded: there are only whole programs, so round up.": batch * heads * n / block,
                "That is version 1: one program for a whole head. Version 2 has one for each block of rows.": (
                    batch * heads
                ),
                "The heads are missing: each head has its own programs.": batch * blocks,
                "The batch is missing: each sequence has its own programs.": heads * blocks,
                "That is the number of blocks of one head. Batch and heads are missing.": blocks,
                "That is one program for each row: a program works on block_m rows.": batch * heads * n,
                "Round up for each head: its last block holds no rows of the next head.": -(
                    -batch * heads * n // block
                ),
                "Divided after the product and not rounded up: each head has a last, short block.": (
                    batch * heads * n // block
                ),
                "That is one program for each tile. A program walks along its row of tiles.": (
                    batch * heads * blocks**2
                ),
                (
                    "One too many for each head: -(-N // block_m) rounds up, N // block_m + 1 does so only if there "
                    "is a rest."
                ): (batch * heads * (blocks + 1)),
            },
        )
    batch, heads, block = 2, 3, 64
    same_number(
        call(batch, heads, 4 * block, block),
        4 * batch * heads,
        "the number of programs",
        f"B = {batch}, H = {heads}, N = {4 * block}, block_m = {block}",
        {
            "N is a multiple of block_m here, so no rest makes a further block: round up, do not add 1.": (
                5 * batch * heads
            )
        },
    )


KINDS = ("skipped", "masked", "plain")


@exercise(
    "02",
    "Which tiles need a mask",
    10,
    [
        (
            "Row i may see the columns j <= i + n_k - n_q. The tile has the rows start_m to "
            "min(start_m + block_m, n_q) - 1, and the columns start_n to min(start_n + block_n, n_k) - 1."
        ),
        "Nothing is visible if even the last row cannot see the first column: start_n > last row + n_k - n_q.",
        (
            "Everything is visible if the first row sees the last column. And a tile that reaches beyond n_k needs a"
            " mask for its tail."
        ),
    ],
)
def tile_kind(call: Call, generator: torch.Generator) -> None:
    """ "skipped", "masked" or "plain", for the tile at (start_m, start_n) of a causal mask."""
    shapes = [
        (96, 96, 16, 16),
        (96, 96, 32, 16),
        (96, 96, 16, 32),
        (90, 90, 32, 32),
        (40, 100, 16, 32),
        (100, 40, 16, 16),
        (97, 90, 16, 32),
        (95, 96, 16, 16),  # the last row of some tiles just sees the first column
        (97, 96, 16, 16),  # the first row of some tiles just sees the last column
    ]
    for n_q, n_k, block_m, block_n in shapes:
        visible = visible_mask(n_q, n_k, causal=True)
        shift = n_k - n_q
        for start_m in range(0, n_q, block_m):
            for start_n in range(0, n_k, block_n):
                part = visible[start_m : start_m + block_m, start_n : start_n + block_n]
                tail = start_n + block_n > n_k
                right = "skipped" if not part.any() else "masked" if tail or not part.all() else "plain"
                got = call(start_m, block_m, start_n, block_n, n_q, n_k)
                if got == right:
                    continue
                case = (
                    f"the tile of rows {start_m} to {min(start_m + block_m, n_q) - 1} and columns {start_n} to "
                    f"{start_n + block_n - 1} of N_q = {n_q}, N_k = {n_k}"
                )
                if got not in KINDS:
                    raise Wrong(f"It must return one of {', '.join(map(repr, KINDS))}; for {case} it returned {got!r}.")
                last_row, last_column = min(start_m + block_m, n_q) - 1, start_n + block_n - 1
                why = ""
                if right == "masked" and got == "skipped" and start_n == last_row + shift:
                    why = (
                        "Its last row just sees its first column, which is on the diagonal: skip the tile only if"
                        " start_n is larger."
                    )
                elif right == "plain" and got == "masked" and last_column == start_m + shift:
                    why = "Its first row just sees its last column: plain includes the diagonal (<=, not <)."
                elif shift and got == _kind(start_m, last_row, start_n, last_column, 0, n_k):
                    why = "The diagonal was taken from the top left: row i may see columns up to i + n_k - n_q."
                elif right == "masked" and got == "skipped":
                    why = "Skip a tile only if even its last row sees nothing; you asked about an earlier row."
                elif right == "masked" and tail and got == "plain" and part.all():
                    why = "All elements that exist are visible, but it reaches beyond n_k: the tail needs a mask."
                elif right == "masked" and got == "plain":
                    why = "Plain means that each row sees each column: even the first row must see the last column."
                elif right == "plain" and got == "masked":
                    why = "Every row sees every column: a mask here costs time and changes nothing."
                elif right == "skipped" and got == "masked":
                    why = "Not one of its elements is visible: the loop of the kernel must not visit it."
                raise mismatch(f"The kind is not right for {case}.", repr(right), repr(got), why)


def _kind(first_row: int, last_row: int, first_column: int, last_column: int, shift: int, n_k: int) -> str:
    """The kind of a tile if row i sees the columns up to i + shift."""
    if first_column > last_row + shift:
        return "skipped"
    return "plain" if last_column <= first_row + shift and last_column < n_k else "masked"


@exercise(
    "02",
    "Grouped heads",
    5,
    [
        "With 8 query heads and 2 key heads, heads 0 to 3 share the first key head, and 4 to 7 the second.",
        "A group of heads // kv_heads query heads shares one key head. Divide by the size of the group, with //.",
    ],
)
def kv_head(call: Call, generator: torch.Generator) -> None:
    """The head of K and V that a query head reads, in grouped-query attention."""
    for heads, kv_heads in ((12, 3), (8, 4), (10, 2), (6, 1), (5, 5)):
        got = [expect_number(call(head, heads, kv_heads), "the index of a head of K and V") for head in range(heads)]
        if not all(math.isfinite(value) for value in got):
            raise Wrong(f"The index of a head must be an integer; for query head 0 of {heads} it returned {got[0]}.")
        right = [head // (heads // kv_heads) for head in range(heads)]
        if got == right:
            continue
        known = {
            (
                "head % kv_heads deals the heads out in turn. Neighbouring query heads share one, as in flash-attn and "
                "transformers."
            ): [head % kv_heads for head in range(heads)],
            "That is the query's own head: K and V have fewer heads, and a group of query heads shares each.": list(
                range(heads)
            ),
            "Divide by the size of a group, heads // kv_heads, not by the number of key heads.": [
                head // kv_heads for head in range(heads)
            ],
            "That is the query head's place within its group: the number of the group was asked for.": [
                head % (heads // kv_heads) for head in range(heads)
            ],
        }
        why = next((text for text, values in known.items() if got == values), "")
        if any(value != int(value) for value in got):
            why = "An index is an integer: divide with //."
        head = next(i for i in range(heads) if got[i] != right[i])
        case = f"query head {head} of {heads}, with {kv_heads} of K and V"
        raise mismatch(f"The head is not right for {case}.", str(right[head]), f"{got[head]:g}", why)


@exercise(
    "02",
    "A kernel with a sliding window",
    30,
    [
        (
            "Start from flash_v2_kernel. Its loop runs over the columns from 0 to `last`. With a window it begins at"
            " start_m - window, rounded down to a multiple of BLOCK_N, and not below 0."
        ),
        "An element is visible if it exists, is not above the diagonal, and has offs_n >= offs_m - window.",
        (
            "In the first block of the window some rows see nothing: their m_new is -inf, and -inf - (-inf) is NaN."
            " Let such rows subtract 0 instead of m_new: safe = tl.where(m_new == float('-inf'), 0.0, m_new)."
        ),
    ],
    parts=["window_kernel"],
)
def window_attention(call: Call, generator: torch.Generator) -> None:
    """Causal attention in which a query sees itself and the `window` keys before it, by a Triton kernel."""
    low = torch.float16 if runtime.capability is None or runtime.capability < chips.BFLOAT16 else runtime.dtype
    cases = [
        (1, 64, 1, 64, torch.float32),
        (1, 60, 2, 1000, torch.float32),
        (2, 75, 2, 20, torch.float32),
        (1, 130, 1, 7, torch.float32),
        (1, 100, 1, 0, torch.float32),
        (1, 150, 2, 40, low),
    ]
    for batch, n, heads, window, dtype in cases:
        q, k, v = (draw(generator, batch, n, heads, 32, dtype=dtype) for _ in range(3))
        q = 2 * q
        options: dict[str, Any] = {"causal": True, "window_size": (window, 0)}
        out = expect_tensor(call(q, k, v, window), q.shape, "out", dtype)

        def variant(left=window, right=0, scale=32**-0.5, causal=True, q=q, k=k, v=v):
            visible = {"causal": causal, "window_size": (left, right)}
            return naive_attention(q.float(), k.float(), v.float(), softmax_scale=scale, **visible)

        mistakes = {
            "The window is not applied: a row sees all columns up to its own. Mask offs_n < offs_m - window, too.": (
                variant(left=-1)
            ),
            "The causal mask is missing: rows see columns to the right of the diagonal.": variant(
                right=-1, causal=False
            ),
            "The window is one column too narrow: offs_m - window itself is visible (>=).": (
                variant(left=window - 1) if window else torch.full(v.shape, math.inf)
            ),
            "The window is one column too wide: offs_m - window - 1 is not visible.": variant(left=window + 1),
            "The diagonal itself is masked: a row sees its own column (<=).": _strict(q, k, v, window),
            "The scale 1 / √D is missing.": variant(scale=1.0),
            "The scores were multiplied by the scale twice.": variant(scale=1 / 32),
            "log2(e) is missing from the scale: tl.exp2 computes 2^x.": variant(scale=32**-0.5 * math.log(2)),
            "log2(e) is in the scale, but tl.exp computes e^x: use tl.exp2, or leave log2(e) out.": variant(
                scale=32**-0.5 / math.log(2)
            ),
        }
        for block_n in (16, 32, 64, 128):
            mistakes |= _not_rescaled(q, k, v, window, block_n)
        exact = exact_attention(q, k, v, **options)
        case = f"B = {batch}, N = {n}, H = {heads}, window = {window}, {dtype_name(dtype)}"
        same_tensor(
            out,
            exact,
            naive_attention(q, k, v, **options),
            name="out",
            requirement=f"The output is not right for {case}.",
            place=indices("sequence", "row", "head", "dimension"),
            mistakes=mistakes,
            if_nan=(
                "-inf - (-inf) is NaN: in the first block of its window a row may see nothing yet, and its m_new is"
                " -inf. Subtract 0 there, not m_new."
            ),
        )


def _strict(q, k, v, window) -> torch.Tensor:
    """The output (B, N, H, D) if a row does not see itself."""
    n = q.shape[1]
    visible = visible_mask(n, n, causal=True, window_size=(window, 0)) & ~torch.eye(n, dtype=torch.bool)
    q, k, v = (t.float().transpose(1, 2) for t in (q, k, v))
    s = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible, -math.inf)
    return (s.softmax(dim=-1).nan_to_num(nan=0.0) @ v).transpose(1, 2)


def _not_rescaled(q, k, v, window, block_n) -> dict[str, torch.Tensor]:
    """Message -> the output (B, N, H, D) if o or l is not rescaled, with blocks of `block_n` columns."""
    n = q.shape[1]
    visible = visible_mask(n, n, causal=True, window_size=(window, 0))
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    s = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~visible, -math.inf)
    results = {}
    for message, rescale_o, rescale_l in (
        ("o was not rescaled when the maximum grew: multiply it by alpha, as you do with l.", False, True),
        ("l was not rescaled when the maximum grew: multiply it by alpha, as you do with o.", True, False),
        ("Neither l nor o was rescaled when the maximum grew: multiply both by alpha.", False, False),
    ):
        m = torch.full(s.shape[:-1], -math.inf).double()
        l, o = torch.zeros_like(m), torch.zeros_like(q)
        for start in range(0, n, block_n):
            part = s[..., start : start + block_n]
            m_new = torch.maximum(m, part.amax(dim=-1))
            safe = torch.where(m_new.isneginf(), 0.0, m_new)
            alpha, p = (m - safe).exp(), (part - safe[..., None]).exp()
            l = (alpha if rescale_l else 1.0) * l + p.sum(dim=-1)
            o = (alpha[..., None] if rescale_o else 1.0) * o + p @ v[:, :, start : start + block_n]
            m = m_new
        results[f"{message} (As with blocks of {block_n} columns.)"] = (o / l[..., None]).transpose(1, 2)
    return results


@exercise(
    "02",
    "The gradient of the scores",
    15,
    [
        "Without dL it is the formula above: dS = P · (dP - Δ), with dP = dO Vᵀ and one number Δ for each row.",
        "What is ∂L_i / ∂S_ij, if L_i = log(sum_j e^(S_ij))? You know that quotient.",
        "∂L_i / ∂S_ij = P_ij, so dL_i · P_ij is added: dS = P · (dP - Δ + dL), with dL and Δ as columns, [:, None].",
    ],
)
def score_gradient(call: Call, generator: torch.Generator) -> None:
    """dS of one head, from S, V, dO and the gradient dL with respect to the log-sum-exp."""
    for n_q, n_k, with_dl in ((7, 7, False), (7, 12, True), (12, 5, True)):
        s, v = draw(generator, n_q, n_k), draw(generator, n_k, 6)
        d_out, d_lse = draw(generator, n_q, 6), draw(generator, n_q) if with_dl else torch.zeros(n_q)
        p, dp = s.softmax(dim=-1), d_out @ v.mT
        delta = (p * dp).sum(dim=-1, keepdim=True)
        dl = d_lse[:, None]
        low = p * (dp - delta + dl)
        p_64, dp_64 = s.double().softmax(dim=-1), d_out.double() @ v.double().mT
        exact = p_64 * (dp_64 - (p_64 * dp_64).sum(dim=-1, keepdim=True) + dl.double())
        by_column = s.softmax(dim=0)
        mistakes = {
            "The sign is wrong: dS = +P · (dP - Δ + dL).": -low,
            "S was scaled by 1 / √D: the scale is already in S.": low * v.shape[1] ** -0.5,
            "P is the softmax of each row (dim=-1), not of each column.": (
                by_column * (dp - (by_column * dp).sum(dim=-1, keepdim=True) + dl)
            ),
            "Δ is missing: the derivative of a softmax is P · (dP - Δ), since a row of P sums to 1.": p * (dp + dl),
            "Δ was added: subtract it.": p * (dp + delta + dl),
            "Δ is the sum of P · dP over each row, not the sum of dP.": p * (dp - dp.sum(dim=-1, keepdim=True) + dl),
            "That is dP - Δ (+ dL): the factor P is missing.": dp - delta + dl,
            "That is dP: the derivative of the softmax is missing.": dp,
            "Δ was summed over the wrong dimension: it is one number for each row (dim=-1).": (
                p * (dp - (p * dp).sum(dim=0, keepdim=True) + dl)
            ),
        }
        if with_dl:
            mistakes |= {
                "dL is missing: the log-sum-exp depends on S as well, with ∂L_i / ∂S_ij = P_ij.": p * (dp - delta),
                "dL has the wrong sign: ∂L_i / ∂S_ij = +P_ij.": p * (dp - delta - dl),
                "dL was added without its factor P_ij.": p * (dp - delta) + dl,
            }
        got = expect_tensor(call(s, v, d_out, d_lse), s.shape, "dS")
        same_tensor(
            got,
            exact,
            low,
            name="dS",
            requirement=f"dS is not right for N_q = {n_q}, N_k = {n_k}, {'with dL' if with_dl else 'dL = 0'}.",
            place=indices("row", "column"),
            mistakes=mistakes,
            factor=3.0,
        )


BUGS = ("right", "scale", "mask", "l", "o", "tail")


def _bugged(q, k, v, block: int) -> dict[str, torch.Tensor]:
    """Name of a bug -> the output (N, D) in float64 of a kernel with it; q, k, v are (N, D), of one causal head."""
    n, d = q.shape
    q, k, v = q.double(), k.double(), v.double()
    s, causal = q @ k.mT, torch.ones(n, n, dtype=torch.bool).tril()
    in_full_blocks = causal & (torch.arange(n) < n // block * block)
    return {
        "right": tiles_without(q, k, v, block, causal=True)[0],
        "scale": s.masked_fill(~causal, -math.inf).softmax(dim=-1) @ v,
        "mask": (s * d**-0.5).softmax(dim=-1) @ v,
        "l": tiles_without(q, k, v, block, causal=True, rescale_l=False)[0],
        "o": tiles_without(q, k, v, block, causal=True, rescale_o=False)[0],
        "tail": (s * d**-0.5).masked_fill(~in_full_blocks, -math.inf).softmax(dim=-1) @ v,
    }


@exercise(
    "02",
    "Find the bug",
    20,
    [
        (
            "You have q, k and v: compute what each broken kernel would return, and take the bug that comes nearest"
            " to out. Or look first: which rows are wrong, and does a row differ by one factor?"
        ),
        (
            "Row 0 sees only itself, so it must be v[0]: without the mask it is not. If the tail is left out, only the"
            " rows from N // block * block on are wrong. Without the scale, rows of the first block are wrong, too; if"
            " l or o is not rescaled, they are right."
        ),
        (
            "If l is not rescaled, each row is off by one factor; if o is not rescaled, the elements of a row are off"
            " by different factors. Write the online loop with a switch for each rescaling, and take the candidate that"
            " differs least from out."
        ),
    ],
)
def find_bug(call: Call, generator: torch.Generator) -> None:
    """The name of the bug in a v2 kernel, found from its output."""
    signs = {
        "scale": "rows of the first block are wrong as well, other than row 0: the softmax itself is different",
        "mask": "row 0 sees only itself and must be v[0], and here it is not",
        "l": "each row is the right row times a factor, one for the whole row",
        "o": "rows after the first block are wrong, and their elements are off by different factors",
        "tail": "all rows are right, other than the last rows, whose own block of keys is not full",
    }
    for n, block in ((40, 16), (75, 32)):
        for _ in range(20):  # draw again if two kernels return nearly the same, as if the maximum never grows
            q, k, v = (draw(generator, n, 16) for _ in range(3))
            results = _bugged(2 * q, k, v, block)
            apart = [(results[a] - results[b]).abs().max() for i, a in enumerate(BUGS) for b in BUGS[:i]]
            if min(apart) > 0.1:
                break
        for name in [BUGS[i] for i in torch.randperm(len(BUGS), generator=generator).tolist()]:
            got = call(2 * q, k, v, results[name].float(), block)
            if got == name:
                continue
            if got not in BUGS:
                raise Wrong(
                    f"It must return one of {', '.join(map(repr, BUGS))}; for N = {n} and blocks of {block} it returned"
                    f" {got!r}."
                )
            off = (results[name] - results["right"]).abs().amax(dim=1)
            if name == "right":
                why = "This output is right: it equals exact attention up to rounding in float32."
            elif got == "right":
                why = (
                    f"It is not: {int((off > 1e-4).sum())} of {n} rows are wrong, by up to {off.max():.2g}. Compare it"
                    " with exact attention first."
                )
            else:
                why = f"Look again: {signs[name]}."
            case = f"N = {n} and blocks of {block} keys"
            raise mismatch(f"That is not the bug, for {case}.", repr(name), repr(got), why)


@exercise(
    "02",
    "The function that a model calls",
    20,
    [
        (
            "transformers has the heads before the rows, flash_attn_func has them after: t.transpose(1, 2) copies"
            " nothing. And pass the scale on: softmax_scale=scaling."
        ),
        (
            "causal=True is aligned to the bottom right, as a cache needs it. With padding, take each sequence by"
            " itself: the keys that are tokens, k[b : b + 1, padding[b]], and the queries whose own key is a token."
            " Query i stands at key i + N_k - N_q."
        ),
        (
            "rows = padding[b, N_k - N_q :]; out = torch.zeros_like(q); out[b, rows] = flash_attn_func(q[b : b + 1,"
            " rows], k[b : b + 1, padding[b]], v[b : b + 1, padding[b]], softmax_scale=scaling, causal=True)[0]."
        ),
    ],
)
def gpt2_attention(call: Call, generator: torch.Generator) -> None:
    """Attention behind the signature of transformers: layout, scale, cache and padding."""
    left, right = (torch.ones(2, 19, dtype=torch.bool) for _ in range(2))
    left[0, :7] = False
    right[1, 15:] = False
    cases = {
        "no padding": (2, 21, 21, 0.31, None),
        "one query and a cache of 17 keys": (1, 1, 17, 0.25, None),
        "5 queries and 19 keys": (2, 5, 19, 0.25, None),
        "padding on the left": (2, 19, 19, 0.25, left),
        "padding on the right": (2, 19, 19, 0.25, right),
        "4 queries and 19 keys, padding on the left": (2, 4, 19, 0.31, left),
    }
    for case, (batch, n_q, n_k, scale, padding) in cases.items():
        # as in GPT-2: views in which the heads of one token lie side by side in memory
        q = draw(generator, batch, n_q, 3, 16).transpose(1, 2)
        k, v = (draw(generator, batch, n_k, 3, 16).transpose(1, 2) for _ in range(2))
        out = expect_tensor(call(q, k, v, scale, padding), (batch, n_q, 3, 16), "out")
        exact = _as_the_model(q.double(), k.double(), v.double(), scale, padding)
        visible = padding[:, n_k - n_q :] if padding is not None else torch.ones(batch, n_q, dtype=torch.bool)

        def shown(t: torch.Tensor, exact=exact, visible=visible) -> torch.Tensor:
            """The output with the rows of padding set to the right values: nobody reads them."""
            return torch.where(visible[:, :, None, None], t, exact.to(t.dtype))

        mistakes = {
            "The scale of the model, `scaling`, was not passed on.": _as_the_model(q, k, v, 16**-0.5, padding),
            "The causal mask is missing.": _as_the_model(q, k, v, scale, padding, causal=False),
            "The mask is aligned to the top left: with a cache the last query must see every key.": (
                _top_left(q, k, v, scale, padding)
            ),
        }
        if padding is not None:
            mistakes["Padding is seen: leave its keys out."] = _as_the_model(q, k, v, scale, None)
            mistakes["Tokens and padding are exchanged: True is a token."] = _only_padding(q, k, v, scale, padding)
            mistakes["The rows of tokens are zero: were the rows of padding written? True is a token."] = _as_the_model(
                q, k, v, scale, ~padding
            )
        if n_q == n_k:
            across: Any = naive_attention(q, k, v, causal=True, softmax_scale=scale)
            mistakes["Attention went across heads: exchange heads and rows before the call."] = across.transpose(1, 2)
        same_tensor(
            shown(out.float()),
            exact,
            shown(_as_the_model(q, k, v, scale, padding)),
            name="out",
            requirement=f"The output is not right for {case}.",
            place=indices("sequence", "row", "head", "dimension"),
            mistakes={text: shown(t) for text, t in mistakes.items()},
        )


def _as_the_model(q, k, v, scale, padding, causal: bool = True) -> torch.Tensor:
    """The right output: q (B, H, N_q, D), k, v (B, H, N_k, D) -> (B, N_q, H, D). Rows of padding are zero."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for b in range(len(q)):
        tokens = torch.ones(k.shape[1], dtype=torch.bool) if padding is None else padding[b]
        rows = tokens[k.shape[1] - q.shape[1] :]
        part = (q[b : b + 1, rows], k[b : b + 1, tokens], v[b : b + 1, tokens])
        out[b, rows] = naive_attention(*part, causal=causal, softmax_scale=scale)[0]
    return out


def _only_padding(q, k, v, scale, padding) -> torch.Tensor:
    """The same if queries see only the padding; zero for a row that sees nothing."""
    visible = visible_mask(q.shape[2], k.shape[2], causal=True) & ~padding[:, None, None, :]
    p = (scale * q @ k.mT).masked_fill(~visible, -math.inf).softmax(dim=-1).nan_to_num(nan=0.0)
    return (p @ v).transpose(1, 2)


def _top_left(q, k, v, scale, padding) -> torch.Tensor:
    """The same if row i sees the keys up to i, however long the cache is."""
    n_q = q.shape[2]
    kept = None if padding is None else padding[:, :n_q]
    return _as_the_model(q, k[:, :, :n_q], v[:, :, :n_q], scale, kept)
