"""Calling a student's function in this process: what it gets, what it returns, and what is said if it raises."""

from __future__ import annotations

import contextlib
import linecache
import math
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from labutils.exercises.core import Failed, NotYet, error_text
from labutils.exercises.judging import describe
from labutils.machine import runtime

_GUARD = 64
"""Elements on each side of an input on the device. A load without a mask reads these, not memory of other tensors."""


class _LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation of PyTorch returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        """Runs the operation, and looks at what it returns."""
        result = operation(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            # The storage of a view was counted when it was made; an expanded tensor owns fewer elements than it shows.
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                owned = tensor.untyped_storage().nbytes() // max(1, tensor.element_size())
                self.elements = max(self.elements, min(tensor.numel(), owned))
        return result


class LocalCall:
    """A student's function in this process, as a check sees it; see `core.Call`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.largest = 0

    def __call__(self, *arguments: Any) -> Any:
        """Calls the function on the lab's device; see `core.Call`."""
        if not callable(self.function):
            raise Failed(
                f"The check wants the function itself; it got {describe(self.function)}.\n"
                "  Write check.name(name), without calling your function."
            )
        arguments = tuple(_to_device(argument) for argument in arguments)
        counter = _LargestTensor()
        try:
            # with gradients, as in the student's own cell: an answer may use autograd
            with torch.enable_grad(), counter, warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # NumPy warns of elements that a kernel never stores
                result = self.function(*arguments)
        except NotImplementedError as error:
            if _is_stub(error):
                raise NotYet("Replace `raise NotImplementedError` by your code, and run this cell again.") from None
            raise Failed(explain(error)) from None
        except KeyboardInterrupt:
            raise  # a student stops a function that takes too long
        except BaseException as error:
            raise Failed(explain(error)) from None
        self.largest = counter.elements
        if result is None or result is Ellipsis:
            raise NotYet(f"It returns {result!r}. Is there a `return` at its end?")
        return _to_cpu(result)


def _to_device(value: Any) -> Any:
    """Copies tensors to the lab's device, strides kept, with NaN (or the smallest integer) around them in memory.

    A function that changes its arguments changes only this copy, not what the check holds.
    """
    if isinstance(value, tuple | list):
        return type(value)(_to_device(item) for item in value)
    if isinstance(value, dict):
        return {key: _to_device(item) for key, item in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    if value.dtype == torch.bool or value.numel() == 0:
        return value.to(runtime.device, copy=True)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    poison = math.nan if value.dtype.is_floating_point else torch.iinfo(value.dtype).min
    memory = torch.full((extent + 2 * _GUARD,), poison, dtype=value.dtype, device=runtime.device)
    placed = torch.as_strided(memory, value.shape, value.stride(), _GUARD)
    placed.copy_(value)
    return placed


def _to_cpu(value: Any) -> Any:
    """The result with its tensors detached and on the CPU, NumPy's arrays as tensors, and lists as tuples."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, tuple | list):
        return tuple(_to_cpu(item) for item in value)
    if hasattr(value, "__array__"):
        with contextlib.suppress(Exception):
            return torch.as_tensor(value)
    return value


def _is_stub(error: NotImplementedError) -> bool:
    """Whether the stub itself raised the error, and not a library that the student's code called."""
    frames = list(_frames(error))
    return not error.args and bool(frames) and frames[-1].own


# ---------------------------------------------------------------------------------------------------------------------
# Explaining an exception
# ---------------------------------------------------------------------------------------------------------------------

_ADVICE = {
    NameError: "Nothing has defined that name: is it spelt as above, and is it an argument or imported?",
    AttributeError: "The object has no such attribute: print its type.",
    IndexError: "The index lies outside: print the shape and the index just before this line.",
    KeyError: "There is no such key: print the keys just before this line.",
    ZeroDivisionError: "It divides by zero: which argument was 0, and what should come out?",
    OverflowError: "The number is too large for a float: subtract the maximum before the exponential.",
    RecursionError: "The function calls itself without end.",
    AssertionError: "An `assert` of your own, or of a library, does not hold.",
    SystemExit: "The function ends the program: remove the call to exit.",
    NotImplementedError: "A library says that it cannot do this.",
    MemoryError: "It asks for more memory than there is: print the shapes just before this line.",
}


def explain(error: BaseException) -> str:
    """Names an exception, the line of the student's code that raised it, and what to look at."""
    advice = next((text for kind, text in _ADVICE.items() if isinstance(error, kind)), "")
    text = error_text(error)
    if isinstance(error, TypeError):
        advice = "A call or an operator got an argument that it does not take: compare them with the signature."
    elif isinstance(error, RuntimeError) and "same device" in text:
        advice = "The tensors are on two devices: make new ones with device=x.device, where x is an argument."
    elif isinstance(error, RuntimeError) and "dtype" in text:  # before "size": a text about dtypes may say "same size"
        advice = "The dtypes do not fit: convert one of the tensors with .to(...)."
    elif isinstance(error, RuntimeError) and any(word in text for word in ("size", "shape", "dimension")):
        advice = "The shapes do not fit: print the shapes of the tensors in this line."
    elif not advice:
        advice = "Run the line by itself on a small input, and print what goes into it."
    frames = list(_frames(error))
    own = [frame for frame in frames if frame.own] or frames
    if own:
        frame = own[-1]
        place = f"\n  in line {frame.lineno} of {frame.name}:  {(frame.line or '').strip()}"
    else:
        place = "\n  before its first line ran"
    shown = text.splitlines()[0][:200] if text else "no message"
    return f"Your function raised {type(error).__name__}: {shown}{place}\n  {advice}"


@dataclass(frozen=True)
class _Frame:
    lineno: int
    name: str
    line: str | None
    own: bool
    """Whether the code is a cell of the notebook, or a file that belongs to no library."""


def _frames(error: BaseException | None) -> Iterator[_Frame]:
    """The frames of an exception and its causes, without those of this file."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        for summary in traceback.extract_tb(error.__traceback__):
            name = summary.filename
            if name == __file__:
                continue
            library = (
                "-packages/" in name or "/lib/python" in name or name.startswith("<frozen") or "/labutils/" in name
            )
            line = summary.line or linecache.getline(name, summary.lineno or 0)
            yield _Frame(summary.lineno or 0, summary.name, line, not library)
        # Triton's interpreter wraps an error of a kernel; only the cause has the traceback into the kernel
        error = error.__cause__
