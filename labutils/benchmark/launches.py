"""Checks and times one launch configuration of a kernel on this GPU, for the search of `python -m labutils tune`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from labutils.attention import reference
from labutils.attention.kernels import flash_decode, flash_v1, flash_v2, flash_v2_backward, launch_table
from labutils.attention.kernels.launch_config import LaunchConfig, Place
from labutils.attention.kernels.options import Cache, Options
from labutils.attention.kernels.replay import Replay
from labutils.benchmark.timing import Timing, time_call
from labutils.machine import runtime

SECONDS = 0.1  # of recorded repeats for a candidate at one size, in one round
CHECKED_LENGTH = 397  # no block divides it
LENGTHS = (1024, 4096)
_DECODED = ((1, 8192), (8, 8192))  # queries and keys of a sequence
_HEADS_PER_KEY_HEAD = 8


class OnGpu:
    """The `Experiment` of `labutils.attention.tuning.search` on this GPU.

    Forward, dK/dV and dQ: only the kernel, launched again and again, at N = 1,024 and 4,096 with 8,192 tokens (16,384
    on a GPU with 40 GiB or more) and H * D = 2,048. v1: its whole function at N = 1,024. Decoding: its whole function,
    with the merge, for one and for eight queries a sequence, 8,192 keys and 8 query heads a key head.

    Args:
        place: the entry of the launch table that is tuned. seconds: of recorded repeats, at each size.

    Raises:
        RuntimeError: there is no GPU.
    """

    def __init__(self, place: Place, *, seconds: float = SECONDS):
        self.place, self.seconds = place, seconds
        if runtime.capability is None:
            raise RuntimeError("there is no GPU here to time launch configurations on.")
        capability = runtime.capability
        self.dtype = torch.float32 if place.dtype == "float32" else runtime.default_dtype(capability)
        self.causal = place.causal is not False
        self.shipped = {
            kernel: launch_table.shipped(place._replace(kernel=kernel), capability)
            for kernel in ({"forward", "dkdv", "dq"} if place.kernel in ("dkdv", "dq") else {place.kernel})
        }
        self._inputs: dict[tuple, tuple] = {}

    def check(self, config: LaunchConfig) -> None:
        """Checks the result at a length that no block divides, with several query heads a key head.

        Raises:
            AssertionError: it breaks the rule of `reference`.
            RuntimeError: the kernel cannot be launched so.
        """
        n, d, scale = CHECKED_LENGTH, self.place.head_dim, self.place.head_dim**-0.5
        options = self._options()
        generator = torch.Generator(runtime.device).manual_seed(1)

        def draw(rows: int, heads: int) -> torch.Tensor:
            return torch.randn(2, rows, heads, d, generator=generator, device=runtime.device, dtype=self.dtype)

        causal = dict(causal=self.causal, softmax_scale=scale)
        if self.place.kernel == "decode":
            for n_q in (1, 8):
                q, k, v = draw(n_q, 8), draw(n, 2), draw(n, 2)
                cut = flash_decode.cut_to_rows(config, n_q * 4)
                out, lse = flash_decode.decode(q, k, v, Cache(None, n), options, config=cut)
                reference.check_attention(out, q, k, v, lse=lse, **causal).raise_if_failed()
            return
        q, k, v = draw(n, 4), draw(n, 2), draw(n, 2)
        if self.place.kernel == "v1":
            for mask in (False, True):
                out, lse = flash_v1.forward(q, k, v, scale, mask, config)
                reference.check_attention(out, q, k, v, lse=lse, causal=mask, softmax_scale=scale).raise_if_failed()
        elif self.place.kernel == "forward":
            out, lse = flash_v2.forward(q, k, v, options, config)
            reference.check_attention(out, q, k, v, lse=lse, **causal).raise_if_failed()
        else:
            dout = draw(n, 4)
            out, lse = flash_v2.forward(q, k, v, options, self.shipped["forward"])
            configs = self.shipped | {self.place.kernel: config}
            gradients = flash_v2_backward.backward(dout, q, k, v, out, lse, options, configs)
            for verdict in reference.check_gradients(gradients, dout, q, k, v, **causal):
                verdict.raise_if_failed()

    def times(self, config: LaunchConfig) -> list[Timing]:
        """The time at each size, by `time_call`."""
        if self.place.kernel == "decode":
            calls = [self._decode(config, *size) for size in _DECODED]
        elif self.place.kernel == "v1":
            calls = [self._v1(config)]
        else:
            calls = [self._launch(config, n) for n in LENGTHS]
        return [time_call(call, seconds=self.seconds) for call in calls]

    def _options(self) -> Options:
        return Options(self.place.head_dim**-0.5, window_right=0 if self.causal else None)

    def _draw(self, *shapes: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        """Random tensors. They are made once for each size."""
        if shapes not in self._inputs:
            on_gpu = dict(device=runtime.device, dtype=self.dtype)
            generator = torch.Generator(runtime.device).manual_seed(0)
            self._inputs[shapes] = tuple(torch.randn(shape, generator=generator, **on_gpu) for shape in shapes)
        return self._inputs[shapes]

    def _shape(self, n: int) -> tuple[int, int, int, int]:
        tokens = runtime.choose(cpu=8192, gpu=8192, large_gpu=16384)
        return (tokens // n, n, 2048 // self.place.head_dim, self.place.head_dim)

    def _launch(self, config: LaunchConfig, n: int) -> Callable[[], Any]:
        q, k, v, dout = self._draw(*[self._shape(n)] * 4)
        options = self._options()
        if self.place.kernel == "forward":
            launched = flash_v2.launch_forward(q, k, v, options, config)[2]
        else:
            out, lse = flash_v2.forward(q, k, v, options, self.shipped["forward"])
            configs = self.shipped | {self.place.kernel: config}
            _, launches, _ = flash_v2_backward.launch_backward(dout, q, k, v, out, lse, options, configs)
            launched = launches[self.place.kernel]
        assert launched is not None  # it is None for an empty grid only
        again = Replay(launched).again

        # `again` holds only the addresses of the tensors; `launched` keeps the tensors alive.
        def repeat(alive: Any = launched) -> Any:
            return again()

        return repeat

    def _v1(self, config: LaunchConfig) -> Callable[[], Any]:
        q, k, v = self._draw(*[self._shape(1024)] * 3)
        return lambda: flash_v1.forward(q, k, v, self.place.head_dim**-0.5, self.causal, config)

    def _decode(self, config: LaunchConfig, n_q: int, n_k: int) -> Callable[[], Any]:
        heads_kv, d = 8, self.place.head_dim
        batch = 4 * runtime.choose(cpu=1, gpu=1, large_gpu=4)
        keys = (batch, n_k, heads_kv, d)
        q, k, v = self._draw((batch, n_q, heads_kv * _HEADS_PER_KEY_HEAD, d), keys, keys)
        cut = flash_decode.cut_to_rows(config, n_q * _HEADS_PER_KEY_HEAD)
        cache = Cache(None, n_k)
        return lambda: flash_decode.decode(q, k, v, cache, self._options(), config=cut)
