"""The sweep: its columns, its rows for failures, its clocks, its memory, its oracle, its stored tables."""

import json
import math
import subprocess
import sys
import time
import types
import warnings

import pytest
import torch

from labutils import analysis, benchmark, runtime
from labutils.analysis import resources, roofline
from labutils.attention import reference
from labutils.benchmark import points, sweeping, tables, timing
from labutils.training import ledger

pd = pytest.importorskip("pandas")
QUICK = {"seconds_per_point": 0.0, "progress": False}
SDPA = torch.nn.functional.scaled_dot_product_attention


def naive(q, k, v, *, causal=False, softmax_scale=None):
    return reference.naive_attention(q, k, v, causal=causal, softmax_scale=softmax_scale)


def test_columns_are_the_schema_and_five_more():
    df = benchmark.sweep(["naive", "sdpa_flash"], [32, 16], heads=2, head_dim=16, passes=("fwd", "bwd"), **QUICK)
    schema = "impl pass dtype head_dim causal batch heads seqlen ms tflops peak_mib status"
    assert " ".join(df.columns) == f"{schema} spread_ms max_error reason overhead_bound rounds_ms"
    assert list(df["seqlen"]) == [16] * 4 + [32] * 4  # ascending
    assert list(df["impl"])[:4] == ["naive", "naive", "sdpa_flash", "sdpa_flash"]
    assert list(df["pass"])[:2] == ["fwd", "bwd"]
    naive_rows = df[df["impl"] == "naive"]
    assert (naive_rows["status"] == "ok").all() and (naive_rows["reason"] == "").all()
    assert (naive_rows[["ms", "tflops", "peak_mib"]] > 0).all().all()
    assert set(df["dtype"]) == {str(runtime.dtype).removeprefix("torch.")}
    assert df.attrs == {"machine": runtime.machine, "interrupted": False}


def test_tflops_follow_the_convention():
    df = benchmark.sweep(["naive"], [32], batch=2, heads=3, head_dim=16, causal=True, passes=("fwd", "bwd"), **QUICK)
    forward, backward = df.itertuples()
    flops = 4 * 2 * 3 * 32 * 32 * 16 / 2
    assert forward.tflops == pytest.approx(flops / forward.ms / 1e9)
    assert backward.tflops == pytest.approx(2.5 * flops / backward.ms / 1e9)


def test_fixed_number_of_tokens():
    df = benchmark.sweep(["naive"], [16, 64, 256], tokens=128, heads=1, head_dim=16, **QUICK)
    assert list(df["batch"]) == [8, 2, 1]


def test_out_of_memory_is_a_row_and_longer_lengths_are_not_tried():
    called = []

    def greedy(q, k, v, *, causal, softmax_scale):
        called.append(q.shape[1])
        if q.shape[1] >= 32:
            raise torch.OutOfMemoryError("Tried to allocate 1000 GiB")
        return naive(q, k, v)

    df = benchmark.sweep({"greedy": greedy, "naive": naive}, [16, 32, 64], heads=1, head_dim=16, **QUICK)
    rows = df[df["impl"] == "greedy"].set_index("seqlen")
    assert list(rows["status"]) == ["ok", "oom", "oom"]
    assert "1000 GiB" in rows.loc[32, "reason"]
    assert "N = 32" in rows.loc[64, "reason"] and called.count(32) == 1 and 64 not in called
    assert rows.loc[[32, 64], ["ms", "tflops", "peak_mib", "max_error"]].isna().all().all()
    assert (df[df["impl"] == "naive"]["status"] == "ok").all()


def test_what_failed_at_one_batch_is_tried_at_a_smaller_one():
    def greedy(q, k, v, *, causal, softmax_scale):
        if q.shape[0] * q.shape[1] > 64:
            raise torch.OutOfMemoryError("no room")
        return naive(q, k, v)

    planned = sweeping.plan(["greedy"], [16, 32, 64, 128], batches=(4, 1), heads=1, head_dims=(16,))
    rows = {}
    list(sweeping.measure_rounds(planned, {"greedy": greedy}, rows, seconds_per_point=0.0))
    found = {(p.batch, p.seqlen): (row["status"], row["reason"].split(":")[0]) for p, row in rows.items()}
    tried, not_tried = ("oom", "OutOfMemoryError"), ("oom", "not tried")
    assert found == {
        (4, 16): ("ok", ""), (4, 32): tried, (4, 64): not_tried, (4, 128): not_tried,
        (1, 16): ("ok", ""), (1, 32): ("ok", ""), (1, 64): ("ok", ""), (1, 128): not_tried,
    }  # fmt: skip


def test_memory_for_the_backward_alone_does_not_stop_the_forward():
    def greedy(q, k, v, *, causal, softmax_scale):
        if torch.is_grad_enabled():
            raise torch.OutOfMemoryError("no room")
        return naive(q, k, v)

    df = benchmark.sweep({"greedy": greedy}, [16, 32], heads=1, head_dim=16, passes=("bwd", "fwd"), **QUICK)
    assert list(df["status"]) == ["oom", "ok", "oom", "ok"]


def test_the_cpu_allocator_failing_counts_as_out_of_memory():
    if runtime.device.type == "cuda":
        pytest.skip("the allocator of the CPU is asked where sweeps run on it")

    def far_too_large(q, k, v, *, causal, softmax_scale):
        return torch.empty(2**60, dtype=torch.int8)

    (row,) = benchmark.sweep({"huge": far_too_large}, [16], heads=1, head_dim=16, **QUICK).itertuples()
    assert row.status == "oom"


def test_unsupported_is_a_row_with_its_reason_and_its_warnings():
    def refusing(q, k, v, *, causal, softmax_scale):
        warnings.warn("(Triggered internally at /pytorch/sdp.cpp:9.) needs a head dimension of 64", stacklevel=1)
        raise RuntimeError("No available kernel.")

    (row,) = benchmark.sweep({"refusing": refusing}, [16], heads=1, head_dim=16, **QUICK).itertuples()
    assert row.status == "unsupported" and math.isnan(row.ms)
    assert "No available kernel." in row.reason and "head dimension of 64" in row.reason
    assert "Triggered internally" not in row.reason


