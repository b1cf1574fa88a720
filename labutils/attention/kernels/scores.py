"""From the product Q Kᵀ to weights: scale, softcap, ALiBi, masks and dropout of one tile, for all kernels of v2.

None switches a feature off: an argument that is None when a kernel is compiled adds no instruction to it.

Rows are queries and columns are keys; both come as index tensors that broadcast against the tile, (BLOCK_M, 1) and
(1, BLOCK_N), or the other way round if a kernel keeps its tile transposed.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def sequence(cu_seqlens_ptr, b, N, TOTAL):
    """(start, length) of sequence `b` in a packed tensor of TOTAL rows; (0, N) in a tensor with a batch dimension.

    Whatever cu_seqlens holds, the rows lie inside of the packed tensor: nobody checks it in a captured CUDA graph.
    """
    if cu_seqlens_ptr is not None:
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + b), 0), TOTAL)
        end = tl.minimum(tl.load(cu_seqlens_ptr + b + 1), TOTAL)
        length = (tl.maximum(end, start) - start).to(tl.int32)
        start = start.to(tl.int64)
    else:
        start = tl.zeros([], tl.int64)
        length = N
    return start, length


@triton.jit
def end_of_sequences(cu_seqlens_ptr, batch, TOTAL):
    """The row behind the last of `batch` sequences in a packed tensor of TOTAL rows."""
    return tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + batch), 0), TOTAL)


@triton.jit
def tanh(x):
    """tanh(x) = 1 - 2 / (1 + e^2x), which never overflows; near 0 its series.

    Near 0 the formula has the absolute error of a number near 1, and a large softcap multiplies it.
    """
    x2 = x * x
    series = x * (1.0 + x2 * (-1.0 / 3.0 + x2 * (2.0 / 15.0 + x2 * (-17.0 / 315.0 + x2 * (62.0 / 2835.0)))))
    return tl.where(x2 < 0.0625, series, 1.0 - 2.0 / (1.0 + tl.math.exp2(x * (2.0 * LOG2_E))))


@triton.jit
def score_unit(softmax_scale, softcap, slope):
    """The factor from the scores of `score_tile` to base 2. Without softcap and ALiBi it contains the scale.

    In that case one multiply-add applies scale and change of base, and subtracts the maximum.
    """
    if softcap is None and slope is None:
        return softmax_scale * LOG2_E
    else:
        return 1.0


@triton.jit
def score_tile(s, rows, cols, offset, softmax_scale, softcap, slope):
    """Scores of a tile from s = Q Kᵀ, in units of `score_unit`, and the derivative of softcap, 1 without it.

    In natural units a score is softcap * tanh(scale * s / softcap) - slope * |i + offset - j|. `offset` is N_k - N_q,
    since ALiBi and masks are aligned to the bottom right.
    """
    derivative = 1.0
    if softcap is not None:
        t = tanh(s * (softmax_scale / softcap))
        derivative = 1.0 - t * t
        s = t * (softcap * LOG2_E)
    elif slope is not None:
        s = s * (softmax_scale * LOG2_E)
    if slope is not None:
        s -= (slope * LOG2_E) * tl.abs(rows + offset - cols).to(tl.float32)
    return s, derivative


@triton.jit
def mask_tile(s, rows, cols, n_k, offset, window_left, window_right):
    """s with -inf for keys past the end or outside of the window. Only tiles that contain an edge need it."""
    visible = cols < n_k
    if window_right is not None:
        visible = visible & (cols <= rows + offset + window_right)
    if window_left is not None:
        visible = visible & (cols >= rows + offset - window_left)
    return tl.where(visible, s, float("-inf"))


@triton.jit
def columns_of(start_m, n_q, n_k, offset, window_left, window_right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which columns a block of rows sees: (first, begin, end, last).

    The rows see the columns from first to last. The tiles from begin to end need no mask. All but `last` are multiples
    of BLOCK_N. If every tile needs a mask, begin >= end. If the rows see no column, first >= last, and the loop between
    them does not run.
    """
    first = 0
    last = n_k
    begin = 0
    end = n_k // BLOCK_N * BLOCK_N
    if window_right is not None:
        lowest_row = tl.minimum(start_m + BLOCK_M, n_q) - 1
        last = tl.minimum(tl.maximum(lowest_row + offset + window_right + 1, 0), n_k)
        end = tl.minimum(tl.maximum(start_m + offset + window_right + 1, 0), n_k) // BLOCK_N * BLOCK_N
    if window_left is not None:
        first = tl.maximum(start_m + offset - window_left, 0) // BLOCK_N * BLOCK_N
        begin = tl.cdiv(tl.maximum(start_m + BLOCK_M - 1 + offset - window_left, 0), BLOCK_N) * BLOCK_N
        begin = tl.maximum(tl.minimum(begin, tl.cdiv(last, BLOCK_N) * BLOCK_N), first)
        end = tl.maximum(end, begin)
    return first, begin, end, last


@triton.jit
def rows_of(start_n, n_q, n_k, offset, window_left, window_right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The transpose of `columns_of`: which rows see a block of columns. All but `last` are multiples of BLOCK_M."""
    first = 0
    last = n_q
    begin = 0
    end = n_q // BLOCK_M * BLOCK_M
    if window_right is not None:
        first = tl.minimum(tl.maximum(start_n - offset - window_right, 0), n_q) // BLOCK_M * BLOCK_M
        begin = tl.cdiv(tl.maximum(start_n + BLOCK_N - 1 - offset - window_right, 0), BLOCK_M) * BLOCK_M
    if window_left is not None:
        last = tl.minimum(tl.maximum(start_n + BLOCK_N - offset + window_left, 0), n_q)
        end = tl.minimum(tl.maximum(start_n - offset + window_left + 1, 0), n_q) // BLOCK_M * BLOCK_M
    begin = tl.maximum(tl.minimum(begin, tl.cdiv(last, BLOCK_M) * BLOCK_M), first)
    end = tl.maximum(end, begin)
    return first, begin, end, last


@triton.jit
def dropout_keep(seed_ptr, dropout_p, head, rows, cols):
    """True where dropout keeps a weight; it depends only on seed, head, row and column.

    Philox takes the position as its counter, so forward and backward agree whatever their tiles are. `head` numbers all
    heads of all sequences.
    """
    seed = tl.load(seed_ptr)
    bits, _, _, _ = tl.philox(seed, cols + rows * 0, rows + cols * 0, head + (rows + cols) * 0, (rows + cols) * 0)
    return tl.random.uint_to_uniform_float(bits) >= dropout_p
