"""A GPU's memory: a cap that imitates a smaller card, the peaks of a run, and giving memory back."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from labutils.machine import runtime

GIB = 2**30
"""Bytes in a GiB."""


@dataclass(frozen=True)
class Cap:
    """The limit that `memory_cap` enforces, and its parts, in GiB.

    Attributes:
        cap_gib: the size of the imitated card: as asked for, but at most the memory of this card.
        context_gib: memory of this GPU that is in use, but not by PyTorch's allocator.
        allocator_gib: what remains for PyTorch's allocator, `cap_gib - context_gib`: the enforced limit.
    """

    cap_gib: float
    context_gib: float
    allocator_gib: float

    def __str__(self) -> str:
        return (
            f"{self.cap_gib:.2f} GiB in all: {self.context_gib:.2f} GiB for the CUDA context, "
            f"{self.allocator_gib:.2f} GiB for tensors"
        )


@contextmanager
def memory_cap(gib: float) -> Iterator[Cap]:
    """Within this context, the GPU has `gib` GiB: a tensor that does not fit raises torch.OutOfMemoryError.

    The limit is set with `torch.cuda.set_per_process_memory_fraction`, which counts only the memory that PyTorch's
    allocator reserves. A real card of that size also holds the CUDA context: the driver's own data, loaded kernels,
    cuBLAS. So the context is measured first, and subtracted from the limit: it is the memory in use on the device
    (`torch.cuda.mem_get_info`) without the memory that the allocator holds. Memory of other programs on this GPU counts
    as context, too, so that the cap is rather too strict. Kernels that are loaded later make the context grow. It is
    measured again at the end, and a warning says if the sum went over the cap.

    A "16 GB" card has between 14.6 and 16.0 GiB (16e9 bytes are 14.9 GiB).

    Args:
        gib: size of the card to imitate; a smaller card is its own limit.

    Yields:
        The cap, with its measured parts.

    Raises:
        RuntimeError: there is no CUDA GPU; a CPU's memory cannot be capped this way.
        ValueError: the context, with or without the tensors that exist now, takes as much as the cap.
    """
    if runtime.device.type != "cuda":
        raise RuntimeError(
            "memory_cap imitates a smaller GPU with PyTorch's CUDA allocator, and the lab runs on the CPU "
            "here. Use it only if runtime.device.type == 'cuda'"
        )
    free_memory()
    _load_libraries()
    before = torch.cuda.get_per_process_memory_fraction()
    _, total = torch.cuda.mem_get_info()
    cap = _plan_cap(gib, total_bytes=total, context_bytes=_context_bytes())
    held = torch.cuda.memory_allocated() / GIB
    if held >= cap.allocator_gib:
        raise ValueError(
            f"{held:.2f} GiB of tensors are alive already, and a cap of {cap.cap_gib:.2f} GiB leaves "
            f"{cap.allocator_gib:.2f} GiB for them: delete models of earlier cells, or raise the cap"
        )
    torch.cuda.set_per_process_memory_fraction(cap.allocator_gib * GIB / total)
    torch.cuda.reset_peak_memory_stats()
    try:
        yield cap
    finally:
        torch.cuda.set_per_process_memory_fraction(before)
        peak = (torch.cuda.max_memory_reserved() + _context_bytes()) / GIB
        if peak > cap.cap_gib:
            warnings.warn(
                f"the CUDA context grew under the cap: with it {peak:.2f} GiB were in use, over the "
                f"{cap.cap_gib:.2f} GiB asked for",
                RuntimeWarning,
                stacklevel=3,
            )


def free_memory() -> None:
    """Deletes objects that nothing refers to any more, and gives the memory that PyTorch keeps back to the GPU."""
    gc.collect()
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()


def peaks_gib(device: torch.device) -> tuple[float, float]:
    """Peak allocated and reserved memory in GiB; NaN on a CPU, where PyTorch does not count it."""
    if device.type != "cuda":
        return float("nan"), float("nan")
    return torch.cuda.max_memory_allocated(device) / GIB, torch.cuda.max_memory_reserved(device) / GIB


def _plan_cap(gib: float, *, total_bytes: int, context_bytes: int) -> Cap:
    """The parts of a cap on a GPU with `total_bytes`, of which PyTorch's allocator does not hold `context_bytes`."""
    cap, context = min(gib, total_bytes / GIB), context_bytes / GIB
    if cap <= context:
        raise ValueError(
            f"a card of {cap:.2f} GiB has no room left: the CUDA context and other programs on this GPU take "
            f"{context:.2f} GiB. Raise the cap or close the other programs"
        )
    return Cap(cap_gib=cap, context_gib=context, allocator_gib=cap - context)


def _load_libraries() -> None:
    """Makes the CUDA context as large as training makes it: cuBLAS loads its kernels at the first product."""
    for dtype in {torch.float32, runtime.dtype}:
        square = torch.ones(256, 256, dtype=dtype, device=runtime.device)
        square @ square
    torch.cuda.synchronize()
    del square
    torch.cuda.empty_cache()  # not `free_memory`: collecting garbage takes a tenth of a second or more


def _context_bytes() -> int:
    """Memory in use on the GPU that PyTorch's allocator does not hold."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()