@pytest.fixture
def breaking(monkeypatch):
    """An implementation that breaks the GPU at N = 32, on a GPU that fails each wait from then on.

    The GPU is simulated: the points take it for one, while the tensors are the CPU's.
    """
    broken = []

    def wait():
        if broken:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def breaking(q, k, v, *, causal, softmax_scale):
        if q.shape[1] == 32:
            broken.append(q.shape)
            wait()
        return naive(q, k, v)

    monkeypatch.setattr(points, "runtime", types.SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    return breaking


def after_it(q, k, v, *, causal, softmax_scale):
    """Fails as everything does on a broken GPU."""
    torch.cuda.synchronize()
    return naive(q, k, v)


@pytest.mark.skipif(runtime.device.type == "cuda", reason="breaks a GPU; here one that is simulated on a CPU")
def test_a_gpu_that_is_lost_ends_the_sweep_and_nothing_else_is_blamed(breaking):
    with pytest.warns(RuntimeWarning, match="stopped at breaking fwd N=32: AcceleratorError: CUDA error: an illegal"):
        df = benchmark.sweep({"breaking": breaking, "after": after_it}, [16, 32, 64], heads=1, head_dim=16, **QUICK)
    reached = df[~df["reason"].str.startswith("not reached")]
    assert list(zip(reached["impl"], reached["seqlen"], reached["status"], strict=True)) == [
        ("breaking", 16, "ok"), ("after", 16, "ok"), ("breaking", 32, "unsupported")
    ]  # fmt: skip
    assert "illegal memory access" in reached["reason"].iloc[2] and df.attrs["interrupted"] is True
    assert set(df["status"][len(reached) :]) == {"unsupported"} and len(df) == 6


@pytest.mark.skipif(runtime.device.type == "cuda", reason="breaks a GPU; here one that is simulated on a CPU")
def test_a_failure_that_the_gpu_survives_is_a_row_and_the_sweep_goes_on(breaking):
    def refused(q, k, v, *, causal, softmax_scale):
        raise torch.AcceleratorError("CUDA error: invalid configuration argument")

    df = benchmark.sweep({"refused": refused, "naive": naive}, [16], heads=1, head_dim=16, **QUICK)
    assert list(df["status"]) == ["unsupported", "ok"] and not df.attrs["interrupted"]


def test_forward_only_says_so_in_the_backward():
    def no_graph(q, k, v, *, causal, softmax_scale):
        return naive(q, k, v).detach()

    df = benchmark.sweep({"f": no_graph}, [16], heads=1, head_dim=16, passes=("fwd", "bwd"), **QUICK)
    assert list(df["status"]) == ["ok", "unsupported"]
    assert "backward" in df["reason"].iloc[1]


def test_warnings_of_what_works_are_passed_on():
    def talkative(q, k, v, *, causal, softmax_scale):
        warnings.warn("I am deprecated", stacklevel=1)
        return naive(q, k, v)

    with pytest.warns(UserWarning, match="deprecated"):
        benchmark.sweep({"f": talkative}, [16], heads=1, head_dim=16, **QUICK)


def test_interrupt_keeps_the_rows_so_far(capsys):
    def impatient(q, k, v, *, causal, softmax_scale):
        if q.shape[1] == 32:
            raise KeyboardInterrupt
        return naive(q, k, v)

    df = benchmark.sweep({"impatient": impatient}, [16, 32, 64], heads=1, head_dim=16, seconds_per_point=0.01)
    assert list(df["seqlen"]) == [16, 32, 64] and list(df["status"]) == ["ok", "unsupported", "unsupported"]
    assert set(df["reason"][1:]) == {"not reached before the sweep was interrupted"} and df["ms"][1:].isna().all()
    assert df.attrs["interrupted"] is True
    assert "N=32" in capsys.readouterr().out  # the progress bar named what was running


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["flash"], [16]), "choose from naive"),
        (([], [16]), "at least one"),
        ((["naive"], []), "at least one sequence length"),
        ((["naive"], [0, 16]), "each 1 or more"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        benchmark.sweep(*arguments, progress=False)


@pytest.mark.parametrize("rounds", [0, -1])
def test_no_round_is_refused_and_not_called_an_interrupt(rounds):
    with pytest.raises(ValueError, match=f"rounds={rounds}"):
        benchmark.sweep(["naive"], [16], rounds=rounds, progress=False)


def test_bad_pass():
    with pytest.raises(ValueError, match="'fwd', 'bwd'"):
        benchmark.sweep(["naive"], [16], passes=("forward",), progress=False)


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_error_is_the_distance_to_exact_attention(causal, monkeypatch):
    monkeypatch.setitem(points.ORACLE_BYTES, runtime.device.type, 8 * 48 * 10)  # ten rows at a time
    shift = 0.25

    def off(q, k, v, *, causal, softmax_scale):
        return naive(q, k, v, causal=causal) + shift

    arguments = {
        "heads": 2,
        "head_dim": 16,
        "causal": causal,
        "dtype": torch.float32,
        "passes": ("fwd", "bwd"),
    }
    df = benchmark.sweep({"naive": naive, "off": off}, [48], **arguments, **QUICK).set_index(["impl", "pass"])
    error = df["max_error"]
    assert 0 < error["naive", "fwd"] < 1e-4
    assert error["off", "fwd"] == pytest.approx(shift, rel=1e-3)
    assert error["naive", "bwd"] < 1e-4 and error["off", "bwd"] < 1e-4  # a constant has no gradient


def test_error_of_the_backward_sees_each_gradient():
    class WrongDv(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):
            return v.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad + 0.5

    def wrong(q, k, v, *, causal, softmax_scale):
        return naive(q, k, WrongDv.apply(v))

    (row,) = benchmark.sweep(
        {"wrong": wrong}, [24], heads=1, head_dim=16, dtype=torch.float32, passes=("bwd",), **QUICK
    ).itertuples()
    assert row.max_error == pytest.approx(0.5, rel=1e-3)


def test_not_a_number_is_an_infinite_error():
    def broken(q, k, v, *, causal, softmax_scale):
        return naive(q, k, v) * math.nan

    (row,) = benchmark.sweep({"broken": broken}, [16], heads=1, head_dim=16, **QUICK).itertuples()
    assert row.max_error == math.inf


def test_an_oracle_that_takes_too_long_gives_nan():
    df = benchmark.sweep(["naive"], [16, 32], heads=1, head_dim=16, error_seconds=0, **QUICK)
    assert df["max_error"].isna().all() and (df["status"] == "ok").all()


# --- the interpreter --------------------------------------------------------------------------------------


@pytest.mark.skipif(not runtime.interpreted, reason="kernels are compiled on this machine")
def test_the_interpreter_is_never_timed_but_its_error_is_measured():
    impls = ["triton_v1", "triton_v2"]
    df = benchmark.sweep(impls, [32], heads=1, head_dim=16, passes=("fwd", "bwd"), **QUICK)
    assert (df["status"] == "unsupported").all()
    assert df[["ms", "spread_ms", "tflops", "peak_mib"]].isna().all().all()
    ran = df[(df["impl"] == "triton_v2") | (df["pass"] == "fwd")]
    assert ran["reason"].str.contains("a time means nothing").all()
    assert (ran["max_error"] < 1e-4).all()


@pytest.mark.skipif(not runtime.interpreted, reason="kernels are compiled on this machine")
def test_any_function_is_found_out_that_runs_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(points, "INTERPRETER_TILES", 0)  # too large to run: stopped at the first launch
    ended = []

    def mine(*args, **options):
        out = benchmark.IMPLEMENTATIONS["triton_v2"](*args, **options)
        ended.append(out)
        return out

    (row,) = benchmark.sweep({"mine": mine}, [64], heads=2, head_dim=16, error_seconds=0, **QUICK).itertuples()
    assert row.status == "unsupported" and "interpreter" in row.reason and math.isnan(row.max_error)
    assert not ended


# --- time and memory --------------------------------------------------------------------------------------


def test_time_call_on_a_cpu_is_what_the_clock_says(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(runtime, "device", torch.device("cpu"))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    at = []

    def call():
        at.append(now[0])
        now[0] += 0.02

    measured = benchmark.time_call(call, seconds=0.11, warm_up=0.05)
    assert measured.median_ms == pytest.approx(20) and measured.spread_ms == pytest.approx(0)
    assert len(at) == 3 + 6  # the warm-up ends with the first call after 50 ms, and the repeats after 110


def test_time_call_is_the_median_with_the_interquartile_range():
    assert timing._summary([1.0, 2.0, 3.0, 4.0, 100.0]) == (3.0, 2.0)


def test_time_call_repeats_three_times_at_least():
    calls = []
    benchmark.time_call(lambda: calls.append(1), seconds=0.0, warm_up=0.0)
    assert len(calls) == 1 + timing.MIN_REPEATS


class SimulatedGpu:
    """A clock for the host and a queue for the GPU: what launches and events would show, without a GPU."""

    def __init__(self, monkeypatch):
        self.host = self.free_at = 0.0  # ms; when the host is, and when the GPU has done all that it was given
        self.flushes = 0
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = max(gpu.free_at, gpu.host)

            def elapsed_time(self, end):
                return end.at - self.at

        class Flush:
            def zero_(self):
                gpu.flushes += 1
                gpu.launch(host=0.005, on_gpu=0.03)

        monkeypatch.setattr(runtime, "device", torch.device("cuda"))
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        monkeypatch.setattr(timing, "_l2_flush_buffer", Flush)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.host / 1e3)

    def launch(self, *, host, on_gpu):
        self.host += host
        self.free_at = max(self.free_at, self.host) + on_gpu

    def wait(self):
        self.host = max(self.host, self.free_at)


def test_time_call_warms_a_gpu_up_for_as_long_as_it_was_told(monkeypatch):
    gpu, at = SimulatedGpu(monkeypatch), []

    def call():
        at.append(gpu.host)
        gpu.launch(host=0.01, on_gpu=2.0)

    benchmark.time_call(call, seconds=0.0, warm_up=0.05)
    assert at[0] < 50 and all(t >= 50 for t in at[-timing.MIN_REPEATS :])
    assert all(t < 50 for t in at[: -timing.MIN_REPEATS])


@pytest.mark.parametrize(
    ("kernels", "host", "on_gpu", "median", "bound"),
    [
        (1, 0.01, 2.0, 2.0, False),  # launched while the GPU flushes: nothing to see of it
        (10, 0.02, 0.3, 3.0, False),  # the first waits, the others queue up behind it
        (10, 0.02, 0.001, 0.171, True),  # the GPU is done with each before the next comes
        (1, 0.2, 0.1, 0.175, True),  # a call that takes long to begin, in part while the GPU flushes
    ],
)
def test_time_and_launch_overhead_on_a_simulated_gpu(monkeypatch, kernels, host, on_gpu, median, bound):
    gpu = SimulatedGpu(monkeypatch)

    def fn():
        for _ in range(kernels):
            gpu.launch(host=host, on_gpu=on_gpu)

    found = benchmark.time_call(fn, seconds=0.05, warm_up=0.02)
    assert gpu.host > 0.9 * (20 + 50)  # for about that long it has warmed up and measured
    assert found.median_ms == pytest.approx(median, rel=0.1)
    assert timing.overhead_bound(fn, found.median_ms) is bound


def test_peak_memory_sees_what_was_freed_again():
    def work():
        a = torch.zeros(3 * 2**20, dtype=torch.int8, device=runtime.device)
        del a
        return torch.zeros(2**20, dtype=torch.int8, device=runtime.device)

    assert benchmark.peak_memory_mib(work) == pytest.approx(3, abs=0.05)


def naive_peak_against_ledger(n, heads, head_dim, dtype, batch=1):
    """Measured peak of a naive forward pass by the bytes of its two N x N matrices, scores and probabilities."""
    df = benchmark.sweep(
        ["naive"], [n], batch=batch, heads=heads, head_dim=head_dim, dtype=dtype, error_seconds=0, **QUICK
    )
    return df["peak_mib"].iloc[0] / (2 * batch * heads * n * n * dtype.itemsize / 2**20)


@pytest.mark.parametrize("n", [512, 1024])
def test_peak_memory_of_naive_attention_is_its_byte_ledger(n):
    assert naive_peak_against_ledger(n, 4, 16, runtime.dtype) == pytest.approx(1, abs=0.05)


def test_flash_needs_no_square_matrix():
    impl = "sdpa_flash" if runtime.device.type == "cpu" else "triton_v2"
    (row,) = benchmark.sweep([impl], [2048], heads=2, head_dim=16, error_seconds=0, **QUICK).itertuples()
    assert row.status == "ok"
    assert row.peak_mib < 0.2 * 2 * 2048 * 2048 * runtime.dtype.itemsize / 2**20


def test_a_sweep_takes_the_warm_up_that_it_is_told(monkeypatch):
    told = []

    def watched(fn, **kwargs):
        told.append((kwargs["seconds"], kwargs["warm_up"]))
        return time_call(fn, **kwargs)

    time_call = benchmark.points.time_call
    monkeypatch.setattr(benchmark.points, "time_call", watched)
    shape = dict(heads=1, head_dim=16, passes=("fwd", "bwd"), seconds_per_point=0.02, progress=False)
    benchmark.sweep(["naive"], [16], warm_up=0.003, **shape)
    benchmark.sweep(["naive"], [16], **shape)
    assert told == [(0.02, 0.003)] * 2 + [(0.02, None)] * 2


def test_a_sweep_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    benchmark.sweep(["naive"], [16], heads=1, head_dim=16, **QUICK)
    assert torch.equal(before, torch.random.get_rng_state())


# --- the implementations ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(benchmark.IMPLEMENTATIONS))
@pytest.mark.parametrize("causal", [False, True])
def test_implementations_that_run_agree(name, causal):
    dtype = torch.float16 if runtime.device.type == "cuda" else torch.float32
    q, k, v = (torch.randn(2, 64, 2, 64, dtype=dtype, device=runtime.device) for _ in range(3))
    attention = benchmark.IMPLEMENTATIONS[name]
    try:
        out = attention(q, k, v, causal=causal, softmax_scale=0.1)
    except (benchmark.Unsupported, RuntimeError) as error:
        if runtime.device.type == "cuda" and runtime.capability >= (8, 0) and name != "flash_attn":
            raise
        pytest.skip(f"{name} does not run here: {error}")
    assert out.shape == q.shape
    reference.check_attention(out, q, k, v, causal=causal, softmax_scale=0.1, factor=3).raise_if_failed()


def test_sdpa_runs_the_backend_it_was_asked_for(monkeypatch):
    """Whatever else is enabled: what is asked for runs, or an error comes."""
    asked = []
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *a, **k: asked.append(flags()) or SDPA(*a, **k),
    )

    def flags():
        backends = ("flash", "mem_efficient", "math", "cudnn")
        return tuple(getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in backends)

    before = flags()
    q = torch.randn(1, 16, 1, 16, device=runtime.device)
    benchmark.IMPLEMENTATIONS["sdpa_math"](q, q, q)
    assert asked == [(False, False, True, False)]
    assert flags() == before


