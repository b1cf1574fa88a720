"""The sweep: its columns, its rows for failures, its clocks, its memory, its oracle, its stored tables."""

import json
import math
import time
import warnings

import pytest
import torch

from labutils import analysis, benchmark, reference, runtime

pd = pytest.importorskip("pandas")
QUICK = {"seconds_per_point": 0.0, "progress": False}
SDPA = torch.nn.functional.scaled_dot_product_attention


def naive(q, k, v, *, causal=False, softmax_scale=None):
    return reference.naive_attention(q, k, v, causal=causal, softmax_scale=softmax_scale)


def test_columns_are_the_schema_and_three_more():
    df = benchmark.sweep(["naive", "sdpa_flash"], [32, 16], heads=2, head_dim=16, passes=("fwd", "bwd"), **QUICK)
    schema = "impl pass dtype head_dim causal batch heads seqlen ms tflops peak_mib status"
    assert " ".join(df.columns) == f"{schema} spread_ms max_error reason"
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
        warnings.warn("needs a head dimension of 64", stacklevel=1)
        raise RuntimeError("No available kernel.")

    (row,) = benchmark.sweep({"refusing": refusing}, [16], heads=1, head_dim=16, **QUICK).itertuples()
    assert row.status == "unsupported" and math.isnan(row.ms)
    assert "No available kernel." in row.reason and "head dimension of 64" in row.reason


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
    assert list(df["seqlen"]) == [16]
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


def test_bad_pass():
    with pytest.raises(ValueError, match="'fwd', 'bwd'"):
        benchmark.sweep(["naive"], [16], passes=("forward",), progress=False)


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_error_is_the_distance_to_exact_attention(causal, monkeypatch):
    monkeypatch.setitem(benchmark.ORACLE_BYTES, runtime.device.type, 8 * 48 * 10)  # ten rows at a time
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
    monkeypatch.setattr(benchmark, "INTERPRETER_TILES", 0)  # too large to run: stopped at the first launch
    mine = benchmark.IMPLEMENTATIONS["triton_v2"]
    began = time.perf_counter()
    (row,) = benchmark.sweep({"mine": mine}, [4096], heads=2, head_dim=16, error_seconds=0, **QUICK).itertuples()
    assert row.status == "unsupported" and "interpreter" in row.reason and math.isnan(row.max_error)
    assert time.perf_counter() - began < 10  # 2,048 tiles would take longer


# --- time and memory --------------------------------------------------------------------------------------


@pytest.mark.skipif(
    runtime.device.type == "cuda", reason="on a GPU time_call times the GPU, which a sleep leaves alone"
)
def test_time_call_of_a_sleep():
    timing = benchmark.time_call(lambda: time.sleep(0.02), seconds=0.1)
    assert 19 <= timing.median_ms < 500
    assert timing.spread_ms >= 0


def test_time_call_is_the_median_with_the_interquartile_range():
    assert benchmark._summary([1.0, 2.0, 3.0, 4.0, 100.0]) == (3.0, 2.0)


def test_time_call_repeats_three_times_at_least():
    calls = []
    benchmark.time_call(lambda: calls.append(1), seconds=0.0)
    assert len(calls) == 1 + benchmark.MIN_REPEATS
    calls.clear()
    benchmark.time_call(lambda: calls.append(1), seconds=0.0, warm_up=False)
    assert len(calls) == benchmark.MIN_REPEATS


def test_peak_memory_sees_what_was_freed_again():
    def work():
        a = torch.zeros(3 * 2**20, dtype=torch.int8, device=runtime.device)
        del a
        return torch.zeros(2**20, dtype=torch.int8, device=runtime.device)

    assert benchmark.peak_memory_mib(work) == pytest.approx(3, abs=0.05)


