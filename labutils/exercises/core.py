"""What an exercise is, how a student's function is called, and what is said about its result.

The same check runs in two places. In a notebook it calls the student's function directly (`LocalCall`); when a teacher
grades, the function lives in another process and the check reaches it through a pipe (`labutils.exercises.grading`).
So a check sees values alone: it draws inputs on the CPU, calls, and gets tensors on the CPU back.
"""

from __future__ import annotations

import contextlib
import linecache
import math
import numbers
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from labutils.attention.reference import Verdict, judge
from labutils.machine import runtime

PASSED, WRONG, ERROR, NOT_YET = "passed", "wrong", "error", "not yet"

GUARD = 64
"""Elements on each side of an input on the device: a read without a mask ends in them, and not in foreign memory."""


class Wrong(Exception):
    """The function returned something that breaks a requirement; the text says which, where and why."""


class NotYet(Exception):
    """The stub is still a stub."""


class Failed(Exception):
    """The function raised an exception; the text names it, its line and what to do."""


class Call(Protocol):
    """A student's function as a check sees it."""

    largest: int
    """Elements of the largest tensor that PyTorch made during the last call."""

    def __call__(self, *arguments: Any) -> Any:
        """The function's result with tensors on the CPU; raises NotYet or Failed."""
        ...


@dataclass(frozen=True)
class Exercise:
    """One exercise: where it stands, how long it takes, what it asks, and how it is checked."""

    name: str
    notebook: str
    """"01" to "04"."""
    title: str
    minutes: int
    check: Callable[[Call, torch.Generator], None]
    hints: tuple[str, ...]
    parts: tuple[str, ...]
    """Definitions of the solution that belong together, the function itself last."""


@dataclass(frozen=True)
class Outcome:
    """What a check found: `status` is passed, wrong, error or not yet."""

    exercise: str
    status: str
    message: str = ""

    def __str__(self) -> str:
        first = f"{self.exercise}: {self.status}"
        return f"{first}. {self.message}" if self.message else f"{first}."


EXERCISES: dict[str, Exercise] = {}
"""Every exercise by its name, in the order of the notebooks."""


def exercise(
    notebook: str, title: str, minutes: int, hints: Sequence[str], parts: Sequence[str] = ()
) -> Callable[[Callable[[Call, torch.Generator], None]], Callable[[Call, torch.Generator], None]]:
    """Registers a check under its own name. Two or three hints; `parts` are further definitions of the solution."""

    def register(check: Callable[[Call, torch.Generator], None]) -> Callable[[Call, torch.Generator], None]:
        name = check.__name__
        EXERCISES[name] = Exercise(name, notebook, title, minutes, check, tuple(hints), (*parts, name))
        return check

    return register


def run(name: str, call: Call, seed: int = 0) -> Outcome:
    """Runs one check; whatever the student's function does, the answer is an outcome."""
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            EXERCISES[name].check(call, generator)
    except NotYet as reason:
        return Outcome(name, NOT_YET, str(reason))
    except Wrong as reason:
        return Outcome(name, WRONG, str(reason))
    except Failed as reason:
        return Outcome(name, ERROR, str(reason))
    except Exception as reason:  # a value that nobody thought of: an integer of a million digits, a broken object
        return Outcome(
            name, WRONG, f"What it returned cannot be judged ({type(reason).__name__}: {said(reason)[:200]})."
        )
    return Outcome(name, PASSED)


# ---------------------------------------------------------------------------------------------------------------------
# Calling
# ---------------------------------------------------------------------------------------------------------------------