def test_sdpa_refuses_the_alignment_that_it_does_not_have():
    q, k = torch.randn(1, 8, 1, 16), torch.randn(1, 16, 1, 16)
    with pytest.raises(benchmark.Unsupported, match="bottom right"):
        benchmark.IMPLEMENTATIONS["sdpa_math"](q, k, k, causal=True)


def test_speedup():
    df = pd.DataFrame(
        {
            "impl": ["naive", "a", "naive", "a"], "pass": "fwd", "dtype": "float32", "head_dim": 64,
            "causal": False, "batch": 1, "heads": 4, "seqlen": [16, 16, 32, 32], "ms": [4.0, 2.0, math.nan, 1.0],
        }
    )  # fmt: skip
    speedup = benchmark.speedup(df)["speedup"]
    assert list(speedup[:2]) == [1.0, 2.0] and speedup[2:].isna().all()
    with pytest.raises(ValueError, match="'b' is not in the table"):
        benchmark.speedup(df, over="b")
    with pytest.raises(ValueError, match="more than once"):
        benchmark.speedup(pd.concat([df, df]))


# --- stored results ---------------------------------------------------------------------------------------


def test_saved_results_come_back_with_their_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    df = benchmark.sweep(["naive", "flash_attn"], [16], heads=1, head_dim=16, **QUICK)
    made_by = {"gpu": "Some GPU", "torch": "2.11.0"}
    path = benchmark.save_results(df, tmp_path / "some_gpu", made_by)
    assert path == tmp_path / "some_gpu" / "attention.csv"
    back = benchmark.reference_results("some_gpu", dtype=None)
    assert list(back.columns) == list(df.columns)
    assert list(back["status"]) == list(df["status"]) and list(back["reason"]) == list(df["reason"])
    assert back["ms"].iloc[0] == pytest.approx(df["ms"].iloc[0], rel=1e-4)
    assert back["causal"].dtype == bool
    assert back.attrs == {"environment": made_by, "machine": "Some GPU"}


