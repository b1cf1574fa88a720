"""Times are predicted on shapes held out; advice is near the fastest; stored resources are what compiling gives."""

import dataclasses
import itertools
import subprocess

import numpy as np
import pytest
import torch

pd = pytest.importorskip("pandas")

from labutils import analysis, benchmark, runtime  # noqa: E402
from labutils.analysis import advice, blocks, prediction, resources  # noqa: E402
from labutils.attention.kernels import launch  # noqa: E402
from labutils.attention.kernels.launch_table import LaunchConfig  # noqa: E402

GPU = prediction.Gpu("Some GPU", tflops=500.0, gb_per_s=2000.0, processors=100, mhz=1500.0)
SHAPE = {"pass": "fwd", "dtype": "float16", "head_dim": 64, "causal": False, "batch": 2, "heads": 4, "seqlen": 1024}


# --- the model --------------------------------------------------------------------------------------------


def test_what_a_shape_asks_for_by_hand():
    asked = prediction.terms(SHAPE, GPU, block=128, resident=1, slowdown=1.0)
    assert asked["fill"] == pytest.approx(1 / 0.64)  # 8 heads of 8 blocks: 64 programs for 100 SMs
    scores = 8 * 1024**2
    assert asked["products"] == pytest.approx(4 * scores * 64 / 500e12 * 1e3 / 0.64)
    assert asked["exponentials"] == pytest.approx(scores / (16 * 100 * 1500e6) * 1e3 / 0.64)
    assert asked["bytes"] == pytest.approx(4 * 8 * 1024 * 64 * 2 / 2000e9 * 1e3)
    assert asked["programs"] == pytest.approx(1e-3)  # one each, of a microsecond, at the fullest SM
    backward = prediction.terms(SHAPE | {"pass": "bwd"}, GPU, 128, 1, 1.0)
    assert backward["products"] == pytest.approx(2.5 * asked["products"])


@pytest.mark.parametrize(("heads", "waves"), [(12, 1), (13, 2), (25, 2), (26, 3)])
def test_equal_programs_come_in_waves(heads, waves):
    """Blocks of 128 at N = 1024: 8 programs a head, on 100 SMs."""
    asked = prediction.terms(SHAPE | {"batch": 1, "heads": heads}, GPU, 128, 1, 1.0)
    assert asked["fill"] * heads * 8 / 100 == pytest.approx(waves)


def test_a_program_alone_is_slowed_down_less_than_two_share_an_sm():
    alone, full = (
        prediction.terms(SHAPE | {"batch": 1, "heads": h}, GPU, 128, resident=2, slowdown=1.5) for h in (12, 25)
    )
    assert alone["fill"] * 96 / 100 == pytest.approx(1.5)
    assert full["fill"] * 200 / 100 == pytest.approx(2.0)


def test_causal_leaves_half_of_the_tiles_and_waits_for_the_longest_program():
    many = SHAPE | {"batch": 64, "heads": 32}
    full, causal = (prediction.terms(many | {"causal": c}, GPU, 128, 1, 1.0) for c in (False, True))
    assert causal["exponentials"] / full["exponentials"] == pytest.approx(36 / 64, rel=0.02)
    few = prediction.terms(SHAPE | {"batch": 1, "heads": 1, "causal": True}, GPU, 128, 1, 1.0)
    assert few["fill"] * 8 / 100 == pytest.approx(64 / 36)  # its longest program has 8 tiles, the average one 4.5


def invented(fit: prediction.Fit) -> "pd.DataFrame":
    shapes = [
        SHAPE | {"impl": "triton_v2", "heads": h, "seqlen": n, "head_dim": d}
        for h in (2, 9, 30) for n in (512, 1500, 4096, 9000) for d in (64, 128)
    ]  # fmt: skip
    return pd.DataFrame([shape | {"ms": fit.predict(shape, GPU)} for shape in shapes])


