"""The fast path of forward, backward and decoding: a call like an earlier one is launched again, with other addresses.

A launch through Triton's JIT looks at each of some forty arguments to find out which specialisation of the kernel it
needs, and a PyTorch operator passes through a dispatcher. Together that costs more host time than all of PyTorch's own
attention. What decides about it is known after the first call: shapes, strides, dtypes, alignment and options. They are
the key under which a call is kept, with its compiled kernels, their grids and their arguments.

Many shapes occur only once, and preparing a replay costs as much as a launch. So the first two calls of a kind go
through Triton's JIT, the second prepares the replay, and replays begin with the third. Decoding prepares with its first
call: there a kind returns with every token, with another length of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from labutils.attention.kernels import flash_decode, flash_v2, flash_v2_backward
from labutils.attention.kernels.options import Cache, Options
from labutils.attention.kernels.replay import Replay
from labutils.machine import runtime

MOST_CALLS = 4096  # generation makes a new length for every token: the oldest calls are forgotten
_PLAIN = {torch.Tensor, torch.nn.Parameter}


def applies(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether nothing needs PyTorch's dispatcher, so that a kernel may be launched without it.

    The dispatcher serves whatever looks at operators as they run: a compiler, a FLOP counter, a transform,
    forward-mode differentiation, a subclass of tensors. It resolves views with a pending minus sign (the imaginary part
    of a conjugate). The interpreter and a GPU that is not the current one, where Triton launches, take that way, too.
    Autocast needs nothing: the interface has cast the tensors already.
    """
    return (
        not torch.compiler.is_compiling()  # first: the rest cannot be traced
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


def known_call(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, asked: tuple, check: Callable[[], Options]
) -> KnownCall:
    """The call with tensors like these and the arguments `asked`; the first time, `check` checks them."""
    key = (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
        q.device, k.device, v.device, q.data_ptr() % 16, k.data_ptr() % 16, v.data_ptr() % 16, asked,
    )  # fmt: skip
    return _find(key, lambda: KnownCall(check()))


def known_decoding(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seqlen: int,
    splits: int,
    asked: tuple,
    check: Callable[[], Options],
) -> KnownDecoding:
    """The decoding with tensors like these and the arguments `asked`; the first time, `check` checks them.

    While a cache grows, its length changes with every token, and so do the strides of a cache that is made anew for
    each: neither is part of the key.
    """
    key = (
        "decoding", q.shape, k.shape[0], k.shape[2:], k.shape == v.shape, q.stride(), q.dtype, k.dtype, v.dtype,
        q.device, k.device, v.device, q.data_ptr() % 16, k.data_ptr() % 16, v.data_ptr() % 16, asked, splits,
    )  # fmt: skip
    return _find(key, lambda: KnownDecoding(q, k, seqlen, check(), splits))


def _find(key: tuple, make: Callable[[], Any]) -> Any:
    """The entry under this key, made if missing."""
    try:
        found = _known.get(key)
    except TypeError:  # an argument that cannot be hashed, such as a list for a number
        make()  # the check names it
        raise
    if found is None:
        found = make()
        while len(_known) >= MOST_CALLS:
            del _known[next(iter(_known))]
        _known[key] = found
    return found


class KnownCall:
    """A forward and backward pass of which only the addresses are unknown. It holds no tensor."""

    def __init__(self, options: Options):
        self.options = options
        self.seen = False
        self.replay: Replay | None = None
        self.backwards: dict[tuple, _KnownBackward] = {}

    def output(self, q, k, v):
        """out and lse; the first two times through Triton's JIT, which compiles if needed."""
        if self.replay is None:
            out, lse, launch = flash_v2.launch_forward(q, k, v, self.options)
            if self.seen and launch is not None:  # None: the grid was empty, and nothing was launched
                self.out, self.lse = (out.shape, out.stride()), (lse.shape, lse.stride())
                self.replay = Replay(launch)
            self.seen = True
            return out, lse
        out = q.new_empty_strided(*self.out)  # in half the time of new_empty
        lse = q.new_empty_strided(*self.lse, dtype=torch.float32)
        self.replay.again(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr())
        return out, lse

    def gradients(self, dout, dlse, q, k, v, out, lse):
        """dq, dk, dv. Saved tensors may return with other strides (from host memory, where they were parked)."""
        tensors = (q, k, v, out, dout, lse)
        addresses = [t.data_ptr() for t in tensors]
        plain = dlse is None and dout.dtype == q.dtype and q.device.index == torch._C._cuda_getDevice()
        if not plain or any(address % 16 for address in addresses):
            return flash_v2_backward.launch_backward(dout, q, k, v, out, lse, self.options, dlse=dlse)[0]
        key = tuple(t.stride() for t in tensors)
        known = self.backwards.get(key)
        if known is not None:
            return known.relaunch(q, *addresses)
        gradients, launches, per_row = flash_v2_backward.launch_backward(dout, q, k, v, out, lse, self.options)
        dq, dkdv = launches["dq"], launches["dkdv"]
        if dq is not None and dkdv is not None:  # None: a grid was empty, and nothing was launched
            self.backwards[key] = _KnownBackward(gradients, Replay(dq), Replay(dkdv), per_row)
        return gradients


class _KnownBackward:
    """Both kernels of a backward pass, to be launched again with tensors like those of the first time."""

    def __init__(self, gradients: tuple[torch.Tensor, ...], dq: Replay, dkdv: Replay, per_row: torch.Tensor):
        self.dq, self.dkdv = dq, dkdv
        self.gradients = [(t.shape, t.stride()) for t in gradients]
        self.per_row, self.half = (per_row.shape, per_row.stride()), 4 * per_row.stride(0)  # bytes of L log2 e

    def relaunch(self, like, q, k, v, out, dout, lse):
        """dq, dk, dv, on the device and in the dtype of `like`; the other arguments are addresses."""
        dq, dk, dv = (like.new_empty_strided(*form) for form in self.gradients)
        per_row = like.new_empty_strided(*self.per_row, dtype=torch.float32)
        lse2 = per_row.data_ptr()
        delta = lse2 + self.half
        self.dq.again(q, k, v, out, dout, lse, lse2, delta, dq.data_ptr())
        self.dkdv.again(q, k, v, dout, lse2, delta, dk.data_ptr(), dv.data_ptr())
        return dq, dk, dv


_SPLITS = flash_decode._decode_kernel.arg_names.index("SPLITS")
_MERGED = flash_decode._merge_kernel.arg_names.index("SPLITS")


class KnownDecoding:
    """Decoding of which only the addresses, the length and the strides of the cache are unknown. It holds no tensor."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, seqlen: int, options: Options, splits: int):
        self.options, self.splits = options, splits
        self.plan = flash_decode.Plan.of(q, k.shape[2], options.window_right, seqlen)
        batch, n_q, heads, head_dim = q.shape
        self.out = q.shape, (n_q * heads * head_dim, heads * head_dim, head_dim, 1)
        self.lse = (batch, heads, n_q), (heads * n_q, n_q, 1)
        # Of one part of the keys; the first stride is that from part to part.
        self.parts = (
            (q.shape, (batch * n_q * heads * head_dim, *self.out[1])),
            ((batch, n_q, heads), (batch * n_q * heads, n_q * heads, heads, 1)),
        )
        self.replays: dict[tuple, list[Replay]] = {}

    def decode(self, q, k, v, seqlen):
        """out and lse of queries against the first `seqlen` rows of each sequence's cache; no backward.

        Goes through Triton's JIT if it needs a kernel that no replay has.
        """
        splits = self.splits or self.plan.splits(seqlen)
        strides = (*k.stride(), *v.stride())
        # Triton compiles anew for a stride that is 1, a multiple of 16 or too large for 32 bits.
        kinds = [(stride == 1, stride % 16, stride >> 31) for stride in strides]
        key = (splits == 1 or flash_decode.rows_of_merge(splits), seqlen >> 31, *kinds)
        replays = self.replays.get(key)
        if replays is None:
            cache = Cache(None, seqlen)
            out, lse, launches = flash_decode.launch_decode(q, k, v, cache, self.options, self.plan, 0, splits)
            started = [launch for launch in launches if launch is not None]
            if len(started) == len(launches):  # else a grid was empty
                self.replays[key] = [Replay(launch) for launch in started]
            return out, lse
        out = q.new_empty_strided(*self.out)  # in half the time of new_empty
        lse = q.new_empty_strided(*self.lse, dtype=torch.float32)
        parts, part_lse = out, lse
        if splits > 1:
            parts, part_lse = (
                q.new_empty_strided((splits, *part[0]), part[1], dtype=torch.float32) for part in self.parts
            )
        replays[0].again(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), parts.data_ptr(), part_lse.data_ptr(),
            grid=(self.plan.programs * splits, 1, 1), place=_SPLITS,
            numbers=(splits, q.shape[1], seqlen, 0, *q.stride(), *strides),
        )  # fmt: skip
        if splits > 1:
            replays[1].again(
                parts.data_ptr(), part_lse.data_ptr(), out.data_ptr(), lse.data_ptr(), place=_MERGED, numbers=(splits,)
            )
        return out, lse


_known: dict[tuple, KnownCall | KnownDecoding] = {}
