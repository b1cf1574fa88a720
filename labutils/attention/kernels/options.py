"""What a call asks for besides q, k and v (`Options`), and where a KV cache holds its keys (`Cache`).

Both have one form from the interface down to the kernels. A bound, a softcap or a tensor that a call does not use is
None.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

LARGEST_INT = 2**31 - 1  # kernels count rows in 32 bits


class Options(NamedTuple):
    """Everything that decides the result of attention besides q, k and v; for forward, backward and decoding.

    The operators of `attention.operators` take these fields as their arguments, in this order.

    Attributes:
        softmax_scale: positive factor on the scores.
        window_left, window_right: how many keys a query sees before and after its own place, aligned to the bottom
            right; None for no bound. Causal is (None, 0).
        softcap: c in c * tanh(score / c), or None.
        alibi_slopes: float32 (H,) or (B, H), or None.
        dropout_p: probability that a weight is dropped.
        seed: of dropout, int64 (1,) on the device, or None without dropout.
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
        longest_k = min(self.max_seqlen_k, self._packed_keys(k))
        return len(self.cu_seqlens_q) - 1, min(self.max_seqlen_q, q.shape[0]), longest_k

    def arguments(self) -> tuple:
        """The arguments of the forward and backward kernels from `cu_seqlens_q_ptr` to `window_right`, in order."""
        return (
            self.cu_seqlens_q, self.cu_seqlens_k, *self.slopes(),
            self.seed, self.dropout_p if self.seed is not None else None,
            self.softmax_scale, self.softcap, self.window_left, self.window_right,
        )  # fmt: skip

    def slopes(self) -> tuple:
        """The kernels' `slopes_ptr` and `stride_sb`, which is 0 if all sequences have the same slopes."""
        slopes = self.alibi_slopes
        return slopes, None if slopes is None else slopes.stride(0) if slopes.dim() == 2 else 0

    def paging(self, k: torch.Tensor) -> tuple:
        """The arguments `table_ptr`, `stride_tb` and `BLOCKS` of kernels that read keys from pages."""
        table = self.block_table
        return (None, None, None) if table is None else (table, table.stride(0), k.shape[0])

    def totals(self, q: torch.Tensor, k: torch.Tensor) -> tuple[int | None, int | None]:
        """The arguments `TOTAL_Q` and `TOTAL_K`, the rows of packed tensors: no row beyond them is ever touched."""
        return (None, None) if self.cu_seqlens_q is None else (q.shape[0], self._packed_keys(k))

    def _packed_keys(self, k: torch.Tensor) -> int:
        """The rows of packed keys, or with a block table the most keys that a sequence can have."""
        table = self.block_table
        return k.shape[0] if table is None else min(k.shape[1] * table.shape[1], LARGEST_INT)


class Cache(NamedTuple):
    """Where each sequence has its keys in a KV cache.

    Attributes:
        seqlens: int32 (B,), keys of each sequence in the cache, or None if all have `seqlen`. A negative number
            marks padding: such a sequence has no key, and nothing is appended to it.
        seqlen: keys of every sequence; with `seqlens`, the most that any sequence can have.
        batch_idx: int32 (B,), the cache's row for each sequence, or None if sequence b has row b.
        leftpad: int32 (B,), the place of each sequence's first key in its row, or None for 0.
        block_table: int32 (B, blocks of a sequence) of a paged cache, or None.
    """

    seqlens: torch.Tensor | None
    seqlen: int
    batch_idx: torch.Tensor | None = None
    leftpad: torch.Tensor | None = None
    block_table: torch.Tensor | None = None

    def arguments(self, k_cache: torch.Tensor) -> tuple:
        """The arguments of decoding and appending kernels from `seqlens_ptr` to `PLACES`, in order.

        `CAPACITY` is how many keys a sequence can have, and `PLACES` how many rows or blocks the cache has. Kernels
        compare what tensors hold with these numbers, which are None for what no tensor says.
        """
        table = self.block_table
        capacity = k_cache.shape[1] * (1 if table is None else table.shape[1])
        return (
            self.seqlens, self.batch_idx, self.leftpad, table, None if table is None else table.stride(0),
            None if self.seqlens is None else min(capacity, LARGEST_INT),
            None if self.batch_idx is table is None else k_cache.shape[0],
        )  # fmt: skip

    def page(self, k_cache: torch.Tensor) -> int:
        """Rows of a block; 0 without a block table."""
        return 0 if self.block_table is None else k_cache.shape[1]


def with_batch(t: torch.Tensor) -> torch.Tensor:
    """A tensor (B, N, H, D) as it is; a packed one (total, H, D) as a batch of one, as the kernels see it."""
    return t if t.dim() == 4 else t[None]
