"""The shipped launch table: blocks, warps and stages of each kernel on each generation of GPUs.

`python -m labutils tune` times other configurations on the user's GPU; `tuned_table` keeps the winners.
"""

from __future__ import annotations

from labutils.attention.kernels.launch_config import KERNELS, LaunchConfig, Place
from labutils.machine import chips

# The keys are (kernel, largest BLOCK_D, causal); a key without the third serves both masks. The entries are block_m,
# block_n, num_warps, num_stages, tma.
#
# float16 and bfloat16 on 9.0: the fastest of 12 to 30 candidates for each entry, on an H200, at N = 1,024 and 4,096
# taken together. v1 and head dimension 256 were not searched.
_HOPPER = {
    ("v1", 64): LaunchConfig(64, 64, 4, 2),
    ("v1", 128): LaunchConfig(64, 32, 4, 2),
    ("forward", 64): LaunchConfig(64, 128, 4, 2, True),
    ("forward", 128): LaunchConfig(128, 64, 4, 2, True),
    ("forward", 256): LaunchConfig(128, 64, 8, 2, True),
    ("dkdv", 64, False): LaunchConfig(64, 64, 4, 3, True),
    ("dkdv", 64, True): LaunchConfig(64, 64, 4, 2, True),
    ("dkdv", 128): LaunchConfig(64, 64, 4, 2, True),
    ("dkdv", 256): LaunchConfig(32, 64, 8, 2, True),
    ("dq", 64): LaunchConfig(128, 64, 4, 3, True),
    ("dq", 128): LaunchConfig(128, 64, 8, 3, True),
    ("dq", 256): LaunchConfig(64, 32, 8, 2, True),
    ("decode", 64): LaunchConfig(64, 128, 4, 3),
    ("decode", 128): LaunchConfig(64, 128, 4, 3),
    ("decode", 256): LaunchConfig(32, 32, 8, 3),
}
# The other tables were NOT TIMED. For forward, dK/dV and dQ at 64 and 128, `tuning.candidates.best_by_resources` chose
# the entry on each architecture, among the candidates that `tune --compile-only` lists, causal, with triton 3.7.1. Its
# rule: no register spilled, two blocks on a multiprocessor if possible, then the most rows kept. v1, decoding and 256
# were chosen to fit.
#
# 8.6, 8.9 and 12.0: 99 KiB of shared memory for a block. The candidates were compiled for 8.6; 8.9 and 12.0 have the
# same limits. Earlier entries were worse: 64 x 64 for dK/dV at 64 spilled 288 bytes a thread on 8.6 and 432 on 12.0,
# and the forward's left room for only one block of four warps.
_SMALL = {
    ("v1", 64): LaunchConfig(64, 64, 4, 2),
    ("v1", 128): LaunchConfig(64, 32, 4, 2),
    ("forward", 64): LaunchConfig(128, 64, 4, 2),
    ("forward", 128): LaunchConfig(64, 32, 4, 2),
    ("forward", 256): LaunchConfig(64, 32, 8, 1),
    ("dkdv", 64): LaunchConfig(32, 64, 4, 3),
    ("dkdv", 128): LaunchConfig(32, 32, 4, 2),
    ("dkdv", 256): LaunchConfig(16, 32, 4, 1),
    ("dq", 64): LaunchConfig(128, 32, 4, 3),
    ("dq", 128): LaunchConfig(64, 64, 8, 2),
    ("dq", 256): LaunchConfig(32, 16, 4, 1),
    ("decode", 64): LaunchConfig(64, 64, 4, 3),
    ("decode", 128): LaunchConfig(32, 64, 4, 2),
    ("decode", 256): LaunchConfig(16, 32, 4, 2),
}
# 8.0: 163 KiB, so two blocks with larger tiles fit on a multiprocessor. 256 was chosen by the same rule, among six
# candidates for each kernel.
_AMPERE = _SMALL | {
    ("forward", 128): LaunchConfig(64, 64, 4, 2),
    ("forward", 256): LaunchConfig(64, 64, 8, 2),
    ("dkdv", 128): LaunchConfig(32, 32, 4, 3),
    ("dkdv", 256): LaunchConfig(32, 32, 8, 1),
    ("dq", 128): LaunchConfig(64, 32, 4, 3),
    ("dq", 256): LaunchConfig(32, 32, 4, 2),
}
# 10.0: 227 KiB, and tensor memory for the accumulators of products with 64 rows or more. Products with fewer rows run
# on the units of older GPUs. The entries of 9.0 would spill 56 (forward) and 272 bytes a thread (dK/dV) at 128. dQ at
# 128 and all entries for 256 are the same as on 9.0.
_BLACKWELL = {place: config for place, config in _HOPPER.items() if place[:2] != ("dkdv", 64)} | {
    ("forward", 64): LaunchConfig(128, 64, 4, 3, True),
    ("forward", 128): LaunchConfig(128, 32, 8, 2, True),
    ("dkdv", 64): LaunchConfig(32, 128, 4, 3, True),
    ("dkdv", 128): LaunchConfig(64, 64, 8, 3, True),
    ("dq", 64): LaunchConfig(128, 64, 8, 3, True),
}
# float32 products run on the plain units, with operands in registers: 32 x 32 does not spill.
_SMALLEST = {(kernel, 256): LaunchConfig(16, 16, 4, 1) for kernel in KERNELS}
_FLOAT32 = {(kernel, 128): LaunchConfig(32, 32, 4, 2) for kernel in KERNELS} | _SMALLEST
# Turing: Triton emits no tensor-core instructions for it, so tiles must stay as small as for float32, and one stage
# keeps them within its 64 KiB. In float32 at 256, dK/dV needs more than that even with the smallest tiles: no entry.
# In 16 bits, two to four tiles were compiled for each of forward, dQ and dK/dV at 64 and 128 and decoding at 128. The
# entries spill nothing; 32 x 32 spilled 500 bytes a thread in the forward at 128, and up to 2,900 in the backward.
_TURING = (
    {(kernel, 128): LaunchConfig(32, 32, 4, 1) for kernel in KERNELS}
    | _SMALLEST
    | {
        ("forward", 64): LaunchConfig(32, 32, 4, 1),
        ("forward", 128): LaunchConfig(32, 16, 4, 1),
        ("dkdv", 64): LaunchConfig(16, 32, 4, 1),
        ("dkdv", 128): LaunchConfig(16, 16, 8, 1),
        ("dq", 64): LaunchConfig(32, 16, 4, 1),
        ("dq", 128): LaunchConfig(16, 16, 8, 1),
        ("decode", 64): LaunchConfig(32, 32, 4, 1),
        ("decode", 128): LaunchConfig(32, 16, 4, 1),
    }
)
_TURING_FLOAT32 = (
    {(kernel, 64): LaunchConfig(32, 32, 4, 1) for kernel in KERNELS}
    | {(kernel, 128): LaunchConfig(16, 16, 4, 1) for kernel in KERNELS}
    | {place: config for place, config in _SMALLEST.items() if place != ("dkdv", 256)}
)


