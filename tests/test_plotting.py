"""Figures: axes with units, a title, a legend, the machine's name; failures are drawn, not left out."""

import math

import pytest
import torch

from labutils import benchmark, runtime
from labutils.attention import reference

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")
pd = pytest.importorskip("pandas")
import matplotlib.pyplot as plt  # noqa: E402  after the backend was chosen
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402

from labutils import analysis, plotting  # noqa: E402

N, IMPLS = (512, 1024, 2048, 4096), ("naive", "sdpa_flash", "triton_v2")


def table(machine="Some GPU", lengths=N, impls=IMPLS, **changes) -> "pd.DataFrame":
    """A sweep in which naive attention runs out of memory at the greatest length."""
    rows = []
    for n in lengths:
        for i, impl in enumerate(impls):
            row = {
                "impl": impl, "pass": "fwd", "dtype": "float16", "head_dim": 64, "causal": False, "batch": 1,
                "heads": 4, "seqlen": n, "ms": n * (3 - i) / 100, "tflops": 10.0 * (i + 1), "peak_mib": n / 8,
                "status": "ok", "spread_ms": 0.1, "max_error": 1e-3, "reason": "",
            }  # fmt: skip
            if impl == "naive" and n == 4096:
                nothing = dict.fromkeys(("ms", "tflops", "peak_mib", "spread_ms", "max_error"), math.nan)
                row |= nothing | {"status": "oom", "reason": "too large"}
            rows.append(row | changes)
    df = pd.DataFrame(rows, columns=list(benchmark.COLUMNS))
    df.attrs["machine"] = machine
    return df


def texts(figure) -> str:
    """All text of a figure."""
    return "\n".join(t.get_text() for t in figure.findobj(matplotlib.text.Text))


def legend(figure) -> list[str]:
    owners = [figure, *figure.axes]
    legends = [*figure.legends, *(a.get_legend() for a in owners[1:] if a.get_legend())]
    return [t.get_text() for one in legends for t in one.get_texts()]


def check(figure, *, axes=None):
    """What every figure has; it can be drawn without a warning, and no text leaves the page."""
    assert isinstance(figure, matplotlib.figure.Figure)
    assert legend(figure)
    for ax in axes if axes is not None else figure.axes:
        assert ax.get_xlabel() or ax.get_shared_x_axes().get_siblings(ax)
        assert ax.get_title() or ax.get_title(loc="left") or len(figure.axes) > 1
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    page = figure.bbox
    # matplotlib keeps labels for ticks outside the axes, and does not draw them
    ticks = {t for ax in figure.axes for axis in (ax.xaxis, ax.yaxis) for t in axis.get_ticklabels(which="both")}
    for text in set(figure.findobj(matplotlib.text.Text)) - ticks:
        if text.get_visible() and text.get_text():
            box = text.get_window_extent(renderer)
            assert box.x0 > -2 and box.y0 > -2, text.get_text()
            assert box.x1 < page.x1 + 2 and box.y1 < page.y1 + 2, text.get_text()


def test_every_implementation_has_a_look_of_its_own():
    names = set(benchmark.IMPLEMENTATIONS)
    assert names <= set(plotting.COLORS) and names <= set(plotting.LABELS) and names <= set(plotting.MARKERS)
    for look in (plotting.COLORS, plotting.LABELS, plotting.MARKERS):
        assert len({look[n] for n in names}) == len(names)