class _Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation of PyTorch returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        """Runs the operation, and looks at what it returns."""
        result = operation(*arguments, **(keywords or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            # a view has the elements of its storage already counted, and an expanded one owns fewer than it shows
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                owned = tensor.untyped_storage().nbytes() // max(1, tensor.element_size())
                self.elements = max(self.elements, min(tensor.numel(), owned))
        return result


class LocalCall:
    """A function of this process."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.largest = 0

    def __call__(self, *arguments: Any) -> Any:
        """Calls the function on the lab's device; see `Call`."""
        if not callable(self.function):
            raise Failed(
                f"The check wants the function itself; it got {describe(self.function)}.\n"
                "  Write check.name(name), without calling your function."
            )
        arguments = tuple(to_device(argument) for argument in arguments)
        counter = _Largest()
        try:
            # with gradients, as in the student's own cell: an answer may use autograd
            with torch.enable_grad(), counter, warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of elements that a kernel never stores
                result = self.function(*arguments)
        except NotImplementedError as error:
            if is_stub(error):
                raise NotYet("Replace `raise NotImplementedError` by your code, and run this cell again.") from None
            raise Failed(explain(error)) from None
        except KeyboardInterrupt:
            raise  # the student's own: they stop what takes too long
        except BaseException as error:
            raise Failed(explain(error)) from None
        self.largest = counter.elements
        if result is None or result is Ellipsis:
            raise NotYet(f"It returns {result!r}: has it a `return` at its end?")
        return to_cpu(result)


def to_device(value: Any) -> Any:
    """Tensors on the lab's device, strides kept, with NaN (or the smallest integer) on both sides of their memory.

    All is a copy: what a function does to its arguments does not reach the check.
    """
    if isinstance(value, tuple | list):
        return type(value)(to_device(item) for item in value)
    if isinstance(value, dict):
        return {key: to_device(item) for key, item in value.items()}
    if not isinstance(value, torch.Tensor) or value.dtype == torch.bool or value.numel() == 0:
        return value.to(runtime.device, copy=True) if isinstance(value, torch.Tensor) else value
    extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    poison = math.nan if value.dtype.is_floating_point else torch.iinfo(value.dtype).min
    memory = torch.full((extent + 2 * GUARD,), poison, dtype=value.dtype, device=runtime.device)
    placed = torch.as_strided(memory, value.shape, value.stride(), GUARD)
    placed.copy_(value)
    return placed


def to_cpu(value: Any) -> Any:
    """A result with its tensors on the CPU, detached; what NumPy has as a tensor, a list as a tuple."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, tuple | list):
        return tuple(to_cpu(item) for item in value)
    if hasattr(value, "__array__"):
        with contextlib.suppress(Exception):
            return torch.as_tensor(value)
    return value


def is_stub(error: BaseException) -> bool:
    """Whether an exception is the stub's own, and not one of a library that the student called."""
    frames = list(_frames(error))
    return not error.args and bool(frames) and frames[-1].own


_ADVICE = {
    NameError: "Nothing has defined that name: is it spelt as above, and is it an argument or imported?",
    AttributeError: "The object has no such attribute: print its type.",
    IndexError: "An index lies outside: print the shape and the index just before this line.",
    KeyError: "There is no such key: print the keys just before this line.",
    ZeroDivisionError: "It divides by zero: which argument was 0, and what should come out?",
    OverflowError: "The number is too large for a float: take the maximum out before the exponential.",
    RecursionError: "The function calls itself without end.",
    AssertionError: "An `assert` of your own, or of a library, does not hold.",
    SystemExit: "The function ends the program: take the call to exit out.",
    NotImplementedError: "A library says that it cannot do this.",
    MemoryError: "It asks for more memory than there is: print the shapes just before this line.",
}


def said(error: BaseException) -> str:
    """The text of an exception; a student's own may raise another where it should give its text."""
    try:
        return str(error).strip()
    except Exception:
        return ""


def explain(error: BaseException) -> str:
    """What an exception was, in which line of the student's code, and what to look at."""
    advice = next((text for kind, text in _ADVICE.items() if isinstance(error, kind)), "")
    text = said(error)
    if isinstance(error, TypeError):
        advice = "A call or an operator got something that it does not take: compare the arguments with the signature."
    elif isinstance(error, RuntimeError) and "same device" in text:
        advice = "The tensors are on two devices: make new ones with device=x.device, where x is an argument."
    elif isinstance(error, RuntimeError) and "dtype" in text:  # its message may speak of "same size", too
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


def _frames(error: BaseException | None) -> Iterator[_Frame]:
    """The frames below this package; `own` where the code is a notebook's cell or a file outside libraries."""
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
        # Triton's interpreter wraps what a kernel raised; its traceback is that of the cause
        error = error.__cause__


# ---------------------------------------------------------------------------------------------------------------------
# Judging
# ---------------------------------------------------------------------------------------------------------------------


def number(got: Any, what: str) -> float:
    """The result as a Python number; a tensor or an array of one element is one, too."""
    if isinstance(got, torch.Tensor) and got.numel() == 1:
        got = got.item()
    if isinstance(got, bool) or not isinstance(got, numbers.Real):
        raise Wrong(f"It must return {what}, one number; it returned {describe(got)}.")
    return got  # type: ignore[return-value]  # an int stays one: messages show what came


def tensor(got: Any, shape: Sequence[int], what: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The result as a tensor of this shape (and dtype, where one is wanted)."""
    if isinstance(got, numbers.Real) and not isinstance(got, bool) and not shape:
        got = torch.tensor(float(got))
    if not isinstance(got, torch.Tensor):
        raise Wrong(f"{what} must be a tensor of shape {tuple(shape)}; it is {describe(got)}.")
    if tuple(got.shape) != tuple(shape):
        raise Wrong(f"{what} must have the shape {tuple(shape)}; it has {tuple(got.shape)}.")
    if dtype is not None and got.dtype != dtype:
        raise Wrong(f"{what} must have the dtype {_short(dtype)}; it has {_short(got.dtype)}.")
    return got


def several(got: Any, names: Sequence[str]) -> tuple[Any, ...]:
    """The result as a tuple of as many values as there are names; a tensor of as many rows is one, too."""
    if isinstance(got, torch.Tensor) and got.ndim and len(got) == len(names):
        got = tuple(got)
    if not isinstance(got, tuple) or len(got) != len(names):
        raise Wrong(f"It must return {len(names)} values, {', '.join(names)}; it returned {describe(got)}.")
    return got


def same_number(got: Any, expected: float, what: str, case: str, mistakes: Mapping[str, float]) -> None:
    """Raises Wrong unless a number is the expected one; recognises the numbers that known mistakes give."""
    value = number(got, what)
    if math.isclose(value, expected, rel_tol=1e-9):
        return
    diagnosis = next((text for text, wrong in mistakes.items() if math.isclose(value, wrong, rel_tol=1e-9)), "")
    if not diagnosis and isinstance(expected, int) and not float(value).is_integer():
        diagnosis = "It must be a whole number."
    elif not diagnosis and any(value == round(expected, digits) for digits in range(1, 8)):
        diagnosis = "That is rounded: return the number as it is."
    raise Wrong(
        f"{what[0].upper()}{what[1:]} is not right.\n"
        f"  For {case}: expected {_number(expected)}, got {_number(value)}.{_tail(diagnosis)}"
    )


def same_tensor(
    got: torch.Tensor,
    exact: torch.Tensor,
    low: torch.Tensor,
    *,
    name: str,
    requirement: str,
    place: Callable[[tuple[int, ...]], str],
    mistakes: Mapping[str, torch.Tensor] | None = None,
    factor: float = 2.0,
    atol: float = 1e-5,
    closeness: float = 4.0,
) -> None:
    """Raises Wrong unless a tensor obeys the 2 x rule of `labutils.attention.reference.judge`.

    Args:
        got: the result. exact: float64. low: the textbook formula in the dtype of `got`; all of one shape.
        name: what the tensor is called. requirement: the sentence that it breaks.
        place: from an index to words: "row 3 of head 1".
        mistakes: message -> what that mistake would have returned. The nearest is named, where it explains the result
            to within `closeness` times what the rule allows.
        factor, atol: of the rule; a larger `atol` where right formulas differ in how they condition the problem.
    """
    verdict = judge(got, exact, low, factor=factor, atol=atol, name=name)
    if verdict:
        return
    diagnosis, nearest = "", math.inf
    for message, wrong in (mistakes or {}).items():
        if _apart(wrong, exact) <= verdict.allowed:
            continue  # on these inputs that mistake makes no difference
        distance = _apart(got, wrong)
        if distance <= closeness * verdict.allowed and distance < nearest:
            diagnosis, nearest = message, distance
    if not diagnosis:
        diagnosis = _general(got, exact, low)
    raise Wrong(f"{requirement}\n{where(verdict, got, exact, place)}{_tail(diagnosis)}")


def _general(got: torch.Tensor, exact: torch.Tensor, low: torch.Tensor) -> str:
    """What can be said of a wrong tensor without knowing the exercise, or "" """
    if got.isnan().any():
        return (
            "Where a NaN is born: inf / inf, 0 / 0, or inf - inf. Of these, -inf - (-inf) is the usual one in a"
            " softmax."
        )
    if not got.any() and exact.any():
        return "All of it is 0: is the result ever written to what the function returns?"
    if not got.is_floating_point() and low.is_floating_point():
        return f"Its dtype is {_short(got.dtype)}, which holds whole numbers alone."
    wide = low.is_floating_point() and low.dtype.itemsize >= 4
    if wide and got.is_floating_point() and got.dtype.itemsize < low.dtype.itemsize:
        return f"Its dtype is {_short(got.dtype)}: {_short(low.dtype)} was asked for, and rounding to less shows."
    finite = exact.isfinite() & got.isfinite()
    if wide and torch.equal(exact.isfinite(), got.isfinite()) and finite.any():
        apart = (got.double() - exact.double())[finite].abs().max()
        if apart <= 2**-9 * exact[finite].abs().max():
            return "That is near, but not rounding in float32: was something kept in 16 bits, or a small number added?"
    return ""


def where(verdict: Verdict, got: torch.Tensor, exact: torch.Tensor, place: Callable[[tuple[int, ...]], str]) -> str:
    """The first element that is clearly off, in words, with what was expected and what came."""
    bad = ((got.double() - exact.double()).abs() > verdict.allowed) | (got.isnan() & ~exact.isnan())
    both_infinite = torch.isinf(exact) & (got.double() == exact.double())
    bad = (bad | (torch.isinf(exact) != torch.isinf(got))) & ~both_infinite
    index = tuple(int(i) for i in bad.nonzero()[0]) if bad.any() else verdict.where
    count = int(bad.sum())
    return (
        f"  First at {place(index)}: expected {verdict.name} {_number(exact[index].item())}, "
        f"got {_number(got[index].item())}. {count} of {got.numel()} values are off."
    )


def _apart(got: torch.Tensor, wrong: torch.Tensor) -> float:
    """Largest distance of two tensors; inf where their NaNs or infinities do not stand in the same places."""
    if got.shape != wrong.shape:
        return math.inf
    got, wrong = got.double(), wrong.double()
    if not torch.equal(got.isnan(), wrong.isnan()):
        return math.inf
    if not torch.equal(got.isinf(), wrong.isinf()):
        return math.inf
    finite = got.isfinite()
    if not finite.any():
        return 0.0
    return (got[finite] - wrong[finite]).abs().max().item()


def _tail(diagnosis: str) -> str:
    return f"\n  {diagnosis}" if diagnosis else ""


def _number(value: float) -> str:
    if isinstance(value, bool) or (float(value).is_integer() and abs(value) < 1e16):
        return f"{int(value):,}" if math.isfinite(value) else str(value)
    return f"{value:.5g}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(value: Any) -> str:
    """A value in a few words: "a tensor of shape (3, 4), float32"; "'plain'"."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {_short(value.dtype)}"
    if isinstance(value, tuple | list):
        inside = ", ".join(f"({describe(v)})" if isinstance(v, tuple | list) else describe(v) for v in value[:4])
        if len(inside) > 160:
            inside = f"{inside[:157]}..."
        count = "1 value" if len(value) == 1 else f"{len(value)} values"
        return f"{count}: {inside}" if value else f"an empty {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
