"""Launch configurations worth trying for a kernel, and what the compiler says of each, for a GPU that need not be here.

`python -m labutils tune` times those that pass; `--compile-only` prints the list. The entries of the launch table for
GPUs that nobody timed are `best_by_resources` of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from labutils.attention.kernels import launch_config, launch_table
from labutils.attention.kernels.launch_config import DTYPE_CLASSES, LaunchConfig, Place
from labutils.attention.tuning import compiled
from labutils.attention.tuning.compiled import Request, Resources
from labutils.machine import chips

PROGRAMS = {"v1": "v1", "forward": "forward", "dkdv": "backward", "dq": "backward", "decode": "decode"}
"""The program of `compiled` that launches each kernel."""

NAMES = {
    "v1": "flash_v1._forward_kernel",
    "forward": "flash_v2._forward_kernel",
    "dkdv": "flash_v2_backward._dkdv_kernel",
    "dq": "flash_v2_backward._dq_kernel",
    "decode": "flash_decode._decode_kernel",
}
"""What `compiled.Resources.kernel` calls each kernel of the launch table."""

REPRESENTATIVE = {"16 bit": torch.float16, "float32": torch.float32}
"""The dtype that is compiled for a class; bfloat16 takes what float16 takes."""

# A thread has 255 registers. Of what a tile keeps in them all the time, so many numbers a thread are worth compiling:
# with more it spills, with fewer there is a larger tile that fits as well. Without tensor cores the operands are in
# registers, too.
_HELD = {True: (64, 192), False: (8, 64)}
_SPILLED = 64  # bytes a thread; the compiler keeps addresses there that it reads once, which costs little
_WITH_TMA = ("forward", "dkdv", "dq")


def _held(kernel: str, m: int, n: int, block_d: int) -> int:
    """Numbers of float32 that a program keeps: accumulators and scores."""
    accumulators = {"dkdv": 2 * n * block_d}.get(kernel, m * block_d)
    scores = m * n * (2 if kernel in ("dkdv", "dq") else 1)
    return accumulators + scores


def candidates(place: Place, capability: tuple[int, int]) -> list[LaunchConfig]:
    """Configurations that may be good, the entry in force without a tuning first.

    Args:
        place: which kernel, for what.
        capability: of the GPU, a key of `chips.GPUS`.

    Raises:
        RuntimeError: the shipped table has no entry: nothing fits this GPU.
    """
    shipped = launch_table.shipped(place, capability)
    found = [shipped]
    tensor_cores = place.dtype == "16 bit" and capability >= chips.TENSOR_CORES
    least, most = _HELD[tensor_cores]
    if place.kernel == "decode":
        least //= 4  # memory is its bound: small tiles do as well
    sizes = (32, 64, 128) if tensor_cores and place.head_dim <= 128 and place.kernel != "decode" else (16, 32, 64)
    through: tuple[bool, ...] = (shipped.tma,)
    if capability >= chips.TMA and tensor_cores and place.kernel in _WITH_TMA and not shipped.tma:
        through = (False, True)  # where descriptors were timed, they won
    for m, n, warps in itertools.product(sizes, sizes, (4, 8)):
        if not least <= _held(place.kernel, m, n, place.head_dim) / (chips.WARP_SIZE * warps) <= most:
            continue
        for stages, tma in itertools.product((1, 2) if place.head_dim > 128 else (2, 3), through):
            config = LaunchConfig(m, n, warps, stages, tma)
            if _tiles_kib(place, config) <= chips.GPUS[capability].shared_kib:
                found.append(config)
    return list(dict.fromkeys(found))


def _tiles_kib(place: Place, config: LaunchConfig) -> float:
    """Shared memory of the tiles in flight, in KiB; at least: a first sieve, so that less is compiled in vain."""
    rows = config.block_m if place.kernel == "dkdv" else config.block_n
    in_bytes = 2 if place.dtype == "16 bit" else 4
    return 2 * rows * place.head_dim * max(1, config.num_stages - 1) * in_bytes / 1024


@dataclass(frozen=True)
class Compiled:
    """A candidate and what it takes.

    Attributes:
        config: the candidate. resources: of its launch, with registers and spills.
        reason: why it is not worth timing; "" where it is.
    """

    config: LaunchConfig
    resources: Resources
    reason: str


def _reason(resources: Resources) -> str:
    gpu = chips.GPUS[resources.capability]
    if not resources.fits:
        return f"too large: {resources.shared_bytes / 1024:.0f} of {gpu.shared_kib} KiB of shared memory"
    if not resources.blocks_per_sm:
        return "no block of it fits a multiprocessor"
    assert resources.spilled_bytes is not None  # they are of a complete compilation
    if resources.spilled_bytes > _SPILLED:
        return f"spills {resources.spilled_bytes} bytes a thread"
    if resources.overwritten:
        return f"a race: {resources.overwritten} instructions write registers that a product in flight reads"
    return ""


def compile_candidates(
    place: Place,
    capability: tuple[int, int],
    configs: Sequence[LaunchConfig] | None = None,
    *,
    processes: int = 1,
    done: Callable[[int], None] = lambda count: None,
) -> list[Compiled]:
    """What the compiler says of candidates: registers, spills, shared memory, occupancy.

    Args:
        place: which kernel, for what. capability: of the GPU, which need not be here.
        configs: what to compile; `candidates` where not given.
        processes: how many compile at once.
        done: told how many more have been compiled.

    Raises:
        RuntimeError: one does not compile at all.
    """
    configs = candidates(place, capability) if configs is None else configs
    found = []
    for start in range(0, len(configs), _TOGETHER * processes):
        some = configs[start : start + _TOGETHER * processes]
        requests = [_request(place, capability, config) for config in some]
        for config, resources in zip(some, compiled.resources_of(requests, binaries=True, processes=processes)):
            [one] = [cost for cost in resources if cost.kernel == NAMES[place.kernel]]
            found.append(Compiled(config, one, _reason(one)))
        done(len(some))
    return found


_TOGETHER = 4  # candidates that a process compiles before it reports: starting one takes two seconds


def _request(place: Place, capability: tuple[int, int], config: LaunchConfig) -> Request:
    program = PROGRAMS[place.kernel]
    causal = place.causal is not False
    return Request(
        program, place.head_dim, REPRESENTATIVE[place.dtype], capability, causal, config=config,
        only=NAMES[place.kernel],
    )  # fmt: skip


def best_by_resources(found: Iterable[Compiled]) -> LaunchConfig | None:
    """The candidate that ought to be good, where none can be timed; None where all of them spill or do not fit.

    Of those that fit and spill nothing: on 10.0 first those that keep accumulators in tensor memory, since the products
    of the others run on the units of older GPUs. Then those of which two blocks or more share a multiprocessor, with
    eight warps or more, so that one computes exponents while another multiplies (what won on the H200); then those with
    eight warps at all. Of these the one that keeps the most rows while the others pass by (queries; in dK/dV keys):
    what passes by is loaded that much less often. Of equals the one with more rows passing by in a tile, then with more
    warps on a multiprocessor, then with more tiles in flight.
    """

    def order(c: Compiled) -> tuple:
        blocks = c.resources.blocks_per_sm
        assert blocks is not None  # else `_reason` said so, and it is not usable
        warps = blocks * c.config.num_warps
        kept, passing = c.config.block_m, c.config.block_n
        if c.resources.kernel == NAMES["dkdv"]:
            kept, passing = passing, kept
        modern = c.resources.tensor_columns > 0
        return (modern, blocks >= 2 and warps >= 8, warps >= 8, kept, passing, warps, c.config.num_stages, c.config.tma)

    usable = [c for c in found if not c.reason and c.resources.spilled_bytes == 0]
    return max(usable, key=order).config if usable else None


def places(
    kernels: Iterable[str] = launch_config.KERNELS,
    head_dims: Iterable[int] = launch_config.HEAD_DIMS,
    dtypes: Iterable[str] = DTYPE_CLASSES,
    capability: tuple[int, int] | None = None,
) -> list[Place]:
    """All places of the launch table with these kernels, head dimensions and dtypes; those that `capability` has."""
    found = []
    for dtype, kernel, head_dim in itertools.product(dtypes, kernels, head_dims):
        for causal in (None,) if kernel in launch_config.ONE_FOR_BOTH_MASKS else (False, True):
            place = Place(kernel, head_dim, causal, dtype)
            if capability is None or launch_table.has(place, capability):
                found.append(place)
    return found
