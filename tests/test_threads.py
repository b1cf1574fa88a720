"""Calls from several threads at a time: right, whatever the others do (faults F7, F12 and F13)."""

import ctypes
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from labutils import runtime
from labutils.attention import fast_path, interface
from labutils.attention.kernels import launch
from labutils.attention.kernels.options import Options

DEVICE = runtime.device
DTYPE = torch.float32 if runtime.interpreted else torch.float16


def in_threads(run, count=3):
    """What `run(i)` returns in each of so many threads; raises the first error of a thread."""
    results, errors = [None] * count, []

    def guarded(i):
        try:
            results[i] = run(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


@pytest.fixture
def often_switching():
    """Python changes threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def make(n, head_dim=16):
    return [torch.randn(1, n, 2, head_dim, device=DEVICE, dtype=DTYPE, requires_grad=True) for _ in range(3)]


def forward_and_backward(q, k, v):
    out = interface.flash_attn_func(q, k, v, causal=True)
    return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]


def test_threads_compute_what_one_thread_computes(often_switching):
    """F7: on a CPU two launches of Triton's interpreter disturbed each other."""
    inputs = [make(20 + i) for i in range(3)]
    expected = [forward_and_backward(*tensors) for tensors in inputs]
    for _ in range(2):
        for theirs, alone in zip(in_threads(lambda i: forward_and_backward(*inputs[i])), expected, strict=True):
            for a, b in zip(theirs, alone, strict=True):
                assert torch.equal(a, b)


@pytest.mark.skipif(not runtime.interpreted, reason="on a GPU kernels are compiled")
def test_a_kernel_of_somebody_else_waits_too(often_switching):
    """F7: notebooks launch kernels of their own, without the host functions of labutils."""
    import triton
    from triton import language as tl

    @triton.jit
    def double(x_ptr, y_ptr, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + at, tl.load(x_ptr + at) * 2)

    def run(i):
        x = torch.full((64,), float(i))
        for _ in range(10):
            y = torch.empty(64)
            double[(8,)](x, y, BLOCK=8)
            assert torch.equal(y, x * 2)

    in_threads(run)


class SlowToForget(dict):
    """A dict that lets other threads run before it deletes an entry."""

    def __delitem__(self, key):
        time.sleep(1e-4)
        super().__delitem__(key)


def test_many_kinds_of_calls_from_many_threads(monkeypatch):
    """F13: while one thread forgot the oldest entries, another one did, too: KeyError or RuntimeError."""
    monkeypatch.setattr(fast_path, "_known", SlowToForget())
    monkeypatch.setattr(fast_path, "MOST_CALLS", 3)

    def run(i):
        for n in range(50):
            fast_path._find((i, n), lambda: fast_path.KnownCall(Options(0.125)))

    in_threads(run, 8)
    assert len(fast_path._known) == 3


def test_threads_that_ask_for_one_kind_share_its_entry(monkeypatch):
    monkeypatch.setattr(fast_path, "_known", {})
    both = threading.Barrier(2)

    def make():
        both.wait(10)
        return object()

    first, second = in_threads(lambda i: fast_path._find(("key",), make), 2)
    assert first is second


class Driver:
    """What `make_context_current` asks of the CUDA driver; a context belongs to a thread."""

    def __init__(self):
        self.current = threading.local()
        self.calls = []

    def cuCtxGetCurrent(self, into):
        into._obj.value = getattr(self.current, "context", None)
        return 0

    def cuDeviceGet(self, into, number):
        into._obj.value = 10 + number
        return 0

    def cuDevicePrimaryCtxRetain(self, into, device):
        into._obj.value = 100 + device.value
        return 0

    def cuCtxSetCurrent(self, context):
        self.current.context = context.value
        self.calls.append(context.value)
        return 0


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    monkeypatch.setattr(launch, "ctypes", SimpleNamespace(**vars(ctypes) | {"CDLL": lambda name: made}))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    return made


def test_each_thread_gets_a_context_once(driver):
    """F12: without a GPU, by a driver that notes what it is asked for."""

    def run(i):
        before = launch.this_thread.ready
        if i == 0:
            driver.current.context = 7  # PyTorch has worked in this thread
        launch.make_context_current()
        return before, launch.this_thread.ready, driver.current.context

    assert in_threads(run) == [(False, True, 7), (False, True, 112), (False, True, 112)]
    assert driver.calls == [112, 112]


@pytest.mark.gpu
@pytest.mark.parametrize("call", ["plain", "packed", "cache", "v1"])
def test_a_new_thread_can_call_first_of_all(call):
    """F12: "Failed to create tensor map descriptor: invalid device context"."""
    q, k, v = (t.detach() for t in make(200, 64))
    starts = torch.tensor([0, 80, 200], dtype=torch.int32, device=DEVICE)
    run = {
        "plain": lambda: interface.flash_attn_func(q, k, v, causal=True),
        "packed": lambda: interface.flash_attn_varlen_func(q[0], k[0], v[0], starts, starts, 120, 120),
        "cache": lambda: interface.flash_attn_with_kvcache(q[:, :1], k, v, cache_seqlens=150),
        "v1": lambda: interface.flash_attn_v1_func(q, k, v),
    }[call]
    expected = run()
    for _ in range(4):  # through Triton's JIT, then as a replay
        for out in in_threads(lambda i: run()):
            assert torch.equal(out, expected)
        expected = run()


@pytest.mark.gpu
def test_training_from_new_threads():
    """F12, F13: forward and backward, with more shapes than are remembered."""
    inputs = [[make(64 + 8 * (i + n), 64) for n in range(6)] for i in range(4)]
    expected = [[forward_and_backward(*tensors) for tensors in some] for some in inputs]
    before, fast_path.MOST_CALLS = fast_path.MOST_CALLS, 5
    try:
        got = in_threads(lambda i: [forward_and_backward(*tensors) for _ in range(3) for tensors in inputs[i]][-6:], 4)
    finally:
        fast_path.MOST_CALLS = before
    for theirs, alone in zip(got, expected, strict=True):
        for a, b in zip(theirs, alone, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
