"""Checks of notebook 01: bytes of the scores, softmax, the online update, combining pieces, attention in tiles."""

from __future__ import annotations

import math

import torch

from labutils.attention.bugs import tiles_without
from labutils.attention.reference import causal_mask, exact_attention, naive_attention
from labutils.exercises.core import Call, Wrong, draw, exercise, integer, pick
from labutils.exercises.judging import dtype_name, expect_tensor, expect_values, indices, same_number, same_tensor

# ---------------------------------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------------------------------


@exercise(
    "01",
    "The bytes of the scores",
    2,
    [
        "How many rows and columns has S for one head, and how many heads are there in a batch?",
        "One number takes `itemsize` bytes, and there are batch · heads · seqlen · seqlen of them.",
    ],
)
def score_bytes(call: Call, generator: torch.Generator) -> None:
    """Bytes of one (B, H, N, N) matrix."""
    for _ in range(3):
        batch, heads = pick(generator, [3, 5]), pick(generator, [7, 11, 13])
        n, itemsize = integer(generator, 100, 9000), pick(generator, [2, 4])
        right = batch * heads * n * n * itemsize
        same_number(
            call(batch, heads, n, itemsize),
            right,
            "the number of bytes of S",
            f"B = {batch}, H = {heads}, N = {n:,}, {itemsize} bytes a number",
            {
                "You counted one number a row. S has N rows of N numbers: its size grows with N².": right // n,
                "The heads are missing: each head has its own S.": right // heads,
                "The batch is missing: each sequence has its own S.": right // batch,
                "That is how many numbers S has. In bytes it is `itemsize` times as much.": right // itemsize,
                "That is in bits. `itemsize` counts bytes.": right * 8,
                "That is S and P together. One matrix was asked for.": right * 2,
                "That is in KiB. Bytes were asked for.": right / 2**10,
                "That is in MiB. Bytes were asked for.": right / 2**20,
            },
        )


# ---------------------------------------------------------------------------------------------------------------------
# Softmax
# ---------------------------------------------------------------------------------------------------------------------


def _row_and_column(index: tuple[int, ...]) -> str:
    """An index of x in words; x may have more than two dimensions."""
    return f"row {list(index[:-1])}, column {index[-1]}" if len(index) > 2 else f"row {index[0]}, column {index[-1]}"


@exercise(
    "01",
    "A softmax that does not overflow",
    5,
    [
        "e^(x - m) cannot overflow if m is the largest number of the row. Why does the softmax stay the same?",
        "Each row needs its own m: x.amax(dim=-1, keepdim=True). With keepdim, m broadcasts against x.",
        "p = (x - m).exp(), and each row of p is divided by its own sum, over the same dimension and with keepdim.",
    ],
)
def safe_softmax(call: Call, generator: torch.Generator) -> None:
    """Softmax over the last dimension."""
    ordinary = draw(generator, 6, 9)
    levels = draw(generator, 5, 12) + torch.tensor([0.0, -300.0, 40.0, -150.0, 60.0])[:, None]
    cases = {
        "ordinary rows": ordinary,
        "three dimensions": draw(generator, 2, 4, 7),
        "rows of large numbers": draw(generator, 4, 10) * 30 + 200,
        "rows on different levels": levels,
        "rows with one number far above the others": draw(generator, 3, 8) - 150.0 * (1 - torch.eye(3, 8)),
    }
    for case, x in cases.items():
        m = x.amax(dim=-1, keepdim=True)
        p = (x - m).exp()
        of_all = (x - x.max()).exp()
        columns = (x - x.amax(dim=0, keepdim=True)).exp()
        lifted = (x - x.mean(dim=-1, keepdim=True)).exp()
        same_tensor(
            expect_tensor(call(x), x.shape, "The softmax"),
            x.double().softmax(dim=-1),
            x.softmax(dim=-1),
            name="softmax(x)",
            requirement=f"Softmax over the last dimension is not right for {case}.",
            place=_row_and_column,
            atol=1e-4
            if "large" in case or "levels" in case
            else 1e-5,  # exp(x - lse) is known to 3e-5 if lse is near 300
            mistakes={
                "These are the numbers e^(x - m), not yet divided by their row's sum.": p,
                "You divided by the sum of the whole tensor: each row has its own sum (dim=-1, keepdim=True).": (
                    p / p.sum()
                ),
                "The columns sum to 1, not the rows: the softmax runs over the last dimension, dim=-1.": (
                    columns / columns.sum(dim=0, keepdim=True)
                ),
                "Softmax over dimension 1: that is the last dimension only if there are two. Use dim=-1.": x.softmax(
                    dim=1
                ),
                "That is the logarithm of the softmax.": x.log_softmax(dim=-1),
                "Powers of 2: the softmax is made of powers of e.": (x * math.log(2)).softmax(dim=-1),
                "The mean was subtracted, not the maximum: a number far above the mean still overflows.": (
                    lifted / lifted.sum(dim=-1, keepdim=True)
                ),
                "e^x overflowed to inf, and inf / inf is NaN: subtract the row's maximum from x first.": (
                    x.exp() / x.exp().sum(dim=-1, keepdim=True)
                ),
                (
                    "One maximum for the whole tensor: rows far below it become 0 / 0. Take each row's own maximum, "
                    "x.amax(dim=-1, keepdim=True)."
                ): (of_all / of_all.sum(dim=-1, keepdim=True)),
            },
        )


