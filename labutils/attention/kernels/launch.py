"""Starts kernels: which configuration a call gets, descriptors for its tensors, and the launch itself."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from triton import knobs
from triton.backends.nvidia.driver import make_tensordesc_arg
from triton.runtime import driver
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from labutils.attention.kernels import tuned_table
from labutils.attention.kernels.launch_config import SMALLEST_BLOCK, LaunchConfig, Place, next_power_of_2

# Triton compiles a kernel anew for an integer argument that is 1 or a multiple of 16. For these it must not: decoding
# calls with a new length for every token.
SEQUENCE_LENGTHS = ("N_Q", "N_K")
# The interpreter's cost is per tile, hardly per element.
_INTERPRETER_BLOCK = 128


@functools.cache
def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


def pick_config(
    kernel: str, head_dim: int, dtype: torch.dtype, causal: bool, device: torch.device, *, longest: int
) -> LaunchConfig:
    """The launch configuration for a kernel on a device: the user's own where they have tuned it, or the shipped one.

    Args:
        kernel: one of `launch_config.KERNELS`.
        head_dim: D. dtype: of q. causal: whether the causal mask is on.
        device: where the tensors are; the CPU means the interpreter.
        longest: the longer of N_q and N_k; the interpreter takes no tile larger than it needs.

    Raises:
        RuntimeError: the GPU is older than compute capability 7.5, or its shared memory too small; or the user's table
            cannot be used (see `tuned_table.tuned_here`).
    """
    if device.type == "cpu":
        block = min(_INTERPRETER_BLOCK, max(SMALLEST_BLOCK, next_power_of_2(longest)))
        return LaunchConfig(block, block)
    capability = _capability(device.index or 0)
    # Tensors without data stand for a GPU that is not here: what its user has tuned is not known.
    return _picked(kernel, head_dim, dtype, causal, capability, device.index or 0 if device.type == "cuda" else None)


@functools.cache
def _picked(
    kernel: str, head_dim: int, dtype: torch.dtype, causal: bool, capability: tuple[int, int], device_index: int | None
) -> LaunchConfig:
    """The same from what it depends on, looked up once for each: the backward pass asks three times a call."""
    if capability < (7, 5):
        raise RuntimeError(
            f"GPU {device_index or 0} has compute capability {capability[0]}.{capability[1]}: Triton compiles for 7.5 "
            "or higher. Set LABUTILS_DEVICE=cpu to run in the interpreter, or use "
            "torch.nn.functional.scaled_dot_product_attention, which has kernels for older GPUs."
        )
    return tuned_table.in_force(Place.of(kernel, head_dim, causal, dtype), capability, device_index)


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


class Launched:
    """A launch that can be done again with other tensors like those of the first one.

    Triton looks at each argument for every launch, makes what the copy engine needs of each descriptor, and asks the
    driver about each pointer. The second time all of that is known but the addresses. Triton's launcher takes an
    address as it is, and what a descriptor becomes (a tensor map, which says where a tensor lies and not what is in it)
    is kept for the addresses that come again.

    It holds no tensor: whoever launches again sees to it that there still is one at each address.

    Args:
        kernel: compiled. grid: three numbers. arguments: all of the kernel's, in its order, constants included.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int, int], arguments: Sequence):
        self._kernel, self._grid = kernel, grid
        self._run, self._function, self._metadata = kernel.run, kernel.function, kernel.packed_metadata
        descriptors = [argument for argument in arguments if type(argument) is TensorDescriptor]
        if descriptors:
            # The launcher within: what Triton wraps around it, `wrap_handle_tensordesc`, expands descriptors.
            self._run = copy.copy(kernel.run)
            self._run.launch = inspect.getclosurevars(kernel.run.launch).nonlocals["launcher"]
        about = iter(getattr(kernel.metadata, "tensordesc_meta", None) or [None] * len(descriptors))
        self._arguments: list = []
        self._tensors: list[tuple[int, Callable | None]] = []  # where addresses go, and what is made of them
        self._addresses: list[int] = []
        for argument in arguments:
            place = len(self._arguments)
            if type(argument) is TensorDescriptor:
                map_of, expanded = _tensor_maps(argument, next(about))
                self._tensors.append((place, map_of))
                self._addresses.append(argument.base.data_ptr())
                self._arguments += expanded
            elif isinstance(argument, torch.Tensor):
                self._tensors.append((place, None))
                self._addresses.append(argument.data_ptr())
                self._arguments.append(argument.data_ptr())
            else:
                self._arguments.append(argument)

    def again(
        self, *addresses: int, grid: tuple[int, int, int] | None = None, place: int = 0, numbers: Sequence[int] = ()
    ) -> None:
        """Launches on the current stream of the current device.

        Args:
            addresses: `data_ptr()` of the kernel's first tensors, in its order, aligned as the first time; the others
                are where they were.
            grid: another one. place, numbers: other numbers from this argument on, of a kernel that takes no
                descriptors; each must be one for which Triton compiles the same as for the first one.
        """
        grid = grid or self._grid
        arguments = self._arguments.copy()
        arguments[place : place + len(numbers)] = numbers
        for address, (at, map_of) in zip(addresses, self._tensors, strict=False):
            arguments[at] = address if map_of is None else map_of(address)
        active = driver.active
        stream = active.get_current_stream(active.get_current_device())
        enter, leave, about = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, None
        if _is_set(enter) or _is_set(leave):  # a profiler of Triton's
            about = self._kernel.launch_metadata(grid, stream)
        else:
            enter = leave = None
        self._run(*grid, stream, self._function, self._metadata, about, enter, leave, *arguments)


def _is_set(hook: Any) -> bool:
    return hook is not None and bool(getattr(hook, "calls", True))


_MOST_ADDRESSES = 64  # of one tensor of a call that are known: a model of that many layers finds them all again


def _tensor_maps(descriptor: TensorDescriptor, about: dict | None) -> tuple[Callable[[int], object], list]:
    """What makes a descriptor's tensor map for an address, and what Triton makes of the descriptor as it is."""
    like = {**vars(descriptor), "base": None}

    @functools.lru_cache(_MOST_ADDRESSES)
    def map_of(address: int) -> object:
        other = object.__new__(TensorDescriptor)  # its constructor would check again what is as the first time
        vars(other).update(like, base=SimpleNamespace(data_ptr=lambda: address))
        made = make_tensordesc_arg(other, about)[0]
        return address if about is None else made  # without a copy engine a descriptor becomes a pointer

    expanded = make_tensordesc_arg(descriptor, about)
    return map_of, [map_of(descriptor.base.data_ptr()), *expanded[1:]]


def launch(
    kernel: Any, grid: tuple[int], config: LaunchConfig, *args: Any, **constants: Any
) -> Callable[[], Launched] | None:
    """Starts a kernel on the device of its first argument. An empty grid starts nothing.

    Returns:
        What makes a `Launched` of it, for those who want to launch it again, and holds its tensors; None in the
        interpreter and for an empty grid.

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
        remedy = "pass a `config` with smaller blocks or fewer stages, or use a smaller head dimension"
        if config.source:
            remedy = (
                f"it comes from {config.source}. Measure again with `python -m labutils tune`, or remove that table "
                "with `python -m labutils tune --reset`"
            )
        raise RuntimeError(f"{error}. This GPU is too small for {config}: {remedy}.") from error
    named = dict(zip(kernel.arg_names, args, strict=False)) | constants
    return lambda: Launched(compiled, (*grid, 1, 1), [named[name] for name in kernel.arg_names])