def test_each_stored_table_keeps_its_own_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    attention = pd.DataFrame(columns=benchmark.SCHEMAS["attention"])
    training = pd.DataFrame(columns=benchmark.SCHEMAS["training"])
    benchmark.save_results(attention, tmp_path / "gpu", {"gpu": "G", "git_revision": "a"})
    benchmark.save_results(training, tmp_path / "gpu", {"gpu": "G", "git_revision": "b"}, table="training")
    assert benchmark.reference_results("gpu").attrs["environment"]["git_revision"] == "a"
    assert benchmark.reference_results("gpu", "training").attrs["environment"]["git_revision"] == "b"
    with pytest.raises(ValueError, match="holds results of"):
        benchmark.save_results(training, tmp_path / "gpu", {"gpu": "another"}, table="training")


def test_what_cannot_be_saved_or_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    good = pd.DataFrame(columns=benchmark.SCHEMAS["attention"])
    with pytest.raises(ValueError, match="starts with"):
        benchmark.save_results(good[["pass", "impl"]], tmp_path, {"gpu": "G"})
    with pytest.raises(ValueError, match="'gpu'"):
        benchmark.save_results(good, tmp_path, {"torch": "2.11.0"})
    with pytest.raises(ValueError, match="not known"):
        benchmark.save_results(good, tmp_path, {"gpu": "G"}, table="speed")
    benchmark.save_results(good, tmp_path / "g", {"gpu": "G"})
    with pytest.raises(FileNotFoundError, match="g/attention"):
        benchmark.reference_results("no_such_gpu")


