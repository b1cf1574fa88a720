"""Loads and stores tiles of a (B, N, H, D) tensor or a paged cache, also at the tensor's edges."""

import triton
import triton.language as tl


@triton.jit
def column_offsets(stride_d, BLOCK_D: tl.constexpr):
    """Offsets of the columns of a row. They are 64-bit unless Triton compiles the kernel for a stride of 1.

    (D - 1) * stride_d exceeds 2**31 for a tensor that is stored with D outermost.
    """
    cols = tl.arange(0, BLOCK_D)
    if isinstance(stride_d, int):  # the constant 1
        return cols * stride_d
    else:
        return cols.to(tl.int64) * stride_d


@triton.jit
def tile_pointers(ptr, stride_n, stride_d, start_n, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers (BLOCK_N, BLOCK_D) to the rows from `start_n` on of one head, whose first element is at `ptr`.

    Row offsets are 64-bit: N * stride_n exceeds 2**31 for a long sequence in a fused QKV tensor.
    """
    rows = (start_n + tl.arange(0, BLOCK_N)).to(tl.int64)
    return ptr + rows[:, None] * stride_n + column_offsets(stride_d, BLOCK_D)[None, :]


@triton.jit
def row_pointers(ptr, stride_d, row_offsets, BLOCK_D: tl.constexpr):
    """Pointers (rows, BLOCK_D) to rows in any order: each entry of `row_offsets` (64-bit) counts from `ptr`."""
    return ptr + row_offsets[:, None] + column_offsets(stride_d, BLOCK_D)[None, :]


@triton.jit
def blocks_of_keys(table_ptr, offs_n, N, BLOCKS, PAGE: tl.constexpr):
    """The blocks (64-bit) that hold the keys `offs_n` of one sequence in a paged cache of BLOCKS blocks.

    Key j is row j % PAGE of block table[j // PAGE]. Keys from N on have no entry in the table. They get block -1, and
    so do keys whose entry is no block of the cache.
    """
    block = tl.load(table_ptr + offs_n // PAGE, mask=offs_n < N, other=-1)
    return tl.where((block >= 0) & (block < BLOCKS), block, -1).to(tl.int64)


@triton.jit
def load_paged(
    ptr, block, offs_n, stride_page, stride_n, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr
):
    """Loads the keys or values `offs_n` of one head from the blocks of `blocks_of_keys`; from block -1 as zero."""
    rows = tl.maximum(block, 0) * stride_page + (offs_n % PAGE).to(tl.int64) * stride_n
    missing = (block < 0).to(tl.int32)
    return load_tile(row_pointers(ptr, stride_d, rows, BLOCK_D), missing, 1, D, BLOCK_D)  # a tile of the rows below 1


@triton.jit
def load_tile(ptrs, offs_n, N, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Loads a tile; rows from N on and columns from D on read as zero."""
    offs_d = tl.arange(0, BLOCK_D)
    if D < BLOCK_D:  # decided when compiled: a full tile needs no mask of columns, a comparison per element
        return tl.load(ptrs, mask=(offs_n[:, None] < N) & (offs_d[None, :] < D), other=0.0)
    else:
        return tl.load(ptrs, mask=offs_n[:, None] < N, other=0.0)


@triton.jit
def source(ptr, stride_n, stride_d, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr, table_ptr=None):
    """The `src` of `load_rows` for one head, whose first element is at `ptr`: pointers to its first tile.

    With TMA it is the tensor descriptor `ptr`; in a paged cache it is the pointer `ptr`.
    """
    if TMA or table_ptr is not None:
        return ptr
    else:
        return tile_pointers(ptr, stride_n, stride_d, 0, BLOCK_N, BLOCK_D)


@triton.jit
def load_rows(
    src, stride_n, b, h, start, N,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Loads the tile (BLOCK_N, BLOCK_D) from row `start` on, as `load_tile`.

    With TMA (Hopper and later) one thread asks for the tile by its place (b, h, start). The copy engine computes the
    addresses, and fills rows past N and columns past D with zeros.
    """
    offs_n = start + tl.arange(0, BLOCK_N)
    if TMA:
        return src.load([b, h, start, 0]).reshape([BLOCK_N, BLOCK_D])
    else:
        return load_tile(src + tl.cast(start, tl.int64) * stride_n, offs_n, N, D, BLOCK_D)


@triton.jit
def load_vector(src, bh, start, BLOCK: tl.constexpr, TMA: tl.constexpr):
    """Loads one number for each row of head `bh` from row `start` on. The tensor must have room for BLOCK numbers.

    There is no mask, since the dK/dV kernel took 17 % longer with one.
    """
    if TMA:
        return src.load([bh, start]).reshape([BLOCK])
    else:
        return tl.load(src + start + tl.arange(0, BLOCK))


@triton.jit
def store_tile(ptrs, tile, offs_n, N, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores a tile in the dtype of its tensor; rows from N on and columns from D on are not written."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_n[:, None] < N) & (offs_d[None, :] < D)
    tl.store(ptrs, tile.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def zero_rows(
    ptr, stride_n, stride_d, first, end, place, programs,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fills the share of program `place` of `programs` in the rows from `first` to `end` of one head with zeros."""
    for start in tl.range(first + place * BLOCK, end, programs * BLOCK):
        zeros = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        ptrs = tile_pointers(ptr, stride_n, stride_d, start, BLOCK, BLOCK_D)
        store_tile(ptrs, zeros, start + tl.arange(0, BLOCK), end, D, BLOCK_D)
