"""Figures of resources, block sizes, counters, predictions, timelines, advice and waves."""

import math

import pytest

pd = pytest.importorskip("pandas")
pytest.importorskip("matplotlib")

from test_plotting import check, legend, table, texts  # noqa: E402

import traffic_tables  # noqa: E402
from labutils import analysis, benchmark, plotting  # noqa: E402
from labutils.analysis import counters, resources  # noqa: E402


def test_block_sizes_that_fit():
    figure = plotting.plot_fit(resources.stored_table(), 128)
    check(figure)
    text = texts(figure)
    for name in ("T4", "A100", "RTX 3060", "RTX 4090", "H100", "B200"):
        assert name in text
    assert "does not\nfit" in text and "not timed" in text.replace("\n", " ")
    with pytest.raises(ValueError, match="head dimension 31"):
        plotting.plot_fit(resources.stored_table(), 31)


def blocks():
    common = ["forward", 64, "bfloat16", False, 4, 32, 4096]
    rows = [
        [*common, m, n, w, 2, True, math.nan if m == n == 128 else m / n + w, "ok"]
        for m in (64, 128) for n in (64, 128) for w in (4, 8)
    ]  # fmt: skip
    found = pd.DataFrame(rows, columns=list(benchmark.SCHEMAS["blocks"]))
    found.attrs["machine"] = "Some GPU"
    return found


def test_times_of_block_sizes():
    figure = plotting.plot_block_times(blocks())
    check(figure)
    assert "Some GPU" in texts(figure) and "none\nfits" in texts(figure) and "4.5 ms" in texts(figure)


def test_bytes_by_counters():
    plan = traffic_tables.planned_traffic(["naive", "triton_v1", "triton_v2"], blocks={"v1": (64, 64), "v2": (64, 128)})
    plan["dram_read_bytes"] = plan["dram_write_bytes"] = plan["compulsory_bytes"]
    plan["measured_bytes"] = 2 * plan["compulsory_bytes"]
    plan["l2_read_bytes"], plan["l2_write_bytes"] = plan["model_bytes"] / 2, 0.0
    plan["l1_filled_bytes"] = plan["model_bytes"]
    plan.attrs["machine"] = "Some GPU"
    figure = plotting.plot_counters(plan)
    check(figure)
    assert legend(figure) == ["compulsory", "DRAM, measured", "L2, measured", "SMs, measured", "IO model"]
    ratios = counters.explained(plan)
    assert (ratios["SM / model"] == 1).all() and (ratios["L2 / SM"] == 0.5).all()
    ratios = ratios[ratios["seqlen"] == 1024].set_index("impl")
    one = 16 * 1024 * 4  # a float32 for each row of each head
    reads, writes = ratios["DRAM reads / once"], ratios["DRAM writes / once"]
    tensor = 16 * 1024 * 64 * 2
    assert reads["triton_v2"] == pytest.approx(4 * tensor / (3 * tensor))  # Q, K, V; a compulsory byte is one of four
    assert writes["triton_v2"] == pytest.approx(4 * tensor / (tensor + one))
    assert reads["triton_v1"] == pytest.approx(4 * tensor / (3 * tensor + 2 * tensor + 2 * one))
    back = ratios["comes back (MiB)"]
    assert back["naive"] == 16 * 1024 * 1024 * 2 / 2**20 and back["triton_v2"] == 2 * tensor / 2**20
    assert back["triton_v1"] == (tensor + 2 * tensor + 2 * one) / 2**20


def test_predicted_over_measured():
    found = table().dropna(subset=["ms"]).assign(split="held_out")
    found["predicted_ms"] = 1.05 * found["ms"]
    found.loc[found.index[0], "split"] = "fit"
    figure = plotting.plot_prediction(found)
    check(figure)
    assert legend(figure) == ["within 10 %", "fitted", "held out", "held out, D = 96"]
    assert "Some GPU" in texts(figure)
    drawn = [line.get_ydata() for line in figure.axes[0].lines if len(line.get_ydata())]
    assert sum(map(len, drawn)) == (found["impl"] == found["impl"].iloc[0]).sum()
    assert all(y == pytest.approx(1.05) for y in drawn)


def test_a_timeline_has_a_track_for_each_device():
    rows = [["aten::matmul", "CPU", 0.0, 90.0, 0], ["aten::bmm", "CPU", 10.0, 80.0, 1], ["gemm", "GPU", 50.0, 200.0, 0]]
    events = pd.DataFrame(rows, columns=["op", "track", "start_us", "end_us", "depth"])
    events.attrs["machine"] = "Some GPU"
    figure = plotting.plot_timeline(events, title="A call")
    check(figure)
    keys = [[text.get_text() for text in ax.get_legend().get_texts()] for ax in figure.axes]
    assert keys == [["matmul", "bmm"], ["gemm"]] and "A call: Some GPU" in texts(figure)
    assert [len(ax.patches) for ax in figure.axes] == [2, 1]


def test_decisions():
    from labutils.analysis import advice

    judged = advice.against_fastest(benchmark.reference_results(), (9, 0))
    figure = plotting.plot_decisions(judged, "NVIDIA H200")
    check(figure)
    assert {f"fastest: {plotting.LABELS[name]}" for name in judged["fastest"]} == set(legend(figure))


def test_full_waves():
    lines = pd.DataFrame({"programs": [16, 132, 140], "tflops": [10.0, 80.0, 45.0], "label": "measured"})
    figure = plotting.plot_fill(lines, 132, "Some GPU")
    check(figure)
    assert "132 multiprocessors" in texts(figure)

    both = pd.concat([lines.assign(label=f"our Triton v2, {kind}") for kind in ("measured", "predicted")])
    drawn = plotting.plot_fill(both, 132, "Some GPU").axes[0].lines[:2]
    assert {line.get_color() for line in drawn} == {plotting.COLORS["triton_v2"]}
    assert len({line.get_linestyle() for line in drawn}) == 2


def test_a_roofline_with_further_ceilings_and_decoding():
    stored = benchmark.reference_results().query("head_dim == 64 and not causal")
    ceilings = analysis.stored_ceilings()
    decoding = pd.DataFrame({"batch": [1, 8], "intensity": [8.0, 8.0], "tflops": [17.0, 30.0]})
    points = analysis.roofline_points(stored, ceilings)
    figure = plotting.plot_roofline(points, ceilings, lower={"exponentials": 1070.0}, decoding=decoding)
    check(figure)
    assert "exponentials: 1,070 TFLOP/s" in texts(figure) and "decoding, B = 1, 8" in legend(figure)
