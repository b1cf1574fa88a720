"""The short way to the plain forward: for a call of a form seen before, no checks and no specialisation.

A launch through Triton's JIT looks at each of some forty arguments to find out which specialisation of the kernel it
needs, and a PyTorch operator passes through a dispatcher. Together that costs more host time than all of PyTorch's own
attention. What decides about it is known after the first call: shapes, strides, dtypes, alignment and options. They are
the key under which the compiled kernel, its grid and its arguments are kept; the next call of that form fills in five
pointers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable
from triton.tools.tensor_descriptor import TensorDescriptor

from labutils.kernels import flash_v2, flash_v2_backward
from labutils.kernels.flash_v2 import Options
from labutils.kernels.launch import Launched

MOST_FORMS = 4096  # generation makes a new length for every token: the oldest forms are forgotten


class Form:
    """A call of which all but the values is known; for tensors on the current device."""

    def __init__(self, options: Options):
        self.options = options
        self._launched: Launched | None = None
        self._shapes: tuple[torch.Size, torch.Size] | None = None

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse, differentiable; the first time through Triton's JIT, which compiles where that is needed."""
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return _FlashAttention.apply(q, k, v, self)
        return self._forward(q, k, v)

    def _forward(self, q, k, v):
        launched = self._launched
        if launched is None:
            out, lse, self._launched = flash_v2.start(q, k, v, self.options)
            self._shapes = out.shape, lse.shape
            return out, lse
        out = q.new_empty(self._shapes[0])
        lse = q.new_empty(self._shapes[1], dtype=torch.float32)
        _, k_like, v_like, _, _, *rest = launched.arguments
        launched.start(q, _like(k_like, k), _like(v_like, v), out, lse, *rest)
        return out, lse


def _like(model: torch.Tensor | TensorDescriptor, t: torch.Tensor) -> torch.Tensor | TensorDescriptor:
    """The tensor, or a descriptor of it with the shape and strides of the `model`, which need no second check."""
    if type(model) is not TensorDescriptor:
        return t
    descriptor = object.__new__(TensorDescriptor)
    descriptor.__dict__.update(model.__dict__, base=t)
    return descriptor


_forms: dict[tuple, Form] = {}


def find(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: tuple, prepare: Callable[[], Options]) -> Form:
    """The form of this call; `prepare` checks the arguments and makes the options of one that is new."""
    key = (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
        q.device, k.device, v.device, (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16, options,
    )  # fmt: skip
    form = _forms.get(key)
    if form is None:
        form = Form(prepare())
        while len(_forms) >= MOST_FORMS:
            del _forms[next(iter(_forms))]
        _forms[key] = form
    return form


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, form):
        out, lse = form._forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = form.options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable  # there is no second derivative: asking for one raises
    def backward(ctx, dout, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        return *flash_v2_backward.backward(dout, q, k, v, out, lse, ctx.options, dlse=dlse), None
