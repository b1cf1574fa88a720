"""Judging what a student's function returned: its kind, its value, and which known mistake explains a wrong one."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from labutils.attention.reference import Verdict, judge
from labutils.exercises.core import Wrong

# ---------------------------------------------------------------------------------------------------------------------
# The kind of the result
# ---------------------------------------------------------------------------------------------------------------------


def expect_number(got: Any, what: str) -> float:
    """The result as a Python number, also from a tensor or an array of one element; raises Wrong otherwise."""
    if isinstance(got, torch.Tensor) and got.numel() == 1:
        got = got.item()
    if isinstance(got, bool) or not isinstance(got, numbers.Real):
        raise Wrong(f"It must return {what}, one number; it returned {describe(got)}.")
    return got  # type: ignore[return-value]  # an int stays an int: messages show what came


def expect_tensor(got: Any, shape: Sequence[int], what: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The result as a tensor of this shape, and of this dtype if it is given; raises Wrong otherwise."""
    if isinstance(got, numbers.Real) and not isinstance(got, bool) and not shape:
        got = torch.tensor(float(got))
    if not isinstance(got, torch.Tensor):
        raise Wrong(f"{what} must be a tensor of shape {tuple(shape)}; it is {describe(got)}.")
    if tuple(got.shape) != tuple(shape):
        raise Wrong(f"{what} must have the shape {tuple(shape)}; it has {tuple(got.shape)}.")
    if dtype is not None and got.dtype != dtype:
        raise Wrong(f"{what} must have the dtype {dtype_name(dtype)}; it has {dtype_name(got.dtype)}.")
    return got


def expect_values(got: Any, names: Sequence[str]) -> tuple[Any, ...]:
    """The result as a tuple with a value for each name, also from the rows of a tensor; raises Wrong otherwise."""
    if isinstance(got, torch.Tensor) and got.ndim and len(got) == len(names):
        got = tuple(got)
    if not isinstance(got, tuple) or len(got) != len(names):
        raise Wrong(f"It must return {len(names)} values, {', '.join(names)}; it returned {describe(got)}.")
    return got


# ---------------------------------------------------------------------------------------------------------------------
# The value of the result
# ---------------------------------------------------------------------------------------------------------------------


def mismatch(requirement: str, expected: str, got: str, why: str = "") -> Wrong:
    """The exception for a wrong result that is not a tensor.

    Args:
        requirement: the sentence that the result breaks, with the case.
        expected, got: both results, as they are shown.
        why: the mistake that explains the result, or "" if none is known.
    """
    return Wrong(f"{requirement}\n  Expected {expected}, got {got}.{_on_a_line(why)}")


def same_number(got: Any, expected: float, what: str, case: str, mistakes: Mapping[str, float]) -> None:
    """Raises Wrong unless a number is the expected one, and names the known mistake that gives this number.

    Args:
        got: the result.
        expected: the right number.
        what: what the number is, such as "the number of bytes".
        case: the arguments, in words.
        mistakes: message -> the number that this mistake gives.
    """
    value = expect_number(got, what)
    if math.isclose(value, expected, rel_tol=1e-9):
        return
    diagnosis = next((text for text, wrong in mistakes.items() if math.isclose(value, wrong, rel_tol=1e-9)), "")
    if not diagnosis and isinstance(expected, int) and not float(value).is_integer():
        diagnosis = "It must be a whole number."
    elif not diagnosis and any(value == round(expected, digits) for digits in range(1, 8)):
        diagnosis = "That is rounded: return the number as it is."
    raise Wrong(
        f"{what[0].upper()}{what[1:]} is not right.\n"
        f"  For {case}: expected {_shown(expected)}, got {_shown(value)}.{_on_a_line(diagnosis)}"
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
    if_nan: str = "Where a NaN comes from: inf / inf, 0 / 0, or inf - inf. In a softmax it is mostly -inf - (-inf).",
    if_unknown: str = "",
) -> None:
    """Raises Wrong unless a tensor obeys the 2 x rule of `labutils.attention.reference.judge`.

    Args:
        got: the result.
        exact: the right result in float64, of the same shape.
        low: the textbook formula in the dtype of `got`, of the same shape.
        name: what the tensor is called.
        requirement: the sentence that a wrong tensor breaks, with the case.
        place: turns an index into words, such as "row 3 of head 1"; see `indices`.
        mistakes: message -> what this mistake would have returned. The message of the nearest mistake is shown, if it
            is within `closeness` times what the rule allows.
        factor, atol: of the rule. Give a larger `atol` if right formulas differ in how well they are conditioned.
        closeness: see `mistakes`.
        if_nan: the message if no mistake explains the result, and it has a NaN.
        if_unknown: the message if nothing else explains the result.
    """
    verdict = judge(got, exact, low, factor=factor, atol=atol, name=name)
    if verdict:
        return
    diagnosis, nearest = "", math.inf
    for message, wrong in (mistakes or {}).items():
        if _distance(wrong, exact) <= verdict.allowed:
            continue  # on these inputs the mistake makes no difference
        distance = _distance(got, wrong)
        if distance <= closeness * verdict.allowed and distance < nearest:
            diagnosis, nearest = message, distance
    if not diagnosis:
        diagnosis = if_nan if got.isnan().any() else (_diagnosis_of_any(got, exact, low) or if_unknown)
    raise Wrong(f"{requirement}\n{_first_wrong(verdict, got, exact, place)}{_on_a_line(diagnosis)}")