@pytest.mark.parametrize(
    ("draw", "label", "title"),
    [
        (plotting.plot_time, "time (ms)", "Time"),
        (lambda df: plotting.plot_time(df, quantity="tflops"), "TFLOP/s", "Throughput"),
        (plotting.plot_memory, "(MiB)", "memory"),
        (plotting.plot_error, "max |out", "error"),
    ],
    ids=["time", "tflops", "memory", "error"],
)
def test_sweep_figures(draw, label, title):
    figure = draw(table())
    check(figure)
    (ax,) = figure.axes
    assert "sequence length N" in ax.get_xlabel() and label in ax.get_ylabel()
    assert title in ax.get_title(loc="left") and "Some GPU" in ax.get_title(loc="left")
    assert legend(figure) == ["naive", "SDPA flash", "our Triton v2"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["512", "1K", "2K", "4K"]
    assert "float16, B = 1, H = 4, D = 64" in texts(figure)


def test_guides_of_memory_know_a_constant_number_of_tokens():
    """As N grows the batch shrinks: memory that is linear in N for a sequence is flat, and N² a line of slope 1."""
    for df, powers in ((table(), (1, 2)), (table().assign(batch=lambda rows: 4096 // rows["seqlen"]), (0, 1))):
        (ax,) = plotting.plot_memory(df).axes
        ends = [line.get_ydata() for line in ax.get_lines() if line.get_linestyle() == ":"]
        assert [round(math.log(last / first, N[-1] / N[0])) for first, last in ends] == list(powers)
        assert ("for each sequence" in texts(ax.figure)) == (powers == (0, 1))


def test_out_of_memory_is_drawn():
    assert "out of memory: naive" in texts(plotting.plot_time(table()))
    assert "out of memory: naive" in texts(plotting.plot_memory(table()))
    assert "out of memory" not in texts(plotting.plot_time(table(lengths=N[:3])))


def test_the_unsupported_are_named_with_their_reason():
    df = table()
    mine = df["impl"] == "triton_v2"
    df.loc[mine, ["ms", "tflops", "peak_mib", "spread_ms"]] = math.nan
    df.loc[mine, ["status", "reason"]] = ["unsupported", "it runs in the interpreter"]
    words = texts(plotting.plot_time(df)).replace("\n", " ")
    assert "Not timed: our Triton v2 (it runs in the interpreter)" in words
    assert legend(plotting.plot_time(df)) == ["naive", "SDPA flash"]
    assert "our Triton v2" in legend(plotting.plot_error(df))  # its error was measured


def test_points_bound_by_launching_are_ringed():
    df = table().assign(overhead_bound=lambda rows: rows["seqlen"] == 512)
    for quantity in ("ms", "tflops"):
        figure = plotting.plot_time(df, quantity=quantity)
        check(figure)
        rings = [line for line in figure.axes[0].get_lines() if line.get_label() == "bound by launch overhead"]
        assert [list(ring.get_xdata()) for ring in rings] == [[512]] * 3
        assert legend(figure).count("bound by launch overhead") == 1
        assert legend(figure)[-1] == "bound by launch overhead"
    assert "launch" not in texts(plotting.plot_memory(df))
    assert "launch" not in texts(plotting.plot_time(df.assign(overhead_bound=False)))
    assert "launch" not in texts(plotting.plot_time(df.drop(columns="overhead_bound")))


def test_a_long_legend_stays_on_the_page():
    every = [name for name in benchmark.IMPLEMENTATIONS if not name.startswith("tiled")]
    df = table(impls=every).assign(overhead_bound=lambda rows: rows["seqlen"] == 512)
    figure = plotting.plot_time(df, table("NVIDIA H200", impls=every))
    check(figure)
    assert len(legend(figure)) == 2 * len(every) + 1


def test_reference_curves_are_dashed_and_labelled_with_their_card():
    figure = plotting.plot_time(table("My laptop"), table("NVIDIA H200", lengths=(4096, 8192)))
    check(figure)
    stored = [line for line in figure.axes[0].get_lines() if "NVIDIA H200 (stored)" in str(line.get_label())]
    assert len(stored) == 3 and all(line.get_linestyle() == "--" for line in stored)
    assert "Dashed: stored results of NVIDIA H200" in texts(figure).replace("\n", " ")
    with pytest.raises(ValueError, match="head_dim 64"):
        plotting.plot_time(table(), table(head_dim=128))


def test_a_table_of_several_sweeps_is_refused():
    with pytest.raises(ValueError, match="more than once at N = 512"):
        plotting.plot_time(pd.concat([table(), table(dtype="bfloat16")]))
    with pytest.raises(ValueError, match="no rows with pass 'bwd'"):
        plotting.plot_time(table(), which="bwd")


def test_a_quantity_that_time_has_not_is_refused():
    with pytest.raises(ValueError, match="quantity='peak_mib' is not known: 'ms' or 'tflops'"):
        plotting.plot_time(benchmark.reference_results(), quantity="peak_mib")


def test_a_real_sweep_can_be_drawn():
    df = benchmark.sweep(
        ["naive", "sdpa_flash", "flash_attn", "triton_v2"], [16, 32], heads=1, head_dim=16, seconds_per_point=0,
        passes=("fwd", "bwd"), progress=False,
    )  # fmt: skip
    for plot in (plotting.plot_time, plotting.plot_memory, plotting.plot_error):
        check(plot(df, which="bwd"))


@pytest.mark.parametrize("order", ["v1", "v2", "both"])
@pytest.mark.parametrize("causal", [False, True])
def test_tile_order(order, causal):
    figure = plotting.plot_tile_order(100, 130, 32, 32, order=order, causal=causal)
    check(figure)
    assert len(figure.axes) == (2 if order == "both" else 1)
    assert "32 keys each, the last 2" in figure.axes[0].get_xlabel()
    assert ("masked, never visited" in legend(figure)) == causal
    check(plotting.plot_tile_order(160, 160, 32, 32, order=order, causal=causal))  # square: the tallest for its width


def test_tile_order_numbers():
    def numbers(order, causal):
        (ax,) = plotting.plot_tile_order(96, 96, 32, 32, order=order, causal=causal).axes
        grid = {}
        for text in ax.texts:
            x, y = text.get_position()
            grid[int(y), int(x)] = int(text.get_text())
        return [[grid.get((i, j)) for j in range(3)] for i in range(3)]

    assert numbers("v1", False) == [[1, 4, 7], [2, 5, 8], [3, 6, 9]]
    assert numbers("v1", True) == [[1, None, None], [2, 4, None], [3, 5, 6]]
    assert numbers("v2", False) == [[1, 2, 3]] * 3
    assert numbers("v2", True) == [[1, None, None], [1, 2, None], [1, 2, 3]]
    with pytest.raises(ValueError, match="'v1', 'v2' or 'both'"):
        plotting.plot_tile_order(64, 64, 32, 32, order="v3")


def test_online_softmax():
    x = torch.randn(20)
    trace = reference.online_softmax_trace(x, 6)
    figure = plotting.plot_online_softmax(trace, x)
    check(figure)
    steps = [p for ax in figure.axes for p in ax.patches if isinstance(p, matplotlib.patches.StepPatch)]
    m, l = (list(step.get_data().values) for step in steps)  # noqa: E741
    assert m == pytest.approx([float(s["m"]) for s in trace])
    assert l == pytest.approx([float(s["l"]) for s in trace])
    check(plotting.plot_online_softmax(reference.online_softmax_trace(torch.randn(2, 3, 8), 4), torch.randn(2, 3, 8)))


@pytest.mark.parametrize(("n_q", "n_k"), [(8, 8), (4, 32), (100, 20)])
def test_mask(n_q, n_k):
    mask = reference.causal_mask(n_q, n_k)
    figure = plotting.plot_mask(mask)
    check(figure)
    (ax,) = figure.axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("key j", "query i")
    assert f"{mask.float().mean():.0%}" in ax.get_title(loc="left")
    assert (ax.collections[0].get_array().reshape(n_q, n_k) == mask.numpy()).all()
    with pytest.raises(ValueError, match="N_q, N_k"):
        plotting.plot_mask(mask[None])


def test_row_errors_are_drawn_with_the_line_of_the_rule():
    fig = plotting.plot_row_errors(
        {"right": torch.full((5,), 1e-3), "bug": torch.tensor([0, 0, 1.0, 0, 0])}, 1e-2, "CPU."
    )
    (ax,) = fig.axes
    labels = [line.get_label() for line in ax.lines]
    assert labels == ["right", "bug", "what the 2 × rule allows"]
    assert ax.get_yscale() == "log"
    with pytest.raises(ValueError, match="6 results, but colours for only 5"):  # none is left out without a word
        plotting.plot_row_errors({str(i): torch.zeros(5) for i in range(6)}, 1e-2)


def test_memory_hierarchy():
    figure = plotting.plot_memory_hierarchy()
    check(figure, axes=[])
    assert "SRAM" in texts(figure) and "HBM" in texts(figure) and "2205.14135" in texts(figure)


def test_traffic():
    shape = {"batch": 1, "heads": 2, "seqlen": 256, "head_dim": 64, "block_m": 64, "block_n": 64}
    model = {name: analysis.io_bytes(name, **shape) for name in ("naive", "v1", "v2")}
    figure = plotting.plot_traffic(model, {name: model[name] for name in ("v1", "v2")}, title="N = 256")
    check(figure)
    (ax,) = figure.axes
    assert [t.get_text().replace("\n", " ") for t in ax.get_xticklabels()] == [
        "naive model", "v1 model", "v1 counted", "v2 model", "v2 counted",
    ]  # fmt: skip
    heights = [0.0] * 5
    for bar in ax.patches:
        heights[round(bar.get_x() + bar.get_width() / 2)] += bar.get_height()
    expected = [analysis.total_bytes(model[name]) / 2**20 for name in ("naive", "v1", "v1", "v2", "v2")]
    assert heights == pytest.approx(expected)
    assert "(MiB)" in ax.get_ylabel() and {"Q", "K", "V", "O"} < set(legend(figure))
    check(plotting.plot_traffic(model))


def test_roofline():
    ceilings = analysis.Ceilings(tflops=100.0, gb_per_s=1000.0, dtype="float16", machine="Some GPU")
    figure = plotting.plot_roofline(analysis.roofline_points(table(), ceilings), ceilings)
    check(figure)
    (ax,) = figure.axes
    assert "FLOP/byte" in ax.get_xlabel() and "TFLOP/s" in ax.get_ylabel()
    assert legend(figure) == ["roof, measured", "naive", "SDPA flash", "our Triton v2"]
    words = texts(figure)
    assert "Some GPU" in words and "100 TFLOP/s" in words and "1 TB/s" in words and "ridge: 100" in words


def test_profile():
    df = pd.DataFrame(
        {
            "op": ["aten::bmm", "void flash::kernel<float, 3>(int)", "aten::t"],
            "calls": [2.0, 1.0, 1.0], "self_ms": [3.0, 1.0, 0.001], "share": [0.75, 0.25, 0.0002], "gflops": math.nan,
        }
    )  # fmt: skip
    df.attrs.update(total_ms=4.001, device="GPU", machine="Some GPU")
    figure = plotting.plot_profile({"naive": df, "sdpa_flash": df})
    check(figure)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["bmm", "kernel"]  # the last takes no time
    assert "ms" in figure.axes[1].get_xlabel() and "Some GPU" in texts(figure)
    assert legend(figure) == ["naive", "SDPA flash"]
    check(plotting.plot_profile(df))


def test_training():
    frame = pd.DataFrame({"step": range(1, 31), "loss": [4 - i / 20 for i in range(30)], "tokens_per_s": 1000.0})
    frame["grad_norm"] = [math.inf, *range(1, 30)]  # the first step's gradients overflowed

    class History:
        pass

    history = History()
    history.frame = frame
    figure = plotting.plot_training({"sdpa": history, "triton_v2": frame}, window=5)
    check(figure)
    left, middle, right = figure.axes
    assert "nats per token" in left.get_ylabel() and "tokens per second" in right.get_ylabel()
    assert "gradient norm" in middle.get_ylabel() and math.isnan(middle.lines[0].get_ydata()[0])
    assert runtime.machine in texts(figure) and "SDPA" in legend(figure)
    check(plotting.plot_training(frame))


def memory_row(**changes):
    row = {
        "model": "124M", "impl": "sdpa", "checkpointing": False, "chunked_loss": False, "seqlen": 8192, "batch": 1,
        "peak_gib": 12.7, "reserved_gib": 14.3, "cap_gib": 14.9, "tokens_per_s": 1.0, "loss": 1.0, "status": "ok",
    }  # fmt: skip
    return row | changes


OOM = {"impl": "naive", "status": "oom", "peak_gib": math.nan, "reserved_gib": math.nan}


def test_memory_bars():
    rows = [memory_row(**OOM), memory_row(), memory_row(checkpointing=True, chunked_loss=True, peak_gib=3.2)]
    figure = plotting.plot_memory_bars(rows, 14.9)
    check(figure)
    (ax,) = figure.axes
    assert "(GiB)" in ax.get_xlabel() and "14.9 GiB" in ax.get_title(loc="left")
    words = texts(figure)
    assert "out of memory" in words and "12.7 (14.3 reserved)" in words and "checkpointing + chunked loss" in words
    assert "does not fit" in legend(figure) and "cap: 14.9 GiB" in legend(figure)
    check(plotting.plot_memory_bars([memory_row(**OOM, cap_gib=math.nan)]))
    check(plotting.plot_memory_bars(pd.DataFrame([memory_row(cap_gib=math.nan)])))
    stored = pd.DataFrame(rows)
    stored.attrs["machine"] = "the stored GPU"
    figure = plotting.plot_memory_bars(stored[stored["status"] == "ok"].reset_index(drop=True))
    title = figure.axes[0].get_title(loc="left")
    assert "the stored GPU" in title and runtime.machine not in title
    with pytest.raises(ValueError, match="no rows"):
        plotting.plot_memory_bars([])


def test_figures_are_readable_in_a_dark_notebook_and_leave_its_style_alone():
    with plt.style.context("dark_background"):
        before = dict(plt.rcParams)
        figure = plotting.plot_time(table())
        assert dict(plt.rcParams) == before
    assert matplotlib.colors.to_hex(figure.get_facecolor()) == "#ffffff"
    title = figure.axes[0].title
    assert matplotlib.colors.to_hex(title.get_color()) == "#000000"


def test_pyplot_holds_no_figure():
    """Else a notebook would show each figure twice."""
    plotting.plot_time(table())
    assert plt.get_fignums() == []


def of_models():
    rows = [
        {"model": model, "work": "step", "impl": impl, "batch": 4, "seqlen": n, "ms": n / (i + 1), "tokens_per_s": 1e3,
         "peak_gib": 2.0, "status": "ok", "reason": ""}
        for model in ("124M", "355M") for i, impl in enumerate(IMPLS) for n in (512, 1024)
    ]  # fmt: skip
    rows[1] |= {"ms": math.nan, "tokens_per_s": math.nan, "status": "oom"}
    frame = pd.DataFrame(rows)
    frame.attrs["machine"] = "Some GPU"
    return frame


@pytest.mark.parametrize("quantity", ["ms", "tokens_per_s", "peak_gib"])
def test_models_have_a_panel_each_and_a_mark_where_memory_ended(quantity):
    figure = plotting.plot_models(of_models(), "step", quantity)
    check(figure)
    assert len(figure.axes) == 2 and "naive: out of memory" in legend(figure)
    assert "Some GPU" in texts(figure) and "355M" in texts(figure)


def test_models_refuse_what_is_not_there():
    with pytest.raises(ValueError, match="no row of 'decode'"):
        plotting.plot_models(of_models(), "decode")
    with pytest.raises(ValueError, match="tokens_per_s"):
        plotting.plot_models(of_models(), quantity="miles")


def test_tile_kinds_are_counted_from_the_mask():
    figure = plotting.plot_tile_kinds(reference.causal_mask(40, 64), 16, 16)
    check(figure)
    assert "11 of 12 tiles are visited" in texts(figure) and "mean: 3.7 tiles" in texts(figure)
    with pytest.raises(ValueError, match="N_q, N_k"):
        plotting.plot_tile_kinds(torch.ones(1, 4, 4), 2, 2)


# --- long contexts --------------------------------------------------------------------------------------------


def test_a_ladder_shows_lengths_speeds_and_failures():
    common = {"model": "124M", "cap_gib": 14.9, "predicted_gib": 9.0, "bound": 70_000.0}
    rows = pd.DataFrame([
        common | {"rung": "eager", "seqlen": 1024, "status": "oom", "tokens_per_s": math.nan, "peak_gib": math.nan},
        common | {"rung": "+ flash", "seqlen": 65536, "status": "ok", "tokens_per_s": 5e4, "peak_gib": 9.2},
        common | {"rung": "+ more", "seqlen": 131072, "status": "ok", "tokens_per_s": 4e4, "peak_gib": 9.2,
                  "bound": math.nan},
    ])  # fmt: skip
    figure = plotting.plot_ladder(rows)
    check(figure, axes=figure.axes[:1])
    assert "65,536, 50,000 tokens/s" in texts(figure) and "does not fit at 1,024" in texts(figure)
    assert "≥ 131,072, 40,000 tokens/s" in texts(figure)  # nothing longer was tried
    with pytest.raises(ValueError, match="no rows"):
        plotting.plot_ladder(rows.iloc[:0])


def test_a_ledger_stacks_its_kinds():
    table = pd.DataFrame({"logits": [4.5, math.nan], "MLP": [2.0, 1.5]}, index=["plain", "chunked"])
    figure = plotting.plot_ledger(table, "Where is it?", cap_gib=14.9)
    check(figure)
    (ax,) = figure.axes
    assert [(bar.get_x(), bar.get_width()) for bar in ax.patches] == [(0, 4.5), (0, 0), (4.5, 2.0), (0, 1.5)]
    assert "6.5" in texts(figure) and "1.5" in texts(figure) and "card: 14.9 GiB" in legend(figure)
    with pytest.raises(ValueError, match="no rows"):
        plotting.plot_ledger(table.iloc[:0])


def test_loss_by_position_and_accuracy_have_error_bars():
    by_position = pd.DataFrame({"from": [1, 512], "to": [512, 1024], "mean": [4.0, 3.0], "error": [0.1, 0.2]})
    figure = plotting.plot_loss_by_position({"short": by_position, "long": by_position})
    check(figure)
    assert "short" in legend(figure)
    rows = {"task": ["fact", "fact", "code"], "distance": [64, 512, 64], "accuracy": [1.0, 0.5, 1.0]}
    answers = pd.DataFrame(rows | {"error": 0.05, "guess": 1 / 32})
    figure = plotting.plot_accuracy({"short": answers, "long": answers})
    check(figure)
    assert "guessing" in legend(figure) and len(figure.axes) == 2