# ---------------------------------------------------------------------------------------------------------------------
# The online update
# ---------------------------------------------------------------------------------------------------------------------


def _weight(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """exp(a - b), and 0 where a is -inf."""
    return torch.where(a.isneginf(), 0.0, (a - b).exp())


@exercise(
    "01",
    "m and l of a row, a block at a time",
    10,
    [
        "First the new maximum: the larger of m and the block's own maximum, row by row.",
        "l is a multiple of e^m. As a multiple of e^(m_new) it is e^(m - m_new) · l. Add the block's sum.",
        (
            "If m_new is still -inf, m - m_new is -inf - (-inf), which is NaN. Such a row has seen nothing yet, so "
            "its l must stay 0: torch.where(m.isneginf(), 0.0, (m - m_new).exp())."
        ),
    ],
)
def online_update(call: Call, generator: torch.Generator) -> None:
    """(m, l) of each row after one more block of scores."""
    rows, widths = 4, (8, 8, 8, 3)
    x = draw(generator, rows, sum(widths)) * 2 + torch.arange(sum(widths), dtype=torch.float32) / 6
    m, l = torch.full((rows,), -math.inf, dtype=x.dtype), torch.zeros(rows, dtype=x.dtype)
    start = 0
    for number, width in enumerate(widths):
        m, l = _try_update(
            call, m, l, x[:, start : start + width], f"block {number} (columns {start} to {start + width - 1})"
        )
        start += width
    # scores below the old maximum, which stays
    m, l = _try_update(call, m, l, x[:, :5] - 40, "a block whose scores are all below the old maximum")
    hidden = x[:, :6].clone()
    hidden[1] = -math.inf
    _try_update(call, m, l, hidden, "a block that is masked (-inf) for row 1")
    _try_update(
        call,
        torch.full((rows,), -math.inf, dtype=x.dtype),
        torch.zeros(rows, dtype=x.dtype),
        hidden,
        "a first block that is masked (-inf) for row 1",
    )


def _try_update(call, m, l, x, case) -> tuple[torch.Tensor, torch.Tensor]:
    """Judges one update; returns the right (m_new, l_new) for the next one."""
    got_m, got_l = expect_values(call(m, l, x), ("m_new", "l_new"))
    got_m, got_l = expect_tensor(got_m, m.shape, "m_new"), expect_tensor(got_l, l.shape, "l_new")
    block_max = x.amax(dim=-1)
    m_new = torch.maximum(m, block_max)
    m_64, x_64, new_64 = m.double(), x.double(), m_new.double()
    exact = l.double() * _weight(m_64, new_64) + _weight(x_64, new_64[:, None]).sum(dim=-1)
    p_sum = _weight(x, m_new[:, None]).sum(dim=-1)
    low = l * _weight(m, m_new) + p_sum
    before = f"m = {m[0]:.3g} and l = {l[0]:.3g} in row 0 before it"
    same_tensor(
        got_m,
        new_64,
        m_new,
        name="m_new",
        requirement=f"The running maximum is not right after {case}, with {before}.",
        place=indices("row"),
        mistakes={
            "That is the maximum of only this block: the blocks before it count, too.": block_max,
            "That is the old maximum: the new block is not in it.": m,
            "One maximum for all rows: each row has its own.": m_new.amax().expand_as(m_new),
            "That is l_new: the maximum comes first, then the sum.": low,
        },
    )
    same_tensor(
        got_l,
        exact,
        low,
        name="l_new",
        requirement=f"The running sum is not right after {case}, with {before}.",
        place=indices("row"),
        mistakes={
            (
                "-inf - (-inf) is NaN. A row that has seen no score keeps l = 0: set the exponential to 0 where m or x "
                "is -inf."
            ): (l * (m - m_new).exp() + (x - m_new[:, None]).exp().sum(dim=-1)),
            (
                "The old l was not rescaled. It is a multiple of e^m, and the new sum is a multiple of e^(m_new): "
                "multiply l by e^(m - m_new)."
            ): (l + p_sum),
            "The old l was rescaled by the inverse factor e^(m_new - m): it must become smaller when m grows.": (
                l * (m_new - m).exp() + p_sum
            ),
            "The block was summed under the old maximum: in its exponentials, subtract m_new.": (
                l * _weight(m, m_new) + (x - m[:, None]).exp().sum(dim=-1)
            ),
            "That is the sum of only this block: the sum of the blocks before it is gone.": p_sum,
            "The block's sum was rescaled, too: multiply only the old l by e^(m - m_new).": (
                _weight(m, m_new) * (l + p_sum)
            ),
            "That is the log-sum-exp, m_new + log(l_new): l_new itself was asked for.": m_new + low.log(),
            "No maximum was subtracted: subtract m_new before the exponential.": l + x.exp().sum(dim=-1),
            "Powers of 2: the exponentials are powers of e.": (
                l * _weight(m, m_new).pow(math.log(2)) + _weight(x, m_new[:, None]).pow(math.log(2)).sum(dim=-1)
            ),
            ("Each block was summed under its own maximum: subtract m_new, which may come from a block before."): (
                l * _weight(m, m_new) + _weight(x, block_max[:, None]).sum(dim=-1)
            ),
        },
    )
    return m_new, low


@exercise(
    "01",
    "The output, normalised at every step",
    15,
    [
        "o is the average over the columns seen so far, so o · l is their weighted sum before the division.",
        "That sum is a multiple of e^m as well: rescale it by e^(m - m_new), as you rescale l.",
        "o_new = (e^(m - m_new) · l · o + p @ v) / l_new, with the old l and o. Mind the shapes: l[:, None].",
    ],
)
def normalised_update(call: Call, generator: torch.Generator) -> None:
    """(m, l, o) after one more block, with o divided by l at every step, as FlashAttention-1 keeps it."""
    rows, head_dim, widths = 4, 5, (6, 6, 6, 2)
    x = draw(generator, rows, sum(widths)) * 2 + torch.arange(sum(widths), dtype=torch.float32) / 5
    v = draw(generator, sum(widths), head_dim)
    m = torch.full((rows,), -math.inf, dtype=x.dtype)
    l, o = torch.zeros(rows, dtype=x.dtype), torch.zeros(rows, head_dim, dtype=x.dtype)
    start = 0
    for number, width in enumerate(widths):
        part, values = x[:, start : start + width], v[start : start + width]
        got = expect_values(call(m, l, o, part, values), ("m_new", "l_new", "o_new"))
        got_m, got_l = expect_tensor(got[0], m.shape, "m_new"), expect_tensor(got[1], l.shape, "l_new")
        got_o = expect_tensor(got[2], o.shape, "o_new")
        seen, seen_v = x[:, : start + width], v[: start + width]
        m_new = seen.amax(dim=-1)
        p, alpha = (part - m_new[:, None]).exp(), (m - m_new).exp()
        exact_l = (seen.double() - m_new.double()[:, None]).exp().sum(dim=-1)
        exact = seen.double().softmax(dim=-1) @ seen_v.double()
        l_new = alpha * l + p.sum(dim=-1)
        case = f"block {number} (columns {start} to {start + width - 1})"
        for name, value, right, low in (("m_new", got_m, m_new.double(), m_new), ("l_new", got_l, exact_l, l_new)):
            same_tensor(
                value,
                right,
                low,
                name=name,
                requirement=f"{name} is not right after {case}. It is computed as in the exercise before this one.",
                place=indices("row"),
            )
        low_o = ((alpha * l)[:, None] * o + p @ v[start : start + width]) / l_new[:, None]
        same_tensor(
            got_o,
            exact,
            seen.softmax(dim=-1) @ seen_v,
            name="o_new",
            requirement=f"After {case}, o must be the attention over all columns seen so far.",
            place=indices("row", "dimension"),
            mistakes={
                (
                    "The old o was not multiplied by the old l. It was divided by l before, and must be a sum again "
                    "before you add to it."
                ): ((alpha[:, None] * o + p @ values) / l_new[:, None]),
                "The old o was not rescaled by e^(m - m_new): its weights belong to the old maximum.": (
                    (l[:, None] * o + p @ values) / l_new[:, None]
                ),
                "That is the sum, not yet divided by l_new.": (alpha * l)[:, None] * o + p @ values,
                "You added this block's average to the old average: each must be weighted by its own sum.": (
                    o + p @ values / p.sum(dim=-1, keepdim=True)
                ),
                "That is the attention over only this block.": p @ values / p.sum(dim=-1, keepdim=True),
                "Divided by the old l, not by l_new.": ((alpha * l)[:, None] * o + p @ values) / l[:, None],
                "Divided by this block's sum, not by l_new.": (
                    ((alpha * l)[:, None] * o + p @ values) / p.sum(dim=-1, keepdim=True)
                ),
                "The block's part was divided by the block's sum, and then by l_new as well.": (
                    ((alpha * l)[:, None] * o + p @ values / p.sum(dim=-1, keepdim=True)) / l_new[:, None]
                ),
                "Half of the old average and half of this block's: each must be weighted by its own sum.": (
                    0.5 * (o + p @ values / p.sum(dim=-1, keepdim=True))
                ),
            },
        )
        m, l, o = m_new, l_new, low_o
        start += width


# ---------------------------------------------------------------------------------------------------------------------
# Combining pieces
# ---------------------------------------------------------------------------------------------------------------------


@exercise(
    "01",
    "Combine what several processors found",
    15,
    [
        "The exponentials of piece s sum to e^(lse_s). Its weight in the whole is e^(lse_s) / (sum over all pieces).",
        (
            "Subtract the largest lse of each row before the exponentials, as in any softmax; "
            "torch.logsumexp(lses, dim=0) does that for the new lse."
        ),
        "weights = (lses - lse).exp(), and 0 where lses is -inf; out = (weights[..., None] * outs).sum(dim=0).",
    ],
)
def combine(call: Call, generator: torch.Generator) -> None:
    """(out, lse) of a row from those of S pieces of its keys."""
    pieces, rows, head_dim = 3, 5, 4
    scores = draw(generator, rows, 24) * 2
    values = draw(generator, 24, head_dim)
    for case, shift in (("ordinary scores", 0.0), ("large scores", 300.0), ("very negative scores", -300.0)):
        _try_combine(call, scores + shift, values, pieces, case)
    hidden = scores.clone()
    hidden[1, 8:16] = -math.inf
    _try_combine(call, hidden, values, pieces, "row 1 seeing nothing of piece 1")
    hidden[3] = -math.inf
    _try_combine(call, hidden, values, pieces, "row 3 seeing nothing at all")


def _try_combine(call, scores, values, pieces, case) -> None:
    def attention(x, v):
        p = x.softmax(dim=-1).nan_to_num(nan=0.0)  # a row of -inf is NaN in softmax, and zero in attention
        return p @ v, x.logsumexp(dim=-1)

    parts = [attention(x, v) for x, v in zip(scores.chunk(pieces, dim=-1), values.chunk(pieces), strict=True)]
    outs, lses = torch.stack([o for o, _ in parts]), torch.stack([lse for _, lse in parts])
    out, lse = expect_values(call(outs, lses), ("out", "lse"))
    out, lse = expect_tensor(out, outs.shape[1:], "out"), expect_tensor(lse, lses.shape[1:], "lse")
    exact_lse = torch.logsumexp(lses.double(), dim=0)  # of the pieces as the function got them, in float32
    exact_out = (_weight(lses.double(), exact_lse)[..., None] * outs.double()).sum(dim=0)
    low_lse = torch.logsumexp(lses, dim=0)
    low_out = (_weight(lses, low_lse)[..., None] * outs).sum(dim=0)
    naive = lses.exp() / lses.exp().sum(dim=0)
    top = lses.amax(dim=0)
    blind = (lses - lses.logsumexp(dim=0)).exp()
    proportional = lses / lses.sum(dim=0)
    overflow = "e^lse overflowed (or all of them became 0): subtract the largest lse of the row first."
    nothing = (
        "A row that sees nothing has lse = -inf in every piece, and -inf - (-inf) is NaN. Its out is 0, its lse -inf."
    )
    same_tensor(
        lse,
        exact_lse,
        low_lse,
        name="lse",
        requirement=f"The log-sum-exp of the whole is not right, with {case}.",
        place=indices("row"),
        mistakes={
            nothing: top + (lses - top).exp().sum(dim=0).log(),
            overflow: lses.exp().sum(dim=0).log(),
            "That is the sum of the lses. Add the numbers e^lse instead.": lses.sum(dim=0),
            "That is the mean of the lses. Add the numbers e^lse instead.": lses.mean(dim=0),
            "That is the largest lse: the other pieces contribute, too.": top,
            "That is the sum of the numbers e^lse: its logarithm is missing.": lses.exp().sum(dim=0),
            "That is the logarithm of the mean of e^lse: take the logarithm of the sum.": low_lse - math.log(len(lses)),
            "In powers of 2: the lses are natural logarithms.": (lses * math.log(2)).logsumexp(dim=0) / math.log(2),
            "Only the first two pieces are in it: there may be any number of pieces.": lses[:2].logsumexp(dim=0),
        },
    )
    same_tensor(
        out,
        exact_out,
        low_out,
        name="out",
        atol=1e-4,  # weights of lses near 300 are known to 3e-5
        requirement=f"The output of the whole is not right, with {case}.",
        place=indices("row", "dimension"),
        mistakes={
            nothing: (blind[..., None] * outs).sum(dim=0),
            overflow: (naive[..., None] * outs).sum(dim=0),
            "That is the plain mean: a piece with larger scores has more weight.": outs.mean(dim=0),
            "That is the plain sum: the weights of the pieces must sum to 1.": outs.sum(dim=0),
            "That is only the piece with the largest lse: the others have the weight e^(lse_s - lse).": (
                outs.gather(0, lses.argmax(dim=0)[None, :, None].expand(1, *outs.shape[1:]))[0]
            ),
            "Divided by the number of pieces as well: the weights sum to 1 already.": low_out / len(lses),
            "The weights are upside down: they are e^(lse_s - lse), not e^(lse - lse_s).": (
                ((low_lse - lses).exp()[..., None] * outs).sum(dim=0)
            ),
            "You weighted by lse. The weight of a piece is e^(lse_s - lse).": (
                (proportional[..., None] * outs).sum(dim=0)
            ),
            "Weights taken over the rows: the softmax of the lses runs over the pieces, dim=0.": (
                (lses.softmax(dim=1)[..., None] * outs).sum(dim=0)
            ),
            "The weights are e^(lse_s - largest lse) and do not yet sum to 1.": (
                ((lses - top).exp()[..., None] * outs).sum(dim=0)
            ),
        },
    )


# ---------------------------------------------------------------------------------------------------------------------
# Attention in tiles
# ---------------------------------------------------------------------------------------------------------------------


def _head_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one head: out (N_q, D) and lse (N_q,). A row that sees nothing has out 0 and lse -inf.

    Args:
        q: (N_q, D).
        k, v: (N_k, D).
        scale: of the scores; by default 1 / √D.
        mask: (N_q, N_k), bool, True where a query sees a key; by default each query sees all keys.
    """
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf)
    return s.softmax(dim=-1).nan_to_num(nan=0.0) @ v, s.logsumexp(dim=-1)


@exercise(
    "01",
    "Causal attention in tiles",
    30,
    [
        (
            "Begin with the loops of `my_tiled_attention`, for one head and in float32. A slice q[i : i + block_m] ends"
            " at the end of the tensor by itself, so the tail needs no mask."
        ),
        (
            "Row i may see column j where j <= i + N_k - N_q. Build that for one tile: torch.arange for its rows and"
            " its columns, and masked_fill with -inf before the maximum. Tiles without a visible column can be"
            " skipped."
        ),
        (
            "A row that has seen nothing has m_new = -inf, and -inf - (-inf) is NaN: use torch.where as in"
            " online_update. At the end divide by torch.where(l == 0, 1.0, l): such a row then gives 0, and its lse is"
            " m + log(l) = -inf."
        ),
    ],
)
def tiled_attention(call: Call, generator: torch.Generator) -> None:
    """(out, lse) of one head, with at most one tile of the scores at a time."""
    _try_tiling(call, generator, 48, 48, (16, 16), False)
    _try_tiling(call, generator, 48, 48, (16, 16), True)
    _try_tiling(call, generator, 45, 45, (16, 8), True)
    _try_tiling(call, generator, 20, 45, (8, 16), True)
    _try_tiling(call, generator, 45, 20, (8, 16), True)
    _try_tiling(call, generator, 40, 800, (40, 4), False, torch.float16)
    q, k, v = (draw(generator, 512, 8) for _ in range(3))
    call(q, k, v, 32, 32, True)
    if call.largest >= 512 * 512 // 2:
        raise Wrong(
            "The results are right, but no tensor may be as large as the matrix of scores.\n  With N = 512 and blocks"
            f" of 32 the largest tensor has {call.largest:,} elements; S has {512 * 512:,}, and a tile"
            f" {32 * 32:,}.\n  Compute scores and mask of one tile at a time, inside the loops."
        )


def _try_tiling(call, generator, n_q, n_k, blocks, causal, dtype=torch.float32) -> None:
    q, k, v = (
        draw(generator, n_q, 16, dtype=dtype),
        draw(generator, n_k, 16, dtype=dtype),
        draw(generator, n_k, 16, dtype=dtype),
    )
    q = q * 2  # scores far enough apart that the maximum of a row moves from block to block
    if dtype == torch.float16:
        v = v + 8
    case = (
        f"N_q = {n_q}, N_k = {n_k}, blocks of {blocks[0]} rows and {blocks[1]} columns,"
        f" {'causal' if causal else 'full'}, {dtype_name(dtype)}"
    )
    out, lse = expect_values(call(q, k, v, *blocks, causal), ("out", "lse"))
    out = expect_tensor(out, q.shape, "out", dtype)
    lse = expect_tensor(lse, (n_q,), "lse")
    batched = [t[None, :, None] for t in (q, k, v)]  # (N, D) -> (1, N, 1, D)
    exact, exact_lse = (t.squeeze() for t in exact_attention(*batched, causal=causal, return_lse=True))
    low, low_lse = (t.squeeze() for t in naive_attention(*batched, causal=causal, return_lse=True))

    mask = causal_mask(n_q, n_k) if causal else torch.ones(n_q, n_k, dtype=torch.bool)
    mistakes = _tiling_mistakes(q, k, v, blocks, causal, mask)
    if causal:
        mistakes |= _mask_mistakes(q, k, v, blocks, mask, exact_lse)
    mistakes |= _tail_mistakes(q, k, v, blocks, mask)
    largest = _row_max(q, k, q.shape[-1] ** -0.5, mask)

    def row(index):
        return f"row {index[0]} (block {index[0] // blocks[0]} of queries)" + (
            f", dimension {index[1]}" if len(index) > 1 else ""
        )

    if_unknown = ""
    if dtype == torch.float16:
        if_unknown = (
            "The same code is right in float32. Sum m, l and O in float32 whatever the inputs are: convert the tiles"
            " with .float(), and the result back at the end."
        )
    same_tensor(
        out,
        exact,
        low,
        name="out",
        requirement=f"The output is not right for {case}.",
        place=row,
        mistakes={text: value for text, (value, _) in mistakes.items()},
        if_unknown=if_unknown,
    )
    if lse.dtype not in (torch.float32, torch.float64):
        raise Wrong(f"lse must be in float32, whatever the inputs are; it is in {dtype_name(lse.dtype)}.")
    same_tensor(
        lse,
        exact_lse,
        low_lse,
        name="lse",
        requirement=f"The output is right, the log-sum-exp is not, for {case}.",
        place=row,
        mistakes={text: value for text, (_, value) in mistakes.items()}
        | {
            "That is l: the log-sum-exp is m + log(l).": (exact_lse - largest).exp(),
            "That is log(l): m is missing, lse = m + log(l).": exact_lse - largest,
            "That is in base 2: the log-sum-exp is a natural logarithm.": exact_lse / math.log(2),
        },
        if_unknown=if_unknown,
    )


_Mistakes = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Message -> the (out, lse) that this mistake returns, (N_q, D) and (N_q,).

The functions below take q, k and v of one head, (N, D); blocks = (block_m, block_n); and a mask (N_q, N_k) that is True
where a query sees a key.
"""


def _tiling_mistakes(q, k, v, blocks, causal, mask) -> _Mistakes:
    """Mistakes in the recurrence of m, l and O, in the scale, and in the last division."""
    wrong: _Mistakes = {}
    floats = [t.float() for t in (q, k, v)]
    scale = q.shape[-1] ** -0.5
    wrong["O was not rescaled when the maximum grew: multiply it by e^(m - m_new), as you do with l."] = tiles_without(
        q, k, v, blocks[1], causal=causal, rescale_o=False
    )
    wrong["l was not rescaled when the maximum grew: multiply it by e^(m - m_new), as you do with O."] = tiles_without(
        q, k, v, blocks[1], causal=causal, rescale_l=False
    )
    wrong["Neither l nor O was rescaled when the maximum grew: multiply both by e^(m - m_new)."] = tiles_without(
        q, k, v, blocks[1], causal=causal, rescale_l=False, rescale_o=False
    )
    wrong["The factor 1 / √D is missing."] = _head_attention(*floats, scale=1.0, mask=mask)
    wrong["The scores were multiplied by 1 / √D twice."] = _head_attention(*floats, scale=scale**2, mask=mask)
    wrong["The scores were multiplied by √D: divide by it."] = _head_attention(*floats, scale=1 / scale, mask=mask)
    wrong["Powers of 2: use e^x, or multiply the scale by log2(e)."] = _head_attention(
        *floats, scale=scale * math.log(2), mask=mask
    )
    wrong["P was multiplied by K: the output is P V."] = _head_attention(floats[0], floats[1], floats[1], mask=mask)
    wrong["The output was divided by l in each step, and not multiplied by the old l before the next step."] = (
        _divided_in_each_step(*floats, block=blocks[1], mask=mask)
    )
    out, lse = _head_attention(*floats, mask=mask)
    l = (lse - _row_max(q, k, scale, mask)).exp().float()
    wrong["That is the sum, not yet divided by l."] = (out * l[:, None], lse)
    return wrong


def _mask_mistakes(q, k, v, blocks, mask, exact_lse) -> _Mistakes:
    """Mistakes in the causal mask, and in rows that it leaves without a key."""
    wrong: _Mistakes = {}
    floats = [t.float() for t in (q, k, v)]
    scale = q.shape[-1] ** -0.5
    n_q, n_k = mask.shape
    wrong["The causal mask is missing: row i may see column j where j <= i + N_k - N_q."] = _head_attention(*floats)
    top_left = torch.ones(n_q, n_k, dtype=torch.bool).tril()
    if n_q != n_k:
        wrong[
            "The mask is aligned to the top left. The last query sees the last key: j <= i + N_k - N_q (bottom right)."
        ] = _head_attention(*floats, mask=top_left)
    strict = torch.ones(n_q, n_k, dtype=torch.bool).tril(n_k - n_q - 1)
    wrong["The diagonal itself is masked: row i may see column i + N_k - N_q, too."] = _head_attention(
        *floats, mask=strict
    )
    tile = torch.arange(n_q)[:, None] % blocks[0] >= torch.arange(n_k)[None, :] % blocks[1]
    wrong["The mask was built from positions within the tile: add the tile's first row i and its first column j."] = (
        _head_attention(*floats, mask=tile)
    )
    if n_q > n_k:
        mean = _head_attention(*floats, mask=mask)[0]
        mean[: n_q - n_k] = floats[2].mean(dim=0)
        wrong[
            "Rows that see no key got the mean of V: a large negative number in place of -inf gives every key the"
            " same weight."
        ] = (mean, exact_lse.float())
        blind = (q.float() @ k.float().mT * scale).masked_fill(~mask, -math.inf).softmax(dim=-1) @ v.float()
        wrong[
            "NaN in rows that see no key (N_q > N_k): -inf - (-inf), and then 0 / 0. Their output is 0, their lse -inf."
        ] = (blind, blind[:, 0] + exact_lse.float())
    return wrong


def _tail_mistakes(q, k, v, blocks, mask) -> _Mistakes:
    """Rows or columns at the end that are left out because they do not fill a block."""
    wrong: _Mistakes = {}
    floats = [t.float() for t in (q, k, v)]
    n_q, n_k = mask.shape
    if n_q % blocks[0]:
        out, lse = _head_attention(*floats, mask=mask)
        out[n_q // blocks[0] * blocks[0] :] = 0
        wrong["The last rows were left out, which do not fill a block: loop to N_q with a step of block_m."] = (
            out,
            lse,
        )
    kept = n_k // blocks[1] * blocks[1]
    if kept < n_k:
        rest = mask.clone()
        rest[:, kept:] = False
        wrong["The last columns were left out, which do not fill a block: loop to N_k with a step of block_n."] = (
            _head_attention(*floats, mask=rest)
        )
    return wrong


def _divided_in_each_step(q, k, v, *, block, mask) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of o = (α o + P V) / l: the division of version 1 without its multiplication by the old l."""
    s = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -math.inf)
    m, l, o = torch.full_like(q[:, 0], -math.inf), torch.zeros_like(q[:, 0]), torch.zeros_like(q)
    for start in range(0, len(k), block):
        part = s[:, start : start + block]
        m_new = torch.maximum(m, part.amax(dim=-1))
        alpha, p = _weight(m, m_new), _weight(part, m_new[:, None])
        l = alpha * l + p.sum(dim=-1)
        o = (alpha[:, None] * o + p @ v[start : start + block]) / torch.where(l == 0, 1.0, l)[:, None]
        m = m_new
    return o, m + l.log()


def _row_max(q, k, scale, mask) -> torch.Tensor:
    return (q.double() @ k.double().mT * scale).masked_fill(~mask, -math.inf).amax(dim=-1)