def _table(capability: tuple[int, int], dtype: str) -> dict[tuple, LaunchConfig]:
    if capability < chips.TENSOR_CORES:
        return _TURING_FLOAT32 if dtype == "float32" else _TURING
    if dtype == "float32":
        return _FLOAT32
    own: dict[tuple[int, int], dict[tuple, LaunchConfig]]
    own = {chips.AMPERE: _AMPERE, chips.HOPPER: _HOPPER, chips.BLACKWELL: _BLACKWELL}
    return own.get(capability, _SMALL)


def _find(place: Place, capability: tuple[int, int]) -> LaunchConfig | None:
    table = _table(capability, place.dtype)
    fitting = [
        key
        for key in table
        if key[0] == place.kernel and key[1] >= place.head_dim and (len(key) == 2 or key[2] == place.causal)
    ]
    return table[min(fitting, key=lambda key: key[1])] if fitting else None


def has(place: Place, capability: tuple[int, int]) -> bool:
    """Whether the shipped table has an entry: some kernels do not fit some GPUs."""
    return _find(place, capability) is not None


def shipped(place: Place, capability: tuple[int, int]) -> LaunchConfig:
    """The shipped entry.

    Raises:
        RuntimeError: there is no entry, since no configuration fits that GPU.
    """
    config = _find(place, capability)
    if config is None:
        remedy = "use torch.float16, or split the heads" if place.dtype == "float32" else "split the heads"
        raise RuntimeError(
            f"a GPU of compute capability {chips.dotted(capability)} has too little shared memory for the kernel "
            f"{place.kernel!r} at head dimension {place.head_dim} in {place.dtype}: {remedy}."
        )
    return config
