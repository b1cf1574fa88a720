"""Launches a kernel again, with other tensors like those of the first launch, in less host time than Triton needs."""

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
from triton.tools.tensor_descriptor import TensorDescriptor

from labutils.attention.kernels.launch import Launch, make_context_current, this_thread

# From Triton 3.8 on, `make_tensordesc_arg` has a third parameter, which only its AMD driver uses.
_UNUSED = (None,) * (len(inspect.signature(make_tensordesc_arg).parameters) - 2)


class Replay:
    """A launch that can be made again, with other tensors like those of the first launch.

    For every launch Triton looks at each argument, turns each descriptor into a tensor map for the copy engine, and
    asks the driver about each pointer. The second time only the addresses are new. Triton's launcher takes an address
    as it is. A tensor map says where a tensor lies, not what is in it, so maps are kept for addresses that come again.

    A replay holds no tensor: its caller must keep a tensor alive at each address.

    Args:
        first: the launch to make again.
    """

    def __init__(self, first: Launch):
        kernel = first.compiled
        arguments = first.in_order()
        self._kernel, self._grid = kernel, first.grid
        self._run, self._function, self._metadata = kernel.run, kernel.function, kernel.packed_metadata
        descriptors = [argument for argument in arguments if type(argument) is TensorDescriptor]
        if descriptors:
            # Triton wraps its launcher in `wrap_handle_tensordesc`, which expands descriptors: take the inner one.
            self._run = copy.copy(kernel.run)
            self._run.launch = inspect.getclosurevars(kernel.run.launch).nonlocals["launcher"]
        about = iter(getattr(kernel.metadata, "tensordesc_meta", None) or [None] * len(descriptors))
        self._arguments: list = []
        self._tensors: list[tuple[int, Callable | None]] = []  # where an address goes, and what makes a map of it
        for argument in arguments:
            place = len(self._arguments)
            if type(argument) is TensorDescriptor:
                map_of, expanded = _tensor_maps(argument, next(about))
                self._tensors.append((place, map_of))
                self._arguments += expanded
            elif isinstance(argument, torch.Tensor):
                self._tensors.append((place, None))
                self._arguments.append(argument.data_ptr())
            else:
                self._arguments.append(argument)

    def again(
        self, *addresses: int, grid: tuple[int, int, int] | None = None, place: int = 0, numbers: Sequence[int] = ()
    ) -> None:
        """Launches on the current stream of the current device.

        Args:
            addresses: `data_ptr()` of the kernel's first tensors, in its order, aligned as the first time. The other
                tensors keep their addresses.
            grid: by default the grid of the first launch.
            place, numbers: numbers that replace the arguments from `place` on, in a kernel without descriptors. Triton
                must compile the same kernel for them as for the first ones.
        """
        if not this_thread.ready:
            make_context_current()
        grid = grid or self._grid
        arguments = self._arguments.copy()
        arguments[place : place + len(numbers)] = numbers
        for address, (at, map_of) in zip(addresses, self._tensors, strict=False):
            arguments[at] = address if map_of is None else map_of(address)
        active = driver.active
        stream = active.get_current_stream(active.get_current_device())
        enter, leave, about = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, None
        if _is_set(enter) or _is_set(leave):  # Triton's profiler listens
            about = self._kernel.launch_metadata(grid, stream)
        else:
            enter = leave = None
        self._run(*grid, stream, self._function, self._metadata, about, enter, leave, *arguments)


def _is_set(hook: Any) -> bool:
    return hook is not None and bool(getattr(hook, "calls", True))


_MOST_ADDRESSES = 64  # tensor maps kept for each descriptor: enough for a model of 64 layers


def _tensor_maps(descriptor: TensorDescriptor, about: dict | None) -> tuple[Callable[[int], object], list]:
    """A function from an address to the descriptor's tensor map there, and the arguments that Triton makes of it."""
    like = {**vars(descriptor), "base": None}

    @functools.lru_cache(_MOST_ADDRESSES)
    def map_of(address: int) -> object:
        other = object.__new__(TensorDescriptor)  # the constructor would repeat its checks
        vars(other).update(like, base=SimpleNamespace(data_ptr=lambda: address))
        made = make_tensordesc_arg(other, about, *_UNUSED)[0]
        return address if about is None else made  # without a copy engine a descriptor becomes a pointer

    expanded = make_tensordesc_arg(descriptor, about, *_UNUSED)
    return map_of, [map_of(descriptor.base.data_ptr()), *expanded[1:]]
