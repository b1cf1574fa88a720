"""Launch configurations worth trying for a kernel, and what the compiler says of each; the GPU need not be here.

`python -m labutils tune` times the candidates that pass, and `--compile-only` prints the list. For GPUs that nobody
timed, the entries of the launch table are `best_by_resources` of such a list.
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

PROGRAM_OF = {"v1": "v1", "forward": "forward", "dkdv": "backward", "dq": "backward", "decode": "decode"}
"""For each kernel of the launch table, the program of `compiled` that launches it."""

COMPILED_NAMES = {
    "v1": "flash_v1._forward_kernel",
    "forward": "flash_v2._forward_kernel",
    "dkdv": "flash_v2_backward._dkdv_kernel",
    "dq": "flash_v2_backward._dq_kernel",
    "decode": "flash_decode._decode_kernel",
}
"""For each kernel of the launch table, its name in `compiled.Resources.kernel`."""

REPRESENTATIVE = {"16 bit": torch.float16, "float32": torch.float32}
"""For each class of dtypes, the dtype that is compiled; bfloat16 needs the same resources as float16."""

# A thread has 255 registers. A tile is worth compiling if it keeps so many numbers in the registers of a thread all the
# time. With more it spills; with fewer a larger tile fits as well. The key says whether the kernel uses tensor cores:
# without them the operands are in registers, too.
_HELD = {True: (64, 192), False: (8, 64)}
_SPILLED = 64  # bytes a thread: the compiler spills addresses that it reads once, which costs little
_WITH_TMA = ("forward", "dkdv", "dq")


def _held(kernel: str, m: int, n: int, block_d: int) -> int:
    """How many float32 numbers a program keeps: accumulators and scores."""
    accumulators = {"dkdv": 2 * n * block_d}.get(kernel, m * block_d)
    scores = m * n * (2 if kernel in ("dkdv", "dq") else 1)
    return accumulators + scores


def candidates(place: Place, capability: chips.Capability) -> list[LaunchConfig]:
    """Configurations that may be good; the shipped entry comes first.

    Args:
        place: the kernel and the inputs that the configuration is for.
        capability: of the GPU, a key of `chips.GPUS`.

    Raises:
        RuntimeError: the shipped table has no entry, since nothing fits this GPU.
    """
    shipped = launch_table.shipped(place, capability)
    found = [shipped]
    tensor_cores = place.dtype == "16 bit" and capability >= chips.TENSOR_CORES
    least, most = _HELD[tensor_cores]
    if place.kernel == "decode":
        least //= 4  # memory bounds it: small tiles do as well
    sizes = (32, 64, 128) if tensor_cores and place.head_dim <= 128 and place.kernel != "decode" else (16, 32, 64)
    through: tuple[bool, ...] = (shipped.tma,)
    if capability >= chips.TMA and tensor_cores and place.kernel in _WITH_TMA and not shipped.tma:
        through = (False, True)  # where both were timed, descriptors won
    for m, n, warps in itertools.product(sizes, sizes, (4, 8)):
        if not least <= _held(place.kernel, m, n, place.head_dim) / (chips.WARP_SIZE * warps) <= most:
            continue
        for stages, tma in itertools.product((1, 2) if place.head_dim > 128 else (2, 3), through):
            config = LaunchConfig(m, n, warps, stages, tma)
            if _tiles_kib(place, config) <= chips.GPUS[capability].shared_kib:
                found.append(config)
    return list(dict.fromkeys(found))


def _tiles_kib(place: Place, config: LaunchConfig) -> float:
    """Least shared memory of the tiles in flight, in KiB: it rules out candidates before they are compiled."""
    rows = config.block_m if place.kernel == "dkdv" else config.block_n
    in_bytes = 2 if place.dtype == "16 bit" else 4
    return 2 * rows * place.head_dim * max(1, config.num_stages - 1) * in_bytes / 1024


@dataclass(frozen=True)
class Compiled:
    """A candidate and what it needs.

    Attributes:
        config: the candidate. resources: of its launch, with registers and spills.
        reason: why it is not worth timing; "" if it is.
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
    assert resources.spilled_bytes is not None  # the compilation was complete
    if resources.spilled_bytes > _SPILLED:
        return f"spills {resources.spilled_bytes} bytes a thread"
    if resources.overwritten:
        return f"a race: {resources.overwritten} instructions write registers that a product in flight reads"
    return ""


