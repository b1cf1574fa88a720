"""Bytes modelled and counted agree; out-of-bounds accesses are caught; ceilings, roofline and profile make sense."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from labutils import runtime

pytest.importorskip("pandas")
import triton  # noqa: E402  after labutils, which switches its interpreter on
import triton.language as tl  # noqa: E402

from labutils import analysis, benchmark
from labutils.attention import interface  # noqa: E402
from labutils.attention.kernels import flash_v2  # noqa: E402
from labutils.attention.kernels.launch_table import LaunchConfig  # noqa: E402
from labutils.attention.kernels.options import Options

interpreted_only = pytest.mark.skipif(
    not runtime.interpreted, reason="counting happens in the interpreter; kernels are compiled in this process"
)


@triton.jit
def _copy_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < N), mask=offs < N)
    else:
        tl.store(y_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def _add_kernel(x_ptr, TOTAL, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.atomic_add(TOTAL + offs, tl.load(x_ptr + offs, mask=offs < N), mask=offs < N)


# --- FLOPs and the IO model -------------------------------------------------------------------------------


def test_flops():
    shape = {"batch": 64, "heads": 16, "seqlen_q": 1024, "head_dim": 64}
    forward = benchmark.attention_flops(**shape)
    assert forward == 4 * 64 * 16 * 1024 * 1024 * 64
    assert benchmark.attention_flops(**shape, causal=True) == forward / 2
    assert benchmark.attention_flops(**shape, backward=True) == 2.5 * forward
    assert benchmark.attention_flops(**shape, seqlen_k=2048) == 2 * forward


def test_io_of_naive_attention_is_algorithm_0():
    n, d, b, h, e = 128, 64, 2, 3, 2
    moved = analysis.io_bytes("naive", batch=b, heads=h, seqlen=n, head_dim=d, dtype_bytes=e)
    square, narrow = b * h * n * n * e, b * h * n * d * e
    assert moved["s"] == moved["p"] == {"load": square, "store": square}
    assert moved["q"] == moved["k"] == moved["v"] == {"load": narrow, "store": 0}
    assert moved["o"] == {"load": 0, "store": narrow}
    total = analysis.io_bytes("naive", batch=b, heads=h, seqlen=n, head_dim=d, dtype_bytes=e, per_tensor=False)
    assert total == 4 * square + 4 * narrow == analysis.total_bytes(moved)


def test_io_of_v2_by_hand():
    """N = 256 in blocks of 128 x 64: each of two programs streams all of K and V."""
    moved = analysis.io_bytes("v2", batch=1, heads=1, seqlen=256, head_dim=64, block_m=128, block_n=64)
    row = 64 * 2
    assert moved["q"]["load"] == 256 * row and moved["o"]["store"] == 256 * row
    assert moved["k"]["load"] == moved["v"]["load"] == 2 * 256 * row
    assert moved["lse"] == {"load": 0, "store": 256 * 4}
    causal = analysis.io_bytes("v2", batch=1, heads=1, seqlen=256, head_dim=64, block_m=128, block_n=64, causal=True)
    assert causal["k"]["load"] == (128 + 256) * row


def test_io_of_v1_by_hand():
    """Each of four K/V blocks reads all of Q, and reads and writes all of O, l and m."""
    moved = analysis.io_bytes("v1", batch=1, heads=1, seqlen=256, head_dim=64, block_m=128, block_n=64)
    assert moved["k"]["load"] == 256 * 64 * 2
    assert moved["q"]["load"] == 4 * 256 * 64 * 2
    assert moved["o"] == {"load": 4 * 256 * 64 * 4, "store": 4 * 256 * 64 * 4}
    assert moved["l"] == moved["m"] == {"load": 4 * 256 * 4, "store": 4 * 256 * 4}


def test_traffic_falls_with_the_block_and_not_below_the_compulsory():
    shape = {"batch": 1, "heads": 1, "seqlen": 1024, "head_dim": 64}
    by_block = [analysis.io_bytes("v2", **shape, block_m=b, block_n=64, per_tensor=False) for b in (32, 64, 128, 1024)]
    assert by_block == sorted(by_block, reverse=True)
    assert by_block[-1] == analysis.compulsory_bytes(**shape) + 1024 * 4  # and the log-sum-exp


def test_io_errors():
    shape = {"batch": 1, "heads": 1, "seqlen": 16, "head_dim": 16}
    with pytest.raises(ValueError, match="needs block_m"):
        analysis.io_bytes("v1", **shape)
    with pytest.raises(ValueError, match="no IO model"):
        analysis.io_bytes("v3", **shape, block_m=16, block_n=16)


# --- counted ----------------------------------------------------------------------------------------------

SHAPES = [  # N_q, N_k, D, block_m, block_n, causal, dtype
    (64, 64, 64, 32, 32, False, torch.float16),
    (64, 64, 64, 32, 32, True, torch.float16),
    (64, 64, 32, 64, 16, True, torch.bfloat16),
    (64, 64, 32, 16, 64, True, torch.float32),
    (100, 100, 64, 32, 64, False, torch.float16),
    (100, 100, 64, 32, 64, True, torch.float16),
    (37, 101, 24, 32, 32, True, torch.float16),
    (101, 37, 24, 32, 32, True, torch.float16),
    (33, 65, 16, 16, 32, False, torch.bfloat16),
    (128, 96, 128, 64, 32, True, torch.float16),
    (16, 16, 16, 16, 16, False, torch.float16),
    (1, 40, 16, 16, 16, True, torch.float16),
    (40, 1, 16, 16, 16, False, torch.float16),
    (96, 96, 32, 16, 64, True, torch.float16),
    (96, 96, 32, 64, 16, False, torch.float16),
    (65, 63, 48, 32, 16, True, torch.bfloat16),
    (70, 70, 8, 64, 64, True, torch.float32),
    (129, 33, 16, 128, 32, True, torch.float16),
    (33, 129, 16, 32, 128, False, torch.float16),
    (128, 128, 64, 128, 128, True, torch.float16),
    (80, 112, 64, 16, 32, False, torch.bfloat16),
]


def assert_model_is_counted(kernel, n_q, n_k, head_dim, block_m, block_n, causal, dtype):
    shape = {
        "batch": 1, "heads": 2, "seqlen": n_q, "seqlen_k": n_k, "head_dim": head_dim, "block_m": block_m,
        "block_n": block_n, "causal": causal,
    }  # fmt: skip
    counted = analysis.counted_traffic(kernel, dtype=dtype, **shape)
    assert counted == analysis.io_bytes(kernel, dtype_bytes=dtype.itemsize, **shape)


@interpreted_only
@pytest.mark.filterwarnings("ignore:divide by zero")  # log2(0) = -inf is the log-sum-exp of a row that sees nothing
@pytest.mark.parametrize("kernel", ["v1", "v2", "dq", "dkdv"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_model_equals_counted_bytes(kernel, shape):
    assert_model_is_counted(kernel, *shape)


@interpreted_only
@pytest.mark.filterwarnings("ignore:divide by zero")
@settings(max_examples=12)
@given(
    kernel=st.sampled_from(["v1", "v2", "dq", "dkdv"]),
    n_q=st.integers(1, 70),
    n_k=st.integers(1, 70),
    head_dim=st.sampled_from([16, 20, 32]),
    block_m=st.sampled_from([16, 32, 64]),
    block_n=st.sampled_from([16, 32, 64]),
    causal=st.booleans(),
)
def test_model_equals_counted_bytes_anywhere(kernel, n_q, n_k, head_dim, block_m, block_n, causal):
    assert_model_is_counted(kernel, n_q, n_k, head_dim, block_m, block_n, causal, torch.float16)


@interpreted_only
@pytest.mark.parametrize("kernel", ["v1", "v2"])
def test_the_counted_traffic_obeys_the_theorem(kernel):
    """Of twice the on-chip memory comes half the traffic: what is counted falls as 1 / M (arXiv 2205.14135, 3.2)."""
    n, d = 256, 16
    counted = {}
    for block in (16, 32, 64):
        blocks = {"block_m": d, "block_n": block} if kernel == "v1" else {"block_m": block, "block_n": d}
        moved = analysis.counted_traffic(kernel, seqlen=n, head_dim=d, **blocks)
        repeated = ("q", "o", "l", "m") if kernel == "v1" else ("k", "v")  # what is loaded anew for each outer block
        counted[4 * d * block] = sum(sum(moved[tensor].values()) for tensor in repeated)
    assert list(counted) == [1024, 2048, 4096]  # M numbers, of which B_c = M / 4D
    assert counted[1024] == 2 * counted[2048] == 4 * counted[4096]


def test_counting_in_a_process_of_its_own(monkeypatch):
    """As on a machine whose kernels are compiled."""
    monkeypatch.setattr(runtime, "interpreted", False)
    shape = {"batch": 1, "heads": 2, "seqlen": 48, "head_dim": 16, "block_m": 32, "block_n": 16, "causal": True}
    counted = analysis.counted_traffic("v2", dtype=torch.bfloat16, **shape)
    assert counted == analysis.io_bytes("v2", **shape)


def test_a_failed_child_is_reported(monkeypatch):
    monkeypatch.setattr(runtime, "interpreted", False)
    with pytest.raises(RuntimeError, match="child process failed"):
        analysis.counted_traffic("v2", seqlen=16, head_dim=16, block_m=17)  # not a power of two


def test_nothing_is_counted_where_kernels_are_compiled(monkeypatch):
    monkeypatch.setattr(runtime, "interpreted", False)
    with pytest.raises(RuntimeError, match="counted_traffic"), analysis.count_traffic():
        pass


def test_counting_an_unknown_kernel():
    with pytest.raises(ValueError, match="'v1', 'v2', 'dq', 'dkdv'"):
        analysis.counted_traffic("v3", seqlen=16)


@interpreted_only
def test_masked_lanes_do_not_count_and_names_are_the_parameters():
    x, y = torch.arange(40, dtype=torch.int16), torch.zeros(40, dtype=torch.int16)
    with analysis.count_traffic() as traffic:
        _copy_kernel[(2,)](x, y, 40, BLOCK=32, MASKED=True)
    assert traffic.per_tensor() == {"x": {"load": 80, "store": 0}, "y": {"load": 0, "store": 80}}
    assert traffic.total == 160
    (row_x, row_y) = traffic.table().itertuples(index=False)
    assert row_x == ("_copy_kernel", "x", 80, 0) and row_y == ("_copy_kernel", "y", 0, 80)
    assert torch.equal(x, y)


@interpreted_only
def test_an_atomic_is_a_load_and_a_store():
    x, total = torch.ones(20), torch.zeros(20)
    with analysis.count_traffic() as traffic:
        _add_kernel[(1,)](x, total, 20, BLOCK=32)
    assert traffic.per_tensor()["total"] == {"load": 80, "store": 80}


@interpreted_only
def test_views_of_one_storage_are_told_apart():
    shape = {"batch": 2, "heads": 2, "seqlen": 48, "head_dim": 16}
    q, k, v = torch.randn(2, 48, 3, 2, 16).unbind(2)  # (B, N, 3, H, D), as GPT-2 makes them
    with analysis.count_traffic() as traffic:
        flash_v2.forward(q, k, v, Options(0.25), LaunchConfig(16, 32))
    assert traffic.per_tensor() == analysis.io_bytes("v2", **shape, block_m=16, block_n=32, dtype_bytes=4)


@interpreted_only
def test_one_tensor_given_twice_has_both_names():
    q, kv = torch.randn(1, 32, 1, 16), torch.randn(1, 32, 1, 16)
    with analysis.count_traffic() as traffic:
        flash_v2.forward(q, kv, kv, Options(0.25))
    assert set(traffic.per_tensor()) == {"q", "k|v", "o", "lse"}


@interpreted_only
def test_kernels_are_told_apart():
    q = torch.randn(1, 32, 1, 16, requires_grad=True)
    with analysis.count_traffic() as traffic:
        interface.flash_attn_func(q, q.detach(), q.detach()).sum().backward()
    kernels = set(traffic.table()["kernel"])
    assert {"_forward_kernel", "_dkdv_kernel", "_dq_kernel"} <= kernels
    assert traffic.per_tensor("_dq_kernel")["delta"] == {"load": 0, "store": 32 * 4}
    assert traffic.per_tensor("_dkdv_kernel")["delta"] == {"load": 32 * 4, "store": 0}


@interpreted_only
@pytest.mark.parametrize("which", ["x", "y"])
def test_an_access_out_of_bounds_names_kernel_program_and_tensor(which):
    short, long = torch.zeros(40), torch.zeros(64)
    x, y = (short, long) if which == "x" else (long, short)
    with (
        pytest.raises(IndexError, match=rf"_copy_kernel, program \(1, 0, 0\).*96 bytes after the end of `{which}`"),
        analysis.count_traffic(),
    ):
        _copy_kernel[(2,)](x, y, 40, BLOCK=32, MASKED=False)


@interpreted_only
def test_counting_leaves_the_interpreter_as_it_was():
    import triton.runtime.interpreter as interpreter

    def state():
        builder = interpreter.InterpreterBuilder
        names = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")
        return [getattr(builder, n) for n in names] + [interpreter.GridExecutor.__call__]

    before = state()
    with pytest.raises(IndexError), analysis.count_traffic():
        _copy_kernel[(1,)](torch.zeros(8), torch.zeros(8), 8, BLOCK=32, MASKED=False)
    assert state() == before
    _copy_kernel[(1,)](torch.zeros(32), torch.zeros(32), 32, BLOCK=32, MASKED=False)  # launches as ever


@interpreted_only
def test_labutils_kernels_stay_within_their_tensors():
    """The tensors are views with room on both sides: one element too far would still be in the storage."""
    room = torch.randn(3, 53, 2, 24)
    q, k, v = (room[1:2, 8:45, :1, :20] for _ in range(3))
    with analysis.count_traffic():
        flash_v2.forward(q, k, v, Options(0.2, window_right=0))


# --- roofline and profile ---------------------------------------------------------------------------------


def test_the_roof():
    ceilings = analysis.Ceilings(tflops=100.0, gb_per_s=1000.0, dtype="float16", machine="M")
    assert ceilings.ridge == pytest.approx(100)
    assert ceilings.roof(50) == pytest.approx(50) and ceilings.roof(200) == 100


def test_measured_ceilings_are_plausible():
    ceilings = analysis.measure_ceilings(seconds=0.05)
    assert ceilings.machine == runtime.machine and ceilings.dtype == benchmark.dtype_name(runtime.dtype)
    assert 1e-4 < ceilings.tflops < 1e4
    assert 0.1 < ceilings.gb_per_s < 1e5


def test_roofline_points():
    ceilings = analysis.Ceilings(tflops=100.0, gb_per_s=1000.0, dtype="float16", machine="M")
    columns = benchmark.COLUMNS
    common = dict.fromkeys(columns, 0) | {
        "pass": "fwd", "dtype": "float16", "head_dim": 64, "causal": False, "batch": 1, "heads": 1, "seqlen": 1024,
        "tflops": 10.0, "status": "ok",
    }  # fmt: skip
    import pandas as pd

    df = pd.DataFrame(
        [
            common | {"impl": "naive"},
            common | {"impl": "triton_v2"},
            common | {"impl": "triton_v2", "pass": "bwd"},
            common | {"impl": "naive", "status": "oom", "tflops": math.nan},
        ]
    )
    points = analysis.roofline_points(df, ceilings, block_m=128, block_n=64)
    naive, flash = points.itertuples()
    flops, moved = 4 * 1024 * 1024 * 64, 4 * 1024 * 1024 * 2 + 4 * 1024 * 64 * 2
    assert naive.intensity == pytest.approx(flops / moved) and naive.bound == "memory"
    assert naive.share == pytest.approx(10 / naive.roof_tflops) and naive.roof_tflops == pytest.approx(naive.intensity)
    assert flash.intensity > naive.intensity
    assert flash.intensity_compulsory == pytest.approx(flops / (4 * 1024 * 64 * 2))


def test_profile_finds_the_matmul_and_its_flops(capfd):
    n = 256
    a = torch.randn(n, n, device=runtime.device)
    df = analysis.profile(lambda: (a @ a).softmax(-1), repeats=2)
    assert list(df.columns) == ["op", "calls", "self_ms", "share", "gflops"]
    assert df["self_ms"].is_monotonic_decreasing and df["share"].sum() <= 1.0001
    matmul = df[df["op"] == "aten::mm"].iloc[0]
    assert matmul.calls == 1 and matmul.gflops == pytest.approx(2 * n**3 / 1e9)
    assert df.attrs["device"] == ("GPU" if runtime.device.type == "cuda" else "CPU")
    assert df.attrs["total_ms"] == pytest.approx((df["self_ms"] / df["share"]).iloc[0])


def test_profiling_is_quiet():
    """In a process of its own: the variable that silences the backend is read at its first start."""
    code = "import torch; from labutils import analysis; analysis.profile(lambda: torch.ones(2) + 1)"
    environment = {k: v for k, v in os.environ.items() if k != "KINETO_LOG_LEVEL"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_stored_ceilings_are_read_and_missing_ones_named():
    stored = analysis.stored_ceilings()
    assert stored.machine == "NVIDIA H200" and 100 < stored.tflops < 1000 and 1000 < stored.gb_per_s < 4800
    with pytest.raises(FileNotFoundError, match="measure_ceilings"):
        analysis.stored_ceilings("abacus")


# --- on a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_gpu_profile_shows_triton_kernels():
    """Also those that no PyTorch operation launched."""
    q = torch.randn(1, 4096, 8, 64, device=runtime.device, dtype=torch.float16)
    df = analysis.profile(lambda: flash_v2.forward(q, q, q, Options(0.125)))
    kernel = df[df["op"].str.contains("_forward_kernel")]
    assert len(kernel) == 1 and kernel["calls"].iloc[0] == 1
    assert kernel["share"].iloc[0] > 0.5
    assert not df["op"].str.contains("Activity Buffer").any()


@pytest.mark.gpu
def test_gpu_profile_counts_no_kernel_twice():
    q = torch.randn(1, 4096, 16, 64, device=runtime.device, dtype=torch.float16)
    attention = benchmark.IMPLEMENTATIONS["naive"]
    df = analysis.profile(lambda: attention(q, q, q), top=None)
    timed = benchmark.time_call(lambda: attention(q, q, q)).median_ms
    assert df.attrs["total_ms"] == pytest.approx(timed, rel=0.35)
    assert df.attrs["device"] == "GPU"


@pytest.mark.gpu
def test_gpu_ceilings():
    ceilings = analysis.measure_ceilings()
    assert ceilings.tflops > 1 and ceilings.gb_per_s > 50


def test_makespan_of_a_launch():
    assert analysis.makespan([3, 1, 2], 1) == 6
    assert analysis.makespan([1, 2, 3, 4, 5, 6, 7, 8], 3) == 15  # the longest program starts last, at 7
    assert analysis.makespan([8, 7, 6, 5, 4, 3, 2, 1], 3) == 13
    assert analysis.makespan([], 4) == 0
    with pytest.raises(ValueError, match="place to run"):
        analysis.makespan([1], 0)
