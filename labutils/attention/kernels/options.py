"""What a call asks of the kernels besides q, k and v (`Options`), and where a KV cache has its keys (`Cache`).

Both have one form from the interface down to the kernels: a bound, a softcap or a tensor that a call has not is None.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Options(NamedTuple):
    """What changes the attention, other than q, k and v; shared by forward, backward and decoding.

    The operators of `attention.operators` take these fields as their arguments, in this order.

    Attributes:
        softmax_scale: positive factor on the scores.
        window_left, window_right: keys that a query sees before and after its own place, None for no bound; causal is
            (None, 0). Aligned to the bottom right.
        softcap: c in c * tanh(score / c), or None.
        alibi_slopes: float32 (H,) or (B, H), or None.
        dropout_p: probability of dropping a weight; with a `seed`, int64 (1,) on the device.
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,) for packed sequences, or None.
        max_seqlen_q, max_seqlen_k: the longest of the packed sequences.
        block_table: int32 (B, blocks of a sequence), for keys and values in pages, or None.
    """

    softmax_scale: float
    window_left: int | None = None
    window_right: int | None = None
    softcap: float | None = None
    alibi_slopes: torch.Tensor | None = None
    dropout_p: float = 0.0
    seed: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    block_table: torch.Tensor | None = None

    def sizes(self, q: torch.Tensor, k: torch.Tensor) -> tuple[int, int, int]:
        """(B, longest N_q, longest N_k)."""
        if self.cu_seqlens_q is None:
            return q.shape[0], q.shape[1], k.shape[1]
        return len(self.cu_seqlens_q) - 1, self.max_seqlen_q, self.max_seqlen_k

    def arguments(self) -> tuple:
        """The arguments of forward and backward kernels from `cu_seqlens_q_ptr` to `window_right`, in their order."""
        return (
            self.cu_seqlens_q, self.cu_seqlens_k, *self.slopes(),
            self.seed, self.dropout_p if self.seed is not None else None,
            self.softmax_scale, self.softcap, self.window_left, self.window_right,
        )  # fmt: skip

    def slopes(self) -> tuple:
        """`slopes_ptr` and `stride_sb`, which is 0 if all sequences have the same slopes."""
        slopes = self.alibi_slopes
        return slopes, None if slopes is None else slopes.stride(0) if slopes.dim() == 2 else 0

    def paging(self) -> tuple:
        """`table_ptr` and `stride_tb`, for kernels that read keys from pages."""
        return (None, None) if self.block_table is None else (self.block_table, self.block_table.stride(0))


class Cache(NamedTuple):
    """Where in a KV cache the keys of each sequence are.

    Attributes:
        seqlens: int32 (B,), keys of each sequence in the cache, or None if all have `seqlen`.
        seqlen: that number; with `seqlens`, the most that any sequence can have.
        batch_idx: int32 (B,), which row of the cache a sequence uses, or None for its own number.
        leftpad: int32 (B,), the first key of each sequence, or None for 0.
        block_table: int32 (B, blocks of a sequence) of a paged cache, or None.
    """

    seqlens: torch.Tensor | None
    seqlen: int
    batch_idx: torch.Tensor | None = None
    leftpad: torch.Tensor | None = None
    block_table: torch.Tensor | None = None

    def arguments(self) -> tuple:
        """The arguments of the cache's kernels from `seqlens_ptr` to `stride_tb`, in their order."""
        table = self.block_table
        return self.seqlens, self.batch_idx, self.leftpad, table, None if table is None else table.stride(0)

    def page(self, k_cache: torch.Tensor) -> int:
        """Rows of a block; 0 without a block table."""
        return 0 if self.block_table is None else k_cache.shape[1]


def with_batch(t: torch.Tensor) -> torch.Tensor:
    """(B, N, H, D) as it is; a packed (total, H, D) as a batch of one, which is how the kernels see it."""
    return t if t.dim() == 4 else t[None]