def test_a_fit_finds_the_constants_that_made_the_times():
    truth = prediction.Fit(
        {"overhead": 0.02, "bytes": 1.5, "products": 1.2, "exponentials": 0.8, "programs": 0.5}, 64, 2, 1.5, 0
    )
    measured = invented(truth)
    [(key, found)] = prediction.fit(measured, GPU).items()
    assert key == ("triton_v2", "fwd", "float16", False) and found.rows == len(measured)
    other = measured.assign(seqlen=measured["seqlen"] + 777).drop(columns="ms")
    guess = prediction.predict({key: found}, other, GPU)
    for row in guess.to_dict("records"):
        assert row["predicted_ms"] == pytest.approx(truth.predict(row, GPU), rel=0.01)
    assert sum(found.parts(row, GPU).values()) == pytest.approx(row["predicted_ms"])
    faster = dataclasses.replace(GPU, tflops=1000.0, gb_per_s=4000.0, mhz=3000.0)
    assert found.predict(row, faster) < found.predict(row, GPU)


def test_constants_are_the_best_that_are_not_negative():
    """Against trying out every choice of which constants are 0."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        a = generator.normal(size=(12, 4)) + generator.choice([0, 2])
        b = np.ones(12)
        found = prediction._not_negative(a, b)
        assert (found >= 0).all()
        least = (b**2).sum()
        for size in range(1, 5):
            for chosen in itertools.combinations(range(4), size):
                x = np.linalg.lstsq(a[:, chosen], b, rcond=None)[0]
                if (x >= 0).all():
                    least = min(least, ((a[:, chosen] @ x - b) ** 2).sum())
        assert ((a @ found - b) ** 2).sum() == pytest.approx(least, rel=1e-9)


def test_too_few_rows_and_unknown_groups():
    measured = pd.DataFrame([SHAPE | {"impl": "triton_v2", "ms": 1.0}] * 3)
    with pytest.raises(ValueError, match="3 measurements do not determine 5 constants"):
        prediction.fit(measured, GPU)
    assert prediction.predict({}, measured, GPU).empty
    assert prediction.fit(measured.assign(impl="naive"), GPU) == {}  # it is not what the model describes


def test_the_gpu_of_a_folder(tmp_path, monkeypatch):
    assert prediction.gpu_for(benchmark.RESULTS / "nvidia_h200") == prediction.Gpu.stored()
    monkeypatch.setattr(prediction.Gpu, "of_this_machine", classmethod(lambda cls, ceilings: GPU))
    monkeypatch.setattr(prediction, "measure_ceilings", lambda: None)
    assert prediction.gpu_for(tmp_path / "nvidia_h200") is GPU  # a folder of that name with nobody's ceilings
    with pytest.raises(ValueError, match="gpu='abacus' is not known: nvidia_h200"):
        prediction.Gpu.stored("abacus")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (FileNotFoundError(2, "No such file or directory: 'nvidia-smi'"), "No such file.*install NVIDIA's driver"),
        (subprocess.CompletedProcess([], 0, "[N/A]\n", ""), r"\(\[N/A\]\).*mhz="),
        (subprocess.CompletedProcess([], 9, "", "no devices"), "no devices"),
        (subprocess.CompletedProcess([], 0, "", ""), "prints nothing"),
    ],
)
def test_a_clock_that_nvidia_smi_does_not_say(answer, message, monkeypatch):
    def run(*_, **__):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(prediction.subprocess, "run", run)
    with pytest.raises(RuntimeError, match=message):
        prediction._highest_clock_mhz()


def test_the_clock_that_nvidia_smi_says(monkeypatch):
    done = subprocess.CompletedProcess([], 0, "1980\n", "")
    monkeypatch.setattr(prediction.subprocess, "run", lambda *_, **__: done)
    assert prediction._highest_clock_mhz() == 1980


def test_errors_are_relative_and_summed_up():
    table = pd.DataFrame({"impl": "a", "pass": "fwd", "ms": [1.0, 2.0, 4.0], "predicted_ms": [1.1, 2.0, 3.0]})
    assert prediction.errors(table).tolist() == pytest.approx([0.1, 0.0, 0.25])
    summary = prediction.error_summary(table)
    assert summary.loc["all", "median"] == pytest.approx(0.1) and summary.loc["a fwd", "shapes"] == 3


def test_shapes_held_out_are_others_than_those_of_the_fit():
    points = prediction.points_to_measure()
    split = {name: [p for p, where in points.items() if where == name] for name in ("fit", "held_out")}
    assert len(split["held_out"]) >= 100 and len(points) == sum(map(len, split.values()))
    assert not {p.seqlen for p in split["fit"]} & {p.seqlen for p in split["held_out"]}
    assert {p.head_dim for p in split["held_out"]} > {p.head_dim for p in split["fit"]}
    assert list(points) == list(prediction.points_to_measure())  # the same each time, so that a sweep can be resumed
    stored = benchmark.reference_results(dtype=None)
    assert not {benchmark.Point.of(row) for row in stored.to_dict("records")} & set(split["held_out"])


# --- the stored H200 --------------------------------------------------------------------------------------

OF_A_SHAPE = ["batch", "heads", "seqlen", "head_dim", "causal"]


@pytest.fixture(scope="module")
def stored():
    return prediction.stored_predictions()


def test_stored_predictions_follow_from_the_stored_measurements(stored):
    found = prediction.predicted_table(stored.drop(columns="predicted_ms"), prediction.Gpu.stored())
    assert len(found) == len(stored)
    assert found["predicted_ms"].to_numpy() == pytest.approx(stored["predicted_ms"].to_numpy(), rel=1e-3)
    held_out, fitted = stored[stored["split"] == "held_out"], stored[stored["split"] == "fit"]
    assert set(held_out["impl"]) == set(prediction.MEASURED) and len(held_out) >= 350
    assert not held_out.duplicated([*OF_A_SHAPE, "impl", "pass"]).any()
    assert not set(held_out["seqlen"]) & set(fitted["seqlen"])
    errors = prediction.errors(held_out)
    assert errors.median() <= 0.10 and errors.quantile(0.9) <= 0.25
    judged = prediction.error_summary(held_out)  # and no implementation hides behind another
    assert (judged["median"] <= 0.10).all() and (judged["90 %"] <= 0.25).all()


def test_a_hundred_different_shapes_are_predicted_by_fits_that_have_not_seen_their_length(stored):
    """The shapes held out, and those of the fit, each from the other lengths."""
    gpu = prediction.Gpu.stored()
    fitted, held_out = stored[stored["split"] == "fit"], stored[stored["split"] == "held_out"]
    turned = prediction.each_length_in_turn(fitted, gpu)
    assert len(turned) == len(fitted) and not turned["predicted_ms"].equals(fitted["predicted_ms"])
    both = pd.concat([turned, held_out])
    assert len(both.drop_duplicates(OF_A_SHAPE)) >= 100
    for rows in (turned, both):
        errors = prediction.errors(rows)
        assert errors.median() <= 0.10 and errors.quantile(0.9) <= 0.25


def test_which_kernel_computes_a_head_of_96_with_128_columns(stored):
    """What notebook 04 reads off the errors; of ours the launch table says the same."""
    gpu = prediction.Gpu.stored()
    fits = prediction.fit(stored[stored["split"] == "fit"], gpu)
    errors = prediction.by_head_dim(fits, stored[stored["split"] == "held_out"], gpu, {96: 128}).abs()
    assert LaunchConfig.block_d(96) == 128
    padded = errors["D = 96 as 128"] < errors["D = 96"]
    assert padded.groupby(level="impl").all().to_dict() == {"triton_v2": True, "sdpa_cudnn": True, "sdpa_flash": False}
    assert (errors.loc[["triton_v2"], "D = 96 as 128"] < 0.05).all()


@pytest.mark.parametrize("table", ["attention", "prediction"])
def test_the_advice_is_near_the_fastest_on_the_stored_shapes(table):
    found = benchmark.reference_results(table=table, dtype=None)
    judged = advice.against_fastest(found if table == "attention" else found.assign(status="ok"), (9, 0))
    assert len(judged) >= {"attention": 96, "prediction": 230}[table]
    assert (judged["ratio"] <= 1.10).mean() >= 0.95
    assert set(judged["recommended"]) <= set(found["impl"])  # none is judged by what was not measured


def test_the_stored_blocks_hold_the_shipped_launches_and_hardly_a_faster_one():
    """10 % is what a timing of 50 ms may be off, and what an entry for two lengths and both masks may cost."""
    found = blocks.against_the_table(blocks.stored_blocks())
    assert len(found) == 4 and set(found["head_dim"]) == {64, 128}
    assert found["shipped ms"].notna().all() and (found["shipped / best"] < 1.10).all()


@pytest.mark.parametrize("attributes", [{}, {"environment": {"capability": None}}])
def test_blocks_of_no_known_gpu_have_no_shipped_launch(attributes, monkeypatch):
    monkeypatch.setattr(runtime, "capability", None)
    stored = blocks.stored_blocks()
    stored.attrs = attributes
    with pytest.raises(ValueError, match="does not say which GPU it is of"):
        blocks.against_the_table(stored)


# --- advice -----------------------------------------------------------------------------------------------

ASKED = {"seqlen": 4096, "head_dim": 64, "capability": (9, 0)}


@pytest.mark.parametrize(
    ("changes", "impl"),
    [
        ({}, "sdpa_cudnn"),
        ({"head_dim": 256}, "triton_v2"),
        ({"features": ["window"]}, "triton_v2"),
        ({"features": ["score_mod"]}, "flex"),
        ({"dtype": torch.float32}, "sdpa_efficient"),
        ({"dtype": "float16", "capability": (7, 5)}, "sdpa_efficient"),
        ({"capability": (8, 9), "features": ["alibi"]}, "flash_attn"),
        ({"capability": None}, "sdpa_flash"),
        ({"available": ["naive", "flex"]}, "flex"),
        ({"capability": None, "features": ["score_mod"]}, "naive"),
        ({"capability": None, "features": ["dropout"]}, "naive"),
        ({"features": ["paged"]}, "triton_v2"),
        ({"features": ["paged"], "backward": True}, "flex"),
        ({"head_dim": 20, "available": ["sdpa_flash", "sdpa_cudnn"]}, "sdpa_flash"),
    ],
)
def test_recommendations(changes, impl):
    found = analysis.recommend(**ASKED | changes)
    assert found.impl == impl and found.reasons and impl not in found.otherwise
    assert impl in benchmark.IMPLEMENTATIONS and found.call in str(found) and found.reasons[0] in str(found)


def test_advice_says_what_it_does_not_know_and_what_cannot_be():
    assert "measured on an H200 alone" in str(analysis.recommend(**ASKED | {"capability": (8, 6)}))
    assert "measured on an H200 alone" not in str(analysis.recommend(**ASKED))
    with pytest.raises(ValueError, match="sdpa_flash: it needs compute capability 8.0"):
        analysis.recommend(**ASKED | {"capability": (7, 5), "available": ["sdpa_flash"]})
    with pytest.raises(ValueError, match="features=.*sink.*choose from window"):
        analysis.recommend(**ASKED, features=["sink"])
    with pytest.raises(ValueError, match="dtype='bf16' is none of torch's"):
        analysis.recommend(**ASKED, dtype="bf16")
    with pytest.raises(ValueError, match="seqlen=0"):
        analysis.recommend(**ASKED | {"seqlen": 0})
    assert "flash kernel" not in analysis.recommend(**ASKED | {"capability": None, "available": ["naive"]}).reasons[0]
    assert set(advice.PITFALLS.columns) == {"pitfall", "symptom", "remedy"} and len(advice.PITFALLS) > 5


@pytest.mark.skipif(runtime.device.type == "cuda", reason="asks what PyTorch's kernel for the CPU refuses")
def test_the_flash_kernel_for_the_cpu_has_no_dropout():
    """Why the advice without a GPU is another where dropout is needed."""
    q = torch.randn(1, 1, 16, 8)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        attention = torch.nn.functional.scaled_dot_product_attention
        assert attention(q, q, q).shape == q.shape
        with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="No available kernel"):
            attention(q, q, q, dropout_p=0.1)


# --- resources --------------------------------------------------------------------------------------------


def test_stored_resources_are_what_compiling_gives():
    """A launch of the table and one of the grid, compiled again; another Triton may give other registers."""
    chosen = [
        resources.Launch("table", "forward", 64, (8, 9), True),
        resources.Launch("grid", "forward", 64, (8, 0), False, LaunchConfig(64, 64, 4, resources.GRID_STAGES)),
    ]
    now = resources.compile_launches(chosen)
    stored = resources.stored_table()
    keys = ["origin", "kernel", "capability", "head_dim", "causal", "block_m", "block_n", "num_warps", "num_stages"]
    both = now.merge(stored, on=keys, suffixes=("", "_stored"))
    assert len(both) == len(chosen)
    same = ["shared_bytes", "fits"]
    if (both["triton"] == both["triton_stored"]).all():
        same += ["registers", "spilled_bytes", "blocks_per_sm", "occupancy"]
    for column in same:
        assert both[column].to_numpy() == pytest.approx(both[f"{column}_stored"].to_numpy(), rel=1e-4), column


def test_the_stored_table_has_the_launch_table_of_today(monkeypatch):
    """Without compiling: `python tools/study.py resources` makes it anew."""
    stored = resources.stored_table()
    table = stored[stored["origin"] == "table"]
    assert set(table["capability"]) == {"{}.{}".format(*c) for c in resources.CAPABILITIES}
    assert table["fits"].all() and set(table["kernel"]) == {"v1", "forward", "dq", "dkdv", "decode"}
    for row in table[table["kernel"] != "decode"].itertuples():  # decoding cuts block_m to what it needs
        capability = tuple(map(int, row.capability.split(".")))
        monkeypatch.setattr(launch, "_capability", lambda index, capability=capability: capability)
        config = launch.pick_config(
            row.kernel, row.head_dim, torch.float16, row.causal, torch.device("meta"), longest=1024
        )
        got = (row.block_m, row.block_n, row.num_warps, row.num_stages)
        assert got == (config.block_m, config.block_n, config.num_warps, config.num_stages), row


def test_two_gpus_side_by_side():
    pair = resources.compared(resources.stored_table(), "8.0", "8.9")
    grid = len(resources.GRID_BLOCKS) ** 2 * len(resources.GRID_WARPS) * 2
    assert len(pair) == grid
    only = pair[pair["fits 8.0"] & ~pair["fits 8.9"]]
    assert len(only) and (only["shared_kib"] > 99).all() and (only["programs 8.9"] == 0).all()
    assert not (pair["fits 8.9"] & ~pair["fits 8.0"]).any()
    assert resources.gpu_name("8.9") == "RTX 4090" and resources.gpu_name((8, 0)) == "A100"


# --- what needs a GPU, and says so ------------------------------------------------------------------------


@pytest.mark.skipif(runtime.device.type == "cuda", reason="this machine has a GPU")
@pytest.mark.parametrize(
    "call",
    [
        lambda: blocks.sweep_blocks(),
        lambda: analysis.measure_exponentials(),
        lambda: analysis.decode_points([1]),
        lambda: analysis.launch_overhead(lambda: None),
    ],
)
def test_what_needs_a_gpu_says_so(call):
    with pytest.raises(benchmark.Unsupported, match="GPU"):
        call()


def test_ceilings_of_exponentials():
    assert analysis.exponential_tflops(1e12, 64) == pytest.approx(256)
    assert analysis.in_turn(300.0, 600.0) == pytest.approx(200)


def test_a_timeline_has_callers_above_calls(tmp_path):
    a = torch.randn(64, 64, device=runtime.device)
    events = analysis.timeline(lambda: torch.matmul(a, a), trace=tmp_path / "trace.json")
    cpu = events[events["track"] == "CPU"].set_index("op")
    assert cpu.loc["aten::mm", "depth"] == cpu.loc["aten::matmul", "depth"] + 1
    assert events["start_us"].min() == 0 and (events["end_us"] > events["start_us"]).all()
    assert (tmp_path / "trace.json").stat().st_size > 100


def test_flops_that_the_profiler_does_not_count_are_filled_in():
    a = torch.randn(64, 64, device=runtime.device)
    table = analysis.profile(lambda: a.softmax(-1), flops={"_softmax": 5e9})
    assert table.loc[table["op"] == "aten::_softmax", "gflops"].iloc[0] == 5.0
    with pytest.raises(ValueError, match="no operation's name contains 'attention'"):
        analysis.profile(lambda: a.softmax(-1), flops={"attention": 1.0})


# --- on a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_gpu_exponentials_are_below_the_units_limit():
    gpu = prediction.Gpu.of_this_machine(analysis.measure_ceilings(seconds=0.1))
    assert 0.3 * gpu.exponentials_per_s < analysis.measure_exponentials() < 1.05 * gpu.exponentials_per_s


@pytest.mark.gpu
def test_gpu_launch_overhead_shows_for_small_work():
    x = torch.ones(8, device=runtime.device)
    found = analysis.launch_overhead(lambda: ((x + 1) * 2 - 3).relu())
    assert found.replayed_us < found.called_us and found.waiting > 0.2


@pytest.mark.gpu
def test_gpu_sweep_of_blocks():
    found = blocks.sweep_blocks(batch=1, heads=2, seqlen=256, blocks=(32, 64), warps=(4,), stages=(2,), seconds=0.01)
    assert len(found) == 4 and (found["status"] == "ok").all() and (found["ms"] > 0).all()
