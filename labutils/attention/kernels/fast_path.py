"""The short way through forward, backward and decoding: for a call of a form seen before, no checks, no specialisation.

A launch through Triton's JIT looks at each of some forty arguments to find out which specialisation of the kernel it
needs, and a PyTorch operator passes through a dispatcher. Together that costs more host time than all of PyTorch's own
attention. What decides about it is known after the first call: shapes, strides, dtypes, alignment and options. They are
the key under which the compiled kernels, their grids and their arguments are kept; the next call of that form fills in
the pointers. Decoding also fills in the length of its cache and what follows from it, which change with every token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from labutils.attention.kernels import flash_decode, flash_v2, flash_v2_backward
from labutils.attention.kernels.flash_v2 import Options
from labutils.attention.kernels.launch import Launched
from labutils.machine import runtime

MOST_FORMS = 4096  # generation makes a new length for every token: the oldest forms are forgotten
_PLAIN = {torch.Tensor, torch.nn.Parameter}


def may_be_short(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether nothing needs the long way, over PyTorch's dispatcher.

    It is for whatever looks at operators as they run: a compiler, a FLOP counter, a transform, forward-mode
    differentiation, a subclass of tensors; for a view with a minus sign that is still due (the imaginary part of a
    conjugate), which the dispatcher resolves; for the interpreter; and for a GPU that is not the current one, which is
    where Triton launches. Autocast needs nothing: whoever asks has cast the tensors, and nothing on the short way is an
    operation that it casts.
    """
    return (
        not torch.compiler.is_compiling()  # first: what follows cannot be traced
        and not runtime.interpreted
        and type(q) in _PLAIN
        and type(k) in _PLAIN
        and type(v) in _PLAIN
        and q.device.index == torch._C._cuda_getDevice()
        and torch._C._len_torch_dispatch_stack() == 0
        and not (q.is_neg() or k.is_neg() or v.is_neg())
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: tuple, prepare: Callable[[], Options]
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, differentiable; `prepare` checks the arguments of a new form and makes its kernel's options."""
    key = (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
        q.device, k.device, v.device, q.data_ptr() % 16, k.data_ptr() % 16, v.data_ptr() % 16, options,
    )  # fmt: skip
    form = _form(key, lambda: _Form(prepare()))
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _FlashAttention.apply(q, k, v, form)
    return form.forward(q, k, v)


def decoding(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seqlen: int,
    options: tuple,
    splits: int,
    prepare: Callable[[], Options],
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of queries against the first `seqlen` rows of a cache, one for each sequence; no backward.

    While a cache grows, its length is another for every token, and so are the strides of one that is made anew for
    each: neither is part of the form.
    """
    key = (
        "decoding", q.shape, k.shape[0], k.shape[2:], k.shape == v.shape, q.stride(), q.dtype, k.dtype, v.dtype,
        q.device, k.device, v.device, q.data_ptr() % 16, k.data_ptr() % 16, v.data_ptr() % 16, options, splits,
    )  # fmt: skip
    return _form(key, lambda: _Decoding(q, k, seqlen, prepare(), splits)).forward(q, k, v, seqlen)


def _form(key: tuple, make: Callable[[], Any]) -> Any:
    """What is known under this key, or is from now on."""
    try:
        form = _forms.get(key)
    except TypeError:  # a list where a number belongs has no hash
        make()  # says which
        raise
    if form is None:
        form = make()
        while len(_forms) >= MOST_FORMS:
            del _forms[next(iter(_forms))]
        _forms[key] = form
    return form


class _Form:
    """A call of which all but the addresses is known. It holds no tensor."""

    def __init__(self, options: Options):
        self.options = options
        self.seen = False
        self.launched: Launched | None = None
        self.backwards: dict[tuple, _Backward] = {}

    def forward(self, q, k, v):
        """The first two times through Triton's JIT, which compiles where that is needed.

        Many a form is not seen again; what launches it anew takes as long to make as a launch, and is not made for it.
        """
        if self.launched is None:
            out, lse, launched = flash_v2.start(q, k, v, self.options)
            if self.seen and launched is not None:  # None: an empty grid, and nothing was launched
                self.out, self.lse = (out.shape, out.stride()), (lse.shape, lse.stride())
                self.launched = launched()
            self.seen = True
            return out, lse
        out = q.new_empty_strided(*self.out)  # in half the time of new_empty
        lse = q.new_empty_strided(*self.lse, dtype=torch.float32)
        self.launched.again(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr())
        return out, lse

    def backward(self, dout, q, k, v, out, lse, dlse):
        """dq, dk, dv. Saved tensors may come back with other strides (from the host, where they were parked)."""
        tensors = (q, k, v, out, dout, lse)
        addresses = [t.data_ptr() for t in tensors]
        plain = dlse is None and dout.dtype == q.dtype and q.device.index == torch._C._cuda_getDevice()
        if not plain or any(address % 16 for address in addresses):
            return flash_v2_backward.backward(dout, q, k, v, out, lse, self.options, dlse=dlse)
        key = tuple(t.stride() for t in tensors)
        known = self.backwards.get(key)
        if known is not None:
            return known.again(q, *addresses)
        gradients, launched, per_row = flash_v2_backward.start(dout, q, k, v, out, lse, self.options)
        dq, dkdv = launched["dq"], launched["dkdv"]
        if dq is not None and dkdv is not None:  # None: an empty grid, and nothing was launched
            self.backwards[key] = _Backward(gradients, dq(), dkdv(), per_row)
        return gradients


class _Backward:
    """Both kernels of a backward pass, to be launched again with tensors like those of the first time."""

    def __init__(self, gradients: tuple[torch.Tensor, ...], dq: Launched, dkdv: Launched, per_row: torch.Tensor):
        self.dq, self.dkdv = dq, dkdv
        self.gradients = [(t.shape, t.stride()) for t in gradients]
        self.per_row, self.half = (per_row.shape, per_row.stride()), 4 * per_row.stride(0)  # bytes of L log2 e

    def again(self, like, q, k, v, out, dout, lse):
        """dq, dk, dv, on the device and in the dtype of `like`; the others are addresses."""
        dq, dk, dv = (like.new_empty_strided(*form) for form in self.gradients)
        per_row = like.new_empty_strided(*self.per_row, dtype=torch.float32)
        lse2 = per_row.data_ptr()
        delta = lse2 + self.half
        self.dq.again(q, k, v, out, dout, lse, lse2, delta, dq.data_ptr())
        self.dkdv.again(q, k, v, dout, lse2, delta, dk.data_ptr(), dv.data_ptr())
        return dq, dk, dv


_SPLITS = flash_decode._decode_kernel.arg_names.index("SPLITS")
_MERGED = flash_decode._merge_kernel.arg_names.index("SPLITS")


class _Decoding:
    """Decoding of which all but the addresses, the length and the strides of the cache is known. It holds no tensor."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, seqlen: int, options: Options, splits: int):
        self.options, self.splits = options, splits
        self.plan = flash_decode.Plan.of(q, k.shape[2], options.window[1], seqlen)
        batch, n_q, heads, head_dim = q.shape
        self.out = q.shape, (n_q * heads * head_dim, heads * head_dim, head_dim, 1)
        self.lse = (batch, heads, n_q), (heads * n_q, n_q, 1)
        # Of one part of the keys; the first stride is that from part to part.
        self.parts = (
            (q.shape, (batch * n_q * heads * head_dim, *self.out[1])),
            ((batch, n_q, heads), (batch * n_q * heads, n_q * heads, heads, 1)),
        )
        self.known: dict[tuple, list[Launched]] = {}

    def forward(self, q, k, v, seqlen):
        """Through Triton's JIT where another kernel is needed than those that are known."""
        splits = self.splits or self.plan.splits(seqlen)
        strides = (*k.stride(), *v.stride())
        # Triton compiles anew for a stride that is 1, a multiple of 16 or too large for 32 bits.
        kinds = [(stride == 1, stride % 16, stride >> 31) for stride in strides]
        key = (splits == 1 or flash_decode.rows_of_merge(splits), seqlen >> 31, *kinds)
        known = self.known.get(key)
        if known is None:
            cache = flash_decode.Cache(None, seqlen)
            out, lse, launched = flash_decode.start(q, k, v, cache, self.options, self.plan, 0, splits)
            if all(launched):  # None: an empty grid, and nothing was launched
                self.known[key] = [each() for each in launched if each is not None]
            return out, lse
        out = q.new_empty_strided(*self.out)  # in half the time of new_empty
        lse = q.new_empty_strided(*self.lse, dtype=torch.float32)
        parts, part_lse = out, lse
        if splits > 1:
            parts, part_lse = (
                q.new_empty_strided((splits, *part[0]), part[1], dtype=torch.float32) for part in self.parts
            )
        known[0].again(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), parts.data_ptr(), part_lse.data_ptr(),
            grid=(self.plan.programs * splits, 1, 1), place=_SPLITS,
            numbers=(splits, q.shape[1], seqlen, 0, *q.stride(), *strides),
        )  # fmt: skip
        if splits > 1:
            known[1].again(
                parts.data_ptr(), part_lse.data_ptr(), out.data_ptr(), lse.data_ptr(), place=_MERGED, numbers=(splits,)
            )
        return out, lse


_forms: dict[tuple, _Form | _Decoding] = {}


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, form):
        out, lse = form.forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.form = form
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable  # there is no second derivative: asking for one raises
    def backward(ctx, dout, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout.resolve_neg()
        dlse = None if dlse is None else dlse.resolve_neg()
        return *ctx.form.backward(dout, q, k, v, out, lse, dlse), None
