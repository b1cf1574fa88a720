"""What a launch configuration is (`LaunchConfig`), and which calls an entry of a launch table serves (`Place`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

KERNELS = ("v1", "forward", "dkdv", "dq", "decode")
ONE_FOR_BOTH_MASKS = ("v1", "decode")
"""Kernels whose entries serve both masks. The other kernels have one entry for causal and one for full attention."""

HEAD_DIMS = (64, 128, 256)
"""An entry serves the head dimensions up to one of these."""

DTYPE_CLASSES = ("16 bit", "float32")
SMALLEST_BLOCK = 16  # tl.dot takes no smaller tile


# Triton has both of the next functions. Called by the host, its own take microseconds each, several times a launch.
def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n; n is 1 or more."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is launched.

    Attributes:
        block_m: rows (queries) per tile. block_n: columns (keys) per tile. Powers of two, 16 or more.
        num_warps: warps of 32 threads per program.
        num_stages: depth of the software pipeline of the inner loop: tiles in flight at once.
        tma: read the tiles of the inner loop through tensor descriptors, if the tensors allow it.
        source: the file of the user's table that it comes from, else "".
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2
    tma: bool = False
    source: str = field(default="", compare=False, repr=False)

    @staticmethod
    def block_d(head_dim: int) -> int:
        """Columns of a tile for one head: a power of two, as `tl.arange` demands."""
        return max(SMALLEST_BLOCK, next_power_of_2(head_dim))


class Place(NamedTuple):
    """Which calls an entry of a launch table serves.

    Attributes:
        kernel: one of `KERNELS`. head_dim: one of `HEAD_DIMS`, the largest D of these calls.
        causal: whether the causal mask is on; None for both masks. dtype: one of `DTYPE_CLASSES`.
    """

    kernel: str
    head_dim: int
    causal: bool | None
    dtype: str

    @staticmethod
    def of(kernel: str, head_dim: int, causal: bool, dtype: torch.dtype) -> Place:
        """The place of a call. No entry serves a head dimension above the largest of `HEAD_DIMS`."""
        block_d = LaunchConfig.block_d(head_dim)
        size = next((size for size in HEAD_DIMS if block_d <= size), block_d)
        kind = "float32" if dtype == torch.float32 else "16 bit"
        return Place(kernel, size, None if kernel in ONE_FOR_BOTH_MASKS else causal, kind)

    def __str__(self) -> str:
        mask = {None: "", False: ", full", True: ", causal"}[self.causal]
        return f"{self.kernel}, D up to {self.head_dim}{mask}, {self.dtype}"
