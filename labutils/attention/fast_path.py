"""The fast path: a call like an earlier one launches the same compiled kernels again, with other addresses.

On the usual path a call passes through PyTorch's dispatcher, and Triton's JIT looks at some forty arguments to find the
kernel that was compiled for them. Together that takes more host time than a whole call of PyTorch's own attention. But
shapes, strides, dtypes, alignment and options already decide which kernel it is. They are the key of a kind of call.
Under that key the fast path keeps the compiled kernels, their grids and their arguments.

Many shapes occur only once, and preparing a replay costs as much as a launch. So the first two calls of a kind go
through Triton's JIT, the second prepares the replay, and the third is the first replay. Decoding prepares the replay in
its first call: there a kind returns with every token, only with another length of the cache.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from labutils.attention.kernels import flash_decode, flash_v2, flash_v2_backward
from labutils.attention.kernels.options import Cache, Options
from labutils.attention.kernels.replay import Replay
from labutils.machine import runtime

MOST_CALLS = 4096  # generation brings a new length with every token: then the oldest calls are forgotten
_PLAIN = {torch.Tensor, torch.nn.Parameter}


def applies(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether a kernel may be launched without PyTorch's dispatcher.

    The dispatcher serves everything that looks at operators as they run: a compiler, a FLOP counter, a transform,
    forward-mode differentiation, a tensor subclass. It also resolves views with a pending minus sign (the imaginary
    part of a conjugate). Calls in the interpreter go through it, too. So do calls on a GPU that is not the current one,
    because Triton launches on the current one. Autocast does not need it: the interface casts the tensors itself.
    """
    return (
        not torch.compiler.is_compiling()  # must come first: a compiler cannot trace the rest
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
    """The entry for calls with tensors like these and the arguments `asked`.

    The first such call runs `check`, which raises for wrong arguments and otherwise returns the options.
    """
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
    """The entry for decoding with tensors like these and the arguments `asked`; `check` as in `known_call`.

    The length of the cache is not part of the key, since it grows with every token. Neither are the cache's strides:
    they grow as well if the cache is allocated anew for each token.
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
    except TypeError:  # an argument cannot be hashed, for example a list that should be a number
        make()  # its check raises an error that names the argument
        raise
    if found is None:
        made = make()
        with _lock:  # other threads add entries and forget some, too
            while len(_known) >= MOST_CALLS:
                del _known[next(iter(_known))]
            found = _known.setdefault(key, made)
    return found


class KnownCall:
    """Forward and backward pass of one kind of call, ready for tensors at other addresses. It holds no tensor."""

    def __init__(self, options: Options):
        self.options = options
        self.seen = False
        self.replay: Replay | None = None
        self.backwards: dict[tuple, _KnownBackward] = {}

    def output(self, q, k, v):
        """out and lse. The first two calls go through Triton's JIT, which compiles the kernel if needed."""
        if self.replay is None:
            out, lse, launch = flash_v2.launch_forward(q, k, v, self.options)
            if self.seen and launch is not None:  # None: the grid was empty, and nothing was launched
                self.out, self.lse = (out.shape, out.stride()), (lse.shape, lse.stride())
                self.replay = Replay(launch)
            self.seen = True
            return out, lse
        out = q.new_empty_strided(*self.out)  # takes half the time of new_empty
        lse = q.new_empty_strided(*self.lse, dtype=torch.float32)
        self.replay.again(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr())
        return out, lse

    def gradients(self, dout, dlse, q, k, v, out, lse):
        """dq, dk, dv; None if the call needs PyTorch's dispatcher: dout is batched, or something watches operators.

        Each set of strides has a replay, since tensors saved on the host may come back with other strides.
        """
        tensors = (q, k, v, out, dout, lse)
        try:
            addresses = [t.data_ptr() for t in tensors]
            if dlse is not None:
                dlse.data_ptr()
        except RuntimeError:  # dout or dlse has no memory of its own
            return None
        if torch._C._len_torch_dispatch_stack():
            return None
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
    """Launches both kernels of a backward pass again, for tensors like the first ones."""

    def __init__(self, gradients: tuple[torch.Tensor, ...], dq: Replay, dkdv: Replay, per_row: torch.Tensor):
        self.dq, self.dkdv = dq, dkdv
        self.gradients = [(t.shape, t.stride()) for t in gradients]
        self.per_row, self.half = (per_row.shape, per_row.stride()), 4 * per_row.stride(0)  # half: bytes of L log2 e

    def relaunch(self, like, q, k, v, out, dout, lse):
        """dq, dk, dv, on the device and in the dtype of `like`; the other arguments are addresses."""
        dq, dk, dv = (like.new_empty_strided(*layout) for layout in self.gradients)
        per_row = like.new_empty_strided(*self.per_row, dtype=torch.float32)
        lse2 = per_row.data_ptr()
        delta = lse2 + self.half
        self.dq.again(q, k, v, out, dout, lse, lse2, delta, dq.data_ptr())
        self.dkdv.again(q, k, v, dout, lse2, delta, dk.data_ptr(), dv.data_ptr())
        return dq, dk, dv


# Where the argument SPLITS stands in each kernel.
_PLACE_IN_DECODE = flash_decode._decode_kernel.arg_names.index("SPLITS")
_PLACE_IN_MERGE = flash_decode._merge_kernel.arg_names.index("SPLITS")


class KnownDecoding:
    """Decoding of one kind, ready for a cache at another address, of another length and strides. It holds no tensor."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, seqlen: int, options: Options, splits: int):
        self.options, self.splits = options, splits
        self.plan = flash_decode.Plan.of(q, k.shape[2], options.window_right, seqlen)
        batch, n_q, heads, head_dim = q.shape
        self.out = q.shape, (n_q * heads * head_dim, heads * head_dim, head_dim, 1)
        self.lse = (batch, heads, n_q), (heads * n_q, n_q, 1)
        # Shape and strides of out and lse of one part of the keys. The first stride leads from part to part.
        self.parts = (
            (q.shape, (batch * n_q * heads * head_dim, *self.out[1])),
            ((batch, n_q, heads), (batch * n_q * heads, n_q * heads, heads, 1)),
        )
        self.replays: dict[tuple, list[Replay]] = {}

    def decode(self, q, k, v, seqlen):
        """out and lse of queries against the first `seqlen` rows of each sequence's cache; no backward.

        The call goes through Triton's JIT if no replay has the kernel that this length and these strides need.
        """
        splits = self.splits or self.plan.splits(seqlen)
        strides = (*k.stride(), *v.stride())
        # Triton compiles another kernel if a stride is 1, a multiple of 16 or too large for 32 bits.
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
        out = q.new_empty_strided(*self.out)  # takes half the time of new_empty
        lse = q.new_empty_strided(*self.lse, dtype=torch.float32)
        parts, part_lse = out, lse
        if splits > 1:
            parts, part_lse = (
                q.new_empty_strided((splits, *part[0]), part[1], dtype=torch.float32) for part in self.parts
            )
        replays[0].again(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), parts.data_ptr(), part_lse.data_ptr(),
            grid=(self.plan.programs * splits, 1, 1), place=_PLACE_IN_DECODE,
            numbers=(splits, q.shape[1], seqlen, 0, *q.stride(), *strides),
        )  # fmt: skip
        if splits > 1:
            replays[1].again(
                parts.data_ptr(),
                part_lse.data_ptr(),
                out.data_ptr(),
                lse.data_ptr(),
                place=_PLACE_IN_MERGE,
                numbers=(splits,),
            )
        return out, lse


_known: dict[tuple, KnownCall | KnownDecoding] = {}
_lock = threading.Lock()  # of all changes to `_known`; to read one entry needs no lock
