"""Repairs Triton's interpreter, and tests that it computes what our kernels need.

Triton's interpreter (TRITON_INTERPRET=1) runs a kernel block by block in NumPy. NumPy has no bfloat16, so the
interpreter keeps such values as uint16 bit patterns. In Triton 3.6 and 3.7 it multiplies, adds and compares these
patterns as if they were integers, and it truncates although a GPU rounds to nearest. It raises no error; the numbers
are wrong. Loop bounds that are known only at run time fail in 3.6 with NumPy 2.4 and later. A launch patches the
language of the whole process and counts its blocks in one place, so two threads that launch at a time get errors or
wrong numbers. And each call of a device function patches the language again, which more than doubles the time.

`install` repairs all of it. `self_test` runs small kernels against PyTorch, and raises an error if a Triton version
behaves in yet another way. Only `labutils.machine.runtime` calls the two.
"""

from __future__ import annotations

import functools
import threading
import types
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as triton_interpreter
from triton.runtime.interpreter import TensorHandle

_installed = False


def _is_bf16(handle: TensorHandle | None) -> bool:
    return handle is not None and handle.dtype.scalar == tl.bfloat16


def _widen(handle: TensorHandle) -> TensorHandle:
    """bfloat16 bit patterns (uint16) to float32, exactly; anything else unchanged."""
    if not _is_bf16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _narrow(values: np.ndarray) -> TensorHandle:
    """float32 values to bfloat16 bit patterns, rounded to nearest, ties to even, as the hardware does."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    # uint32 wraps around only for the patterns of NaN, which the last line replaces
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    quiet_nan = np.uint16(0x7FC0)
    return TensorHandle(np.where(np.isnan(values), quiet_nan, rounded), tl.bfloat16)


def _bf16_through_float32(operation):
    """Wraps an arithmetic method of the builder: bfloat16 operands are widened, a float32 result is rounded back."""

    def wrapped(self, *operands):
        handles = [o for o in operands if isinstance(o, TensorHandle)]
        if not any(map(_is_bf16, handles)):
            return operation(self, *operands)
        result = operation(self, *(_widen(o) if isinstance(o, TensorHandle) else o for o in operands))
        if result.data.dtype == np.bool_:  # a comparison
            return TensorHandle(result.data, tl.int1)
        return _narrow(result.data)

    return wrapped


def _mend_arithmetic(builder: Any) -> None:
    for name in ("binary_op", "unary_op", "create_fma", "create_erf", "create_rsqrt"):
        setattr(builder, name, _bf16_through_float32(getattr(builder, name)))

    ternary = _bf16_through_float32(builder.ternary_op)
    plain_ternary = builder.ternary_op
    # np.where only moves bit patterns; widening would be right too, but the mask is an operand there
    builder.ternary_op = lambda self, a, b, c, op: (plain_ternary if op is np.where else ternary)(self, a, b, c, op)

    plain_dot = builder.create_dot
    builder.create_dot = lambda self, a, b, d, *rest: plain_dot(self, _widen(a), _widen(b), d, *rest)

    if not hasattr(builder, "get_bf16"):  # without it `x_bf16 * 0.125` raises AttributeError
        builder.get_bf16 = lambda self, value: _narrow(np.array([value], dtype=np.float32))


def _mend_casts(builder: Any) -> None:
    def rounding_towards_zero(mode) -> bool:
        return mode is not None and mode != triton_interpreter._ir.ROUNDING_MODE.RTNE

    def cast(plain):
        def wrapped(self, source, target, *mode):
            to_bf16, from_bf16 = target.scalar == tl.bfloat16, _is_bf16(source)
            if not (to_bf16 or from_bf16) or any(map(rounding_towards_zero, mode)):
                return plain(self, source, target, *mode)
            wide = _widen(source)
            if to_bf16:
                return source if from_bf16 else _narrow(wide.data.astype(np.float32))
            return wide if target.scalar == tl.float32 else plain(self, wide, target, *mode)

        return wrapped

    builder.cast_impl = cast(builder.cast_impl)
    builder.create_fp_to_fp = cast(builder.create_fp_to_fp)


def _mend_reductions() -> None:
    def as_float32(tensor):
        if tensor.dtype.scalar != tl.bfloat16:
            return tensor
        kind = tl.block_type(tl.float32, list(tensor.shape)) if tensor.type.is_block() else tl.float32
        return tl.core.tensor(_widen(tensor.handle), kind)

    def as_bf16(tensor):
        if tensor.dtype.scalar != tl.float32:
            return tensor  # the index that argmax returns
        kind = tl.block_type(tl.bfloat16, list(tensor.shape)) if tensor.type.is_block() else tl.bfloat16
        return tl.core.tensor(_narrow(tensor.handle.data), kind)

    for operations in (triton_interpreter.ReduceOps, triton_interpreter.ScanOps):
        plain = operations.apply_impl

        def apply_impl(self, tensors, plain=plain):
            if not any(t.dtype.scalar == tl.bfloat16 for t in tensors):
                return plain(self, tensors)
            result = plain(self, tuple(map(as_float32, tensors)))
            return tuple(map(as_bf16, result)) if isinstance(result, (tuple, list)) else as_bf16(result)

        operations.apply_impl = apply_impl


def _mend_loop_bounds() -> None:
    plain = triton_interpreter._patch_lang_tensor

    def patch(tensor, scope, *rest):
        plain(tensor, scope, *rest)
        # Triton 3.6 calls int() on a one-element array, which NumPy 2.4 and later refuse
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    triton_interpreter._patch_lang_tensor = patch


def _patch_language_once_per_launch() -> None:
    """Patches the language once for a launch, and not again for each device function (tl.max, helpers) in it."""
    plain = triton_interpreter._patch_lang
    # `_patch_lang` patches the modules that it finds among the globals of a function: this function has both.
    sees_both = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
    depth = 0

    class Scope:
        def __init__(self, inner=None):
            self.inner = inner

        def restore(self):
            nonlocal depth
            if self.inner is not None:
                self.inner.restore()
                depth = 0

    def patch(fn):
        nonlocal depth
        if depth:
            return Scope()
        scope = Scope(plain(sees_both))
        depth = 1
        return scope

    triton_interpreter._patch_lang = patch


def _one_launch_at_a_time() -> None:
    """Makes a thread that launches a kernel wait until the launch of another thread has ended."""
    executor = triton_interpreter.GridExecutor
    plain, lock = executor.__call__, threading.RLock()

    @functools.wraps(plain)
    def call(self, *args, **kwargs):
        with lock:
            return plain(self, *args, **kwargs)

    executor.__call__ = call


def install() -> None:
    """Repairs the interpreter of this process. A second call changes nothing."""
    global _installed
    if _installed:
        return
    builder = triton_interpreter.InterpreterBuilder
    _mend_arithmetic(builder)
    _mend_casts(builder)
    _mend_reductions()
    _mend_loop_bounds()
    _patch_language_once_per_launch()
    _one_launch_at_a_time()
    _installed = True


@triton.jit
def _probe_block(x_ptr, y_ptr, dot_ptr, sum_ptr, N, BLOCK: tl.constexpr):
    # The parts of our kernels: a runtime bound, a product of blocks, elementwise arithmetic, a cast, a reduction.
    offs = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in tl.range(0, N, BLOCK):
        at = (start + offs)[:, None] * BLOCK + offs[None, :]
        x = tl.load(x_ptr + at)
        y = tl.load(y_ptr + at)
        z = tl.where(x > y, x * 0.5 - y, -x + y)
        total = tl.dot(x, tl.trans(z), total)
    at = offs[:, None] * BLOCK + offs[None, :]
    tl.store(dot_ptr + at, total.to(dot_ptr.dtype.element_ty))
    tl.store(sum_ptr + offs, tl.max(tl.load(x_ptr + at), axis=1) + tl.sum(tl.load(y_ptr + at), axis=1))


def self_test() -> None:
    """Runs a small kernel in float32, float16 and bfloat16 and compares it with PyTorch.

    Raises:
        RuntimeError: this Triton version behaves in a way that `install` does not repair.
    """
    block, length = 16, 32
    cpu = torch.device("cpu")  # the program that imports labutils may have made another device the default
    generator = torch.Generator(cpu).manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x, y = (torch.randn(length, block, generator=generator, device=cpu).to(dtype) for _ in range(2))
        product = torch.full((block, block), float("nan"), dtype=dtype, device=cpu)
        sums = torch.full((block,), float("nan"), dtype=dtype, device=cpu)
        try:
            _probe_block[(1,)](x, y, product, sums, length, BLOCK=block)
        except Exception as error:
            raise _broken(f"a {dtype} kernel failed: {error!r}") from error
        z = torch.where(x > y, x * 0.5 - y, -x + y)
        expected = sum(x[s : s + block].double() @ z[s : s + block].double().T for s in range(0, length, block))
        expected_sums = x[:block].amax(1).double() + y[:block].double().sum(1)
        # The product is summed in float32, then rounded once (half a unit in the last place, relative). The sums are
        # rounded twice, and NumPy chooses the order in which it sums float16.
        unit = torch.finfo(dtype).eps
        for name, got, want, units in (("dot", product, expected, 0.51), ("sum", sums, expected_sums, 8.0)):
            off = ((got.double() - want).abs() / want.abs().clamp(min=1.0)).max().item()
            allowed = max(units * unit, 1e-5)
            if not off <= allowed:
                raise _broken(f"`{name}` in {dtype} is off by {off:.1e}, allowed {allowed:.1e}")
    leftover = getattr(tl.load, "__name__", "")
    if leftover == "<lambda>":
        raise _broken("the language was left patched after a launch")


def _broken(what: str) -> RuntimeError:
    return RuntimeError(
        f"Triton {triton.__version__} with NumPy {np.__version__}: the interpreter does not compute what it should "
        f"({what}). labutils repairs the interpreters of Triton 3.6 to 3.9: install `triton>=3.6,<3.10`, or use a GPU."
    )
