"""NVIDIA's GPUs in one table: what each compute capability has and allows, and the peak rates of a few cards.

Nothing here asks the machine: `labutils.machine.runtime` says which GPU is in use. This module imports neither torch
nor `runtime`, so that `runtime`, command lines and child processes can read it.

    from labutils.machine import chips
    chips.GPUS[chips.HOPPER].shared_kib          # 227
    runtime.capability >= chips.TMA              # may a kernel load its tiles by tensor descriptors?
    chips.CARDS["A100"].processors               # 108
"""

from __future__ import annotations

from dataclasses import dataclass

Capability = tuple[int, int]
"""A compute capability: (9, 0) is 9.0. Tuples compare as the numbers do."""

TURING: Capability = (7, 5)
AMPERE: Capability = (8, 0)
AMPERE_RTX: Capability = (8, 6)
ADA: Capability = (8, 9)
HOPPER: Capability = (9, 0)
BLACKWELL: Capability = (10, 0)
BLACKWELL_RTX: Capability = (12, 0)

OLDEST = TURING
"""The oldest GPUs that Triton 3.6 to 3.9 compile for."""

TENSOR_CORES = AMPERE
"""From here on Triton multiplies 16-bit matrices on the tensor cores."""

BFLOAT16 = AMPERE
"""From here on GPUs compute in bfloat16."""

TMA = HOPPER
"""From here on a copy engine, the tensor memory accelerator, loads a tile that a tensor descriptor names."""

WARP_SIZE = 32
REGISTERS_PER_SM = 65_536
TENSOR_MEMORY_COLUMNS = 512  # of one SM of compute capability 10.0


@dataclass(frozen=True)
class Chip:
    """Limits of one compute capability.

    Attributes:
        names: examples of GPUs that have it, separated by commas.
        architecture: NVIDIA's name of the generation.
        shared_kib: shared memory that a block may use, in KiB.
        shared_kib_per_sm: shared memory of an SM, in KiB. From 8.0 on each block costs 1 KiB more than it uses.
        warps_per_sm, blocks_per_sm: the most that an SM holds at once.
    """

    names: str
    architecture: str
    shared_kib: int
    shared_kib_per_sm: int
    warps_per_sm: int
    blocks_per_sm: int


GPUS: dict[Capability, Chip] = {
    TURING: Chip("T4, RTX 2080", "Turing", 64, 64, 32, 16),
    AMPERE: Chip("A100, A30", "Ampere", 163, 164, 64, 32),
    AMPERE_RTX: Chip("RTX 3060, A10", "Ampere", 99, 100, 48, 16),
    ADA: Chip("RTX 4090, L4", "Ada Lovelace", 99, 100, 48, 24),
    HOPPER: Chip("H100, H200", "Hopper", 227, 228, 64, 32),
    BLACKWELL: Chip("B200", "Blackwell", 227, 228, 64, 32),
    BLACKWELL_RTX: Chip("RTX 5090", "Blackwell", 99, 100, 48, 24),
}
"""The GPUs that the lab knows, by compute capability.

Source: `arch_traits` in NVIDIA's CCCL, libcudacxx/include/cuda/__device/arch_traits.h."""


@dataclass(frozen=True)
class Card:
    """One GPU as its data sheet describes it. None: the lab has no source for it.

    Attributes:
        capability: a key of `GPUS`.
        processors: streaming multiprocessors (SMs).
        tflops: peak TFLOP/s of the tensor cores on 16-bit inputs with float32 sums, without sparsity.
        gb_per_s: peak GB/s (10^9 bytes) of the GPU's memory.
        mhz: highest clock of an SM, as `nvidia-smi --query-gpu=clocks.max.sm` says it on such a card.
        source: of the first three numbers.
    """

    capability: Capability
    processors: int
    tflops: float
    gb_per_s: float
    mhz: float | None
    source: str


CARDS: dict[str, Card] = {
    "T4": Card(
        TURING, 40, 65, 320, None,
        "NVIDIA T4 product page (mixed precision; 320 tensor cores, eight in an SM)",
    ),
    "A100": Card(
        AMPERE, 108, 312, 1555, None,
        "NVIDIA A100 Tensor Core GPU Architecture whitepaper (the card with 40 GB)",
    ),
    "RTX 4090": Card(
        ADA, 128, 165.2, 1008, None,
        "NVIDIA Ada GPU Architecture whitepaper, appendix A (FP16 with FP32 accumulate)",
    ),
    "H200": Card(
        HOPPER, 132, 989, 4800, 1980,
        "NVIDIA H200 data sheet (SXM; 1,979 TFLOPS with sparsity); NVIDIA H100 GPU Architecture whitepaper (SMs)",
    ),
}  # fmt: skip
"""Cards that the lab names, by NVIDIA's short name."""


def dotted(capability: Capability) -> str:
    """A compute capability as people write it: (9, 0) is "9.0"."""
    return f"{capability[0]}.{capability[1]}"


def undotted(text: str) -> Capability:
    """The compute capability of such a text: "9.0" is (9, 0).

    Raises:
        ValueError: the text is not two whole numbers with a dot between them.
    """
    major, minor = map(int, text.split("."))
    return major, minor