def indices(*axes: str) -> Callable[[tuple[int, ...]], str]:
    """Turns an index into words: `indices("row", "dimension")((3, 1))` is "row 3, dimension 1"."""
    return lambda index: ", ".join(f"{axis} {i}" for axis, i in zip(axes, index, strict=True))


def _diagnosis_of_any(got: torch.Tensor, exact: torch.Tensor, low: torch.Tensor) -> str:
    """A mistake that a tensor without NaN shows in any exercise, or "" if it shows none."""
    if not got.any() and exact.any():
        return "All of it is 0: is the result ever written to what the function returns?"
    if not got.is_floating_point() and low.is_floating_point():
        return f"Its dtype is {dtype_name(got.dtype)}, which holds only whole numbers."
    wide = low.is_floating_point() and low.dtype.itemsize >= 4
    if wide and got.is_floating_point() and got.dtype.itemsize < low.dtype.itemsize:
        return f"Its dtype is {dtype_name(got.dtype)}, and must be {dtype_name(low.dtype)}: the rounding shows."
    finite = exact.isfinite() & got.isfinite()
    if wide and torch.equal(exact.isfinite(), got.isfinite()) and finite.any():
        apart = (got.double() - exact.double())[finite].abs().max()
        if apart <= 2**-9 * exact[finite].abs().max():
            return "That is near, but not rounding in float32: was something kept in 16 bits, or a small number added?"
    return ""


def _first_wrong(
    verdict: Verdict, got: torch.Tensor, exact: torch.Tensor, place: Callable[[tuple[int, ...]], str]
) -> str:
    """The first element that is clearly wrong: where it stands, what was expected and what came."""
    bad = ((got.double() - exact.double()).abs() > verdict.allowed) | (got.isnan() & ~exact.isnan())
    both_infinite = torch.isinf(exact) & (got.double() == exact.double())
    bad = (bad | (torch.isinf(exact) != torch.isinf(got))) & ~both_infinite
    index = tuple(int(i) for i in bad.nonzero()[0]) if bad.any() else verdict.where
    count = int(bad.sum())
    return (
        f"  First at {place(index)}: expected {verdict.name} {_shown(exact[index].item())}, "
        f"got {_shown(got[index].item())}. {count} of {got.numel()} values are off."
    )


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference of two tensors; inf if their shapes, or the places of their NaNs or infinities, differ."""
    if a.shape != b.shape:
        return math.inf
    a, b = a.double(), b.double()
    if not torch.equal(a.isnan(), b.isnan()) or not torch.equal(a.isinf(), b.isinf()):
        return math.inf
    finite = a.isfinite()
    if not finite.any():
        return 0.0
    return (a[finite] - b[finite]).abs().max().item()


# ---------------------------------------------------------------------------------------------------------------------
# Words for a message
# ---------------------------------------------------------------------------------------------------------------------


def describe(value: Any) -> str:
    """A value in a few words: "a tensor of shape (3, 4), float32"; "'plain'"."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {dtype_name(value.dtype)}"
    if isinstance(value, tuple | list):
        inside = ", ".join(f"({describe(v)})" if isinstance(v, tuple | list) else describe(v) for v in value[:4])
        if len(inside) > 160:
            inside = f"{inside[:157]}..."
        count = "1 value" if len(value) == 1 else f"{len(value)} values"
        return f"{count}: {inside}" if value else f"an empty {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def dtype_name(dtype: torch.dtype) -> str:
    """ "float16" for torch.float16."""
    return str(dtype).removeprefix("torch.")


def _shown(value: float) -> str:
    if isinstance(value, bool) or (float(value).is_integer() and abs(value) < 1e16):
        return f"{int(value):,}" if math.isfinite(value) else str(value)
    return f"{value:.5g}"


def _on_a_line(diagnosis: str) -> str:
    return f"\n  {diagnosis}" if diagnosis else ""