def compile_candidates(
    place: Place,
    capability: chips.Capability,
    configs: Sequence[LaunchConfig] | None = None,
    *,
    processes: int = 1,
    done: Callable[[int], None] = lambda count: None,
) -> list[Compiled]:
    """What the compiler says of candidates: registers, spills, shared memory, occupancy.

    Args:
        place: the kernel and its inputs. capability: of the GPU, which need not be here.
        configs: what to compile; None: `candidates`.
        processes: how many compile at once.
        done: called with the number of candidates that have been compiled since its last call.

    Raises:
        RuntimeError: a candidate does not compile at all.
    """
    configs = candidates(place, capability) if configs is None else configs
    found = []
    for start in range(0, len(configs), _TOGETHER * processes):
        some = configs[start : start + _TOGETHER * processes]
        requests = [_request(place, capability, config) for config in some]
        for config, resources in zip(some, compiled.resources_of(requests, binaries=True, processes=processes)):
            [one] = [cost for cost in resources if cost.kernel == COMPILED_NAMES[place.kernel]]
            found.append(Compiled(config, one, _reason(one)))
        done(len(some))
    return found


_TOGETHER = 4  # candidates that a process compiles before it ends: starting a process takes two seconds


def _request(place: Place, capability: chips.Capability, config: LaunchConfig) -> Request:
    program = PROGRAM_OF[place.kernel]
    causal = place.causal is not False
    return Request(
        program, place.head_dim, REPRESENTATIVE[place.dtype], capability, causal, config=config,
        only=COMPILED_NAMES[place.kernel],
    )  # fmt: skip


def best_by_resources(found: Iterable[Compiled]) -> LaunchConfig | None:
    """The candidate that ought to be good, if nobody can time them; None if all of them spill or do not fit.

    Candidates that spill or do not fit are out. The others are compared by these criteria, one after another:

    1. accumulators in tensor memory, on 10.0: without it the products run on the units of older GPUs;
    2. two blocks or more on a multiprocessor with eight warps or more, so that one block computes exponents while
       another multiplies (such candidates won on the H200);
    3. eight warps or more on a multiprocessor;
    4. more rows that a program keeps (queries; keys in dK/dV), since the other rows are then loaded less often;
    5. more of the other rows in a tile;
    6. more warps on a multiprocessor; 7. more tiles in flight; 8. tensor descriptors.
    """

    def order(c: Compiled) -> tuple:
        blocks = c.resources.blocks_per_sm
        assert blocks is not None  # the compilation was complete
        warps = blocks * c.config.num_warps
        kept, passing = c.config.block_m, c.config.block_n
        if c.resources.kernel == COMPILED_NAMES["dkdv"]:
            kept, passing = passing, kept
        modern = c.resources.tensor_columns > 0
        return (modern, blocks >= 2 and warps >= 8, warps >= 8, kept, passing, warps, c.config.num_stages, c.config.tma)

    usable = [c for c in found if not c.reason and c.resources.spilled_bytes == 0]
    return max(usable, key=order).config if usable else None


def places(
    kernels: Iterable[str] = launch_config.KERNELS,
    head_dims: Iterable[int] = launch_config.HEAD_DIMS,
    dtypes: Iterable[str] = DTYPE_CLASSES,
    capability: chips.Capability | None = None,
) -> list[Place]:
    """The places of the launch table with these kernels, head dimensions and dtypes.

    Args:
        kernels, head_dims, dtypes: as in a `Place`.
        capability: leaves out the places for which this GPU has no entry; None: all places.
    """
    found = []
    for dtype, kernel, head_dim in itertools.product(dtypes, kernels, head_dims):
        for causal in (None,) if kernel in launch_config.ONE_FOR_BOTH_MASKS else (False, True):
            place = Place(kernel, head_dim, causal, dtype)
            if capability is None or launch_table.has(place, capability):
                found.append(place)
    return found
