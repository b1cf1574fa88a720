"""Where a tile of a (B, N, H, D) tensor lies in memory, and how it is loaded and stored past the edges."""

import triton
import triton.language as tl


@triton.jit
def tile_pointers(ptr, stride_n, stride_d, start_n, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers (BLOCK_N, BLOCK_D) to the rows from `start_n` on of one head, whose first element is at `ptr`.

    Row offsets are 64-bit: N * stride_n exceeds 2**31 for a long sequence in a fused QKV tensor.
    """
    rows = (start_n + tl.arange(0, BLOCK_N)).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    return ptr + rows[:, None] * stride_n + cols[None, :] * stride_d


@triton.jit
def load_tile(ptrs, offs_n, N, D: tl.constexpr, BLOCK_D: tl.constexpr, MASK_ROWS: tl.constexpr):
    """Loads a tile; rows from N on (where MASK_ROWS) and columns from D on read as zero.

    Masks that cannot matter are left out at compile time: they would cost a comparison per element.
    """
    offs_d = tl.arange(0, BLOCK_D)
    if MASK_ROWS:
        if D < BLOCK_D:
            tile = tl.load(ptrs, mask=(offs_n[:, None] < N) & (offs_d[None, :] < D), other=0.0)
        else:
            tile = tl.load(ptrs, mask=offs_n[:, None] < N, other=0.0)
    else:
        if D < BLOCK_D:
            tile = tl.load(ptrs, mask=offs_d[None, :] < D, other=0.0)
        else:
            tile = tl.load(ptrs)
    return tile


@triton.jit
def store_tile(ptrs, tile, offs_n, N, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores a tile in the dtype of its tensor; rows from N on and columns from D on are left alone."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = (offs_n[:, None] < N) & (offs_d[None, :] < D)
    tl.store(ptrs, tile.to(ptrs.dtype.element_ty), mask=mask)
