"""Launch configurations: block sizes, warps and pipeline stages per kernel, head dimension, dtype and GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

KERNELS = ("v1", "forward", "dkdv", "dq", "decode")
SMALLEST_BLOCK = 16  # tl.dot takes no smaller tile
# Triton compiles a kernel anew for an integer argument that is 1 or a multiple of 16. For these it must not: decoding
# calls with a new length for every token.
SEQUENCE_LENGTHS = ("N_Q", "N_K")


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is launched.

    Attributes:
        block_m: rows (queries) per tile. block_n: columns (keys) per tile. Powers of two, 16 or more.
        num_warps: warps of 32 threads per program.
        num_stages: depth of the software pipeline of the inner loop: tiles in flight at once.
        tma: read the tiles of the inner loop through tensor descriptors, where the tensors allow it.
    """

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 2
    tma: bool = False

    @staticmethod
    def block_d(head_dim: int) -> int:
        """Columns of a tile that hold one head: a power of two, since `tl.arange` makes no other."""
        return max(SMALLEST_BLOCK, triton.next_power_of_2(head_dim))


# Tables by (kernel, BLOCK_D up to, causal); an entry without the third holds for both. Entries as in LaunchConfig:
# block_m, block_n, num_warps, num_stages, tma.
#
# float16 and bfloat16 where a block may use 227 KiB of shared memory (9.0, 10.0): of 12 to 30 candidates each the one
# with the least time on an H200 at N = 1,024 and 4,096 taken together (v1 and 256: not searched).
_SIXTEEN_BIT_LARGE = {
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
# The same for the other GPUs from Ampere on: chosen to fit the 99 KiB of 8.6, 8.9 and 12.0, by compiling; not timed.
_SIXTEEN_BIT_SMALL = {
    ("v1", 64): LaunchConfig(64, 64, 4, 2),
    ("v1", 128): LaunchConfig(64, 32, 4, 2),
    ("forward", 64): LaunchConfig(128, 64, 4, 3),
    ("forward", 128): LaunchConfig(64, 64, 4, 2),
    ("dkdv", 64): LaunchConfig(64, 64, 4, 2),
    ("dkdv", 128): LaunchConfig(32, 64, 4, 2),
    ("dq", 64): LaunchConfig(64, 64, 4, 2),
    ("dq", 128): LaunchConfig(64, 32, 4, 2),
    ("forward", 256): LaunchConfig(64, 32, 8, 1),
    ("dkdv", 256): LaunchConfig(16, 32, 4, 1),
    ("dq", 256): LaunchConfig(32, 16, 4, 1),
    ("decode", 64): LaunchConfig(64, 64, 4, 3),
    ("decode", 128): LaunchConfig(32, 64, 4, 2),
    ("decode", 256): LaunchConfig(16, 32, 4, 2),
}
# float32 products run on the plain units, with operands in registers: 32 x 32 is what does not spill.
_SMALLEST = {(kernel, 256): LaunchConfig(16, 16, 4, 1) for kernel in KERNELS}
_FLOAT32 = {(kernel, 128): LaunchConfig(32, 32, 4, 2) for kernel in KERNELS} | _SMALLEST
# Turing: Triton emits no tensor-core instruction for it, so tiles must stay as small as for float32, and one stage
# keeps them within its 64 KiB. In float32 at 256, dK/dV needs more than that even with the smallest tiles: no entry.
_TURING = {(kernel, 128): LaunchConfig(32, 32, 4, 1) for kernel in KERNELS} | _SMALLEST
_TURING_FLOAT32 = (
    {(kernel, 64): LaunchConfig(32, 32, 4, 1) for kernel in KERNELS}
    | {(kernel, 128): LaunchConfig(16, 16, 4, 1) for kernel in KERNELS}
    | {place: config for place, config in _SMALLEST.items() if place != ("dkdv", 256)}
)
# The interpreter's cost is per tile, hardly per element.
_INTERPRETER_BLOCK = 128


@functools.cache
def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


def pick_config(
    kernel: str, head_dim: int, dtype: torch.dtype, causal: bool, device: torch.device, *, longest: int
) -> LaunchConfig:
    """The launch configuration for a kernel on a device.

    Args:
        kernel: one of `KERNELS`.
        head_dim: D. dtype: of q. causal: whether the causal mask is on.
        device: where the tensors are; the CPU means the interpreter.
        longest: the longer of N_q and N_k; the interpreter takes no tile larger than it needs.

    Raises:
        RuntimeError: the GPU is older than compute capability 7.5, or its shared memory too small.
    """
    if device.type == "cpu":
        block = min(_INTERPRETER_BLOCK, max(SMALLEST_BLOCK, triton.next_power_of_2(longest)))
        return LaunchConfig(block, block)
    capability = _capability(device.index or 0)
    if capability < (7, 5):
        raise RuntimeError(
            f"GPU {device.index or 0} has compute capability {capability[0]}.{capability[1]}: Triton compiles for 7.5 "
            "or higher. Set LABUTILS_DEVICE=cpu to run in the interpreter, or use "
            "torch.nn.functional.scaled_dot_product_attention, which has kernels for older GPUs."
        )
    if capability < (8, 0):
        table = _TURING_FLOAT32 if dtype == torch.float32 else _TURING
    elif dtype == torch.float32:
        table = _FLOAT32
    else:
        table = _SIXTEEN_BIT_LARGE if capability in ((9, 0), (10, 0)) else _SIXTEEN_BIT_SMALL
    block_d = LaunchConfig.block_d(head_dim)
    fitting = [place for place in table if place[0] == kernel and place[1] >= block_d and place[2:] in ((), (causal,))]
    if not fitting:
        raise RuntimeError(
            f"a GPU of compute capability {capability[0]}.{capability[1]} has too little shared memory for the kernel "
            f"{kernel!r} at head dimension {head_dim} in {dtype}: use torch.float16, or split the heads."
        )
    return table[min(fitting, key=lambda place: place[1])]


def descriptors_fit(*tensors: torch.Tensor) -> bool:
    """Whether `describe` can describe these (B, N, H, D) tensors: what the copy engine asks of addresses."""

    def fits(t: torch.Tensor) -> bool:
        strides = [
            stride * t.element_size() for stride, size in zip(t.stride()[:-1], t.shape, strict=False) if size > 1
        ]
        return (
            t.numel() > 0
            and t.stride(-1) == 1
            and t.data_ptr() % 16 == 0
            and all(stride > 0 and stride % 16 == 0 for stride in strides)
        )

    return all(map(fits, tensors))


def describe(t: torch.Tensor, rows: int, block_d: int) -> TensorDescriptor:
    """A descriptor of a tensor (B, N, H, D), as (B, H, N, D), for tiles (rows, block_d) of one head."""
    order = (0, 2, 1, 3)
    # The stride of a dimension of one element says nothing in PyTorch, but a descriptor wants a multiple of 16 bytes.
    strides = [t.stride(i) if t.shape[i] > 1 else 128 for i in order[:3]]
    return TensorDescriptor(t, [t.shape[i] for i in order], [*strides, 1], [1, 1, rows, block_d])


def describe_vectors(t: torch.Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of lse or Δ, contiguous (B, H, N), as (B * H, N), for `rows` numbers of one head."""
    return TensorDescriptor(t, [t.shape[0] * t.shape[1], t.shape[2]], [t.shape[2], 1], [1, rows])


@dataclass(frozen=True)
class Launched:
    """A launch that can be done again without specialising its arguments anew.

    Attributes:
        start: called with `arguments`, or others of the same specialisation, launches on the current stream.
        arguments: all of the kernel's, in its order, constants included.
    """

    start: Callable
    arguments: tuple


def launch(kernel, grid: tuple[int], config: LaunchConfig, *args, **constants) -> Launched | None:
    """Starts a kernel on the device of its first argument. An empty grid starts nothing.

    Returns:
        What was launched, or None in the interpreter and for an empty grid.

    Raises:
        RuntimeError: the configuration needs more shared memory or registers than this GPU has.
    """
    if grid[0] == 0:
        return None
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
    constants |= {name: size for name, size in blocks.items() if name in kernel.arg_names}
    device = getattr(args[0], "base", args[0]).device
    if device.type == "cpu":
        kernel[grid](*args, **constants)
        return None
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    try:
        with torch.cuda.device(device):  # Triton launches on the current device, whatever holds the tensors
            compiled = kernel[grid](*args, **constants, **options)
    except OutOfResources as error:
        raise RuntimeError(
            f"{error}. This GPU is too small for {config}: pass a `config` with smaller blocks or fewer stages, or use "
            "a smaller head dimension."
        ) from error
    named = dict(zip(kernel.arg_names, args, strict=False)) | constants
    return Launched(compiled[(*grid, 1, 1)], tuple(named[name] for name in kernel.arg_names))