def test_the_stored_attention_table_is_read_in_one_dtype(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    sweeps = [
        benchmark.sweep(["naive"], [16, 32], heads=1, head_dim=16, dtype=dtype, **QUICK)
        for dtype in (torch.float16, torch.bfloat16)
    ]
    benchmark.save_results(pd.concat(sweeps), tmp_path / "gpu", {"gpu": "G"})
    default = benchmark.reference_results("gpu")
    assert list(default["dtype"]) == ["bfloat16"] * 2 and list(default.index) == [0, 1]
    assert default.attrs["machine"] == "G"
    assert list(benchmark.reference_results("gpu", dtype="float16")["dtype"]) == ["float16"] * 2
    assert len(benchmark.reference_results("gpu", dtype=None)) == 4
    with pytest.raises(ValueError, match="no rows in float32; it has bfloat16, float16"):
        benchmark.reference_results("gpu", dtype="float32")


STORED = sorted(benchmark.RESULTS.glob("*/*.csv"))
MADE_BY = "gpu capability memory_gib driver cuda torch triton transformers flash_attn python os cpu git_revision date"


def test_results_are_stored():
    assert benchmark.RESULTS / "nvidia_h200" / "attention.csv" in STORED


@pytest.mark.parametrize("path", STORED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_stored_file_obeys_its_schema(path):
    df = benchmark.reference_results(path.parent.name, path.stem, dtype=None)
    assert len(df)
    made_by = df.attrs["environment"]
    assert set(made_by) - {"settings"} == set(MADE_BY.split())
    if "settings" in made_by:
        assert path.stem == "attention" and set(made_by["settings"]) == set(tables.SETTINGS)
        assert all(value >= 0 for value in made_by["settings"].values()) and made_by["settings"]["rounds"] >= 1
    assert df.attrs["machine"] and df.attrs["environment"]["git_revision"]
    assert "+changes" not in df.attrs["environment"]["git_revision"]  # nobody could check that code out
    schema = benchmark.SCHEMAS[path.stem]
    if "status" in schema:
        assert set(df["status"]) <= set(tables.STATUSES)
        assert df[df["status"] == "ok"][[c for c in schema if c not in ("cap_gib", "bound")]].notna().all(axis=None)
    if path.stem != "attention":
        more = ledger.KINDS if path.stem == "ladder" else ()  # what was predicted of each kind
        assert tuple(df.columns) == (*schema, *more)
        return
    assert set(df.columns) <= set(benchmark.COLUMNS)
    keys = list(points.KEY)
    assert not df.duplicated(keys).any() and df[keys].notna().all(axis=None)
    assert set(df["impl"]) <= set(benchmark.IMPLEMENTATIONS) and set(df["pass"]) <= {"fwd", "bwd"}
    assert set(df["dtype"]) <= {"float16", "bfloat16", "float32"} and df["causal"].dtype == bool
    assert (df[["head_dim", "batch", "heads", "seqlen"]] >= 1).all(axis=None)
    ok, failed = df[df["status"] == "ok"], df[df["status"] != "ok"]
    assert (ok[["ms", "tflops", "peak_mib"]] > 0).all(axis=None) and (ok["spread_ms"] >= 0).all()
    assert failed[["ms", "tflops", "peak_mib"]].isna().all(axis=None)
    assert (ok["reason"] == "").all() and (failed["reason"] != "").all()
    for row, which in zip(ok.itertuples(), ok["pass"], strict=True):
        flops = benchmark.attention_flops(
            batch=row.batch, heads=row.heads, seqlen_q=row.seqlen, head_dim=row.head_dim, causal=row.causal,
            backward=which == "bwd",
        )  # fmt: skip
        assert row.tflops == pytest.approx(flops / row.ms / 1e9, rel=1e-4)


@pytest.mark.parametrize("path", sorted(benchmark.RESULTS.glob("*/*.json")), ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_stored_json_is_known(path):
    found = json.loads(path.read_text(encoding="utf-8"))
    if path.stem == "environment":
        assert {table.stem for table in STORED if table.parent == path.parent} <= set(found)
        assert len({made_by["gpu"] for made_by in found.values()}) == 1
        if path.parent.name != resources.STORED_AS:  # compiled, for GPUs that need not be there
            assert found["attention"]["gpu"]
    else:
        assert path.stem == "ceilings"
        assert analysis.stored_ceilings(path.parent.name).machine == found["machine"]
        assert "ceilings" in json.loads((path.parent / "environment.json").read_text(encoding="utf-8"))


# --- rounds, and rows on disk as they come ----------------------------------------------------------------


def test_rounds_go_through_all_points_before_the_next(monkeypatch):
    order, times = [], iter([4.0, 40.0, 2.0, 20.0, 5.0, 50.0])

    def timed(fn, **options):
        order.append(fn())
        return timing.Timing(next(times), 0.5)

    def one(q, k, v, *, causal, softmax_scale):
        return q * 1

    def two(q, k, v, *, causal, softmax_scale):
        return q * 2

    monkeypatch.setattr(points, "time_call", timed)
    df = benchmark.sweep({"one": one, "two": two}, [16], heads=1, head_dim=16, rounds=3, **QUICK)
    factors = [round((later / order[0]).mean().item()) for later in order]
    assert factors == [1, 2, 1, 2, 1, 2]
    assert list(df["ms"]) == [4.0, 40.0] and list(df["rounds_ms"]) == ["4;2;5", "40;20;50"]
    assert list(df["spread_ms"]) == [0.5 + 3.0, 0.5 + 30.0]  # of the repeats, and between the rounds
    assert df["tflops"].iloc[0] == pytest.approx(4 * 16 * 16 * 16 / 4.0 / 1e9)


def test_a_point_that_fails_in_a_later_round_is_a_failure():
    calls = []

    def flaky(q, k, v, *, causal, softmax_scale):
        calls.append(1)
        if len(calls) > 20:
            raise torch.OutOfMemoryError("no room any more")
        return naive(q, k, v)

    options = {"heads": 1, "head_dim": 16, "rounds": 9, "seconds_per_point": 0.0, "progress": False}
    (row,) = benchmark.sweep({"flaky": flaky}, [16], **options).itertuples()
    assert row.status == "oom" and math.isnan(row.ms) and row.rounds_ms == ""


ENVIRONMENT = {"gpu": None, "cpu": "Some CPU", "driver": "1", "date": "2026-01-01"}


def some_points(impls=("naive", "sdpa_math"), seqlens=(16, 32), **options):
    return sweeping.plan(impls, seqlens, heads=1, head_dims=(16,), **options)


def measured(recorder, planned, rounds=2, stop_after=None):
    """Measures and writes; returns how many steps that took."""
    steps = sweeping.measure_rounds(
        planned, benchmark.IMPLEMENTATIONS, recorder.rows, rounds=rounds, seconds_per_point=0.0, warm_up=0.0
    )
    for count, _ in enumerate(steps, 1):
        recorder.write()
        if count == stop_after:
            return count
    return count


def test_a_recorder_goes_on_where_it_stopped(tmp_path):
    planned = some_points(passes=("fwd", "bwd"), causal=(True, False))
    measured(benchmark.Recorder(tmp_path, ENVIRONMENT), planned, stop_after=19)  # 16 points, and 3 second rounds
    stopped = benchmark.read_results(tmp_path)
    assert len(stopped) == 16 and list(stopped["rounds_ms"].str.count(";")) == [1] * 3 + [0] * 13

    again = benchmark.Recorder(tmp_path, ENVIRONMENT | {"date": "2026-01-02"}, resume=True)
    assert list(again.rows) == planned
    assert sweeping.pending(planned, again.rows, 2) == 13 == measured(again, planned)
    whole = benchmark.read_results(tmp_path)
    assert list(whole["rounds_ms"].str.count(";")) == [1] * 16
    first = stopped["rounds_ms"].str.split(";").str[0]
    assert list(whole["rounds_ms"].str.split(";").str[0]) == list(first)  # measured once, and kept
    assert list(whole["ms"][:3]) == list(stopped["ms"][:3])
    assert list(tmp_path.glob(".*")) == []  # no half-written file is left


def test_settings_are_all_of_them_or_none(tmp_path):
    with pytest.raises(ValueError, match="give seconds, rounds, warm_up, error_seconds"):
        benchmark.Recorder(tmp_path / "new", ENVIRONMENT, settings={"seconds": 1.0})
    settings = dict.fromkeys(tables.SETTINGS, 1.0)
    measured(benchmark.Recorder(tmp_path, ENVIRONMENT, settings=settings), some_points(["naive"]), rounds=1)
    assert benchmark.read_results(tmp_path).attrs["environment"] == ENVIRONMENT | {"settings": settings}
    assert not benchmark.Recorder(tmp_path, ENVIRONMENT, resume=True).settings_known  # rows to come have others
    assert "settings" not in benchmark.read_results(tmp_path).attrs["environment"]


def test_a_recorder_neither_overwrites_nor_mixes(tmp_path):
    measured(benchmark.Recorder(tmp_path, ENVIRONMENT), some_points(), rounds=1)
    before = (tmp_path / "attention.csv").read_bytes()
    with pytest.raises(FileExistsError, match="--resume"):
        benchmark.Recorder(tmp_path, ENVIRONMENT)
    with pytest.raises(ValueError, match="driver: 1, now 2.*name another folder"):
        benchmark.Recorder(tmp_path, ENVIRONMENT | {"driver": "2"}, resume=True)
    assert (tmp_path / "attention.csv").read_bytes() == before
    assert benchmark.read_results(tmp_path).attrs["environment"]["driver"] == "1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "attention.csv cannot be read"),
        (lambda text: "garbage\n", "attention.csv cannot be read"),
        (lambda text: text[: text.rindex(",", 0, text.rindex("float")) - 1] + "\n", r"line 3 is damaged \(head_dim"),
        (lambda text: text.replace(",16,", ",abc,", 1), r"line 2 is damaged \(head_dim: abc"),
        (lambda text: text.replace(",ok,", ",fine,", 1), r"line 2 is damaged \(status: fine"),
        (
            lambda text: text + text.splitlines()[1] + "\n",
            r"attention.csv .*: line 4 has the point of line 2 ",
        ),
    ],
    ids=["empty", "garbage", "cut off", "no number", "no status", "twice"],
)
def test_a_damaged_table_is_not_gone_on_with(tmp_path, change, message):
    measured(benchmark.Recorder(tmp_path, ENVIRONMENT), some_points(["naive"]), rounds=1)
    path = tmp_path / "attention.csv"
    damaged = change(path.read_text())
    assert damaged != path.read_text()
    path.write_text(damaged)
    with pytest.raises(ValueError, match=message):
        benchmark.Recorder(tmp_path, ENVIRONMENT, resume=True)
    assert path.read_text() == damaged  # what can be saved of it is its owner's


def test_a_damaged_environment_is_told(tmp_path):
    measured(benchmark.Recorder(tmp_path, ENVIRONMENT), some_points(["naive"]), rounds=1)
    for damaged in ("{", "[]", '{"attention": {}}'):
        (tmp_path / "environment.json").write_text(damaged)
        with pytest.raises(ValueError, match="environment.json is damaged"):
            benchmark.read_results(tmp_path)


def test_a_write_that_fails_leaves_the_table_before(tmp_path, monkeypatch):
    recorder = benchmark.Recorder(tmp_path, ENVIRONMENT)
    measured(recorder, some_points(["naive"]), rounds=1)
    before = recorder.path.read_bytes()

    def half(path, content):
        with path.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tables.Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space"):
        recorder.write()
    assert recorder.path.read_bytes() == before and list(tmp_path.glob(".*")) == []


def test_a_failure_is_kept_and_not_tried_again(tmp_path):
    planned = some_points(["flash_attn", "naive"])
    recorder = benchmark.Recorder(tmp_path, ENVIRONMENT)
    recorder.rows[planned[0]] = {"status": "oom", "reason": "no room"}
    recorder.write()
    again = benchmark.Recorder(tmp_path, ENVIRONMENT, resume=True)
    measured(again, planned, rounds=1)
    df = benchmark.read_results(tmp_path).set_index(["impl", "seqlen"])
    assert df.loc[("flash_attn", 16), "reason"] == "no room"
    assert df.loc[("flash_attn", 32), "reason"] == "not tried: it ran out of memory at N = 16"
    assert set(df.loc["naive", "status"]) == {"ok"}


def test_a_stored_table_of_old_can_be_resumed():
    """Rows without rounds count as one round; their columns survive."""
    rows = tables.rows_by_point(benchmark.reference_results(dtype=None))
    assert len(rows) == len(benchmark.reference_results(dtype=None))
    assert sweeping.pending(rows, rows, 1) == 0
    ok = sum(row["status"] == "ok" for row in rows.values())
    assert sweeping.pending(rows, rows, 2) <= ok


def test_compare_two_sweeps():
    columns = list(points.KEY)
    keys = [["naive", "fwd", "float16", 64, False, 1, 4, n] for n in (16, 32, 64)]
    first = pd.DataFrame(keys, columns=columns).assign(ms=[1.0, 2.0, math.nan], spread_ms=[0.5, 0.01, math.nan])
    second = first.assign(ms=[1.25, 2.1, 4.0])
    both = benchmark.compare(first, second)
    assert list(both["seqlen"]) == [16, 32]
    assert list(both["difference"]) == pytest.approx([0.2, 0.1 / 2.1])
    assert list(both["covered"]) == [True, False] and not both["overhead_bound"].any()
    with pytest.raises(ValueError, match="no measured point in common"):
        benchmark.compare(first, second.assign(dtype="bfloat16"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 100, "head_dims": (64,)}, "H would not be whole"),
        ({"head_dims": ()}, "at least one head dimension"),
        ({"batches": (2, 0)}, "batch=0"),
        ({"batches": ()}, "batch=0"),
        ({"tokens": 0}, "tokens=0"),
        ({"causal": ()}, "at least one of each"),
        ({"dtypes": ()}, "at least one of each"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sweeping.plan(["naive"], [16], **options)


def test_a_plan_takes_what_can_be_gone_through_once():
    once = {name: iter(values) for name, values in {
        "head_dims": (16, 32), "causal": (False, True), "dtypes": (torch.float16, torch.float32), "batches": (1, 2),
    }.items()}  # fmt: skip
    assert len(sweeping.plan(iter(["naive"]), iter([16, 32]), **once)) == 2**5


def test_a_plan_keeps_tokens_and_width():
    planned = sweeping.plan(["naive"], [64, 16], head_dims=(64, 128), hidden=256, tokens=64)
    assert [(p.head_dim, p.heads, p.seqlen, p.batch) for p in planned] == [
        (64, 4, 16, 4), (64, 4, 64, 1), (128, 2, 16, 4), (128, 2, 64, 1)
    ]  # fmt: skip


# --- on a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_gpu_sweep_forward_and_backward():
    impls = ["naive", "sdpa_math", "sdpa_efficient", "triton_v1", "triton_v2"]
    if runtime.capability >= (8, 0):
        impls += ["sdpa_flash", "sdpa_cudnn", "flex"]
    df = benchmark.sweep(impls, [256, 1024], heads=4, passes=("fwd", "bwd"), seconds_per_point=0.05, progress=False)
    df = df.set_index(["impl", "pass", "seqlen"])
    assert set(df.loc[("triton_v1", "bwd"), "status"]) == {"unsupported"}
    rest = df.drop(index=("triton_v1", "bwd"))
    assert (rest["status"] == "ok").all(), rest["reason"].to_dict()
    assert (rest[["ms", "tflops", "peak_mib"]] > 0).all().all()
    assert (rest["max_error"] < 0.1).all()


@pytest.mark.gpu
def test_gpu_flex_takes_more_shapes_than_dynamo_keeps():
    lengths = [128 * i for i in range(1, 11)]
    df = benchmark.sweep(["flex"], lengths, heads=2, seconds_per_point=0.01, error_seconds=0, progress=False)
    assert (df["status"] == "ok").all(), df["reason"].to_list()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=benchmark.dtype_name)
@pytest.mark.parametrize("shape", [(4096, 16, 64), (8192, 4, 128)], ids=str)
def test_gpu_peak_memory_of_naive_attention_is_its_byte_ledger(shape, dtype):
    assert naive_peak_against_ledger(*shape, dtype) == pytest.approx(1, abs=0.05)


@pytest.mark.gpu
def test_gpu_launch_overhead_is_told_from_work():
    small, large = (torch.randn(n, n, device=runtime.device, dtype=runtime.dtype) for n in (16, 4096))

    def slow_to_launch():
        small + small
        until = time.perf_counter() + 3e-4  # what a program does between two launches
        while time.perf_counter() < until:
            pass
        small + small

    def one_large():
        large @ large

    for fn, bound in ((slow_to_launch, True), (one_large, False)):
        assert timing.overhead_bound(fn, benchmark.time_call(fn, seconds=0.1).median_ms) is bound


@pytest.mark.gpu
def test_gpu_flex_is_compiled_before_it_is_timed(monkeypatch):
    """Neither the first call of a shape nor the block mask's making is among what is recorded."""
    from torch._dynamo.utils import counters

    compiled = []
    plain = points.time_call

    def timed(fn, **options):
        before = counters["stats"]["unique_graphs"]
        timing = plain(fn, **options)
        compiled.append(counters["stats"]["unique_graphs"] - before)
        return timing

    monkeypatch.setattr(points, "time_call", timed)
    df = benchmark.sweep(
        ["flex"], [256], heads=2, causal=True, passes=("fwd", "bwd"), seconds_per_point=0.01, progress=False
    )
    assert (df["status"] == "ok").all(), df["reason"].to_list()
    assert compiled == [0, 0]


@pytest.mark.gpu
def test_gpu_time_grows_with_the_work():
    def matmul(n):
        a = torch.randn(n, n, device=runtime.device, dtype=runtime.dtype)
        return benchmark.time_call(lambda: a @ a, seconds=0.2).median_ms

    assert matmul(4096) > 5 * matmul(1024)


BREAKS_THE_GPU = """
import torch
from labutils import benchmark, reference

def breaking(q, k, v, *, causal, softmax_scale):
    if q.shape[1] == 32:
        q = q[:, torch.full((32,), 10**6, device=q.device)]  # the kernel asserts that an index is in range
    return reference.naive_attention(q, k, v, causal=causal, softmax_scale=softmax_scale)

df = benchmark.sweep({"breaking": breaking, "naive": benchmark.IMPLEMENTATIONS["naive"]}, [16, 32, 64], heads=1,
                     head_dim=16, seconds_per_point=0.0, progress=False)
print(list(zip(df["impl"], df["seqlen"], df["status"])))
"""


@pytest.mark.gpu
def test_gpu_an_assertion_on_the_device_ends_the_sweep():
    """In a process of its own, which is all that it breaks."""
    done = subprocess.run([sys.executable, "-c", BREAKS_THE_GPU], capture_output=True, text=True, timeout=300)
    rows = [(impl, n, "ok" if n == 16 else "unsupported") for n in (16, 32, 64) for impl in ("breaking", "naive")]
    assert str(rows) in done.stdout, done.stderr
    assert "the sweep stopped at breaking fwd N=32" in done.stderr


@pytest.mark.gpu
def test_gpu_out_of_memory_is_a_row_and_leaves_no_memory_behind():
    impls, passes = ["naive", "triton_v2"], ("fwd", "bwd")
    benchmark.sweep(impls, [128], heads=8, passes=passes, **QUICK)  # cuBLAS keeps the workspaces it takes here
    before = torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(runtime.device).total_memory
    limit = (torch.cuda.memory_reserved() + 2 * 2**30) / total
    torch.cuda.set_per_process_memory_fraction(limit)
    try:
        df = benchmark.sweep(impls, [1024, 16384, 32768], heads=8, passes=passes, error_seconds=0, **QUICK)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    statuses = df.groupby("impl")["status"].agg(list)
    assert statuses["naive"] == ["ok", "ok", "oom", "oom", "oom", "oom"]
    assert statuses["triton_v2"] == ["ok"] * 6, df["reason"].to_list()
    assert torch.cuda.memory_allocated() - before < 2**20


@pytest.mark.gpu
@pytest.mark.parametrize("page", [None, 64])
def test_decoding_reads_at_a_rate_that_memory_can_have(page):
    microseconds, rate = roofline.decode_bandwidth(batch=8, seqlen=4096, page=page)
    bytes_read = 2 * 8 * 4096 * 8 * 128 * 2
    assert rate == pytest.approx(bytes_read / microseconds / 1e3)
    # More than memory delivers would mean that the L2 cache did; a tenth of it, that something else was timed.
    copied = analysis.measure_ceilings(seconds=0.1).gb_per_s
    assert 0.1 * copied < rate < 1.3 * copied


@pytest.mark.skipif(not runtime.interpreted, reason="there is a GPU to time it on")
def test_decoding_is_not_timed_in_the_interpreter():
    with pytest.raises(benchmark.Unsupported, match="means nothing"):
        roofline.decode_bandwidth(batch=1, seqlen=64)


# -- variants of a shape ----------------------------------------------------------------------------------------------

BASE = dict(batch=1, heads=4, kv_heads=4, seqlen=40, head_dim=16, dtype=torch.float32, causal=True)


def test_vary_measures_each_variant_and_judges_shared_heads():
    variants = {"base": {}, "grouped": {"kv_heads": 2}}
    table = benchmark.vary(["naive", "triton_v2"], BASE, variants, seconds_per_point=0.01, progress=False)
    assert list(table["variant"]) == ["base"] * 4 + ["grouped"] * 4
    assert set(table[table["variant"] == "grouped"]["kv_heads"]) == {2}
    assert (table["max_error"] < 1e-5).all()  # forward and backward, against an oracle with shared heads
    naive = table[table["impl"] == "naive"]
    assert (naive["status"] == "ok").all() and (naive["ms"] > 0).all() and (naive["tflops"] > 0).all()


def test_vary_refuses_shapes_that_are_none():
    with pytest.raises(ValueError, match="no multiple"):
        benchmark.vary(["naive"], BASE, {"odd": {"kv_heads": 3}}, progress=False)
    with pytest.raises(ValueError, match="'wide' needs"):
        benchmark.vary(["naive"], BASE, {"wide": {"width": 3}}, progress=False)
    with pytest.raises(ValueError, match="'none' has kv_heads=0"):
        benchmark.vary(["naive"], BASE, {"none": {"kv_heads": 0}}, progress=False)
