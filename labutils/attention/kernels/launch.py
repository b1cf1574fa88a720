"""How a kernel is launched: its launch configuration, tensor descriptors for the copy engine, the launch itself."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from labutils.attention.kernels import tuned_table
from labutils.attention.kernels.launch_config import SMALLEST_BLOCK, LaunchConfig, Place, next_power_of_2
from labutils.machine import chips

# Triton compiles a kernel anew if an integer argument is 1 or a multiple of 16. It must not for these arguments:
# decoding brings a new length with every token, and packing another number of rows with every batch.
SEQUENCE_LENGTHS = ("N_Q", "N_K", "TOTAL_Q", "TOTAL_K", "BLOCKS")
CACHE_SIZES = ("CAPACITY", "PLACES", "POSITIONS")  # nor for these: a cache may be allocated anew for each token
# The interpreter's time grows with the number of tiles, hardly with their size.
_INTERPRETER_BLOCK = 128


@functools.cache
def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


def pick_config(
    kernel: str, head_dim: int, dtype: torch.dtype, causal: bool, device: torch.device, *, longest: int
) -> LaunchConfig:
    """The launch configuration for a kernel on a device: the user's own if they have tuned it, else the shipped one.

    Args:
        kernel: one of `launch_config.KERNELS`.
        head_dim: D. dtype: the dtype of q. causal: whether the causal mask is on.
        device: the tensors' device; the CPU means the interpreter.
        longest: the longer of N_q and N_k. The interpreter takes no larger tiles than that.

    Raises:
        RuntimeError: the GPU is older than compute capability 7.5, its shared memory is too small, or the user's table
            cannot be used (see `tuned_table.tuned_here`).
    """
    if device.type == "cpu":
        block = min(_INTERPRETER_BLOCK, max(SMALLEST_BLOCK, next_power_of_2(longest)))
        return LaunchConfig(block, block)
    capability = _capability(device.index or 0)
    # Tensors without data stand for a GPU that is not here: its user's table is not known.
    return _picked(kernel, head_dim, dtype, causal, capability, device.index or 0 if device.type == "cuda" else None)


@functools.cache
def _picked(
    kernel: str, head_dim: int, dtype: torch.dtype, causal: bool, capability: tuple[int, int], device_index: int | None
) -> LaunchConfig:
    """`pick_config` on a GPU, which looks up each configuration once: a backward pass asks three times."""
    if capability < chips.OLDEST:
        raise RuntimeError(
            f"GPU {device_index or 0} has compute capability {chips.dotted(capability)}: Triton compiles for "
            f"{chips.dotted(chips.OLDEST)} or higher. Set LABUTILS_DEVICE=cpu to run in the interpreter, or use "
            "torch.nn.functional.scaled_dot_product_attention, which has kernels for older GPUs."
        )
    return tuned_table.in_force(Place.of(kernel, head_dim, causal, dtype), capability, device_index)


def descriptors_fit(*tensors: torch.Tensor) -> bool:
    """Whether `describe` can describe these (B, N, H, D) tensors: the copy engine needs multiples of 16 bytes."""

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
    # PyTorch allows any stride for a dimension of size 1, but a descriptor needs a multiple of 16 bytes.
    strides = [t.stride(i) if t.shape[i] > 1 else 128 for i in order[:3]]
    return TensorDescriptor(t, [t.shape[i] for i in order], [*strides, 1], [1, 1, rows, block_d])


def describe_vectors(t: torch.Tensor, rows: int) -> TensorDescriptor:
    """A descriptor of lse or Δ, contiguous (B, H, N), as (B * H, N), for `rows` numbers of one head."""
    return TensorDescriptor(t, [t.shape[0] * t.shape[1], t.shape[2]], [t.shape[2], 1], [1, rows])


class _Thread(threading.local):
    ready = False


this_thread = _Thread()
"""`ready` is True in a thread that has a CUDA context: see `make_context_current`."""


def make_context_current() -> None:
    """Gives this thread the CUDA context that PyTorch uses, if the thread has no context yet.

    PyTorch makes a context current only with a thread's first work on the GPU. But the driver's function that makes
    tensor maps for the copy engine needs a context before that. Nothing here waits for the GPU.
    """
    if not torch.cuda.is_initialized():
        return
    driver = ctypes.CDLL("libcuda.so.1")  # PyTorch has loaded it already
    device, context = ctypes.c_int(), ctypes.c_void_p()
    # Each function returns 0 if it succeeded. If one fails, the launch says why.
    if (
        driver.cuCtxGetCurrent(ctypes.byref(context)) == 0
        and not context.value
        and driver.cuDeviceGet(ctypes.byref(device), torch.cuda.current_device()) == 0
        and driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
    ):
        driver.cuCtxSetCurrent(context)
    this_thread.ready = True


class Launch(NamedTuple):
    """A launch that was made, with all that a `replay.Replay` needs to make it again. It holds the launch's tensors.

    Attributes:
        compiled: the kernel as Triton compiled it. names: the names of its arguments, in its order.
        grid: three numbers. positional: the arguments in order. constants: the arguments given by name.
    """

    compiled: Any
    names: Sequence[str]
    grid: tuple[int, int, int]
    positional: tuple
    constants: dict[str, Any]

    def in_order(self) -> list:
        """All of the kernel's arguments, in its order, constants included."""
        named = dict(zip(self.names, self.positional, strict=False)) | self.constants
        return [named[name] for name in self.names]


def launch(kernel: Any, grid: tuple[int], config: LaunchConfig, *args: Any, **constants: Any) -> Launch | None:
    """Launches a kernel on the device of its first argument. With an empty grid nothing is launched.

    Returns:
        The launch, for a `replay.Replay`; None in the interpreter and with an empty grid.

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
        with torch.cuda.device(device):  # Triton launches on the current device, not on the tensors' device
            if not this_thread.ready:
                make_context_current()
            compiled = kernel[grid](*args, **constants, **options)
    except OutOfResources as error:
        remedy = "pass a `config` with smaller blocks or fewer stages, or use a smaller head dimension"
        if config.source:
            remedy = (
                f"it comes from {config.source}. Measure again with `python -m labutils tune`, or remove that table "
                "with `python -m labutils tune --reset`"
            )
        raise RuntimeError(f"{error}. This GPU is too small for {config}: {remedy}.") from error
    return Launch(compiled, kernel.arg_names, (*grid, 1, 1), args, constants)