def test_peak_memory_of_naive_attention_is_its_byte_ledger():
    """Two N x N matrices at a time: scores and probabilities."""
    n, heads = 1024, 4
    df = benchmark.sweep(["naive"], [n], heads=heads, head_dim=16, error_seconds=0, **QUICK)
    element = runtime.dtype.itemsize
    scores_and_probabilities = 2 * heads * n * n * element / 2**20
    assert df["peak_mib"].iloc[0] == pytest.approx(scores_and_probabilities, rel=0.05)


def test_flash_needs_no_square_matrix():
    impl = "sdpa_flash" if runtime.device.type == "cpu" else "triton_v2"
    (row,) = benchmark.sweep([impl], [2048], heads=2, head_dim=16, error_seconds=0, **QUICK).itertuples()
    assert row.status == "ok"
    assert row.peak_mib < 0.2 * 2 * 2048 * 2048 * runtime.dtype.itemsize / 2**20


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
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    df = benchmark.sweep(["naive", "flash_attn"], [16], heads=1, head_dim=16, **QUICK)
    made_by = {"gpu": "Some GPU", "torch": "2.11.0"}
    path = benchmark.save_results(df, tmp_path / "some_gpu", made_by)
    assert path == tmp_path / "some_gpu" / "attention.csv"
    back = benchmark.reference_results("some_gpu")
    assert list(back.columns) == list(df.columns)
    assert list(back["status"]) == list(df["status"]) and list(back["reason"]) == list(df["reason"])
    assert back["ms"].iloc[0] == pytest.approx(df["ms"].iloc[0], rel=1e-4)
    assert back["causal"].dtype == bool
    assert back.attrs == {"environment": made_by, "machine": "Some GPU"}


def test_each_stored_table_keeps_its_own_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    attention = pd.DataFrame(columns=benchmark.SCHEMAS["attention"])
    training = pd.DataFrame(columns=benchmark.SCHEMAS["training"])
    benchmark.save_results(attention, tmp_path / "gpu", {"gpu": "G", "git_revision": "a"})
    benchmark.save_results(training, tmp_path / "gpu", {"gpu": "G", "git_revision": "b"}, table="training")
    assert benchmark.reference_results("gpu").attrs["environment"]["git_revision"] == "a"
    assert benchmark.reference_results("gpu", "training").attrs["environment"]["git_revision"] == "b"
    with pytest.raises(ValueError, match="holds results of"):
        benchmark.save_results(training, tmp_path / "gpu", {"gpu": "another"}, table="training")


def test_what_cannot_be_saved_or_read(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
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


def test_every_stored_file_obeys_its_schema():
    for csv in benchmark.RESULTS.glob("*/*.csv"):
        df = benchmark.reference_results(csv.parent.name, csv.stem)
        assert len(df), csv
        assert df.attrs["machine"] and json.dumps(df.attrs["environment"])
        if "status" in df:
            assert set(df["status"]) <= {"ok", "oom", "unsupported"}, csv


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
def test_gpu_time_grows_with_the_work():
    def matmul(n):
        a = torch.randn(n, n, device=runtime.device, dtype=runtime.dtype)
        return benchmark.time_call(lambda: a @ a, seconds=0.2).median_ms

    assert matmul(4096) > 5 * matmul(1024)


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
    microseconds, rate = benchmark.decode_bandwidth(batch=8, seqlen=4096, page=page)
    bytes_read = 2 * 8 * 4096 * 8 * 128 * 2
    assert rate == pytest.approx(bytes_read / microseconds / 1e3)
    # More than memory delivers would mean that the L2 cache did; a tenth of it, that something else was timed.
    copied = analysis.measure_ceilings(seconds=0.1).gb_per_s
    assert 0.1 * copied < rate < 1.3 * copied


@pytest.mark.skipif(not runtime.interpreted, reason="there is a GPU to time it on")
def test_decoding_is_not_timed_in_the_interpreter():
    with pytest.raises(benchmark.Unsupported, match="means nothing"):
        benchmark.decode_bandwidth(batch=1, seqlen=64)
